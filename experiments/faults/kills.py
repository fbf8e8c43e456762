"""`kill -9` at chosen operations on files, in processes of their own; see README.md.

This process imports everything and computes nothing, so that it may fork: a child starts in milliseconds, and
dies by `os.kill(os.getpid(), SIGKILL)` in place of an operation of its choice (`kill_points`). Whatever is
read or compared by JAX is so in a child, too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import flax.linen as nn
import jax
import numpy as np

from experiments.faults.kill_points import die, kill_points
from experiments.faults.result import Result
from jaxldm import checkpoints, cli, files, models, pipelines, training
from jaxldm.commands import load_command
from jaxldm.pipelines.network import Network
from jaxldm.training.events import PREFIX as EVENTS
from jaxldm.training.log import CLOCKS
from jaxldm.training.report import REPORT_FILE

RECIPE = "smoke"
SHARES = {"training": 0.3, "saving": 0.3, "exporting": 0.2, "sampling": 0.2}
KILLS_OF_A_RUN = 6  # a training is killed so often, resumed each time, before it may end
SHARD_SIZES = (10**9, 700, 2_000)
VERSIONS = len(SHARD_SIZES)


def run(count: int, seed: int) -> Result:
    """Kills `count` writers: trainings, saves, exports and samplings."""
    start, numbers = time.perf_counter(), np.random.default_rng(seed)
    counts = {kind: round(count * share) for kind, share in SHARES.items()}
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        place = Path(folder)
        straight = place / "straight"
        _must(place, lambda: train(place, straight, resume=False))
        faults, done = kill_trainings(place, counts["training"], numbers)
        for kind in ("saving", "exporting", "sampling"):
            faults += globals()[f"kill_{kind}"](place, counts[kind], numbers)
            done += counts[kind]
    return Result("kills", done, faults, time.perf_counter() - start)


def child(place: Path, action: Callable[[], object]) -> tuple[int, str]:
    """(exit code, last line on the screen) of a fork that does `action`; -9 when it was killed."""
    log = place / "screen.txt"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_compilation_cache_dir", str(place / "compiled"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
            code = cast(int, action() or 0)
        except BaseException:  # noqa: BLE001  (this is the end of the process)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return os.waitstatus_to_exitcode(status), next((line for line in reversed(lines) if line.strip()), "")


def _must(place: Path, action: Callable[[], object]) -> None:
    code, line = child(place, action)
    if code:
        raise RuntimeError(f"the unbroken one failed: {line}")


def number_of_operations(place: Path, folder: Path, write: Callable[[], object]) -> int:
    """How many operations on what lies below `folder` an unbroken call makes, in a child."""
    counted = place / "count.json"

    def count() -> None:
        with kill_points(folder) as counter:
            write()
        counted.write_text(json.dumps(len(counter.done)))

    _must(place, count)
    return json.loads(counted.read_text())


def train(place: Path, folder: Path, *, resume: bool) -> None:
    training.train(training.RECIPES[RECIPE], folder, devices=1, resume=resume, bar=False)


def kill_trainings(place: Path, count: int, numbers: np.random.Generator) -> tuple[list[str], int]:
    """Kills trainings, resumes them, and compares what they leave with the unbroken one."""
    unbroken = place / "counted"
    total = number_of_operations(place, unbroken, lambda: train(place, unbroken, resume=False))
    faults = differences(place / "straight", unbroken)
    done = 0
    while done < count:
        folder, history = place / "run", []
        while True:
            at = int(numbers.integers(total)) if not history else int(numbers.integers(total // 3))
            may_end = done >= count or len(history) >= KILLS_OF_A_RUN

            def go_on(at: int | None = None if may_end else at, folder: Path = folder) -> None:
                with kill_points(folder, at, die):
                    train(place, folder, resume=folder.exists())

            code, line = child(place, go_on)
            if code == -signal.SIGKILL:
                done += 1
                history.append(at)
                continue
            what = f"training killed at the operations {history}: "
            if code:
                faults.append(f"{what}resuming fails: {line}")
            else:
                faults += [what + difference for difference in differences(place / "straight", folder)]
            break
        shutil.rmtree(folder)
    shutil.rmtree(unbroken)
    return faults, done


def differences(first: Path, second: Path) -> list[str]:
    """The files in which two runs differ: all but the clocks of the logs, and the checkpoints on the way.

    A report is only looked for: it is made of the logs, and says how many minutes they took. Of TensorBoard's
    files there is one for each start.
    """
    names = [
        {
            path.relative_to(folder)
            for path in folder.rglob("*")
            if path.is_file() and "checkpoints" not in path.parts and not path.name.startswith(EVENTS)
        }
        for folder in (first, second)
    ]
    found = [f"only one has {name}" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        contents = [(folder / name).read_bytes() for folder in (first, second)]
        if name.name == "log.csv":
            contents = [without_clocks(content) for content in contents]
        if contents[0] != contents[1] and name.name != REPORT_FILE:
            found.append(f"{name} differs")
    return found


def without_clocks(content: bytes) -> list[list[bytes]]:
    """The fields of a log but those that a second run has differently."""
    rows = [line.split(b",") for line in content.split(b"\n")]
    clocks = {place for place, name in enumerate(rows[0]) if name.decode() in CLOCKS}
    return [[field for place, field in enumerate(row) if place not in clocks] for row in rows]


def kill_writers(
    place: Path,
    kind: str,
    count: int,
    numbers: np.random.Generator,
    write: Callable[[Path, int], object],
    version_of: Callable[[Path], int],
) -> list[str]:
    """Kills `write(folder, version)` over an earlier version, then reads: one of the two, and whole.

    `version_of` raises `ValueError` for a mixture. A write that ends before its kill comes is not one of the
    `count`: its operations were counted where a killed one had left more to remove.
    """
    faults, folder, totals = [], place / kind / "out", {}
    folder.parent.mkdir()
    current, done, ended = None, 0, 0
    while done < count and ended <= count:
        if current is None:
            shutil.rmtree(folder, ignore_errors=True)
            current = 0
            _must(place, lambda: write(folder, 0))
        new = (current + int(numbers.integers(1, VERSIONS))) % VERSIONS
        if (current, new) not in totals:
            spare = place / f"{kind}-{current}-{new}"
            shutil.copytree(folder.parent, spare)
            totals[current, new] = number_of_operations(place, spare, partial(write, spare / "out", new))
            shutil.rmtree(spare)
        at = int(numbers.integers(totals[current, new]))
        code, line = child(place, partial(_killed, folder, at, partial(write, folder, new)))
        if code == 0:
            current, ended = new, ended + 1
            continue
        done += 1
        what = f"{kind} of {new} over {current}, killed at operation {at}: "
        if code != -signal.SIGKILL:
            faults.append(f"{what}exit code {code}: {line}")
        code, line = child(place, lambda: 10 + version_of(folder))
        if code - 10 not in (current, new):
            faults.append(f"{what}{line}")
            current = None
            continue
        current = code - 10
        if done % 10 == 0 or done == count:  # the next writer leaves nothing of the killed ones
            _must(place, partial(write, folder, current))
            left = [path.name for path in folder.parent.iterdir() if path != folder]
            faults += [f"{what}left behind: {', '.join(left)}"] if left else []
    return faults + ([f"{kind}: more writes ended than were killed"] if ended > count else [])


def _killed(folder: Path, at: int, write: Callable[[], object]) -> None:
    with kill_points(folder.parent, at, die):
        write()


def tiny_model(version: int) -> tuple[nn.Module, dict]:
    """A network all of whose numbers are the version."""
    config = {"block_out_channels": (4,), "norm_num_groups": 2, "sample_size": 8}
    module = models.build("mini-autoencoder", scaling_factor=float(version + 1), **config)
    return module, jax.tree.map(lambda leaf: np.full(leaf.shape, version, leaf.dtype), models.shapes(module))


def kill_saving(place: Path, count: int, numbers: np.random.Generator) -> list[str]:
    """Kills saves of a model, in one file or in shards, over an earlier one."""

    def write(folder: Path, version: int) -> None:
        checkpoints.save(folder, *tiny_model(version), max_shard_size=SHARD_SIZES[version])

    def version_of(folder: Path) -> int:
        module, params = checkpoints.load(folder)
        found = {float(number) for leaf in jax.tree.leaves(params) for number in np.unique(leaf)}
        found.add(module.config.scaling_factor - 1)
        if len(found) > 1:
            raise ValueError(f"mixed: {sorted(found)}")
        return int(found.pop())

    return kill_writers(place, "saving", count, numbers, write, version_of)


def kill_exporting(place: Path, count: int, numbers: np.random.Generator) -> list[str]:
    """Kills exports of the trained model, its weights shifted by the version, over an earlier one."""

    def shifted(version: int) -> pipelines.Pipeline:
        pipe = pipelines.load(place / "straight")
        parts = {
            name: Network(network.module, jax.tree.map(lambda leaf: leaf + version, network.params))
            for name, network in pipe.networks.items()
        }
        return pipe.replace(**parts)

    def version_of(folder: Path) -> int:
        found = pipelines.load(folder)
        for version in range(VERSIONS):
            if not any(row.difference for row in pipelines.compare(found, shifted(version))):
                return version
        raise ValueError("mixed: its tensors are of no single version")

    write = lambda folder, version: pipelines.save(shifted(version), folder)  # noqa: E731
    return kill_writers(place, "exporting", count, numbers, write, version_of)


def kill_sampling(place: Path, count: int, numbers: np.random.Generator) -> list[str]:
    """Kills `jaxldm sample`, with another seed and number of images for each version, over an earlier one."""

    def write(folder: Path, version: int) -> None:
        options = f"--num-inference-steps 2 --num-images {3 + version} --seed {version} --quiet"
        words = ["sample", str(place / "straight"), *options.split(), "--output-dir", str(folder)]
        if cli.main(words):
            raise RuntimeError("jaxldm sample failed")

    wanted = place / "samples"
    for version in range(VERSIONS):
        _must(place, lambda version=version: write(wanted / str(version), version))

    def version_of(folder: Path) -> int:
        files.finish_interrupted(folder)
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        for version in range(VERSIONS):
            if found == {path.name: path.read_bytes() for path in (wanted / str(version)).iterdir()}:
                return version
        raise ValueError(f"mixed: {sorted(found)}")

    load_command("sample")
    return kill_writers(place, "sampling", count, numbers, write, version_of)
