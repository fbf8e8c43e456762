"""Is a training the same, whatever interrupts it and however it is split?

Question: is a run that was killed again and again bit for bit the unbroken one, and do devices, processes and
          parts of a batch change the losses beyond float32 rounding?
Command:  python -m experiments.benchmarks.exactness       (--quick: two kills)
Needs:    nothing but jaxldm. Minutes and figures: README.md in this folder.

`kill -9` comes at random moments, to the training or to one of the two processes that read its pictures,
wherever they are: in a save, in an update, while they compile. This process computes nothing before that is
done, so that it may fork.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from experiments.benchmarks.exactness_side import fit, network
from experiments.benchmarks.timing import machine
from experiments.faults.kills import child, differences
from experiments.figures import quick_options, save_results
from jaxldm import data, models, training
from jaxldm.commands.terminal import run_script
from jaxldm.training.mesh import bytes_per_device, state_shardings

SIZES = ((30, 30), (20, 44), (44, 20))  # of the pictures: in buckets, they are read from disk
KILLS_OF_A_RUN = 6


@dataclasses.dataclass(frozen=True)
class Exactness:
    """Kill, split and divide trainings, and write how far each is from the plain one."""

    quick: bool = False
    """Two kills: only to see that everything runs."""
    kills: int = 30
    """How often a training, or one of its readers, is killed."""
    seed: int = 0
    """Of the moments."""
    output_dir: Path = Path("runs/benchmarks")
    """Where exactness.md and exactness.json go."""


def recipe() -> training.Recipe:
    """A transformer on pictures of three sizes."""
    smoke = training.RECIPES["smoke-dit"]
    overrides = {"hidden_size": 8, "depth": 1, "num_heads": 2, "patch_size": 2}
    own = dataclasses.replace(smoke.diffusion, epochs=8, batch_size=8, save_every=1, overrides=overrides)
    buckets = data.Buckets(12, 2, max_aspect=2.25)
    return dataclasses.replace(smoke, classifier=None, max_train_images=None, buckets=buckets, diffusion=own)


def write_pictures(folder: Path, number: int = 100) -> Path:
    """Plain pictures in two classes."""
    for n in range(number):
        path = folder / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*SIZES[n % 3], 3), n, np.uint8)).save(path)
    return folder


def train(pictures: Path, folder: Path, kill: tuple[float, float] | None = None) -> None:
    """Train or go on; `kill`: after so many seconds, the training (below 0.7) or one of its readers."""
    if kill is not None:
        timer = threading.Timer(kill[0], _kill, (kill[1],))
        timer.daemon = True
        timer.start()
    training.train(
        recipe(), folder, dataset=pictures, devices=1, workers=2, resume=folder.exists(), bar=False
    )


def _kill(which: float) -> None:
    readers = [process.pid for process in multiprocessing.active_children() if process.pid]
    victim = os.getpid() if which < 0.7 or not readers else readers[int(1000 * which) % len(readers)]
    if victim != os.getpid():
        with Path(os.environ["EXACTNESS_READERS"]).open("a") as counted:
            counted.write("killed\n")
    os.kill(victim, signal.SIGKILL)


def kill_trainings(place: Path, count: int, seed: int) -> dict[str, Any]:
    """Kills at random moments, and what then differs from the unbroken run."""
    numbers, readers = np.random.default_rng(seed), place / "readers.txt"
    readers.touch()
    os.environ["EXACTNESS_READERS"] = str(readers)
    pictures, straight = write_pictures(place / "pictures"), place / "straight"
    _unbroken(place, pictures, straight)  # compiles
    began = time.perf_counter()
    _unbroken(place, pictures, place / "again")
    seconds = time.perf_counter() - began
    found = differences(straight, place / "again")
    killed, runs = 0, 0
    while killed + len(readers.read_text().split()) < count:
        folder, in_this_run = place / f"run-{runs}", 0
        runs += 1
        while True:
            done = killed + len(readers.read_text().split())
            kill = None
            if done < count and in_this_run < KILLS_OF_A_RUN:
                kill = float(numbers.uniform(0, seconds)), float(numbers.uniform())
            code, line = child(place, partial(train, pictures, folder, kill))
            if code != -signal.SIGKILL:
                break
            killed, in_this_run = killed + 1, in_this_run + 1
        if code:
            raise RuntimeError(f"a training that was killed does not go on: {line}")
        found += differences(straight, folder)
    of_readers = len(readers.read_text().split())
    return {
        "kills of trainings": killed,
        "kills of readers": of_readers,
        "runs": runs,
        "files that differ": len(found),
        "which": found[:10],
        "seconds of an unbroken run": round(seconds, 1),
    }


def _unbroken(place: Path, pictures: Path, folder: Path) -> None:
    code, line = child(place, partial(train, pictures, folder))
    if code:
        raise RuntimeError(f"the unbroken one failed: {line}")


def start_two_processes(place: Path) -> list[subprocess.Popen[str]]:
    """Two processes of two devices each, that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    code = (
        "import sys; from pathlib import Path; from experiments.benchmarks import exactness_side; "
        "exactness_side.two_processes(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
    )
    program = [sys.executable, "-c", code, str(place), port]
    return [
        subprocess.Popen([*program, str(number)], env=environment, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]


def split_trainings(place: Path) -> dict[str, Any]:
    """The largest relative difference of a loss from one device's, in each way to split a training."""
    jax.config.update("jax_num_cpu_devices", 8)
    processes = start_two_processes(place)
    one = np.array(fit(place / "one", training.make_mesh(1)))

    def apart(losses: Any) -> float:
        return float(np.abs(np.asarray(losses) / one - 1).max())

    split = training.make_mesh(8, fsdp=2, tensor=2)
    found: dict[str, Any] = {
        "data 2 x fsdp 2 x tensor 2": apart(fit(place / "eight", split)),
        "4 parts of 16 for a batch of 64": apart(fit(place / "parts", training.make_mesh(1), accumulate=4)),
    }
    for first, second, mesh in (("one", "eight", split), ("eight", "one", training.make_mesh(1))):
        folder = place / f"{first}-{second}"
        _copy_until(place / first, folder, step=6)
        found[f"on {first}, then on {second}"] = apart(fit(folder, mesh, resume=True))
    for process in processes:
        _, words = process.communicate(timeout=300)
        if process.returncode:
            raise RuntimeError(f"one of two processes failed: {words[-1000:]}")
    found["two processes"] = apart(json.loads((place / "losses.json").read_text()))
    return found


def _copy_until(source: Path, target: Path, step: int) -> None:
    """A run as it was after its checkpoint of a step."""
    shutil.copytree(source, target)
    for path in (target / "checkpoints").iterdir():
        if path.name != str(step):
            shutil.rmtree(path)


def share_of_a_device() -> dict[str, Any]:
    """Bytes of the state on a device of the mesh, as a share of all."""
    optimizer = training.optimizer(1e-3, 2, 12)
    params = models.init(network(), jax.random.key(0))
    state = training.create_train_state(jax.random.key(1), params, optimizer)
    meshes = {"one": training.make_mesh(1), "eight": training.make_mesh(8, fsdp=2, tensor=2)}
    held = {
        name: bytes_per_device(jax.device_put(state, state_shardings(mesh, state)))
        for name, mesh in meshes.items()
    }
    return {"bytes of the state on a device": held, "share": round(held["eight"] / held["one"], 3)}


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        *((name, str(value)) for name, value in results["kills"].items() if name != "which"),
        *((f"{name}: largest relative difference", f"{v:.1e}") for name, v in results["split"].items()),
        ("state on each of eight devices, of all", f"{results['state']['share']:.0%}"),
    ]
    return "\n".join(
        [
            "| what | figure (of losses, where it is a difference) |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )


def main(options: Exactness) -> None:
    options = quick_options(options, kills=2)
    with tempfile.TemporaryDirectory(prefix="exactness-") as folder:
        place = Path(folder)
        results = {"kills": kill_trainings(place, options.kills, options.seed)}
        print(json.dumps(results), flush=True)
        results["split"] = split_trainings(place)
        results["state"] = share_of_a_device()
    print(table(results))
    setting = machine("exactness", {})
    text = f"```\n{json.dumps(setting, indent=1)}\n```\n\n{table(results)}\n"
    files = {"exactness.md": text, "exactness.json": json.dumps({**setting, **results}, indent=1)}
    save_results(options.output_dir, files)


if __name__ == "__main__":
    run_script(main, Exactness)
