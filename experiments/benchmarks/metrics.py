"""FID and KID of two sets of images: jaxldm next to torch-fidelity, on the same images and threads.

Question: are features, FID and KID computed as fast as by torch-fidelity, on a processor?
Command:  python -m experiments.benchmarks.metrics            (--quick: few images, to see that it runs)
Needs:    the `test` extra, torch-fidelity among it. Minutes and figures: README.md in this folder.

Both sides have the same random weights of InceptionV3, through one file, and use all cores. They take turns,
and each round gives one ratio. What they find is compared, too.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import timing
from experiments.benchmarks.torch_fidelity_side import TorchFidelity, save_weights
from experiments.figures import quick_options, save_results
from experiments.results import markdown
from jaxldm import checkpoints, host, metrics, models
from jaxldm.commands.terminal import run_script

SIDES = ("jaxldm", "torch-fidelity")


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Time features, FID and KID on both sides, and write a table."""

    num_images: int = 256
    """Of each set."""
    chunk: int = 64
    """Images whose features are computed in a turn."""
    batch_size: int = 32
    """Images at once."""
    size: int = 64
    """Height and width of the images in pixels; the network sees 299."""
    rounds: int = 9
    """Turns of each side."""
    quick: bool = False
    """4 images of each set in batches of 2, a round: only to see that everything runs."""
    output_dir: Path = Path("runs/benchmarks")
    """Where metrics.json and metrics.md go."""


def random_inception_state(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights with which features neither vanish nor grow, in PyTorch's names and layout."""
    random = np.random.default_rng(seed)
    state = {}
    for name, tensor in checkpoints.published(models.shapes(models.InceptionV3())).items():
        draw = random.standard_normal(tensor.shape, dtype=np.float32)
        if len(tensor.shape) > 1:
            state[name] = draw * np.float32(np.sqrt(2 / np.prod(tensor.shape[1:])))
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = 1 + 0.3 * np.abs(draw)
        else:
            state[name] = 0.2 * draw
    return state


def random_images(count: int, size: int, seed: int) -> np.ndarray:
    """uint8 [N, size, size, 3] of coarse squares under fine noise, brighter for a larger seed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 200 + 20 * seed, [count, 8, 8, 3])
    images = coarse.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
    return np.clip(images + random.integers(0, 20, images.shape), 0, 255).astype(np.uint8)


class Ours:
    """The same of jaxldm, by its public functions."""

    def __init__(self, weights: Path, batch_size: int):
        loaded = checkpoints.load_inception(weights)
        self.network = metrics.inception_network(loaded.module, loaded.params, loaded.sha256)
        self.batch_size = batch_size

    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> [N, 2048], without a cache."""
        with tempfile.TemporaryDirectory() as folder:
            found = metrics.extract(
                metrics.array_set(images, "images"),
                self.network,
                ("pool",),
                Path(folder),
                batch_size=self.batch_size,
            )
            return np.array(found["pool"])

    def fid(self, x: np.ndarray, y: np.ndarray) -> float:
        """FID of two sets of features."""
        return metrics.frechet_distance(x, y)

    def kid(self, x: np.ndarray, y: np.ndarray, subset_size: int) -> float:
        """KID over 100 subsets."""
        return metrics.kernel_distance(x, y, subset_size=subset_size).mean


def measure(options: Metrics) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of the table, and the relative differences of what the two sides find."""
    images = [random_images(options.num_images, options.size, seed) for seed in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        save_weights(weights, random_inception_state())
        sides = {
            "jaxldm": Ours(weights, options.batch_size),
            "torch-fidelity": TorchFidelity(weights, timing.cores(), options.batch_size),
        }
    chunk, subset = images[0][: options.chunk], max(2, options.num_images // 2)
    rows = [
        timing.measure_row(
            f"features of {len(chunk)} images",
            {name: lambda side=side: side.features(chunk) for name, side in sides.items()},
            options.rounds,
            0.0,
        )
    ]
    print(rows[-1], flush=True)
    features = {name: [side.features(part) for part in images] for name, side in sides.items()}
    found = {}
    x, y = features["jaxldm"]
    for title, compute in (
        (f"FID of 2 x {len(x)} features", lambda side: side.fid(x, y)),
        (f"KID of 2 x {len(x)} features, 100 subsets of {subset}", lambda side: side.kid(x, y, subset)),
    ):
        ours, theirs = (compute(sides[name]) for name in SIDES)
        found[title] = abs(ours - theirs) / abs(theirs)
        variants = {name: lambda side=side: compute(side) for name, side in sides.items()}  # noqa: B023
        rows.append(timing.measure_row(title, variants, min(3, options.rounds), 0.0))
        print(rows[-1], flush=True)
    expected = features["torch-fidelity"][0]
    found["features"] = float(np.abs(x - expected).max() / np.abs(expected).max())
    return [*rows, whole(rows, 2 * options.num_images / len(chunk))], found


def whole(rows: list[dict[str, Any]], chunks: float) -> dict[str, Any]:
    """All of it: the rows added up, the first as often as there are chunks."""
    times = {
        name: sum(
            row["milliseconds"][name] * (chunks if number == 0 else 1) for number, row in enumerate(rows)
        )
        for name in SIDES
    }
    return {"row": "all, for both sets", "milliseconds": times, "ratio_quartiles": {}}


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each row; a ratio above 1 says that jaxldm is faster."""
    head = ["row", *(f"{name}, s" for name in SIDES), "torch-fidelity / jaxldm"]
    body = []
    for row in rows:
        seconds = [row["milliseconds"][name] / 1e3 for name in SIDES]
        quartiles = row["ratio_quartiles"].get(SIDES[1])
        ratio = "{1:.2f} ({0:.2f} to {2:.2f})".format(*quartiles) if quartiles else ""
        body.append(
            [row["row"], *(f"{value:.2f}" for value in seconds), ratio or f"{seconds[1] / seconds[0]:.2f}"]
        )
    return markdown(head, body)


def main(options: Metrics) -> None:
    host.prepare()
    options = quick_options(options, num_images=4, chunk=4, batch_size=2, size=32, rounds=1)
    rows, differences = measure(options)
    text = table(rows)
    versions = timing.installed("torch", "torch-fidelity", "numpy", "scipy")
    content = {**timing.machine("metrics", versions), "rows": rows, "relative_differences": differences}
    files = {"metrics.json": json.dumps(content, indent=1), "metrics.md": text}
    save_results(options.output_dir, files)
    print(f"\n{text}\nlargest relative differences: {differences}")


if __name__ == "__main__":
    run_script(main, Metrics)
