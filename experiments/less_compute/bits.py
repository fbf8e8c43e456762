"""Fewer bits: bytes, distance and accuracy of digits from quantised networks, U-Net and DiT.

Question: how many bytes does a network need, on disk and in memory, before its digits get worse?
Command:  python -m experiments.less_compute.bits --run-dir runs/mini-ldm --model-dir runs/mini-ldm
Needs:    a finished run folder (make demo), whose classifier measures, and the run to quantise: the same, or
          a DiT of experiments.lecture43.e6_dit_against_unet. Minutes and what came out: README.md in this
          folder. A second call goes on where the first one stopped; --quick draws few digits in few ways.

Every row is written as a folder by `pipelines.save`, read back by `pipelines.load`, and draws from the same
noise. Speed is no question here: products of few bits are slower than those of floats on a processor, see
`products.py` in this folder for accelerators.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.results import Results, markdown, save_table
from experiments.trained import check_demo, load_classifier, load_dataset, weights_hash
from jaxldm import checkpoints, host, metrics, models, pipelines
from jaxldm.commands.terminal import run_script

CALIBRATION_STEPS = 20
# What is drawn: bits and further settings; None as bits is the network as trained, or in 16 bits.
WAYS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "float32": (None, {}),
    "bfloat16 weights": (None, {"dtype": "bfloat16"}),
    "int8": ("int8", {}),
    "int8, weights alone": ("int8", {"activations": None}),
    "int8, smooth": ("int8", {"smooth": 0.5}),
    "int8, modulation too": ("int8", {"modulation": "int8"}),
    "fp8": ("fp8", {}),
    "fp8, modulation too": ("fp8", {"modulation": "int8"}),
    "int4, no branch": ("int4", {"rank": 0, "modulation": "int8"}),
    "int4": ("int4", {"modulation": "int8"}),
    "int4, smooth": ("int4", {"smooth": 0.5, "modulation": "int8"}),
    "int4, rank 4": ("int4", {"rank": 4, "modulation": "int8"}),
    "int4 with int8 activations": ("int4", {"activations": "int8", "modulation": "int8"}),
    "int4 both, no branch": ("int4", {"activations": "int4", "rank": 0, "modulation": "int8"}),
    "int4 both": ("int4", {"activations": "int4", "modulation": "int8"}),
    "int4 both, smooth": ("int4", {"activations": "int4", "smooth": 0.5, "modulation": "int8"}),
}
QUICK = ("float32", "int8, smooth", "int4")


@dataclasses.dataclass(frozen=True)
class Bits:
    """Quantise a trained network in several ways; measure bytes, distance and accuracy."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run of the demo, whose classifier measures."""
    model_dir: Path | None = None
    """The run to quantise; the same by default."""
    output_dir: Path = Path("runs/less-compute")
    """Where rows, table and the quantised folders go: a folder for each model."""
    steps: int = 50
    """Of DDIM."""
    guidance_scale: float = 1.0
    """1 is the model as trained."""
    num_images: int = 500
    """Digits of each row; the real test set has 500."""
    ways: tuple[str, ...] = ()
    """Some rows alone, by their names; all by default."""
    quick: bool = False
    """Twenty digits in 4 steps in three ways: only to see that everything runs."""
    seed: int = 0
    """Of the noise."""

    def fitted(self) -> Bits:
        """These options, or small ones with `quick`."""
        small = {"num_images": 20, "steps": 4, "ways": QUICK, "output_dir": self.output_dir / "quick"}
        return dataclasses.replace(self, **small) if self.quick else self


