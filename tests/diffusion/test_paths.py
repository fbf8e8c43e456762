import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError, UnknownNameError

VP = D.vp_path(D.linear_betas())
ZERO_SNR = D.vp_path(D.rescale_zero_terminal_snr(D.scaled_linear_betas()))
PATHS = {
    "vp": VP,
    "zero_snr": ZERO_SNR,
    "cosine": D.vp_path(D.cosine_betas()),
    "edm": D.edm_path(),
    "flow": D.flow_path(),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())

SCHEDULES = {
    "linear": (
        D.linear_betas(1000, 1e-4, 0.02),
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    ),
    "linear_short": (
        D.linear_betas(300, 5e-4, 0.05),
        {"beta_schedule": "linear", "beta_start": 5e-4, "beta_end": 0.05, "num_train_timesteps": 300},
    ),
    "scaled_linear": (
        D.scaled_linear_betas(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (D.cosine_betas(), {"beta_schedule": "squaredcos_cap_v2"}),
}


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_diffusers(name, rescale):
    betas, config = SCHEDULES[name]
    reference = diffusers.DDPMScheduler(**config, rescale_betas_zero_snr=rescale)
    betas = D.rescale_zero_terminal_snr(betas) if rescale else betas
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, reference.betas, rtol=1e-3 if rescale else 1e-6, atol=2e-7)
    path, steps = D.vp_path(betas), np.arange(len(betas))
    # The reference multiplies in float32: its small alphas_cumprod are off by some 1e-5 of themselves.
    np.testing.assert_allclose(path.alpha(steps) ** 2, reference.alphas_cumprod, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(path.sigma(steps) ** 2, 1 - reference.alphas_cumprod, rtol=1e-3, atol=3e-7)


@pytest.mark.parametrize("betas", [D.linear_betas(), D.scaled_linear_betas(), D.cosine_betas()])
def test_zero_terminal_snr_shifts_and_scales_the_root(betas):
    root = np.sqrt(np.cumprod(1 - betas))
    rescaled = np.sqrt(np.cumprod(1 - D.rescale_zero_terminal_snr(betas)))
    assert rescaled[-1] == 0
    assert rescaled[0] == pytest.approx(root[0], rel=1e-12)
    slopes = np.diff(rescaled) / np.diff(root)  # an affine map has one slope
    np.testing.assert_allclose(slopes, root[0] / (root[0] - root[-1]), rtol=1e-6)
    assert D.vp_path(D.rescale_zero_terminal_snr(betas)).zero_terminal_snr
    assert not D.vp_path(betas).zero_terminal_snr


@every_path
def test_the_ends_of_a_path(path):
    assert (path.alpha(path.t_clean), path.sigma(path.t_clean)) == (1, 0)
    assert path.time(0.0) == path.t_clean
    assert path.t_clean < path.t_min < path.t_noisy
    t = np.linspace(path.t_clean, path.t_noisy, 3001)
    assert (np.diff(np.arctan2(path.sigma(t), path.alpha(t))) > 0).all()


@every_path
@given(part=st.floats(0, 1))
def test_time_inverts_sigma_over_alpha(path, part):
    t = path.t_clean + part * (path.t_noisy - path.t_clean)
    with np.errstate(divide="ignore"):
        ratio = path.sigma(t) / path.alpha(t)
    assert path.time(ratio) == pytest.approx(t, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("path", [VP, ZERO_SNR])
@given(t=st.floats(0, 998), part=st.floats(0, 1))
def test_log_snr_is_linear_between_timesteps(path, t, part):
    low = np.floor(t) - (t == 998)
    log_snr = np.log(path.alpha(low + np.array([0, part, 1])) / path.sigma(low + np.array([0, part, 1])))
    assert log_snr[1] == pytest.approx((1 - part) * log_snr[0] + part * log_snr[2], abs=1e-9)


@every_path
def test_device_agrees_with_host(path):
    t = np.linspace(path.t_clean, path.t_noisy, 41, dtype=np.float32)
    for function in (path.alpha, path.sigma):
        host, device = function(t), function(jnp.asarray(t))
        assert host.dtype == np.float64 and device.dtype == jnp.float32
        np.testing.assert_allclose(device, host, rtol=1e-5, atol=1e-7)
    ratio = path.sigma(t[:-1]) / path.alpha(t[:-1])
    np.testing.assert_allclose(path.time(jnp.asarray(ratio, jnp.float32)), t[:-1], rtol=1e-4, atol=1e-4)


@every_path
def test_schedules_never_run_in_bfloat16(path):
    t = jnp.asarray(path.t_noisy / 2, jnp.bfloat16)
    assert path.alpha(t).dtype == path.sigma(t).dtype == jnp.float32
    assert path.sigma(t) == pytest.approx(float(path.sigma(np.float32(t))), rel=1e-5)


def test_training_times():
    key = jax.random.key(0)
    draws = np.asarray(VP.sample_time(key, (20000,)))
    assert draws.dtype == np.float32 and set(draws) <= set(range(1000))
    assert stats.chisquare(np.bincount(draws.astype(int), minlength=1000)).pvalue > 1e-3
    assert stats.kstest(np.log(D.edm_path().sample_time(key, (5000,))), "norm", (-1.2, 1.2)).pvalue > 1e-3
    assert stats.kstest(np.asarray(D.flow_path().sample_time(key, (5000,))), "uniform").pvalue > 1e-3
    t = np.asarray(D.flow_path(time_distribution="logit_normal").sample_time(key, (5000,)), np.float64)
    assert stats.kstest(np.log(t / (1 - t)), "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: D.vp_path(np.array([0.1, 1.5])), "beta"),
        (lambda: D.vp_path(np.array([0.1, np.nan])), "beta"),
        (lambda: D.vp_path(np.array([1.0, 0.1])), "only the last|the last may be 1"),
        (lambda: D.vp_path(np.array([0.1])), "at least 2"),
        (lambda: D.linear_betas(1000, -1e-4), "beta"),
        (lambda: D.edm_path(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda: D.edm_path(sigma_data=0.0), "sigma_data"),
        (lambda: D.flow_path(t_min=0.0), "t_min"),
    ],
)
def test_impossible_paths_are_refused(make, words):
    with pytest.raises(InvalidArgumentError, match=words):
        make()


def test_unknown_time_distribution():
    with pytest.raises(UnknownNameError, match="did you mean 'uniform'"):
        D.flow_path(time_distribution="unifrom")
