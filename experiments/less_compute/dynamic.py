"""Dynamic transformers against a smaller one: compute, seconds and distance of digits.

Question: what is the compute worth that a transformer learns to leave out, next to a smaller transformer, and
          to fewer steps?
Command:  python -m experiments.less_compute.dynamic --run-dir runs/mini-ldm --source RUN
Needs:    a finished run folder (make demo), whose classifier measures, and as RUN the DiT-Tiny of
          experiments.lecture43.e6_dit_against_unet, which all begin as. Minutes and what came out: README.md
          in this folder. A second call goes on where the first one stopped; --quick trains one short epoch.

Each network is trained a few epochs from the weights of DiT-Tiny, the smaller one from nothing for as many
epochs as these and DiT-Tiny's own. All draw from the same noise. Seconds are the sampling loop's alone, the
least of --repeats calls, and want a quiet machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import quick_options
from experiments.less_compute.comparison import FEWER_STEPS, plot, with_comparison
from experiments.results import Results, markdown, save_table
from experiments.trained import check_demo, load_classifier, load_dataset, weights_hash
from jaxldm import checkpoints, host, metrics, models, pipelines, training
from jaxldm import diffusion as D
from jaxldm.commands.terminal import run_script
from jaxldm.errors import InvalidArgumentError
from jaxldm.files import write_atomically
from jaxldm.nn.routing import time_group
from jaxldm.training.few_steps.teachers import denoiser_folder

FEWER = (35, 25, 18)


class Model(NamedTuple):
    """A network that is trained.

    Attributes:
        preset, overrides: of its recipe.
        compute: target of its routers; None: it has none of the time.
        begins: whether it begins as DiT-Tiny; else it is trained from nothing, for longer.
    """

    preset: str
    overrides: Mapping[str, Any]
    compute: float | None = None
    begins: bool = True


MODELS = {
    "DiT-Tiny, trained on": Model("tiny-token-pruning", {"token_capacity": 1.0}),  # which is the plain DiT
    "DyDiT, 0.7": Model("tiny-dydit", {}, 0.7),
    "DyDiT, 0.5": Model("tiny-dydit", {}, 0.5),
    "DyDiT, 0.5, tokens": Model("tiny-dydit", {"token_capacity": 0.75}, 0.5),
    "adaptive depth, 0.5": Model("tiny-adaptive-depth", {}, 0.5),
    "token pruning, half": Model("tiny-token-pruning", {}),
    "DiT of two blocks": Model("tiny-dit", {"depth": 2}, begins=False),
    "two grains, a quarter": Model("tiny-d2it", {}),
}
QUICK = ("DyDiT, 0.5, tokens", "adaptive depth, 0.5", "token pruning, half", "two grains, a quarter")


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Train dynamic transformers from a trained one; measure compute, seconds, distance and accuracy."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run of the demo, whose classifier measures."""
    source: Path = Path("runs/lecture43/small-models/mnist5k/DiT-Tiny")
    """The run of the DiT that all begin as."""
    output_dir: Path = Path("runs/less-compute/dynamic")
    """Where the trained networks are, the rows and the table."""
    epochs: int = 8
    """Of each network, from the weights of the source."""
    learning_rate: float = 1e-3
    """Half of that of the source."""
    steps: int = 50
    """Of DDIM."""
    num_images: int = 500
    """Digits of each row; the real test set has 500."""
    repeats: int = 2
    """Timed calls of each row."""
    models: tuple[str, ...] = ()
    """Some networks alone, by their names; all by default."""
    time_again: bool = False
    """Measure the rows that there are once more, on a machine with nothing else to do."""
    quick: bool = False
    """One epoch of 64 digits each, twenty drawn in 4 steps: only to see that everything runs."""
    seed: int = 0
    """Of training and of the noise."""

    def fitted(self) -> Dynamic:
        """These options, or small ones with `quick`."""
        for name in self.models:
            if name not in MODELS:
                raise InvalidArgumentError(f"models must be of {', '.join(MODELS)}, got {name!r}")
        small = {"num_images": 20, "steps": 4, "repeats": 1, "models": self.models or QUICK}
        return quick_options(self, **small)


def recipe_of(name: str, options: Dynamic) -> training.Recipe:
    """The recipe of a network: that of the source, with routers and other epochs."""
    model, base = MODELS[name], training.read_recipe(options.source)
    if base.diffusion is None or base.autoencoder is not None or base.diffusion.preset != "tiny-dit":
        raise InvalidArgumentError(
            f"{options.source} is the run of {base.name}: give that of a tiny-dit on pixels, such as the "
            "DiT-Tiny of experiments.lecture43.e6_dit_against_unet"
        )
    own = base.diffusion
    dynamic = training.DynamicRecipe(source=str(options.source), compute=model.compute)
    changes: dict[str, Any] = {
        "preset": model.preset,
        "overrides": {**own.overrides, **model.overrides},
        "epochs": options.epochs if model.begins else options.epochs + own.epochs,
        "dynamic": dynamic if model.begins else None,
        "sample_every": 0,
        "final_scale": 0.0,
        "save_every": 2,
    }
    if model.begins:
        changes["learning_rate"] = options.learning_rate
    if options.quick:
        changes |= {"epochs": 1}
    return dataclasses.replace(
        base,
        name=name,
        diffusion=dataclasses.replace(own, **changes),
        seed=options.seed,
        max_train_images=64 if options.quick else None,
    )