class Bench:
    """The model, the calls, and what measures them."""

    def __init__(self, options: Bits):
        check_demo(options.run_dir)
        folder = options.model_dir or options.run_dir
        self.options, self.pipe = options, pipelines.load(folder)
        self.folder = options.output_dir / folder.name
        self.results = Results(self.folder / "bits")
        self.dataset, self.classify = load_dataset(options.run_dir), load_classifier(options.run_dir)
        self.labels = np.arange(options.num_images, dtype=np.int32) % self.pipe.num_classes
        self.settings = {
            "judge": weights_hash(options.run_dir),
            "model": checkpoints.hash_of_files(sorted(folder.glob("*/*.safetensors"))),
            "images": options.num_images,
            "seed": options.seed,
            "w": options.guidance_scale,
            "steps": options.steps,
        }
        self.maxima: dict[tuple[str, ...], np.ndarray] | None = None

    def quantised(self, bits: str | None, changes: dict[str, Any]) -> Any:
        """The pipeline of a row."""
        if bits is None:
            return self.pipe
        how = models.quantization(bits, **changes)
        if how.smooth is not None and self.maxima is None:
            key, labels = jax.random.key(self.options.seed + 1), np.arange(self.pipe.num_classes)
            call = {"num_inference_steps": CALIBRATION_STEPS, "guidance_scale": self.options.guidance_scale}
            self.maxima = pipelines.calibrate_quantization(self.pipe, key, labels, **call)
        return pipelines.quantize(self.pipe, how, self.maxima if how.smooth is not None else None)

    def stored(self, name: str) -> tuple[Any, int]:
        """(the pipeline of a row as it is read back from its folder, bytes of its network's file)."""
        bits, changes = WAYS[name]
        folder = self.folder / "bits" / "models" / name.replace(", ", "-").replace(" ", "-")
        pipe = self.quantised(bits, changes)
        if bits is None and changes:
            network = pipe.denoiser
            params = jax.tree.map(lambda leaf: leaf.astype(changes["dtype"]), network.params)
            pipe = pipe.replace(**{pipe.denoiser_name: pipelines.Network(network.module, params)})
        pipelines.save(pipe, folder)
        size = sum(file.stat().st_size for file in (folder / pipe.denoiser_name).glob("*.safetensors"))
        return (pipe if bits is None else pipelines.load(folder)), size

    def measured(self, name: str) -> dict[str, Any]:
        """The figures of a row."""
        options = self.options

        def make() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            pipe, size = self.stored(name)
            images = pipe(
                jax.random.key(options.seed),
                self.labels,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale,
                solver="ddim",
            )
            report = metrics.evaluate(images, self.labels, self.classify, self.dataset)
            figures = {"disk": size, "memory": models.param_bytes(pipe.denoiser.params)}
            figures |= {"distance": report.frechet_ratio, "accuracy": report.accuracy}
            return figures, {"images": np.asarray(images, np.float32)}

        figures, arrays = self.results.row(name, self.settings | {"way": list(WAYS[name])}, make)
        return {"name": name, "images": arrays["images"], **figures}


COLUMNS = (
    ("weights", "name", ""),
    ("MB on disk", "megabytes", ".2f"),
    ("of float32", "share", ".1%"),
    ("MB in memory", "held", ".2f"),
    ("distance, multiple of the floor", "distance", ".3f"),
    ("worse by", "worse", "+.1%"),
    ("as requested", "accuracy", ".1%"),
    ("change of a pixel", "change", ".4f"),
)


def with_comparison(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what they are to the first one; images have values from -1 to 1."""
    whole = rows[0]
    return [
        {
            **row,
            "megabytes": row["disk"] / 1e6,
            "held": row["memory"] / 1e6,
            "share": row["disk"] / whole["disk"],
            "worse": row["distance"] / whole["distance"] - 1,
            "change": float(np.sqrt(np.mean((row["images"] - whole["images"]) ** 2))),
        }
        for row in rows
    ]


def main(options: Bits) -> None:
    """Quantises, draws, measures, and writes the table."""
    host.prepare()
    options = options.fitted()
    bench = Bench(options)
    rows = []
    for name in options.ways or WAYS:
        rows.append(bench.measured(name))
        print(f"{name}: {rows[-1]['disk'] / 1e6:.2f} MB, distance {rows[-1]['distance']:.3f}", flush=True)
    body = [[format(row[key], form) for _, key, form in COLUMNS] for row in with_comparison(rows)]
    title = f"{bench.folder.name}: {options.num_images} digits, ddim, w = {options.guidance_scale:g}"
    save_table(bench.folder / "bits.md", title, markdown([head for head, _, _ in COLUMNS], body))


if __name__ == "__main__":
    run_script(main, Bits)
