"""Solvers on a trained model: digits of the mini latent diffusion model, by network evaluations.

Question: what do 5, 10, 20 or 50 evaluations of a trained network buy with each solver, at w = 1 and w = 3?
Command:  python experiments/choosing_a_sampler/digits.py --run-dir runs/mini-ldm
Needs:    a finished run folder (make demo), the `mnist` extra. Minutes and what came out: README.md beside
          this file. --quick draws few digits by two solvers, to see that it runs.

Deterministic solvers start from the same noise as a run of many steps: how far are the latents from its
own? All are judged by a classifier of digits: Fréchet distance over that of real from real digits, and the
share read as asked. The seconds are those of the sampling alone, on this machine, after compiling.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxldm import host

host.prepare()  # before anything is computed

import curves  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jaxldm import checkpoints, data, metrics, models, pipelines, training  # noqa: E402
from jaxldm import diffusion as D  # noqa: E402
from jaxldm.commands.terminal import run_script  # noqa: E402
from jaxldm.files import write_atomically  # noqa: E402
from jaxldm.training.runs import RunFolder  # noqa: E402

ALL = {**curves.DETERMINISTIC, **curves.STOCHASTIC}
REFERENCE = "dpmpp_2m"


@dataclasses.dataclass(frozen=True)
class Digits:
    """Draw digits by every solver at several numbers of network evaluations, and measure them."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run of experiments/lecture39/mini_ldm.py."""
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
    """Names in curves.py."""
    num_images: int = 40
    """Digits of each solver, budget and scale."""
    reference_steps: int = 500
    """Steps of the run that the latents are compared with, by dpmpp_2m."""
    seed: int = 0
    output_dir: Path = Path("runs/choosing-a-sampler")
    """Where tables, figures and pictures go."""
    image_dir: Path | None = None
    """Where the pictures go as well: docs/images for those on the page."""


class Judge:
    """A trained pipeline, and the classifier and real digits that its digits are measured by."""

    def __init__(self, options: Digits):
        self.pipe = pipelines.load(options.run_dir)
        self.path = self.pipe.schedule.make_path()
        self.dataset = data.load(training.read_recipe(options.run_dir).data)
        classifier = RunFolder(options.run_dir).stage("classifier").model
        self.classify = metrics.classifier_function(*checkpoints.load(classifier))
        self.labels = np.arange(options.num_images, dtype=np.int32) % self.pipe.num_classes
        self.keys = D.image_keys(jax.random.key(options.seed), options.num_images)

    def sampler(self, solver: D.Solver, max_steps: int) -> Any:
        """(steps, w) -> (latents, seconds), for any number of steps up to `max_steps`; compiled once."""
        pipe, null = self.pipe, np.int32(self.pipe.num_classes)

        def draw(params, grid, w):
            network = functools.partial(models.network(pipe.denoiser.module), params)
            predict = D.classifier_free_guidance(network, self.labels, null, w)
            noise = D.initial_noise(self.keys, (len(self.labels), *pipe.latent_shape()), grid)
            return D.sample(self.keys, pipe.schedule.make_denoiser(predict), solver, grid, noise)

        def arguments(steps, w):
            grid = D.pad(D.make_grid(self.path, steps), max_steps)
            return pipe.denoiser.params, grid, jnp.float32(w)

        compiled = jax.jit(draw).lower(*arguments(max_steps, 1.0)).compile()

        def run(steps, w):
            given = jax.block_until_ready(arguments(steps, w))
            start = time.perf_counter()
            latents = compiled(*given).block_until_ready()
            return latents, time.perf_counter() - start

        return run

    def row(self, name, steps, evaluations, w, latents, seconds, reference=None) -> dict[str, Any]:
        """All figures of one run."""
        images = self.pipe.decode(latents, batch_size=len(latents))
        report = metrics.evaluate(images, self.labels, self.classify, self.dataset)
        distance = None if reference is None else curves.relative_rms(latents, reference)
        row = {"solver": name, "w": w, "steps": steps, "evaluations": evaluations, "distance": distance}
        row |= {"seconds_per_image": seconds / len(images), **report.to_dict()}
        print(
            f"w = {w:g}, {name}, {evaluations} evaluations: distance {distance}, "
            f"ratio {report.frechet_ratio:.2f}, {row['seconds_per_image']:.4f} s per image",
            flush=True,
        )
        return row


