"""From one path to another: there and back, and a network trained on one path sampled on another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

PATHS = {
    "vp": D.VP(D.linear_betas()),
    "zero_snr": D.VP(D.rescale_zero_terminal_snr(D.scaled_linear_betas())),
    "continuous_vp": D.ContinuousVP(),
    "edm": D.EDM(),
    "flow": D.Flow(),
    "gvp": D.Interpolant("gvp"),
    "gamma": D.Interpolant("linear", gamma=(0.001, 0.1)),
}
names = st.sampled_from(sorted(PATHS))


@given(start=names, end=names, log_ratio=st.floats(np.log(0.02), np.log(79)))
def test_there_and_back(start, end, log_ratio):
    start, end = PATHS[start], PATHS[end]
    t = start.time(np.exp(log_ratio))
    t_there, scale_there = D.convert_time(t, start, end)
    t_back, scale_back = D.convert_time(t_there, end, start)
    assert t_back == pytest.approx(t, rel=1e-8, abs=1e-9)
    assert scale_there * scale_back == pytest.approx(1, rel=1e-10)
    # x_t of the one path, scaled, is x_t of the other: the same share of image and of noise.
    assert scale_there * start.alpha(t) == pytest.approx(end.alpha(t_there), rel=1e-8)
    assert scale_there * start.sigma(t) == pytest.approx(end.sigma(t_there), rel=1e-8)


def test_the_ends():
    for path in PATHS.values():
        t, scale = D.convert_time(path.t_clean, path, PATHS["flow"])
        assert (t, scale) == (0, 1)
    t, scale = D.convert_time(np.array([1.0, 0.5]), PATHS["flow"], PATHS["gvp"])
    np.testing.assert_allclose(t, [1, 0.5])
    np.testing.assert_allclose(scale, [1, np.sqrt(2)])
    for name in ("vp", "edm"):
        with pytest.raises(InvalidArgumentError, match=f"noisier than the {name} path"):
            D.convert_time(1.0, PATHS["flow"], PATHS[name])
    with pytest.raises(InvalidArgumentError, match="times of the vp path run from -1 to 999"):
        D.convert_time(np.array([3.0, 1000.0]), PATHS["vp"], PATHS["flow"])
    with pytest.raises(InvalidArgumentError, match="got NaN"):
        D.convert_time(np.nan, PATHS["flow"], PATHS["gvp"])


def test_on_the_device_what_is_too_noisy_is_clamped():
    t, _ = jax.jit(lambda t: D.convert_time(t, PATHS["flow"], PATHS["edm"]))(jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(t, [80, 1], rtol=1e-6)


@pytest.mark.parametrize("trained", PATHS)
def test_a_network_answers_on_every_path(x64, trained):
    """The exact denoiser of one path, brought to another, is the exact denoiser of the other."""
    x = jnp.linspace(-2, 2, 6).reshape(2, 3)
    for path in PATHS.values():
        network = D.on_path(D.gaussian_denoiser(PATHS[trained], 0.3, 0.5), path)
        assert network.path is path
        t = jnp.asarray(path.time(np.array([0.05, 40.0])))
        np.testing.assert_allclose(network(x, t), D.gaussian_denoiser(path, 0.3, 0.5)(x, t), rtol=1e-7)


def test_a_network_trained_on_ddpm_samples_on_the_flow_path():
    flow = PATHS["flow"]
    grid = D.make_grid(flow, 6)
    x_T = D.initial_noise(jax.random.key(0), (2, 3), grid)
    runs = [
        D.sample(jax.random.key(0), denoise, D.solvers.ddim(), grid, x_T)
        for denoise in (
            D.on_path(D.gaussian_denoiser(PATHS["zero_snr"], 0.3, 0.5), flow),
            D.gaussian_denoiser(flow, 0.3, 0.5),
        )
    ]
    np.testing.assert_allclose(*runs, rtol=1e-4, atol=1e-5)


def test_a_plain_function_does_not_say_its_path():
    with pytest.raises(InvalidArgumentError, match=r"D\.Denoiser"):
        D.on_path(lambda x, t: x, PATHS["flow"])
