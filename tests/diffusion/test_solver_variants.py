"""What must hold for every option of the deterministic and ancestral solvers, and their algebra.

test_sampling.py holds the same for every solver as it comes.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.diffusion.solvers.euler import ancestral_split
from jaxldm.diffusion.solvers.multistep import exponential_moments, polynomial_weights
from jaxldm.errors import InvalidArgumentError, UnknownNameError

VP, EDM, FLOW = D.VP(D.linear_betas()), D.EDM(), D.Flow()
ZERO_SNR = D.VP(D.rescale_zero_terminal_snr(D.linear_betas()))
PATHS = (VP, ZERO_SNR, FLOW, EDM)
KEY = jax.random.key(5)
SHAPE = (2, 3)
VARIANTS = [
    ("pndm", {"skip_prk_steps": False}),
    ("pndm", {"combine": "v_prediction"}),
    ("dpmpp_2s", {"solver_type": "heun"}),
    ("unipc", {"order": 3, "solver_type": "bh1", "lower_order_final": False}),
    ("dpm2_ancestral", {"eta": 0.5, "form": "rectified_flow"}),
]


class PathByNumber:
    """One of PATHS, chosen by a number that may be traced."""

    __class__ = D.Path  # to `isinstance`

    def __init__(self, number):
        self.number = number

    def __getattr__(self, name):
        return lambda t: jax.lax.switch(self.number, [getattr(path, name) for path in PATHS], t)


@pytest.mark.parametrize("name, options", VARIANTS, ids=lambda value: str(value))
def test_finite_at_both_ends_with_any_number_of_steps_and_one_compilation(name, options):
    solver = D.solvers.make(name, **options)

    @jax.jit
    @jax.value_and_grad
    def loss(scale, number, grid):
        path = PathByNumber(number)
        exact = D.gaussian_denoiser(path, 0.3, 0.5)
        denoise = D.Denoiser(lambda x, t: scale * exact(x, t), path)
        x = D.initial_noise(KEY, SHAPE, grid)
        return jnp.mean(D.sample(KEY, denoise, solver, grid, x))

    for (number, path), steps in itertools.product(enumerate(PATHS), (1, 2, 3, 16)):
        grid = D.make_grid(path, steps)
        assert grid.sigma[-1] == 0 and (path in (VP, EDM) or grid.alpha[0] == 0)
        value, slope = loss(1.0, number, D.pad(grid, 16))
        assert np.isfinite(value) and np.isfinite(slope)
        assert abs(slope) > 1e-3  # the last step shows the network's answer alone, which `scale` multiplies
    assert loss._cache_size() == 1


@pytest.mark.parametrize("name", ["lms", "pndm", "deis", "dpmpp_3m", "unipc"])
def test_one_step_is_eulers(name):
    """A run of fewer steps than the order has the order that it can have."""
    grid = D.make_grid(VP, 1)
    x = jax.random.normal(KEY, SHAPE)
    denoise = D.gaussian_denoiser(VP, 0.3, 0.5)
    runs = [D.sample(KEY, denoise, D.solvers.make(solver), grid, x) for solver in (name, "euler")]
    np.testing.assert_allclose(*runs, rtol=1e-6)


def test_a_disabled_corrector_is_no_corrector():
    denoise = D.gaussian_mixture_denoiser(FLOW, [0.5, 0.5], jnp.array([[-1.0, 0, 1], [1, 1, 0]]), [0.3, 0.4])
    x = jax.random.normal(KEY, SHAPE)

    def run_with(**options):
        solver = D.solvers.unipc(**options)
        run = jax.jit(lambda grid: D.sample(KEY, denoise, solver, grid, x))
        return lambda grid: np.asarray(run(D.pad(grid, 6)))

    whole = D.make_grid(FLOW, 6)
    second = D.cut(whole, 3)  # steps are counted in the whole grid, also after a cut
    plain, first = run_with(corrector=False), run_with(disable_corrector=(0,))
    np.testing.assert_allclose(run_with(disable_corrector=range(6))(whole), plain(whole), rtol=1e-6)
    assert np.abs(first(whole) - plain(whole)).max() > 1e-3
    assert np.abs(first(second) - plain(second)).max() > 1e-3
    np.testing.assert_allclose(run_with(disable_corrector=(3, 4))(second), plain(second), rtol=1e-6)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_karras_ancestral_steps_are_ddims(eta):
    """sigma_up of k-diffusion is DDIM's standard deviation, over alpha_s: on every path."""

    @jax.jit
    def runs(number, grid):
        path = PathByNumber(number)
        x, denoise = D.initial_noise(KEY, SHAPE, grid), D.gaussian_denoiser(path, 0.3, 0.5)
        solvers = (D.solvers.euler_ancestral(eta), D.solvers.ddim(eta))
        return [D.sample(KEY, denoise, solver, grid, x) for solver in solvers]

    for number, path in enumerate(PATHS):
        np.testing.assert_allclose(*runs(number, D.make_grid(path, 5)), rtol=1e-5, atol=1e-5)


