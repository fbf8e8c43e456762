"""Token merging: attention over fewer tokens, those that are alike being one for as long as it takes.

Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion", arXiv:2303.17604. How many tokens are
merged is fixed by the ratio, so that all shapes are static; which ones is decided in every block, by what
they hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.arguments import array, check_dims, check_fields, checked, flag, instance, number, pair
from jaxldm.errors import InvalidArgumentError

MOST = 0.75  # of the tokens: one of each 2x2 stays in any case
A_RATIO = number(0, MOST)


@dataclasses.dataclass(frozen=True)
class TokenMerging:
    """Which tokens of an image are merged, and around what.

    Attributes:
        ratio: share of the tokens that is merged into others, 0 to 0.75; 0.5 leaves half of them.
        cross_attention: merge the queries of the attention to a text too; of U-Nets.
        mlp: merge before the feed-forward layers, too: they cost most of a transformer for few tokens.
    """

    most: ClassVar[float] = MOST
    ratio: float
    cross_attention: bool = False
    mlp: bool = False

    def __post_init__(self) -> None:
        check_fields(self, ratio=A_RATIO, cross_attention=flag, mlp=flag)


class Match(NamedTuple):
    """Where tokens go: N become n.

    Attributes:
        place: [B, N], for each token the number of the one that it becomes, below n.
        order: [B, N], the tokens again: the n that stay, in the order of their places, then those that go.
        kept: how many of them stay alone, the first ones.
        count: n.
    """

    place: Int[Array, "B N"]
    order: Int[Array, "B N"]
    kept: int
    count: int


@checked(x=array("floating", "[B, N, C]", axes=3), size=pair(1), ratio=A_RATIO)
def match_tokens(x: Float[Array, "B N C"], size: tuple[int, int], ratio: float) -> Match:
    """Bipartite soft matching: the upper left token of each 2x2 is a destination, all others are sources.

    The int(N ratio) sources that are most like their most similar destination, by the cosine of the angle
    between them, go there; no other token changes. Tokens beyond the last whole 2x2 are sources.

    Args:
        x: the tokens, row by row.
        size: (rows, columns), of which there are N.
        ratio: of the tokens, that are merged.

    Raises:
        InvalidArgumentError: a grid of other tokens than x has, or without a 2x2.

    >>> import jax.numpy as jnp
    >>> match_tokens(jnp.eye(4)[None], (2, 2), 0.5).count
    2
    """
    rows, columns = size
    if rows * columns != x.shape[1] or rows < 2 or columns < 2:
        raise InvalidArgumentError(
            f"size must be (rows, columns) of the {x.shape[1]} tokens, 2x2 or more, got {tuple(size)}"
        )
    is_destination = np.zeros((rows, columns), bool)
    is_destination[: rows // 2 * 2 : 2, : columns // 2 * 2 : 2] = True
    destinations, sources = (np.flatnonzero(flags) for flags in (is_destination, ~is_destination))
    merged = min(int(x.shape[1] * ratio), len(sources))
    kept = len(sources) - merged
    wide = x.astype(jnp.float32)
    unit = wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    similarity = jnp.einsum("bsc,bdc->bsd", unit[:, sources], unit[:, destinations], precision="highest")
    # The least similar sources first: those from `kept` on go.
    by_rank = jnp.argsort(jnp.max(similarity, axis=-1), axis=-1, stable=True)
    rank = jnp.argsort(by_rank, axis=-1, stable=True)
    goes = jnp.where(rank < kept, rank, kept + jnp.argmax(similarity, axis=-1)).astype(jnp.int32)
    place = jnp.zeros(x.shape[:2], jnp.int32)
    place = place.at[:, destinations].set(kept + jnp.arange(len(destinations), dtype=jnp.int32))
    stay = jnp.broadcast_to(jnp.asarray(destinations), (x.shape[0], len(destinations)))
    ranked = jnp.asarray(sources)[by_rank]
    order = jnp.concatenate([ranked[:, :kept], stay, ranked[:, kept:]], axis=1)
    return Match(place.at[:, sources].set(goes), order, kept, kept + len(destinations))


A_MATCH = instance(Match, "what nn.match_tokens(x, size, ratio) returns")
TOKENS = array("floating", "[B, N, C]", axes=3)


@checked(x=TOKENS, match=A_MATCH)
def merge_tokens(x: Float[Array, "B N C"], match: Match) -> Float[Array, "B n C"]:
    """The mean of the tokens that become one."""
    check_dims(x=(x, "B N C"), match=(match.place, "B N"))
    kept, number = match.kept, match.count
    ordered = jnp.take_along_axis(x, match.order[..., None], axis=1)
    alone, stay, go = ordered[:, :kept], ordered[:, kept:number], ordered[:, number:]
    # A product and no sum by index, whose order, and with it the rounding, is another in each run on a GPU.
    target = jnp.take_along_axis(match.place, match.order, axis=1)[:, number:]
    goes_to = target[:, None, :] == jnp.arange(kept, number)[None, :, None]
    options: dict[str, Any] = {"precision": "highest", "preferred_element_type": jnp.float32}
    sums = jnp.einsum("bdr,brc->bdc", goes_to.astype(x.dtype), go, **options) + stay.astype(jnp.float32)
    sizes = 1 + jnp.sum(goes_to.astype(jnp.float32), axis=-1, keepdims=True)
    return jnp.concatenate([alone, (sums / sizes).astype(x.dtype)], axis=1)


@checked(y=TOKENS, match=A_MATCH)
def unmerge_tokens(y: Float[Array, "B n C"], match: Match) -> Float[Array, "B N C"]:
    """Each token gets what became of the one that it went into."""
    if y.shape[:2] != (match.place.shape[0], match.count):
        raise InvalidArgumentError(
            f"y must be [{match.place.shape[0]}, {match.count}, C], as merge_tokens makes them, got "
            f"{list(y.shape)}"
        )
    return jnp.take_along_axis(y, match.place[..., None], axis=1)


def around(
    options: TokenMerging | None, x: Float[Array, "B N C"], size: tuple[int, int]
) -> Callable[..., Float[Array, "B N C"]]:
    """`call(layer, y, *inputs)`: layer(y, *inputs) on merged tokens, matched by x; without options on all.

    Args:
        options: None: nothing is merged.
        x: what a block is given.
        size: (rows, columns) of the tokens.
    """
    if options is None:
        return lambda layer, y, *inputs: layer(y, *inputs)
    if min(size) < 2:
        raise InvalidArgumentError(
            f"token_merging needs 2x2 tokens or more, and here are {size[0]}x{size[1]}: draw larger images, "
            "or leave it out"
        )
    match = match_tokens(x, size, options.ratio)

    def call(layer: Callable[..., Any], y: Float[Array, "B N C"], *inputs: Any) -> Float[Array, "B N C"]:
        return unmerge_tokens(layer(merge_tokens(y, match), *inputs), match)

    return call
