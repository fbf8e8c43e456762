"""What draws times, scales and intervals, against the formulas of the papers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxldm import few_steps as few
from jaxldm.errors import InvalidArgumentError

KEY, MANY = jax.random.key(0), 20_000


def assert_drawn_from(draws, distribution):
    assert scipy.stats.kstest(np.asarray(draws, np.float64), distribution).pvalue > 1e-3


def test_times_of_double_steps():
    times = np.array([1.0, 0.7, 0.4, 0.1, 0.0])
    t, middle, s = (np.asarray(value) for value in few.draw_double_steps(KEY, times, 1000))
    pairs, counts = np.unique(np.stack([t, middle, s], 1), axis=0, return_counts=True)
    np.testing.assert_allclose(pairs, [[0.4, 0.1, 0.0], [1.0, 0.7, 0.4]], atol=1e-7)
    assert counts.min() > 400
    np.testing.assert_array_equal(few.halve(times), [1.0, 0.4, 0.0])
    for wrong in (times[:4], times[:1]):
        with pytest.raises(InvalidArgumentError, match="even number of steps"):
            few.draw_double_steps(KEY, wrong, 3)


def test_guidance_scales():
    assert_drawn_from(few.draw_scales(KEY, MANY, 2.0, 5.0), scipy.stats.uniform(2, 3).cdf)
    with pytest.raises(InvalidArgumentError, match="lowest must be <= highest"):
        few.draw_scales(KEY, 3, 5.0, 2.0)


def test_karras_levels_and_their_number():
    levels = few.karras_levels(18)
    root = levels ** (1 / 7)
    assert levels[[0, -1]] == pytest.approx([0.002, 80.0])
    np.testing.assert_allclose(np.diff(root), np.diff(root)[0])
    stages = [few.num_levels(step, 400_000) for step in range(0, 400_001, 50_000)]
    assert stages == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]  # Song and Dhariwal 2024, table 1: s0, s1
    # K' = floor(K / (log2(floor(s1 / s0)) + 1)) of no power of two: 800 / (log2(100) + 1) = 104.7
    found = [few.num_levels(step, 800, 10, 1000) for step in (103, 104, 727, 728, 799)]
    assert found == [11, 21, 641, 1001, 1001]


def test_improved_training_prefers_the_intervals_of_its_log_normal():
    sigmas = few.karras_levels(40)
    p = few.interval_probabilities(sigmas)
    normal = scipy.stats.norm(-1.1, 2.0)
    mass = np.diff(normal.cdf(np.log(sigmas)))
    np.testing.assert_allclose(p, mass / mass.sum(), rtol=1e-6)
    t, s = few.draw_neighbours(KEY, sigmas, MANY, p)
    row = np.searchsorted(sigmas, np.asarray(s) * 1.0001) - 1
    np.testing.assert_allclose(t, sigmas[row + 1], rtol=1e-5)
    np.testing.assert_allclose(np.bincount(row, minlength=39) / MANY, p, atol=0.01)
    with pytest.raises(InvalidArgumentError, match="rising positive"):
        few.interval_probabilities([1.0, 0.5])


def test_easy_times_close_up_from_the_clean_image():
    t = jnp.array([0.01, 0.5, 5.0, 80.0])
    gaps = [np.asarray(t - few.easy_times(t, stage)) for stage in range(8)]
    n = 1 + 8 / (1 + np.exp(np.asarray(t)))
    np.testing.assert_allclose(gaps[0], t * np.minimum(n / 2, 1), rtol=1e-5)  # s = 0 is the clean image
    np.testing.assert_array_equal(gaps[0][:2], t[:2])
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(gaps))
    np.testing.assert_allclose(gaps[7], t * n / 256, rtol=1e-5)
    np.testing.assert_array_equal(few.easy_times(t, stage=2000), t)  # 2.0 ** 2001 is no float


def test_times_of_trigflow():
    t = few.trig_times(KEY, MANY, -1.0, 1.4, 0.5)
    assert_drawn_from(np.log(np.tan(np.asarray(t, np.float64)) * 0.5), scipy.stats.norm(-1, 1.4).cdf)
    path = few.TrigFlow(sigma_data=0.5)
    u = np.linspace(0.01, 1.5, 9)
    np.testing.assert_allclose(path.time(path.sigma(u) / path.alpha(u)), u)


def test_times_of_reflow_are_heavy_at_both_ends():
    t = few.u_shaped_times(KEY, MANY, 4.0)

    def distribution(t):  # the integral of e^(4u) + e^(-4u), u = 2t - 1
        return (np.sinh(4 * (2 * t - 1)) / np.sinh(4) + 1) / 2

    assert_drawn_from(t, distribution)
    steep = few.u_shaped_times(KEY, MANY, 50.0)
    assert ((steep >= 0) & (steep <= 1)).all() and jnp.abs(steep - 0.5).mean() > 0.45
    with pytest.raises(InvalidArgumentError, match="a must be"):  # sinh is infinite in float32
        few.u_shaped_times(KEY, 4, 100.0)


def test_shortcut_steps_start_on_their_own_grid():
    t, d = (np.asarray(value) for value in few.shortcut_times(KEY, 4000, 8))
    assert set(d) == {1.0, 0.5, 0.25}
    np.testing.assert_array_equal(t / d, np.round(t / d))
    assert set(t[d == 0.25]) == {0.25, 0.5, 0.75, 1.0}
    assert set(t[d == 1]) == {1.0}
    with pytest.raises(InvalidArgumentError, match="2, 4, 8, 16"):
        few.shortcut_times(KEY, 3, 6)


def test_intervals_of_mean_flow():
    r, t = (np.asarray(value) for value in few.interval_times(KEY, MANY, equal=0.25))
    assert (r <= t).all()
    assert (r[: MANY // 4] == t[: MANY // 4]).all()
    assert (r[MANY // 4 :] < t[MANY // 4 :]).mean() > 0.999
    both = np.stack([r, t])[:, MANY // 4 :].ravel()
    assert_drawn_from(np.log(both / (1 - both)), scipy.stats.norm(-0.4, 1).cdf)
