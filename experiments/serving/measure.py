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

NAMES = ("step", "batching", "open_load", "cold_start", "overhead", "cancelling", "fairness")
NAMES += ("flood", "kills", "hostile", "soak")


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
        for name in self.only:
            print(f"\n{name}", flush=True)
            start = time.perf_counter()
            figures = self._measures()[name](results)
            facts = {"figures": figures, "minutes": round((time.perf_counter() - start) / 60, 2)}
            results[name] = facts | {"date": str(datetime.date.today()), "quick": self.quick}
            print(json.dumps(figures, indent=1), flush=True)
            results["machine"] = machine("experiments.serving.measure", {})
            contents = {"results.json": json.dumps(results, indent=1) + "\n", "results.md": report(results)}
            save_results(out, contents)
        print("\n" + report(results))

    def _measures(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        """Of each name, what measures it, given what is known."""
        pipe = pipeline(self.run_dir)
        folder, few = self.run_dir, self.quick
        factors = (
            [0.5]
            if few
            else [0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
        )
        return {
            "step": lambda _: batching.step_seconds(
                pipe, [1, 2, 4] if few else [1, 2, 4, 8, 16, 32], 5 if few else 40
            ),
            "batching": lambda _: batching.compare(pipe, loads.SLOTS, 24 if few else 400, factors),
            "open_load": lambda known: loads.open_load(folder, 0.6 * drawn(known), 20 if few else 600),
            "cold_start": lambda _: loads.cold_start(folder),
            "overhead": lambda _: loads.overhead(folder, pipe, 2 if few else 30),
            "cancelling": lambda _: loads.cancelling(folder, 2 if few else 30),
            "fairness": lambda _: loads.fairness(folder, 20 if few else 500),
            "flood": lambda known: loads.flood(folder, drawn(known), 6 if few else 180),
            "kills": lambda known: loads.kills(folder, pipe, 2 if few else 50, 0.3 * drawn(known)),
            "hostile": lambda _: loads.hostile(folder, pipe, 200 if few else 10_000),
            "soak": lambda known: loads.soak(folder, 60 if few else 5000, 0.6 * drawn(known)),
        }


def pipeline(folder: Path) -> Any:
    """The model, in this process."""
    from jaxldm import pipelines

    return pipelines.load(folder)


def drawn(known: dict[str, Any]) -> float:
    """Images a second of full slots, by the step that was measured; a guess before that."""
    if "step" not in known:
        return 10.0
    seconds = known["step"]["figures"]["seconds"]
    size = max(seconds, key=int)
    mean = sum(batching.STEPS) / len(batching.STEPS)
    return int(size) / (seconds[size] * mean)


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
    row(
        "cold_start",
        "cold start to the first image, compiled before (s)",
        lambda f: f["with a cache, seconds"],
        5,
    )
    row("overhead", "overhead over the pipeline, 50 steps", lambda f: f["overhead"], 0.05)
    row(
        "cancelling",
        "steps until a cancelled slot is free",
        lambda f: f["seconds until the slot is free"] / f["seconds of a step"],
        2,
    )
    row("fairness", "delay by another's many jobs, in jobs", lambda f: f["jobs of delay"], 1)
    row("flood", "flood: refusals, p99 (s)", lambda f: f["refusals, p99 seconds"], 0.05)
    row("flood", "flood: neither drawn nor refused", lambda f: f["neither"], 0)
    row("flood", "flood: growth of memory", lambda f: f["growth of memory"], 0.03)
    row(
        "flood",
        "flood: p99 of what was accepted, of the promise",
        lambda f: f["drawn, p99 seconds"] / f["promised seconds"],
        1,
    )
    row("kills", "kills: accepted and lost", lambda f: f["lost"], 0)
    row("kills", "kills: other images than the pipeline's", lambda f: f["unequal"], 0)
    row("hostile", "hostile: 5xx and tracebacks", lambda f: f["5xx"] + f["tracebacks"], 0)
    row("hostile", "hostile: a neighbour's other images", lambda f: f["neighbour's unequal"], 0)
    row("soak", "soak: growth of memory", lambda f: f["growth of memory"], 0.03)
    row("soak", "soak: growth of the median latency", lambda f: f["growth of latency"], 0.1)
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
