"""KID, CMMD, precision and recall, MIND and the Inception Score on features whose figures are known."""

import functools
import tracemalloc

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import metrics
from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.metrics import kernels, manifolds, moments, sliced


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 100))
def test_moments_of_blocks_are_those_of_the_whole(sizes, seed):
    whole = rows(sum(sizes) + 2, 3, seed=seed) + 1e4
    moments = metrics.no_moments(3)
    for block in np.split(whole, np.cumsum(sizes)):
        moments = metrics.add_rows(moments, block)
    gaussian, expected = metrics.gaussian_of(moments), metrics.fit_gaussian(whole)
    np.testing.assert_allclose(gaussian.mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(gaussian.covariance, expected.covariance, rtol=1e-8, atol=1e-8)


def test_a_gaussian_is_fitted_to_features_in_a_file(tmp_path):
    whole = rows(5000, 4).astype(np.float32)
    np.save(tmp_path / "rows.npy", whole)
    stored = np.load(tmp_path / "rows.npy", mmap_mode="r")
    fitted = metrics.fit_gaussian_by_blocks(stored)
    np.testing.assert_allclose(fitted.covariance, metrics.fit_gaussian(whole).covariance, rtol=1e-10)


def test_the_polynomial_mmd_is_the_mean_over_pairs_of_different_rows():
    x, y = rows(7, 3), rows(5, 3, seed=1)

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    within_x = np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    np.testing.assert_allclose(metrics.polynomial_mmd(x, y), within_x + within_y - 2 * between, rtol=1e-12)


def test_the_polynomial_mmd_of_two_halves_of_one_distribution_is_0_on_average():
    values = [
        metrics.polynomial_mmd(rows(20, 4, seed=2 * n), rows(20, 4, seed=2 * n + 1)) for n in range(400)
    ]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0  # a biased estimate never is


def test_kid_draws_subsets_of_both_sets():
    x, y = rows(60, 4), rows(90, 4, seed=1) + 0.5
    whole = metrics.kernel_distance(x, y, subsets=200, subset_size=40)
    assert abs(whole.mean - metrics.polynomial_mmd(x, y)) < 4 * whole.std / np.sqrt(200) + 0.01
    assert metrics.kernel_distance(x, x[::-1], subsets=3, subset_size=60, seed=7).std < 1e-12


def test_kernels_of_all_pairs_at_once_give_the_distances_of_the_subsets(monkeypatch):
    x, y = rows(40, 6), rows(50, 6, seed=1) + 0.3
    at_once = metrics.kernel_distance(x, y, subsets=20, subset_size=12)
    random = np.random.RandomState(2020)
    one_by_one = [
        metrics.polynomial_mmd(x[random.choice(40, 12, False)], y[random.choice(50, 12, False)])
        for _ in range(20)
    ]
    np.testing.assert_allclose(at_once, (np.mean(one_by_one), np.std(one_by_one)), rtol=1e-10)
    monkeypatch.setattr("jaxldm.metrics.kernels._MOST_PAIRS", 0)
    np.testing.assert_allclose(metrics.kernel_distance(x, y, subsets=20, subset_size=12), at_once, rtol=1e-10)


def test_cmmd_in_closed_form():
    """Two sets of one vector each: k(x, x) + k(y, y) - 2 k(x, y) with the angle between them."""
    x, y = np.array([[3.0, 0.0]]), np.array([[0.0, 0.2]])
    np.testing.assert_allclose(metrics.clip_mmd(x, y), 2000 * (1 - np.exp(-2 / 200)), rtol=1e-12)
    many = rows(3000, 5)
    assert abs(metrics.clip_mmd(many, 2 * many[::-1])) < 1e-9  # lengths do not count, nor does the order


def test_precision_recall_density_and_coverage_of_a_line():
    """Real rows 0, 1, ..., 9 with k = 1 have balls of radius 1; the generated rows' have radius 0.25."""
    real = np.arange(10.0)[:, None]
    generated = np.array([[0.0], [0.25], [0.5], [20.0], [20.25]])
    found = metrics.manifold_overlap(generated, real, k=1)
    assert found.precision == 3 / 5
    assert found.recall == 1 / 10  # only 0 is within 0.25 of a generated row
    assert found.density == (2 + 2 + 2) / 5  # 0 lies in the balls of 0 and 1, and so do 0.25 and 0.5
    assert found.coverage == 2 / 10


def test_sets_far_apart_have_no_overlap():
    x = rows(30, 4)
    assert metrics.manifold_overlap(x, x + 100) == (0, 0, 0, 0)


@given(shift=st.floats(-3, 3), n=st.integers(1, 7), m=st.integers(1, 7))
def test_the_sliced_distance_in_one_dimension_is_the_transport_of_quantiles(shift, n, m):
    a, b = rows(n, 1), rows(m, 1, seed=1) + shift
    fine_a, fine_b = (np.sort(np.repeat(x[:, 0], n * m // len(x))) for x in (a, b))
    expected = 3 * np.mean((fine_a - fine_b) ** 2)
    np.testing.assert_allclose(
        metrics.sliced_wasserstein(a, b, directions=2), expected, rtol=1e-9, atol=1e-12
    )


def test_the_sliced_distance_of_a_shift_is_three_times_its_square():
    x = rows(40, 6)
    shift = np.array([1.0, 0, 0, 2, 0, 0])
    np.testing.assert_allclose(metrics.sliced_wasserstein(x, x + shift, directions=20000), 15, rtol=0.05)


def test_the_inception_score_of_splits_is_the_mean_of_the_score_of_the_parts():
    logits = 3 * rows(25, 4)
    score = metrics.inception_score_of_splits(logits, 5, seed=None)
    parts = [
        metrics.inception_score(scipy.special.softmax(logits[5 * n : 5 * n + 5], axis=1)) for n in range(5)
    ]
    np.testing.assert_allclose(score, (np.mean(parts), np.std(parts)), rtol=1e-12)


def test_sure_and_equally_frequent_classes_have_a_score_of_their_number():
    logits = np.tile(1000 * np.eye(7), (10, 1))
    score = metrics.inception_score_of_splits(logits, 10, seed=None)
    np.testing.assert_allclose(score, (7, 0), atol=1e-9)


@pytest.mark.parametrize(
    "distance",
    [
        metrics.polynomial_mmd,
        metrics.clip_mmd,
        metrics.manifold_overlap,
        metrics.sliced_wasserstein,
        lambda a, b: metrics.kernel_distance(a, b, subset_size=5, subsets=30),
    ],
)
def test_what_cannot_be_compared_is_refused(distance):
    good, bad = rows(20, 3), rows(20, 3)
    bad[3, 1] = np.nan
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(DataError, match="NaN"):
            distance(*pair)
    with pytest.raises(DataError, match="widths: 3 and 2"):
        distance(good, good[:, :2])
    with pytest.raises(DataError, match="N >= "):
        distance(good[:0], good)


def test_options_out_of_range_are_refused():
    x = rows(10, 3)
    with pytest.raises(InvalidArgumentError, match="subset_size between 2 and 10"):
        metrics.kernel_distance(x, x)
    with pytest.raises(InvalidArgumentError, match="k must be between 1 and 9"):
        metrics.manifold_overlap(x, x, k=10)
    with pytest.raises(InvalidArgumentError, match="directions"):
        metrics.sliced_wasserstein(x, x, directions=0)
    with pytest.raises(DataError, match="splits"):
        metrics.inception_score_of_splits(x, 11)
    with pytest.raises(DataError, match="NaN"):
        metrics.inception_score_of_splits(np.full([10, 3], np.nan))


def peak_of(call):
    """Bytes that a call had at once, besides its arguments."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "distance",
    [
        manifolds.manifold_overlap,
        kernels.clip_mmd,
        functools.partial(sliced.sliced_wasserstein, directions=64),
    ],
    ids=["manifolds", "cmmd", "sliced"],
)
def test_many_images_need_the_memory_of_few(distance, monkeypatch):
    monkeypatch.setattr(manifolds, "_BLOCK", 256)
    monkeypatch.setattr(sliced, "_MOST_NUMBERS", 2**13)
    monkeypatch.setattr(kernels, "blocks_of", lambda rows: moments.blocks_of(rows, 256))
    monkeypatch.setattr(sliced, "blocks_of", lambda rows: moments.blocks_of(rows, 256))
    many = np.random.default_rng(0).normal(size=(2, 1024, 32)).astype(np.float32)
    few = many[:, :512]
    distance(*few)  # what is imported late
    small, large = (peak_of(lambda rows=rows: distance(*rows)) for rows in (few, many))
    assert large < 1.3 * small + 16 * 1024, "a number or two an image"


@pytest.mark.parametrize("k", [1, 3, 200])
def test_blocks_change_no_manifold(k, monkeypatch):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(300, 4)), random.normal(size=(257, 4)) + 0.5
    squares = ((a[:, None] - b) ** 2).sum(-1)
    radii, real_radii = (np.sort(((x[:, None] - x) ** 2).sum(-1), axis=1)[:, k] for x in (a, b))
    monkeypatch.setattr(manifolds, "_BLOCK", 64)
    found = manifolds.manifold_overlap(a, b, k)
    inside = squares <= real_radii
    np.testing.assert_allclose(found.precision, inside.any(1).mean())
    np.testing.assert_allclose(found.recall, (squares <= radii[:, None]).any(0).mean())
    np.testing.assert_allclose(found.density, inside.sum() / (k * len(a)))
    np.testing.assert_allclose(found.coverage, inside.any(0).mean())
