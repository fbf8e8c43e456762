"""Classifier-free guidance as noise, as score and as probability (lecture 39, exercise E7).

Question: are the three views of guidance one? And does guidance draw from p(x)^(1-w) p(x|c)^w, as the third
          one seems to say?
Command:  python -m experiments.lecture39.e7_guidance_three_views
Needs:    a CPU, seconds; no trained model. What came out: README.md in this folder.

Data with two classes, each a mixture of Gaussians, so that noise, score and density are known exactly at
every t. Then guided samples of one class, compared with the density that the third view names.
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

# Two modes for each class, on a line; the classes overlap.
CENTRES = np.array([[-1.0, 0.6], [0.0, 1.2]])
STDS = np.full((2, 2), 0.3)
PATHS = {
    "DDPM": lambda: D.VP(D.linear_betas()),
    "flow": D.Flow,
    "EDM": D.EDM,
}


@dataclasses.dataclass(frozen=True)
class ThreeViews:
    """Check that guidance is the same as noise, score and probability, and see what it draws."""

    output_dir: Path = Path("runs/lecture39/e7")
    """Where the picture is written."""
    paths: tuple[str, ...] = ("DDPM", "flow", "EDM")
    """On which the views are compared; samples are drawn on DDPM's."""
    guidance_scales: tuple[float, ...] = (0.0, 1.0, 3.0, 7.5)
    """w: 0 is unconditional, 1 conditional."""
    num_samples: int = 20_000
    """Drawn at each scale."""
    num_inference_steps: int = 100
    """Of DPM-Solver++ 2M."""


def mixture(label: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights [K], means [K, 1, 1, 1], stds [K]) of one class, or of all data for None."""
    rows = slice(None) if label is None else slice(label, label + 1)
    means, stds = CENTRES[rows].reshape(-1, 1, 1, 1), STDS[rows].reshape(-1)
    return np.full(len(stds), 1 / len(stds)), means, stds


def exact_network(path, prediction):
    """(x, t, label) -> what a perfect network would predict; the label 2 is the null class."""
    denoisers = [D.gaussian_mixture_denoiser(path, *mixture(label)) for label in (0, 1, None)]

    def network(x, t, labels):
        x_0 = jnp.stack([denoise(x, t) for denoise in denoisers])[labels, jnp.arange(x.shape[0])]
        return D.from_x0(prediction, x_0, x, t)

    return network


def log_densities(path, x, t, label):
    """log p_t(x), log p_t(x | c) and, by Bayes' rule, log p_t(c | x) with two classes as likely, each [B]."""
    everything, *classes = [
        D.gaussian_mixture_log_density(path, *mixture(which), x, t) for which in (None, 0, 1)
    ]
    return everything, classes[label], classes[label] + jnp.log(0.5) - everything


def views(path, x, t, w, label: int):
    """(eps_w as guided noise, three guided scores, x_0 by each prediction), each [B, 1, 1, 1]."""
    labels = jnp.full(len(t), label)
    # The noise level is never pure noise here, so that epsilon has a meaning on the flow path too.
    predictions = {name: D.prediction(name, path) for name in ("sample", "v_prediction", "flow")}
    predictions["epsilon"] = D.linear_prediction("epsilon", path, lambda t: (0, 1))

    def guided(prediction):
        network = exact_network(path, prediction)
        return D.classifier_free_guidance(network, labels, 2, w)(x, t)

    def gradient(log_density):
        return jax.grad(lambda x: jnp.sum(log_density(*log_densities(path, x, t, label))))(x)

    outputs = {name: guided(prediction) for name, prediction in predictions.items()}
    scores = (
        D.guide(
            gradient(lambda everything, of_class, posterior: everything),
            gradient(lambda everything, of_class, posterior: of_class),
            w,
        ),
        gradient(lambda everything, of_class, posterior: (1 - w) * everything + w * of_class),
        gradient(lambda everything, of_class, posterior: everything + w * posterior),
    )
    x_0 = {name: predictions[name].to_x0(output, x, t) for name, output in outputs.items()}
    return outputs["epsilon"], scores, x_0


