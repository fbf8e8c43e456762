"""What the scripts of this folder share: the solvers, what they cost, tables and pictures."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import diffusion as D
from jaxldm.files import write_atomically

# `euler` and `dpmpp_1s` take the same step as `ddim`.
DETERMINISTIC = {
    "ddim": D.solvers.ddim(),
    "lms": D.solvers.lms(),
    "pndm": D.solvers.pndm(),
    "deis, order 2": D.solvers.deis(order=2),
    "deis, order 3": D.solvers.deis(order=3),
    "dpmpp_2s": D.solvers.dpmpp_2s(),
    "dpmpp_2m": D.solvers.dpmpp_2m(),
    "dpmpp_3m": D.solvers.dpmpp_3m(),
    "unipc, order 2": D.solvers.unipc(order=2),
    "unipc, order 3": D.solvers.unipc(order=3),
    "heun": D.solvers.heun(),
    "dpm2": D.solvers.dpm2(),
    "flow_euler": D.solvers.flow_euler(),
    "flow_heun": D.solvers.flow_heun(),
}
STOCHASTIC = {
    "ddpm": D.solvers.ddpm(),
    "ddim, eta 1": D.solvers.ddim(eta=1.0),
    "euler_ancestral": D.solvers.euler_ancestral(),
    "dpm2_ancestral": D.solvers.dpm2_ancestral(),
    "dpmpp_2m_sde": D.solvers.dpmpp_2m_sde(),
    "dpmpp_3m_sde": D.solvers.dpmpp_3m_sde(),
    "sit_sde": D.solvers.sit_sde(),
}


def evaluation_counter(solver: D.Solver, path: D.Path, max_steps: int) -> Callable[[int], int]:
    """Number of steps -> how often the run asks the denoiser: counted while it runs."""
    calls = []

    def function(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return 0.5 * x

    @jax.jit
    def run(grid):
        x = jnp.ones((1, 1), grid.sigma.dtype)
        return D.sample(jax.random.key(0), D.Denoiser(function, path), solver, grid, x)

    @functools.cache
    def count(steps):
        calls.clear()
        run(D.pad(D.make_grid(path, steps), max_steps)).block_until_ready()
        jax.effects_barrier()
        return len(calls)

    return count


def steps_within(solver: D.Solver, path: D.Path, budgets: Sequence[int]) -> list[tuple[int, int]]:
    """For each budget of evaluations the most (steps, evaluations) that it pays for."""
    count, pairs = evaluation_counter(solver, path, max(budgets)), []
    for budget in budgets:
        low, high = 1, budget  # one step is taken even where it costs more
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count(middle) <= budget else (low, middle - 1)
        pairs.append((low, count(low)))
    return pairs


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


Curves = dict[str, tuple[Sequence[float], Sequence[float]]]


def draw(
    panels: Sequence[tuple[str, str, Curves]], paths: Sequence[Path], floor: str, floors: dict[str, float]
) -> None:
    """Writes a figure of panels (title, label, curves by name); both axes are logarithmic.

    A name looks the same in every panel. `floors` gives the height of a dotted line, named `floor`, by title.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for _, _, found in panels for name in found))
    columns = len(panels) if len(panels) < 4 else (len(panels) + 1) // 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.9 * rows + 0.5), layout="constrained")
    lines = {}
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, label, found) in zip(every, panels, strict=False):
        for name, (evaluations, values) in found.items():
            k = names.index(name)
            style, colour = "os^vD"[k % 5] + ("-" if k < 10 else "--"), f"C{k % 10}"
            lines[name] = axes.plot(evaluations, values, style, markersize=4, linewidth=1.2, color=colour)[0]
        if title in floors:
            lines[floor] = axes.axhline(floors[title], color="grey", linestyle=":")
        axes.set(xscale="log", yscale="log", title=title, xlabel="network evaluations", ylabel=label)
        last = max(max(evaluations) for evaluations, _ in found.values())
        ticks = [tick for tick in (5, 10, 20, 50, 100, 200) if tick <= 1.1 * last]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=7, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    for path in paths:
        write_atomically(path, buffer.getvalue())


def relative_rms(x: Any, truth: Any) -> float:
    """Root mean square of x - truth, as a part of that of truth."""
    x, truth = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    return float(np.sqrt(np.mean((x - truth) ** 2) / np.mean(truth**2)))
