import dataclasses

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

VP = D.VP(D.linear_betas())
ZERO_SNR = D.VP(D.rescale_zero_terminal_snr(D.scaled_linear_betas()))


@dataclasses.dataclass(frozen=True)
class Quadratic(D.Path):
    """A path of one's own: the example of `D.Path`."""

    name = "quadratic"
    t_min: float = 1e-3

    def coefficients(self, xp, t):
        return 1 - t**2, t

    def time_of(self, xp, ratio):
        ratio = xp.minimum(ratio, 1e12)
        return 2 * ratio / (1 + xp.sqrt(1 + 4 * ratio**2))


PATHS = {
    "vp": VP,
    "zero_snr": ZERO_SNR,
    "cosine": D.VP(D.cosine_betas()),
    "edm": D.EDM(),
    "flow": D.Flow(),
    "continuous_vp": D.ContinuousVP(),
    "constant_vp": D.ContinuousVP(beta_min=3.0, beta_max=3.0),
    "linear": D.Interpolant("linear"),
    "gvp": D.Interpolant("gvp"),
    "vp_interpolant": D.Interpolant("vp"),
    "linear_gamma": D.Interpolant("linear", gamma=(0.001, 0.1)),
    "gvp_gamma": D.Interpolant("gvp", gamma=(0.001, 0.1)),
    "vp_gamma": D.Interpolant("vp", gamma=(0.0, 0.3)),
    "own": Quadratic(),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@every_path
def test_the_ends_of_a_path(path):
    assert (path.alpha(path.t_clean), path.sigma(path.t_clean)) == (1, 0)
    assert path.time(0.0) == path.t_clean
    assert path.t_clean < path.t_min < path.t_noisy
    if path.zero_terminal_snr:
        assert path.time(np.inf) == pytest.approx(path.t_noisy, rel=1e-11)
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
    continuous, errors = D.ContinuousVP(beta_min=0.1, beta_max=20.0), []
    for total in (1000, 10000):
        discrete = D.VP(D.linear_betas(total, 0.1 / total, 20 / total))
        at = np.arange(total // 10 - 1, total, total // 10)
        errors.append(np.abs(discrete.alpha(at) - continuous.alpha((at + 1) / total)).max())
    assert errors[0] < 1e-2 and errors[0] / errors[1] == pytest.approx(10, rel=0.05)


@every_path
def test_schedules_never_run_in_bfloat16(path):
    t = jnp.asarray(path.t_noisy / 2, jnp.bfloat16)
    assert path.alpha(t).dtype == path.sigma(t).dtype == jnp.float32
    assert path.sigma(t) == pytest.approx(float(path.sigma(np.float32(t))), rel=1e-5)


def drawn(path, time=None, count=5000, seed=0):
    time = D.uniform() if time is None else time
    return np.asarray(time(jax.random.key(seed), (count,), path))


def test_training_times():
    draws = drawn(VP, count=20000)
    assert draws.dtype == np.float32 and set(draws) <= set(range(1000))
    assert stats.chisquare(np.bincount(draws.astype(int), minlength=1000)).pvalue > 1e-3
    for path in (D.Flow(), D.Interpolant("gvp", gamma=(0.1, 0.2))):
        assert stats.kstest(drawn(path), "uniform").pvalue > 1e-3
    for path in (D.ContinuousVP(t_min=0.2), D.Interpolant("vp", t_min=0.2), Quadratic(0.2)):
        assert stats.kstest(drawn(path), "uniform", (0.2, 0.8)).pvalue > 1e-3
    logits = drawn(Quadratic(0.2), D.logit_normal())
    assert stats.kstest((logits - 0.2) / 0.8, lambda t: stats.norm.cdf(np.log(t / (1 - t)))).pvalue > 1e-3


def test_log_normal_levels_on_every_continuous_path():
    """ln(sigma / alpha) ~ N(-1.2, 1.2^2), EDM's, on EDM's path and on others."""
    for path in (D.EDM(), D.Flow(), D.Interpolant("gvp")):
        t = drawn(path, D.log_normal()).astype(np.float64)
        level = np.log(path.sigma(t) / path.alpha(t))
        assert stats.kstest(level, stats.norm(-1.2, 1.2).cdf).pvalue > 1e-3


def test_training_times_by_name():
    for name in D.TRAINING_TIMES:
        np.testing.assert_array_equal(
            drawn(D.Flow(), D.training_times(name)), drawn(D.Flow(), D.TRAINING_TIMES[name]())
        )
    options = {"mean": 0.5, "std": 0.7}
    np.testing.assert_array_equal(
        drawn(D.Flow(), D.training_times("logit_normal", **options)),
        drawn(D.Flow(), D.logit_normal(0.5, 0.7)),
    )


# The distribution function of t, from its quantile function where it has no closed form (SD3, section 3.1).
def mode_cdf(t, scale):
    u = np.linspace(1, 0, 100001)  # t falls with u
    return np.interp(t, 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u), 1 - u)


@pytest.mark.parametrize(
    "time, shift, cdf",
    [
        (D.logit_normal(), 1.0, lambda t: stats.norm.cdf(np.log(t / (1 - t)))),
        (D.logit_normal(0.5, 0.7), 1.0, lambda t: stats.norm.cdf(np.log(t / (1 - t)), 0.5, 0.7)),
        (D.mode(), 1.0, lambda t: mode_cdf(t, 1.29)),
        (D.mode(-1.0), 1.0, lambda t: mode_cdf(t, -1.0)),
        # The density 2 / (pi - 2 pi t + 2 pi t^2), integrated.
        (D.cosmap(), 1.0, lambda t: 0.5 + 2 / np.pi * np.arctan(2 * t - 1)),
        # The shift maps t to 3 t / (1 + 2 t); back it is t / (3 - 2 t).
        (D.uniform(), 3.0, lambda t: t / (3 - 2 * t)),
        (D.cosmap(), 3.0, lambda t: 0.5 + 2 / np.pi * np.arctan(2 * t / (3 - 2 * t) - 1)),
    ],
    ids=["logit_normal", "logit_normal(0.5, 0.7)", "mode", "mode(-1)", "cosmap", "shift", "cosmap and shift"],
)
def test_training_times_of_flow_paths(time, shift, cdf):
    t = drawn(D.Flow(shift=shift), time, seed=1)
    assert t.dtype == np.float32 and (t >= 0).all() and (t <= 1).all()
    assert stats.kstest(t.astype(np.float64), cdf).pvalue > 1e-3


def test_equal_paths_are_equal():
    again = [
        (D.VP(D.linear_betas().tolist()), D.VP.named("linear")),
        (D.EDM(), D.EDM(sigma_max=80)),
        (D.Flow(shift=3), D.Flow(shift=3.0)),
        (D.ContinuousVP(), D.ContinuousVP(beta_max=20)),
        (D.Interpolant("gvp", gamma=[0, 1e-3]), D.Interpolant("gvp", gamma=(0.0, 0.001))),
        (D.Cosine(), D.Cosine(scaler=1)),
        (Quadratic(), Quadratic()),
    ]
    for one, other in again:
        assert one == other and hash(one) == hash(other) and repr(one)
    assert len({path for pair in again for path in pair}) == len(again)
    assert D.Flow(shift=3) != D.Flow() and D.VP.named("linear") != D.VP.named("scaled_linear")
    with pytest.raises(dataclasses.FrozenInstanceError):
        D.Flow().shift = 2.0


def test_named_betas_are_remembered():
    path = D.VP.named("scaled_linear", 500, beta_end=0.02, zero_terminal_snr=True)
    betas = D.rescale_zero_terminal_snr(D.scaled_linear_betas(500, 0.00085, 0.02))
    assert path == D.VP(betas) and path.zero_terminal_snr
    assert path.schedule == D.BetaSchedule("scaled_linear", 500, None, 0.02, True)
    assert D.VP(betas).schedule is None and "scaled_linear" in repr(path) and len(repr(D.VP(betas))) < 40
    for name in D.BETAS:
        assert D.VP.named(name, 10).num_train_timesteps == 10


def test_a_path_of_ones_own_trains_and_samples():
    """The exact denoiser, through its velocity: DDIM's steps on it are those of the same grid on GVP."""
    path, other = Quadratic(), D.Interpolant("gvp")
    exact = D.gaussian_denoiser(path, 0.3, 0.5)
    prediction = D.velocity(path)
    denoise = D.denoiser(lambda x, t: D.from_x0(prediction, exact(x, t), x, t), prediction)
    grid = D.make_grid(path, 6)
    same = D.at_times(other, other.time(np.minimum(grid.sigma, 1e9) / np.maximum(grid.alpha, 1e-9))[:-1])
    key, x = jax.random.key(0), jnp.linspace(-2, 2, 6).reshape(2, 3)
    on_other = D.sample(key, D.gaussian_denoiser(other, 0.3, 0.5), D.solvers.ddim(), same, x)
    np.testing.assert_allclose(
        D.sample(key, denoise, D.solvers.ddim(), grid, x), on_other, rtol=1e-4, atol=1e-5
    )
    loss, _ = D.diffusion_loss(key, lambda x, t, c: x, prediction, x)
    assert np.isfinite(loss)


def test_shift_grows_with_the_resolution():
    assert [D.resolution_shift(n) for n in (256, 4096)] == pytest.approx(np.exp([0.5, 1.15]))
    assert D.resolution_shift(2176, kind="linear") == pytest.approx(0.825)
    assert D.resolution_shift(4096, base_shift=0.0, max_shift=0.0) == 1


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: D.VP(np.array([0.1, 1.5])), "beta"),
        (lambda: D.VP(np.array([0.1, np.nan])), "beta"),
        (lambda: D.VP(np.array([1.0, 0.1])), "only the last|the last may be 1"),
        (lambda: D.VP(np.array([0.1])), "at least 2"),
        (lambda: D.EDM(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda: D.EDM(sigma_min=0.0), "sigma_min"),
        (lambda: D.Flow(t_min=0.0), "t_min"),
        (lambda: D.Flow(shift=0.0), "shift must be a positive"),
        (lambda: D.Flow(shift=np.nan), "shift must be a positive"),
        (lambda: D.mode(2.0), "1.75"),
        (lambda: D.logit_normal(std=0.0), "std > 0"),
        (lambda: D.log_normal(std=-1.0), "std > 0"),
        (lambda: drawn(VP, D.logit_normal()), "use uniform"),
        (lambda: drawn(VP, D.log_normal()), "use uniform"),
        (lambda: D.VP.named("linear", 1), "num_train_timesteps must be .* from 2"),
        (lambda: D.ContinuousVP(beta_min=0.0), "beta_min"),
        (lambda: D.ContinuousVP(t_min=1.0), "t_min"),
        (lambda: D.Interpolant(t_min=1.0), "t_min"),
        (lambda: D.Interpolant(gamma=(0.2, 0.1)), "smin <= smax"),
        (lambda: D.Interpolant("vp", gamma=(0.0, 20.0)), "too large"),
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
        (lambda: D.training_times("unifrom"), "did you mean 'uniform'"),
        (lambda: D.VP.named("linaer"), "did you mean 'linear'"),
        (lambda: D.Interpolant("gpv"), "did you mean 'gvp'"),
        (lambda: D.resolution_shift(256, kind="linaer"), "did you mean 'linear'"),
    ],
)
def test_unknown_names(make, words):
    with pytest.raises(UnknownNameError, match=words):
        make()


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray, np.float64])
def test_scalar_arrays_are_numbers_of_a_path(make):
    path = D.Flow(shift=make(3.0))
    assert path == D.Flow(shift=3.0) and hash(path) == hash(D.Flow(shift=3.0))


def test_name_in_place_of_betas_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"D\.VP\.named\('linear'\)"):
        D.VP("linear")
