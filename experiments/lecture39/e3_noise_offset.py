"""Noise offset and brightness (lecture 39, exercise E3).

Question: does noise with an offset let a model reach the dark and the bright, and what does the lecture's
          constant do in its place?
Command:  python -m experiments.lecture39.e3_noise_offset
          python -m experiments.lecture39.e3_noise_offset --dataset captioned_shapes
Needs:    the `demo` extra, no trained model; minutes and what came out: README.md in this folder.
          `--quick` for a look.

Bright digits on dark grounds and dark digits on bright grounds are the two classes; each ground has its own
grey. Of captioned shapes they are the dark and the light backgrounds. One small transformer a setting learns
them on Stable Diffusion's betas, whose last step still shows 7 % of the picture. What is measured is the
brightness of the samples of each class next to that of real ones.
A second call keeps the settings that are done.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import wasserstein_distance

from experiments.figures import quick_options, save_figure
from experiments.results import Results, markdown, save_table
from jaxldm import data, metrics, models, training
from jaxldm import diffusion as D
from jaxldm.commands.terminal import run_script

CLASSES = ("dark", "bright")
GREYS = (0.2, 1.0)  # |grey| of the grounds, drawn evenly
MOST_OF_A_CLASS = 4000  # captioned shapes


class Setting(NamedTuple):
    """How the noise of training is changed: by `offset` N(0, 1) of each image, or by the constant."""

    offset: float
    constant: float

    @property
    def title(self) -> str:
        """For tables and pictures."""
        if self.constant:
            return f"constant {self.constant:g}"
        return f"offset {self.offset:g}" if self.offset else "plain"


@dataclasses.dataclass(frozen=True)
class NoiseOffset:
    """Train a small denoiser with each noise offset, and measure how dark and how bright its samples are."""

    output_dir: Path = Path("runs/lecture39/e3")
    """Where results.json, table.md and the pictures are written."""
    dataset: Literal["mnist5k", "captioned_shapes"] = "mnist5k"
    """Digits on grounds of random greys, or captioned shapes on their dark and light backgrounds."""
    offsets: tuple[float, ...] = (0.0, 0.05, 0.1)
    """Standard deviations, one number per image and channel, kept in the target: the published form."""
    constants: tuple[float, ...] = (0.05, 0.1)
    """Added to the noise and not to the target: the lecture's form."""
    num_updates: int = 1000
    """Of each network."""
    batch_size: int = 32
    """Pictures in an update."""
    learning_rate: float = 2e-3
    """Of Adam."""
    hidden_size: int = 128
    """Width of the transformer."""
    depth: int = 4
    """Its blocks."""
    num_images: int = 200
    """Drawn of each class, in each setting."""
    num_inference_steps: int = 50
    """DDIM steps."""
    seed: int = 0
    """Of everything that is random; the same in all settings."""
    quick: bool = False
    """Two settings of 20 updates, 10 pictures in 5 steps: only to see that everything runs."""

    def settings(self) -> list[Setting]:
        """Plain first."""
        return [Setting(offset, 0.0) for offset in self.offsets] + [Setting(0.0, c) for c in self.constants]


def on_grounds(key: Any, digits: Any, labels: Any) -> Any:
    """Digits [B, H, W, 1] on grounds of random greys: bright on dark (label 0), dark on bright (1)."""
    sign = jnp.where(labels == 0, 1.0, -1.0)[:, None, None, None]
    low, high = GREYS
    grey = -sign * jax.random.uniform(key, (len(digits), 1, 1, 1), minval=low, maxval=high)
    return grey + sign * (digits + 1) / 2


class Pictures(NamedTuple):
    """Pictures of two classes: those on dark and those on bright grounds.

    Attributes:
        shape: (H, W, C).
        number: how many there are (of each class, if they differ).
        of: (key, row numbers [B], labels [B]) -> pictures [B, H, W, C].
    """

    shape: tuple[int, ...]
    number: int
    of: Callable[[Any, Any, Any], Any]


