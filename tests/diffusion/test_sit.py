"""SiT's samplers against the paper's own equations, in the paper's own time (0 is noise, 1 is data)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_schedulers import SEED, SHAPE, assert_close, start_noise, step_noise

from jaxldm import diffusion as D
from jaxldm.diffusion.solvers.flow import rates
from jaxldm.diffusion.solvers.sit import DIFFUSIONS, LAST_STEPS, diffusion_coefficient
from jaxldm.errors import InvalidArgumentError, UnknownNameError

NOISE = start_noise()
KEY = jax.random.key(SEED)
NUM_STEPS, LAST_STEP_SIZE = 10, 0.08
# The paper's interpolants: alpha, sigma and their derivatives as functions of its own time.
PATHS = {
    "linear": lambda t: (t, 1.0, 1 - t, -1.0),
    "gvp": lambda t: (
        np.sin(np.pi / 2 * t),
        np.pi / 2 * np.cos(np.pi / 2 * t),
        np.cos(np.pi / 2 * t),
        -np.pi / 2 * np.sin(np.pi / 2 * t),
    ),
}


def clean_image(x, t, xp):
    """A nonlinear stand-in for the network, as x_0; t is the paper's."""
    return xp.sin(1.5 * x + 0.4 * xp.roll(x, 1, axis=1) + t) * 0.8


def published(name, method, diffusion, last_step, t_first):
    """The samplers of Ma et al. 2024: velocity, score from velocity, SDE step, last step. Float64."""

    def velocity(x, t):
        alpha, d_alpha, sigma, d_sigma = PATHS[name](t)
        x_0 = clean_image(x, t, np)
        return d_alpha * x_0 + d_sigma * (x - alpha * x_0) / sigma

    def score(x, t):
        alpha, d_alpha, sigma, d_sigma = PATHS[name](t)
        ratio = alpha / d_alpha
        return (ratio * velocity(x, t) - x) / (sigma**2 - ratio * d_sigma * sigma)

    def coefficient(t):
        alpha, d_alpha, sigma, d_sigma = PATHS[name](t)
        return {
            "SBDM": lambda: d_alpha / alpha * sigma**2 - sigma * d_sigma,
            "sigma": lambda: sigma,
            "linear": lambda: 1 - t,
            "decreasing": lambda: 0.25 * (np.cos(np.pi * t) + 1) ** 2,
            "increasing-decreasing": lambda: np.sin(np.pi * t) ** 2,
            "constant": lambda: 1.0,
        }[diffusion]()

    def drift(x, t):
        return velocity(x, t) + coefficient(t) * score(x, t)

    times = np.linspace(t_first, 1 - LAST_STEP_SIZE, NUM_STEPS)
    dt = times[1] - times[0]
    x = NOISE.astype(np.float64)
    for t, z in zip(times[:-1], step_noise(), strict=False):
        dw = np.sqrt(dt) * z.numpy()
        if method == "euler":
            x = x + drift(x, t) * dt + np.sqrt(2 * coefficient(t)) * dw
        else:
            x = x + np.sqrt(2 * coefficient(t)) * dw
            first = drift(x, t)
            x = x + dt / 2 * (first + drift(x + dt * first, t + dt))
    t = times[-1]
    alpha, _, sigma, _ = PATHS[name](t)
    if last_step == "none":
        return x
    return {
        "mean": lambda: x + LAST_STEP_SIZE * drift(x, t),
        "tweedie": lambda: x / alpha + sigma**2 / alpha * score(x, t),
        "euler": lambda: x + LAST_STEP_SIZE * velocity(x, t),
    }[last_step]()


CASES = [
    ("linear", "euler", "SBDM", "none"),
    ("gvp", "heun", "SBDM", "mean"),
    ("gvp", "euler", "sigma", "mean"),
    ("linear", "heun", "linear", "tweedie"),
    ("gvp", "euler", "decreasing", "euler"),
    ("gvp", "heun", "increasing-decreasing", "none"),
    ("linear", "euler", "constant", "tweedie"),
]


def test_the_cases_cover_everything():
    columns = [set(column) for column in zip(*CASES, strict=True)]
    assert columns == [set(PATHS), {"euler", "heun"}, set(DIFFUSIONS), set(LAST_STEPS)]


