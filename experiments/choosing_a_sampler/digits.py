"""Solvers and spacings on a trained model: digits, by network evaluations.

Question: what do 5, 10, 20 or 50 evaluations of a trained network buy with each solver and spacing?
Command:  python -m experiments.choosing_a_sampler.digits --run-dir runs/mini-ldm
Needs:    a finished run folder (make demo), the `demo` extra. Minutes and what came out: README.md in
          this folder. --quick draws few digits by two solvers, to see that it runs.

Deterministic solvers start from the same noise as a run of many steps: how far are the latents from its
own? The digits are also measured by a classifier: Fréchet distance over that of real from real digits, and
the share that it classifies as the requested digit.
Earlier rows of other networks and solvers stay in digits.csv: another --run-dir or --solvers adds to them.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.choosing_a_sampler import curves
from experiments.figures import quick_options, save_results
from experiments.trained import load_classifier, load_dataset
from jaxldm import diffusion as D
from jaxldm import host, metrics, models, pipelines, training
from jaxldm.commands.terminal import run_script
from jaxldm.files import finish_interrupted

ALL = {**curves.DETERMINISTIC, **curves.STOCHASTIC}
# Two runs of many steps that share neither solver nor spacing: the distance between them bounds what the
# distance from the first one can tell.
REFERENCES = {"reference": ("dpmpp_2m", "trailing"), "second reference": ("unipc, order 2", "exponential")}
SPACED = ("dpmpp_2m", "unipc, order 2")  # in the picture
TITLES = {"mini-ldm": "mini latent diffusion, cosine betas", "tiny-dit": "Tiny DiT, linear betas"}


@dataclasses.dataclass(frozen=True)
class Digits:
    """Draw digits by solver, spacing and number of network evaluations, and measure them."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run of experiments.lecture39.mini_ldm or experiments.lecture43.tiny_dit."""
    quick: bool = False
    """Ten digits by two solvers: only to see that everything runs."""
    guidance_scales: tuple[float, ...] = (1.0, 3.0)
    """1 is the conditional model as trained, and costs half."""
    budgets: tuple[int, ...] = (5, 10, 20, 50)
    """Network evaluations; a solver that asks twice a step takes as many steps as they pay for."""
    solvers: tuple[str, ...] = (
        "ddim",
        "dpmpp_2m",
        "unipc, order 2",
        "heun",
        "lms",
        "dpmpp_3m",
        "ddpm",
        "dpmpp_2m_sde",
    )
    """Names in curves.py; the stochastic ones are drawn on the trailing grid alone."""
    spacings: tuple[str, ...] = curves.VP_SPACINGS
    """Names in curves.py."""
    num_images: int = 40
    """Digits of each solver, spacing, budget and scale."""
    reference_steps: int = 500
    """Steps of the runs that the latents are compared with."""
    seed: int = 0
    output_dir: Path = Path("runs/choosing-a-sampler")
    """Where tables, figures and pictures go."""
    image_dir: Path | None = None
    """Where the pictures go as well: docs/images for those on the page."""


class Model:
    """A trained pipeline, with the classifier and the real digits that its digits are measured by."""

    def __init__(self, options: Digits):
        self.pipe = pipelines.load(options.run_dir)
        self.path = self.pipe.prediction.path
        self.name, self.betas = training.read_recipe(options.run_dir).name, self.path.schedule.name
        self.dataset, self.classify = load_dataset(options.run_dir), load_classifier(options.run_dir)
        self.labels = np.arange(options.num_images, dtype=np.int32) % self.pipe.num_classes
        self.keys = D.image_keys(jax.random.key(options.seed), options.num_images)

    def sampler(self, solver: D.Solver, max_steps: int) -> Callable[[str, int, float], Any]:
        """(spacing, steps, w) -> latents, for at most `max_steps`; compiled once."""
        pipe, null = self.pipe, np.int32(self.pipe.num_classes)

        def draw(params, grid, w):
            network = functools.partial(models.network(pipe.denoiser.module), params)
            predict = D.classifier_free_guidance(network, self.labels, null, w)
            noise = D.initial_noise(self.keys, (len(self.labels), *pipe.latent_shape()), grid)
            return D.sample(self.keys, D.denoiser(predict, pipe.prediction), solver, grid, noise)

        def arguments(spacing, steps, w):
            grid = curves.make_grid(self.path, steps, spacing, max_steps)
            return pipe.denoiser.params, grid, jnp.float32(w)

        jitted = jax.jit(draw)
        return lambda spacing, steps, w: jitted(*arguments(spacing, steps, w)).block_until_ready()

    def row(self, setting: dict[str, Any], latents: Any, reference: Any) -> curves.Row:
        """All figures of one run; `reference`: the latents to compare with, or None."""
        images = self.pipe.decode(latents, batch_size=len(latents))
        report = metrics.evaluate(images, self.labels, self.classify, self.dataset)
        row = {"network": self.name, "betas": self.betas, **setting}
        row["error"] = None if reference is None else curves.relative_rms(latents, reference)
        row |= {"frechet_ratio": report.frechet_ratio, "accuracy": report.accuracy}
        print(row, flush=True)
        return row


