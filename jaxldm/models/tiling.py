"""Autoencoding of large images in bounded memory: overlapping tiles, one by one, with blended seams."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.arguments import check_fields, count, number, optional
from jaxldm.errors import InvalidArgumentError
from jaxldm.exact import as_typed, floor_product
from jaxldm.models.config import ModelConfig, check, height_width


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Encode and decode in square tiles; the result differs slightly from the whole, most near the seams.

    Group normalisation and attention run on a tile instead of the image, and so does the memory. Images no
    larger than a tile are not split.

    Example: `decode_latents(module, params, latents, tiling=Tiling(512))`.

    Attributes:
        size: side of a tile, in pixels; None: the autoencoder's `sample_size`.
        overlap: fraction of a tile's side that the next one overlaps, in [0, 0.5]; blended linearly.

    Raises:
        InvalidArgumentError: an overlap outside its range.
    """

    size: int | None = None
    overlap: float = 0.25

    def __post_init__(self):
        check_fields(self, size=optional(count(1)), overlap=number(0, 0.5))


def sliced(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """`function` of a batch, computed one example at a time: same values, memory of one example."""

    def one(example: Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[0], function(example[None]))

    return lambda batch: jax.lax.map(one, batch)


def tiled_encoder(encode: Callable[[Array], Any], config: ModelConfig, tiling: Tiling) -> Callable:
    """`encode` in tiles. Raises `InvalidArgumentError` for sides that are not a multiple of the factor."""
    factor, side, stride = _lengths(config, tiling)

    def encode_tiled(images: Float[Array, "B H W C"]) -> Any:
        for name, length in zip(("height", "width"), images.shape[1:3], strict=True):
            if length % factor and max(images.shape[1:3]) > side * factor:
                near = max(factor, round(length / factor) * factor)
                raise InvalidArgumentError(
                    f"with tiling the {name} must be a multiple of {factor}, got {length}; nearest is {near}"
                )
        return _tiled(encode, images, side * factor, stride * factor, side, stride)

    return encode_tiled


def tiled_decoder(decode: Callable[[Array], Any], config: ModelConfig, tiling: Tiling) -> Callable:
    """`decode` in tiles of latents."""
    factor, side, stride = _lengths(config, tiling)
    return lambda latents: _tiled(decode, latents, side, stride, side * factor, stride * factor)


def _lengths(config: Any, tiling: Tiling) -> tuple[int, int, int]:
    """(pixels per latent, latents per tile side, latents from one tile to the next)."""
    factor = getattr(config, "shrinks", None) or 2 ** (len(config.block_out_channels) - 1)
    pixels = height_width(config.sample_size)[0] if tiling.size is None else tiling.size
    stride = floor_product(pixels // factor, 1 - as_typed(tiling.overlap))
    check(
        pixels % factor == 0 and stride > 0,
        f"tiles of {pixels} pixels: the side must be a multiple of {factor}, and larger than the overlap",
    )
    return factor, pixels // factor, stride


def _tiled(
    function: Callable, x: Float[Array, "B H W C"], side: int, stride: int, out_side: int, out_stride: int
) -> Any:
    """`function` of tiles of `x`, `side` wide and `stride` apart, joined `out_stride` apart."""
    height, width = x.shape[1:3]
    if height <= side and width <= side:
        return function(x)
    corners = [[(i, j) for j in range(0, width, stride)] for i in range(0, height, stride)]
    outputs = _map_tiles(function, x, side, [corner for row in corners for corner in row])
    trees = [outputs[corner] for row in corners for corner in row]
    join = functools.partial(_joined, columns=len(corners[0]), blend=out_side - out_stride, keep=out_stride)
    return jax.tree.map(lambda *leaves: join(leaves), *trees)


def _map_tiles(function: Callable, x: Array, side: int, corners: list[tuple[int, int]]) -> dict:
    """The output of the tile at each corner. Tiles of one shape are compiled once and run in turn."""
    by_shape: dict[tuple, list] = {}
    for i, j in corners:
        tile = x[:, i : i + side, j : j + side]
        by_shape.setdefault(tile.shape, []).append(((i, j), tile))
    outputs = {}
    for tiles in by_shape.values():
        results = jax.lax.map(function, jnp.stack([tile for _, tile in tiles]))
        for n, (corner, _) in enumerate(tiles):
            outputs[corner] = jax.tree.map(lambda leaf, n=n: leaf[n], results)
    return outputs


def _joined(tiles: tuple[Array, ...], columns: int, blend: int, keep: int) -> Array:
    """One image of the outputs, row by row: each blended with its upper, then with its left neighbour."""
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
    """The first rows (or columns) of `after` fade in over the last ones of `before`."""
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
