"""Averages of power-function profiles: tracked, and made afterwards, against sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import ToyBatches, loss_fn, toy_params

from jaxldm import training
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.training.power_ema import gamma_of, profile_product, profile_weights, update_power_ema
from jaxldm.training.state import create_train_state
from jaxldm.training.step import make_train_step

STEPS, EVERY = 4000, 100
LENGTHS = (0.05, 0.1)


def known_trajectory():
    """Parameters of a made-up training: they converge, and jitter more than they move."""
    numbers = np.random.default_rng(0)
    t = np.arange(1, STEPS + 1)[:, None]
    return 1.0 / np.sqrt(t) * np.array([1.0, -2.0, 3.0]) + 0.05 * numbers.normal(size=(STEPS, 3))


def direct(trajectory, gamma):
    """The weights of the recursion, one by one, in float64: prod (1 - 1/t)^(gamma + 1) after each update."""
    t = np.arange(1, len(trajectory) + 1, dtype=np.float64)
    with np.errstate(divide="ignore"):
        decay = (1 - 1 / t) ** (gamma + 1)
    after = np.append(np.cumprod(decay[::-1])[::-1][1:], 1.0)
    weights = (1 - decay) * after
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-12)
    return weights @ trajectory


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_gamma_is_that_of_the_standard_deviation(length):
    gamma, t = gamma_of(length), (np.arange(2_000_000) + 0.5) / 2_000_000
    weights = t**gamma / np.sum(t**gamma)
    mean = np.sum(weights * t)
    np.testing.assert_allclose(np.sqrt(np.sum(weights * (t - mean) ** 2)), length, rtol=1e-4)


def test_the_product_of_profiles_is_their_integral():
    t = (np.arange(1_000_000) + 0.5) / 1_000_000
    profile = lambda end, gamma: np.where(t < end, (gamma + 1) * t**gamma / end ** (gamma + 1), 0)  # noqa: E731
    for a, b in (((0.5, 3.0), (1.0, 7.0)), ((1.0, 2.0), (0.3, 16.0)), ((0.7, 5.0), (0.7, 5.0))):
        np.testing.assert_allclose(profile_product(*a, *b), np.mean(profile(*a) * profile(*b)), rtol=1e-4)


def test_an_average_of_any_length_is_made_of_two_that_were_kept():
    trajectory = known_trajectory()
    gammas = [gamma_of(length) for length in LENGTHS]

    def update(averages, point):
        step, params = point
        averages = tuple(
            update_power_ema(average, params, gamma, step)
            for average, gamma in zip(averages, gammas, strict=True)
        )
        return averages, averages

    points = jnp.arange(STEPS), jnp.asarray(trajectory, jnp.float32)
    start = (jnp.full(3, 100.0), jnp.full(3, 100.0))  # of which nothing stays
    _, tracked = jax.lax.scan(update, start, points)
    for average, gamma in zip(tracked, gammas, strict=True):
        np.testing.assert_allclose(average[-1], direct(trajectory, gamma), rtol=2e-5, atol=1e-6)
    kept = range(EVERY, STEPS + 1, EVERY)
    rows = [
        (step, gamma, np.float64(average[step - 1]))
        for step in kept
        for average, gamma in zip(tracked, gammas, strict=True)
    ]
    steps, profiles, averages = zip(*rows, strict=True)
    for end in (STEPS, 2000):
        now = [place for place, step in enumerate(steps) if step <= end]
        wanted = {
            length: direct(trajectory[:end], gamma_of(length)) for length in (0.05, 0.07, 0.1, 0.15, 0.2)
        }
        for length, expected in wanted.items():
            gamma = gamma_of(length)
            weights = profile_weights([steps[k] for k in now], [profiles[k] for k in now], end, gamma)
            made = weights @ np.stack([averages[k] for k in now])
            error = np.abs(made - expected).max()
            if length in LENGTHS:
                assert error < 1e-6
            else:  # nearer than either of those that were kept, by far
                kept_ones = [np.abs(wanted[other] - expected).max() for other in LENGTHS]
                assert error < 0.06 * min(kept_ones), (end, length, error, kept_ones)


def test_a_run_keeps_them_in_its_checkpoints(tmp_path):
    adam = training.optimizer(1e-2, total_steps=12)
    seen = []
    state = create_train_state(jax.random.key(7), toy_params(), adam, power_ema=LENGTHS)
    step = make_train_step(loss_fn, adam, 0.9, power_ema=LENGTHS)
    plan = training.Plan(12, save_every=2, sample_every=1, keep=6)
    training.fit(
        state,
        step,
        ToyBatches(),
        plan,
        tmp_path / "diffusion",
        mesh=training.make_mesh(1),
        on_sample=lambda state, step: seen.append(np.asarray(state.params["w1"], np.float64).ravel()),
        log=lambda line: None,
        bar=False,
    )
    for length in (0.05, 0.1, 0.2):
        made = training.post_hoc_ema(tmp_path, length)
        expected = direct(np.stack(seen), gamma_of(length)).reshape(6, 8)
        bound = 1e-5 if length in LENGTHS else 0.02
        np.testing.assert_allclose(made.params["w1"], expected, atol=bound, rtol=0)
        assert made.step == 12 and made.params["w1"].dtype == np.float32
    earlier = training.post_hoc_ema(tmp_path, 0.1, step=8).params["w1"]
    np.testing.assert_allclose(earlier, direct(np.stack(seen[:8]), gamma_of(0.1)).reshape(6, 8), atol=1e-5)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5: it has"):
        training.post_hoc_ema(tmp_path, 0.1, step=5)
    with pytest.raises(InvalidArgumentError, match="relative_length"):
        training.post_hoc_ema(tmp_path, 0.3)


def test_a_state_without_them_is_refused():
    adam = training.optimizer(1e-2, total_steps=12)
    state = create_train_state(jax.random.key(7), toy_params(), adam, power_ema=(0.05,))
    with pytest.raises(InvalidArgumentError, match=r"keeps the power-function averages 0\.05, the step 0\.1"):
        make_train_step(loss_fn, adam, 0.9, power_ema=(0.1,))(state, ToyBatches()[0])
    with pytest.raises(InvalidArgumentError, match="power_ema"):
        training.ClassifierRecipe(power_ema=(0.5,))
