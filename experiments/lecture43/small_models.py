"""The small denoisers of digits of exercises E1, E2, E3 and E6, and how they are trained and measured.

All on 28x28 pixels, with the same data, loss, updates of 16 digits and constant learning rate; so that a
learning curve does not depend on where it ends. A model that one exercise trained is not trained again by
another. Training draws no clock: seconds are measured apart, by `measure_seconds`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from experiments.figures import output_folder, quick_options
from experiments.results import Results
from experiments.trained import check_demo, load_classifier, weights_hash
from jaxldm import data, metrics, models, schedulers, training
from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError
from jaxldm.files import write_atomically
from jaxldm.metrics.evaluate import Classify
from jaxldm.training.diffusion import STAGE, build_denoiser, make_loss
from jaxldm.training.runs import open_run, save_denoiser
from jaxldm.training.stages import Context, Job
from jaxldm.training.train import run_job


class Measured(NamedTuple):
    """What `metrics.evaluate` finds, and two digits of each class."""

    figures: dict[str, Any]
    images: np.ndarray


class SmallModel(NamedTuple):
    """A network, and how long it is trained.

    Attributes:
        preset, overrides: of `models.build`.
        epochs: of all; measured every `every`.
        condition_dropout: 1 is a model without classes.
    """

    preset: str
    overrides: Mapping[str, Any]
    epochs: int
    every: int = 1
    condition_dropout: float = 0.1


def _unet(*channels: int) -> dict[str, Any]:
    """The demo's U-Net at 28, 14 and 7 pixels."""
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownBlock2D",) * len(channels),
        "up_block_types": ("UpBlock2D",) * len(channels),
        "attention_head_dim": 16,
    }


EPOCHS = 12  # that every model has
MODELS = {
    "DiT-Tiny": SmallModel("tiny-dit", {}, 2 * EPOCHS, 4),
    "DiT-Small": SmallModel("tiny-dit", {"hidden_size": 256, "num_heads": 8}, EPOCHS, 2),
    "U-Net-Small": SmallModel("mini-unet", _unet(24, 48, 80), 2 * EPOCHS, 4),
    "U-Net-Medium": SmallModel("mini-unet", _unet(32, 72, 176), EPOCHS, 2),
    "patch 7": SmallModel("tiny-dit", {"patch_size": 7}, EPOCHS, EPOCHS),
    "depth 8": SmallModel("tiny-dit", {"depth": 8}, EPOCHS, EPOCHS),
    "no classes": SmallModel("tiny-dit", {}, EPOCHS, EPOCHS, condition_dropout=1.0),
}
QUICK = {
    "tiny-dit": {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 7},
    "mini-unet": _unet(8, 8) | {"norm_num_groups": 4, "mid_block_type": None},
}


@dataclasses.dataclass(frozen=True)
class TrainAndMeasure:
    """What the exercises have in common."""

    run_dir: Path = Path("runs/mini-ldm")
    """A run of `make demo`: its classifier measures."""
    models_dir: Path = Path("runs/lecture43/small-models")
    """Where the trained models are: a run folder each, and results.json."""
    dataset: str = "mnist5k"
    """4 000 training digits; "mnist" has 60 000 and takes fifteen times as long."""
    num_images: int = 250
    """Drawn for each measurement."""
    num_inference_steps: int = 20
    """DDIM steps."""
    batch_size: int = 16
    """Digits in an update."""
    learning_rate: float = 2e-3
    """Of Adam, constant after half an epoch."""
    seed: int = 0
    """Of everything that is random."""
    time_again: bool = False
    """Measure the seconds again, on a machine with nothing else to do."""
    quick: bool = False
    """Very small networks, 1 epoch of 64 digits, 20 drawn in 2 steps: only to see that everything runs."""

    def fitted(self) -> Any:
        """These options, or small ones with `quick`."""
        of_data = dataclasses.replace(self, models_dir=self.models_dir / self.dataset.replace("/", "-"))
        folder = output_folder(self.models_dir, True)
        return quick_options(of_data, models_dir=folder, num_images=20, num_inference_steps=2)