def check_views(name: str, scales: tuple[float, ...]) -> list[Check]:
    """The three views against each other on one path, for one class, at all x and t at once."""
    path, checks = PATHS[name](), []
    levels = np.repeat([0.1, 0.5, 1.0, 3.0, 10.0], 41)  # sigma / alpha
    t = jnp.asarray(path.time(levels))
    alpha, sigma = (of(t).reshape(-1, 1, 1, 1) for of in (path.alpha, path.sigma))
    x = alpha * jnp.tile(jnp.linspace(-3, 3, 41), 5).reshape(-1, 1, 1, 1) * jnp.sqrt(1 + (sigma / alpha) ** 2)
    of_scale = jax.jit(lambda w: views(path, x, t, w, label=1))
    for w in scales:
        noise_view, (score_view, powers, bayes), x_0 = of_scale(w)
        others = [x_0[prediction] for prediction in ("sample", "v_prediction", "flow")]
        of = f"{name:>4s}, w = {w:<4g}"
        checks += [
            Check(
                f"{of} score: (1-w) s_u + w s_c = -eps_w / sigma",
                distance(-noise_view / sigma, score_view),
                1e-9,
            ),
            Check(f"{of} probability: = grad log p^(1-w) p(x|c)^w", distance(powers, score_view), 1e-9),
            Check(f"{of} ... = grad [log p(x) + w log p(c|x)]", distance(bayes, score_view), 1e-9),
            Check(
                f"{of} guiding x_0, v or flow instead of eps gives the same x_0",
                max(distance(other, x_0["epsilon"]) for other in others),
                1e-9,
            ),
        ]
    return checks


def draw(options: ThreeViews, w: float) -> np.ndarray:
    """Samples of class 1 under guidance w, exact but for the steps, [N]."""
    path = PATHS["DDPM"]()
    grid = D.make_grid(path, options.num_inference_steps)
    labels = jnp.ones(options.num_samples, jnp.int32)

    @jax.jit
    def run(key):
        predict = D.classifier_free_guidance(exact_network(path, D.epsilon(path)), labels, 2, w)
        x_T = D.initial_noise(key, (options.num_samples, 1, 1, 1), grid)
        return D.sample(key, D.denoiser(predict, D.epsilon(path)), D.solvers.dpmpp_2m(), grid, x_T)

    return np.asarray(run(jax.random.key(0))).reshape(-1)


def powered_density(w: float, x: np.ndarray) -> np.ndarray:
    """p(x)^(1-w) p(x|1)^w of the clean data, with area 1, on an even grid x."""
    clean = D.Flow()
    everything, of_class, _ = log_densities(clean, jnp.asarray(x).reshape(-1, 1, 1, 1), clean.t_clean, 1)
    log_density = np.asarray((1 - w) * everything + w * of_class, np.float64)
    density = np.exp(log_density - log_density.max())
    return density / (density.sum() * (x[1] - x[0]))


def compare(options: ThreeViews) -> None:
    """Mean and standard deviation of guided samples and of the powered density; and a picture."""
    from matplotlib.figure import Figure

    x = np.linspace(-3, 6, 3001)
    figure = Figure(figsize=(3 * len(options.guidance_scales), 3.4), layout="constrained")
    panels = figure.subplots(1, len(options.guidance_scales), squeeze=False)[0]
    print("\n| class 1 | samples: mean | std | p^(1-w) p(x|c)^w: mean | std |\n|---|---|---|---|---|")
    for axes, w in zip(panels, options.guidance_scales, strict=True):
        samples, density = draw(options, w), powered_density(w, x)
        mean = np.sum(x * density) * (x[1] - x[0])
        std = np.sqrt(np.sum((x - mean) ** 2 * density) * (x[1] - x[0]))
        print(f"| w = {w:g} | {samples.mean():.3f} | {samples.std():.3f} | {mean:.3f} | {std:.3f} |")
        axes.hist(samples, bins=120, range=(-3, 4), density=True, color="silver", label="guided samples")
        axes.plot(x, density, label="powered density")
        axes.set(title=f"w = {w:g}", xlim=(-2.5, 3.5), yticks=[], xlabel="x")
    panels[0].legend(fontsize=7)
    panels[0].set_ylabel("density")
    figure.suptitle("Class 1: what guided sampling draws, and the density p(x)^(1-w) p(x|c)^w")
    save_figure(options.output_dir / "three-views.png", figure)
    print(f"\nLook at {options.output_dir}/three-views.png.")


def main(options: ThreeViews) -> None:
    with jax.enable_x64(True):
        checks = [check for name in options.paths for check in check_views(name, options.guidance_scales)]
        show("Noise, score and probability at every noise level (relative errors, float64)", checks)
    compare(options)


if __name__ == "__main__":
    run_script(main, ThreeViews)
