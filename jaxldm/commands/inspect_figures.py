"""The figures of `jaxldm inspect`, from arrays to PNG. Nothing here knows of models or runs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxldm.errors import MissingDependencyError

HEAT = "inferno"
DPI = 110
LINE = 22  # characters next to a row


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches. Raises `MissingDependencyError` without matplotlib."""
    try:
        from matplotlib.figure import Figure  # late: half a second
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "inspect", "the figures of the report") from error
    return Figure(figsize=(width, height), layout="constrained")


def png_of(figure: Any) -> bytes:
    """The content of a PNG file of a figure."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def as_picture(image: Float[np.ndarray, "H W C"]) -> Float[np.ndarray, "H W 3"]:
    """An image in [-1, 1] as RGB in [0, 1]."""
    picture = np.clip((np.asarray(image, np.float64) + 1) / 2, 0, 1)
    return np.broadcast_to(picture[..., :3], (*picture.shape[:2], 3))


def overlaid(picture: Any, heat: Float[np.ndarray, "h w"], most: float) -> Float[np.ndarray, "H W 3"]:
    """Heat from 0 to `most` in colour, laid over a picture in grey."""
    from matplotlib import colormaps

    height, width = picture.shape[:2]
    rows = np.arange(height) * heat.shape[0] // height
    columns = np.arange(width) * heat.shape[1] // width
    colour = colormaps[HEAT](np.clip(heat / (most or 1), 0, 1))[rows][:, columns, :3]
    grey = picture.mean(-1, keepdims=True)
    return 0.35 * grey + 0.65 * colour


def bare(axes: Any) -> None:
    """No ticks and no frame."""
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)


def in_lines(layer: str) -> str:
    """The name of a layer broken at its dots, so that it stands next to its row and not next to another."""
    lines = [""]
    for part in layer.split("."):
        if lines[-1] and len(lines[-1]) + len(part) >= LINE:
            lines.append("")
        lines[-1] += part + "."
    return "\n".join(lines)[:-1]


def attention_figure(
    image: Float[np.ndarray, "H W C"],
    maps: Mapping[str, Float[np.ndarray, "_ _ _"]],
    column_names: Sequence[str],
    query: Mapping[str, tuple[int, int]] | None = None,
) -> bytes:
    """A row for each layer: the image, then each map over it; a frame around the query's patch.

    Args:
        image: in [-1, 1].
        maps: `[columns, h, w]` by layer, on one scale from 0 to the largest value of the layer.
        column_names: of the longest row.
        query: (row, column) of the patch that looks, by layer.
    """
    from matplotlib.patches import Rectangle

    picture, columns = as_picture(image), max(len(of_layer) for of_layer in maps.values())
    # Small images are enlarged, so that a patch has sharp edges.
    zoom = max(1, 224 // picture.shape[0])
    picture = picture.repeat(zoom, 0).repeat(zoom, 1)
    figure = new_figure(1.35 * (columns + 1) + 0.9, 1.5 * len(maps) + 0.3)
    grid = figure.subplots(len(maps), columns + 1, squeeze=False)
    for row, (layer, of_layer) in zip(grid, maps.items(), strict=True):
        most = float(of_layer.max())
        row[0].imshow(picture)
        row[0].set_ylabel(in_lines(layer), fontsize=8)
        for place, axes in enumerate(row):
            bare(axes)
            if place > len(of_layer):
                axes.set_visible(False)
            elif place:
                axes.imshow(overlaid(picture, of_layer[place - 1], most))
            if query is not None and place <= len(of_layer):
                height, width = (
                    side / cells for side, cells in zip(picture.shape, of_layer.shape[1:], strict=False)
                )
                y, x = query[layer]
                corner = (x * width - 0.5, y * height - 0.5)
                axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#39c5ff", lw=1.6))
        heat = figure.colorbar(_scale(most), ax=list(row), fraction=0.03, pad=0.01, aspect=12)
        heat.ax.tick_params(labelsize=7)
    for axes, name in zip(grid[0], ["image", *column_names], strict=True):
        axes.set_title(name, fontsize=9)
    return png_of(figure)


def _scale(most: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0, most or 1), HEAT)


def histogram_figure(channels: Float[np.ndarray, "N C"], name: str) -> bytes:
    """The distribution of each channel, its mean and standard deviation, against N(0, 1)."""
    number = channels.shape[1]
    columns = min(number, 4)
    rows = -(-number // columns)
    figure = new_figure(max(3.1 * columns, 5), 2.5 * rows + 0.2)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    edge = max(4.0, float(np.quantile(np.abs(channels), 0.999)))
    line = np.linspace(-edge, edge, 300)
    for place, axes in enumerate(grid.flat):
        if place >= number:
            axes.set_visible(False)
            continue
        values = channels[:, place]
        axes.hist(values, 80, range=(-edge, edge), density=True, color="#4c78a8", label=name)
        axes.plot(line, np.exp(-(line**2) / 2) / np.sqrt(2 * np.pi), color="#d1495b", label="N(0, 1)")
        axes.set_title(f"channel {place}: mean {values.mean():.2f}, std {values.std():.2f}", fontsize=9)
        axes.set_xlabel("value", fontsize=8)
        axes.tick_params(labelsize=7)
    for row in grid:
        row[0].set_ylabel("density", fontsize=8)
    # One tall bar (the black of a picture) would hide all else.
    tallest = max(axes.get_ylim()[1] for axes in grid.flat if axes.get_visible())
    grid[0, 0].set_ylim(0, min(tallest, 1.6))
    grid[0, 0].legend(fontsize=8)
    return png_of(figure)


def curve_figure(steps: Sequence[int], curves: Mapping[str, Sequence[float]], floor: float | None) -> bytes:
    """Each distance against the step of its checkpoint; one panel each, with the floor in the first."""
    figure = new_figure(4.6 * len(curves) + 0.6, 3.4)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for place, (axes, (name, values)) in enumerate(zip(panels, curves.items(), strict=True)):
        axes.plot(steps, values, "o-", color="#4c78a8", label="generated images")
        for step, value in zip(steps, values, strict=True):
            axes.annotate(
                f"{value:.4g}",
                (step, value),
                xytext=(0, 7),
                textcoords="offset points",
                fontsize=8,
                ha="center",
            )
        lowest = floor if place == 0 else None
        if lowest is not None:
            axes.axhline(lowest, color="#d1495b", ls="--", label="floor: two sets of real images")
        axes.legend(fontsize=8)
        axes.set(xlabel="training step of the checkpoint", ylabel=name)
        axes.set_ylim(0, 1.2 * max(*values, lowest or 0))
        axes.set_xticks(list(steps) if len(steps) <= 8 else [steps[0], steps[len(steps) // 2], steps[-1]])
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
    return png_of(figure)


def scatter_figure(
    panels: Mapping[str, Float[np.ndarray, "_ 2"]],
    labels: Mapping[str, Int[np.ndarray, " _"]],
    class_names: Sequence[str],
) -> bytes:
    """Points in the plane coloured by class, a panel for each set, with one legend."""
    from matplotlib import colormaps

    shown = sorted({int(label) for of_panel in labels.values() for label in of_panel})
    palette = colormaps["tab10" if len(shown) <= 10 else "tab20"]
    colours = {label: palette(place % palette.N) for place, label in enumerate(shown)}
    figure = new_figure(4.1 * len(panels) + 1, 4.4)
    for axes, (name, points) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        size = 8 if len(points) > 500 else 16
        for label in shown:
            mine = points[labels[name] == label]
            axes.scatter(mine[:, 0], mine[:, 1], s=size, color=colours[label], linewidths=0, alpha=0.8)
        axes.set_title(name, fontsize=10)
        axes.set(xticks=[], yticks=[])
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker="o", ls="", color=colours[label], label=class_names[label])
        for label in shown[:20]
    ]
    figure.legend(handles=marks, loc="outside right center", title="class", fontsize=8)
    return png_of(figure)
