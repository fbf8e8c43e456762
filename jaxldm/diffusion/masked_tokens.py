"""Masked tokens: images as token ids, some of them hidden (MaskGIT, Chang et al. 2022).

A mirror pair, as in diffusion: `masked_token_loss` trains a network to predict what is under the mask, and
`sample_tokens`, in `unmasking`, goes from all masked to none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real, ScalarLike

from jaxldm.arguments import (
    array,
    checked,
    count,
    function,
    is_tracer,
    number,
    one_key,
)
from jaxldm.diffusion.checks import check_condition
from jaxldm.diffusion.losses import drop_condition
from jaxldm.diffusion.sampling import Keys, image_keys
from jaxldm.errors import InvalidArgumentError, Table, one_of
from jaxldm.functions import returned
from jaxldm.indices import check_indices

# gamma(r): the part of the tokens that is masked when the part r of the way is done, from gamma(0) = 1 to
# gamma(1) = 0 (Chang et al. 2022, section 3.3); functions of (numpy or jax.numpy, r).
MASK_SCHEDULES: dict[str, Callable[[Any, Any], Any]] = Table("mask schedule")
MASK_SCHEDULES |= {
    "cosine": lambda xp, r: xp.cos(np.pi / 2 * r),
    "linear": lambda xp, r: 1 - r,
    "square": lambda xp, r: 1 - r**2,
    "cubic": lambda xp, r: 1 - r**3,
    "square_root": lambda xp, r: 1 - xp.sqrt(r),
    "arccos": lambda xp, r: xp.arccos(r) / (np.pi / 2),
}
_START = 2**32 - 1  # what an image's key folds in for the start: the number of no step

ANY_COUNT = count(-(2**31))
TOKENS = array("whole", "[B, N] or [B, H, W]", axes=(1, 64))


def A_TOKEN(name: str, value: Any) -> Any:
    """The id of a token; may be traced."""
    return value if is_tracer(value) else ANY_COUNT(name, value)


@checked(r=array("real"))
def mask_fraction(schedule: str, r: Real[Any, " *shape"] | float) -> Float[Any, " *shape"]:
    """gamma(r) in [0, 1], of r in [0, 1]: float64 on the host for NumPy, of r's type for JAX.

    "cosine" is MaskGIT's and aMUSEd's. It, "square" and "cubic" start slowly, with few tokens a step;
    "square_root" starts fast.

    Raises:
        UnknownNameError: another schedule.

    >>> float(mask_fraction("square", 0.5))
    0.75
    """
    gamma = MASK_SCHEDULES[one_of("mask schedule", schedule, MASK_SCHEDULES)]
    xp, r = (jnp, r) if isinstance(r, jax.Array) else (np, np.asarray(r, np.float64))
    return xp.clip(gamma(xp, r), 0, 1)


@checked(key=one_key, tokens=TOKENS, mask_token=A_TOKEN)
def mask_tokens(
    key: PRNGKeyArray, tokens: Int[Array, " *shape"], mask_token: int, schedule: str = "cosine"
) -> tuple[Int[Array, " *shape"], Bool[Array, " *shape"]]:
    """(tokens with some replaced by the mask token, where), gamma(r) N of them per example, r ~ U(0, 1).

    Each example draws its own r and masks ceil(gamma(r) N) of its N tokens, at least one, chosen uniformly
    (Chang et al. 2022, section 3.2).

    Args:
        tokens: ids, [B, N] or [B, H, W].
        mask_token: the id that stands for "unknown".
    """
    ratio_key, order_key = jax.random.split(key)
    batch, length = tokens.shape[0], tokens[0].size
    fraction = mask_fraction(schedule, jax.random.uniform(ratio_key, (batch,)))
    count = jnp.clip(jnp.ceil(fraction * length), 1, length).astype(jnp.int32)
    rank = rank_of(jax.random.uniform(order_key, (batch, length)))
    masked = (rank < count[:, None]).reshape(tokens.shape)
    return jnp.where(masked, jnp.asarray(mask_token, tokens.dtype), tokens), masked


@checked(tokens=TOKENS, share=array("real", axes=0), mask_token=A_TOKEN)
def mask_by_chance(
    key: Keys, tokens: Int[Array, " *shape"], share: ScalarLike, mask_token: int
) -> Int[Array, " *shape"]:
    """The tokens, each masked with probability `share`, whatever becomes of the others.

    How a run starts from an image: share = gamma(r) leaves about as many as a run has behind it at r
    (Patil et al. 2024, arXiv:2401.01808).

    Args:
        key: one key (image k uses fold_in(key, k)) or one per image [B].
        tokens: [B, N] or [B, H, W].
        share: in [0, 1]; may be traced.
        mask_token: the id that stands for "unknown".
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(image_keys(key, tokens.shape[0]), np.uint32(_START))
    drawn = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(keys)
    return jnp.where(drawn < share, jnp.asarray(mask_token, tokens.dtype), tokens)


