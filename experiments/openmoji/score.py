"""How often the picture that a run draws of a name is near the real one, for names seen and held out.

Question: is the real picture of the caption among the 10 nearest of 500 to the one drawn?
Command:  python -m experiments.openmoji.score runs/openmoji --guidance-scales 1.5 3 5 --gallery OUT.png
Needs:    a run of the recipe `openmoji`, the extra `openmoji`. Minutes and figures: README.md in this folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from jaxtyping import UInt8

from experiments.openmoji.features import Blocks, colour_and_shape, ranks
from experiments.trained import load_run
from jaxldm import data, metrics, models
from jaxldm.commands.terminal import run_script
from jaxldm.data import openmoji

SEED = 7
ASKED, AMONG, NEAREST = 200, 500, 10


@dataclasses.dataclass(frozen=True)
class Score:
    """Draw names seen and held out, and look for the real picture among the nearest ones."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """A finished run of the recipe openmoji."""
    guidance_scales: tuple[float, ...] = (1.5, 3.0, 5.0)
    """A row for each."""
    steps: int = 20
    """Of the sampler."""
    inception: Path | None = None
    """A file of FID's weights, whose features are then compared."""
    gallery: Path | None = None
    """A PNG file to write, of the last scale."""


class Task(NamedTuple):
    """Captions to draw, and the real pictures among which that of caption n is number n."""

    captions: list[str]
    candidates: UInt8[np.ndarray, "M H W 3"]


def tasks(dataset: data.Dataset, asked: int = ASKED, among: int = AMONG) -> dict[str, Task]:
    """Captions of the training split and names held out, each with other pictures of all splits."""
    captions, images = {}, {}
    for split in dataset.splits:
        captions[split] = dataset.captions(split) or []
        images[split] = data.to_uint8(dataset.arrays(split)[0])
    held_out = [split for split in dataset.splits if split != "train"]
    sides = {"training names": ["train"], "held-out names": held_out}
    everything = np.concatenate([images[split] for split in dataset.splits])
    names = [name for split in dataset.splits for name in captions[split]]
    found = {}
    for kind, splits in sides.items():
        own = {name for split in splits for name in captions[split]}
        random = np.random.default_rng(SEED)
        order = random.permutation(len(names))
        wanted = [row for row in order if names[row] in own][:asked]
        others = [row for row in order if row not in set(wanted)][: among - len(wanted)]
        rows = np.array([*wanted, *others])
        found[kind] = Task([names[row] for row in wanted], everything[rows])
    return found


def share_near(drawn: UInt8[np.ndarray, "N H W 3"], task: Task, features: Callable[[Any], Blocks]) -> float:
    """The share of the drawn pictures that have the real one of their caption among the 10 nearest."""
    places = ranks(features(drawn), features(task.candidates), np.arange(len(drawn)))
    return float((places < NEAREST).mean())


def network_features(file: Path) -> Callable[[UInt8[np.ndarray, "N H W 3"]], Blocks]:
    """The features of FID's Inception network, of a file with its weights."""
    from jaxldm import checkpoints

    loaded = checkpoints.load_inception(file)
    network = metrics.inception_network(loaded.module, loaded.params, loaded.sha256)
    apply = jax.jit(network.apply)

    def features(images: UInt8[np.ndarray, "N H W 3"]) -> Blocks:
        parts = [
            np.asarray(apply(network.params, network.prepare(images[start : start + 50]))["pool"])
            for start in range(0, len(images), 50)
        ]
        return {"inception": np.concatenate(parts).astype(np.float64)}

    return features


def draw(pipe: Any, captions: Sequence[str], scale: float, steps: int) -> UInt8[np.ndarray, "N H W 3"]:
    """One picture of each caption."""
    images = pipe(
        jax.random.key(SEED), list(captions), guidance_scale=scale, num_inference_steps=steps, batch_size=25
    )
    return data.to_uint8(np.asarray(images))


def autoencoded(pipe: Any, images: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N H W 3"]:
    """Real pictures, encoded and decoded again: the nearest that the denoising network can come."""
    module, params = pipe.autoencoder.module, pipe.autoencoder.params

    @jax.jit
    def reconstruct(params, batch):
        return models.decode_latents(module, params, models.encode_latents(module, params, batch))

    parts = [
        reconstruct(params, data.from_uint8(images[start : start + 50]))
        for start in range(0, len(images), 50)
    ]
    return data.to_uint8(np.clip(np.concatenate([np.asarray(part) for part in parts]), -1, 1))


def save_gallery(path: Path, rows: dict[str, tuple[list[str], Any, Any]]) -> None:
    """Pictures drawn of eight names of each kind above the real ones, with whose these are."""
    pictures, labels, names = [], [], []
    for kind, (captions, drawn, real) in rows.items():
        pictures += [*drawn[:8], *real[:8]]
        labels += [f"{kind}: drawn", "real"]
        names.append("; ".join(captions[:8]))
    title = f"Names seen and held out. Real pictures: {openmoji.LICENSE}"
    grid = metrics.labelled_grid(np.stack(pictures), 8, title=title, row_labels=labels, scale=2)
    metrics.save_png(path, grid)
    for kind, line in zip(rows, names, strict=True):
        print(f"{kind}, from the left: {line}")


def main(options: Score) -> None:
    """Print a row for each guidance scale and kind of name, with two controls; write the gallery."""
    pipe = load_run(options.run_dir, "openmoji")
    features = network_features(options.inception) if options.inception else colour_and_shape
    asked = tasks(data.load("openmoji"))
    print(f"| pictures | {' | '.join(asked)} |\n|{'---|' * (len(asked) + 1)}", flush=True)

    def show(name: str, drawn: dict[str, Any]) -> None:
        found = [f"{share_near(drawn[kind], task, features):.1%}" for kind, task in asked.items()]
        print(f"| {name} | {' | '.join(found)} |", flush=True)

    real = {kind: task.candidates[: len(task.captions)] for kind, task in asked.items()}
    show("real ones through the autoencoder", {kind: autoencoded(pipe, real[kind]) for kind in asked})
    show("real ones of other names", {kind: np.roll(real[kind], 1, axis=0) for kind in asked})
    for scale in options.guidance_scales:
        drawn = {kind: draw(pipe, task.captions, scale, options.steps) for kind, task in asked.items()}
        show(f"drawn, w = {scale:g}", drawn)
        if options.gallery and scale == options.guidance_scales[-1]:
            rows = {kind: (task.captions, drawn[kind], real[kind]) for kind, task in asked.items()}
            save_gallery(options.gallery, rows)
    print(f"\nReal pictures: {openmoji.LICENSE}")


if __name__ == "__main__":
    run_script(main, Score)