@given(
    st.floats(0.05, 0.99),
    st.floats(0.01, 0.95),
    st.floats(0.0, 2.0),
    st.sampled_from(["karras", "rectified_flow"]),
)
def test_the_noise_of_an_ancestral_step_is_as_much_as_the_row_says(u, part, eta, form):
    rows = [D.solvers.Row(t, 1 - t, t) for t in (np.float64(u), np.float64(u * part))]
    with jax.enable_x64(True):
        kept, fresh = (float(value) for value in ancestral_split(*rows, eta, form))
    assert kept**2 + fresh**2 == pytest.approx(1)
    ratio_here, ratio_there = (row.sigma / row.alpha for row in rows)
    if form == "karras":  # k-diffusion's get_ancestral_step
        up = min(
            ratio_there, eta * (ratio_there**2 * (ratio_here**2 - ratio_there**2) / ratio_here**2) ** 0.5
        )
        assert fresh * ratio_there == pytest.approx(up, rel=1e-9, abs=1e-12)
    elif eta <= 1:  # the step goes down to the flow time u_down
        down = u * part * (1 + eta * (part - 1))
        assert kept * ratio_there == pytest.approx(down / (1 - down), rel=1e-9)


@pytest.mark.parametrize("form", ["karras", "rectified_flow"])
@pytest.mark.parametrize("name", ["euler_ancestral", "dpm2_ancestral"])
def test_ancestral_solvers_end_in_the_data(name, form):
    mean, std, count = np.array([0.5, -0.3]), np.array([0.2, 0.9]), 20_000
    path = FLOW if form == "rectified_flow" else EDM
    grid = D.make_grid(path, 400)  # of first order: at 100 steps the standard deviation is 6% off
    denoise = D.gaussian_denoiser(path, mean, std)
    run = jax.jit(lambda x: D.sample(KEY, denoise, D.solvers.make(name, form=form), grid, x))
    samples = np.asarray(run(D.initial_noise(KEY, (count, 2), grid)), np.float64)
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(samples.std(0), std, rtol=0.03)
    assert abs(np.corrcoef(samples.T)[0, 1]) < 5 / count**0.5


def test_exponential_moments_are_the_integrals(x64):
    u, weight = np.polynomial.legendre.leggauss(60)
    u, weight = (u + 1) / 2, weight / 2
    for h in (-30.0, -3.0, -0.99, -1e-3, 1e-9, 0.01, 0.5, 0.999, 1.0, 1.001, 4.0, 40.0):
        exact = [np.sum(weight * h * np.exp(-h * (1 - u)) * u**p) for p in range(4)]
        np.testing.assert_allclose(exponential_moments(jnp.float64(h), 4), exact, rtol=1e-11)
    assert exponential_moments(jnp.float64(np.inf), 4) == [1, 1, 1, 1]


def test_exponential_moments_keep_their_digits_in_float32():
    for h in (-0.5, 1e-4, 0.03, 0.9, 1.1):
        with jax.enable_x64(True):
            exact = [float(value) for value in exponential_moments(jnp.float64(np.float32(h)), 4)]
        np.testing.assert_allclose(exponential_moments(jnp.float32(h), 4), exact, rtol=2e-6)


@given(st.integers(1, 4), st.integers(0, 10_000))
def test_polynomial_weights_integrate_polynomials(count, seed):
    """Of as many degrees as nodes count; the nodes that do not count take no part."""
    rng = np.random.default_rng(seed)
    nodes = np.sort(rng.uniform(-4, 0, 4))[::-1] - 0.3 * np.arange(4)
    counts = [bool(k < count) for k in range(4)]
    with jax.enable_x64(True):
        weights = polynomial_weights(
            [jnp.float64(node) for node in nodes],
            [jnp.bool_(value) for value in counts],
            [1 / (p + 1) for p in range(4)],
        )
    weights = np.array([float(weight) for weight in weights])
    assert (weights[count:] == 0).all()
    for p in range(count):
        assert weights @ nodes**p == pytest.approx(1 / (p + 1), rel=1e-9)
    assert math.isfinite(weights.sum())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: D.solvers.lms(5), "order must be .* from 1 to 4"),
        (lambda: D.solvers.deis(4), "order must be .* from 1 to 3"),
        (lambda: D.solvers.unipc(0), "order must be .* from 1 to 3"),
        (lambda: D.solvers.unipc(2.0), "order must be .* from 1 to 3"),
        (lambda: D.solvers.euler_ancestral(eta=-0.1), "eta"),
        (lambda: D.solvers.dpm2_ancestral(s_noise=float("nan")), "s_noise"),
        (
            lambda: D.sample(KEY, lambda x, t: x, D.solvers.dpm2(), D.make_grid(EDM, 3), jnp.ones(SHAPE)),
            "dpm2",
        ),
        (
            lambda: D.sample(
                KEY, lambda x, t: x, D.solvers.pndm(False), D.make_grid(EDM, 3), jnp.ones(SHAPE)
            ),
            r"D\.Denoiser",
        ),
    ],
)
def test_impossible_requests_are_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()


@pytest.mark.parametrize(
    "name, option",
    [
        ("dpmpp_2m", "solver_type"),
        ("dpmpp_2s", "solver_type"),
        ("dpmpp_3m", "solver_type"),
        ("unipc", "solver_type"),
        ("pndm", "combine"),
        ("euler_ancestral", "form"),
    ],
)
def test_unknown_names(name, option):
    with pytest.raises(UnknownNameError, match="no_such"):
        D.solvers.make(name, **{option: "no_such"})
