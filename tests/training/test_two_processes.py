"""Two real processes on one run, over `jax.distributed` with Gloo's collectives."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
from one_of_two_processes import BATCH, ROWS, STEPS, train, train_recipe

from jaxldm import training
from jaxldm.training.store import TrainingStore

HERE = Path(__file__).parent
PROGRAM = HERE / "one_of_two_processes.py"


def test_two_processes_train_one_network_and_read_their_own_examples(tmp_path):
    """fsdp=4: every array that can be split lies on both, and each writes its parts; then on with fsdp=2."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, tmp_path, port, str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    alone = train(tmp_path / "alone", training.make_mesh(1))  # meanwhile
    train_recipe(tmp_path / "recipe-alone", training.make_mesh(1))
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said

    found = [json.loads((tmp_path / f"seen.{number}.json").read_text()) for number in range(2)]
    seen = [each["rows"] for each in found]
    for first, second, whole in zip(*seen, alone, strict=True):
        assert len(first) == len(second) == BATCH // 2 and first + second == whole
    per_epoch = ROWS // BATCH
    for start in range(0, STEPS, per_epoch):
        epoch = [row for part in seen for rows in part[start : start + per_epoch] for row in rows]
        assert sorted(epoch) == list(range(ROWS))  # every example once

    logs = [training.read_log(tmp_path / "run" / name) for name in ("log.csv", "log.1.csv")]
    expected = training.read_log(tmp_path / "alone" / "log.csv")
    for name in ("loss", "grad_norm", "largest"):
        np.testing.assert_array_equal(logs[0][name], logs[1][name])
        np.testing.assert_allclose(logs[0][name], expected[name], rtol=2e-5)
    kept = [last_checkpoint(tmp_path / name) for name in ("run", "alone")]
    chex.assert_trees_all_equal_shapes(*kept)
    chex.assert_trees_all_close(*kept, rtol=1e-4, atol=1e-6)
    assert "training: epoch 2/2" in said[0] and "epoch" not in said[1]
    assert said[0].count("resuming from the checkpoint of step 4") == 1 and "resuming" not in said[1]

    assert any(line.startswith("diffusion: epoch 1/1") for line in found[0]["said"]) and not found[1]["said"]
    runs = [training.RunFolder(tmp_path / name) for name in ("recipe", "recipe-alone")]
    for stage in ("autoencoder", "diffusion"):
        both, one = (training.read_log(run.stage(stage).log)["loss"] for run in runs)
        assert len(one) == 4
        np.testing.assert_allclose(both, one, rtol=2e-5)
    files = [{path.name for path in run.path.rglob("*.*") if "events." not in path.name} for run in runs]
    assert files[0] - files[1] == {"log.1.csv", "ocdbt.process_1"} and files[1] < files[0]


def last_checkpoint(folder):
    """The arrays of the last checkpoint."""
    return TrainingStore(folder / "checkpoints").read(STEPS)
