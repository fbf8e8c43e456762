"""A second judge of digits: a support vector machine, trained on other data than the run's classifier was.

It sees the validation digits, which no network has seen, and half of the training digits, each also shifted
by a pixel; the run's classifier, a convolutional network, saw all training digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxldm.data import Dataset

SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))


def second_judge(dataset: Dataset) -> Callable[[Any], Int[np.ndarray, " N"]]:
    """images [N, H, W, C] -> the class of each."""
    from sklearn.svm import SVC

    train, validation = dataset.arrays("train"), dataset.arrays("validation")
    images = np.concatenate([train[0][1::2], validation[0]])
    labels = np.concatenate([train[1][1::2], validation[1]])
    moved = np.concatenate([np.roll(images, shift, axis=(1, 2)) for shift in SHIFTS])
    machine = SVC(C=10.0, gamma="scale", cache_size=500).fit(flat(moved), np.tile(labels, len(SHIFTS)))
    return lambda images: machine.predict(flat(images))


def flat(images: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N D"]:
    """The pixels of each image in a row."""
    return np.asarray(images, np.float32).reshape(len(images), -1)
