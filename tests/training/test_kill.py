"""`kill -9` in the middle of a checkpoint, of a row of the log, of the clean-up; then `--resume`."""

import os
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from toy import ToyBatches, toy

from jaxldm.training.log import CLOCKS, read_log
from jaxldm.training.loop import Plan, fit
from jaxldm.training.mesh import make_mesh

HERE = pathlib.Path(__file__).parent


def finish(folder, resume):
    state, train_step = toy()
    said = []
    state = fit(
        state,
        train_step,
        ToyBatches(),
        Plan(12, save_every=5),
        folder,
        resume=resume,
        mesh=make_mesh(1),
        log=said.append,
    )
    state = jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))
    log = read_log(folder / "log.csv")
    return state, {name: column for name, column in log.items() if name not in CLOCKS}, said


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The children find each other's compiled programs on disk."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("runs") / "straight", resume=False)


@pytest.mark.parametrize(
    ("moment", "goes_on_from"),
    [
        ("inside_orbax", 5),
        ("before_the_rename", 5),
        ("inside_the_clean_up", 10),
        ("inside_a_row_of_the_log", None),
    ],
)
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(
    tmp_path, environment, straight, moment, goes_on_from
):
    folder = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, HERE / "killed_run.py", folder, moment],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    state, log, said = finish(folder, resume=True)
    if goes_on_from is None:
        assert not any(line.startswith("resuming") for line in said)
    else:
        assert f"resuming from the checkpoint of step {goes_on_from}" in said
    chex.assert_trees_all_equal(state, straight[0])
    chex.assert_trees_all_equal(log, straight[1])
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["10", "12"]
