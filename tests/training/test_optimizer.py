import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jaxldm.errors import InvalidArgumentError
from jaxldm.training.optimizer import optimizer, warmup_cosine


def test_learning_rate_is_the_closed_form():
    schedule = warmup_cosine(2e-3, warmup_steps=4, total_steps=20, final_scale=0.1)
    rates = np.array([float(schedule(jnp.int32(n))) for n in range(25)])
    np.testing.assert_allclose(rates[:4], 2e-3 * np.array([0.25, 0.5, 0.75, 1.0]), rtol=1e-6)
    n = np.arange(4, 21)
    np.testing.assert_allclose(
        rates[4:21], 2e-3 * (0.1 + 0.9 * (1 + np.cos(np.pi * (n - 4) / 16)) / 2), rtol=1e-5
    )
    np.testing.assert_allclose(rates[[4, 12, 20, 24]], 2e-3 * np.array([1, 0.55, 0.1, 0.1]), rtol=1e-5)


def test_final_scale_of_one_is_a_constant_rate():
    schedule = warmup_cosine(1e-4, warmup_steps=0, total_steps=10, final_scale=1.0)
    np.testing.assert_allclose([float(schedule(n)) for n in (0, 5, 10, 100)], 1e-4, rtol=1e-6)


@given(st.integers(0, 50), st.integers(1, 100), st.floats(0, 1))
def test_learning_rate_rises_then_falls_and_stays_in_range(warmup, rest, final_scale):
    schedule = warmup_cosine(1.0, warmup, warmup + rest, final_scale)
    rates = np.asarray(schedule(jnp.arange(151)))[: warmup + rest + 1]
    assert (rates > -1e-6).all() and (rates <= 1 + 1e-6).all()
    assert (np.diff(rates[: max(warmup, 1)]) > 0).all()
    assert (np.diff(rates[warmup:]) <= 1e-6).all()


@pytest.mark.parametrize(
    "given",
    [
        dict(learning_rate=0.0),
        dict(learning_rate=float("nan")),
        dict(warmup_steps=-1),
        dict(warmup_steps=11),
        dict(total_steps=0, warmup_steps=0),
        dict(b2=1.0),
        dict(weight_decay=-1.0),
        dict(max_grad_norm=0.0),
        dict(final_scale=2.0),
    ],
)
def test_numbers_outside_their_range_are_refused(given):
    with pytest.raises(InvalidArgumentError, match="|".join(given)):
        optimizer(**{"learning_rate": 1e-3, "warmup_steps": 2, "total_steps": 10, **given})


def test_updates_are_those_of_torch_adamw():
    numbers = np.random.default_rng(0)
    start = {
        "kernel": numbers.normal(size=(5, 3)).astype(np.float32),
        "bias": numbers.normal(size=3).astype(np.float32),
    }
    gradients = [
        {name: numbers.normal(size=p.shape).astype(np.float32) for name, p in start.items()} for _ in range(8)
    ]
    ours = optimizer(3e-2, 3, 8, weight_decay=0.1, max_grad_norm=2.0, b1=0.8, b2=0.95)

    theirs = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in start.items()}
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs["kernel"]], "weight_decay": 0.1},
            {"params": [theirs["bias"]], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.95),
        eps=1e-8,
    )
    params, state, update = start, ours.init(start), jax.jit(ours.update)
    for n, gradient in enumerate(gradients):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for group in adamw.param_groups:
            group["lr"] = float(ours.learning_rate(n))
        for name, p in theirs.items():
            p.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        adamw.step()
    for name, p in theirs.items():
        np.testing.assert_allclose(params[name], p.detach().numpy(), rtol=2e-5, atol=1e-6)


@functools.cache
def first_moment(bound):
    adam = optimizer(1.0, 0, 10, max_grad_norm=bound, b1=0.0)
    return jax.jit(lambda g: optax.tree.get(adam.update(g, adam.init(g), g)[1], "mu"))


@given(st.sampled_from([0.1, 2.0, 10.0]), st.integers(0, 2**16))
def test_clipping_scales_to_the_bound_and_leaves_small_gradients_alone(bound, seed):
    """With b1 = 0 the first moment is the clipped gradient itself."""
    a, b = jax.random.normal(jax.random.key(seed), (2, 6))
    gradients = {"a": a, "b": b.reshape(2, 3)}
    clipped = first_moment(bound)(gradients)
    norm = float(jnp.sqrt(jnp.sum(a**2) + jnp.sum(b**2)))
    factor = min(1.0, bound / norm)
    np.testing.assert_allclose(clipped["a"], factor * a, rtol=1e-5)
    np.testing.assert_allclose(clipped["b"], factor * b.reshape(2, 3), rtol=1e-5)
    assert float(optax.tree.norm(clipped)) <= bound * (1 + 1e-5)


@pytest.mark.parametrize(("weight_decay", "bound"), [(0.3, 0.5), (0.0, None), (0.3, 1e3)])
def test_updates_are_those_of_the_chain_of_optax(weight_decay, bound):
    """Clipping, Adam and the decay of matrices alone, for three steps."""
    numbers = np.random.default_rng(0)
    shapes = {"bias": (5,), "kernel": (3, 3, 2, 5), "inner": {"scale": (2,), "kernel": (4, 2)}}
    start = jax.tree.map(
        lambda shape: jnp.asarray(numbers.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )
    ours = optimizer(0.1, 0, 9, weight_decay, bound)
    theirs = optax.chain(
        *([] if bound is None else [optax.clip_by_global_norm(bound)]),
        optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay, lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)),
        optax.scale_by_learning_rate(warmup_cosine(0.1, 0, 9)),
    )

    @functools.partial(jax.jit, static_argnums=0)
    def step(update, params, state):
        with jax.numpy_dtype_promotion("standard"):  # optax raises the float b1 to the integer count
            updates, state = update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    states = [(start, ours.init(start)), (start, theirs.init(start))]
    for _ in range(3):
        states = [step(side.update, *state) for side, state in zip((ours, theirs), states, strict=True)]
    chex.assert_trees_all_close(states[0][0], states[1][0], atol=1e-6)
    assert not np.allclose(states[0][0]["kernel"], start["kernel"], atol=0.05)
