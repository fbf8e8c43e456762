"""Class labels as a caller gives them: numbers or names, checked and repeated."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Array, Int

from jaxldm.arguments import as_array, refuse
from jaxldm.data import check_labels
from jaxldm.errors import InvalidArgumentError, UnknownNameError, shown
from jaxldm.pipelines.inputs import check_images_fit
from jaxldm.pipelines.pipeline import Pipeline

MOST_CLASSES_AT_ONCE = 100  # that are drawn, once each, for a call that names none


def cycle_labels(
    pipe: Pipeline, class_labels: Sequence[int | str] | Int[Array, " N"] | None, num_images: int | None
) -> Int[np.ndarray, " N"] | None:
    """The label of each image, int32 [N]: the labels given, repeated. None for a model without classes.

    Raises:
        DataError: a label that is no class of this model.
        UnknownNameError: a name that is none.
        InvalidArgumentError: labels for a model without classes, none at all, fewer than one image, or every
            class of a model with many.
    """
    if num_images is not None and num_images < 1:
        raise InvalidArgumentError(f"num_images must be 1 or more, not {num_images}")
    check_images_fit(num_images or 1, pipe.default_size, pipe.latent_spec)
    if class_labels is None and num_images is None and (pipe.num_classes or 0) > MOST_CLASSES_AT_ONCE:
        raise InvalidArgumentError(
            f"this model has {pipe.num_classes} classes: name those to draw (class labels, as 207 360), "
            "or how many images"
        )
    if pipe.num_classes is None:
        if class_labels is not None:
            raise InvalidArgumentError("this model has no classes: leave the class labels out")
        return None
    every = np.arange(pipe.num_classes) if class_labels is None else class_labels
    given = checked_labels(pipe, every, "class labels")
    return np.resize(given, len(given) if num_images is None else num_images)


def checked_labels(pipe: Pipeline, labels: Any, name: str) -> Int[np.ndarray, " K"]:
    """One label or several as int32 [K], all of them classes of this model."""
    given: Any = [labels] if isinstance(labels, str) else labels
    single = bool(np.isscalar(given))
    if not (single or isinstance(given, (list, tuple, range)) or hasattr(given, "dtype")):
        raise refuse(name, "numbers or names of classes", labels)
    if not single and any(isinstance(label, str) for label in given):
        given = label_numbers(given, pipe.class_names)
    given = np.atleast_1d(as_array(name, "numbers or names of classes", given))
    if given.size == 0:
        raise InvalidArgumentError(f"no {name} were given: leave the option out, or give one or more")
    return check_labels(given, len(given), cast(int, pipe.num_classes), name)


def label_numbers(labels: Sequence[int | str], class_names: Sequence[str]) -> list[int]:
    """The labels with each name replaced by the number of its class.

    Raises:
        UnknownNameError: a name that is none of `class_names`.
        InvalidArgumentError: a name where there are no `class_names`.
    """
    # "tench" names the class "tench, Tinca tinca", too.
    names = {
        one.strip(): label
        for label, several in enumerate(class_names)
        for one in (several, *several.split(","))
    }
    return [_label(label, names) if isinstance(label, str) else label for label in labels]


def _label(name: str, labels_by_name: dict[str, int]) -> int:
    if not labels_by_name:
        raise InvalidArgumentError(f"nobody named the classes of this model: give {shown(name)} as a number")
    if name not in labels_by_name:  # a thousand choices are no help
        raise UnknownNameError("class", name, difflib.get_close_matches(name, labels_by_name, 8, 0.0))
    return labels_by_name[name]
