"""Large images through an autoencoder in bounded memory: overlapping squares, one by one, seams blended."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.config import ModelConfig, check, height_width


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Encode and decode in squares; the result differs slightly from the whole, most near the seams.

    Group normalisation and the attention in the middle see one square instead of the image. Memory is that
    of one square. Images no larger than a square go through whole.

    size: side of a square, in pixels; None takes the `sample_size` that the autoencoder was trained with.
    overlap: part of a square's side that the next one covers too, in [0, 0.5]; blended linearly.

    Example: `decode_latents(module, params, latents, tiling=Tiling(512))`.

    Raises:
      InvalidArgumentError: an overlap outside its range.
    """

    size: int | None = None
    overlap: float = 0.25

    def __post_init__(self):
        check(0 <= self.overlap <= 0.5, f"the overlap of tiles is in [0, 0.5], {self.overlap} was given")


def sliced(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """`function` of a batch, computed one example at a time: the memory of one, the same numbers."""

    def one(example: Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[0], function(example[None]))

    return lambda batch: jax.lax.map(one, batch)


def tiled_encoder(encode: Callable[[Array], Any], config: ModelConfig, tiling: Tiling) -> Callable:
    """`encode` in squares of pixels. Raises `InvalidArgumentError` for sides that make no whole latents."""
    factor, side, stride = _lengths(config, tiling)

    def encode_tiled(images: Float[Array, "B H W C"]) -> Any:
        for name, length in zip(("height", "width"), images.shape[1:3], strict=True):
            if length % factor and max(images.shape[1:3]) > side * factor:
                near = max(factor, round(length / factor) * factor)
                raise InvalidArgumentError(
                    f"tiles need sides that {factor} divides: {name} {length} was given, {near} is nearest"
                )
        return _tiled(encode, images, side * factor, stride * factor, side, stride)

    return encode_tiled


def tiled_decoder(decode: Callable[[Array], Any], config: ModelConfig, tiling: Tiling) -> Callable:
    """`decode` in squares of latents."""
    factor, side, stride = _lengths(config, tiling)
    return lambda latents: _tiled(decode, latents, side, stride, side * factor, stride * factor)


def _lengths(config: ModelConfig, tiling: Tiling) -> tuple[int, int, int]:
    """Pixels in a latent; latents in a square and from one square to the next."""
    factor = 2 ** (len(config.block_out_channels) - 1)
    pixels = height_width(config.sample_size)[0] if tiling.size is None else tiling.size
    stride = int(pixels // factor * (1 - tiling.overlap))
    check(
        pixels % factor == 0 and stride > 0,
        f"tiles of {pixels} pixels: {factor} must divide the side and leave latents beside the overlap",
    )
    return factor, pixels // factor, stride


def _tiled(
    function: Callable, x: Float[Array, "B H W C"], side: int, stride: int, out_side: int, out_stride: int
) -> Any:
    """`function` of squares of `x`, `side` wide and `stride` apart, put together `out_stride` apart."""
    height, width = x.shape[1:3]
    if height <= side and width <= side:
        return function(x)
    places = [[(i, j) for j in range(0, width, stride)] for i in range(0, height, stride)]
    outputs = _through(function, x, side, [place for row in places for place in row])
    trees = [outputs[place] for row in places for place in row]
    join = functools.partial(_joined, columns=len(places[0]), blend=out_side - out_stride, keep=out_stride)
    return jax.tree.map(lambda *leaves: join(leaves), *trees)


def _through(function: Callable, x: Array, side: int, places: list[tuple[int, int]]) -> dict:
    """The output of the square at each place. Squares of one shape are compiled once and run in turn."""
    by_shape: dict[tuple, list] = {}
    for i, j in places:
        square = x[:, i : i + side, j : j + side]
        by_shape.setdefault(square.shape, []).append(((i, j), square))
    outputs = {}
    for squares in by_shape.values():
        results = jax.lax.map(function, jnp.stack([square for _, square in squares]))
        for n, (place, _) in enumerate(squares):
            outputs[place] = jax.tree.map(lambda leaf, n=n: leaf[n], results)
    return outputs


def _joined(tiles: tuple[Array, ...], columns: int, blend: int, keep: int) -> Array:
    """One image of the outputs, row by row: each blended into its upper, then into its left neighbour."""
    rows: list[list[Array]] = []
    for start in range(0, len(tiles), columns):
        row: list[Array] = []
        for j, tile in enumerate(tiles[start : start + columns]):
            if rows:
                tile = _blended(rows[-1][j], tile, blend, axis=1)
            if row:
                tile = _blended(row[-1], tile, blend, axis=2)
            row.append(tile)
        rows.append(row)
    cropped = [jnp.concatenate([tile[:, :keep, :keep] for tile in row], axis=2) for row in rows]
    return jnp.concatenate(cropped, axis=1)


def _blended(before: Array, after: Array, extent: int, axis: int) -> Array:
    """The first rows (or columns) of `after` fade in over the last ones of `before`, which show the same."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if extent == 0:
        return after
    shape = [1, 1, 1, 1]
    shape[axis] = extent
    ramp = (jnp.arange(extent, dtype=jnp.float32) / extent).astype(after.dtype).reshape(shape)
    last = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    first = jax.lax.slice_in_dim(after, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(after, extent, None, axis=axis)
    return jnp.concatenate([last * (1 - ramp) + first * ramp, rest], axis=axis)
