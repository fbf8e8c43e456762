"""Features of colour and shape, computed from pixels without any network, and ranks among real pictures."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, UInt8

CELLS = 8  # to a side: of the layout of colours, and of the directions of edges
DIRECTIONS = 8
LEVELS = 4  # of red, green and blue in the histogram

Blocks = dict[str, Float[np.ndarray, "N D"]]


def colour_layout(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
    """The mean colour of each cell of an 8x8 grid."""
    number, height, width, _ = images.shape
    cells = images.reshape(number, CELLS, height // CELLS, CELLS, width // CELLS, 3)
    return cells.mean((2, 4), dtype=np.float64).reshape(number, -1) / 255


def colour_histogram(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
    """The square roots of the shares of 64 colours, so that distances are Hellinger's."""
    number = len(images)
    level = images.astype(np.int64) * LEVELS // 256
    colour = (level[..., 0] * LEVELS + level[..., 1]) * LEVELS + level[..., 2]
    colour += LEVELS**3 * np.arange(number)[:, None, None]
    counts = np.bincount(colour.ravel(), minlength=number * LEVELS**3).reshape(number, -1)
    return np.sqrt(counts / counts.sum(1, keepdims=True))


def edge_directions(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
    """Histograms of the directions of edges in each cell, weighted by their strength.

    Source: Dalal and Triggs 2005, with unsigned directions and one norm for the whole picture.
    """
    grey = images.astype(np.float64).mean(-1) / 255
    down, right = np.gradient(grey, axis=(1, 2))
    strength, angle = np.hypot(down, right), np.mod(np.arctan2(down, right), np.pi)
    direction = np.minimum((angle * DIRECTIONS / np.pi).astype(np.int64), DIRECTIONS - 1)
    number, height, width = grey.shape
    found = np.zeros((number, CELLS, CELLS, DIRECTIONS))
    for k in range(DIRECTIONS):
        own = np.where(direction == k, strength, 0.0)
        found[..., k] = own.reshape(number, CELLS, height // CELLS, CELLS, width // CELLS).sum((2, 4))
    found = np.sqrt(found.reshape(number, -1))
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def colour_and_shape(images: UInt8[np.ndarray, "N H W 3"]) -> Blocks:
    """The three kinds of features of pictures."""
    return {
        "layout": colour_layout(images),
        "colours": colour_histogram(images),
        "edges": edge_directions(images),
    }


def ranks(drawn: Blocks, real: Blocks, own: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """The place, from 0, of the real picture `own[n]` among all real ones, by distance to the drawn one.

    Squared distances of each kind of features are divided by their mean between real pictures and added.
    Pictures that are as near as the own one do not push it back: some names share one picture.
    """
    total = np.zeros((len(own), len(next(iter(real.values())))))
    for name, features in real.items():
        between = _squared_distances(features, features)
        total += _squared_distances(drawn[name], features) / max(between.mean(), 1e-12)
    mine = total[np.arange(len(own)), own]
    return (total < mine[:, None] * (1 - 1e-9)).sum(1)


def _squared_distances(
    left: Float[np.ndarray, "N D"], right: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "N M"]:
    squares = (left**2).sum(1)[:, None] - 2 * left @ right.T + (right**2).sum(1)[None]
    return np.maximum(squares, 0)
