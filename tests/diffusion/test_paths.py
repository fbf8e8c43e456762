import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError, UnknownNameError

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # the clean and the noisy end included

VP = D.vp_path(D.linear_betas())
ZERO_SNR = D.vp_path(D.rescale_zero_terminal_snr(D.scaled_linear_betas()))
PATHS = {
    "vp": VP,
    "zero_snr": ZERO_SNR,
    "cosine": D.vp_path(D.cosine_betas()),
    "edm": D.edm_path(),
    "flow": D.flow_path(),
    "continuous_vp": D.continuous_vp_path(),
    "constant_vp": D.continuous_vp_path(3.0, 3.0),
    "linear": D.interpolant_path("linear"),
    "gvp": D.interpolant_path("gvp"),
    "vp_interpolant": D.interpolant_path("vp"),
    "linear_gamma": D.interpolant_path("linear", gamma=(0.001, 0.1)),
    "gvp_gamma": D.interpolant_path("gvp", gamma=(0.001, 0.1)),
    "vp_gamma": D.interpolant_path("vp", gamma=(0.0, 0.3)),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@every_path
def test_the_ends_of_a_path(path):
    assert (path.alpha(path.t_clean), path.sigma(path.t_clean)) == (1, 0)
    assert path.time(0.0) == path.t_clean
    assert path.t_clean < path.t_min < path.t_noisy
    if path.zero_terminal_snr:
        assert path.time(np.inf) == path.t_noisy
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


# (d alpha/dt, d sigma/dt) by hand.
BETA = lambda t: 0.1 + 19.9 * t  # noqa: E731
CLOSED_DERIVATIVES = {
    "edm": lambda t, a, s: (0 * t, 1 + 0 * t),
    "flow": lambda t, a, s: (-1 + 0 * t, 1 + 0 * t),
    "continuous_vp": lambda t, a, s: (-BETA(t) * a / 2, BETA(t) * a**2 / (2 * s)),
    "constant_vp": lambda t, a, s: (-3 * a / 2, 3 * a**2 / (2 * s)),
    "linear": lambda t, a, s: (-1 + 0 * t, 1 + 0 * t),
    "gvp": lambda t, a, s: (-np.pi / 2 * s, np.pi / 2 * a),
    "vp_interpolant": lambda t, a, s: (-BETA(t) * a / 2, BETA(t) * a**2 / (2 * s)),
}


@pytest.mark.parametrize("name", CLOSED_DERIVATIVES)
def test_derivatives_are_the_closed_forms(name):
    path = PATHS[name]
    t = path.t_min + np.linspace(0, 1, 9) * (path.t_noisy - path.t_min)
    closed = CLOSED_DERIVATIVES[name](t, path.alpha(t), path.sigma(t))
    np.testing.assert_allclose(path.derivatives(t), closed, rtol=1e-10, atol=1e-12)
    device = path.derivatives(jnp.asarray(t, jnp.float32))
    assert device[0].dtype == device[1].dtype == jnp.float32
    np.testing.assert_allclose(device, closed, rtol=1e-3, atol=1e-4)


def test_derivatives_between_timesteps_are_slopes():
    t, step = np.array([0.5, 500.25, 998.5]), 1e-4
    for value, slope in zip((VP.alpha, VP.sigma), VP.derivatives(t), strict=True):
        np.testing.assert_allclose(slope, (value(t + step) - value(t - step)) / (2 * step), rtol=1e-6)


def test_the_continuous_path_is_the_limit_of_ddpm():
    """T betas from 0.1 / T to 20 / T: the distance to the VP-SDE falls like 1 / T."""
    continuous, errors = D.continuous_vp_path(0.1, 20.0), []
    for total in (1000, 10000):
        discrete = D.vp_path(D.linear_betas(total, 0.1 / total, 20 / total))
        at = np.arange(total // 10 - 1, total, total // 10)
        errors.append(np.abs(discrete.alpha(at) - continuous.alpha((at + 1) / total)).max())
    assert errors[0] < 1e-2 and errors[0] / errors[1] == pytest.approx(10, rel=0.05)


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
    for path in (D.continuous_vp_path(t_min=0.2), D.interpolant_path("vp", t_min=0.2)):
        assert stats.kstest(np.asarray(path.sample_time(key, (5000,))), "uniform", (0.2, 0.8)).pvalue > 1e-3


# The distribution function of t, from its quantile function where it has no closed form (SD3, section 3.1).
def mode_cdf(t, scale):
    u = np.linspace(1, 0, 100001)  # t falls with u
    return np.interp(t, 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u), 1 - u)


@pytest.mark.parametrize(
    "options, cdf",
    [
        ({"time_distribution": "logit_normal"}, lambda t: stats.norm.cdf(np.log(t / (1 - t)))),
        (
            {"time_distribution": "logit_normal", "logit_mean": 0.5, "logit_std": 0.7},
            lambda t: stats.norm.cdf(np.log(t / (1 - t)), 0.5, 0.7),
        ),
        ({"time_distribution": "mode"}, lambda t: mode_cdf(t, 1.29)),
        ({"time_distribution": "mode", "mode_scale": -1.0}, lambda t: mode_cdf(t, -1.0)),
        # The density 2 / (pi - 2 pi t + 2 pi t^2), integrated.
        ({"time_distribution": "cosmap"}, lambda t: 0.5 + 2 / np.pi * np.arctan(2 * t - 1)),
        # The shift maps t to 3 t / (1 + 2 t); back it is t / (3 - 2 t).
        ({"shift": 3.0}, lambda t: t / (3 - 2 * t)),
        (
            {"time_distribution": "cosmap", "shift": 3.0},
            lambda t: 0.5 + 2 / np.pi * np.arctan(2 * t / (3 - 2 * t) - 1),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "cdf",
)
def test_training_times_of_flow_paths(options, cdf):
    t = D.flow_path(**options).sample_time(jax.random.key(1), (5000,))
    assert t.dtype == jnp.float32 and (t >= 0).all() and (t <= 1).all()
    assert stats.kstest(np.asarray(t, np.float64), cdf).pvalue > 1e-3


def test_shift_grows_with_the_resolution():
    assert [D.resolution_shift(n) for n in (256, 4096)] == pytest.approx(np.exp([0.5, 1.15]))
    assert D.resolution_shift(2176, kind="linear") == pytest.approx(0.825)
    assert D.resolution_shift(4096, base_shift=0.0, max_shift=0.0) == 1


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: D.vp_path(np.array([0.1, 1.5])), "beta"),
        (lambda: D.vp_path(np.array([0.1, np.nan])), "beta"),
        (lambda: D.vp_path(np.array([1.0, 0.1])), "only the last|the last may be 1"),
        (lambda: D.vp_path(np.array([0.1])), "at least 2"),
        (lambda: D.edm_path(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda: D.edm_path(sigma_data=0.0), "sigma_data"),
        (lambda: D.flow_path(t_min=0.0), "t_min"),
        (lambda: D.flow_path(shift=0.0), "shift must be a positive"),
        (lambda: D.flow_path(shift=np.nan), "shift must be a positive"),
        (lambda: D.flow_path(time_distribution="mode", mode_scale=2.0), "1.75"),
        (lambda: D.flow_path(time_distribution="logit_normal", logit_std=0.0), "logit_std"),
        (lambda: D.continuous_vp_path(beta_min=0.0), "beta_min"),
        (lambda: D.continuous_vp_path(t_min=1.0), "t_min"),
        (lambda: D.interpolant_path(t_min=1.0), "t_min"),
        (lambda: D.interpolant_path(gamma=(0.2, 0.1)), "smin <= smax"),
        (lambda: D.interpolant_path("vp", gamma=(0.0, 20.0)), "too large"),
        (lambda: D.resolution_shift(0), "at least 1 token"),
        (lambda: D.resolution_shift(64, kind="linear", base_shift=-1.0), "not positive"),
        (lambda: D.resolution_shift(64, base_tokens=9, max_tokens=9), "two different ends"),
    ],
)
def test_impossible_paths_are_refused(make, words):
    with pytest.raises(InvalidArgumentError, match=words):
        make()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: D.flow_path(time_distribution="unifrom"), "did you mean 'uniform'"),
        (lambda: D.interpolant_path(time_distribution="mod"), "did you mean 'mode'"),
        (lambda: D.interpolant_path("gpv"), "did you mean 'gvp'"),
        (lambda: D.resolution_shift(256, kind="linaer"), "did you mean 'linear'"),
    ],
)
def test_unknown_names(make, words):
    with pytest.raises(UnknownNameError, match=words):
        make()
