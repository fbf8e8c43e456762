"""Error against network evaluations where the truth is known: a Gaussian mixture with a closed-form denoiser.

Question: which solver and which grid come nearest to the exact solution for 5, 10, 20, 50 evaluations?
Command:  python -m experiments.choosing_a_sampler.mixture     (--quick: two sizes, to see that it runs)
Needs:    nothing but jaxldm, one core. Minutes and what came out: README.md in this folder.

Deterministic solvers are measured by the distance from the exact end of the ODE, from the same start;
stochastic ones by the mean and covariance of what they draw. Everything is computed in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.choosing_a_sampler import curves
from experiments.exact_ode import follow
from experiments.figures import quick_options, save_results
from jaxldm import diffusion as D
from jaxldm import metrics
from jaxldm.commands.terminal import run_script
from jaxldm.errors import InvalidArgumentError
from jaxldm.metrics.frechet import Gaussian

# Four blobs on a plane; the class that is asked for is the last two.
WEIGHTS = np.array([0.3, 0.2, 0.3, 0.2])
MEANS = np.array([[-1.2, -0.6], [-0.5, 0.9], [0.9, 0.8], [1.1, -0.7]])
STDS = np.array([0.25, 0.15, 0.2, 0.3])
CLASS = slice(2, 4)
PATHS = {
    "linear": D.VP.named("linear"),
    "scaled_linear": D.VP.named("scaled_linear"),
    "cosine": D.VP.named("cosine"),
    "flow": D.Flow(),
}
TITLES = {name: "flow path" if name == "flow" else f"VP path, {name} betas" for name in PATHS}
Run = Callable[[Any, Any, Any], Any]
Errors = dict[float, Callable[[Any], float]]  # by guidance scale


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Draw the error of every solver against the number of network evaluations, on a Gaussian mixture."""

    quick: bool = False
    """Few points and samples: only to see that everything runs."""
    budgets: tuple[int, ...] = (5, 7, 10, 14, 20, 28, 50, 100, 200)
    """Network evaluations; a solver that asks twice a step takes as many steps as they pay for."""
    in_table: tuple[int, ...] = (5, 10, 20, 50)
    """Those of them in the tables."""
    num_points: int = 512
    """Starts of the deterministic runs."""
    num_samples: int = 20_000
    """Samples of the stochastic runs."""
    guidance_scale: float = 7.5
    """Of the guided runs."""
    spaced_solvers: tuple[str, ...] = ("ddim", "dpmpp_2m", "unipc, order 2")
    """Those whose spacings are in the tables; mixture.csv has all."""
    seed: int = 0
    output_dir: Path = Path("runs/choosing-a-sampler")
    """Where tables, figures and pictures go."""
    image_dir: Path | None = None
    """Where the pictures go as well: docs/images for those on the page."""


def guided_denoiser(path: D.Path, guidance_scale: Any) -> D.Denoiser:
    """(1 - w) E[x_0 | x_t] + w E[x_0 | x_t, class], both in closed form."""
    everything = D.gaussian_mixture_denoiser(path, WEIGHTS, MEANS, STDS)
    asked = D.gaussian_mixture_denoiser(path, WEIGHTS[CLASS], MEANS[CLASS], STDS[CLASS])
    return D.Denoiser(lambda x, t: D.guide(everything(x, t), asked(x, t), guidance_scale), path)


def solve_exactly(path: D.Path, noise: np.ndarray, guidance_scale: float) -> np.ndarray:
    """Where the ODE takes sigma(t_noisy) noise."""
    start = noise * path.sigma(path.t_noisy)
    return follow(lambda circle: guided_denoiser(circle, guidance_scale), path, start)


def runner(path: D.Path, solver: D.Solver) -> Run:
    """(grid, x_T, w) -> x_0; compiled once for every grid of one length."""
    return jax.jit(lambda grid, x, w: D.sample(jax.random.key(0), guided_denoiser(path, w), solver, grid, x))


def class_moments() -> Gaussian:
    """Mean and covariance of the class, exactly."""
    weights = WEIGHTS[CLASS] / WEIGHTS[CLASS].sum()
    mean = weights @ MEANS[CLASS]
    centred = MEANS[CLASS] - mean
    covariance = (weights * centred.T) @ centred + (weights @ STDS[CLASS] ** 2) * np.eye(2)
    return Gaussian(mean, covariance)


def moment_error(x: Any) -> float:
    """Square root of the Fréchet distance from the class, as a part of the class's standard deviation."""
    truth = class_moments()
    distance = metrics.gaussian_frechet_distance(metrics.fit_gaussian(np.asarray(x)), truth)
    return float(np.sqrt(distance / np.trace(truth.covariance)))


def exact_samples(count: int, seed: int) -> np.ndarray:
    """Samples of the class itself: their error is the floor of every sampler."""
    random = np.random.default_rng(seed)
    weights = WEIGHTS[CLASS] / WEIGHTS[CLASS].sum()
    which = random.choice(len(weights), count, p=weights)
    return MEANS[CLASS][which] + STDS[CLASS][which, None] * random.standard_normal((count, 2))