def recipe_of(name: str, options: TrainAndMeasure) -> training.Recipe:
    """The recipe of a model of `MODELS`."""
    model = MODELS[name]
    small = QUICK[model.preset] if options.quick else {}
    diffusion = training.DiffusionRecipe(
        preset=model.preset,
        overrides={**model.overrides, **small},
        epochs=1 if options.quick else model.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        final_scale=1.0,
        b2=0.99,
        ema_decay=0.998,
        # Tiny DiT learns x_0 sooner than v, from so few updates (Li and He 2025 have it of large patches).
        prediction=D.x0(D.VP.named("cosine")),
        condition_dropout=model.condition_dropout,
        save_every=2,
        sample_every=1 if options.quick else model.every,
        sample_steps=options.num_inference_steps,
    )
    limit = 64 if options.quick else None
    return training.Recipe(
        name=name, data=options.dataset, max_train_images=limit, diffusion=diffusion, seed=options.seed
    )


def make_draw(
    module: nn.Module, prediction: D.Prediction, options: TrainAndMeasure
) -> Callable[[Any, Any, Any], np.ndarray]:
    """(parameters, labels [N], w) -> digits [N, H, W, C]; compiled once for all w."""
    grid = D.make_grid(prediction.path, options.num_inference_steps)
    size, channels, null = module.config.sample_size, module.config.in_channels, module.config.num_classes

    @jax.jit
    def draw(params, labels, w):
        network = functools.partial(models.network(module), params)
        predict = D.classifier_free_guidance(network, labels, jnp.int32(null), w)
        key = jax.random.key(options.seed)
        x_T = D.initial_noise(key, (len(labels), size, size, channels), grid)
        return D.sample(key, D.denoiser(predict, prediction), D.solvers.ddim(), grid, x_T)

    return lambda params, labels, w: np.asarray(draw(params, labels, jnp.float32(w)))


class Bench:
    """The data and the classifier that all models of an exercise are trained on and measured with."""

    def __init__(self, options: TrainAndMeasure):
        check_demo(options.run_dir)
        self.options = options
        self.dataset = data.load(options.dataset)
        self.classify: Classify = load_classifier(options.run_dir)
        self.classifier_hash = weights_hash(options.run_dir)
        self.results = Results(options.models_dir)
        self.draws: dict[str, Callable[[Any, Any, Any], np.ndarray]] = {}
        self.labels = np.arange(options.num_images, dtype=np.int32) % self.dataset.num_classes

    def module(self, name: str) -> nn.Module:
        """The network of a model."""
        return build_denoiser(
            recipe_of(name, self.options), self.dataset.image_shape, self.dataset.num_classes
        )

    def train_digits(self, recipe: training.Recipe) -> tuple[np.ndarray, np.ndarray]:
        """Images [N, H, W, C] and labels [N]."""
        images, labels = self.dataset.arrays("train")
        return images[: recipe.max_train_images], labels[: recipe.max_train_images]

    def draw(self, name: str) -> Callable[[Any, Any, Any], np.ndarray]:
        """`make_draw` of a model, compiled once."""
        if name not in self.draws:
            prediction = recipe_of(name, self.options).diffusion.prediction
            self.draws[name] = make_draw(self.module(name), prediction, self.options)
        return self.draws[name]

    def measured(self, name: str, epoch: int, w: float, draw: Callable[[], np.ndarray]) -> Measured:
        """Figures and the first digits of a model after an epoch at a guidance scale."""
        settings = {
            "recipe": recipe_of(name, self.options).to_dict(),
            "classifier": self.classifier_hash,
            "images": self.options.num_images,
        }

        def make():
            images = np.clip(draw(), -1, 1)
            report = metrics.evaluate(images, self.labels, self.classify, self.dataset)
            return report.to_dict(), {"images": images[: 2 * self.dataset.num_classes]}

        figures, arrays = self.results.row(f"{name}, epoch {epoch}, w {w:g}", settings, make)
        return Measured(figures, arrays["images"])

    def curve(self, name: str) -> dict[tuple[int, float], Measured]:
        """{(epoch, w): what is measured}; trains the model first where that is not done."""
        recipe, options = recipe_of(name, self.options), self.options
        run_dir = options.models_dir / name.replace(" ", "-")
        resume = (run_dir / "config.json").exists()
        run = open_run(run_dir, recipe, self.dataset, resume=resume)
        context = Context(recipe, self.dataset, run, training.make_mesh(1), resume)
        images, labels = self.train_digits(recipe)
        steps_per_epoch = len(images) // options.batch_size
        module, diffusion = self.module(name), recipe.diffusion
        draw = self.draw(name)

        def on_sample(params, step):
            epoch = step // steps_per_epoch
            for w in scales_at(name, epoch, diffusion.epochs):
                self.measured(name, epoch, w, lambda w=w: draw(params, self.labels, w))

        if not run.stage(STAGE).complete:
            columns = {"mean": images, "label": labels}
            loss = make_loss(diffusion, module)
            init, scheduler = (
                functools.partial(models.init, module),
                schedulers.to_config(diffusion.prediction),
            )

            def finish(params):
                save_denoiser(run, module, params, scheduler)

            run_job(context, STAGE, Job(init, loss, columns, finish, on_sample))

        def lost() -> np.ndarray:
            raise CheckpointError(
                f"{self.results.path} lacks figures of {run_dir}, or has those of other options: remove that "
                "run, so that it is trained and measured again"
            )

        epochs = range(diffusion.sample_every, diffusion.epochs + 1, diffusion.sample_every)
        return {
            (epoch, w): self.measured(name, epoch, w, lost)
            for epoch in epochs
            for w in scales_at(name, epoch, diffusion.epochs)
        }


