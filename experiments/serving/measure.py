"""All figures of the server, by one command.

Question: how much more does a server draw whose requests share steps, and does it keep what it promises under
          load, floods, kills, nonsense, and for long?
Command:  python -m experiments.serving.measure --run-dir runs/mini-ldm        (--quick: only to see it run)
Needs:    a finished run of `make demo`, the `serve` extra, Linux, and nothing else running.

Each figure is measured with servers of its own, `jaxldm serve` as people start it. What is known is written
after each, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmarks.timing import machine
from experiments.figures import output_folder, read_result, save_results
from experiments.results import markdown
from experiments.serving import batching, loads
from jaxldm import host
from jaxldm.commands.terminal import run_script
from jaxldm.errors import one_of

COMMAND = "python -m experiments.serving.measure --run-dir runs/mini-ldm"
NAMES = ("step", "batching", "open_load", "cold_start", "overhead", "cancelling", "fairness")
NAMES += ("flood", "kills", "kills_of_two", "hostile", "soak")
# First rates that are tried, as shares of what full slots draw: of batches, which cannot fill more than 0.42
# of their slots with steps of `batching.STEPS`, and of shared steps.
FIRST = (0.3, 0.7)


@dataclasses.dataclass(frozen=True)
class Measure:
    """Measure the server."""

    run_dir: Path
    """Of the demo."""
    output_dir: Path = Path("runs/serving")
    """Where results.json and results.md go."""
    only: tuple[str, ...] = NAMES
    """Which figures."""
    quick: bool = False
    """All of them small, only to see that they run."""

    def run(self) -> None:
        """Measures, writes and prints.

        Raises:
            UnknownNameError: a figure that there is not.
        """
        for name in self.only:
            one_of("figure", name, NAMES)
        host.prepare()  # as the server does
        out = output_folder(self.output_dir, self.quick)
        known = read_result(out / "results.json")
        results: dict[str, Any] = {} if known is None else json.loads(known)
        measures = self._measures()
        for name in self.only:
            print(f"\n{name}", flush=True)
            start = time.perf_counter()
            figures = measures[name]()
            facts = {"figures": figures, "minutes": round((time.perf_counter() - start) / 60, 2)}
            results[name] = facts | {"date": str(datetime.date.today()), "quick": self.quick}
            print(json.dumps(figures, indent=1), flush=True)
            results["machine"] = machine("", {}) | {"command": COMMAND}
            contents = {"results.json": json.dumps(results, indent=1) + "\n", "results.md": report(results)}
            save_results(out, contents)
        print("\n" + report(results))

    def _measures(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Of each name, what measures it."""
        pipe = pipeline(self.run_dir)
        folder, few = self.run_dir, self.quick
        sizes = [1, 2, 4] if few else [1, 2, 4, 8, 16, 32]
        return {
            "step": lambda: batching.step_seconds(pipe, sizes, 5 if few else 40),
            "batching": lambda: batching.compare(pipe, loads.SLOTS, 24 if few else 400, FIRST),
            "open_load": lambda: loads.open_load(folder, 20 if few else 400),
            "cold_start": lambda: loads.cold_start(folder),
            "overhead": lambda: loads.overhead(folder, pipe, 2 if few else 30),
            "cancelling": lambda: loads.cancelling(folder, 2 if few else 40),
            "fairness": lambda: loads.fairness(folder, *((20, 2) if few else (500, 30))),
            "flood": lambda: loads.flood(folder, 6 if few else 180),
            "kills": lambda: loads.kills(folder, pipe, 2 if few else 25, 1),
            "kills_of_two": lambda: loads.kills(folder, pipe, 2 if few else 25, 2),
            "hostile": lambda: loads.hostile(folder, pipe, 200 if few else 10_000),
            "soak": lambda: loads.soak(folder, 60 if few else 5000),
        }


def pipeline(folder: Path) -> Any:
    """The model, in this process."""
    from jaxldm import pipelines

    return pipelines.load(folder)


def targets(figures: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, bool]]:
    """(what, measured, wanted, whether it is so), of the figures that are known."""
    rows = []

    def row(
        name: str, what: str, value: Callable[[dict[str, Any]], float], wanted: float, at_most: bool = True
    ):
        if name in figures:
            number = value(figures[name])
            sign = "at most" if at_most else "at least"
            good = number <= wanted if at_most else number >= wanted
            rows.append((what, f"{number:.4g}", f"{sign} {wanted:g}", good))

    row("batching", "images a second, against batches at equal p95", lambda f: f["gain"], 1.8, at_most=False)
    name = "with a cache, seconds"
    row("cold_start", "cold start to the first image, compiled before (s)", lambda f: f[name], 5)
    row("overhead", "overhead over the pipeline, 50 steps", lambda f: f["overhead"], 0.05)
    row("cancelling", "steps after a cancellation, most", lambda f: f["steps after, most"], 1)
    row("fairness", "delay by another's many jobs, in jobs, most", lambda f: f["jobs of delay, most"], 1)
    row("flood", "flood: refusals, p99 (s)", lambda f: f["refusals, p99 seconds"], 0.05)
    row("flood", "flood: neither drawn nor refused", lambda f: f["neither"], 0)
    row("flood", "flood: growth of memory", lambda f: f["growth of memory"], 0.03)
    share = "flood: p99 of what was accepted, of the promise"
    row("flood", share, lambda f: f["drawn, p99 seconds"] / f["promised seconds"], 1)
    for name, which in (("kills", "kills"), ("kills_of_two", "kills of two workers")):
        row(name, f"{which}: accepted and lost", lambda f: f["lost"], 0)
        row(name, f"{which}: other images than the pipeline's", lambda f: f["unequal"], 0)
    row("hostile", "hostile: 5xx and tracebacks", lambda f: f["5xx"] + f["tracebacks"], 0)
    refusals = "refusals that are not the JSON of the API"
    row("hostile", f"hostile: {refusals}", lambda f: f[refusals], 0)
    row("hostile", "hostile: slow senders not sent away", lambda f: f["slow senders"]["not sent away"], 0)
    without, other = "neighbour's without an image", "neighbour's unequal"
    row("hostile", "hostile: a neighbour's images, missing or others", lambda f: f[without] + f[other], 0)
    row("soak", "soak: growth of memory", lambda f: f["growth of memory"], 0.03)
    row("soak", "soak: growth of the mean latency", lambda f: f["growth of latency"], 0.1)
    return rows


def report(results: dict[str, Any]) -> str:
    """The table of what was wanted, as Markdown."""
    figures = {name: facts["figures"] for name, facts in results.items() if name in NAMES}
    quick = any(facts["quick"] for name, facts in results.items() if name in NAMES)
    body = [(what, value, wanted, "yes" if good else "no") for what, value, wanted, good in targets(figures)]
    text = markdown(("what", "measured", "wanted", "kept"), body)
    if "step" in figures:
        a, b = (1000 * figures["step"][name] for name in "ab")
        text += f"\nA step of K images takes {a:.2f} + {b:.2f} K ms.\n"
    return text + ("\nSmall numbers of requests: only to see that it runs.\n" if quick else "")


if __name__ == "__main__":
    run_script(Measure.run, Measure)
