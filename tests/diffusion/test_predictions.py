import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.diffusion.predictions import x0_error_per_output_error
from jaxldm.errors import InvalidArgumentError, UnknownNameError

PATHS = {
    "vp": D.vp_path(D.linear_betas()),
    "zero_snr": D.vp_path(D.rescale_zero_terminal_snr(D.linear_betas())),
    "edm": D.edm_path(),
    "flow": D.flow_path(),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
every_prediction = pytest.mark.parametrize("prediction", D.PREDICTIONS)


def noised(seed, alpha, sigma, shape=(3, 2, 2, 1)):
    x_0, epsilon = np.random.default_rng(seed).standard_normal((2, *shape))
    return x_0, epsilon, alpha * x_0 + sigma * epsilon


@every_path
@every_prediction
@given(part=st.floats(0.01, 0.99), seed=st.integers(0, 2**32 - 1))
def test_round_trips(path, prediction, part, seed):
    t = path.t_min + part * (path.t_noisy - path.t_min)
    alpha, sigma = path.alpha(t), path.sigma(t)
    x_0, epsilon, x_t = noised(seed, alpha, sigma)
    output = D.target(prediction, x_0, epsilon, alpha, sigma)
    np.testing.assert_allclose(D.to_x0(prediction, output, x_t, alpha, sigma), x_0, atol=1e-9)
    np.testing.assert_allclose(D.from_x0(prediction, x_0, x_t, alpha, sigma), output, atol=1e-9)
    # And from any prediction to any other, by way of x_0.
    for other in D.PREDICTIONS:
        there = D.from_x0(other, D.to_x0(prediction, output, x_t, alpha, sigma), x_t, alpha, sigma)
        np.testing.assert_allclose(there, D.target(other, x_0, epsilon, alpha, sigma), atol=1e-9)


@every_prediction
def test_one_time_per_image(prediction):
    alpha, sigma = np.array([0.9, 0.5, 0.2]), np.array([0.3, 0.7, 1.1])
    x_0, epsilon, x_t = noised(0, alpha.reshape(3, 1, 1, 1), sigma.reshape(3, 1, 1, 1))
    together = D.target(prediction, x_0, epsilon, alpha, sigma)
    for k in range(3):
        alone = slice(k, k + 1)
        np.testing.assert_allclose(
            together[alone], D.target(prediction, x_0[alone], epsilon[alone], alpha[k], sigma[k])
        )
    np.testing.assert_allclose(
        D.to_x0(prediction, jnp.asarray(together), jnp.asarray(x_t), jnp.asarray(alpha), jnp.asarray(sigma)),
        x_0,
        atol=1e-5,
    )


def test_v_is_that_of_diffusers():
    path, reference = PATHS["vp"], diffusers.DDPMScheduler()
    timesteps = np.array([0, 400, 999])
    x_0, epsilon, _ = noised(1, 1, 0)
    expected = reference.get_velocity(
        torch.from_numpy(x_0), torch.from_numpy(epsilon), torch.from_numpy(timesteps)
    )
    ours = D.target("v_prediction", x_0, epsilon, path.alpha(timesteps), path.sigma(timesteps))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_v_is_the_derivative_along_the_angle(x64):
    x_0, epsilon, _ = noised(2, 1, 0)
    angle = 0.7
    derivative = jax.jvp(lambda a: jnp.cos(a) * x_0 + jnp.sin(a) * epsilon, (angle,), (1.0,))[1]
    np.testing.assert_allclose(
        D.target("v_prediction", x_0, epsilon, np.cos(angle), np.sin(angle)), derivative
    )


def test_flow_is_the_derivative_along_the_flow_path(x64):
    x_0, epsilon, _ = noised(3, 1, 0)
    path = PATHS["flow"]
    derivative = jax.jvp(
        lambda t: path.alpha(t) * x_0 + path.sigma(t) * epsilon, (jnp.float64(0.3),), (jnp.float64(1.0),)
    )[1]
    np.testing.assert_allclose(D.target("flow", x_0, epsilon, 0.7, 0.3), derivative)


@every_prediction
@given(alpha=st.floats(0.01, 1), sigma=st.floats(0.01, 80))
def test_how_an_error_of_the_output_moves_x0(prediction, alpha, sigma):
    slope = D.to_x0(prediction, 1.0, 0.3, alpha, sigma) - D.to_x0(prediction, 0.0, 0.3, alpha, sigma)
    assert x0_error_per_output_error(prediction, alpha, sigma) == pytest.approx(abs(slope), rel=1e-6)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "flow"])
def test_finite_where_nothing_is_left_of_the_image(prediction):
    x_0, epsilon, x_t = noised(4, 0, 1)
    output = D.target(prediction, x_0, epsilon, 0.0, 1.0)
    np.testing.assert_allclose(D.to_x0(prediction, output, x_t, 0.0, 1.0), x_0, atol=1e-12)


@every_prediction
def test_finite_where_no_noise_is_left(prediction):
    x_0, _, x_t = noised(5, 1, 0)
    output = D.from_x0(prediction, x_0, x_t, 1.0, 0.0)
    assert np.isfinite(output).all()
    np.testing.assert_allclose(D.to_x0(prediction, output, x_t, 1.0, 0.0), x_0, atol=1e-12)


@pytest.mark.parametrize("path", [PATHS["zero_snr"], PATHS["flow"]])
def test_epsilon_is_refused_where_the_path_ends_in_noise(path):
    with pytest.raises(InvalidArgumentError, match="v_prediction"):
        D.denoiser(lambda x, t: x, path, "epsilon")
    with pytest.raises(InvalidArgumentError, match="v_prediction"):
        D.diffusion_loss(
            jax.random.key(0), lambda x, t, c: x, path, jnp.ones((2, 2, 2, 1)), min_snr_gamma=5.0
        )


def test_unknown_prediction():
    for call in (
        lambda: D.denoiser(lambda x, t: x, PATHS["vp"], "eps"),
        lambda: D.to_x0("eps", 0, 0, 1, 1),
        lambda: D.from_x0("eps", 0, 0, 1, 1),
        lambda: D.target("eps", 0, 0, 1, 1),
    ):
        with pytest.raises(UnknownNameError, match="choose one of epsilon, sample"):
            call()
