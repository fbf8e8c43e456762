"""Pictures of a training run: curves from its log, grids of images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxldm.checkpoints.storage import write_atomically
from jaxldm.training.log import read_log


def moving_average(values: Float[np.ndarray, " N"], window: int) -> Float[np.ndarray, " N"]:
    """The mean of the last `window` values at each place, of all there are at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_log(log_path: Path | str) -> None:
    """Draws `loss.png` and `grad_norm.png` beside a training log; does nothing while the log has no rows.

    Raises `StorageError` when the pictures cannot be written.
    """
    log_path = Path(log_path)
    log = read_log(log_path)
    if not len(log["step"]):
        return
    _plot_curve(log_path.with_name("loss.png"), log, "loss", "loss")
    _plot_curve(log_path.with_name("grad_norm.png"), log, "grad_norm", "gradient norm (before clipping)")


def _plot_curve(path: Path, log: dict[str, np.ndarray], column: str, label: str) -> None:
    from matplotlib.figure import Figure  # late: half a second, and a server may lack it

    steps, values = log["step"], log[column]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, linewidth=0.5, alpha=0.4, label="each step")
    window = max(1, min(100, len(values) // 20))
    if window > 1:
        axes.plot(steps, moving_average(values, window), linewidth=1.5, label=f"mean of {window} steps")
        axes.legend()
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=label, title=f"{path.parent.name}: {label}")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())


def tile_images(images: Float[np.ndarray, "N H W C"], columns: int, gap: int = 2) -> np.ndarray:
    """Images in [-1, 1] side by side, `columns` in a row, white between them: uint8 `[h, w, C]`.

    Values outside [-1, 1] are clipped, NaN becomes black.
    """
    images = np.nan_to_num(np.asarray(images, np.float32), nan=-1.0)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for k, image in enumerate(images):
        top, left = gap + (k // columns) * (height + gap), gap + (k % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = np.round((np.clip(image, -1, 1) + 1) * 127.5)
    return sheet


def save_grid(path: Path | str, images: Float[np.ndarray, "N H W C"], columns: int, scale: int = 3) -> None:
    """Writes images in [-1, 1] (1 or 3 channels) as one PNG, pixels `scale` wide. Raises `StorageError`."""
    from PIL import Image

    sheet = tile_images(images, columns)
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    picture = Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet[..., :3])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
