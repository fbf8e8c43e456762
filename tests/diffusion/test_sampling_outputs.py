"""What `sample` gives beside the last x, trajectory, predictions of x_0, progress, and on many devices."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tqdm

from jaxldm import diffusion as D

VP, FLOW = D.VP(D.linear_betas()), D.Flow()
KEY = jax.random.key(11)
SHAPE = (3, 2, 2, 1)
MAX_STEPS = 6
SOLVERS = ["ddpm", "heun", "dpmpp_2m", "dpmpp_2s"]


def network(x, t):
    return jnp.sin(2 * x + 0.3 * jnp.roll(x, 1, axis=1)) + 0.001 * t.reshape(-1, 1, 1, 1)


DENOISE = D.denoiser(network, D.v(VP))


@functools.cache
def runner(name, asked=True):
    def run(key, grid, x):
        return D.sample(
            key, DENOISE, D.solvers.make(name), grid, x, return_trajectory=asked, return_predictions=asked
        )

    return jax.jit(run)


@pytest.mark.parametrize("name", SOLVERS)
def test_predictions_are_what_the_network_sees_at_each_row(name):
    grid = D.make_grid(VP, 4)
    x = D.initial_noise(KEY, SHAPE, grid)
    last, trajectory, predictions = runner(name)(KEY, D.pad(grid, MAX_STEPS), x)
    assert trajectory.shape == (MAX_STEPS + 1, *SHAPE) and predictions.shape == (MAX_STEPS, *SHAPE)
    for i in range(4):
        np.testing.assert_allclose(predictions[i], DENOISE(trajectory[i], grid.t[i]), rtol=1e-4, atol=1e-5)
    for i in (4, 5):  # padding
        np.testing.assert_array_equal(predictions[i], last)
    # Asking changes nothing in the images.
    np.testing.assert_allclose(
        runner(name, asked=False)(KEY, D.pad(grid, MAX_STEPS), x), last, rtol=1e-5, atol=1e-6
    )


def test_the_last_prediction_is_the_image():
    grid = D.make_grid(FLOW, 5)
    x = D.initial_noise(KEY, SHAPE, grid)
    denoise = D.denoiser(network, D.flow(FLOW))
    x_0, predictions = D.sample(KEY, denoise, D.solvers.ddim(), grid, x, return_predictions=True)
    assert predictions.shape == (5, *SHAPE)
    np.testing.assert_allclose(predictions[-1], x_0, rtol=1e-6)  # onto the clean row DDIM goes to x_0
    x_0, trajectory = D.sample(KEY, denoise, D.solvers.ddim(), grid, x, return_trajectory=True)
    np.testing.assert_array_equal(trajectory[-1], x_0)


def test_predictions_cost_no_second_evaluation():
    weights = jnp.eye(64) * 0.1
    denoise = D.denoiser(lambda x, t: jnp.tanh(x @ weights), D.v(VP))
    x, grid = jnp.ones((4, 64)), D.make_grid(VP, 4)

    def flops(asked):
        run = jax.jit(lambda x: D.sample(KEY, denoise, D.solvers.ddim(), grid, x, return_predictions=asked))
        return run.lower(x).compile().cost_analysis()["flops"]

    one_evaluation = 2 * 4 * 64**2
    assert one_evaluation < flops(False) <= flops(True) < flops(False) + 0.2 * one_evaluation


def test_progress_reaches_the_caller_from_a_compiled_fold():
    calls, traces = [], []

    @jax.jit
    def run(key, grid, x):
        traces.append(1)
        return D.sample(
            key, DENOISE, D.solvers.ddim(), grid, x, progress=lambda *numbers: calls.append(numbers)
        )

    for steps in (4, 6):
        grid = D.make_grid(VP, steps)
        x_0 = run(KEY, D.pad(grid, MAX_STEPS), D.initial_noise(KEY, SHAPE, grid))
        jax.effects_barrier()
        assert sorted((int(done), int(total)) for done, total in calls) == [
            (done, steps) for done in range(1, steps + 1)
        ]
        calls.clear()
        without = runner("ddim", asked=False)(KEY, D.pad(grid, MAX_STEPS), D.initial_noise(KEY, SHAPE, grid))
        np.testing.assert_allclose(x_0, without, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


def test_a_bar_of_tqdm():
    with tqdm.tqdm(disable=False, file=io.StringIO()) as bar:
        report = D.bar_progress(bar)
        run = jax.jit(lambda grid, x: D.sample(KEY, DENOISE, D.solvers.ddim(), grid, x, progress=report))
        for steps in (4, 6):
            grid = D.make_grid(VP, steps)
            run(D.pad(grid, MAX_STEPS), D.initial_noise(KEY, SHAPE, grid))
            jax.effects_barrier()
            assert (bar.n, bar.total) == (steps, steps)
            bar.reset()
        # Late and repeated calls, as from several devices, never move it back or beyond the end.
        for done in (1, 3, 2, 3, 4, 1, 4):
            report(np.int32(done), np.int32(4))
        assert (bar.n, bar.total) == (4, 4)


def guided_run(key, grid, x, scale, labels):
    """A bfloat16 network under traced guidance, with everything asked for."""

    def low(x, t, labels):
        return (network(x, t) * (1 + labels.reshape(-1, 1, 1, 1))).astype(jnp.bfloat16)

    predict = D.classifier_free_guidance(low, labels, 0.0, scale, rescale=0.5)
    denoise = D.static_threshold(D.denoiser(predict, D.v(VP)), -2.0, 2.0)
    return D.sample(
        key, denoise, D.solvers.dpmpp_2m(), grid, x, return_trajectory=True, return_predictions=True,
        progress=lambda done, total: None,
    )  # fmt: skip


def arguments(batch=8):
    grid = D.pad(D.make_grid(VP, 4), MAX_STEPS)
    keys = D.image_keys(KEY, batch)
    labels = jnp.arange(batch, dtype=jnp.float32)
    return keys, grid, D.initial_noise(keys, (batch, *SHAPE[1:]), grid), jnp.linspace(0, 4, batch), labels


def test_float32_around_a_bfloat16_network():
    keys, grid, x, scale, labels = arguments()
    for value in jax.jit(guided_run)(keys, grid, x.astype(jnp.bfloat16), scale, labels):
        assert value.dtype == jnp.float32 and np.isfinite(value).all()


@functools.cache
def compiled():
    return jax.jit(guided_run)


@pytest.mark.parametrize("way", ["vmap", "pmap", "mesh"])
def test_many_runs_and_many_devices_draw_the_same(way):
    assert jax.device_count() == 8
    keys, grid, x, scale, labels = arguments()
    expected = compiled()(keys, grid, x, scale, labels)
    batched = (keys.reshape(8, 1), x[:, None], scale[:, None], labels[:, None])
    if way == "mesh":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        x, scale, labels = jax.device_put((x, scale, labels), split)
        results = compiled()(keys, grid, x, scale, labels)
        assert len(results[0].sharding.device_set) == 8
    else:
        mapped = {"vmap": jax.vmap, "pmap": jax.pmap}[way](guided_run, in_axes=(0, None, 0, 0, 0))
        x_0, *rows = mapped(batched[0], grid, *batched[1:])
        results = [x_0[:, 0], *(jnp.swapaxes(jnp.asarray(value)[:, :, 0], 0, 1) for value in rows)]
    for value, same in zip(results, expected, strict=True):
        np.testing.assert_allclose(value, same, rtol=2e-2, atol=2e-2)  # bfloat16 rounds as it is fused


def test_gradients_through_guidance_and_predictions(x64):
    grid = D.make_grid(FLOW, 3)
    x, labels = jax.random.normal(KEY, SHAPE), jnp.array([0.5, 1.0, 2.0])

    @jax.jit
    def loss(scale):
        predict = D.classifier_free_guidance(
            lambda x, t, labels: network(x, t) * (1 + labels.reshape(-1, 1, 1, 1)), labels, 0.0, scale, 0.3
        )
        denoise = D.denoiser(predict, D.v(FLOW))
        x_0, predictions = D.sample(
            KEY, denoise, D.solvers.heun(), grid, x, return_predictions=True, progress=lambda *numbers: None
        )
        return jnp.sum(x_0**2) + jnp.sum(predictions[0] ** 2)

    slope = jax.grad(loss)(jnp.array([0.3, 1.7, 3.0]))
    for k, step in enumerate(1e-6 * jnp.eye(3)):
        scales = jnp.array([0.3, 1.7, 3.0])
        difference = (loss(scales + step) - loss(scales - step)) / 2e-6
        assert float(slope[k]) == pytest.approx(float(difference), rel=1e-5, abs=1e-8)


def test_guided_inversion_returns_as_steps_grow(x64):
    """From data to noise and back under one guidance: the error falls with the steps."""
    u, c = D.gaussian_denoiser(VP, 0.0, 1.0), D.gaussian_denoiser(VP, 0.3, 0.5)
    branches = D.Branches(lambda x, t: jnp.concatenate([u(x[:3], t[:3]), c(x[3:], t[3:])]), c)
    denoise = D.Denoiser(D.guide_branches(branches, D.guidance_interval(VP, 2.0, 0.1, 3.0)), VP)
    run = jax.jit(lambda grid, x: D.sample(KEY, denoise, D.solvers.ddim(), grid, x))
    x_0 = 0.3 + 0.3 * jax.random.normal(KEY, SHAPE)
    errors = []
    for steps in (20, 80, 320):
        grid = D.make_grid(VP, steps, spacing="exponential", final="sigma_min")
        noise = run(D.pad(D.reverse(grid), 320), x_0)
        errors.append(float(jnp.abs(run(D.pad(grid, 320), noise) - x_0).max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.05
