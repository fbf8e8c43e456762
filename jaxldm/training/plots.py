"""Curves of a training run, from its log."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxldm.errors import MissingDependencyError
from jaxldm.files import write_atomically
from jaxldm.training.log import read_log


def centred_mean(values: Float[np.ndarray, " N"], window: int) -> Float[np.ndarray, " N"]:
    """The mean of the values around each place, `window // 2` at each side, as many at both.

    Towards the ends the window narrows, so that the curve stays on the data where they fall steeply: a mean
    of the last values alone lags behind.
    """
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    places = np.arange(len(values))
    reach = np.minimum(window // 2, np.minimum(places, len(values) - 1 - places))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def plot_log(log_path: Path | str) -> None:
    """Draw `loss.png` and `grad_norm.png` next to a training log; do nothing without a log, or rows in it.

    Raises `StorageError` when the pictures cannot be written, `MissingDependencyError` without matplotlib.
    """
    log_path = Path(log_path)
    log = read_log(log_path) if log_path.is_file() else None
    if log is None or not len(log["step"]):
        return
    _plot_curve(log_path.with_name("loss.png"), log, "loss", "loss")
    _plot_curve(log_path.with_name("grad_norm.png"), log, "grad_norm", "gradient norm (before clipping)")


def plot_log_or_report(log_path: Path | str, report: Callable[[str], None]) -> None:
    """`plot_log` for a training that must not end because matplotlib is not installed: `report` says so."""
    try:
        plot_log(log_path)
    except MissingDependencyError as error:
        report(f"no curves next to {log_path}: {error}")


def _scale(axes: Any, values: Float[np.ndarray, " N"]) -> None:
    """A logarithmic axis for positive values, with plain decimals at its ticks: 0.9, not 9 x 10^-1."""
    if not len(values) or values.min() <= 0:
        return
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    plain = StrMethodFormatter("{x:g}")
    axes.yaxis.set_major_formatter(plain)
    within_a_decade = values.max() < 10 * values.min()  # else the powers of ten are enough
    axes.yaxis.set_minor_formatter(plain if within_a_decade else NullFormatter())


def _plot_curve(path: Path, log: dict[str, np.ndarray], column: str, label: str) -> None:
    try:
        from matplotlib.figure import Figure  # late: half a second, and a server may lack it
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "plots", "drawing the curves of a training run") from error

    steps, values = log["step"], log[column]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, linewidth=0.5, alpha=0.4, label="each step")
    window = max(1, min(100, len(values) // 20))
    if window > 1:
        # The last values have too few neighbours: their mean would only be noise.
        mean, end = centred_mean(values, window), len(values) - window // 4
        axes.plot(steps[:end], mean[:end], linewidth=1.5, label=f"mean of {window} steps")
        axes.legend()
    _scale(axes, values[np.isfinite(values)])
    axes.set(xlabel="step", ylabel=label, title=f"{path.parent.name}: {label}")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())
