"""Figures of the real images of a split, which are read block by block: no split is whole in memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxldm.data.batches import Rows, RowsView, map_batches
from jaxldm.data.dataset import Dataset
from jaxldm.data.images import check_labels
from jaxldm.errors import DataError
from jaxldm.metrics.scores import nearest_neighbour_distances, sum_of_distances

AT_ONCE = 256  # images that are classified together
MAX_BYTES = 2**28  # of a block of images as float64, as distances are computed
MAX_COMPARED = 8192  # images of a split that others are compared with at once

Progress = Callable[[float], None]  # takes how many images more are done


class Answers(NamedTuple):
    """What a classifier says of images, and what they are: a row for each."""

    features: Float[np.ndarray, "N D"]
    logits: Float[np.ndarray, "N K"]
    labels: Int[np.ndarray, " N"]

    def of(self, chosen: Any) -> "Answers":
        """Those of some images."""
        return Answers(*(column[chosen] for column in self))


def classified(
    classify: Callable[[Any], tuple[Any, Any]],
    dataset: Dataset,
    split: str,
    most: int | None = None,
    progress: Progress = lambda number: None,
) -> Answers:
    """The answers for the first `most` images of a split (None: all), which are read batch by batch.

    Raises:
        DataError: no images, or a label that is none of the classes.
    """
    rows = dataset.rows(split)
    number = len(rows) if most is None else min(len(rows), most)
    if not number:
        raise DataError(f"{dataset.name} has no images in the split {split}")
    view = RowsView(rows, number, {"image": "image", "label": "label"})
    left = iter(range(number, 0, -AT_ONCE))

    def answers(columns: Any) -> tuple[Any, ...]:
        found = (*classify(columns["image"]), columns["label"])
        progress(min(next(left), AT_ONCE))  # the last batch is filled up
        return found

    features, logits, labels = map_batches(answers, view, AT_ONCE, column=None)
    name = f"the labels of {dataset.name} {split}"
    return Answers(features, logits, check_labels(labels, number, dataset.num_classes, name))


def blocks(
    rows: Rows, numbers: Int[np.ndarray, " N"], shape: Sequence[int], most: int | None = None
) -> Iterator[Any]:
    """The images `numbers` of rows, of this shape, in blocks of `most` or fewer."""
    length = max(1, MAX_BYTES // (8 * int(np.prod(shape))))
    length = length if most is None else min(length, most)
    for start in range(0, len(numbers), length):
        yield rows.take(numbers[start : start + length])["image"]


def nearest_in_split(
    images: Float[np.ndarray, "N H W C"],
    dataset: Dataset,
    split: str,
    progress: Progress = lambda number: None,
) -> Any:
    """The distance [N] of each image to the nearest of a split."""
    rows, nearest = dataset.rows(split), np.full(len(images), np.inf)
    for reference in blocks(rows, np.arange(len(rows)), dataset.image_shape, MAX_COMPARED):
        nearest = np.minimum(nearest, nearest_neighbour_distances(images, reference).distance)
        progress(len(reference))
    return nearest


def nearest_of_split(
    dataset: Dataset, split: str, numbers: Int[np.ndarray, " N"], other: str, progress: Progress
) -> Any:
    """The distance [N] of the images `numbers` of a split to the nearest of another one.

    `progress` is given the images of the other one, as if it were read once.
    """
    nearest = []
    for images in blocks(dataset.rows(split), numbers, dataset.image_shape):
        share = len(images) / len(numbers)
        report = lambda number, share=share: progress(number * share)  # noqa: E731
        nearest.append(nearest_in_split(images, dataset, other, report))
    return np.concatenate(nearest)


def pixel_diversities(
    dataset: Dataset, split: str, numbers: Int[np.ndarray, " N"], labels: Int[np.ndarray, " N"]
) -> dict[int, float]:
    """What `class_diversities` is of the images `numbers` of a split, whose labels these are."""
    found = {}
    for label in np.unique(labels):
        members = numbers[labels == label]
        if len(members) >= 2:
            total = _sum_of_distances(dataset, split, members)
            found[int(label)] = float(total / (len(members) * (len(members) - 1)))
    return found


def _sum_of_distances(dataset: Dataset, split: str, numbers: Int[np.ndarray, " N"]) -> float:
    """The distances of all pairs of images, added up, each pair in both orders."""
    rows, shape, total, done = dataset.rows(split), dataset.image_shape, 0.0, 0
    for first in blocks(rows, numbers, shape):
        done += len(first)
        total += sum_of_distances(first)
        for second in blocks(rows, numbers[done:], shape):
            total += 2 * sum_of_distances(first, second)
    return total
