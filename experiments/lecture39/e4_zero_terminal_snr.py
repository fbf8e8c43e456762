"""Zero terminal SNR and the brightness of pictures (lecture 39, exercise E4).

Question: what does it cost that the last training step still shows a trace of the picture, and does the
          rescaling of the betas fix it?
Command:  python -m experiments.lecture39.e4_zero_terminal_snr
Needs:    a CPU, two minutes; no trained model. What came out: README.md in this folder.

Pictures of one brightness each, from black to white, with a little texture: their denoiser is known exactly,
so whatever is wrong with the samples is the path's fault, or that of where sampling starts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.checks import Check, show
from experiments.figures import figure_png, save_results
from jaxldm import diffusion as D
from jaxldm import metrics
from jaxldm.commands.terminal import run_script
from jaxldm.errors import InvalidArgumentError
from jaxldm.metrics.pictures import png_bytes

LEVELS = np.linspace(-0.95, 0.95, 20)
TEXTURE = 0.05  # the standard deviation of each pixel around the picture's brightness
TARGETS = {"all": LEVELS, "very dark": LEVELS[:5], "very bright": LEVELS[-5:]}


@dataclasses.dataclass(frozen=True)
class ZeroTerminalSNR:
    """Draw pictures of known brightness on the ordinary and on the rescaled path."""

    output_dir: Path = Path("runs/lecture39/e4")
    """Where the pictures are written."""
    sides: tuple[int, ...] = (8, 64)
    """Of the square pictures, in pixels (or latent pixels)."""
    num_images: int = 200
    """Drawn in each setting."""
    num_inference_steps: int = 50
    """DDIM steps, trailing."""


def check_betas() -> list[Check]:
    """abar at both ends before and after, the lecture's division, and what the rescaled path refuses."""
    betas = D.scaled_linear_betas()
    before, after = (np.cumprod(1 - b) for b in (betas, D.rescale_zero_terminal_snr(betas)))
    divided = before / before[-1]
    print("| scaled-linear betas of Stable Diffusion | first abar | last abar |\n|---|---|---|")
    rows = (("as published", before), ("rescaled", after), ("divided by the last", divided))
    for name, abar in rows:
        print(f"| {name} | {abar[0]:.6g} | {abar[-1]:.6g} |")
    refused = 1.0
    try:
        D.denoiser(lambda x, t: x, D.epsilon(D.VP(D.rescale_zero_terminal_snr(betas))))
    except InvalidArgumentError:
        refused = 0.0
    return [
        Check("rescaled: the last abar is 0", after[-1], 0.0),
        Check("... the first is kept", abs(after[0] - before[0]), 1e-15),
        Check(
            "... sqrt(abar) is shifted and scaled, nothing else", not_affine(before**0.5, after**0.5), 1e-12
        ),
        Check("epsilon prediction is refused on the rescaled path", refused, 0.0),
    ]


def not_affine(x: np.ndarray, y: np.ndarray) -> float:
    """How far y is from a straight line in x, through its two ends."""
    return float(np.abs(y - y[0] - (x - x[0]) * (y[-1] - y[0]) / (x[-1] - x[0])).max())


def draw(
    options: ZeroTerminalSNR, path: D.Path, side: int, levels: np.ndarray, true_start: bool
) -> np.ndarray:
    """Pictures [N, side, side, 1] by the exact denoiser, from N(0, I) or from the path's own noisy end."""
    shape = (options.num_images, side, side, 1)
    means = np.broadcast_to(levels.reshape(-1, 1, 1, 1), (len(levels), side, side, 1))
    denoise = D.gaussian_mixture_denoiser(path, np.ones(len(levels)), means, np.full(len(levels), TEXTURE))
    grid = D.make_grid(path, options.num_inference_steps)
    key = jax.random.key(0)
    noise = jax.random.normal(key, shape)
    if true_start:
        which = np.arange(options.num_images) % len(levels)
        texture = TEXTURE * np.random.default_rng(0).normal(size=shape)
        noise = grid.alpha[0] * jnp.asarray(means[which] + texture, jnp.float32) + grid.sigma[0] * noise
    return np.asarray(jax.jit(lambda x: D.sample(key, denoise, D.solvers.ddim(), grid, x))(noise))


