"""Batches of a recipe that is trained on other data than its own, where these are fewer than a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from jaxldm.data import Dataset
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.recipes import Recipe
from jaxldm.training.runs import STAGES


def training_images(recipe: Recipe, dataset: Dataset) -> int:
    """How many images of a data set a recipe trains on."""
    there = len(dataset.rows("train"))
    return min(there, recipe.max_train_images or there)


def fitting_size(num_images: int, unit: int = 1) -> int:
    """The largest `unit` * 2^n that is at most the number of images; `unit` where there is none.

    >>> fitting_size(48), fitting_size(48, 3), fitting_size(2, 4)
    (32, 48, 4)
    """
    size = unit
    while 2 * size <= num_images:
        size *= 2
    return size


def with_fitting_batches(
    recipe: Recipe,
    dataset: Dataset,
    shares: int,
    keep: Collection[str] = (),
    log: Callable[[str], None] = print,
) -> Recipe:
    """The recipe with smaller batches in the stages whose batch is more than the training images.

    Students stay as they are: their methods say what a batch has to be.

    Args:
        recipe: as it was made for other data.
        dataset: that it is trained on.
        shares: devices over which a batch is split.
        keep: stages whose batch size stays.
        log: is given one line where a batch size changes.
    """
    num_images, changes = training_images(recipe, dataset), {}
    for stage in STAGES:
        own = getattr(recipe, stage)
        if own is None or stage in keep or getattr(own, "few_steps", None) is not None:
            continue
        size = fitting_size(num_images, shares * own.accumulate)
        if own.batch_size > num_images >= size:
            changes[stage] = dataclasses.replace(own, batch_size=size)
    if changes:
        said = (
            f"{stage} {own.batch_size} in place of {getattr(recipe, stage).batch_size}"
            for stage, own in changes.items()
        )
        log(f"there are {num_images} training images, so batches are smaller: {', '.join(said)}")
    return dataclasses.replace(recipe, **changes)


def check_batches(recipe: Recipe, dataset: Dataset, stage: str, batch_size: int) -> None:
    """Refuse a batch of a stage that is more than the training images.

    Raises:
        InvalidArgumentError: it is; the line says how many images were held out, and what to give.
    """
    num_images = training_images(recipe, dataset)
    if batch_size <= num_images:
        return
    held = sum(len(dataset.rows(split)) for split in dataset.splits if split != "train")
    rest = f", {held} more being held out" if held else ""
    fix = f"batch_size={fitting_size(num_images)}"
    if stage == recipe.generator:
        fix = f"--batch-size {fitting_size(num_images)} ({fix})"
    raise InvalidArgumentError(
        f"{stage}: batch_size {batch_size} is more than the {num_images} training images{rest}: give at most "
        f"{num_images}, as in {fix}"
    )
