"""A second classifier of digits: a support vector machine on directions of strokes, of digits of its own.

It is trained on the validation and the test digits, each also shifted by a pixel; the run's classifier, a
convolutional network, saw the training digits alone, which say how good it is. It sees histograms of
gradient directions in squares of 4 and of 7 pixels (after Dalal and Triggs 2005), not pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxldm.data import Dataset

TRAINED_ON = "directions of strokes in validation and test digits"
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
SQUARES = (4, 7)
DIRECTIONS = 8


def second_judge(dataset: Dataset) -> Callable[[Any], Int[np.ndarray, " N"]]:
    """images [N, 28, 28, 1] -> the class of each."""
    from sklearn.svm import SVC

    parts = [dataset.arrays(split) for split in ("validation", "test")]
    images, labels = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    moved = np.concatenate([np.roll(images, shift, axis=(1, 2)) for shift in SHIFTS])
    machine = SVC(C=10.0, gamma="scale", cache_size=500).fit(strokes(moved), np.tile(labels, len(SHIFTS)))
    return lambda images: machine.predict(strokes(images))


def known(judge: Callable[[Any], Int[np.ndarray, " N"]], dataset: Dataset) -> float:
    """The share of the real training digits, which a classifier never saw, that it classifies correctly."""
    images, labels = dataset.arrays("train")
    return float(np.mean(judge(images) == labels))


def strokes(images: Float[np.ndarray, "N H W 1"]) -> Float[np.ndarray, "N D"]:
    """How much each square of an image goes in each of eight directions, of length 1, square roots of it."""
    grey = np.asarray(images, np.float32)[..., 0]
    down, right = np.gradient(grey, axis=(1, 2))
    length = np.hypot(right, down)
    place = (np.arctan2(down, right) / (2 * np.pi) % 1) * DIRECTIONS
    before, share = np.floor(place).astype(int) % DIRECTIONS, place - np.floor(place)
    after = (before + 1) % DIRECTIONS
    parts = [
        length * np.where(before == k, 1 - share, np.where(after == k, share, 0)) for k in range(DIRECTIONS)
    ]
    by_direction, found = np.stack(parts, axis=-1), []
    for side in SQUARES:
        rows, columns = (size // side for size in grey.shape[1:])
        cut = by_direction[:, : rows * side, : columns * side]
        sums = (
            cut.reshape(len(grey), rows, side, columns, side, DIRECTIONS).sum((2, 4)).reshape(len(grey), -1)
        )
        found.append(np.sqrt(sums / (np.linalg.norm(sums, axis=1, keepdims=True) + 1e-6)))
    return np.concatenate(found, axis=1)
