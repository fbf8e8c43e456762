"""Fewer parameters, tokens and steps: a DiT pruned, with merged tokens, stopped early, against a smaller one.

Question: what does a DiT of digits lose without some of its heads and channels, with merged tokens or stopped
          early, and is that better than a smaller network or fewer steps?
Command:  python -m experiments.less_compute.smaller --run-dir runs/mini-ldm --model-dir RUN
Needs:    a finished run folder (make demo), whose classifier measures, and a DiT without an autoencoder, of
          experiments.lecture43.e6_dit_against_unet. Minutes and what came out: README.md in this folder. A
          second call goes on where the first one stopped, in the midst of a training, too; --quick prunes and
          trains little, only to see that everything runs.

Every row draws from the same noise. Seconds are the least of --repeats calls on --num-timed digits, and want
a quiet machine. The pruned networks are trained further by `training.finetune_recipe`, the full one and the
smaller one for as many epochs; the smaller one from the beginning before that, by the recipe of the full one.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.less_compute.comparison import FEWER_STEPS, plot, with_comparison
from experiments.results import Results, markdown, save_table
from experiments.trained import check_demo, load_classifier, load_dataset, weights_hash
from jaxldm import checkpoints, host, metrics, models, pipelines, training
from jaxldm import diffusion as D
from jaxldm.commands.terminal import run_script
from jaxldm.errors import InvalidArgumentError
from jaxldm.models import pruning

SHARES = (0.75, 0.5, 0.25)  # of heads and channels that stay
MERGED = {
    "25 % of the tokens merged": models.TokenMerging(0.25),
    "50 % merged": models.TokenMerging(0.5),
    "75 % merged": models.TokenMerging(0.75),
    "25 % merged, MLPs too": models.TokenMerging(0.25, mlp=True),
    "50 % merged, MLPs too": models.TokenMerging(0.5, mlp=True),
}
SNRS = (1.0, 3.0, 10.0, 30.0, 100.0)  # at which sampling stops
FEWER = (25, 12, 6)


@dataclasses.dataclass(frozen=True)
class Smaller:
    """Prune a DiT, merge its tokens, stop it early; measure what it costs and what is lost."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run of the demo, whose classifier measures."""
    model_dir: Path = Path("runs/lecture43/small-models/mnist5k/DiT-Tiny")
    """The run of a DiT that draws pixels."""
    output_dir: Path = Path("runs/less-compute")
    """Where rows, table, picture and the trained networks go: a folder for each model."""
    shares: tuple[float, ...] = SHARES
    """Of heads and channels that stay in the pruned networks."""
    epochs: int = 6
    """Of the training that follows pruning."""
    learning_rate: float = 1e-3
    """Of it."""
    steps: int = 50
    """Of DDIM."""
    num_images: int = 500
    """Digits of each row; the real test set has 500."""
    num_timed: int = 128
    """Digits of each timed call."""
    repeats: int = 3
    """Timed calls of each row."""
    time_again: bool = False
    """Measure the rows that there are once more, on a machine with nothing else to do."""
    quick: bool = False
    """Twenty digits in 6 steps, and one epoch of 64: only to see that everything runs."""
    seed: int = 0
    """Of noise and training."""

    def fitted(self) -> Smaller:
        """These options, or small ones with `quick`."""
        small = {"num_images": 20, "num_timed": 4, "repeats": 1, "steps": 6, "epochs": 1, "shares": (0.5,)}
        small["output_dir"] = self.output_dir / "quick"
        return dataclasses.replace(self, **small) if self.quick else self


class Row(NamedTuple):
    """What is drawn: a network, and how.

    Attributes:
        network: a key of `Bench.model`.
        call: the options of the call that are its own.
    """

    name: str
    network: str
    call: dict[str, Any]