@checked(
    key=one_key,
    network=function("(tokens, condition) -> logits"),
    tokens=TOKENS,
    mask_token=A_TOKEN,
    label_smoothing=number(0, below=1),
    condition_dropout=number(0, 1),
)
def masked_token_loss(
    key: PRNGKeyArray,
    network: Callable[[Any, Any], Any],
    tokens: Int[Array, "B ..."],
    condition: Any = None,
    *,
    mask_token: int,
    schedule: str = "cosine",
    label_smoothing: float = 0.1,
    null_condition: Any = None,
    condition_dropout: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean over the masked tokens of -sum_v q(v) log p(v), in float32 (Chang et al. 2022, equation 1).

    q is (1 - e) on the true token, and e / V on each of the V. Tokens that are seen cost nothing.

    Args:
        key: split into one key each for the mask and for condition dropout.
        network: (tokens [B, ...], condition) -> logits [B, ..., V], parameters closed over.
        tokens: true ids below V, [B, N] or [B, H, W].
        condition: an array [B, ...], a tree of them, or None.
        mask_token: the id that stands for "unknown"; usually V.
        schedule: the part that is masked, of a uniform number; see `mask_fraction`.
        label_smoothing: e in [0, 1); 0.1 in MaskGIT, 0 in aMUSEd.
        null_condition: what a dropped condition is replaced by.
        condition_dropout: probability, per example, that the condition is dropped.

    Returns:
        (loss, {"cross_entropy": without smoothing, "accuracy": of the likeliest token, both over masked
        tokens}).

    Raises:
        UnknownNameError: another schedule.
        InvalidArgumentError: an option or a token out of its range, dropout without a null condition.
    """
    check_condition(condition, tokens, x_name="tokens")
    mask_key, dropout_key = jax.random.split(key)
    if condition_dropout:
        condition = drop_condition(dropout_key, condition, null_condition, condition_dropout)
    seen, masked = mask_tokens(mask_key, tokens, mask_token, schedule)
    logits = network(seen, condition)
    check_logits(logits, tokens)
    check_indices("tokens", tokens, logits.shape[-1], where="the logits of the network")
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    entropy = -jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    smoothed = (1 - label_smoothing) * entropy - label_smoothing * jnp.mean(log_p, axis=-1)

    def mean(values):
        return jnp.sum(jnp.where(masked, values, 0)) / jnp.sum(masked.astype(jnp.float32))

    correct = (jnp.argmax(log_p, axis=-1).astype(tokens.dtype) == tokens).astype(jnp.float32)
    return mean(smoothed), {"cross_entropy": mean(entropy), "accuracy": mean(correct)}


def check_logits(logits: Any, tokens: Any) -> None:
    """Raises `InvalidArgumentError` unless there is a row of logits for each token."""
    shape = np.shape(returned("the network", logits))
    if shape[:-1] != tokens.shape or len(shape) != tokens.ndim + 1:
        raise InvalidArgumentError(f"the network must give logits {[*tokens.shape, 'V']}, got {list(shape)}")


def rank_of(values: Float[Array, "B N"]) -> Int[Array, "B N"]:
    """The place of each value in its sorted row, 0 for the lowest; equal values keep their order."""
    order = jnp.argsort(values, axis=1, stable=True)
    return jnp.argsort(order, axis=1, stable=True).astype(jnp.int32)
