"""Caching against fewer steps: seconds and distance of digits, U-Net and DiT.

Question: what does reusing the blocks of earlier steps buy, and is it more than fewer steps buy?
Command:  python -m experiments.less_compute.caching --run-dir runs/mini-ldm --model-dir runs/mini-ldm
Needs:    a finished run folder (make demo), whose classifier measures, and the run to draw with: the same,
          or a DiT of experiments.lecture43.e6_dit_against_unet. Minutes and what came out: README.md in this
          folder. A second call goes on where the first one stopped; --quick draws few digits by few caches.

Every row starts from the same noise. Seconds are the sampling loop's alone, the least of --repeats calls, and
want a quiet machine; the autoencoder is not in them. The baseline is the same solver in fewer steps.
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
from jaxldm import checkpoints, host, metrics, models, pipelines
from jaxldm import diffusion as D
from jaxldm.commands.terminal import run_script

FEWER = (40, 30, 25, 20, 17, 15, 12, 10, 8, 6, 5)
UNETS = (models.UNet2DModel, models.UNet2DConditionModel)
OF_ALL = (
    *(f"fora:{n}" for n in (2, 3, 4, 5)),
    *(f"taylor:{n},1" for n in (2, 3, 4, 5, 6, 8)),
    *(f"taylor:{n},2" for n in (3, 4, 5, 6)),
)
OF_UNETS = ("deepcache:2,2", "deepcache:3,2", "deepcache:5,2")
OF_TRANSFORMERS = tuple(f"first-block:{threshold}" for threshold in (0.03, 0.05, 0.1, 0.2))
TEACACHE, MAGCACHE = (0.02, 0.05, 0.1, 0.2), (0.02, 0.06, 0.12, 0.24)


@dataclasses.dataclass(frozen=True)
class Caching:
    """Draw digits in fewer steps and with each cache; measure seconds and distance."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run of the demo, whose classifier measures."""
    model_dir: Path | None = None
    """The run to draw with; the same by default."""
    output_dir: Path = Path("runs/less-compute")
    """Where rows, table and picture go: a folder for each model."""
    steps: int = 50
    """Of the run that is to be made faster."""
    solver: str = "ddim"
    """One that calls the network once a step."""
    guidance_scale: float = 1.0
    """1 is the model as trained."""
    num_images: int = 500
    """Digits of each row; the real test set has 500."""
    repeats: int = 3
    """Timed calls of each row."""
    time_again: bool = False
    """Measure the rows that there are once more, on a machine with nothing else to do."""
    quick: bool = False
    """Twenty digits in 8 steps by a few caches: only to see that everything runs."""
    seed: int = 0
    """Of the noise."""

    def fitted(self) -> Caching:
        """These options, or small ones with `quick`."""
        small = {"num_images": 20, "steps": 8, "repeats": 1, "output_dir": self.output_dir / "quick"}
        return dataclasses.replace(self, **small) if self.quick else self


class Row(NamedTuple):
    """What is drawn: a number of steps, with a cache or without one."""

    name: str
    kind: str
    steps: int
    cache: D.Cache | None = None


