"""Callbacks and progress are no part of what is compiled; equal calls of `sample` compile once."""

import doctest
import functools
import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

PATH = D.Flow()
KEY = jax.random.key(3)
SHAPE = (2, 4, 4, 4)
WEIGHTS = jnp.eye(4) * 0.5


def make_denoiser(weights):
    return D.denoiser(lambda x, t: jnp.tanh(x @ weights), D.x0(PATH))


GRID = D.make_grid(PATH, 5)
X = D.initial_noise(KEY, SHAPE, GRID)


@pytest.fixture
def compilations(caplog):
    """A function that calls another one, and gives its result and how many programs it compiled."""

    def count(call):
        caplog.clear()
        with jax.log_compiles():
            result = jax.block_until_ready(call())
        return result, sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)

    return count


def test_two_lambdas_compile_once_and_each_hears_its_own(compilations):
    heard = {"first": [], "second": []}

    def call(who):
        return D.sample(
            KEY, make_denoiser(WEIGHTS), D.solvers.dpmpp_2m(), GRID, X,
            callback=lambda row, x: heard[who].append((int(row), np.asarray(x))),
            progress=lambda done, total: heard[who].append((done, total)),
        )  # fmt: skip

    first, count = compilations(lambda: call("first"))
    assert count > 0
    second, count = compilations(lambda: call("second"))
    assert count == 0
    np.testing.assert_array_equal(first, second)
    for messages in heard.values():
        assert messages[1::2] == [(done, 5) for done in range(1, 6)]
        assert [row for row, _ in messages[::2]] == list(range(5))
        np.testing.assert_array_equal(messages[-2][1], first)


def test_equal_calls_compile_once_whatever_the_weights(compilations):
    def call(weights, solver):
        return D.sample(KEY, make_denoiser(weights), solver, GRID, X, return_trajectory=True)

    opposite = -WEIGHTS
    (first, _), count = compilations(lambda: call(WEIGHTS, D.solvers.unipc()))
    assert count > 0
    (again, _), count = compilations(lambda: call(WEIGHTS, D.solvers.unipc()))
    assert count == 0
    (other, _), count = compilations(lambda: call(opposite, D.solvers.unipc()))
    assert count == 0
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert compilations(lambda: call(WEIGHTS, D.solvers.unipc(order=3)))[1] > 0


def test_callbacks_of_masked_tokens_compile_nothing_either(compilations):
    start, unmasking = jnp.full((2, 9), 16), D.make_unmasking(4, max_steps=6)
    logits = lambda tokens: jnp.zeros((*tokens.shape, 16))  # noqa: E731
    heard = [[], []]

    def call(**options):
        return D.sample_tokens(KEY, logits, start, unmasking, mask_token=16, **options)

    first, count = compilations(lambda: call(progress=lambda *numbers: heard[0].append(numbers)))
    assert count > 0
    second, count = compilations(lambda: call(progress=lambda *numbers: heard[1].append(numbers)))
    assert count == 0 and heard[0] == heard[1] == [(done, 4) for done in range(1, 5)]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(call(), first)
    _, rows = call(return_trajectory=True)
    np.testing.assert_array_equal(rows[-1], first)


def test_a_changed_closure_is_seen():
    weights = {"w": WEIGHTS}
    denoise = D.denoiser(lambda x, t: jnp.tanh(x @ weights["w"]), D.x0(PATH))
    first = D.sample(KEY, denoise, D.solvers.ddim(), GRID, X)
    weights["w"] = 3 * WEIGHTS
    assert not np.allclose(D.sample(KEY, denoise, D.solvers.ddim(), GRID, X), first)


