import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

VP, EDM, FLOW = D.VP(D.linear_betas()), D.EDM(), D.Flow()
ZERO_SNR = D.VP(D.rescale_zero_terminal_snr(D.linear_betas()))
KEY = jax.random.key(5)
SHAPE = (3, 2, 2, 1)
LABELS, NULL = jnp.array([0.5, 1.0, 2.0]), 0.0
MAX_STEPS = 8


def network(x, t, labels):
    shape = (-1, 1, 1, 1)
    return jnp.sin(x * (1 + labels.reshape(shape))) + 0.3 * labels.reshape(shape)


def branch(path, labels):
    return D.denoiser(lambda x, t: network(x, t, labels), D.v(path))


def guided(path, scale):
    predict = D.classifier_free_guidance(network, LABELS, NULL, scale)
    return D.denoiser(predict, D.v(path))


@functools.cache
def cfg_plus_plus_runner(path, eta):
    def run(grid, x, scale):
        denoise = guided(path, D.cfg_plus_plus(grid, scale, eta))
        return D.sample(KEY, denoise, D.solvers.ddim(eta), grid, x)

    return jax.jit(run)


def algorithm_2(path, grid, x, scale, eta):
    """CFG++ as the paper writes it: guided x_0, renoised with the unconditional eps."""
    both = jax.jit(lambda x, t: (branch(path, jnp.zeros(3))(x, t), branch(path, LABELS)(x, t)))
    w, x = np.reshape(scale, (-1, 1, 1, 1)), np.asarray(x)
    for i in range(len(grid.t) - 1):
        (a, s), (a_next, s_next) = ((grid.alpha[k], grid.sigma[k]) for k in (i, i + 1))
        away, towards = (np.asarray(x_0) for x_0 in both(x, grid.t[i]))
        x_0 = away + w * (towards - away)
        eps = (x - a * away) / s
        q = 0.0 if a == 0 else s_next * a / (s * a_next)
        std = eta * s_next * np.sqrt(1 - q**2)
        z = np.asarray(step_noise(i)) if eta > 0 else 0
        x = a_next * x_0 + np.sqrt(s_next**2 - std**2) * eps + std * z
    return x


@jax.jit
def step_noise(i):
    keys = jax.vmap(jax.random.fold_in, (0, None))(D.image_keys(KEY, 3), i)
    return D.solvers.noise_like(keys, jnp.zeros(SHAPE))


