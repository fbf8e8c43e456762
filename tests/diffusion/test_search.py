"""Best of N, zero-order search and search over paths, on Gaussian data, where the chances are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from scipy import stats

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

PATH, KEY = D.Flow(), jax.random.key(7)
GRID, SOLVER = D.make_grid(PATH, 6), D.solvers.ddim()
MEAN, STD = 0.3, 0.8
DENOISE = D.gaussian_denoiser(PATH, MEAN, STD)
SHAPE = (3, 2, 2, 1)


def total(images):
    return images.sum((1, 2, 3))


def pixel(images):
    return images[:, 0, 0, 0]


def noises(count, shape=SHAPE, grid=GRID):
    return D.search.candidate_noise(KEY, shape, grid, count)


def test_candidates_are_the_images_own_and_others():
    keys = D.search.candidate_keys(KEY, 4, 3)
    assert (
        keys.shape == (4, 3) and len({str(data) for data in jax.random.key_data(keys).reshape(12, -1)}) == 12
    )
    np.testing.assert_array_equal(jax.random.key_data(keys[0]), jax.random.key_data(D.image_keys(KEY, 3)))
    few = D.search.candidate_keys(D.image_keys(KEY, 3)[1:], 2, 2)
    np.testing.assert_array_equal(jax.random.key_data(few), jax.random.key_data(keys[:2, 1:]))
    assert D.search.candidate_keys(KEY, 1, 3).shape == (1, 3)
    np.testing.assert_array_equal(noises(2)[0], D.initial_noise(KEY, SHAPE, GRID))


@pytest.mark.parametrize("solver", [SOLVER, D.solvers.ddpm()], ids=["ddim", "ddpm"])
def test_the_best_of_one_is_a_plain_sample(solver):
    found = D.search.best_of_n(KEY, DENOISE, solver, GRID, noises(1), total)
    plain = D.sample(KEY, DENOISE, solver, GRID, D.initial_noise(KEY, SHAPE, GRID))
    np.testing.assert_allclose(found.x_0, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.score, total(found.x_0))


def end_std():
    """Of one pixel at the end of the run from noise, which is linear in it."""
    x = jnp.array([0.0, 1.0]).reshape(2, 1, 1, 1)
    low, high = np.asarray(D.sample(KEY, DENOISE, SOLVER, GRID, x)).ravel()
    return low, high - low


def test_the_chance_of_the_best_of_n():
    """An image of probability p is among N with 1 - (1 - p)^N; the best of two is std / sqrt(pi) above."""
    images, (mean, std) = 4000, end_std()
    wanted = mean + 1.2 * std
    p = stats.norm.sf(1.2)
    for count in (2, 5):
        x_T = noises(count, (images, 1, 1, 1))
        taken = D.search.best_of_n(
            KEY, DENOISE, SOLVER, GRID, x_T, lambda x: (pixel(x) > wanted).astype(x.dtype)
        )
        chance = 1 - (1 - p) ** count
        assert abs(taken.score.mean() - chance) < 3 * (chance * (1 - chance) / images) ** 0.5
        best = D.search.best_of_n(KEY, DENOISE, SOLVER, GRID, x_T, pixel)
        largest = {2: np.pi**-0.5, 5: 1.16296}[count]  # of so many standard normal numbers, on average
        assert abs((best.score.mean() - mean) / std - largest) < 3 / images**0.5
        np.testing.assert_array_equal(best.score, best.scores.max(0))
        np.testing.assert_array_equal(pixel(best.x_0), best.score)


def none_above_1(images):
    return jnp.where(total(images) > 1, jnp.nan, total(images))


def test_a_score_of_nan_is_never_chosen():
    x_T = noises(3)
    scores = np.asarray(D.search.best_of_n(KEY, DENOISE, SOLVER, GRID, x_T, total).scores)
    assert (scores > 1).any(0).all() and (scores < 1).any(0).all()  # or else this test sees nothing
    found = D.search.best_of_n(KEY, DENOISE, SOLVER, GRID, x_T, none_above_1)
    np.testing.assert_allclose(found.score, np.where(scores > 1, -np.inf, scores).max(0), rtol=1e-5)
    with pytest.raises(InvalidArgumentError, match="NaN for every candidate of image 0"):
        D.search.best_of_n(KEY, DENOISE, SOLVER, GRID, x_T, lambda images: total(images) * jnp.nan)


def test_neighbours_on_the_sphere():
    pivot, direction = jax.random.normal(KEY, (2, 5, 4, 4, 2))
    for radius in (0.1, 0.7, 1.0):
        neighbour = D.search.sphere_neighbour(direction, pivot, radius)
        lengths = [np.linalg.norm(np.reshape(x, (5, -1)), axis=1) for x in (neighbour, pivot)]
        np.testing.assert_allclose(*lengths, rtol=1e-5)
        cosine = np.sum(pivot * neighbour, (1, 2, 3)) / lengths[1] ** 2
        np.testing.assert_allclose(np.arccos(cosine), np.arcsin(radius), rtol=2e-3)
    np.testing.assert_array_equal(D.search.sphere_neighbour(direction, pivot, 0.0), pivot)
    assert not D.search.sphere_neighbour(direction, jnp.zeros_like(pivot), 0.5).any()


def test_zero_order_search_climbs_to_the_best_of_the_sphere():
    """The sum of a linear map's pixels is largest where all numbers of the noise are equal."""
    x_T = D.initial_noise(KEY, SHAPE, GRID)
    numbers = {"num_neighbours": 8, "num_rounds": 30}
    found = D.search.zero_order_search(KEY, DENOISE, SOLVER, GRID, x_T, total, **numbers, radius=0.3)
    mean, slope = end_std()
    length = np.linalg.norm(np.reshape(x_T, (3, -1)), axis=1)
    np.testing.assert_allclose(np.linalg.norm(np.reshape(found.x_T, (3, -1)), axis=1), length, rtol=1e-4)
    best = 4 * mean + slope * 2 * length
    assert (found.score < best + 1e-4).all() and (found.score > best - 0.03 * slope * length).all()
    assert found.history.shape == (31, 3) and (np.diff(found.history, axis=0) >= 0).all()
    np.testing.assert_array_equal(found.history[-1], found.score)
    again = D.sample(KEY, DENOISE, SOLVER, GRID, found.x_T)
    np.testing.assert_allclose(again, found.x_0, rtol=1e-5, atol=1e-6)


