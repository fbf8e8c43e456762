"""Verifiers: functions of clean images [B, H, W, C] -> scores [B], more is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.arguments import array, checked, function
from jaxldm.errors import InvalidArgumentError
from jaxldm.functions import returned

A_VERIFIER = function("(images) -> scores")


@checked(logits=function("(images) -> logits"), labels=array("whole", "[B]", axes=1, filled=True))
def label_log_probability(logits: Callable[[Any], Any], labels: Int[Any, " B"]) -> Callable[[Any], Any]:
    """The verifier log p(label | image) of a classifier: images [B, H, W, C] -> [B].

    Args:
        logits: of a classifier, images [B, H, W, C] -> [B, K].
        labels: the class wanted of each image.

    >>> import jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> verifier = D.search.label_log_probability(lambda images: images.mean((1, 2)), jnp.array([0, 1]))
    >>> verifier(jnp.zeros((2, 4, 4, 10))).shape
    (2,)
    """
    labels = jnp.asarray(labels)

    def verifier(images):
        log_p = jax.nn.log_softmax(logits(images).astype(jnp.float32))
        return jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]

    return verifier


def check_verifier(verifier: Callable[[Any], Any], x: Float[Array, "B ..."], name: str = "verifier") -> None:
    """Raises `InvalidArgumentError` unless the verifier gives one floating-point number for each image.

    It is traced, not compiled.
    """
    try:
        scores = jax.eval_shape(verifier, jax.ShapeDtypeStruct(x.shape, x.dtype))
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
        raise InvalidArgumentError(
            f"{name} must be made of JAX operations, as it is compiled with the sampling loop: write "
            "jax.numpy for numpy, and jax.lax.cond for if"
        ) from error
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
