"""One framework of `one_card.py` in a process of its own: takes requests on stdin, answers on stdout.

A request is a line {"row": name, "variant": name, "seconds": how long a line of the table is timed}, an
answer a line {"lines": [...], "seconds": ...} or {"error": reason}, with "warnings" if this package had any.
The first answer says who is there. Everything else that is printed goes to stderr.

Question: what does one row give with one of the frameworks?
Command:  python -m experiments.benchmarks.card_worker jaxldm OPTIONS     (called by `one_card`; JSON)
Needs:    for torch PyTorch and diffusers.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

import numpy as np

import jaxldm
from experiments.benchmarks.card_rows import ROWS

SIDES = {"jaxldm": "experiments.benchmarks.card_jaxldm", "torch": "experiments.benchmarks.card_torch"}
MOST_CALLS = 200


class Line(NamedTuple):
    """One line of the table, not yet measured.

    Attributes:
        what: the work, after the row's title.
        run: does it once and waits for the result.
        flops: operations of one run, two a multiply-accumulate; None: not counted.
        memory: bytes of device memory that a run takes at most, asked after the runs, or None.
        calls: how often it is run at least; 1: once, and that is what is timed.
        result: figures that are not times, found while the line was made.
    """

    what: str
    run: Callable[[], Any] | None = None
    flops: float | None = None
    memory: Callable[[], int | None] = lambda: None
    calls: int = 3
    result: dict[str, Any] | None = None


def time_line(line: Line, seconds: float) -> dict[str, Any]:
    """Quartiles in milliseconds over the calls of about `seconds` (and `line.calls` at least).

    The first call, which compiles, stands apart.
    """
    found: dict[str, Any] = {"what": line.what, "flops": line.flops, "result": line.result}
    if line.run is None:
        return found
    times: list[float] = []
    first = _seconds(line.run)
    if line.calls > 1:
        line.run()
        begin = time.perf_counter()
        while len(times) < line.calls or (len(times) < MOST_CALLS and time.perf_counter() - begin < seconds):
            times.append(_seconds(line.run))
    quartiles = np.percentile(times or [first], [25, 50, 75]) * 1e3
    return found | {
        "milliseconds": quartiles.tolist(),
        "calls": len(times) or 1,
        "first_call_seconds": first,
        "compile_seconds": first - quartiles[1] / 1e3 if times else None,
        "memory_bytes": line.memory(),
    }


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(side: ModuleType, request: dict[str, Any], dry_run: bool, dtype: str) -> dict[str, Any]:
    """The answer to one request. A failure is an answer as well."""
    begin, lines = time.perf_counter(), []
    with own_warnings() as warned:
        answer = {"lines": lines} | _measure_lines(side, request, dry_run, dtype, lines)
    answer |= {"warnings": warned} if warned else {}
    gc.collect()
    side.forget()  # what the row had is free by now: the other process needs the memory
    return answer | {"seconds": time.perf_counter() - begin}


@contextlib.contextmanager
def own_warnings() -> Iterator[list[str]]:
    """Collects what this package warns of, such as a kernel that it does without; all are still printed."""
    found: list[str] = []
    with warnings.catch_warnings():
        printed = warnings.showwarning

        def show(message: Any, category: Any, filename: str, *rest: Any) -> None:
            if Path(filename).is_relative_to(Path(jaxldm.__file__).parent):
                found.append(str(message))
            printed(message, category, filename, *rest)

        warnings.showwarning = show
        yield found


def versions(*packages: str) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _measure_lines(
    side: ModuleType, request: dict[str, Any], dry_run: bool, dtype: str, lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """Appends to `lines`; returns the reason if it fails. When it returns, nothing holds the row's arrays."""
    row = next(row for row in ROWS if row.name == request["row"])
    sizes = row.small if dry_run else row.sizes
    try:
        for line in side.KINDS[row.kind](request["variant"], dtype, **sizes):
            lines.append(time_line(line, request["seconds"]))
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the result of this row
        traceback.print_exc()
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return {}


def main(name: str, options: dict[str, Any], requests: TextIO, answers: TextIO) -> None:
    """Serves requests until there are no more."""

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        side = importlib.import_module(SIDES[name])
        answer(side.prepare(options))
    except Exception as error:  # noqa: BLE001  # a missing PyTorch, or a broken one: the other side goes on
        traceback.print_exc()
        answer({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        return
    for request in requests:
        answer(measure(side, json.loads(request), options["dry_run"], options["dtype"]))


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    main(sys.argv[1], json.loads(sys.argv[2]), sys.stdin, answers)
