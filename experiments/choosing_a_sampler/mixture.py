"""Error against network evaluations where the truth is known: a Gaussian mixture with a closed-form denoiser.

Question: which solver and which grid come nearest to the exact solution for 5, 10, 20, 50 evaluations?
Command:  python experiments/choosing_a_sampler/mixture.py     (--quick: two sizes, to see that it runs)
Needs:    nothing but jaxldm, one core. Minutes and what came out: README.md beside this file.

Deterministic solvers are judged by the distance from the exact end of the ODE, from the same start;
stochastic ones by the mean and covariance of what they draw. Everything is computed in float64.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import curves
import jax
import numpy as np
from scipy.integrate import solve_ivp

from jaxldm import diffusion as D
from jaxldm import metrics
from jaxldm.commands.terminal import run_script
from jaxldm.files import write_atomically
from jaxldm.metrics.frechet import Gaussian
from jaxldm.schedulers import scheduler_grid

# Four blobs on a plane; the class that is asked for is the last two.
WEIGHTS = np.array([0.3, 0.2, 0.3, 0.2])
MEANS = np.array([[-1.2, -0.6], [-0.5, 0.9], [0.9, 0.8], [1.1, -0.7]])
STDS = np.array([0.25, 0.15, 0.2, 0.3])
CLASS = slice(2, 4)
SPACINGS = {
    "vp": {
        "trailing": {"spacing": "trailing"},
        "leading": {"spacing": "leading"},
        "linspace": {"spacing": "linspace"},
        "karras": {"spacing": "karras"},
        "exponential": {"spacing": "exponential"},
        "beta": {"spacing": "beta_sigmas"},
    },
    "flow": {
        "trailing": {"spacing": "trailing"},
        "shift 3": {"spacing": "trailing", "shift": 3.0},
        "karras": {"spacing": "karras"},
        "exponential": {"spacing": "exponential"},
        "beta": {"spacing": "beta_sigmas"},
    },
}
PATHS = {"vp": D.VP(D.linear_betas(1000, 1e-4, 0.02)), "flow": D.Flow()}
Run = Callable[[Any, Any, Any], Any]


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
    """Of the guided panel."""
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
    """Where the ODE takes sigma(t_noisy) noise, by SciPy's eighth-order solver.

    In the angle a = atan(sigma / alpha), for z = x / norm, every path has alpha = cos a and sigma = sin a:
    dz/da = cos(a) eps - sin(a) x_0 = (cos(a) z - x_0) / sin(a).
    """
    circle = D.Interpolant("gvp")
    predict = jax.jit(lambda z, angle: guided_denoiser(circle, guidance_scale)(z, angle * 2 / np.pi))
    alpha, sigma = path.alpha(path.t_noisy), path.sigma(path.t_noisy)

    def slope(angle, z):
        z = z.reshape(noise.shape)
        return ((np.cos(angle) * z - np.asarray(predict(z, angle))) / np.sin(angle)).ravel()

    start = np.ravel(noise) * sigma / np.hypot(alpha, sigma)
    span = (float(np.arctan2(sigma, alpha)), 1e-6)
    solution = solve_ivp(slope, span, start, method="DOP853", rtol=1e-9, atol=1e-10)
    return solution.y[:, -1].reshape(noise.shape)


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
        self.runs: dict[tuple[str, str], Run] = {}
        self.steps: dict[str, list[tuple[int, int]]] = {}

    def curve(self, path_name, name, solver, noise, judge, scale=1.0, **spacing):
        """(evaluations, judge's values) of a solver on the grids of one spacing."""
        path, key = PATHS[path_name], (path_name, name)
        if key not in self.runs:
            self.runs[key] = runner(path, solver)
        if name not in self.steps:
            self.steps[name] = curves.steps_within(solver, path, self.options.budgets)
        pairs, values = self.steps[name], []
        for steps, _ in pairs:
            grid = D.pad(scheduler_grid(path, steps, **spacing), max(self.options.budgets))
            values.append(judge(self.runs[key](grid, grid.sigma[0] * noise, np.float64(scale))))
        return [evaluations for _, evaluations in pairs], values

    def deterministic(self, path_name: str, scale: float) -> dict[str, Any]:
        """Every deterministic solver on a path's own grid, judged by the exact end of the ODE."""
        truth = solve_exactly(PATHS[path_name], self.noise, scale)
        judge = lambda x: curves.relative_rms(x, truth)  # noqa: E731
        return {
            name: self.curve(path_name, name, solver, self.noise, judge, scale)
            for name, solver in curves.DETERMINISTIC.items()
        }

    def spacings(self, path_name: str, name: str) -> dict[str, Any]:
        """One solver on every spacing."""
        truth = solve_exactly(PATHS[path_name], self.noise, 1.0)
        judge = lambda x: curves.relative_rms(x, truth)  # noqa: E731
        solver = curves.DETERMINISTIC[name]
        return {
            label: self.curve(path_name, name, solver, self.noise, judge, **spacing)
            for label, spacing in SPACINGS[path_name].items()
        }

    def stochastic(self, path_name: str) -> dict[str, Any]:
        """The stochastic solvers and two others, judged by the moments of what they draw."""
        chosen = {"ddim": curves.DETERMINISTIC["ddim"], "dpmpp_2m": curves.DETERMINISTIC["dpmpp_2m"]}
        return {
            name: self.curve(path_name, name, solver, self.many, moment_error)
            for name, solver in {**chosen, **curves.STOCHASTIC}.items()
        }


def markdown(
    title: str, first: str, found: dict[str, Any], options: Mixture, floor: float | None = None
) -> str:
    """The values at the budgets of the table; in each column the least is bold."""
    columns = [options.budgets.index(budget) for budget in options.in_table]
    values = np.array([[found[name][1][column] for column in columns] for name in found])
    cells = [[f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}" for value in row] for row in values]
    for column, best in enumerate(np.nanargmin(values, axis=0)):
        cells[best][column] = f"**{cells[best][column]}**"
    rows = [[name, *row] for name, row in zip(found, cells, strict=True)]
    if floor is not None:
        rows.append(["exact samples", *[f"{floor:.2g}"] * len(columns)])
    head = [first, *[f"{budget} evaluations" for budget in options.in_table]]
    return f"{title}\n\n{curves.table(head, rows)}"


def main(options: Mixture) -> None:
    jax.config.update("jax_enable_x64", True)
    if options.quick:
        options = dataclasses.replace(
            options, budgets=(5, 10), in_table=(5, 10), num_points=16, num_samples=200
        )
    start, study, w = time.perf_counter(), Study(options), options.guidance_scale
    folders = [options.output_dir, *([options.image_dir] if options.image_dir else [])]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    solver_panels = {
        "VP path, w = 1": study.deterministic("vp", 1.0),
        "flow path, w = 1": study.deterministic("flow", 1.0),
        f"VP path, guidance w = {w:g}": study.deterministic("vp", w),
    }
    spacing_panels = {
        f"{path} path, {solver}": study.spacings(path, solver)
        for path in PATHS
        for solver in ("ddim", "dpmpp_2m")
    }
    stochastic_panels = {f"{path} path": study.stochastic(path) for path in PATHS}
    floor = moment_error(exact_samples(options.num_samples, options.seed))
    error, moments = "relative error of x_0", "error of mean and covariance"
    pictures = {
        "mixture-solvers": (solver_panels, error),
        "mixture-spacings": (spacing_panels, error),
        "mixture-stochastic": (stochastic_panels, moments),
    }
    for name, (panels, label) in pictures.items():
        curves.draw(
            [(title, label, found) for title, found in panels.items()],
            [folder / f"{name}.png" for folder in folders],
            "exact samples",
            dict.fromkeys(stochastic_panels, floor),
        )
    tables = [markdown(f"{t}: {error}", "solver", found, options) for t, found in solver_panels.items()]
    tables += [markdown(f"{t}: {error}", "spacing", found, options) for t, found in spacing_panels.items()]
    tables += [
        markdown(f"{t}: {moments}", "solver", found, options, floor) for t, found in stochastic_panels.items()
    ]
    write_atomically(options.output_dir / "mixture.md", "\n".join(tables).encode())
    figures = {**solver_panels, **spacing_panels, **stochastic_panels, "exact samples": floor}
    write_atomically(options.output_dir / "mixture.json", json.dumps(figures, indent=1).encode())
    minutes = (time.perf_counter() - start) / 60
    print(
        "\n".join(tables)
        + f"\n{minutes:.1f} minutes; pictures, mixture.md and mixture.json: {options.output_dir}"
    )


if __name__ == "__main__":
    run_script(main, Mixture)