def measure(options: Digits, model: Model) -> Iterator[list[curves.Row]]:
    """The rows so far: those of the reference runs at each scale, then every solver's, one after another."""
    rows, truth = [], {}
    steps = options.reference_steps
    for label, (name, spacing) in REFERENCES.items():
        run = model.sampler(ALL[name], steps)
        for w in options.guidance_scales:
            latents = run(spacing, steps, w)
            setting = {"w": w, "solver": label, "spacing": spacing, "budget": steps, "evaluations": steps}
            rows.append(model.row(setting, latents, truth.get(w)))
            truth.setdefault(w, latents)
    for name in options.solvers:
        deterministic = name in curves.DETERMINISTIC
        pairs = D.steps_within(ALL[name], model.path, options.budgets)
        run = model.sampler(ALL[name], max(options.budgets))
        for w in options.guidance_scales:
            for spacing in options.spacings if deterministic else options.spacings[:1]:
                for budget, (steps, evaluations) in zip(options.budgets, pairs, strict=True):
                    setting = {"w": w, "solver": name, "spacing": spacing, "budget": budget}
                    setting["evaluations"] = evaluations
                    reference = truth[w] if deterministic else None
                    rows.append(model.row(setting, run(spacing, steps, w), reference))
        yield rows


COLUMNS = {  # title, format
    "error": ("distance of the latents from those of the reference run, relative", ".3f"),
    "frechet_ratio": ("Fréchet distance / real-vs-real floor", ".2f"),
    "accuracy": ("share classified as the requested digit", ".0%"),
}


def markdown(options: Digits, rows: list[curves.Row]) -> str:
    """For each network and scale: solvers on the trailing grid by each figure, solvers by spacing."""
    parts = []

    def add(title: str, found: list[curves.Row], name: str, column: str) -> None:
        body = curves.budget_table(found, name, column, options.budgets, COLUMNS[column][1])
        parts.append(f"**{title}**\n\n{body}")

    for network, w in dict.fromkeys((row["network"], row["w"]) for row in rows):
        of_scale = [row for row in curves.choose(rows, network=network, w=w) if row["solver"] in ALL]
        references = [row for row in curves.choose(rows, network=network, w=w) if row["solver"] not in ALL]
        where = f"{TITLES.get(network, network)}, w = {w:g}"
        trailing = curves.choose(of_scale, spacing="trailing")
        for column, (title, _) in COLUMNS.items():
            known = [row for row in trailing if row[column] is not None]
            add(f"{where}, trailing: {title}", known, "solver", column)
        for solver in dict.fromkeys(row["solver"] for row in of_scale if row["error"] is not None):
            add(f"{where}, {solver}: distance", curves.choose(of_scale, solver=solver), "spacing", "error")
        parts.append(
            "".join(
                f"{row['solver']} ({row['evaluations']} evaluations, {row['spacing']}): Fréchet ratio "
                f"{row['frechet_ratio']:.2f}, {row['accuracy']:.0%} classified as requested"
                + ("\n" if row["error"] is None else f", {row['error']:.4f} from the reference\n")
                for row in references
            )
        )
    return "\n".join(parts)


def plot(rows: list[curves.Row], paths: list[Path]) -> None:
    """Distance from the reference, for each network and scale: by solver, and by spacing for some solvers."""
    panels = []
    rows = [row for row in rows if row["solver"] in ALL and row["error"] is not None]
    for network, w in dict.fromkeys((row["network"], row["w"]) for row in rows):
        drawn = curves.choose(rows, network=network, w=w)
        found = {"trailing": curves.curves_of(curves.choose(drawn, spacing="trailing"), "solver", "error")}
        for solver in SPACED:
            of_solver = curves.choose(drawn, solver=solver)
            found |= {solver: curves.curves_of(of_solver, "spacing", "error")} if of_solver else {}
        where = f"{TITLES.get(network, network)}, w = {w:g}"
        panels += [(f"{where}\n{what}", "distance of latents", lines) for what, lines in found.items()]
    curves.draw(panels, paths, columns=3)


def main(options: Digits) -> None:
    host.prepare()  # before anything is computed
    few = {"solvers": ("ddim", "ddpm"), "spacings": ("trailing", "exponential"), "num_images": 10}
    options = quick_options(options, **few, reference_steps=10, budgets=(2, 5))
    start, path = time.perf_counter(), options.output_dir / "digits.csv"
    folders = [options.output_dir, *([options.image_dir] if options.image_dir else [])]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    model = Model(options)
    finish_interrupted(options.output_dir)
    earlier = curves.read_results(path) if path.exists() else []
    for found in measure(options, model):  # what is done is kept if the run is stopped
        rows = merged(earlier, found)
        contents = {"digits.csv": curves.as_csv(rows), "digits.md": markdown(options, rows)}
        save_results(options.output_dir, contents)
        plot(rows, [folder / "digits-solvers.png" for folder in folders])
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{minutes:.1f} minutes; digits.csv, digits.md and a picture: {options.output_dir}")


def merged(earlier: list[curves.Row], found: list[curves.Row]) -> list[curves.Row]:
    """What was found, in the place of what an earlier call found for the same network and solver."""
    new = {(row["network"], row["solver"]) for row in found}
    rows = [row for row in earlier if (row["network"], row["solver"]) not in new] + found
    order = {name: place for place, name in enumerate([*REFERENCES, *ALL])}
    networks = list(dict.fromkeys(row["network"] for row in rows))
    return sorted(rows, key=lambda row: (networks.index(row["network"]), row["w"], order[row["solver"]]))


if __name__ == "__main__":
    run_script(main, Digits)
