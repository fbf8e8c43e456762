"""How long a training stands still for a checkpoint, and for its data.

Question: does a save stall training for at most one step, and so one that comes while the last is still being
          written? What share of the time is spent waiting for data?
Command:  python -m experiments.benchmarks.saving              (--quick: a small network on random pictures)
Needs:    nothing but jaxldm. Minutes and figures: README.md in this folder.

A run of `training.fit`, as the recipes have it: a DiT with AdamW and a moving average, pictures that are read
from disk and decoded ahead, checkpoints every so many updates. The times are those of its own log: when the
numbers of each update had left the device. An update next to a save has in its time all for which the loop
waits there: the updates under way, the room on the disk, the save before, the copy to the memory of the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from experiments.benchmarks.timing import machine
from experiments.figures import quick_options, save_results
from experiments.results import markdown
from jaxldm import data, host, models, training
from jaxldm import diffusion as D
from jaxldm.commands.terminal import run_script

HEAD = ["saves in a row", "saves", "median step, ms", "longest next to a save, ms", "in steps"]
HEAD += ["a save in all, steps", "waiting for data"]
WARM = 5  # updates at the beginning that are not counted: the step is compiled in the first


@dataclasses.dataclass(frozen=True)
class Saving:
    """Train with checkpoints, time every step, and write the table."""

    quick: bool = False
    """A small network on random pictures, few steps: only to see that everything runs."""
    hidden_size: int = 256
    """Width of the DiT."""
    depth: int = 4
    """Its blocks."""
    batch_size: int = 32
    """Pictures in a step, of 32x32 pixels in 64 tokens."""
    save_every: int = 25
    """Updates between saves, or between pairs of them."""
    saves: int = 6
    """So often."""
    output_dir: Path = Path("runs/benchmarks")
    """Where saving.md and saving.json go; the checkpoints are written next to them, and removed again."""


class Rhythm(int):
    """A `save_every` after which so many updates in a row are saved; the loop asks `step % save_every`."""

    in_a_row: int = 1

    def __rmod__(self, step: int) -> int:
        return max(0, step % int(self) - self.in_a_row + 1) if step >= self else step


def plan_of(save_every: int, saves: int, in_a_row: int) -> training.Plan:
    """Updates with so many saves, or groups of them, and a stretch before, between and after them."""
    plan = training.Plan(num_steps=save_every * (saves + 1) - 1)
    rhythm = Rhythm(save_every)
    rhythm.in_a_row = in_a_row
    object.__setattr__(plan, "save_every", rhythm)  # a plan has whole numbers, and this is one
    return plan


def network(options: Saving, num_classes: int) -> Any:
    """A DiT of pixels."""
    sizes = {"hidden_size": options.hidden_size, "depth": options.depth}
    sizes["num_heads"] = max(1, options.hidden_size // 64)
    pixels = {"sample_size": 32, "in_channels": 3, "patch_size": 4, "learn_sigma": False}
    return models.build("dit-s-8", num_classes=num_classes, **sizes, **pixels)


def train_step(module: Any, optimizer: Any) -> training.TrainStep:
    """Flow matching with a moving average."""
    call = models.network(module)

    def loss_fn(params: Any, state: Any, batch: Any, key: Any) -> Any:
        predict = lambda x, t, labels: call(params, x, t, labels)  # noqa: E731
        return D.diffusion_loss(key, predict, D.flow(D.Flow()), batch["image"], batch["label"])

    return training.make_train_step(loss_fn, optimizer, 0.999)


@contextlib.contextmanager
def pictures(options: Saving) -> Iterator[tuple[Any, int]]:
    """(batches that are read ahead, number of classes)."""
    if options.quick:
        images = np.random.default_rng(0).uniform(-1, 1, (64, 32, 32, 3)).astype(np.float32)
        rows, classes = data.ArrayRows({"image": images, "label": np.arange(64, dtype=np.int32) % 4}), 4
    else:
        dataset = data.load("captioned_shapes")
        rows, classes = dataset.rows("train"), dataset.num_classes
    with data.Reader(data.Batches(rows, options.batch_size, jax.random.key(0))) as reader:
        yield reader, classes


def measure(options: Saving, in_a_row: int, log: Callable[[str], None]) -> dict[str, Any]:
    """A row: the figures of one run, and all its times."""
    plan = plan_of(options.save_every, options.saves, in_a_row)
    optimizer = training.optimizer(1e-4, 0, 10**6, max_grad_norm=1.0)
    with (
        pictures(options) as (batches, classes),
        tempfile.TemporaryDirectory(dir=options.output_dir) as place,
    ):
        module = network(options, classes)
        params = models.init(module, jax.random.key(0))
        size = models.param_count(params)
        state = training.create_train_state(jax.random.key(1), params, optimizer)
        step = train_step(module, optimizer)
        training.fit(state, step, batches, plan, Path(place) / "run", log=log, bar=False)
        rows = training.read_log(Path(place) / "run" / "log.csv")
    saved = [step for step in range(1, plan.num_steps) if step % plan.save_every == 0]
    figures = figures_of(np.diff(rows["seconds"]), saved, rows["waiting"][1:])
    return {"in_a_row": in_a_row, "parameters": size, **figures}


def figures_of(
    seconds: Float[np.ndarray, " N"], saved: Sequence[int], waiting: Float[np.ndarray, " N"]
) -> dict[str, Any]:
    """What a run says about its saves.

    Args:
        seconds: of updates 2, 3, ...: the time since the one before was done.
        saved: the updates after which the state was saved: they stall the one that follows.
        waiting: of the same updates, how long of it was for data.
    """
    numbers = np.arange(2, len(seconds) + 2)
    counted = numbers > WARM
    beside = np.isin(numbers, np.array(saved) + 1)
    median = float(np.median(seconds[counted & ~beside]))
    lost = float(np.sum(seconds[counted & (numbers > saved[0])] - median))
    return {
        "saves": len(saved),
        "median": median,
        "longest": float(seconds[beside].max()),
        "in_steps": float(seconds[beside].max() / median),
        "steps_per_save": lost / median / len(saved),
        "waiting": float(waiting[counted].sum() / seconds[counted].sum()),
        "seconds": seconds.round(4).tolist(),
        "after_saves": np.flatnonzero(beside).tolist(),
    }


def cells_of(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        str(row["in_a_row"]),
        str(row["saves"]),
        *(f"{1e3 * row[name]:.0f}" for name in ("median", "longest")),
        *(f"{row[name]:.2f}" for name in ("in_steps", "steps_per_save")),
        f"{row['waiting']:.1%}",
    ]


def main(options: Saving) -> None:
    """Measures, prints and writes the table."""
    host.prepare()  # before anything is computed
    small = {"hidden_size": 32, "depth": 1, "batch_size": 8, "save_every": 8, "saves": 1}
    options = quick_options(options, **small)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for in_a_row in (1, 2):
        rows.append(measure(options, in_a_row, lambda line: print(line, flush=True)))
        print(json.dumps({name: value for name, value in rows[-1].items() if not isinstance(value, list)}))
    table = markdown(HEAD, [cells_of(row) for row in rows])
    setting = machine("saving", {}) | {"parameters": rows[0]["parameters"], "batch_size": options.batch_size}
    files = {
        "saving.md": f"```\n{json.dumps(setting, indent=1)}\n```\n\n{table}",
        "saving.json": json.dumps({**setting, "rows": rows}, indent=1) + "\n",
    }
    save_results(options.output_dir, files)
    print(table)


if __name__ == "__main__":
    run_script(main, Saving)