ROWS = {"num_children": 1, "first": 2, "back": 2, "forward": 3}


def test_search_over_paths():
    """Without a choice the images stay those of the data; with one they are better, the best first."""
    solver, shape, grid = D.solvers.heun(), (2000, 1, 1, 1), D.make_grid(PATH, 20)
    rows = {"first": 10, "back": 2, "forward": 6}

    def draw(**numbers):
        x_T = noises(2, shape, grid)
        return D.search.search_over_paths(KEY, DENOISE, solver, grid, x_T, pixel, **numbers)

    plain = draw(**rows, num_children=1)
    x = np.asarray(plain.candidates).ravel()
    assert abs(x.mean() - MEAN) < 4 * STD / x.size**0.5 and abs(x.std() / STD - 1) < 0.05
    chosen = draw(**rows, num_children=3)
    assert chosen.candidates.shape == (2, *shape) and (chosen.scores[0] >= chosen.scores[1]).all()
    np.testing.assert_array_equal(chosen.x_0, chosen.candidates[0])
    np.testing.assert_array_equal(pixel(chosen.x_0), chosen.score)
    assert chosen.score.mean() > MEAN + 1.16 * STD  # more than the best of five


def test_padding_changes_nothing():
    whole, padded = (
        D.search.search_over_paths(
            KEY, DENOISE, SOLVER, grid, noises(2), total, **{**ROWS, "num_children": 2}
        )
        for grid in (GRID, D.pad(GRID, 9))
    )
    np.testing.assert_allclose(padded.candidates, whole.candidates, rtol=1e-5, atol=1e-5)


def test_evaluations():
    calls = []

    def function(x, t):
        jax.debug.callback(lambda x: calls.append(1), x)
        return 0.5 * x

    def count(search, x_T, **numbers):
        calls.clear()
        jax.block_until_ready(
            search(KEY, D.Denoiser(function, PATH), D.solvers.ddpm(), GRID, x_T, total, **numbers)
        )
        jax.effects_barrier()
        return len(calls)

    assert count(D.search.best_of_n, noises(3)) == 3 * 6
    numbers = {"num_neighbours": 2, "num_rounds": 3}
    assert count(D.search.zero_order_search, noises(1)[0], **numbers) == (1 + 2 * 3) * 6
    # Rounds begin at rows 2, 3, 4 and 5, of which the first goes from row 0 to 3, the last from 3 to 6.
    assert (
        count(D.search.search_over_paths, noises(2), **{**ROWS, "num_children": 2}) == 2 * 2 + 4 * 2 * 2 * 3
    )


def test_other_keys_and_radii_compile_nothing():
    def zero_order(seed, radius):
        return D.search.zero_order_search(
            jax.random.key(seed),
            D.gaussian_denoiser(PATH, MEAN, STD),
            D.solvers.ddim(),
            GRID,
            x_T,
            total,
            num_neighbours=2,
            num_rounds=2,
            radius=radius,
        )

    x_T = noises(1)[0]
    first = zero_order(0, 0.4)
    assert compilations(lambda: zero_order(1, 0.5)) == 0
    assert not np.allclose(first.x_0, zero_order(1, 0.5).x_0)