@pytest.mark.parametrize("name, method, diffusion, last_step", CASES)
def test_as_published(name, method, diffusion, last_step):
    path = D.Interpolant(name)
    t_first = 0.2 if diffusion == "SBDM" else 0.0  # at pure noise SBDM divides by 0 in the authors' code
    timesteps = 1 - np.linspace(t_first, 1 - LAST_STEP_SIZE, NUM_STEPS)
    grid = D.at_times(path, timesteps)
    grid = D.cut(grid, 0, NUM_STEPS - 1) if last_step == "none" else grid
    denoise = D.Denoiser(lambda x, t: clean_image(x, 1 - t.reshape(-1, 1, 1, 1), jnp), path)
    solver = D.solvers.sit_sde(method, diffusion, last_step=last_step)
    ours = jax.jit(lambda x: D.sample(KEY, denoise, solver, grid, x))(NOISE)
    assert_close(np.asarray(ours), published(name, method, diffusion, last_step, t_first), "")


@pytest.mark.parametrize(
    "method, twin", [("euler", "flow_euler"), ("heun", "flow_heun"), ("stochastic_heun", "flow_heun")]
)
def test_without_diffusion_it_is_the_ode(method, twin):
    path = D.Interpolant("gvp")
    grid = D.make_grid(path, 7)
    denoise = D.Denoiser(lambda x, t: clean_image(x, t.reshape(-1, 1, 1, 1), jnp), path)
    solvers = D.solvers.sit_sde(method, "SBDM", norm=0.0), D.solvers.make(twin)
    ours, theirs = (jax.jit(lambda x, s=s: D.sample(KEY, denoise, s, grid, x))(NOISE) for s in solvers)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_sbdm_is_the_forward_sde():
    """2 D = g(t)^2: beta on the variance-preserving path, d sigma^2/dt on the exploding one."""
    t = jnp.linspace(0.1, 0.9, 5)

    def twice_d(path, t):
        at = D.solvers.Row(t, path.alpha(t), path.sigma(t))
        return 2 * diffusion_coefficient("SBDM", path, at, at._replace(t=t - 0.1))

    np.testing.assert_allclose(twice_d(D.Interpolant("vp"), t), 0.1 + 19.9 * t, rtol=1e-3)
    np.testing.assert_allclose(twice_d(D.EDM(), t), 2 * t, rtol=1e-5)


def test_from_pure_noise_sbdm_forgets_its_start():
    path = D.Flow()
    denoise = D.Denoiser(lambda x, t: 0 * x + 0.3, path)
    grid = D.make_grid(path, 4)
    run = jax.jit(lambda x: D.sample(KEY, denoise, D.solvers.sit_sde("heun", "SBDM"), D.cut(grid, 0, 1), x))
    x = run(NOISE)
    np.testing.assert_array_equal(x, run(5 + 2 * NOISE))
    keys = jax.vmap(jax.random.fold_in, (0, None))(D.image_keys(KEY, SHAPE[0]), 0)
    z = D.solvers.noise_like(keys, jnp.zeros(SHAPE))
    np.testing.assert_allclose(x, 0.25 * 0.3 + 0.75 * z, rtol=1e-5, atol=1e-6)


def test_rates_at_the_ends_and_kinks():
    zero_snr = D.VP(D.rescale_zero_terminal_snr(D.linear_betas()))
    for path in (D.VP(D.linear_betas()), zero_snr, D.Flow(), D.Interpolant("vp")):
        for t in (path.t_noisy, path.t_clean, (path.t_noisy + path.t_clean) / 2):
            other = path.t_clean if t > path.t_clean else path.t_noisy
            here, there = (
                D.solvers.Row(jnp.float32(t), path.alpha(jnp.float32(t)), path.sigma(jnp.float32(t)))
                for t in (t, other)
            )
            assert np.isfinite(rates(path, here, there)).all()
    # Pure noise comes by a straight line from the last timestep but one.
    t = jnp.float32(zero_snr.t_noisy)
    here = D.solvers.Row(t, zero_snr.alpha(t), zero_snr.sigma(t))
    slope = zero_snr.alpha(zero_snr.t_noisy) - zero_snr.alpha(zero_snr.t_noisy - 1)
    assert float(rates(zero_snr, here, here._replace(t=t - 20))[0]) == pytest.approx(float(slope), rel=1e-2)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: D.solvers.sit_sde("rk4"), UnknownNameError, "stochastic_heun"),
        (lambda: D.solvers.sit_sde(diffusion="sbdm"), UnknownNameError, "SBDM"),
        (lambda: D.solvers.sit_sde(last_step="Mean"), UnknownNameError, "mean"),
        (lambda: D.solvers.sit_sde(norm=-1.0), InvalidArgumentError, "norm"),
        (lambda: D.solvers.sit_sde(norm=float("nan")), InvalidArgumentError, "norm"),
        (
            lambda: D.sample(KEY, lambda x, t: x, D.solvers.flow_heun(), D.make_grid(D.Flow(), 2), NOISE),
            InvalidArgumentError,
            r"D\.Denoiser",
        ),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_published_spelling():
    D.solvers.sit_sde(diffusion="inccreasing-decreasing", last_step=None)
