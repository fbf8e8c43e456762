"""Each loss of few steps trains a small network on a plane, where the map that it teaches is known exactly.

Question: does a network trained by each loss reach the map that the loss teaches, and how fast?
Command:  python -m experiments.few_steps.minimisers     (--quick: ten updates, to see that it runs)
Needs:    nothing but jaxldm, one core. Minutes and what came out: README.md in this folder.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.few_steps import with_teachers as teach
from experiments.few_steps import without_teachers as alone
from experiments.few_steps.plane import GAUSSIAN, MIXTURE, Data, distribution_floor
from experiments.few_steps.small_networks import train
from experiments.figures import quick_options, save_results
from experiments.results import markdown
from jaxldm import few_steps as few
from jaxldm.commands.terminal import run_script
from jaxldm.errors import one_of

METHODS: dict[str, Callable[[Data], teach.Method]] = {
    "progressive distillation": teach.progressive,
    "guidance distillation": teach.guidance,
    "latent consistency": teach.latent_consistency,
    "consistency distillation": teach.consistency_distillation,
    "improved consistency training": alone.improved_consistency_training,
    "easy consistency tuning": alone.easy_consistency_tuning,
    "sCM, distillation": lambda data: alone.continuous_consistency(data, taught=True),
    "sCM, training": lambda data: alone.continuous_consistency(data, taught=False),
    "reflow": teach.reflow,
    "distribution matching, one step": teach.distribution_matching,
    "distribution matching, four steps": lambda data: teach.distribution_matching(
        data, (0.999, 0.75, 0.5, 0.25)
    ),
    "shortcut": alone.shortcut,
    "mean flow": alone.mean_flow,
    "improved mean flow": lambda data: alone.mean_flow(data, few.improved_mean_flow_loss),
    "drifting": alone.drifting,
    "easy consistency tuning, as published": lambda data: alone.easy_consistency_tuning(data, published=True),
    "improved consistency training, as published": lambda data: alone.improved_consistency_training(
        data, published=True
    ),
    "sCM, training, as published": lambda data: alone.continuous_consistency(
        data, taught=False, published=True
    ),
    "mean flow, published weights": lambda data: alone.mean_flow(data, power=1.0),
}
DATA = {data.name: data for data in (GAUSSIAN, MIXTURE)}
OF_TWO_CLASSES = ("guidance distillation", "latent consistency")  # have data of their own


@dataclasses.dataclass(frozen=True)
class Minimisers:
    """Train a small network on a plane by each loss, and compare it with the map that is known exactly."""

    methods: tuple[str, ...] = ()
    """Some of the methods; all by default."""
    data: tuple[str, ...] = ("Gaussian", "mixture")
    """Of which data; guidance and latent consistency have two classes of their own."""
    quick: bool = False
    """Ten updates of each: only to see that everything runs."""
    updates: float = 1.0
    """So many times the updates of each method."""
    seed: int = 0
    output_dir: Path = Path("runs/few-steps")
    """Where results.json and the table go; rows of other methods stay."""


def measure(method: teach.Method, seed: int, updates: int | None = None) -> dict[str, Any]:
    """The errors before and after, and the seconds of training, compilation among them."""
    key = jax.random.key(seed)
    how = method.how if updates is None else method.how._replace(updates=updates)
    params = method.init(key)
    before = method.error(params)
    start = time.perf_counter()
    trained = jax.block_until_ready(train(key, params, method.stages, how))
    seconds = time.perf_counter() - start
    return {
        "judged": method.judged,
        "before": before,
        "after": method.error(trained),
        "seconds": seconds,
        "updates": how.updates,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["method", "data", "judged by", "before", "after", "updates", "seconds"]
    body = [
        [
            row["method"],
            row["data"],
            row["judged"],
            f"{row['before']:.0%}",
            f"{row['after']:.2%}",
            str(row["updates"]),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    return markdown(head, body)


def main(options: Minimisers) -> None:
    """Measures all rows, writing after each."""
    options = quick_options(options)
    names = [one_of("method", name, METHODS) for name in options.methods] or list(METHODS)
    chosen = [DATA[one_of("data", name, DATA)] for name in options.data]
    path = options.output_dir / "minimisers.json"
    known = json.loads(path.read_text()) if path.exists() else []
    rows = {(row["method"], row["data"]): row for row in known}
    for name in names:
        for data in (GAUSSIAN,) if name in OF_TWO_CLASSES else chosen:
            method = METHODS[name](data)
            updates = 10 * len(method.stages) if options.quick else int(options.updates * method.how.updates)
            label = "two classes" if name in OF_TWO_CLASSES else data.name
            row = {"method": name, "data": label, **measure(method, options.seed, updates)}
            print(
                f"{name}, {label}: {row['before']:.1%} -> {row['after']:.2%} in {row['seconds']:.0f} s",
                flush=True,
            )
            rows[name, label] = row
            ordered = sorted(rows.values(), key=lambda row: list(METHODS).index(row["method"]))
            floors = {data.name: distribution_floor(data) for data in DATA.values()}
            words = ", ".join(f"{value:.2%} for the {key}" for key, value in floors.items())
            text = (
                f"{table(ordered)}\nThe distance between two sets of samples of the data itself is {words}.\n"
            )
            save_results(
                options.output_dir, {path.name: json.dumps(ordered, indent=1) + "\n", "minimisers.md": text}
            )
    print("\n" + (options.output_dir / "minimisers.md").read_text())


if __name__ == "__main__":
    run_script(main, Minimisers)
