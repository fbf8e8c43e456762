"""The gradient of a 3x3 convolution by its kernel, on the processor: XLA's, as matrix products, and oneDNN's.

Question: training of convolutional networks is behind PyTorch on a processor; can this gradient be written so
          that it is not?
Command:  python -m experiments.benchmarks.kernel_gradient         (--quick: small sizes, to see that it runs)
Needs:    PyTorch (the `test` extra). Minutes and figures: README.md in this folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import Run, cores, installed, machine, measure_row
from experiments.figures import quick_options, save_results
from experiments.results import markdown
from jaxldm import host
from jaxldm.commands.terminal import run_script
from jaxldm.nn.convolution import DIMENSIONS

# Batch, height and width, channels, output channels: of the U-Nets and autoencoders of digits.
SIZES = ((64, 7, 64, 64), (64, 4, 128, 128), (64, 7, 128, 64), (32, 28, 32, 32), (32, 14, 64, 64))
QUICK = ((2, 4, 3, 5),)
Form = Callable[[jax.Array, jax.Array], jax.Array]  # (x [B, H, W, C], g [B, H, W, O]) -> [3, 3, C, O]


@dataclasses.dataclass(frozen=True)
class KernelGradient:
    """Time ways to compute the gradient by the kernel and write the table."""

    quick: bool = False
    """Small sizes and two rounds: only to see that everything runs."""
    rounds: int = 9
    """Turns of each variant in each row."""
    seconds: float = 0.2
    """How long a turn is, at least."""
    output_dir: Path = Path("runs/benchmarks")
    """Where kernel_gradient.md and kernel_gradient.json go."""


def of_xla(x, g):
    """What `jax.grad` makes of it."""

    def convolve(kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS)

    zeros = jnp.zeros((3, 3, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.vjp(convolve, zeros)[1](g)[0]


def large_kernel(x, g):
    """A plain convolution of the images, channels as the batch, by the gradient as a kernel of their size."""
    images, kernel = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    y = jax.lax.conv_general_dilated(images, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS)
    return y.transpose(1, 2, 0, 3)


def shifts(x):
    """The nine shifted images of each tap, [3, 3, B, H, W, C]."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [[padded[:, i : i + height, j : j + width] for j in range(3)] for i in range(3)]


def by_tap(x, g):
    """One product over batch and pixels for each tap."""
    flat = g.reshape(-1, g.shape[-1])
    return jnp.stack([jnp.stack([tap.reshape(len(flat), -1).T @ flat for tap in row]) for row in shifts(x)])


def side_by_side(parts: int) -> Form:
    """All taps of x side by side in one product, over `parts` parts of batch and pixels that are added."""

    def form(x, g):
        columns = jnp.concatenate([tap for row in shifts(x) for tap in row], -1)
        columns, flat = (a.reshape(parts, -1, a.shape[-1]) for a in (columns, g))
        product = jnp.einsum("pnc,pno->pco", columns, flat).sum(0)
        return product.reshape(3, 3, x.shape[-1], -1)

    return form


def taps_of_gradient(x, g):
    """The taps side by side on the other operand: of the gradient, shifted the other way."""
    taps = jnp.concatenate([tap for row in shifts(g)[::-1] for tap in row[::-1]], -1)
    product = x.reshape(-1, x.shape[-1]).T @ taps.reshape(-1, taps.shape[-1])
    return product.reshape(x.shape[-1], 3, 3, -1).transpose(1, 2, 0, 3)


FORMS: dict[str, Form] = {
    "XLA": of_xla,
    "large kernel": large_kernel,
    "by tap": by_tap,
    "side by side": side_by_side(1),
    "in 2 parts": side_by_side(2),
    "in 8 parts": side_by_side(8),
    "taps of the gradient": taps_of_gradient,
}


def of_torch(x: np.ndarray, g: np.ndarray) -> Run:
    """oneDNN's, through PyTorch, channels last."""
    import torch

    torch.set_num_threads(cores())
    x_, g_ = (torch.from_numpy(a.transpose(0, 3, 1, 2)).to(memory_format=torch.channels_last) for a in (x, g))
    size = (g.shape[-1], x.shape[-1], 3, 3)
    return lambda: torch.nn.grad.conv2d_weight(x_, size, g_, padding=1)


def variants(x: np.ndarray, g: np.ndarray) -> dict[str, Run]:
    """Each form, compiled, after a check that it computes the same; and PyTorch's where it is installed."""
    given = (jnp.asarray(x), jnp.asarray(g))
    expected = jax.jit(of_xla)(*given)
    runs: dict[str, Run] = {}
    for name, form in FORMS.items():
        compiled = jax.jit(form)
        np.testing.assert_allclose(compiled(*given), expected, rtol=1e-3, atol=1e-2, err_msg=name)
        runs[name] = lambda compiled=compiled: compiled(*given).block_until_ready()
    return runs | ({"oneDNN": of_torch(x, g)} if installed("torch") else {})


def main(options: KernelGradient) -> None:
    host.prepare()
    options = quick_options(options, rounds=2, seconds=0.0)
    rows, random = [], np.random.default_rng(0)
    for batch, height, channels, features in QUICK if options.quick else SIZES:
        x, g = (random.standard_normal((batch, height, height, c), np.float32) for c in (channels, features))
        title = f"{batch}x{height}x{height}, {channels} to {features}"
        rows.append(measure_row(title, variants(x, g), options.rounds, options.seconds))
        print(rows[-1]["row"], {k: round(v, 2) for k, v in rows[-1]["milliseconds"].items()}, flush=True)
    names = list(rows[0]["milliseconds"])
    body = [[row["row"], *(f"{row['milliseconds'][name]:.2f}" for name in names)] for row in rows]
    setting = machine("kernel_gradient", installed("torch"))
    text = markdown(["batch and pixels, channels", *(f"{name}, ms" for name in names)], body)
    print(text)
    contents = {
        "kernel_gradient.md": f"```\n{json.dumps(setting, indent=1)}\n```\n\n{text}",
        "kernel_gradient.json": json.dumps({**setting, "rows": rows}, indent=1) + "\n",
    }
    save_results(options.output_dir, contents)


if __name__ == "__main__":
    run_script(main, KernelGradient)
