"""One process trains in a folder, and notices when that folder is no longer where it was."""

import errno
import os
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from toy import ToyBatches, toy

from jaxldm import cli, files
from jaxldm.errors import CheckpointError
from jaxldm.training import RECIPES
from jaxldm.training.hold import HeldFolder
from jaxldm.training.log import read_log
from jaxldm.training.loop import Plan, fit
from jaxldm.training.mesh import make_mesh
from jaxldm.training.runs import open_run

OPTIMIZED = True  # as in test_fit.py, whose programs these are


def run(folder, on_sample=None, *, resume=False):
    state, train_step = toy()
    plan = Plan(12, save_every=5, sample_every=1 if on_sample else 0)
    options = {"mesh": make_mesh(1), "log": lambda line: None, "on_sample": on_sample, "resume": resume}
    state = fit(state, train_step, ToyBatches(), plan, folder, **options)
    return jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))


def test_the_second_is_told_who_holds_the_folder(tmp_path):
    said = []
    with HeldFolder(tmp_path / "run", said.append):
        words = rf"run is in use by process {os.getpid()} on .* since 20.*: wait until"
        with pytest.raises(CheckpointError, match=words) as raised, HeldFolder(tmp_path / "run", said.append):
            pass
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
        with pytest.raises(CheckpointError, match="in use"):
            run(tmp_path / "run", resume=True)
    assert os.listdir(tmp_path / "run") == [] and not said
    run(tmp_path / "run")


def test_the_command_says_so_in_one_line_and_ends_with_2(tmp_path, capsys):
    recipe = RECIPES["smoke"]
    open_run(tmp_path, recipe, recipe.load_data(), resume=False)
    with HeldFolder(tmp_path, print):
        assert cli.main(["train", "smoke", "--run-dir", str(tmp_path), "--resume"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and f"is in use by process {os.getpid()}" in told[0]


def test_the_lock_dies_with_its_process(tmp_path):
    """Killed: the file stays, the lock does not."""
    code = (
        "import os, signal, sys; from jaxldm.training.hold import HeldFolder\n"
        "with HeldFolder(sys.argv[1], print): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert os.listdir(tmp_path) == [".lock"]
    with HeldFolder(tmp_path, print):
        pass
    assert os.listdir(tmp_path) == []


def test_without_locks_it_is_said_once_and_training_goes_on(tmp_path, monkeypatch):
    def no_locks(descriptor, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    said = []
    with HeldFolder(tmp_path, said.append), HeldFolder(tmp_path, said.append):
        assert len(said) == 2 and "without locks" in said[0]


def removed(folder):
    while folder.exists():  # a save in the background may write to it meanwhile
        shutil.rmtree(folder, ignore_errors=True)


def moved(folder):
    folder.rename(folder.with_name("moved"))


def replaced(folder):
    folder.rename(folder.with_name("moved"))
    (folder / "stage").mkdir(parents=True)
    (folder / "stage" / "theirs").write_text("")
    removed(folder.with_name("moved"))


@pytest.mark.parametrize(("change", "place"), [(removed, "run"), (moved, "moved"), (replaced, "run.rescued")])
@pytest.mark.parametrize("at", [7, 12], ids=["half way", "at the end"])
def test_the_state_is_saved_where_it_can_be(tmp_path, change, place, at):
    folder = tmp_path / "run" / "stage"

    def on_sample(state, step):
        if step == at:
            change(folder.parent)

    with pytest.raises(CheckpointError, match=rf"--resume and --run-dir .*/{place}$") as raised:
        run(folder, on_sample)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    rescued = tmp_path / place / "stage"
    steps = {path.name for path in (rescued / "checkpoints").iterdir()}
    assert str(min(at + 1, 12)) in steps
    if change is replaced:
        assert set(os.listdir(folder)) <= {"theirs", "checkpoints"} and not list(folder.glob("*/1?"))
    state = run(rescued, resume=True)
    if at < 12 or change is moved:
        assert read_log(rescued / "log.csv")["step"][-1] == 12
    chex.assert_trees_all_equal(state, run(tmp_path / "straight"))


def test_a_run_folder_that_is_gone_between_two_stages_is_noticed(tmp_path):
    with HeldFolder(tmp_path / "run", print) as held:
        held.check()
        moved(tmp_path / "run")
        with pytest.raises(CheckpointError, match=r"was moved to .*moved during the training"):
            held.check()