def measure(options: Digits, judge: Judge) -> Iterator[list[dict[str, Any]]]:
    """The rows so far: those of the reference run at each scale, then every solver's, one after another."""
    rows, references = [], {}
    run, steps = judge.sampler(ALL[REFERENCE], options.reference_steps), options.reference_steps
    for w in options.guidance_scales:
        references[w], seconds = run(steps, w)
        rows.append(judge.row("reference", steps, steps, w, references[w], seconds))
    for name in options.solvers:
        pairs = curves.steps_within(ALL[name], judge.path, options.budgets)
        run = judge.sampler(ALL[name], max(options.budgets))
        for w in options.guidance_scales:
            for steps, evaluations in pairs:
                latents, seconds = run(steps, w)
                reference = references[w] if name in curves.DETERMINISTIC else None
                rows.append(judge.row(name, steps, evaluations, w, latents, seconds, reference))
        yield rows


PANELS = (  # column, title, format
    ("distance", "distance of the latents from those of the reference run, relative", ".3f"),
    ("frechet_ratio", "Fréchet distance / real-vs-real floor", ".2f"),
    ("accuracy", "read as the asked digit", ".0%"),
    ("seconds_per_image", "seconds per image", ".4f"),
)


def markdown(options: Digits, rows: list[dict[str, Any]]) -> str:
    """A table for each scale and figure: a row per solver, a column per budget."""
    parts = []
    for w in options.guidance_scales:
        for column, title, form in PANELS:
            body = []
            for name in (*options.solvers, "reference"):
                values = [row[column] for row in rows if (row["solver"], row["w"]) == (name, w)]
                if values[0] is None:
                    continue
                cells = [format(value, form) for value in values]
                if name == "reference":
                    name = f"{REFERENCE}, {options.reference_steps} steps"
                    cells += [""] * (len(options.budgets) - 1)
                body.append([name, *cells])
            head = ["solver", *[f"{budget} evaluations" for budget in options.budgets]]
            parts.append(f"w = {w:g}: {title}, {options.num_images} digits\n\n{curves.table(head, body)}")
    return "\n".join(parts)


def plot(options: Digits, rows: list[dict[str, Any]], paths: list[Path]) -> None:
    """Distance and Fréchet ratio against evaluations, two panels for each scale."""
    panels, floors = [], {}
    for w in options.guidance_scales:
        of_scale = [row for row in rows if row["w"] == w]
        for column, label in (("distance", "distance of latents"), ("frechet_ratio", "Fréchet ratio")):
            found = {}
            for name in options.solvers:
                of_solver = [row for row in of_scale if row["solver"] == name]
                if of_solver[0][column] is not None:
                    found[name] = tuple([row[key] for row in of_solver] for key in ("evaluations", column))
            panels.append((f"w = {w:g}, {label}", label, found))
        floors[panels[-1][0]] = of_scale[0]["frechet_ratio"]  # the reference run's
    curves.draw(panels, paths, "reference run", floors)


def _solvers_of(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row["solver"] for row in rows if row["solver"] != "reference"))


def main(options: Digits) -> None:
    if options.quick:
        few = {"solvers": ("ddim", "ddpm"), "num_images": 10, "reference_steps": 10, "budgets": (2, 5)}
        options = dataclasses.replace(options, **few)
    start = time.perf_counter()
    folders = [options.output_dir, *([options.image_dir] if options.image_dir else [])]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    text = ""
    for rows in measure(options, Judge(options)):  # what is done is kept if the run is stopped
        measured = dataclasses.replace(options, solvers=_solvers_of(rows))
        text = markdown(measured, rows)
        plot(measured, rows, [folder / "digits-solvers.png" for folder in folders])
        write_atomically(options.output_dir / "digits.md", text.encode())
        write_atomically(options.output_dir / "digits.json", json.dumps(rows, indent=1).encode())
    minutes = (time.perf_counter() - start) / 60
    print(
        f"\n{text}\n{minutes:.1f} minutes; digits-solvers.png, digits.md, digits.json: {options.output_dir}"
    )


if __name__ == "__main__":
    run_script(main, Digits)
