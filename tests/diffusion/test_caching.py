"""Caches: which steps compute, what stands for the others, how a cache rides through the sampling loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError, UnknownNameError
from jaxldm.nn.reuse import Session

KEY, STEPS = jax.random.key(0), 12
PATH = D.Flow()
GRID = D.make_grid(PATH, STEPS)
C = D.caching


def network_of(residual):
    """x + residual(t), the residual being what a cache reuses; the signal is the residual itself, too."""

    def network(cache, memory, i, x, t, *condition):
        signal = residual(t)
        session = Session(cache, memory, jnp.asarray(i, jnp.int32), signal if cache.decision.signal else None)
        x, session = session.run("blocks", lambda x: x + residual(t)[:, None, None, None], x, True)
        return x, session.left()

    return network


def residuals_of(cache, residual, steps=STEPS, start=None):
    """(what a run adds in each step, how many steps computed), one compiled call a step."""
    call = jax.jit(lambda cache, memory, i, x, t: network_of(residual)(cache, memory, i, x, t))
    x, memory, found, computed = jnp.zeros((1, 1, 1, 1)), start, [], []
    for i in range(steps):
        out, memory = call(cache, memory, jnp.int32(i), x, jnp.full(1, float(i)))
        found.append(float(out[0, 0, 0, 0]))
        computed.append(int(memory.computed))
    return np.array(found), np.diff(computed, prepend=0).astype(bool)


def test_intervals_and_schedules_compute_where_they_say():
    found, computed = residuals_of(C.fora(3), lambda t: t)
    np.testing.assert_array_equal(np.flatnonzero(computed), [0, 3, 6, 9])
    np.testing.assert_array_equal(found, np.arange(STEPS) // 3 * 3)
    _, computed = residuals_of(C.fora(4, warm_up=3), lambda t: t)
    np.testing.assert_array_equal(np.flatnonzero(computed), [0, 1, 2, 6, 10])
    schedule = np.array([True, False, False, True, True, False])
    found, computed = residuals_of(C.at_steps(schedule), lambda t: t, steps=8)
    np.testing.assert_array_equal(computed, [*schedule, True, True])  # beyond its end everything computes
    np.testing.assert_array_equal(found, [0, 0, 0, 3, 4, 4, 6, 7])


@pytest.mark.parametrize("order", [0, 1, 2])
def test_extrapolation_is_taylors_sum_of_differences(order):
    """Liu et al. 2025, equations 6 and 7, written out; of order 1 it is exact for lines."""
    values = np.sin(np.arange(STEPS) / 3.0)
    found, computed = residuals_of(C.taylor(4, order), lambda t: jnp.sin(t / 3.0))
    steps, expected, differences = [], [], []
    for i in range(STEPS):
        if computed[i]:
            new = [values[i]]
            for k in range(1, min(3, len(steps) + 1)):
                new.append((new[k - 1] - differences[k - 1]) / (i - steps[-1]))
            differences, steps = new, [*steps, i]
            expected.append(values[i])
        else:
            k = i - steps[-1]
            terms = [differences[0], differences[1] * k, differences[2] * k**2 / 2]
            expected.append(sum(terms[: order + 1]))
    assert computed.sum() == 5
    np.testing.assert_allclose(found, expected, atol=2e-6)
    if order == 1:
        line, _ = residuals_of(C.taylor(4, 1), lambda t: 3 - t / 4)
        np.testing.assert_allclose(line, 3 - np.arange(STEPS) / 4, atol=1e-5)


def test_the_first_block_decides_by_its_change_since_the_last_step_that_computed():
    """The residual grows by 1 from 10 on: 10 % away after one step, less later."""
    _, computed = residuals_of(C.first_block(0.25, warm_up=1, max_skips=20), lambda t: 10 + t)
    expected, last = [], None
    for i in range(STEPS):
        if last is None or i / (10 + last) - last / (10 + last) >= 0.25:
            last = i
            expected.append(i)
    np.testing.assert_array_equal(np.flatnonzero(computed), expected)
    _, computed = residuals_of(C.first_block(100.0, warm_up=3, max_skips=2), lambda t: 10 + t)
    np.testing.assert_array_equal(np.flatnonzero(computed), [0, 1, 2, 5, 8, 11])


def test_teacache_adds_up_the_polynomial_of_the_changes():
    """A signal that grows by a tenth in each step, and the polynomial 2 x: 0.2 a step."""
    cache = C.teacache([2.0, 0.0], 0.5, num_steps=STEPS)
    _, computed = residuals_of(cache, lambda t: 1.1**t)
    np.testing.assert_array_equal(np.flatnonzero(computed), [0, 3, 6, 9, 11])


def test_magcache_skips_while_the_errors_of_the_ratios_are_small():
    ratios = np.full(10, 0.95)
    schedule = C.magcache(ratios, 0.2, max_skips=5, always=0.2).settings["schedule"]
    # |1 - 0.95| = 0.05, + |1 - 0.9025| = 0.1475, + 0.1426 is beyond 0.2
    np.testing.assert_array_equal(np.flatnonzero(schedule), [0, 1, 4, 7])
    assert C.magcache(ratios, 1e-6).settings["schedule"].all()
    np.testing.assert_array_equal(
        np.flatnonzero(C.magcache(np.ones(6), 0.1, max_skips=2).settings["schedule"]), [0, 1, 4]
    )


# ---------------------------------------------------------------- the sampling loop


def build(network):
    """Guidance by a condition that the network does not look at."""
    predict = D.classifier_free_guidance(network, jnp.zeros(2, jnp.int32), 1, 3.0)
    return D.denoiser(predict, D.velocity(PATH))


def denoiser_with(cache):
    return D.cached_denoiser(network_of(lambda t: jnp.sin(3 * t)), build, cache)


def draw(cache, solver, **options):
    denoise = denoiser_with(cache)
    x_T = D.initial_noise(KEY, (2, 4, 4, 1), GRID)
    return D.sample(KEY, denoise, D.cached(solver, denoise), GRID, x_T, **options)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc"])
def test_a_cache_that_reuses_nothing_changes_nothing(name):
    solver, denoise = D.solvers.make(name), denoiser_with(C.fora(1))
    x_T = D.initial_noise(KEY, (2, 4, 4, 1), GRID)
    plain = D.sample(KEY, denoise, solver, GRID, x_T)
    np.testing.assert_array_equal(draw(C.fora(1), solver), plain)
    reused = np.asarray(draw(C.fora(3), solver))
    assert np.isfinite(reused).all() and np.abs(reused - plain).max() > 1e-3


def test_twenty_settings_are_one_program():
    traces = []

    @jax.jit
    def run(cache):
        traces.append(1)
        return draw(cache, D.solvers.ddim())

    rng = np.random.default_rng(0)
    results = []
    for k in range(20):
        cache = C.at_steps(np.concatenate([[True], rng.random(STEPS - 1) < 0.1 + k / 25]))
        results.append(np.asarray(run(cache)).tobytes())
    for k in range(20):
        run(C.taylor(1 + k % 5, k % 3, warm_up=1 + k))
        run(C.first_block(0.01 + 0.02 * k, warm_up=1 + k, max_skips=1 + k % 4))
        run(C.teacache([1.0 + k, -0.1 * k], 0.02 + 0.1 * k, warm_up=1 + k % 3, num_steps=STEPS + k))
        run(C.magcache(0.5 + rng.random(STEPS), 0.05 + k / 50, max_skips=1 + k % 4, always=k / 20))
        run(C.fora(1 + k, warm_up=1 + k % 7))
        run(C.extrapolate(C.first_block(0.5 / (1 + k)), k % 3))
    # One for each decision and rule of residuals; magcache is a schedule.
    assert len(traces) == 6 and len(set(results)) > 10


def test_solvers_of_one_evaluation_take_a_cache_and_others_are_refused_in_one_line():
    denoise = denoiser_with(C.fora(2))
    refused = set()
    x_T = jnp.zeros((2, 4, 4, 1))
    for name in D.solvers.SOLVERS:
        solver = D.cached(D.solvers.make(name), denoise)
        keys = D.image_keys(KEY, 2)

        def step(x, solver=solver, keys=keys):
            return D.sample_step(keys, denoise, solver, GRID, solver.init(x), jnp.int32(0))

        try:
            jax.eval_shape(step, x_T)
        except InvalidArgumentError as error:
            assert "once a step: choose ddim" in str(error) and len(str(error)) < 400
            refused.add(name)
    assert refused == {"heun", "flow_heun", "dpm2", "dpm2_ancestral", "dpmpp_sde", "pndm", "restart"} | {
        "predictor_corrector"
    }


def test_inpainting_keeps_the_memory():
    denoise, half = denoiser_with(C.fora(2)), jnp.zeros((4, 4, 1)).at[:2].set(1)
    solver = D.inpaint(D.cached(D.solvers.ddim(), denoise), jnp.ones((4, 4, 1)), half)
    x = D.sample(KEY, denoise, solver, GRID, D.initial_noise(KEY, (2, 4, 4, 1), GRID))
    assert (np.asarray(x)[:, :2] == 1).all() and np.isfinite(x).all()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: C.fora(0), "interval must be a whole number of at least 1, got 0|interval must be a whole"),
        (lambda: C.taylor(3, 3), "order must be a whole number from 0 to 2, got 3"),
        (lambda: C.first_block(0), "threshold must be a positive number, got 0"),
        (lambda: C.first_block(-0.1), "threshold must be a positive number"),
        (lambda: C.first_block(0.1, first_blocks=0), "first_blocks must be a whole number from 1"),
        (lambda: C.teacache([]), "coefficients must be an array"),
        (lambda: C.magcache([1.0], always=2), r"always must be a number in \[0, 1\]"),
        (lambda: C.at_steps([0, 1]), "schedule must be booleans"),
        (lambda: C.at_steps([False, True]), "schedule must begin with True"),
        (lambda: C.read("fora:x"), "its interval must be a whole number, got 'x'"),
        (lambda: C.read("fora:"), "its interval must be a whole number, got ''"),
        (lambda: C.magcache([1.0, -0.5]), "ratios of sizes must be at least 0, got -0.5"),
        (lambda: C.read("fora:0"), "cache 'fora:0': interval must be"),
        (lambda: C.read("teacache:0.1"), "write cache=D.caching.teacache"),
        (lambda: C.read("taylor:4,1,2,3"), "has 4 numbers: write taylor:INTERVAL,ORDER,WARM_UP"),
        (lambda: draw(C.at_steps([True] * 13), D.solvers.ddim()), "schedule has 13 steps, the run 12"),
        (lambda: D.cached(D.solvers.ddim(), build), "denoise must be a denoiser from D.cached_denoiser"),
        (lambda: D.fit_teacache([]), "calibrations must be a calibration"),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_unknown_names_and_guidance_that_branches():
    with pytest.raises(UnknownNameError, match="did you mean 'fora'"):
        C.read("forra:3")

    def branching(network):
        predict = D.classifier_free_guidance(
            network, jnp.zeros(2, jnp.int32), 1, D.guidance_interval(PATH, 3.0, 0.2, 0.8)
        )
        return D.denoiser(predict, D.velocity(PATH))

    denoise = D.cached_denoiser(network_of(lambda t: t), branching, C.fora(2))
    with pytest.raises(InvalidArgumentError, match="give guidance_scale as a number"):
        denoise.init(jnp.zeros((2, 4, 4, 1)))


@pytest.mark.parametrize(
    "notation, cache",
    [
        ("fora", C.fora()),
        ("taylor:5,2", C.taylor(5, 2)),
        ("first-block:0.08,2,1", C.first_block(0.08, first_blocks=2, last_blocks=1)),
        ("deepcache:4,2", C.deepcache(4, skips=2)),
    ],
)
def test_notations(notation, cache):
    assert dataclasses.asdict(C.read(notation)) == dataclasses.asdict(cache)


def test_calibration_sees_changes_and_ratios():
    """A residual that shrinks by a fifth each step, and a signal, the same one."""
    network, grid = network_of(lambda t: t), D.make_grid(PATH, 6)
    x_T = D.initial_noise(KEY, (2, 4, 4, 1), grid)
    found = D.calibrate_cache(KEY, network, build, D.solvers.ddim(), grid, x_T)
    t = np.asarray(grid.t)[:-1]
    ratios = np.concatenate([[0], t[1:] / t[:-1]])
    np.testing.assert_allclose(found.ratios, ratios, rtol=1e-5)
    np.testing.assert_allclose(found.input_changes[1:], 1 - ratios[1:], rtol=1e-5)
    np.testing.assert_allclose(found.residual_changes[1:], 1 - ratios[1:], rtol=1e-5)
    slope, offset = D.fit_teacache(found, degree=1)
    assert abs(slope - 1) < 1e-4 and abs(offset) < 1e-4
