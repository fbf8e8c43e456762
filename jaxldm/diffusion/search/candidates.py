"""What the searches share: candidates as an axis [N, B, ...], their keys and noise, and the best of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxldm.arguments import a_key, array, checked, count
from jaxldm.diffusion.compiling import compile_once, traced
from jaxldm.diffusion.grids import A_GRID, Grid
from jaxldm.diffusion.sampling import Keys, a_shape, image_keys, initial_noise
from jaxldm.diffusion.search.verifiers import check_scores
from jaxldm.errors import InvalidArgumentError

# Folded into the key of an image; no step of a run reaches these numbers.
_CANDIDATES, _ROUNDS = 2**32 - 3, 2**32 - 4

_ANY_CANDIDATES = array("real", "[N, B, H, W, C]", axes=(2, 64), filled=True)
IMAGES = array("real", "[B, ...]", axes=(1, 64), filled=True)


def with_candidates(name: str, value: Any) -> Any:
    """Noise [N, B, H, W, C], or [N, B, ...] of what are no images; a batch of images is refused."""
    given = _ANY_CANDIDATES(name, value)
    if len(given.shape) == 4:
        raise InvalidArgumentError(
            f"{name} must be [N, B, H, W, C], got {list(given.shape)} without the axis of candidates: write "
            "D.search.candidate_noise(key, shape, grid, num_candidates=8)"
        )
    return given


class Found(NamedTuple):
    """What a search among N candidates found.

    Attributes:
        x_0: [B, H, W, C], the best candidate of each image.
        score: [B], its score.
        candidates: [N, B, H, W, C], all at the end.
        scores: [N, B].
    """

    x_0: Float[Array, "B ..."]
    score: Float[Array, " B"]
    candidates: Float[Array, "N B ..."]
    scores: Float[Array, "N B"]


class FoundNoise(NamedTuple):
    """What a search for the initial noise found: `D.sample` with the same arguments draws x_0 from x_T.

    Attributes:
        x_0: [B, H, W, C].
        score: [B].
        x_T: [B, H, W, C], the noise that x_0 comes from.
        history: [rounds + 1, B], the score in each round, from that of the first noise on.
    """

    x_0: Float[Array, "B ..."]
    score: Float[Array, " B"]
    x_T: Float[Array, "B ..."]
    history: Float[Array, "rounds B"]


@checked(key=a_key, num_candidates=count(1), batch_size=count(1))
def candidate_keys(key: Keys, num_candidates: int, batch_size: int) -> Key[Array, "N B"]:
    """One key for each candidate of each image; candidate 0 has the key of the image itself.

    A candidate depends on the key of its image and on its number alone: 8 candidates are the first 8 of 16.

    Args:
        key: one key, or one per image [B].
        num_candidates: N.
        batch_size: B.
    """
    a_shape("num_candidates and batch_size", (num_candidates, batch_size, 2))  # whose numbers fit in memory
    keys = image_keys(key, batch_size)
    own, numbers = fold_in(keys, _CANDIDATES), jnp.arange(1, num_candidates, dtype=jnp.uint32)
    return jnp.concatenate([keys[None], jax.vmap(fold_in, (None, 0))(own, numbers)])


@checked(shape=a_shape, grid=A_GRID, num_candidates=count(1))
def candidate_noise(
    key: Keys, shape: tuple[int, ...], grid: Grid, num_candidates: int
) -> Float[Array, "N B ..."]:
    """Where N runs for each of B images start: [N, B, H, W, C]. Candidate 0 is that of `D.initial_noise`.

    Args:
        key: one key, or one per image [B].
        shape: of the images, [B, H, W, C].
        grid: its first row sets the scale.
        num_candidates: N, at least 1.

    >>> import jax
    >>> from jaxldm import diffusion as D
    >>> grid = D.make_grid(D.Flow(), 4)
    >>> D.search.candidate_noise(jax.random.key(0), (2, 8, 8, 1), grid, num_candidates=3).shape
    (3, 2, 8, 8, 1)
    """
    a_shape("num_candidates and shape", (num_candidates, *shape))
    keys = candidate_keys(key, num_candidates, shape[0])
    return jax.vmap(lambda keys: initial_noise(keys, shape, grid))(keys)


def fold_in(keys: Key[Array, " *shape"], number: Any) -> Key[Array, " *shape"]:
    """The number folded into each of the keys."""
    number = jnp.asarray(number, jnp.uint32) if not isinstance(number, int) else np.uint32(number)
    fold = jax.random.fold_in
    for _ in range(keys.ndim):
        fold = jax.vmap(fold, (0, None))
    return fold(keys, number)


def round_keys(keys: Key[Array, " *shape"], j: Int[Any, ""] | int) -> Key[Array, " *shape"]:
    """Other keys for round j of a search."""
    return fold_in(fold_in(keys, _ROUNDS), j)


def run(search: Callable[..., Any], *arguments: Any) -> Any:
    """search(*arguments) as one program, compiled once for arguments of these shapes."""
    if traced(arguments):
        return search(*arguments)
    return compile_once(search, *arguments)(*arguments)


def seen(found: Any, scores: Any, name: str = "verifier") -> Any:
    """`found`, after its scores were looked at, where they can be seen."""
    if not traced(scores):
        check_scores(scores, name)
    return found


def rank(scores: Float[Array, "N B"], chosen: int) -> Int[Array, "M B"]:
    """The numbers of the best candidates of each image, best first; NaN is last."""
    return jax.lax.top_k(jnp.where(jnp.isnan(scores), -jnp.inf, scores).T, chosen)[1].T


def mapped_axes(
    init: Callable[[Any], Any], step: Callable[[Any, Any], Any], x: Float[Array, "N B ..."]
) -> Any:
    """The axis of candidates in each part of a solver's state: None for numbers that all of them share.

    What a cache by the number of the step has counted is such, and stays one condition for all: of a
    condition for each, `jax.lax.cond` would compute both branches.

    Args:
        init: x [B, ...] -> state.
        step: (state of all candidates, its axes) -> its next one. It is traced.
        x: [N, B, ...].
    """
    one = jax.eval_shape(init, x[0])
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, one)
    try:
        jax.eval_shape(lambda x: step(jax.vmap(init, out_axes=axes)(x), axes), x)
    except ValueError:  # there are numbers of each candidate, such as the changes that a cache adds up
        return jax.tree.map(lambda leaf: 0, one)
    return axes


def pick(tree: Any, index: Int[Array, "M B"], shape: tuple[int, ...]) -> Any:
    """Candidates index[m, b] of image b, of every leaf [N, k B, ...] of the tree; others stay.

    What a cache remembers of a guided network has k branches along the axis of images, one after the other. A
    leaf without the axes of candidates and images is the same for all of them.
    """
    num, batch = shape

    def one(leaf):
        if leaf.ndim < 2 or leaf.shape[0] != num or leaf.shape[1] % batch:
            return leaf
        rows = jnp.tile(index, (1, leaf.shape[1] // batch))
        return jnp.take_along_axis(leaf, rows.reshape(*rows.shape, *(1,) * (leaf.ndim - 2)), axis=0)

    return jax.tree.map(one, tree)


def best_of(candidates: Float[Array, "N B ..."], scores: Float[Array, "N B"]) -> Found:
    """The best candidate of each image."""
    x_0, score = pick((candidates, scores), rank(scores, 1), scores.shape)
    return Found(x_0[0], score[0], candidates, scores)