@pytest.mark.parametrize("name", ["ddpm", "heun", "dpmpp_2m", "unipc"])
def test_the_loop_on_the_host_gives_the_same_images(name):
    solver, denoise = D.solvers.make(name), make_denoiser(WEIGHTS)
    run = functools.partial(D.sample, KEY, denoise, solver, return_trajectory=True, return_predictions=True)
    for grid in (GRID, D.pad(D.cut(GRID, 1), 6)):
        scanned, looped = run(grid, X), run(grid, X, progress=lambda done, total: None)
        for ours, theirs in zip(looped, scanned, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_error_of_a_callback_reaches_the_caller():
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        D.sample(KEY, make_denoiser(WEIGHTS), D.solvers.ddim(), GRID, X, progress=stop)


def test_listeners_are_arguments_of_jitted_functions():
    traces = []

    @jax.jit
    def run(x, listener):
        traces.append(1)
        return D.sample(KEY, make_denoiser(WEIGHTS), D.solvers.ddim(), GRID, x, progress=listener)

    heard = [[], []]
    for own in heard:
        with D.listening(lambda done, total, own=own: own.append((int(done), int(total)))) as listener:
            run(X, listener)
    assert len(traces) == 1
    for own in heard:
        assert sorted(own) == [(done, 5) for done in range(1, 6)]
    with pytest.raises(Exception, match="block had ended"):
        run(X, listener)
        jax.effects_barrier()


@pytest.mark.parametrize("way", ["vmap", "pmap", "shard_map", "sharded"])
def test_listeners_under_transformations_and_on_many_devices(way):
    def run(x, listener):
        return D.sample(KEY, make_denoiser(WEIGHTS), D.solvers.ddim(), GRID, x, progress=listener)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, every = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    x, heard = jnp.ones((8, 1, 4, 4, 4)), []
    with D.listening(lambda done, total: heard.append((int(done), int(total)))) as listener:
        if way == "vmap":
            jax.vmap(run, (0, None))(x, listener)
        elif way == "pmap":
            jax.pmap(run, in_axes=(0, None))(x, listener)
        elif way == "shard_map":
            jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(data, every), out_specs=data))(x[:, 0], listener)
        else:
            jax.jit(run)(jax.device_put(x[:, 0], jax.sharding.NamedSharding(mesh, data)), listener)
    assert set(heard) == {(done, 5) for done in range(1, 6)}


SCRIPT = """
import sys, jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
import jax.numpy as jnp
from jaxldm import diffusion as D
events = []
jax.monitoring.register_event_listener(lambda event, **kwargs: events.append(event))
path, key = D.Flow(), jax.random.key(0)
weights, grid = jnp.eye(4), D.make_grid(path, 3)
x = D.initial_noise(key, (2, 4, 4, 4), grid)
denoise = D.denoiser(lambda x, t: jnp.tanh(x @ weights), D.x0(path))
events.clear()
D.sample(key, denoise, D.solvers.dpmpp_2m(), grid, x, progress=lambda done, total: None)
asked = sum(event.endswith("compile_requests_use_cache") for event in events)
hits = sum(event.endswith("cache_hits") for event in events)
print(asked, hits)
"""


def test_another_process_finds_the_compiled_step_in_the_cache(tmp_path):
    def run():
        out = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=True
        )
        return [int(word) for word in out.stdout.split()]

    asked, hits = run()
    assert asked > 0 and hits < asked
    asked, hits = run()
    assert asked > 0 and hits == asked


def test_impossible_requests_are_refused():
    def call(solver=None, grid=GRID, x=X, denoise=make_denoiser(WEIGHTS)):  # noqa: B008
        return D.sample(KEY, denoise, D.solvers.ddim() if solver is None else solver, grid, x)

    cases = [
        (lambda: call(solver="ddim"), r"got 'ddim': write D\.solvers\.make\('ddim'\)"),
        (lambda: call(solver=D.solvers.ddim), r"got the function ddim: write ddim\(\)"),
        (lambda: call(solver=3), "got 3"),
        (lambda: call(x=jnp.ones((2, 4, 32, 32))), r"write jnp\.moveaxis\(x, 1, -1\)"),
        (lambda: call(grid=D.make_grid(D.EDM(), 5)), "must lie on the denoiser's flow path"),
        (lambda: call(grid=D.make_grid(D.VP(D.linear_betas()), 5)), "flow path"),
        (lambda: call(grid=GRID.t), "must be a grid"),
        (lambda: call(denoise=None), "must be a function"),
    ]
    for run, words in cases:
        with pytest.raises(InvalidArgumentError, match=words):
            run()


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "lms"])
def test_a_plain_function_in_bfloat16_is_a_denoiser(name):
    x = D.sample(KEY, lambda x, t: (0.5 * x).astype(jnp.bfloat16), D.solvers.make(name), GRID, X)
    wide = D.sample(KEY, lambda x, t: 0.5 * x, D.solvers.make(name), GRID, X)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, wide, rtol=0.02, atol=0.02)


def test_examples_in_docstrings():
    for name in ("listeners", "sampling", "values"):
        result = doctest.testmod(importlib.import_module(f"jaxldm.diffusion.{name}"))
        assert result.attempted > 0 and result.failed == 0
