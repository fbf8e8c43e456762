"""Stochastic solvers on Gaussian data, where a run's distribution is known: weak order, samples, twins."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import other_solvers
import pytest
from affine_runs import marginal, weak_order
from reference_schedulers import SEED, assert_close, jax_network, network, start_noise, step_noise

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError, UnknownNameError

MEAN, STD = np.array([0.7, -0.4]), np.array([0.3, 0.8])
KEY = jax.random.key(SEED)
NOISE = start_noise()
VP, EDM, FLOW = D.VP(D.linear_betas()), D.EDM(), D.Flow(t_min=0.05)
GVP = D.Interpolant("gvp", t_min=0.05)
STEPS = (32, 64, 128, 256)


def even_in_log_snr(path):
    def grid_of(steps):
        ratios = [path.sigma(t) / path.alpha(t) for t in (0.98 * path.t_noisy, path.t_min)]
        t = path.time(np.geomspace(*ratios, steps + 1))
        return D.at_times(path, t[:-1], final="sigma_min")

    return grid_of


def even_in_time(path):
    def grid_of(steps):
        t = np.linspace(0.9 * path.t_noisy, path.t_min, steps + 1)
        return D.at_times(path, t[:-1], final="sigma_min")

    return grid_of


SIT = D.solvers.sit_sde
VP_INTERPOLANT = D.Interpolant("vp", t_min=0.05)
# solver, path, spacing, weak order
ORDERS = {
    "2m_sde, vp": (D.solvers.dpmpp_2m_sde(), VP, even_in_log_snr, 2),
    "2m_sde eta 0.5, edm": (D.solvers.dpmpp_2m_sde(0.5), EDM, even_in_log_snr, 2),
    "3m_sde, vp": (D.solvers.dpmpp_3m_sde(), VP, even_in_log_snr, 2),
    "dpm_sde, vp": (D.solvers.dpm_sde(), VP, even_in_log_snr, 2),
    "dpm_sde eta 0.5, edm": (D.solvers.dpm_sde(eta=0.5), EDM, even_in_log_snr, 2),
    "sa_solver, vp": (D.solvers.sa_solver(interval=(0.0, 1e6)), VP, even_in_log_snr, 2),
    "sit euler SBDM, gvp": (SIT(diffusion="SBDM"), GVP, even_in_time, 1),
    "sit heun SBDM, flow": (SIT("heun", "SBDM"), FLOW, even_in_time, 1),
    "sit stochastic_heun SBDM, vp": (SIT("stochastic_heun", "SBDM"), VP_INTERPOLANT, even_in_time, 2),
    "sit stochastic_heun decreasing, flow": (SIT("stochastic_heun", "decreasing"), FLOW, even_in_time, 2),
    "sit stochastic_heun increasing-decreasing, gvp": (
        SIT("stochastic_heun", "increasing-decreasing"),
        GVP,
        even_in_time,
        2,
    ),
    "sit stochastic_heun constant, edm": (SIT("stochastic_heun", "constant", 3.0), EDM, even_in_log_snr, 2),
    "flow_heun, gvp": (D.solvers.flow_heun(), GVP, even_in_time, 2),
    # What other programs compute under the name: half of the second difference costs an order (without noise,
    # where there is one to lose), and a wrong sign leaves a step of first order.
    "3m_sde eta 0 of k-diffusion, vp": (
        other_solvers.dpmpp_3m("halved", eta=0.0, solver_type="heun"),
        VP,
        even_in_log_snr,
        2,
    ),
    "3m_sde of diffusers, vp": (
        other_solvers.dpmpp_3m("diffusers", eta=1.0, solver_type="heun"),
        VP,
        even_in_log_snr,
        1,
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_weak_order(name, x64):
    solver, path, spacing, order = ORDERS[name]
    slope, errors = weak_order(solver, path, spacing(path), STEPS, MEAN, STD)
    assert slope == pytest.approx(order, abs=0.35), errors


# solver, path, spacing, steps: fine enough for the error of the method to hide in that of the sample
SAMPLED = {
    "dpmpp_2m_sde, vp": (D.solvers.dpmpp_2m_sde(), VP, even_in_log_snr, 80),
    "dpmpp_3m_sde, flow": (D.solvers.dpmpp_3m_sde(), FLOW, even_in_log_snr, 60),
    "dpmpp_sde, vp": (D.solvers.dpmpp_sde(), VP, even_in_log_snr, 60),
    "sit_sde euler, flow": (SIT(diffusion="linear"), FLOW, even_in_time, 120),
    "restart, flow": (D.solvers.restart(), FLOW, even_in_log_snr, 40),
}
COUNT = 100_000


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_have_the_mean_and_covariance_of_the_noised_data(name):
    """Within 5 standard errors: of means, of variances, and of the covariance, which is 0."""
    solver, path, spacing, steps = SAMPLED[name]
    grid = spacing(path)(steps)
    start_mean, start_variance = marginal(grid, 0, MEAN, STD)
    if "restart" in name:
        grid = D.restart_grid(path, grid, [D.Restart(0.1, 1.0, 12, 2)])
    noise = np.asarray(D.initial_noise(KEY, (COUNT, 2), grid)) / grid.sigma[0]
    x = (start_mean + np.sqrt(start_variance) * noise).astype(np.float32)
    denoise = D.gaussian_denoiser(path, MEAN, STD)
    samples = jax.jit(lambda x: D.sample(KEY, denoise, solver, grid, x))(x)
    samples = np.asarray(samples, np.float64)
    mean, variance = marginal(grid, -1, MEAN, STD)
    std = np.sqrt(variance)
    np.testing.assert_array_less(np.abs(samples.mean(0) - mean), 5 * std / COUNT**0.5)
    error = 5 * np.outer(std, std) * np.sqrt((1 + np.eye(2)) / COUNT)
    np.testing.assert_array_less(np.abs(np.cov(samples.T) - np.diag(variance)), error)


def k_diffusion(order, sigmas, eta, s_noise, solver_type):
    """sample_dpmpp_2m_sde and sample_dpmpp_3m_sde, as printed for alpha = 1, in float64, from 80 NOISE."""
    x, old, widths = 80.0 * NOISE, [], []
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.astype(np.float64))):
        scale = 1 / np.sqrt(sigma**2 + 0.25)
        output = network(scale * x, np.log(sigma) / 4, np)
        x_0 = 0.25 * scale**2 * x + 0.5 * sigma * scale * output
        if sigma_next == 0:
            return x_0
        h = np.log(sigma) - np.log(sigma_next)
        H = h * (eta + 1)
        x = np.exp(-H) * x - np.expm1(-H) * x_0
        phi_2 = np.expm1(-H) / H + 1
        if old and order == 2:
            slope = (x_0 - old[-1]) * h / widths[-1]
            x = x + (phi_2 if solver_type == "heun" else -0.5 * np.expm1(-H)) * slope
        elif len(old) == 1:
            x = x + phi_2 * (x_0 - old[-1]) * h / widths[-1]
        elif len(old) > 1:
            r_0, r_1 = widths[-1] / h, widths[-2] / h
            d_0, d_1 = (x_0 - old[-1]) / r_0, (old[-1] - old[-2]) / r_1
            x = x + phi_2 * (d_0 + (d_0 - d_1) * r_0 / (r_0 + r_1))
            x = x - (phi_2 / H - 0.5) * (d_0 - d_1) / (r_0 + r_1)
        x = x + step_noise()[i].numpy() * sigma_next * np.sqrt(-np.expm1(-2 * h * eta)) * s_noise
        old, widths = [*old, x_0], [*widths, h]
    raise AssertionError("the grid must end clean")


@pytest.mark.parametrize("order, solver_type", [(2, "midpoint"), (2, "heun"), (3, "heun")])
def test_as_k_diffusion_prints_them(order, solver_type):
    options = {"eta": 0.6, "s_noise": 1.2, "solver_type": solver_type, "lower_order_final": False}
    make = D.solvers.dpmpp_2m_sde if order == 2 else functools.partial(other_solvers.dpmpp_3m, "halved")
    solver = make(**options)
    denoise = D.denoiser(jax_network, D.edm(D.EDM(), 0.5))
    run = jax.jit(lambda grid, x: D.sample(KEY, denoise, solver, grid, x))
    for steps in (1, 2, 5, 20):
        grid = D.make_grid(EDM, steps)
        ours = np.asarray(run(D.pad(grid, 20), 80 * NOISE))
        assert_close(ours, k_diffusion(order, grid.sigma, 0.6, 1.2, solver_type), steps)


TWINS = {
    "2m": (D.solvers.dpmpp_2m_sde(0.0), D.solvers.dpmpp_2m()),
    "dpm_sde": (D.solvers.dpm_sde(eta=0.0), D.solvers.dpm_2m()),
    "3m": (D.solvers.dpmpp_3m_sde(0.0, solver_type="midpoint"), D.solvers.dpmpp_3m()),
    "3m, Lagrange": (
        other_solvers.dpmpp_3m("exact", solver_type="heun"),
        D.solvers.dpmpp_3m(solver_type="heun"),
    ),
    "3m_sde, Lagrange": (
        other_solvers.dpmpp_3m("exact", eta=0.7),
        D.solvers.dpmpp_3m_sde(0.7, solver_type="midpoint"),
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_without_noise_they_are_their_deterministic_twins(name):
    denoise = D.denoiser(jax_network, D.flow(FLOW))
    ours, twin = (jax.jit(lambda grid, x, s=s: D.sample(KEY, denoise, s, grid, x)) for s in TWINS[name])
    for steps in (3, 20):
        grid = D.pad(D.make_grid(FLOW, steps), 20)
        np.testing.assert_allclose(ours(grid, NOISE), twin(grid, NOISE), rtol=1e-5, atol=1e-6)


def test_euler_on_the_flow_path_is_the_same_in_both_variables():
    denoise, grid = D.denoiser(jax_network, D.flow(FLOW)), D.make_grid(FLOW, 9)
    ours, twin = (
        jax.jit(lambda x, s=s: D.sample(KEY, denoise, s, grid, x))(NOISE)
        for s in (D.solvers.flow_euler(), D.solvers.euler())
    )
    np.testing.assert_allclose(ours, twin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", [D.solvers.dpmpp_2m_sde(), D.solvers.dpmpp_3m_sde()], ids=["2m", "3m"])
def test_a_cut_run_draws_the_noise_of_the_whole(solver):
    # With one answer for everything their memory holds nothing, so only the noise could differ.
    denoise = D.Denoiser(lambda x, t: 0 * x + 0.3, FLOW)
    grid = D.make_grid(FLOW, 16)
    run = jax.jit(lambda grid, x: D.sample(KEY, denoise, solver, grid, x))
    middle = run(D.pad(D.cut(grid, 0, 5), 16), NOISE)
    whole = run(D.pad(D.cut(grid, 0, 15), 16), NOISE)
    np.testing.assert_allclose(run(D.pad(D.cut(grid, 5, 15), 16), middle), whole, rtol=1e-5, atol=1e-6)


def test_learned_variance_lies_between_the_small_and_the_large():
    grid, plain = D.make_grid(VP, 6), D.denoiser(jax_network, D.v(VP))

    @jax.jit
    def learned(v, x):
        def predict(x, t):
            return jnp.concatenate([jax_network(x, t), 0 * x + 2 * v - 1], axis=-1)

        denoise = D.denoiser(predict, D.v(VP), learned_variance=True)
        # Solvers that know of no variance see the prediction alone.
        return D.sample(KEY, denoise, D.solvers.ddpm("learned"), grid, x), denoise(x, 400.0) - plain(x, 400.0)

    for variance, v in (("small", 0.0), ("large", 1.0)):
        fixed = jax.jit(lambda x, variance=variance: D.sample(KEY, plain, D.solvers.ddpm(variance), grid, x))
        ours, difference = learned(v, NOISE)
        np.testing.assert_allclose(ours, fixed(NOISE), rtol=1e-4, atol=1e-5)
        assert np.abs(difference).max() < 1e-6


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: D.solvers.dpmpp_2m_sde(eta=-0.1), InvalidArgumentError, "eta"),
        (lambda: D.solvers.dpmpp_3m_sde(s_noise=float("nan")), InvalidArgumentError, "s_noise"),
        (lambda: D.solvers.dpmpp_2m_sde(solver_type="bh1"), UnknownNameError, "midpoint, heun"),
        (lambda: D.solvers.dpmpp_3m_sde(solver_type="none"), UnknownNameError, "midpoint, heun"),
        (
            lambda: D.sample(
                KEY,
                D.denoiser(jax_network, D.epsilon(VP)),
                D.solvers.ddpm("learned"),
                D.make_grid(VP, 2),
                NOISE,
            ),
            InvalidArgumentError,
            "learned_variance=True",
        ),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()