def best_by_labels(labels, logits=lambda x: x.reshape(len(x), -1)[:, :2]):
    verifier = D.search.label_log_probability(logits, np.array(labels))
    return D.search.best_of_n(KEY, DENOISE, SOLVER, GRID, noises(1), verifier)


def test_what_a_verifier_raises_is_kept_with_a_note():
    def torch_like(images):
        return images.cpu().numpy()

    with pytest.raises(AttributeError, match="cpu") as caught:
        D.search.best_of_n(KEY, DENOISE, SOLVER, GRID, noises(1), torch_like)
    assert "verifier(images), which was traced with images float32[3, 2, 2, 1]" in caught.value.__notes__[-1]


def refuse(call, words):
    return pytest.param(call, words, id=words[:30])


@pytest.mark.parametrize(
    "call, words",
    [
        refuse(lambda: noises(0), "num_candidates must be a whole number of at least 1, got 0"),
        refuse(
            lambda: D.search.best_of_n(KEY, DENOISE, SOLVER, GRID, noises(1), lambda x: x.mean()),
            r"verifier must return one floating-point number for each image, float32\[3\]",
        ),
        refuse(
            lambda: D.search.best_of_n(KEY, DENOISE, SOLVER, GRID, noises(1), lambda x: total(x) > 0),
            r"got bool\[3\]",
        ),
        refuse(
            lambda: D.search.best_of_n(KEY, DENOISE, SOLVER, GRID, noises(1), lambda x: np.asarray(x).sum()),
            "verifier must be made of JAX operations",
        ),
        refuse(
            lambda: D.search.best_of_n(KEY, DENOISE, SOLVER, GRID, noises(1)[0], total),
            r"x_T must be \[N, B, H, W, C\], got \[3, 2, 2, 1\] without the axis of candidates",
        ),
        refuse(
            lambda: D.search.candidate_keys(KEY, 10**6, 10**9),
            "num_candidates and batch_size=.* of memory",
        ),
        refuse(
            lambda: D.search.zero_order_search(
                KEY, DENOISE, SOLVER, GRID, noises(1)[0], total, num_neighbours=10**9, num_rounds=1
            ),
            "num_neighbours and x_T=.* of memory",
        ),
        refuse(lambda: best_by_labels([0, 1]), "a row for each of 2 labels"),
        refuse(lambda: best_by_labels([0, 1, 2]), r"labels must lie in \[0, 1\] for the classes.*got 2"),
        refuse(lambda: best_by_labels([0, -1, 1]), r"labels must lie in \[0, 1\].*got -1"),
        refuse(lambda: best_by_labels([0, 1, 1], total), r"logits must return \[3, classes\]"),
        refuse(
            lambda: D.search.best_of_n(KEY, DENOISE, SOLVER, D.make_grid(D.EDM(), 4), noises(1), total),
            "the grid must lie on the denoiser's flow path",
        ),
        refuse(
            lambda: D.search.best_of_n(jax.random.split(KEY, 2), DENOISE, SOLVER, GRID, noises(1), total),
            "one key, or one per image",
        ),
        refuse(
            lambda: D.search.zero_order_search(
                KEY, DENOISE, SOLVER, GRID, noises(1)[0], total, num_neighbours=1, num_rounds=1, radius=1.5
            ),
            "radius must be a finite number from 0 to 1, got 1.5",
        ),
        refuse(
            lambda: D.search.search_over_paths(
                KEY, DENOISE, SOLVER, GRID, noises(1), total, **{**ROWS, "first": 6}
            ),
            "first must be a row from back=2 to 5 of a grid of 6 steps, got 6",
        ),
        refuse(
            lambda: D.search.search_over_paths(
                KEY, DENOISE, SOLVER, D.pad(D.make_grid(PATH, 2), 6), noises(1), total, **ROWS
            ),
            "first must be a row from back=2 to 1 of a grid of 2 steps, got 2",
        ),
        refuse(
            lambda: D.search.search_over_paths(
                KEY, DENOISE, SOLVER, GRID, noises(1), total, **{**ROWS, "forward": 2}
            ),
            "forward must be more than back=2, got 2",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()


def test_a_label_s_log_probability():
    logits = jnp.array([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    verifier = D.search.label_log_probability(lambda images: logits, np.array([1, 2]))
    expected = [2 - np.log(np.exp([1, 2, 0.5]).sum()), -np.log(3)]
    np.testing.assert_allclose(verifier(jnp.zeros((2, 1, 1, 1))), expected, rtol=1e-5)