class Bench:
    """The model, the calls, and what measures them."""

    def __init__(self, options: Caching):
        check_demo(options.run_dir)
        folder = options.model_dir or options.run_dir
        self.options, self.pipe = options, pipelines.load(folder)
        self.name = folder.name
        self.dataset, self.classify = load_dataset(options.run_dir), load_classifier(options.run_dir)
        self.labels = np.arange(options.num_images, dtype=np.int32) % self.pipe.num_classes
        self.results = Results(options.output_dir / self.name)
        weights = sorted(folder.glob("*/*.safetensors"))
        self.settings = {
            "judge": weights_hash(options.run_dir),
            "model": checkpoints.hash_of_files(weights),
            "images": options.num_images,
            "seed": options.seed,
            "w": options.guidance_scale,
            "solver": options.solver,
        }
        self.reference: np.ndarray | None = None

    def call(self, row: Row) -> dict[str, Any]:
        """The options of the pipeline's call."""
        options = self.options
        common = {"guidance_scale": options.guidance_scale, "solver": options.solver, "output": "latents"}
        return common | {"num_inference_steps": row.steps, "cache": row.cache}

    def rows(self) -> list[Row]:
        """The whole run first, then fewer steps, then caches on all steps."""
        options, pipe = self.options, self.pipe
        few, steps = options.quick, options.steps
        unet = isinstance(pipe.denoiser.module, UNETS)
        rows = [Row(f"{n} steps", FEWER_STEPS, n) for n in (steps, *(n for n in FEWER if n < steps))]
        notations = OF_ALL + (OF_UNETS if unet else OF_TRANSFORMERS)
        notations = notations[::5] + notations[-1:] if few else notations
        rows += [Row(text, text.partition(":")[0], steps, D.caching.read(text)) for text in notations]
        key, labels = jax.random.key(options.seed + 1), np.arange(pipe.num_classes)
        call = self.call(rows[0])
        call = {name: value for name, value in call.items() if name not in ("cache", "output")}
        found = pipelines.calibrate_cache(pipe, key, labels, **call)
        for threshold in MAGCACHE[::3] if few else MAGCACHE:
            cache = D.caching.magcache(found.ratios, threshold, max_skips=4)
            rows.append(Row(f"magcache, {threshold:g}", "magcache", steps, cache))
            rows.append(
                Row(
                    f"magcache, {threshold:g}, extrapolated",
                    "magcache + taylor",
                    steps,
                    D.caching.extrapolate(cache),
                )
            )
        if not unet:
            polynomial = D.fit_teacache(found, degree=min(4, steps - 2))
            for threshold in TEACACHE[::3] if few else TEACACHE:
                cache = D.caching.teacache(polynomial, threshold, num_steps=steps)
                rows.append(Row(f"teacache, {threshold:g}", "teacache", steps, cache))
        return rows

    def measured(self, row: Row) -> dict[str, Any]:
        """The figures of a row; the images once, the seconds again if asked for."""
        options = self.options
        settings = self.settings | {"steps": row.steps, "repeats": options.repeats}
        settings |= {"cache": row.name, "settings": _plain(row.cache)}

        def make() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            latents, seconds = self.drawn(row)
            images = self.pipe.decode(latents, batch_size=self.pipe.images_per_device)
            report = metrics.evaluate(images, self.labels, self.classify, self.dataset)
            figures = {"seconds": seconds, "distance": report.frechet_ratio, "accuracy": report.accuracy}
            return figures, {"latents": np.asarray(latents)}

        if options.time_again:
            settings |= {"timed": time.strftime("%Y-%m-%d")}
        figures, arrays = self.results.row(row.name, settings, make)
        if self.reference is None:
            self.reference = arrays["latents"]
        change = np.sqrt(np.mean((arrays["latents"] - self.reference) ** 2) / np.mean(self.reference**2))
        return {"name": row.name, "kind": row.kind, "steps": row.steps, "change": float(change), **figures}

    def drawn(self, row: Row) -> tuple[np.ndarray, float]:
        """(latents, the least seconds of a call)."""
        key, call = jax.random.key(self.options.seed), self.call(row)
        self.pipe.warm_up(self.labels, **call)
        seconds, latents = [], np.zeros(0)
        for _ in range(self.options.repeats):
            start = time.perf_counter()
            latents = np.asarray(self.pipe(key, self.labels, **call))
            seconds.append(time.perf_counter() - start)
        return latents, min(seconds)


def _plain(cache: D.Cache | None) -> Any:
    return (
        None
        if cache is None
        else {name: np.asarray(value).tolist() for name, value in cache.settings.items()}
    )


COLUMNS = (
    ("what", "name", ""),
    ("steps", "steps", "d"),
    ("seconds", "seconds", ".2f"),
    ("times faster", "speedup", ".2f"),
    ("distance, multiple of the floor", "distance", ".3f"),
    ("worse by", "worse", "+.1%"),
    ("as requested", "accuracy", ".1%"),
    ("change of the latents", "change", ".3f"),
    ("fewer steps in these seconds", "baseline", ".3f"),
)


def main(options: Caching) -> None:
    """Draws, measures, and writes the table and the picture."""
    host.prepare()
    options = options.fitted()
    bench = Bench(options)
    rows = []
    for row in bench.rows():
        rows.append(bench.measured(row))
        print(f"{row.name}: {rows[-1]['seconds']:.2f} s, distance {rows[-1]['distance']:.3f}", flush=True)
    compared = with_comparison(rows)
    folder = options.output_dir / bench.name
    body = [[format(row[key], form) for _, key, form in COLUMNS] for row in compared]
    title = f"{bench.name}: {options.num_images} digits, {options.solver}, w = {options.guidance_scale:g}"
    save_table(folder / "caching.md", title, markdown([head for head, _, _ in COLUMNS], body))
    plot(folder / "caching.png", title, compared)
    print(f"Look at {folder}/caching.png.")


if __name__ == "__main__":
    run_script(main, Caching)