class Bench:
    """The networks, the calls, and what measures them."""

    def __init__(self, options: Smaller):
        check_demo(options.run_dir)
        self.options, self.pipe = options, pipelines.load(options.model_dir)
        if self.pipe.autoencoder is not None:
            raise InvalidArgumentError(f"--model-dir {options.model_dir} must draw pixels, as DiT-Tiny does")
        self.folder = options.output_dir / options.model_dir.name
        self.results = Results(self.folder / "smaller")
        self.dataset, self.classify = load_dataset(options.run_dir), load_classifier(options.run_dir)
        self.recipe = training.read_recipe(options.model_dir)
        self.labels = np.arange(options.num_images, dtype=np.int32) % self.pipe.num_classes
        self.settings = {
            "judge": weights_hash(options.run_dir),
            "model": checkpoints.hash_of_files(sorted(options.model_dir.glob("*/*.safetensors"))),
            "images": options.num_images,
            "seed": options.seed,
            "steps": options.steps,
        }
        self.found: pruning.Units | None = None
        self.models: dict[str, Any] = {"full": self.pipe}

    def importance(self) -> pruning.Units:
        """Of the units of the full network, on training digits."""
        if self.found is None:
            images, labels = self.dataset.arrays("train")
            number = 64 if self.options.quick else 512
            some = np.linspace(0, len(images) - 1, number).round().astype(int)
            key = jax.random.key(self.options.seed + 1)
            self.found = pipelines.unit_importance(self.pipe, key, images[some], labels[some])
        return self.found

    def model(self, name: str) -> Any:
        """The pipeline of "full", "0.5 pruned", "smaller", or of one of these "trained further"."""
        if name not in self.models:
            before, _, further = name.partition(", ")
            self.models[name] = self.tuned(before) if further else self.made(before)
        return self.models[name]

    def made(self, name: str) -> Any:
        """The network that is pruned, or trained from the beginning."""
        if name == "smaller":
            return pipelines.load(self.trained(self.smaller_recipe(), "smaller"))
        share = float(name.split()[0])
        pipe = pipelines.prune(self.pipe, pruning.mask(self.importance(), share, share))
        pipelines.save(pipe, self.folder / "smaller" / "models" / name.replace(" ", "-"))
        return pipe

    def tuned(self, name: str) -> Any:
        """A network after further training."""
        options, pipe = self.options, self.model(name)
        source = self.folder / "smaller" / "models" / name.replace(" ", "-")
        if not source.exists():
            pipelines.save(pipe, source)
        recipe = training.finetune_recipe(
            source,
            self.recipe.data,
            "full",
            epochs=options.epochs,
            batch_size=self.recipe.diffusion.batch_size,
            learning_rate=options.learning_rate,
            ema_decay=self.recipe.diffusion.ema_decay,
            b2=self.recipe.diffusion.b2,
            save_every=1,
            sample_every=0,
            seed=options.seed,
        )
        limit = 64 if options.quick else self.recipe.max_train_images
        recipe = dataclasses.replace(recipe, max_train_images=limit)
        return pipelines.load(self.trained(recipe, f"{name}-further"))

    def smaller_recipe(self) -> training.Recipe:
        """The recipe of the full network, with half as many blocks."""
        own, options = self.recipe.diffusion, self.options
        depth = max(1, self.pipe.denoiser.config.depth // 2)
        own = dataclasses.replace(own, overrides={**own.overrides, "depth": depth}, sample_every=0)
        if options.quick:
            own = dataclasses.replace(own, epochs=1)
        limit = 64 if options.quick else self.recipe.max_train_images
        return dataclasses.replace(self.recipe, name="smaller", diffusion=own, max_train_images=limit)

    def trained(self, recipe: training.Recipe, name: str) -> Path:
        """The run of a recipe, trained to its end."""
        run_dir = self.folder / "smaller" / "runs" / name.replace(" ", "-")
        resume = (run_dir / "config.json").exists()
        return training.train(recipe, run_dir, resume=resume, devices=1, bar=False).path

    def rows(self) -> list[Row]:
        """The full network first, then fewer steps, merged tokens, early stops, and the other networks."""
        options = self.options
        whole = {"num_inference_steps": options.steps}
        rows = [Row("full", "full", whole)]
        fewer = [n for n in FEWER if n < options.steps]
        rows += [Row(f"{n} steps", "full", {"num_inference_steps": n}) for n in fewer]
        merged = list(MERGED.items())[-1:] if options.quick else MERGED.items()
        rows += [Row(name, "full", whole | {"token_merging": each}) for name, each in merged]
        for snr in SNRS[:1] if options.quick else SNRS:
            rows.append(Row(f"stopped at an SNR of {snr:g}", "full", self.stopped(snr)))
        for share in options.shares:
            rows.append(Row(f"{share:.0%} of heads and channels", f"{share:g} pruned", whole))
        for share in options.shares:
            rows.append(Row(f"{share:.0%}, trained further", f"{share:g} pruned, further", whole))
        rows.append(Row("half the blocks, from the beginning", "smaller", whole))
        rows.append(Row("half the blocks, trained further", "smaller, further", whole))
        rows.append(Row("full, trained further", "full, further", whole))
        return rows

    def stopped(self, snr: float) -> dict[str, Any]:
        """The call whose last step goes from the first row of this SNR to the data at once."""
        path = self.pipe.prediction.path
        noisy, _ = D.split_at_snr(D.make_grid(path, self.options.steps), snr)
        return {"timesteps": noisy.t.tolist()}

    def measured(self, row: Row) -> dict[str, Any]:
        """The figures of a row; the images once, the seconds again if asked for."""
        options = self.options
        call = {name: repr(value) for name, value in row.call.items()}
        settings = self.settings | {"call": call, "repeats": options.repeats, "timed": options.num_timed}
        if row.network != "full":
            settings |= {"epochs": options.epochs, "learning_rate": options.learning_rate}
        if options.time_again:
            settings |= {"again": time.strftime("%Y-%m-%d")}

        def make() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            pipe = self.model(row.network)
            call = row.call | {"guidance_scale": 1.0, "solver": "ddim"}
            images = pipe(jax.random.key(options.seed), self.labels, **call)
            report = metrics.evaluate(images, self.labels, self.classify, self.dataset)
            figures = self.cost(pipe, row) | {"seconds": self.seconds(pipe, call)}
            figures |= {"distance": report.frechet_ratio, "accuracy": report.accuracy}
            return figures, {"images": np.asarray(images[:20], np.float32)}

        figures, _ = self.results.row(row.name, settings, make)
        return {"name": row.name, "kind": kind_of(row.name), **figures}

    def cost(self, pipe: Any, row: Row) -> dict[str, Any]:
        """Parameters, multiply-accumulates of an evaluation, and evaluations of a picture."""
        merged = pipelines.with_token_merging(pipe, row.call.get("token_merging", 0.0)).denoiser.module
        steps = int(D.steps_in(pipe.grid(solver="ddim", **_of_grid(row.call))[1]))
        return {
            "parameters": models.count_params(merged),
            "macs": models.count_macs(merged),
            "evaluations": steps,
        }

    def seconds(self, pipe: Any, call: dict[str, Any]) -> float:
        """Of one digit: the least of several calls."""
        labels, key, found = self.labels[: self.options.num_timed], jax.random.key(self.options.seed), []
        pipe(key, labels, **call)
        for _ in range(self.options.repeats):
            start = time.perf_counter()
            pipe(key, labels, **call)
            found.append(time.perf_counter() - start)
        return min(found) / len(labels)


def _of_grid(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "token_merging"}


COLUMNS = (
    ("what", "name", ""),
    ("million parameters", "millions", ".2f"),
    ("million multiply-accumulates", "mega", ".1f"),
    ("evaluations", "evaluations", "d"),
    ("ms a digit", "milliseconds", ".1f"),
    ("times faster", "speedup", ".2f"),
    ("distance, multiple of the floor", "distance", ".3f"),
    ("worse by", "worse", "+.1%"),
    ("as requested", "accuracy", ".1%"),
    ("fewer steps in these seconds", "baseline", ".3f"),
)


def kind_of(name: str) -> str:
    """The kind of a row, by its name."""
    kinds = {
        " steps": FEWER_STEPS,
        " of heads and channels": "pruned",
        "%, trained further": "pruned and trained",
    }
    if name in MERGED:
        return "merged tokens"
    if name.startswith("stopped at"):
        return "stopped early"
    if name.startswith("half the blocks"):
        return "smaller network"
    return next((kind for end, kind in kinds.items() if name.endswith(end)), "full")


def in_units(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its costs in the units of the table."""
    millions = {"millions": row["parameters"] / 1e6, "mega": row["macs"] / 1e6}
    return {**row, **millions, "milliseconds": 1e3 * row["seconds"]}


def main(options: Smaller) -> None:
    """Prunes, trains, draws, measures, and writes the table and the picture."""
    host.prepare()
    options = options.fitted()
    bench = Bench(options)
    rows = []
    for row in bench.rows():
        rows.append(bench.measured(row))
        print(
            f"{row.name}: {1e3 * rows[-1]['seconds']:.1f} ms, distance {rows[-1]['distance']:.3f}", flush=True
        )
    compared = [in_units(row) for row in with_comparison(rows)]
    body = [[format(row[key], form) for _, key, form in COLUMNS] for row in compared]
    title = f"{bench.folder.name}: {options.num_images} digits, ddim, w = 1"
    save_table(bench.folder / "smaller.md", title, markdown([head for head, _, _ in COLUMNS], body))
    plot(bench.folder / "smaller.png", title, compared, "milliseconds a digit", 1e3)
    print(f"Look at {bench.folder}/smaller.png.")


if __name__ == "__main__":
    run_script(main, Smaller)
