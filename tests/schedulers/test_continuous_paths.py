"""Files of consistency, score-based and audio models: rows, what the network gets, and what it answers."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import schedulers
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.few_steps import edm_consistency_model
from jaxldm.schedulers.continuous_paths import consistency, score


def read(scheduler):
    return schedulers.from_config(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})


@pytest.mark.parametrize("levels", [40, 18])
def test_rows_of_a_consistency_model(levels):
    theirs = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=levels, rho=6.0, sigma_max=60.0)
    ours = read(theirs)
    assert ours.solver == D.solvers.lcm(from_t_min=True) and ours.sampler.threshold == (-1.0, 1.0)
    for steps in (1, 2, 7, levels - 1):
        theirs.set_timesteps(steps)
        grid = ours.make_grid(steps)
        np.testing.assert_allclose(grid.sigma, theirs.sigmas, rtol=1e-6)
        times = ours.prediction.precondition(jnp.ones((steps, 1)), jnp.asarray(grid.t[:-1]))[1]
        np.testing.assert_allclose(times, theirs.timesteps, rtol=1e-5, atol=1e-4)
    whole = ours.make_grid(levels)  # one more than they have, none of them twice
    assert len(whole.t) == levels + 1 and whole.t[-1] == np.float32(0.002)
    with pytest.raises(InvalidArgumentError, match=f"num_train_timesteps={levels}"):
        ours.make_grid(levels + 1)


def test_a_consistency_model_is_the_one_of_training():
    def network(x, t):
        return jnp.tanh(x) + t.reshape(-1, 1)

    x, t = jax.random.normal(jax.random.key(0), (3, 2)) * 9, jnp.array([0.002, 0.5, 80.0])
    prediction = consistency(D.EDM())
    trained = edm_consistency_model(lambda x, noise: network(x, 1000 * noise))(x, t)
    np.testing.assert_allclose(D.denoiser(network, prediction)(x, t), trained, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", [consistency(D.EDM(), 0.7), score(D.EDM()), score(D.ContinuousVP())])
def test_the_target_is_what_gives_x_0(prediction, x64):
    path, rng = prediction.path, np.random.default_rng(0)
    x_0, epsilon = rng.standard_normal((2, 3, 4))
    t = np.linspace(0.2, 0.9, 3)
    x_t = path.alpha(t)[:, None] * x_0 + path.sigma(t)[:, None] * epsilon
    target = prediction.target(x_0, epsilon, t)
    np.testing.assert_allclose(prediction.to_x0(target, x_t, t), x_0, rtol=1e-10)
    moved = prediction.to_x0(target + 1e-3, x_t, t) - x_0
    np.testing.assert_allclose(np.abs(moved), 1e-3 * prediction.gain(t)[:, None] * np.ones(4), rtol=1e-6)


def test_rows_of_a_score_based_model():
    theirs = diffusers.ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=50.0, snr=0.2, correct_steps=2)
    ours = read(theirs)
    assert ours.solver == D.solvers.predictor_corrector(0.2, 2, "published")
    theirs.set_timesteps(9)
    theirs.set_sigmas(9)
    grid = ours.make_grid(9)
    np.testing.assert_allclose(grid.sigma, np.append(theirs.discrete_sigmas.flip(0), 0), rtol=2e-4)
    np.testing.assert_allclose(grid.t[:-1], theirs.sigmas, rtol=1e-5)
    later = schedulers.from_config({"_class_name": "ScoreSdeVeScheduler", "sampling_eps": 0.5})
    assert later.make_grid(9).t[-2] == pytest.approx((0.01 * 1348) ** 0.5)


def test_rows_of_ipndm():
    theirs = diffusers.IPNDMScheduler()
    ours = read(theirs)
    assert ours.solver == D.solvers.ipndm() and ours.prediction == D.v(D.Interpolant("gvp"))
    theirs.set_timesteps(9)
    grid = ours.make_grid(9)
    np.testing.assert_allclose(grid.t[:-1], theirs.timesteps, rtol=1e-3, atol=2e-4)  # its digits near t = 1
    np.testing.assert_allclose(grid.sigma, theirs.betas, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "IPNDMScheduler", "trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"_class_name": "ScoreSdeVeScheduler", "sampling_eps": 2.0}, "sampling_eps"),
        ({"_class_name": "ScoreSdeVeScheduler", "correct_steps": 1000}, "correct_steps"),
        ({"_class_name": "CMStochasticIterativeScheduler", "sigma_min": 90.0}, "sigma_min < sigma_max"),
    ],
)
def test_what_is_not_known_is_refused(config, words):
    with pytest.raises(CheckpointError, match=words):
        schedulers.from_config(config)
