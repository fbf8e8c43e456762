"""Token merging against a matching written in NumPy, and against the published one where it is installed."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import models, nn
from jaxldm.errors import InvalidArgumentError

SIZES = [((4, 6), 0.5), ((5, 7), 0.3), ((7, 7), 0.75), ((2, 2), 0.25), ((18, 16), 0.5)]


def tokens(size, batch=2, channels=5):
    return (
        np.random.default_rng(sum(size)).normal(size=(batch, size[0] * size[1], channels)).astype("float32")
    )


def merged_by_hand(x, size, ratio):
    """One image in loops: (merged tokens as sets of members, what each token becomes in the end)."""
    rows, columns = size
    number = rows * columns
    destinations = [
        i * columns + j for i in range(0, rows // 2 * 2, 2) for j in range(0, columns // 2 * 2, 2)
    ]
    sources = [n for n in range(number) if n not in destinations]
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    best = {s: max(destinations, key=lambda d: unit[s] @ unit[d]) for s in sources}
    order = sorted(sources, key=lambda s: -unit[s] @ unit[best[s]])
    groups = {d: [d] for d in destinations}
    gone = order[: int(number * ratio)]
    for s in gone:
        groups[best[s]].append(s)
    groups |= {s: [s] for s in sources if s not in gone}
    result = np.zeros_like(x)
    for members in groups.values():
        result[members] = x[members].mean(axis=0)
    return groups, result


@pytest.mark.parametrize(("size", "ratio"), SIZES)
def test_it_agrees_with_a_matching_in_loops(size, ratio):
    x = tokens(size)
    match = nn.match_tokens(jnp.asarray(x), size, ratio)
    merged = nn.merge_tokens(jnp.asarray(x), match)
    whole = np.asarray(nn.unmerge_tokens(merged, match))
    for n, image in enumerate(x):
        groups, wanted = merged_by_hand(image, size, ratio)
        assert merged.shape[1] == match.count == len(groups)
        together = np.asarray(match.place[n])
        assert {frozenset(np.flatnonzero(together == k)) for k in together} == set(
            map(frozenset, groups.values())
        )
        np.testing.assert_allclose(whole[n], wanted, atol=1e-6)


@pytest.mark.parametrize(("size", "ratio"), [((4, 6), 0.5), ((7, 7), 0.75), ((18, 16), 0.5)])
@pytest.mark.torch
def test_it_agrees_with_the_published_implementation(size, ratio):
    merge = pytest.importorskip("tomesd.merge")
    torch = sys.modules["torch"]
    x = tokens(size)
    theirs = torch.from_numpy(x)
    down, up = merge.bipartite_soft_matching_random2d(
        theirs, size[1], size[0], 2, 2, int(x.shape[1] * ratio), no_rand=True
    )
    match = nn.match_tokens(jnp.asarray(x), size, ratio)
    merged = nn.merge_tokens(jnp.asarray(x), match)
    assert merged.shape == tuple(down(theirs).shape)
    np.testing.assert_allclose(
        np.sort(merged, axis=1), np.sort(down(theirs).numpy(), axis=1), atol=1e-6
    )  # in another order
    np.testing.assert_allclose(nn.unmerge_tokens(merged, match), up(down(theirs)).numpy(), atol=1e-6)


def test_tokens_that_are_alike_lose_nothing_and_dtypes_stay():
    size = (4, 4)
    x = jnp.repeat(jnp.repeat(jax.random.normal(jax.random.key(0), (1, 2, 2, 3)), 2, 1), 2, 2)
    x = x.reshape(1, 16, 3).astype(jnp.bfloat16)
    match = nn.match_tokens(x, size, 0.75)
    merged = nn.merge_tokens(x, match)
    assert merged.shape == (1, 4, 3) and merged.dtype == x.dtype
    np.testing.assert_array_equal(nn.unmerge_tokens(merged, match), x)


@pytest.mark.parametrize("size", [(3, 4), (1, 24), (24, 1)])
def test_grids_that_do_not_fit_are_refused(size):
    with pytest.raises(InvalidArgumentError, match="size must be"):
        nn.match_tokens(jnp.zeros((1, 24, 4)), size, 0.5)


def test_ratios_out_of_range_are_refused():
    for wrong in (0.8, -0.1, float("nan"), "half"):
        with pytest.raises(InvalidArgumentError, match="ratio must be"):
            models.TokenMerging(wrong)
