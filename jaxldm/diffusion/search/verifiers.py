"""Verifiers: functions of clean images [B, H, W, C] -> scores [B], more is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.arguments import array, checked, function
from jaxldm.errors import InvalidArgumentError, JaxldmError
from jaxldm.functions import returned
from jaxldm.indices import check_indices

A_VERIFIER = function("(images) -> scores")


@checked(logits=function("(images) -> logits"), labels=array("whole", "[B]", axes=1, filled=True))
def label_log_probability(logits: Callable[[Any], Any], labels: Int[Any, " B"]) -> Callable[[Any], Any]:
    """The verifier log p(label | image) of a classifier: images [B, H, W, C] -> [B].

    Args:
        logits: of a classifier, images [B, H, W, C] -> [B, K].
        labels: the class wanted of each image.

    Raises:
        InvalidArgumentError: when it is called, logits of another shape, or a label that is none of the
            classes.

    >>> import jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> verifier = D.search.label_log_probability(lambda images: images.mean((1, 2)), jnp.array([0, 1]))
    >>> verifier(jnp.zeros((2, 4, 4, 10))).shape
    (2,)
    """

    def verifier(images):
        scores = returned("logits", logits(images))
        if scores.ndim != 2 or scores.shape[0] != len(labels) or len(labels) != len(images):
            raise InvalidArgumentError(
                f"logits must return [{len(labels)}, classes], a row for each of {len(labels)} labels, got "
                f"{list(scores.shape)} for images {list(images.shape)}"
            )
        check_indices("labels", labels, scores.shape[1], where="the classes of logits")
        log_p = jax.nn.log_softmax(scores.astype(jnp.float32))
        return jnp.take_along_axis(log_p, jnp.asarray(labels)[:, None], axis=1)[:, 0]

    return verifier


def check_verifier(verifier: Callable[[Any], Any], x: Float[Array, "B ..."], name: str = "verifier") -> None:
    """Raises `InvalidArgumentError` unless the verifier gives one floating-point number for each image.

    It is traced, not compiled. What it raises itself is raised as it is, with a note about what it was given.
    """
    try:
        scores = jax.eval_shape(verifier, jax.ShapeDtypeStruct(x.shape, x.dtype))
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
        raise InvalidArgumentError(
            f"{name} must be made of JAX operations, as it is compiled with the sampling loop: write "
            "jax.numpy for numpy, and jax.lax.cond for if"
        ) from error
    except JaxldmError:
        raise
    except Exception as error:
        error.add_note(
            f"This came from {name}(images), which was traced with images {x.dtype}{list(x.shape)}: it must "
            "be made of JAX operations, as it is compiled with the sampling loop."
        )
        raise
    returned(name, scores)
    if scores.shape != x.shape[:1] or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise InvalidArgumentError(
            f"{name} must return one floating-point number for each image, float32{list(x.shape[:1])} for "
            f"images {list(x.shape)}, got {scores.dtype}{list(scores.shape)}"
        )


def check_scores(scores: Float[Array, "N B"], name: str = "verifier") -> None:
    """Raises `InvalidArgumentError` where all scores of an image are NaN; single ones only lose."""
    bad = np.flatnonzero(np.isnan(np.asarray(scores)).all(axis=0))
    if bad.size:
        raise InvalidArgumentError(
            f"{name} gave NaN for every candidate of image {bad[0]}: nothing can be chosen by it"
        )