class Study:
    """The runs, each compiled once: all grids are padded to one length."""

    def __init__(self, options: Mixture):
        self.options = options
        random = np.random.default_rng(options.seed)
        self.noise = random.standard_normal((options.num_points, 2))
        self.many = random.standard_normal((options.num_samples, 2))

    def rows(
        self, betas: str, name: str, solver: D.Solver, noise: np.ndarray, errors: Errors, spacings: tuple
    ) -> list[curves.Row]:
        """A row for each scale, spacing and budget of one solver; errors: {w: x_0 -> error}."""
        path, most, rows = PATHS[betas], max(self.options.budgets), []
        run, pairs = runner(path, solver), D.steps_within(solver, path, self.options.budgets)
        for w, error in errors.items():
            for spacing in spacings:
                for budget, (steps, count) in zip(self.options.budgets, pairs, strict=True):
                    try:
                        grid = curves.make_grid(path, steps, spacing, most)
                    except InvalidArgumentError:  # beta, rounded, has no 100 different timesteps
                        continue
                    x_0 = run(grid, grid.sigma[0] * noise, np.float64(w))
                    row = {"betas": betas, "w": w, "solver": name, "spacing": spacing, "budget": budget}
                    rows.append(row | {"evaluations": count, "error": error(x_0)})
        return rows

    def deterministic(self, betas: str) -> list[curves.Row]:
        """Every deterministic solver on every spacing, by its distance from the exact end of the ODE."""
        truths = {w: solve_exactly(PATHS[betas], self.noise, w) for w in (1.0, self.options.guidance_scale)}
        errors = {w: functools.partial(curves.relative_rms, truth=truth) for w, truth in truths.items()}
        spacings = curves.FLOW_SPACINGS if betas == "flow" else curves.VP_SPACINGS
        found = curves.DETERMINISTIC.items()
        return [
            row
            for name, solver in found
            for row in self.rows(betas, name, solver, self.noise, errors, spacings)
        ]

    def stochastic(self, betas: str) -> list[curves.Row]:
        """The stochastic solvers and two others, by the moments of what they draw on the path's own grid."""
        chosen = {name: curves.DETERMINISTIC[name] for name in ("ddim", "dpmpp_2m")} | curves.STOCHASTIC
        return [
            row
            for name, solver in chosen.items()
            for row in self.rows(betas, name, solver, self.many, {1.0: moment_error}, ("trailing",))
        ]


ERROR, MOMENTS = "relative error of x_0", "error of mean and covariance"


def markdown(options: Mixture, rows: list[curves.Row], stochastic: list[curves.Row], floor: float) -> str:
    """The tables: every solver on the trailing grid, two solvers on every spacing, the stochastic ones."""
    parts = []

    def add(title: str, found: list[curves.Row], name: str) -> None:
        parts.append(f"**{title}**\n\n{curves.budget_table(found, name, 'error', options.in_table, '.2g')}")

    for betas, title in TITLES.items():
        for w in (1.0, options.guidance_scale):
            found = curves.choose(rows, betas=betas, w=w, spacing="trailing")
            add(f"{title}, w = {w:g}, trailing: {ERROR}", found, "solver")
        for solver in options.spaced_solvers:
            found = curves.choose(rows, betas=betas, w=1.0, solver=solver)
            add(f"{title}, w = 1, {solver}: {ERROR}", found, "spacing")
    for betas in dict.fromkeys(row["betas"] for row in stochastic):
        found = curves.choose(stochastic, betas=betas)
        add(f"{TITLES[betas]}: {MOMENTS} (of exact samples: {floor:.2g})", found, "solver")
    return "\n".join(parts)


def plot(
    options: Mixture, rows: list[curves.Row], stochastic: list[curves.Row], floor: float, folders: list[Path]
) -> None:
    """Three pictures: solvers, spacings, and the stochastic solvers."""
    scales = (("linear", 1.0), ("cosine", 1.0), ("flow", 1.0), ("linear", options.guidance_scale))
    of_solvers = [
        (f"{TITLES[betas]}, w = {w:g}", curves.choose(rows, betas=betas, w=w, spacing="trailing"))
        for betas, w in scales
    ]
    of_spacings = [
        (f"{TITLES[betas]}, {solver}", curves.choose(rows, betas=betas, w=1.0, solver=solver))
        for solver in options.spaced_solvers
        for betas in ("linear", "cosine", "flow")
    ]
    of_noise = [
        (TITLES[betas], curves.choose(stochastic, betas=betas))
        for betas in dict.fromkeys(row["betas"] for row in stochastic)
    ]
    pictures = {
        "mixture-solvers": (of_solvers, 2, "solver", ERROR, {}),
        "mixture-spacings": (of_spacings, 3, "spacing", ERROR, {}),
        "mixture-stochastic": (of_noise, 2, "solver", MOMENTS, {title: floor for title, _ in of_noise}),
    }
    for name, (panels, columns, by, label, floors) in pictures.items():
        drawn = [(title, label, curves.curves_of(found, by, "error")) for title, found in panels]
        paths = [folder / f"{name}.png" for folder in folders]
        curves.draw(drawn, paths, columns, "exact samples", floors)


def main(options: Mixture) -> None:
    jax.config.update("jax_enable_x64", True)
    few = {"budgets": (5, 10), "in_table": (5, 10), "num_points": 16, "num_samples": 200}
    options = quick_options(options, **few)
    start, study = time.perf_counter(), Study(options)
    folders = [options.output_dir, *([options.image_dir] if options.image_dir else [])]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    rows = [row for betas in PATHS for row in study.deterministic(betas)]
    stochastic = [row for betas in ("linear", "flow") for row in study.stochastic(betas)]
    floor = moment_error(exact_samples(options.num_samples, options.seed))
    plot(options, rows, stochastic, floor, folders)
    text = markdown(options, rows, stochastic, floor)
    tables = {"mixture.csv": curves.as_csv(rows), "mixture-stochastic.csv": curves.as_csv(stochastic)}
    save_results(options.output_dir, tables | {"mixture.md": text})
    minutes = (time.perf_counter() - start) / 60
    print(f"{text}\n{minutes:.1f} minutes; mixture.csv, mixture.md and pictures: {options.output_dir}")


if __name__ == "__main__":
    run_script(main, Mixture)
