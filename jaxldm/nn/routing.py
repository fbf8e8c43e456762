"""Routers of dynamic transformers: which parts are computed, by the time or for each token.

A gate is 1 or 0 in the forward pass and has the gradient of its sigmoid, the straight-through estimator
(Bengio et al. 2013): a part that is closed is computed in training all the same, so that it can open again.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxldm.nn.initialization import constant, normal, zeros
from jaxldm.nn.linear import Linear

ROUTING = "routing"  # the collection of what routers say of a call, for the loss
OPEN = 2.0  # the bias of a new router of times: everything is computed at first


def time_group(t: Num[Array, " B"], groups: int, max_time: float) -> Int[Array, " B"]:
    """In which of so many equal parts of [0, max_time] each t lies: part 0 has the least noise."""
    return jnp.clip(jnp.floor(jnp.float32(t) * (groups / max_time)), 0, groups - 1).astype(jnp.int32)


def group_times(groups: int, max_time: float) -> Float[Array, " groups"]:
    """The middle of each part."""
    return (jnp.arange(groups, dtype=jnp.float32) + 0.5) * (max_time / groups)


def open_gates(logits: Float[Array, "... gates"]) -> Bool[Array, "... gates"]:
    """Where the logit is above 0, and at the largest of the last axis, so that one is always open."""
    return (logits > 0) | (logits == jnp.max(logits, axis=-1, keepdims=True))


def straight_through(
    logits: Float[Array, "*axes"], is_open: Bool[Array, "*axes"] | None = None
) -> Float[Array, "*axes"]:
    """1 where a gate is open (by default `open_gates`), else 0: exactly, with the gradient of the sigmoid."""
    soft = jax.nn.sigmoid(logits)
    hard = (open_gates(logits) if is_open is None else is_open).astype(logits.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))


def pass_through(
    new: Float[Array, "B N C"], old: Float[Array, "B N C"], gate: Float[Array, "B #N 1"]
) -> Float[Array, "B N C"]:
    """new where a gate of `straight_through` is 1 and old where it is 0, exactly, with its gradient."""
    chosen = jnp.where(gate > 0.5, new, old)
    return chosen + (gate - jax.lax.stop_gradient(gate)).astype(new.dtype) * (new - old)


def top_tokens(scores: Float[Array, "B N"], number: int) -> Int[Array, "B k"]:
    """The `number` tokens of each example that have the highest scores, in their order."""
    return jnp.sort(jax.lax.top_k(scores, number)[1], axis=1)


def take_tokens(x: Float[Array, "B N C"], which: Int[Array, "B k"]) -> Float[Array, "B k C"]:
    """These tokens of each example."""
    return jnp.take_along_axis(x, which[..., None], axis=1)


def put_tokens(
    x: Float[Array, "B N C"], which: Int[Array, "B k"], tokens: Float[Array, "B k C"]
) -> Float[Array, "B N C"]:
    """x with these tokens of each example replaced."""
    return x.at[jnp.arange(x.shape[0])[:, None], which].set(tokens)


class TimeRouter(nn.Module):
    """Logits of gates from embeddings of times, `[G, C]` -> `[G, gates]`: one linear map, open at first."""

    gates: int

    @nn.compact
    def __call__(self, embedding: Float[Array, "G C"]) -> Float[Array, "G gates"]:
        options: dict[str, Any] = {"kernel_init": normal(0.02), "bias_init": constant(OPEN)}
        return Linear(self.gates, name="router", **options)(embedding.astype(jnp.float32))


class TokenRouter(nn.Module):
    """A logit for each token, `[B, N, C]` -> `[B, N]`: Linear to C / 16, at least 8, ReLU, Linear."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N"]:
        h = Linear(max(8, x.shape[-1] // 16), name="fc1")(x.astype(jnp.float32))
        return Linear(1, name="fc2", kernel_init=normal(0.02), bias_init=zeros)(nn.relu(h))[..., 0]
