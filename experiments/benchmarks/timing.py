"""How the benchmarks time: variants that take turns, their ratios in each round, and the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxldm

Run = Callable[[], Any]


def first_call(run: Run) -> float:
    """Seconds of the first call: tracing and compiling."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def turns(
    variants: dict[str, Run], rounds: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Milliseconds per call of each variant in each round, by the clock; the variants take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            calls, start = 0, clock()
            while calls == 0 or clock() - start < seconds:
                run()
                calls += 1
            times[name].append((clock() - start) / calls * 1e3)
            time.sleep(0.02)  # threads of one side that still spin would slow the other
    return times


def measure_row(
    title: str,
    variants: dict[str, Run],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """A row: compile seconds, milliseconds and the ratios of every other variant to the first."""
    compile_seconds = {name: first_call(run) for name, run in variants.items()}
    for run in variants.values():
        run()
    times = turns(variants, rounds, seconds, clock)
    first, *others = variants
    ratios = {
        other: np.percentile(np.divide(times[other], times[first]), [25, 50, 75]).tolist() for other in others
    }
    return {
        "row": title,
        "milliseconds": {name: float(np.median(values)) for name, values in times.items()},
        "fastest": {name: min(values) for name, values in times.items()},
        "ratio_quartiles": ratios,
        "first_call_seconds": compile_seconds,
    }


def cells(row: dict[str, Any], first: str, *others: str) -> list[str]:
    """Cells of the table's line of a row: title, milliseconds and ratios; empty for a variant that is not."""
    times, ratios = row["milliseconds"], row["ratio_quartiles"]
    found = [f"{times[name]:.1f}" if name in times else "" for name in (first, *others)]
    found += [
        "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratios[name]) if name in ratios else "" for name in others
    ]
    return [row["row"], *found]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(*names: str) -> dict[str, str]:
    """The versions of these packages, or nothing if one of them is missing."""
    try:
        return {name: importlib.metadata.version(name) for name in names}
    except importlib.metadata.PackageNotFoundError:
        return {}


def machine(script: str, versions: dict[str, str]) -> dict[str, Any]:
    """What the figures were measured on, and by what command; `versions` are those of further packages."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", f"experiments.benchmarks.{script}", *sys.argv[1:]]),
        "processor": cpu,
        "jax_cpu_devices": jax.device_count(),
        "versions": {
            "jaxldm": jaxldm.__version__,
            "jax": jax.__version__,
            **versions,
            "python": platform.python_version(),
        },
    }