def pictures_of(name: str, split: str) -> Pictures:
    """The pictures of a split."""
    images = data.load(name).arrays(split)[0]
    if name == "mnist5k":
        digits = jnp.asarray(images)
        return Pictures(
            images.shape[1:], len(images), lambda key, rows, labels: on_grounds(key, digits[rows], labels)
        )
    bright = np.median(images[:, 0], axis=(1, 2)) > 0  # the upper edge is background
    number = min(MOST_OF_A_CLASS, int(bright.sum()), int((~bright).sum()))
    both = jnp.asarray(np.stack([images[~bright][:number], images[bright][:number]]))
    return Pictures(images.shape[1:], number, lambda key, rows, labels: both[labels, rows])


class Trainer:
    """One small transformer of a setting, trained; then it draws."""

    def __init__(self, options: NoiseOffset, setting: Setting, pictures: Pictures):
        self.options, self.setting, self.pictures = options, setting, pictures
        self.module = models.build(
            "tiny-dit",
            sample_size=pictures.shape[0],
            in_channels=pictures.shape[-1],
            patch_size=pictures.shape[0] // 4,
            hidden_size=options.hidden_size,
            depth=options.depth,
            num_classes=len(CLASSES),
        )
        self.prediction = D.x0(D.VP(D.scaled_linear_betas()))

    def loss(self, params: Any, state: Any, batch: Any, key: Any) -> Any:
        """The library's loss with its noise offset, or with the lecture's constant."""
        sigma, constant = self.prediction.path.sigma, self.setting.constant

        def network(x, t, labels):
            # x_t is made with eps + constant, and the target with eps.
            shifted = x + constant * sigma(t)[:, None, None, None]
            return models.network(self.module)(params, shifted, t, labels)

        return D.diffusion_loss(key, network, self.prediction, *batch, noise_offset=self.setting.offset)

    def train(self) -> Any:
        """The moving average of the parameters after `num_updates`."""
        options = self.options
        adam = training.optimizer(
            options.learning_rate, min(50, options.num_updates), options.num_updates, b2=0.99
        )
        step = training.make_train_step(self.loss, adam, ema_decay=0.99)

        @functools.partial(jax.jit, static_argnums=1)
        def some(state, number):
            def update(state, _):
                keys = jax.random.split(jax.random.fold_in(jax.random.key(options.seed + 1), state.step), 3)
                rows = jax.random.randint(keys[0], (options.batch_size,), 0, self.pictures.number)
                labels = jax.random.randint(keys[1], (options.batch_size,), 0, len(CLASSES))
                return step(state, (self.pictures.of(keys[2], rows, labels), labels))

            return jax.lax.scan(update, state, length=number)

        key = jax.random.key(options.seed)
        state = training.create_train_state(key, models.init(self.module, key), adam)
        every = -(-options.num_updates // 4)
        for start in range(0, options.num_updates, every):
            number = min(every, options.num_updates - start)
            state, found = some(state, number)
            print(
                f"{self.setting.title}: update {start + number}, loss {found['loss'].mean():.4f}", flush=True
            )
        return state.evaluation_params

    def draw(self, params: Any, start_offset: float) -> np.ndarray:
        """[classes * num_images, H, W, 1], class after class, from noise with or without the offset."""
        options = self.options
        labels = jnp.repeat(jnp.arange(len(CLASSES), dtype=jnp.int32), options.num_images)
        path = self.prediction.path
        grid = D.make_grid(path, options.num_inference_steps)
        key, offset_key = jax.random.split(jax.random.key(options.seed + 2))
        height, width, channels = self.pictures.shape
        x_T = D.initial_noise(key, (len(labels), height, width, channels), grid)
        offset = jax.random.normal(offset_key, (len(labels), 1, 1, channels))
        x_T = x_T + start_offset * grid.sigma[0] * offset

        @jax.jit
        def run(params, x_T):
            denoise = D.denoiser(
                lambda x, t: models.network(self.module)(params, x, t, labels), self.prediction
            )
            return D.sample(key, denoise, D.solvers.ddim(), grid, x_T)

        return np.asarray(run(params, x_T))


def brightness(images: np.ndarray) -> np.ndarray:
    """The mean of each picture, [classes, N]."""
    return np.clip(images, -1, 1).mean(axis=(1, 2, 3)).reshape(len(CLASSES), -1)


def run(options: NoiseOffset) -> dict[str, np.ndarray]:
    """{name: pictures, class after class}: the real ones, and those drawn in each setting."""
    train, held_out = (pictures_of(options.dataset, split) for split in ("train", "test"))
    rows = np.arange(len(CLASSES) * options.num_images) % held_out.number
    labels = np.repeat(np.arange(len(CLASSES)), options.num_images)
    pictures = {"(real)": np.asarray(held_out.of(jax.random.key(9), rows, labels))}
    common = {
        key: value for key, value in dataclasses.asdict(options).items() if isinstance(value, int | float)
    }
    results = Results(options.output_dir)

    def make(setting):
        trainer = Trainer(options, setting, train)
        params = trainer.train()
        starts = dict.fromkeys((0.0, setting.offset))
        return {}, {f"start{start:g}": trainer.draw(params, start) for start in starts}

    for setting in options.settings():
        _, arrays = results.row(setting.title, common, functools.partial(make, setting))
        pictures[setting.title] = arrays["start0"]
        if setting.offset:
            pictures[f"{setting.title}, in the start, too"] = arrays[f"start{setting.offset:g}"]
    return pictures


def table(pictures: dict[str, np.ndarray]) -> str:
    """Brightness asked for and drawn: mean, spread, ends, and the distance of the distributions."""
    found = {name: brightness(images) for name, images in pictures.items()}
    body = []
    for number, label in enumerate(CLASSES):
        for name, values in found.items():
            low, high = np.quantile(values[number], (0.02, 0.98))
            distance = wasserstein_distance(values[number], found["(real)"][number])
            cells = [f"{x:+.2f}" for x in (values[number].mean(), low, high)]
            cells.insert(1, f"{values[number].std():.2f}")
            body.append([label, name, *cells, "" if name == "(real)" else f"{distance:.2f}"])
    return markdown(["requested", "noise", "mean", "std", "2 %", "98 %", "distance from real"], body)


def save_pictures(options: NoiseOffset, pictures: dict[str, np.ndarray]) -> None:
    """Histograms of brightness, and eight pictures of each class in a row for each setting."""
    from matplotlib.figure import Figure

    columns = -(-len(pictures) // 2)
    figure = Figure(figsize=(3.2 * columns, 5), layout="constrained")
    panels = figure.subplots(2, columns, sharex=True, sharey=True).flat
    for axes, (name, images) in zip(panels, pictures.items(), strict=False):
        for label, values in zip(CLASSES, brightness(images), strict=True):
            axes.hist(values, bins=30, range=(-1, 1), alpha=0.7, label=label)
        axes.set(title=name, xlabel="brightness")
    panels[0].legend(title="requested")
    save_figure(options.output_dir / "brightness.png", figure)
    number = min(8, options.num_images)
    picked = np.concatenate([np.arange(number) + k * options.num_images for k in range(len(CLASSES))])
    grid = metrics.labelled_grid(
        np.concatenate([np.clip(images[picked], -1, 1) for images in pictures.values()]),
        len(picked),
        title="Dark and bright grounds, real and drawn; the same noise in each row",
        column_labels=[label for label in CLASSES for _ in range(number)],
        row_labels=list(pictures),
        scale=2,
    )
    metrics.save_png(options.output_dir / "pictures.png", grid)


def main(options: NoiseOffset) -> None:
    small = {"num_updates": 20, "num_images": 10, "num_inference_steps": 5, "hidden_size": 16, "depth": 1}
    if options.dataset != "mnist5k":
        options = dataclasses.replace(options, output_dir=options.output_dir / options.dataset)
    options = quick_options(options, offsets=(0.1,), constants=(0.1,), **small)
    pictures = run(options)
    title = f"Brightness of {options.num_images} pictures of each class, {options.num_updates} updates"
    save_table(options.output_dir / "table.md", title, table(pictures))
    save_pictures(options, pictures)
    print(f"Look at {options.output_dir}/brightness.png and pictures.png.")


if __name__ == "__main__":
    run_script(main, NoiseOffset)