def run(options: ZeroTerminalSNR) -> tuple[dict, dict]:
    """(brightness [N], a few pictures) for each side, target and way to draw."""
    betas = D.scaled_linear_betas()
    ordinary, rescaled = D.VP(betas), D.VP(D.rescale_zero_terminal_snr(betas))
    ways = {
        "ordinary": (ordinary, False),
        "ordinary, true start": (ordinary, True),
        "rescaled": (rescaled, False),
    }
    brightness, pictures = {}, {}
    for side in options.sides:
        for target, levels in TARGETS.items():
            for way, (path, true_start) in ways.items():
                images = draw(options, path, side, levels, true_start)
                brightness[side, target, way] = images.mean(axis=(1, 2, 3))
                pictures[side, target, way] = images[:10]
    return brightness, pictures


def table(brightness: dict) -> str:
    """Mean and spread of brightness, and those of the data, a row for each setting."""
    lines = ["| side | requested | drawn on | mean | std | darkest | brightest |", "|---" * 7 + "|"]
    for side, target in dict.fromkeys((side, target) for side, target, _ in brightness):
        levels = TARGETS[target]
        rows = {"(the data)": levels}
        rows |= {way: values for (s, g, way), values in brightness.items() if (s, g) == (side, target)}
        lines += [
            f"| {side} | {target} | {way} | {values.mean():+.2f} | {values.std():.2f} | "
            f"{values.min():+.2f} | {values.max():+.2f} |"
            for way, values in rows.items()
        ]
    return "\n".join(lines)


def check_brightness(options: ZeroTerminalSNR, brightness: dict) -> list[Check]:
    """Off the ordinary path, brightness has the spread of all data, and the mean of each target."""
    checks = []
    for (side, target, way), values in brightness.items():
        if way == "ordinary":
            continue
        levels, n = TARGETS[target], options.num_images
        statistic = np.std if target == "all" else np.mean
        # Some standard errors of so many draws, and what the steps leave.
        bound = 0.05 + 1 / np.sqrt(n) if target == "all" else 0.03 + 4 * levels.std() / np.sqrt(n)
        what = f"{side} x {side}, {target}, {way}: {statistic.__name__} of brightness"
        checks.append(Check(what, abs(statistic(values) - statistic(levels)), bound))
    return checks


def save_pictures(options: ZeroTerminalSNR, brightness: dict, pictures: dict) -> None:
    """Histograms of brightness, and ten pictures of each setting in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(options.sides), 3), layout="constrained")
    for axes, side in zip(
        figure.subplots(1, len(options.sides), squeeze=False)[0], options.sides, strict=True
    ):
        for way in ("ordinary", "rescaled"):
            axes.hist(brightness[side, "all", way], bins=40, range=(-1, 1), alpha=0.6, label=way)
        axes.set(
            title=f"{side} x {side} pixels", xlabel="brightness (data: even, -0.95 to 0.95)", ylabel="samples"
        )
    axes.legend()
    side = options.sides[-1]
    kinds = [(target, way) for target in TARGETS for way in ("ordinary", "rescaled")]
    grid = metrics.labelled_grid(
        np.clip(np.concatenate([pictures[side, *kind] for kind in kinds]), -1, 1),
        10,
        title=f"{side} x {side} pixels: requested brightness, and the betas they were drawn with",
        row_labels=[f"{target}, {way}" for target, way in kinds],
        scale=max(1, 32 // side),
    )
    contents = {"brightness.png": figure_png(figure), "pictures.png": png_bytes(grid)}
    save_results(options.output_dir, contents)


def main(options: ZeroTerminalSNR) -> None:
    show("The betas", check_betas())
    brightness, pictures = run(options)
    print("\n" + table(brightness))
    show("Brightness of samples against that of the data", check_brightness(options, brightness))
    save_pictures(options, brightness, pictures)
    print(f"\nLook at {options.output_dir}/brightness.png and pictures.png.")


if __name__ == "__main__":
    run_script(main, ZeroTerminalSNR)
