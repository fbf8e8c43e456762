"""The third branch of guidance: the same network, made weak, in some of the steps. See `weak_guidance`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxldm import diffusion as D


class Weak(NamedTuple):
    """What the sampling loop takes, as data: s, and t of the first and behind the last step of its use."""

    scale: Float[Any, ""]
    t_from: Float[Any, ""]
    t_until: Float[Any, ""]


def weak_of(value: Any, grid: D.Grid) -> Weak:
    """The settings on the rows of a run."""
    steps = int(D.steps_in(grid))
    first = 0 if value.start == 0 else math.floor(value.start * steps) + 1
    last = math.ceil(value.stop * steps) - 1
    return Weak(np.float32(value.scale), *bounds_of(grid, first, last))


def bounds_of(grid: D.Grid, first: int, last: int) -> tuple[Float[Any, ""], Float[Any, ""]]:
    """(t_from, t_until) of the steps `first` to `last`; bounds lie half-way between two rows.

    Where `last` is before `first` no t lies between them.
    """
    if first > last:
        return np.float32(-np.inf), np.float32(np.inf)
    t = np.asarray(grid.t, np.float64)
    t_from = np.inf if first == 0 else (t[first - 1] + t[first]) / 2
    return np.float32(t_from), np.float32((t[last] + t[last + 1]) / 2)


def away_from_weak(
    mixed: Float[Array, "B ..."], cond: Float[Array, "B ..."], weak: Callable[[], Any], settings: Weak, t: Any
) -> Float[Array, "B ..."]:
    """mixed + s (cond - weak()), the weak network called in the steps of its use alone."""
    t = jnp.broadcast_to(t, cond.shape[:1])
    used = jnp.all((t <= settings.t_from) & (t >= settings.t_until))

    def guided(mixed: Any) -> Any:
        away = (cond - weak().astype(cond.dtype)).astype(mixed.dtype)
        return mixed + jnp.asarray(settings.scale, mixed.dtype) * away

    return jax.lax.cond(used, guided, lambda mixed: mixed, mixed)
