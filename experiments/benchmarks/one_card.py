"""jaxldm and PyTorch (diffusers) on one GPU, in minutes: first what is right, then how fast and how large.

Question: are the results right on this card, and what are seconds, share of the card's matrix peak, compile
          time and memory, next to diffusers as it is and with torch.compile?
Command:  python -m experiments.benchmarks.one_card --minutes 8 --output-dir OUT       (--dry-run: on a CPU)
          or python experiments/benchmarks/one_card.py, from anywhere
Needs:    the `cuda` and `test` extras; without PyTorch or diffusers jaxldm's rows are run alone.

Rows (`card_rows.py`) are taken in order of worth until the time is up; one that would not be finished is not
started. Each framework has a process of its own, so that one cannot take the other's memory or end its run;
they work in turn. What is known is written after each row to the folder `unfinished` of the output, so that a
run that is stopped leaves what it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run by its path
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    os.execv(sys.executable, [sys.executable, "-m", "experiments.benchmarks.one_card", *sys.argv[1:]])

from experiments.benchmarks.card_report import failed, report
from experiments.benchmarks.card_rows import ROWS, VARIANTS, Unit, expected_seconds, fits, units
from experiments.figures import output_folder, save_results
from jaxldm.commands.terminal import run_script
from jaxldm.errors import InvalidArgumentError, one_of

ROOT = Path(__file__).parents[2]
RESERVE = 4.0  # seconds for the last table
MOST_SECONDS_TO_START = 120.0  # of a process: imports, and the first use of the card


@dataclasses.dataclass(frozen=True)
class OneCard:
    """Check and time jaxldm and PyTorch on one GPU, the rows of most worth first."""

    minutes: float = 8.0
    """No row is started that would not be finished by then."""
    output_dir: Path = Path("runs/benchmarks")
    """Where one_card_DEVICE.md and .json and the logs of both processes go."""
    dry_run: bool = False
    """All rows at small sizes on the CPU, only to see that they run."""
    rows: tuple[str, ...] = tuple(row.name for row in ROWS)
    """Which, in order."""
    variants: tuple[str, ...] = VARIANTS
    """Which of jaxldm, eager and torch.compile."""
    seconds: float | None = None
    """How long each line is timed; default 1.5, 0 in a dry run."""
    dtype: str = "bfloat16"
    """Of arithmetic, and of weights outside of training."""
    compile_backend: str | None = None
    """Of torch.compile; default inductor, eager (nothing is compiled) in a dry run."""
    memory_fraction: float = 0.5
    """The share of the card's memory that each of the two processes may take."""


