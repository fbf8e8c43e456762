"""SiT's interpolants by hand (lecture 43, exercise E10).

Question: what are the interpolants and their slopes at t = 0.5, is gamma = 0 flow matching, and is the VP
          interpolant DDPM?
Command:  python -m experiments.lecture43.e10_interpolants
Needs:    a CPU, seconds; no trained model. What came out: README.md in this folder.

Here t = 1 is noise and t = 0 data. SiT counts the other way; at t = 0.5 that is the same place.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.checks import Check, distance, show
from experiments.figures import save_figure
from jaxldm import diffusion as D
from jaxldm.commands.terminal import run_script

GAMMA = (0.001, 0.1)  # smin, smax of the lecture
HALF = np.float64(0.5)
MEAN, STD = 0.5, 0.4  # of the Gaussian data on which samplers are compared


@dataclasses.dataclass(frozen=True)
class Interpolants:
    """Check SiT's interpolants at t = 0.5, against flow matching and against DDPM."""

    output_dir: Path = Path("runs/lecture43/e10")
    """Where the picture is written."""
    num_samples: int = 20_000
    """Drawn by the SDE, to see that its marginals are right."""
    num_inference_steps: int = 250
    """Of the SDE."""


def by_hand() -> dict[str, tuple[float, float, float, float]]:
    """(alpha, sigma, alpha', sigma') at t = 0.5, from the formulas of Ma et al. 2024, table 1."""
    root = np.sqrt(0.5)
    integral, beta = 0.1 / 2 + 19.9 / 8, 0.1 + 19.9 / 2  # of beta(s) = 0.1 + 19.9 s from 0 to 0.5; beta(0.5)
    alpha, sigma = np.exp(-integral / 2), np.sqrt(1 - np.exp(-integral))
    return {
        "linear": (0.5, 0.5, -1.0, 1.0),
        "gvp": (root, root, -np.pi / 2 * root, np.pi / 2 * root),
        "vp": (alpha, sigma, -beta / 2 * alpha, beta / 2 * alpha**2 / sigma),
    }


def check_middle() -> list[Check]:
    """Values and slopes at t = 0.5, the slopes by hand and by central differences."""
    checks, h = [], 1e-5
    print("\n| interpolant | alpha | sigma | alpha' | sigma' |\n|---|---|---|---|---|")
    for name, expected in by_hand().items():
        path = D.Interpolant(name)
        found = (path.alpha(HALF), path.sigma(HALF), *path.derivatives(HALF))
        print(f"| {name}, t = 0.5 | " + " | ".join(f"{value:.6f}" for value in found) + " |")
        differences = [(of(HALF + h) - of(HALF - h)) / (2 * h) for of in (path.alpha, path.sigma)]
        checks += [
            Check(f"{name}: alpha, sigma and their slopes at 0.5, by hand", distance(found, expected), 1e-12),
            Check(f"{name}: the slopes, by central differences", distance(found[2:], differences), 1e-8),
        ]
    slope = (D.interpolant_gamma(HALF + h) - D.interpolant_gamma(HALF - h)) / (2 * h)
    return [
        *checks,
        Check("gamma(0.5) = 0.0505", abs(D.interpolant_gamma(HALF) - 0.0505), 1e-15),
        Check("gamma'(0.5) = 0", abs(slope), 1e-9),
    ]


def check_gamma() -> list[Check]:
    """With gamma > 0, x_t given x_0 is Gaussian with standard deviation sqrt(beta^2 + gamma^2)."""
    t = np.linspace(0.02, 0.98, 25)
    path = D.Interpolant("linear", gamma=GAMMA)
    gamma = GAMMA[0] + (GAMMA[1] - GAMMA[0]) * np.sqrt(t * (1 - t))
    rng, x_0 = np.random.default_rng(0), 0.7
    eps, z = rng.normal(size=(2, 400_000, 1))
    drawn = np.std((1 - t) * x_0 + t * eps + gamma * z, axis=0)
    return [
        Check("gamma > 0: sigma^2 = t^2 + gamma^2", distance(path.sigma(t), np.sqrt(t**2 + gamma**2)), 1e-12),
        Check("... the spread of 400 000 drawn x_t", np.abs(drawn / path.sigma(t) - 1).max(), 6e-3),
    ]


def check_flow() -> list[Check]:
    """gamma = 0 is flow matching: one path, one training target, one sampler."""
    ours, flow = D.Interpolant("linear", gamma=(0.0, 0.0)), D.Flow()
    t = np.linspace(0, 1, 101)
    shape = (16, 4, 4, 1)
    x_0, eps = jax.random.normal(jax.random.key(0), (2, *shape))
    at = jnp.linspace(0.1, 0.9, 16)
    slopes = [slope.reshape(-1, 1, 1, 1) for slope in ours.derivatives(at)]
    velocity = slopes[0] * x_0 + slopes[1] * eps
    samples = []
    for path in (ours, flow):
        grid = D.make_grid(path, 20)
        denoise = D.gaussian_denoiser(path, MEAN, STD)
        samples.append(D.sample(jax.random.key(1), denoise, D.solvers.ddim(), grid, eps))
    levels = [(path.alpha(t), path.sigma(t)) for path in (ours, flow)]
    target = D.flow(flow).target(x_0, eps, at)
    return [
        Check("gamma = 0: alpha and sigma of flow matching at 101 t", distance(*levels), 1e-12),
        Check("gamma = 0: alpha' x_0 + sigma' eps = eps - x_0", distance(velocity, target), 1e-12),
        Check("gamma = 0: the same samples in 20 steps", distance(*samples), 1e-12),
    ]


