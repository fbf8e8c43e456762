"""A second judge of digits: a support vector machine, trained on digits that the run's classifier never saw.

These are the validation and the test digits, each also turned by ten degrees and shifted by a pixel; the
classifier, a convolutional network, saw the training digits alone, which say how good the judge is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxldm.data import Dataset

TRAINED_ON = "validation and test digits"
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
DEGREES = (0, -10, 10)


def second_judge(dataset: Dataset) -> Callable[[Any], Int[np.ndarray, " N"]]:
    """images [N, H, W, C] -> the class of each."""
    from scipy.ndimage import rotate
    from sklearn.svm import SVC

    parts = [dataset.arrays(split) for split in ("validation", "test")]
    images, labels = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    turned = [rotate(images, angle, (1, 2), reshape=False, order=1, mode="nearest") for angle in DEGREES]
    moved = [np.roll(some, shift, axis=(1, 2)) for some in turned for shift in SHIFTS]
    machine = SVC(C=10.0, gamma="scale", cache_size=500).fit(
        flat(np.concatenate(moved)), np.tile(labels, len(moved))
    )
    return lambda images: machine.predict(flat(images))


def known(judge: Callable[[Any], Int[np.ndarray, " N"]], dataset: Dataset) -> float:
    """The share of the real training digits, which a judge never saw, that it reads as what they are."""
    images, labels = dataset.arrays("train")
    return float(np.mean(judge(images) == labels))


def flat(images: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N D"]:
    """The pixels of each image in a row."""
    return np.asarray(images, np.float32).reshape(len(images), -1)