class Worker:
    """A process of one framework: see `card_worker`."""

    def __init__(self, name: str, options: dict[str, Any], environment: dict[str, str], log: Path):
        self.name, self.log = name, log.open("ab")
        command = [sys.executable, "-m", "experiments.benchmarks.card_worker", name, json.dumps(options)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:  # type: ignore[union-attr]
            self.answers.put(line)
        self.answers.put("")  # the process has ended

    def ask(self, request: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        """The answer to a request; with None, what the process says first. "lost": it has ended."""
        if request is not None:
            try:
                print(json.dumps(request), file=self.process.stdin, flush=True)
            except BrokenPipeError:
                return {"error": f"its process ended with code {self.process.wait()}", "lost": True}
        try:
            line = self.answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            self.stop()
            return {"error": f"stopped: not finished in {seconds:.0f} s", "lost": True}
        if not line:
            return {"error": f"its process ended with code {self.process.wait()}: see the log", "lost": True}
        return json.loads(line)

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):  # a request that nobody reads any more
                stream.close()  # type: ignore[union-attr]


class Sides:
    """Both processes, started when they are first needed and again after one was lost."""

    def __init__(self, options: OneCard):
        self.options, self.workers, self.found = options, {}, {}

    def start(self, name: str) -> None:
        """Begins to start the process of a framework."""
        options, share = self.options, self.options.memory_fraction
        environment = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": str(share),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if options.dry_run:
            environment |= {"CUDA_VISIBLE_DEVICES": ""}
        if options.dry_run or name == "torch":
            environment |= {"JAX_PLATFORMS": "cpu"}
        backend = options.compile_backend or ("eager" if options.dry_run else "inductor")
        settings = {"dry_run": options.dry_run, "dtype": options.dtype, "memory_fraction": share}
        settings |= {"compile_backend": backend}
        self.workers[name] = Worker(name, settings, environment, options.output_dir / f"{name}.log")

    def setting(self, name: str, seconds: float) -> dict[str, Any]:
        """What the framework's process said first: device and versions, or an error."""
        if name not in self.workers:
            self.start(name)
        if name not in self.found:
            found = self.workers[name].ask(None, min(seconds, MOST_SECONDS_TO_START))
            if found.get("backend") == "cpu" and not self.options.dry_run:
                found = {"error": "it sees no GPU: install its build for CUDA, or take --dry-run"}
            self.found[name] = found
        return self.found[name]

    def measure(self, unit: Unit, timed: float, seconds: float) -> dict[str, Any]:
        """The answer about a unit, in at most `seconds`."""
        name, begin = side_of(unit.variant), time.monotonic()
        setting = self.setting(name, seconds)
        if "error" in setting:
            return setting
        request = {"row": unit.row.name, "variant": unit.variant, "seconds": timed}
        answer = self.workers[name].ask(request, seconds - (time.monotonic() - begin))
        if answer.pop("lost", False):
            self.workers.pop(name).stop()
            self.found.pop(name)
        return answer

    def stop(self) -> None:
        """Ends both."""
        for worker in self.workers.values():
            worker.stop()


def side_of(variant: str) -> str:
    """Which process has a variant."""
    return "jaxldm" if variant == "jaxldm" else "torch"


def measure_all(
    planned: list[Unit],
    device: str,
    measure: Callable[[Unit, float], dict[str, Any]],
    seconds_left: Callable[[], float],
    done: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """A record of each unit, in order: measured, failed, or not started because the time would not do.

    measure: (unit, seconds that it may take) -> lines or an error. done: called with all records after each.
    """
    records: list[dict[str, Any]] = []
    for unit in planned:
        record = {"row": unit.row.name, "variant": unit.variant}
        record["expected_seconds"] = expected_seconds(unit, device)
        reason = fits(unit, device, seconds_left())
        if reason is None:
            begin = time.monotonic()
            record |= {"lines": []} | measure(unit, seconds_left())
            record["seconds"] = time.monotonic() - begin
        else:
            record |= {"lines": [], "not_started": reason}
        records.append(record)
        done(records)
    return records


def with_present(planned: list[Unit], present: list[str]) -> list[Unit]:
    """The units without those of PyTorch where that is missing; jaxldm's stay, and fail with their reason."""
    return [unit for unit in planned if side_of(unit.variant) in {"jaxldm", *present}]


def driver() -> str | None:
    """Of NVIDIA's cards: name, driver and memory."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def check(options: OneCard) -> tuple[Any, ...]:
    """The rows of these names. Raises `UnknownNameError`, `InvalidArgumentError`."""
    known = {row.name: row for row in ROWS}
    for variant in options.variants:
        one_of("variant", variant, VARIANTS)
    one_of("dtype", options.dtype, ("bfloat16", "float16", "float32"))
    if not options.minutes > 0:
        raise InvalidArgumentError(f"minutes must be > 0, got {options.minutes}")
    if not 0 < options.memory_fraction <= 1:
        raise InvalidArgumentError(f"memory_fraction must be in (0, 1], got {options.memory_fraction}")
    return tuple(known[one_of("row", name, known)] for name in options.rows)


def main(options: OneCard) -> None:
    begin = time.monotonic()
    rows = check(options)
    options = dataclasses.replace(options, output_dir=output_folder(options.output_dir, options.dry_run))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    timed = options.seconds if options.seconds is not None else (0.0 if options.dry_run else 1.5)
    sides, planned = Sides(options), units(rows, options.variants)

    def seconds_left() -> float:
        return 60 * options.minutes - RESERVE - (time.monotonic() - begin)

    for name in dict.fromkeys(side_of(unit.variant) for unit in planned):
        sides.start(name)  # both import at once
    try:
        found = {name: sides.setting(name, seconds_left()) for name in sides.workers}
        present = [name for name, setting in found.items() if "error" not in setting]
        if not present:
            raise InvalidArgumentError(f"nothing can be run: {found}; see the logs in {options.output_dir}")
        planned = with_present(planned, present)
        device = found[present[0]]["device"]
        setting = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python -m", "experiments.benchmarks.one_card", *sys.argv[1:]]),
            "python": ".".join(map(str, sys.version_info[:3])),
            "driver": None if options.dry_run else driver(),
            "small_sizes": options.dry_run,
            "dtype": options.dtype,
            **found,
        }
        name = "one_card_" + re.sub(r"\W+", "_", device.lower())

        def done(records: list[dict[str, Any]]) -> None:
            text = report(setting, records)
            figures = json.dumps({**setting, "records": records}, indent=1)
            files = {f"{name}.json": figures, f"{name}.md": text}
            save_results(options.output_dir, files, complete=len(records) == len(planned))
            last = {key: value for key, value in records[-1].items() if key != "lines"}
            print(json.dumps(last), flush=True)

        def measure(unit: Unit, seconds: float) -> dict[str, Any]:
            return sides.measure(unit, timed, seconds)

        records = measure_all(planned, device, measure, seconds_left, done)
    finally:
        sides.stop()
    print(f"\n{report(setting, records)}\nwritten to {options.output_dir}/{name}.md and .json")
    if failed(records):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, OneCard)
