"""Min-SNR weights and convergence, for each prediction type (lecture 39, exercise E5).

Question: does weighting the loss by min(SNR, gamma) make a denoiser converge faster, and for which
          predictions?
Command:  python experiments/lecture39/e5_min_snr.py --run-dir runs/mini-ldm
Needs:    a run of `make demo` (its autoencoder and data); minutes and what came out: README.md beside this
          file. `--num-updates 100` for a look.

Six small transformers learn the latents of the run: eps, x_0 and v, with the weights and without. They are
all judged by the same ruler, the Frechet distance of drawn latents from held-out ones, as they train.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import data, metrics, models, pipelines, training
from jaxldm import diffusion as D
from jaxldm.commands.terminal import run_script
from jaxldm.data import map_batches
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.flat import FlatLayout


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
    pipe, recipe = pipelines.load(options.run_dir), training.read_recipe(options.run_dir)
    if pipe.autoencoder is None or pipe.num_classes is None:
        raise InvalidArgumentError(f"{options.run_dir} must have an autoencoder and classes: `make demo`")
    dataset = data.load(recipe.data, image_size=recipe.image_size)
    encode = jax.jit(lambda x: models.encode_latents(pipe.autoencoder.module, pipe.autoencoder.params, x))
    splits = {name: dataset.arrays(name) for name in ("train", "validation", "test")}
    return {name: (map_batches(encode, images), labels) for name, (images, labels) in splits.items()}


def learning_curve(
    options: MinSNR, latents: dict, prediction: str, gamma: float | None
) -> list[tuple[int, float]]:
    """(updates, Frechet distance) as one network trains."""
    x_0, labels = (jnp.asarray(column) for column in latents["train"])
    held_out = np.concatenate([latents[name][0] for name in ("validation", "test")])
    num_classes = int(labels.max()) + 1
    module = models.build(
        "tiny-dit",
        sample_size=x_0.shape[1],
        in_channels=x_0.shape[-1],
        patch_size=1,
        hidden_size=options.hidden_size,
        depth=options.depth,
        num_classes=num_classes,
    )
    key = jax.random.key(options.seed)
    params = models.init(module, key)
    layout = FlatLayout(params)
    path = D.VP.named("linear")
    meaning, weight = D.prediction(prediction, path), None if gamma is None else D.min_snr(gamma)
    grid = D.make_grid(path, 20)
    drawn_labels = jnp.arange(options.num_images, dtype=jnp.int32) % num_classes

    def network(vector):
        return lambda x, t, c: module.apply({"params": layout.unflatten(vector)}, x, t, c)

    def loss(vector, key, batch, step):
        image, label = batch
        return D.diffusion_loss(key, network(vector), meaning, image, label, weight=weight)

    adam = training.optimizer(options.learning_rate, min(20, options.num_updates), options.num_updates)
    train_step = training.make_train_step(loss, adam, ema_decay=0.99)

    @jax.jit
    def train(state):
        def update(state, _):
            key = jax.random.fold_in(jax.random.key(options.seed + 1), state.step)
            rows = jax.random.randint(key, (options.batch_size,), 0, x_0.shape[0])
            return train_step(state, (x_0[rows], labels[rows]))[0], None

        return jax.lax.scan(update, state, length=options.look_every)[0]

    @jax.jit
    def draw(vector):
        denoise = D.denoiser(lambda x, t: network(vector)(x, t, drawn_labels), meaning)
        key = jax.random.key(options.seed + 2)
        x_T = D.initial_noise(key, (options.num_images, *x_0.shape[1:]), grid)
        return D.sample(key, denoise, D.solvers.ddim(), grid, x_T)

    state, curve = training.create_train_state(key, layout.flatten(params), adam), []
    for _ in range(options.num_updates // options.look_every):
        state = train(state)
        drawn = np.asarray(draw(state.evaluation_params))
        distance = (
            metrics.frechet_distance(flat(drawn), flat(held_out)) if np.isfinite(drawn).all() else np.inf
        )
        curve.append((int(state.step), distance))
    return curve


def flat(latents: np.ndarray) -> np.ndarray:
    """[N, h, w, c] as rows."""
    return np.asarray(latents).reshape(len(latents), -1)


def plot(path: Path, curves: dict, floor: float) -> None:
    """Frechet distance against updates, a panel for each prediction."""
    from matplotlib.figure import Figure

    predictions = list(dict.fromkeys(prediction for prediction, _ in curves))
    figure = Figure(figsize=(4 * len(predictions), 3.2), layout="constrained")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(options: MinSNR) -> None:
    if not 0 < options.look_every <= options.num_updates:
        raise InvalidArgumentError("look_every must lie between 1 and num_updates")
    latents = latents_of(options)
    floor = metrics.frechet_distance(*(flat(latents[name][0]) for name in ("validation", "test")))
    updates = range(options.look_every, options.num_updates + 1, options.look_every)
    print("| Frechet distance of latents after | " + " | ".join(f"{step}" for step in updates) + " |")
    print("|---" * (len(updates) + 1) + "|")
    curves = {}
    for prediction in options.predictions:
        for gamma in (None, options.gamma):
            curve = curves[prediction, gamma] = learning_curve(options, latents, prediction, gamma)
            name = f"{prediction}, {'plain' if gamma is None else f'Min-SNR {gamma:g}'}"
            print(f"| {name} | " + " | ".join(f"{distance:.1f}" for _, distance in curve) + " |")
    print(f"\nreal validation digits from real test digits: {floor:.1f}")
    plot(options.output_dir / "min-snr.png", curves, floor)
    print(f"Look at {options.output_dir}/min-snr.png.")


if __name__ == "__main__":
    run_script(main, MinSNR)