def check_ddpm() -> list[Check]:
    """The VP interpolant at t = (k + 1)/T against DDPM's product of T betas: the distance falls as 1/T."""
    path, gaps = D.Interpolant("vp"), {}
    for T in (100, 1000, 10_000):
        ddpm = D.VP(D.linear_betas(T, 0.1 / T, 20 / T))
        k = np.arange(T, dtype=np.float64)
        gaps[T] = np.abs(ddpm.alpha(k) - path.alpha((k + 1) / T)).max()
        print(f"VP interpolant against DDPM with T = {T:>6d}: largest difference of alpha {gaps[T]:.1e}")
    return [
        Check("VP: nearer to DDPM by T = 1000 / 100 (10 expected)", abs(gaps[100] / gaps[1000] - 10), 1.0),
        Check("VP: nearer to DDPM by T = 10 000 / 1000", abs(gaps[1000] / gaps[10_000] - 10), 1.0),
    ]


def check_score() -> list[Check]:
    """(alpha v - alpha' x) / (sigma (alpha' sigma - alpha sigma')) is the score, with gamma too."""
    checks = []
    for name in D.INTERPOLANTS:
        for gamma in (None, GAMMA):
            path = D.Interpolant(name, gamma=gamma)
            x, t = jnp.linspace(-2, 2, 9).reshape(-1, 1, 1, 1), jnp.linspace(0.1, 0.9, 9)
            alpha, sigma = (of(t).reshape(x.shape) for of in (path.alpha, path.sigma))
            slopes = [slope.reshape(x.shape) for slope in path.derivatives(t)]
            x_0 = D.gaussian_denoiser(path, MEAN, STD)(x, t)
            v = slopes[0] * x_0 + slopes[1] * (x - alpha * x_0) / sigma
            score = (alpha * v - slopes[0] * x) / (sigma * (slopes[0] * sigma - alpha * slopes[1]))
            exact = -(x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
            checks.append(
                Check(f"{name}, gamma {gamma or 0}: score from velocity", distance(score, exact), 1e-10)
            )
    return checks


def check_sde(options: Interpolants) -> list[Check]:
    """The SDE with the score, and a D(t) that is free, draws the data; so does the ODE."""
    checks = []
    for gamma in (None, GAMMA):
        path = D.Interpolant("linear", gamma=gamma)
        grid = D.make_grid(path, options.num_inference_steps)
        for name, norm in (("the ODE", 0.0), ("the SDE with D = sigma", 1.0)):
            solver = D.solvers.sit_sde(diffusion="sigma", norm=norm)
            x_T = D.initial_noise(jax.random.key(0), (options.num_samples, 1, 1, 1), grid)
            denoise = D.gaussian_denoiser(path, MEAN, STD)
            x = jax.jit(lambda x, d=denoise, s=solver, g=grid: D.sample(jax.random.key(1), d, s, g, x))(x_T)
            error = max(abs(float(x.mean()) - MEAN), abs(float(x.std()) / STD - 1))
            bound = 4 / np.sqrt(options.num_samples) + 2 / options.num_inference_steps
            checks.append(Check(f"gamma {gamma or 0}: mean and spread that {name} draws", error, bound))
    return checks


def plot(path: Path) -> None:
    """alpha, sigma and gamma of each interpolant, and gamma's slope, against t."""
    from matplotlib.figure import Figure

    t = np.linspace(0, 1, 1001)
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    *panels, last = figure.subplots(1, 4)
    for axes, name in zip(panels, D.INTERPOLANTS, strict=True):
        for label, gamma in (("gamma = 0", None), ("with gamma", GAMMA)):
            interpolant = D.Interpolant(name, gamma=gamma)
            style = "-" if gamma is None else "--"
            axes.plot(t, interpolant.sigma(t), f"C1{style}", label=f"sigma, {label}")
        axes.plot(t, interpolant.alpha(t), "C0", label="alpha")
        axes.set(title=name, xlabel="t (1 is noise)", ylabel="alpha, sigma")
    panels[0].legend(fontsize=7)
    inside = t[1:-1]
    last.plot(inside, (GAMMA[1] - GAMMA[0]) * (0.5 - inside) / np.sqrt(inside * (1 - inside)))
    last.set(title="slope of gamma: infinite at both ends", xlabel="t (1 is noise)", ylabel="gamma'(t)")
    save_figure(path, figure)


def main(options: Interpolants) -> None:
    with jax.enable_x64(True):
        show("Values and slopes at t = 0.5", check_middle())
        show("gamma", [*check_gamma(), *check_flow()])
        show("DDPM", check_ddpm())
        show("The score, and what is drawn with it", [*check_score(), *check_sde(options)])
    plot(options.output_dir / "interpolants.png")
    print(f"\nLook at {options.output_dir}/interpolants.png.")


if __name__ == "__main__":
    run_script(main, Interpolants)