def trained(name: str, options: Dynamic) -> Path:
    """The run folder of a network, which is trained where that is not done."""
    folder = options.output_dir / "runs" / "".join(c if c.isalnum() or c == "." else "-" for c in name)
    recipe, begun = recipe_of(name, options), (folder / "config.json").exists()
    start = time.perf_counter()
    training.train(recipe, folder, resume=begun)
    if not begun:
        write_atomically(folder / "minutes.txt", f"{(time.perf_counter() - start) / 60:.2f}\n".encode())
    return folder


def macs_a_picture(module: Any, grid: D.Grid) -> float:
    """Multiply-accumulates of all steps of a picture, in thousand millions."""
    steps = int(D.steps_in(grid))
    if getattr(module.config, "plan", None) is None:
        return steps * models.count_macs(module) / 1e9
    costs = np.array([models.count_macs(part) for part in models.planned_groups(module)])
    groups = time_group(jnp.asarray(grid.t)[:steps], module.config.time_groups, module.config.max_time)
    return float(costs[np.asarray(groups)].sum() / 1e9)


class Bench:
    """What all rows are measured with."""

    def __init__(self, options: Dynamic):
        check_demo(options.run_dir)
        self.options = options
        self.dataset, self.classify = load_dataset(options.run_dir), load_classifier(options.run_dir)
        self.labels = np.arange(options.num_images, dtype=np.int32) % self.dataset.num_classes
        self.results = Results(options.output_dir)
        self.judge = weights_hash(options.run_dir)

    def measured(self, name: str, folder: Path, steps: int) -> dict[str, Any]:
        """Compute, seconds a picture, distance and accuracy of a network in so many steps."""
        options, pipe = self.options, pipelines.load(folder)
        settings = {"judge": self.judge, "images": options.num_images, "seed": options.seed, "steps": steps}
        weights = sorted(denoiser_folder(folder).glob("*.safetensors"))
        settings |= {"model": checkpoints.hash_of_files(weights), "repeats": options.repeats}
        if options.time_again:
            settings |= {"timed": time.strftime("%Y-%m-%d")}

        def make() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            key = jax.random.key(options.seed)
            call = {"guidance_scale": 1.0, "solver": "ddim", "num_inference_steps": steps}
            pipe.warm_up(self.labels, **call)
            seconds, images = [], np.zeros(0)
            for _ in range(options.repeats):
                start = time.perf_counter()
                images = np.asarray(pipe(key, self.labels, **call))
                seconds.append(time.perf_counter() - start)
            report = metrics.evaluate(images, self.labels, self.classify, self.dataset)
            figures = {
                "gmacs": macs_a_picture(pipe.denoiser.module, D.make_grid(pipe.prediction.path, steps)),
                "milliseconds": 1e3 * min(seconds) / len(images),
                "distance": report.frechet_ratio,
                "accuracy": report.accuracy,
                "parameters": models.count_params(pipe.denoiser.module),
            }
            return figures, {"images": images[:20]}

        return {"name": name, "steps": steps, **self.results.row(name, settings, make)[0]}


COLUMNS = (
    ("network", "name", ""),
    ("steps", "steps", "d"),
    ("million parameters", "millions", ".2f"),
    ("GMAC a picture", "gmacs", ".3f"),
    ("of DiT-Tiny's", "share", ".0%"),
    ("ms a picture", "milliseconds", ".2f"),
    ("times faster", "speedup", ".2f"),
    ("distance, multiple of the floor", "distance", ".3f"),
    ("as requested", "accuracy", ".1%"),
    ("fewer steps in these seconds", "baseline", ".3f"),
)


def kind_of(name: str) -> str:
    """The kind of a network: its name without its settings, but for tokens that bypass, another kind."""
    kind, *settings = name.split(", ")
    return f"{kind}, tokens" if "tokens" in settings else kind


def in_units(row: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """A row with its seconds, and its costs in the units of the table and as shares of the whole run's."""
    share, millions = row["gmacs"] / whole["gmacs"], row["parameters"] / 1e6
    return {**row, "share": share, "millions": millions, "seconds": row["milliseconds"] / 1e3}


def main(options: Dynamic) -> None:
    """Trains, draws, measures, and writes the table and the picture."""
    host.prepare()
    options = options.fitted()
    bench = Bench(options)
    rows = [bench.measured("DiT-Tiny", options.source, options.steps)]
    for steps in FEWER if not options.quick else ():
        rows.append(bench.measured(f"DiT-Tiny, {steps} steps", options.source, steps))
    rows = [{**row, "kind": FEWER_STEPS} for row in rows]
    for name in options.models or MODELS:
        row = bench.measured(name, trained(name, options), options.steps)
        rows.append({**row, "kind": kind_of(name)})
        print(f"{name}: {row['gmacs']:.3f} GMAC, distance {row['distance']:.3f}", flush=True)
    compared = with_comparison([in_units(row, rows[0]) for row in rows])
    body = [[format(row[key], form) for _, key, form in COLUMNS] for row in compared]
    title = f"Dynamic transformers: {options.num_images} digits, ddim, w = 1"
    save_table(options.output_dir / "dynamic.md", title, markdown([head for head, _, _ in COLUMNS], body))
    plot(options.output_dir / "dynamic.png", title, compared, "milliseconds a picture", 1e3)
    print(f"Look at {options.output_dir}/dynamic.md and dynamic.png.")


if __name__ == "__main__":
    run_script(main, Dynamic)
