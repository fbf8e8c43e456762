"""Rotary position embedding: queries and keys rotated by angles proportional to their positions."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from jaxldm.arguments import array, check_dims, checked, count, flag, number, several
from jaxldm.errors import InvalidArgumentError


@checked(positions=array("real", "[N]", axes=1), dim=count(2), theta=number(above=0))
def rotary_embedding(
    positions: Real[np.ndarray, " N"], dim: int, theta: float
) -> tuple[Float[np.ndarray, "N half"], Float[np.ndarray, "N half"]]:
    """(cos, sin) of the angles p w_k, w_k = theta^(-2k/dim): float32 `[N, dim/2]` each, computed on the host.

    Su et al. 2021, "RoFormer", section 3.2.2. The angles are float64: in float32 they would be wrong by 1e-4
    at a thousand tokens.

    Args:
        positions: `[N]`, whole numbers or not.
        dim: width of the part of a head that is rotated; its pairs have one angle each.
        theta: the slowest pair rotates by almost 1/theta per token.

    Raises:
        InvalidArgumentError: an odd `dim`.
    """
    if dim % 2:
        raise InvalidArgumentError(f"rotary positions need an even width, got {dim}")
    frequencies = float(theta) ** (-np.arange(0, dim, 2) / dim)
    angles = np.asarray(positions, np.float64).reshape(-1, 1) * frequencies[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@checked(positions=array("real", "[N, axes]", axes=2), dims=several(count(2)), theta=number(above=0))
def rotary_embedding_of_axes(
    positions: Real[np.ndarray, "N axes"], dims: Sequence[int], theta: float
) -> tuple[Float[np.ndarray, "N half"], Float[np.ndarray, "N half"]]:
    """(cos, sin), float32 `[N, sum(dims)/2]`, for tokens with several coordinates, such as row and column.

    positions `[N, axes]`: the first dims[0] numbers of a head rotate with the first coordinate, and so on.

    >>> import numpy as np
    >>> rows, columns = np.indices((4, 6)).reshape(2, -1)
    >>> cos, sin = rotary_embedding_of_axes(np.stack([rows, columns], axis=1), (8, 8), theta=10000.0)
    >>> cos.shape
    (24, 8)
    """
    if len(dims) != positions.shape[1] or not dims:
        raise InvalidArgumentError(
            f"dims must have one width for each of {positions.shape[1]} axes, got {len(dims)}"
        )
    tables = [rotary_embedding(positions[:, axis], dim, theta) for axis, dim in enumerate(dims)]
    cos, sin = (np.concatenate(parts, axis=1) for parts in zip(*tables, strict=True))
    return cos, sin


@checked(
    x=array("floating", "[B, N, H, D]", axes=4),
    cos=array("real", "[N, D/2]", axes=(2, 3)),
    sin=array("real", "[N, D/2]", axes=(2, 3)),
    interleaved=flag,
)
def apply_rotary(
    x: Float[Array, "B N H D"],
    cos: Float[Array, "*B N D/2"],
    sin: Float[Array, "*B N D/2"],
    *,
    interleaved: bool = True,
) -> Float[Array, "B N H D"]:
    """Rotate each pair (a, b) of a head to (a cos - b sin, a sin + b cos), computed in float32.

    Su et al. 2021, eq. 34.

    Args:
        x: `[B, N, H, D]`, queries or keys.
        cos, sin: `[N, D/2]`, or `[B, N, D/2]` where positions differ within a batch.
        interleaved: pairs are neighbours (2k, 2k + 1), as in FLUX and Z-Image. False: (k, k + D/2), as in
            Llama and Qwen; the same function with the channels of a head in another order.
    """
    batch = "#B " if cos.ndim == 3 else ""
    check_dims(x=(x, "B N H D"), cos=(cos, f"{batch}N half"), sin=(sin, f"{batch}N half"))
    if x.shape[-1] != 2 * cos.shape[-1]:
        raise InvalidArgumentError(
            f"cos and sin must be half as wide as x, {x.shape[-1]}, got {cos.shape[-1]}"
        )
    x32 = x.astype(jnp.float32)
    cos, sin = (jnp.asarray(table, jnp.float32)[..., None, :] for table in (cos, sin))
    if cos.ndim == 3:
        cos, sin = cos[None], sin[None]
    if interleaved:
        pairs = x32.reshape(*x.shape[:-1], -1, 2)
        first, second, axis = pairs[..., 0], pairs[..., 1], -1
    else:
        pairs = x32.reshape(*x.shape[:-1], 2, -1)
        first, second, axis = pairs[..., 0, :], pairs[..., 1, :], -2
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=axis)
    return rotated.reshape(x.shape).astype(x.dtype)
