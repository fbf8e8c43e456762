"""Two real processes of the command line, started as docs/training.md says: they stop and go on as one."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np

from jaxldm import cli, training

ROOT = pathlib.Path(__file__).parents[2]
WORDS = (
    "train",
    "smoke-dit",
    "--epochs",
    "15",
    "--classifier-epochs",
    "1",
    "--save-every",
    "5",
    "--seed",
    "3",
)
STEPS = 60


def start(folder, *more):
    """Both processes, of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    words = [*WORDS, "--run-dir", folder, "--mesh", "data=2,fsdp=2", *more, "--coordinator", place]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "jaxldm", *words, "--num-processes", "2", "--process-id", str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]


def ends(processes):
    """(exit code, what it said) of each, without the lines of the library that connects them."""
    try:
        said = [process.communicate(timeout=120)[0].splitlines(keepends=True) for process in processes]
    finally:
        for process in processes:
            process.kill()
    own = ["".join(line for line in lines if not line.startswith("[Gloo]")) for lines in said]
    return [(process.returncode, words) for process, words in zip(processes, own, strict=True)]


def test_they_stop_together_and_go_on_to_the_losses_of_one_process(tmp_path):
    processes = start(tmp_path / "two")
    checkpoints = tmp_path / "two" / "diffusion" / "checkpoints"
    deadline = time.monotonic() + 120
    while not any(checkpoints.glob("[0-9]*")) and all(process.poll() is None for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    first, second = ends(processes)
    assert (first[0], second[0]) == (143, 143), (first, second)
    for _, said in (first, second):
        assert said.count("to go on, type the same command with --resume") == 1, said
    assert "stopping: " in second[1] and "stopping: " not in first[1] and "epoch" not in second[1]

    processes = start(tmp_path / "two", "--resume")
    assert (
        cli.main([*WORDS, "--run-dir", str(tmp_path / "one"), "--devices", "1", "--quiet"]) == 0
    )  # meanwhile
    first, second = ends(processes)
    assert (first[0], second) == (0, (0, "")), (first, second)
    assert "resuming from the checkpoint of step" in first[1] and "finished: " in first[1]

    runs = [training.RunFolder(tmp_path / name) for name in ("two", "one")]
    logs = [training.read_log(run.stage("diffusion").log) for run in runs]
    np.testing.assert_array_equal(logs[0]["step"], np.arange(1, STEPS + 1))
    np.testing.assert_allclose(logs[0]["loss"], logs[1]["loss"], rtol=2e-4)
    files = [{path.name for path in run.path.rglob("*.*") if "events." not in path.name} for run in runs]
    assert files[0] - files[1] == {"log.1.csv", "ocdbt.process_1"} and files[1] < files[0]