def scales_at(name: str, epoch: int, last: int) -> tuple[float, ...]:
    """Guidance scales that are measured after an epoch: all at the epoch that every model has."""
    if MODELS[name].condition_dropout == 1:
        return (0.0,)
    return (0.0, 1.0, 3.0) if epoch == min(EPOCHS, last) else (1.0,)


def seconds_of(names: Sequence[str], bench: Bench) -> dict[str, dict[str, float]]:
    """What `measure_seconds` finds, from seconds.json where it is known."""
    path = bench.options.models_dir / "seconds.json"
    known = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else {}
    if bench.options.time_again or not set(names) <= set(known):
        known |= measure_seconds(names, bench)
        content = {"machine": timing.machine("", {})["processor"], "cores": timing.cores(), "models": known}
        write_atomically(path, json.dumps(content, indent=1).encode())
    return {name: known[name] for name in names}


def measure_seconds(names: Sequence[str], bench: Bench, rounds: int = 3) -> dict[str, dict[str, float]]:
    """{model: seconds an epoch, milliseconds a sample}: models take turns, the quickest turn counts."""
    updates, draws, epoch_steps = {}, {}, {}
    num_drawn = min(32, bench.options.num_images)
    for name in names:
        recipe, module = recipe_of(name, bench.options), bench.module(name)
        params = models.init(module, jax.random.key(0))
        adam = training.optimizer(recipe.diffusion.learning_rate, 1, 1000)
        loss = make_loss(recipe.diffusion, module)
        step = jax.jit(training.make_train_step(loss, adam, recipe.diffusion.ema_decay))
        state = training.create_train_state(jax.random.key(0), params, adam)
        images, labels = bench.train_digits(recipe)
        batch = {"mean": images[: bench.options.batch_size], "label": labels[: bench.options.batch_size]}
        draw = bench.draw(name)
        epoch_steps[name] = len(images) // bench.options.batch_size
        updates[name] = functools.partial(
            lambda *args: jax.block_until_ready(args[0](*args[1:])), step, state, batch
        )
        draws[name] = functools.partial(draw, params, bench.labels[:num_drawn], 1.0)
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for key, variants in (("update", updates), ("draw", draws)):
        for run in variants.values():
            run()  # compiles
        times = timing.turns(variants, rounds, 0.0 if bench.options.quick else 3.0)
        for name, milliseconds in times.items():
            if key == "update":
                found[name]["epoch_seconds"] = min(milliseconds) / 1e3 * epoch_steps[name]
            else:
                found[name]["sample_milliseconds"] = min(milliseconds) / num_drawn
    return found
