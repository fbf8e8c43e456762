"""Min-SNR weights and convergence, for each prediction type (lecture 39, exercise E5).

Question: does weighting the loss by min(SNR, gamma) make a denoiser converge faster, and for which
          predictions?
Command:  python -m experiments.lecture39.e5_min_snr --run-dir runs/mini-ldm
Needs:    a run of `make demo` (its autoencoder and data); minutes and what came out: README.md in this
          folder. `--num-updates 100` for a look.

Six small transformers learn the latents of the run: eps, x_0 and v, with the weights and without. They are
all measured by the Fréchet distance of drawn latents from held-out ones, as they train.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import save_figure
from experiments.trained import load_dataset, load_latent_model
from jaxldm import diffusion as D
from jaxldm import metrics, models, training
from jaxldm.commands.terminal import run_script
from jaxldm.data import map_batches
from jaxldm.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class MinSNR:
    """Train small denoisers with and without Min-SNR weights and compare how they converge."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run with an autoencoder and classes."""
    output_dir: Path = Path("runs/lecture39/e5")
    """Where the plot is written."""
    predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction")
    """What the networks predict."""
    gamma: float = 5.0
    """Of the weights."""
    num_updates: int = 480
    """Of each network."""
    look_every: int = 120
    """Updates between two measurements."""
    batch_size: int = 32
    """Latents in an update."""
    learning_rate: float = 2e-3
    """Of Adam."""
    hidden_size: int = 64
    """Width of the transformer."""
    depth: int = 2
    """Its blocks."""
    num_images: int = 300
    """Latents drawn for each measurement, in 20 DDIM steps."""
    seed: int = 0
    """Of everything that is random; the same for all six."""


def latents_of(options: MinSNR) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train", "validation", "test"}: posterior means [N, h, w, c] of the run's images, and labels."""
    pipe, dataset = load_latent_model(options.run_dir), load_dataset(options.run_dir)
    encode = jax.jit(lambda x: models.encode_latents(pipe.autoencoder.module, pipe.autoencoder.params, x))
    splits = {name: dataset.arrays(name) for name in ("train", "validation", "test")}
    return {name: (map_batches(encode, images), labels) for name, (images, labels) in splits.items()}


class Trainer:
    """One small transformer on the latents of the run, trained and measured."""

    def __init__(self, options: MinSNR, latents: dict, prediction: str, gamma: float | None):
        self.options = options
        self.x_0, self.labels = (jnp.asarray(column) for column in latents["train"])
        self.held_out = flat(np.concatenate([latents[name][0] for name in ("validation", "test")]))
        self.num_classes = int(self.labels.max()) + 1
        self.module = models.build(
            "tiny-dit",
            sample_size=self.x_0.shape[1],
            in_channels=self.x_0.shape[-1],
            patch_size=1,
            hidden_size=options.hidden_size,
            depth=options.depth,
            num_classes=self.num_classes,
        )
        self.params = models.init(self.module, jax.random.key(options.seed))
        self.prediction = D.prediction(prediction, D.VP.named("linear"))
        self.weight = None if gamma is None else D.min_snr(gamma)

    def network(self, params):
        """(x, t, labels) -> what the network predicts."""
        return functools.partial(models.network(self.module), params)

    def loss(self, params, state, batch, key):
        """The loss of a batch (latents, labels)."""
        return D.diffusion_loss(key, self.network(params), self.prediction, *batch, weight=self.weight)

    def draw(self, params):
        """Latents [num_images, h, w, c] in 20 DDIM steps, every class equally often."""
        labels = jnp.arange(self.options.num_images, dtype=jnp.int32) % self.num_classes
        network = self.network(params)
        denoise = D.denoiser(lambda x, t: network(x, t, labels), self.prediction)
        grid, key = D.make_grid(self.prediction.path, 20), jax.random.key(self.options.seed + 2)
        x_T = D.initial_noise(key, (self.options.num_images, *self.x_0.shape[1:]), grid)
        return D.sample(key, denoise, D.solvers.ddim(), grid, x_T)

    def learning_curve(self) -> list[tuple[int, float]]:
        """(updates, Fréchet distance) as the network trains."""
        options = self.options
        adam = training.optimizer(options.learning_rate, min(20, options.num_updates), options.num_updates)
        train_step = training.make_train_step(self.loss, adam, ema_decay=0.99)

        @jax.jit
        def train(state):
            def update(state, _):
                key = jax.random.fold_in(jax.random.key(options.seed + 1), state.step)
                rows = jax.random.randint(key, (options.batch_size,), 0, self.x_0.shape[0])
                return train_step(state, (self.x_0[rows], self.labels[rows]))[0], None

            return jax.lax.scan(update, state, length=options.look_every)[0]

        draw, curve = jax.jit(self.draw), []
        key = jax.random.key(options.seed)
        state = training.create_train_state(key, self.params, adam)
        for _ in range(options.num_updates // options.look_every):
            state = train(state)
            drawn = flat(draw(state.evaluation_params))
            finite = np.isfinite(drawn).all()
            distance = metrics.frechet_distance(drawn, self.held_out) if finite else np.inf
            curve.append((int(state.step), distance))
        return curve


def flat(latents: np.ndarray) -> np.ndarray:
    """[N, h, w, c] as rows."""
    return np.asarray(latents).reshape(len(latents), -1)


def plot(path: Path, curves: dict, floor: float) -> None:
    """Frechet distance against updates, a panel for each prediction."""
    from matplotlib.figure import Figure

    predictions = list(dict.fromkeys(prediction for prediction, _ in curves))
    figure = Figure(figsize=(4 * len(predictions), 3.5), layout="constrained")
    panels = figure.subplots(1, len(predictions), squeeze=False, sharey=True)[0]
    for axes, prediction in zip(panels, predictions, strict=True):
        for (name, gamma), curve in curves.items():
            if name == prediction:
                axes.plot(
                    *zip(*curve, strict=True), "o-", label="plain" if gamma is None else f"Min-SNR, {gamma:g}"
                )
        axes.axhline(floor, color="grey", linestyle="--", label="real from real")
        axes.set(title=prediction, xlabel="updates", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("Fréchet distance of latents")
    panels[-1].legend()
    figure.suptitle("Latents drawn by small transformers, as they train")
    save_figure(path, figure)


def main(options: MinSNR) -> None:
    if not 0 < options.look_every <= options.num_updates:
        raise InvalidArgumentError("look_every must lie between 1 and num_updates")
    latents = latents_of(options)
    floor = metrics.frechet_distance(*(flat(latents[name][0]) for name in ("validation", "test")))
    updates = range(options.look_every, options.num_updates + 1, options.look_every)
    print("| Fréchet distance of latents after | " + " | ".join(f"{step}" for step in updates) + " |")
    print("|---" * (len(updates) + 1) + "|")
    curves = {}
    for prediction in options.predictions:
        for gamma in (None, options.gamma):
            curve = Trainer(options, latents, prediction, gamma).learning_curve()
            curves[prediction, gamma] = curve
            name = f"{prediction}, {'plain' if gamma is None else f'Min-SNR {gamma:g}'}"
            print(f"| {name} | " + " | ".join(f"{distance:.1f}" for _, distance in curve) + " |")
    print(f"\nreal validation digits from real test digits: {floor:.1f}")
    plot(options.output_dir / "min-snr.png", curves, floor)
    print(f"Look at {options.output_dir}/min-snr.png.")


if __name__ == "__main__":
    run_script(main, MinSNR)