@pytest.mark.parametrize("path, eta", [(VP, 0.0), (ZERO_SNR, 0.0), (EDM, 0.0), (FLOW, 0.0), (VP, 0.6)])
def test_cfg_plus_plus_is_its_papers_algorithm(path, eta):
    for steps, scale in ((6, 0.6), (1, 1.0), (8, [0.0, 0.3, 1.0])):
        grid = D.make_grid(path, steps)
        x = D.initial_noise(KEY, SHAPE, grid)
        scales = jnp.broadcast_to(jnp.float32(scale), (3,))
        ours = cfg_plus_plus_runner(path, eta)(D.pad(grid, MAX_STEPS), x, scales)
        np.testing.assert_allclose(ours, algorithm_2(path, grid, x, scale, eta), rtol=2e-4, atol=2e-4)
    # It is not ordinary guidance with that scale.
    plain = D.sample(KEY, guided(path, 0.3), D.solvers.ddim(eta), grid, x)
    assert not np.allclose(plain[1], ours[1], atol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_a_schedule_has_one_scale_for_each_row(padded):
    grid = D.make_grid(VP, 4)
    scales = np.array([1.0, 4.0, 2.5, 0.5], np.float32)
    if padded:
        grid, scales = D.pad(grid, 6), np.append(scales, [9.0, 9.0]).astype(np.float32)
    t = jnp.asarray(grid.t[:4])
    np.testing.assert_array_equal(D.guidance_schedule(grid, scales)(t), scales[:4])
    # Between two rows the nearer one counts; behind the last step its own scale does.
    np.testing.assert_array_equal(D.guidance_schedule(grid, scales)(t - 3), scales[:4])
    per_image = D.guidance_schedule(grid, scales[:, None] * np.array([1, 2, 3], np.float32))
    np.testing.assert_array_equal(per_image(jnp.full(3, t[1])), [4, 8, 12])
    predict = D.classifier_free_guidance(network, LABELS, NULL, D.guidance_schedule(grid, scales))
    x = jax.random.normal(KEY, SHAPE)
    for k in range(4):
        expected = D.classifier_free_guidance(network, LABELS, NULL, float(scales[k]))(x, jnp.full(3, t[k]))
        np.testing.assert_allclose(predict(x, jnp.full(3, t[k])), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", [VP, EDM, FLOW, ZERO_SNR], ids=["vp", "edm", "flow", "zero"])
def test_outside_the_interval_the_condition_alone_is_asked(path):
    low, high = 0.2, 5.0
    batches = []

    def spy(x, t, labels):
        jax.debug.callback(lambda size: batches.append(int(size)), len(labels))
        return network(x, t, labels)

    where = D.guidance_interval(path, 3.0, low, high)
    predict = jax.jit(D.classifier_free_guidance(spy, LABELS, NULL, where))
    x = jax.random.normal(KEY, SHAPE)
    ratios = np.array([1e-2, 0.19, 0.21, 1.0, 4.9, 5.1, 50.0])
    for t, ratio in [(path.time(ratio), ratio) for ratio in ratios] + [(path.t_noisy, np.inf)]:
        t = jnp.full(3, t, jnp.float32)
        inside = low < ratio <= high
        expected = network(x, t, LABELS)
        if inside:
            expected = 3 * expected - 2 * network(x, t, jnp.zeros(3))
        np.testing.assert_allclose(predict(x, t), expected, rtol=1e-5, atol=1e-5)
        jax.effects_barrier()
        assert batches.pop() == (6 if inside else 3) and not batches


def test_an_interval_reaches_pure_noise_unless_told_otherwise():
    scale = D.guidance_interval(FLOW, jnp.array([2.0, 3.0]), low=0.5)
    np.testing.assert_array_equal(scale(jnp.array([1.0, 1.0])), [2, 3])
    np.testing.assert_array_equal(scale(jnp.array([0.9, 0.1])), [2, 1])


@given(w=st.floats(0, 20), low=st.floats(0, 2), width=st.floats(0.1, 5), t=st.floats(0.01, 0.99))
def test_schedules_compose(w, low, width, t):
    grid = D.make_grid(FLOW, 4)
    inner = D.guidance_schedule(grid, np.full(4, w))
    scale = float(D.guidance_interval(FLOW, inner, low, low + width)(jnp.array([t], jnp.float32))[0])
    assert scale in (1.0, float(np.float32(w)))


def test_another_schedule_compiles_nothing():
    traces = []

    @jax.jit
    def run(seed, grid, scales, strength, high, per_image):
        traces.append(1)
        key = jax.random.key(seed)
        x = D.initial_noise(key, SHAPE, grid)
        outputs = []
        for scale in (
            D.guidance_schedule(grid, scales),
            D.cfg_plus_plus(grid, strength),
            D.guidance_interval(VP, D.guidance_schedule(grid, scales), 0.0, high),
            per_image,
        ):
            outputs.append(D.sample(key, guided(VP, scale), D.solvers.ddim(), grid, x))
        return outputs

    first = run(0, D.pad(D.make_grid(VP, 8), 8), jnp.arange(8.0), 0.5, 3.0, jnp.array([1.0, 2.0, 3.0]))
    second = run(1, D.pad(D.make_grid(VP, 3), 8), jnp.ones(8), 0.9, 7.0, jnp.array([3.0, 0.0, 1.0]))
    assert len(traces) == 1
    assert all(np.isfinite(x).all() for x in first + second)
    assert not np.allclose(first[0], first[2]) and not np.allclose(first[0], second[0])
    # Scales of 1 are no guidance at all.
    unguided = D.sample(
        jax.random.key(1),
        branch(VP, LABELS),
        D.solvers.ddim(),
        D.make_grid(VP, 3),
        D.initial_noise(jax.random.key(1), SHAPE, D.make_grid(VP, 3)),
    )
    np.testing.assert_allclose(second[0], unguided, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda grid: D.guidance_schedule(grid, np.ones(3)), "4 steps"),
        (lambda grid: D.guidance_schedule(grid, [1.0, 2.0, np.nan, 1.0]), "scales must"),
        (lambda grid: D.guidance_interval(VP, 2.0, 3.0, 1.0), "low < high"),
        (lambda grid: D.guidance_interval(VP, 2.0, -1.0, 1.0), "low < high"),
        (lambda grid: D.guidance_interval(VP, 2.0, np.nan), "low < high"),
        (lambda grid: D.guidance_interval(VP, -2.0), "guidance_scale"),
        (lambda grid: D.cfg_plus_plus(grid, 7.5), "scale must be a finite number from 0 to 1"),
    ],
)
def test_impossible_schedules_are_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call(D.make_grid(VP, 4))
