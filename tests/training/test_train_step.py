import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import ToyBatches, loss_fn, toy, toy_params

from jaxldm.errors import InvalidArgumentError
from jaxldm.training.mesh import (
    batch_sharding,
    bytes_per_device,
    check_batch_size,
    make_mesh,
    replicated,
    state_shardings,
)
from jaxldm.training.optimizer import optimizer
from jaxldm.training.state import create_train_state
from jaxldm.training.step import compile_train_step, ema_decay_at, make_train_step, update_ema


def test_one_update_written_out():
    state, train_step = toy()
    batch = ToyBatches()[0]
    new, metrics = jax.jit(train_step)(state, batch)
    key = jax.random.fold_in(jax.random.key(7), 0)
    (loss, aux), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        state.params, state, batch, key
    )
    assert float(metrics["loss"]) == float(loss) and float(metrics["largest"]) == float(aux["largest"])
    np.testing.assert_allclose(
        metrics["grad_norm"], np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values())), rtol=1e-6
    )
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2 / 3, rtol=1e-6)
    # Adam's first step is lr sign(g), and the weights decay besides.
    for name, p in state.params.items():
        np.testing.assert_allclose(
            new.params[name], p - 1e-2 / 3 * (np.sign(gradients[name]) + 1e-2 * p), atol=1e-5
        )
    assert int(new.step) == 1 and int(new.opt_state.count) == 1


def test_jit_is_eager():
    state, train_step = toy()
    compiled = compile_train_step(train_step, make_mesh(1))
    eager, eager_metrics = train_step(state, ToyBatches()[0])
    jitted, jitted_metrics = compiled(jax.tree.map(jnp.copy, state), ToyBatches()[0])
    chex.assert_trees_all_close(eager_metrics, jitted_metrics, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(eager.params, jitted.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(eager.ema_params, jitted.ema_params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [dict(), dict(fsdp=2), dict(fsdp=8)])
def test_eight_devices_take_the_step_of_one(layout):
    assert jax.device_count() == 8
    losses, params = {}, {}
    for devices in (1, 8):
        state, train_step = toy()
        mesh = make_mesh(devices, **(layout if devices == 8 else {}))
        compiled = compile_train_step(train_step, mesh)
        state = jax.device_put(state, state_shardings(mesh, state))
        losses[devices] = []
        for step in range(4):
            batch = jax.device_put(ToyBatches()[step], batch_sharding(mesh))
            assert len(batch["x"].sharding.device_set) == devices
            state, metrics = compiled(state, batch)
            losses[devices].append(float(metrics["loss"]))
        assert len(state.params["w1"].sharding.device_set) == devices
        params[devices] = jax.device_get(state.params)
    np.testing.assert_allclose(losses[1], losses[8], rtol=1e-5)
    chex.assert_trees_all_close(params[1], params[8], rtol=1e-4, atol=1e-5)


def test_the_batch_is_really_split():
    mesh = make_mesh(8, tensor=2)
    x = jax.device_put(np.zeros((16, 3), np.float32), batch_sharding(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(4, 3)}
    check_batch_size(mesh, 16)
    with pytest.raises(InvalidArgumentError, match="multiple of 4"):
        check_batch_size(mesh, 6)
    with pytest.raises(InvalidArgumentError, match="8"):
        make_mesh(9)
    with pytest.raises(InvalidArgumentError, match="fsdp=3"):
        make_mesh(8, fsdp=3)


def test_the_share_of_a_device_falls_and_a_mesh_that_splits_nothing_is_refused():
    state, _ = toy(width=16)
    whole = bytes_per_device(jax.device_put(state, state_shardings(make_mesh(8), state)))
    split = bytes_per_device(jax.device_put(state, state_shardings(make_mesh(8, fsdp=8), state)))
    counters = 2 * 4  # of the state and of Adam
    assert whole == counters + 4 * 4 * (6 * 16 + 16) and split == counters + 4 * 4 * (6 * 2 + 2)
    odd = create_train_state(jax.random.key(0), toy_params(width=9), optimizer(1e-2, total_steps=5))
    with pytest.raises(InvalidArgumentError, match="fsdp=4 divides no axis of any of the 11 arrays"):
        state_shardings(make_mesh(8, fsdp=4), odd)


def test_a_loss_may_look_at_what_is_frozen_and_at_the_step():
    """Whatever is frozen comes back as it went in, however the loss uses it."""

    def towards(params, state, batch, key):
        return jnp.mean((params["w1"] - state.frozen["w1"]) ** 2), {"number": state.step}

    adam = optimizer(1e-1, total_steps=50)
    teacher = jax.tree.map(jnp.ones_like, toy_params())
    state = create_train_state(jax.random.key(3), toy_params(), adam, frozen=teacher)
    compiled = compile_train_step(make_train_step(towards, adam, 0.9), make_mesh(1))
    losses = []
    for number in range(50):
        state, metrics = compiled(state, {})
        losses.append(float(metrics["loss"]))
        assert int(metrics["number"]) == number
    assert losses[-1] < 0.1 * losses[0]
    chex.assert_trees_all_equal(state.frozen, teacher)


def test_steps_compile_once_and_donate_the_state():
    traces = []

    def counting_loss(*args):
        traces.append(1)
        return loss_fn(*args)

    mesh, adam = make_mesh(1), optimizer(1e-2, total_steps=5)
    first = create_train_state(jax.random.key(7), toy_params(), adam)
    compiled = compile_train_step(make_train_step(counting_loss, adam, 0.9), mesh)
    state = jax.device_put(first, replicated(mesh))
    for step in range(3):
        state, _ = compiled(state, ToyBatches()[step])
    assert len(traces) == 1
    assert first.params["w1"].is_deleted() and first.ema_params["w1"].is_deleted()


def test_ema_is_the_closed_form():
    """sum_k (1 - d) d^(n-1-k) p_k + d^n p_0 for a constant decay; one by one for a rising one."""
    values = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    average = {"p": values[0]}
    for value in values[1:]:
        average = update_ema(average, {"p": value}, jnp.float32(0.8))
    weights = np.array([0.8**5, *(0.2 * 0.8 ** (4 - k) for k in range(5))])
    np.testing.assert_allclose(average["p"], weights @ values, rtol=1e-5)

    decays = np.array([float(ema_decay_at(0.5, n)) for n in range(20)])
    np.testing.assert_allclose(decays, np.minimum(0.5, (1 + np.arange(20)) / (10 + np.arange(20))), rtol=1e-6)

    state, train_step = toy(ema_decay=0.5)
    seen = [np.asarray(state.params["w1"])]
    train_step = jax.jit(train_step)
    for step in range(5):
        state, _ = train_step(state, ToyBatches()[step])
        seen.append(np.asarray(state.params["w1"]))
    expected = seen[0]
    for d, p in zip(decays, seen[1:], strict=False):
        expected = d * expected + (1 - d) * p
    np.testing.assert_allclose(state.ema_params["w1"], expected, rtol=1e-5)
    np.testing.assert_array_equal(
        update_ema(state.params, state.params, jnp.float32(0.7))["w1"], state.params["w1"]
    )


def test_without_ema_there_is_none():
    adam = optimizer(1e-2, total_steps=5)
    state = create_train_state(jax.random.key(0), toy_params(), adam, ema=False)
    new, _ = jax.jit(make_train_step(loss_fn, adam))(state, ToyBatches()[0])
    assert new.ema_params is None
    assert new.evaluation_params is new.params


def test_each_update_draws_its_own_noise_from_the_key_and_its_number():
    adam = optimizer(1e-2, total_steps=5)

    def draws(params, state, batch, key):
        return 0.0 * jnp.sum(params["w1"]) + jax.random.normal(key), {"number": state.step}

    train_step = jax.jit(make_train_step(draws, adam))
    state = create_train_state(jax.random.key(3), toy_params(), adam, ema=False)
    for n in range(3):
        state, metrics = train_step(state, {})
        assert float(metrics["loss"]) == float(jax.random.normal(jax.random.fold_in(jax.random.key(3), n)))
        assert int(metrics["number"]) == n


def test_bfloat16_compute_has_a_float32_loss_and_state():
    def loss_bf16(params, state, batch, key):
        low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        output = jnp.tanh(batch["x"].astype(jnp.bfloat16) @ low["w1"]) @ low["w2"]
        return jnp.mean((output.astype(jnp.float32) - batch["y"]) ** 2), {}

    adam = optimizer(1e-2, total_steps=5)
    state = create_train_state(jax.random.key(3), toy_params(), adam)
    new, metrics = jax.jit(make_train_step(loss_bf16, adam, 0.9))(state, ToyBatches()[0])
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(new, state)
    with pytest.raises(InvalidArgumentError, match="of bfloat16"):
        make_train_step(lambda *a: (loss_bf16(*a)[0].astype(jnp.bfloat16), {}), adam)(state, ToyBatches()[0])


def test_optax_global_norm_is_the_logged_one_before_clipping():
    adam = optimizer(1e-2, total_steps=5, max_grad_norm=1e-3)
    state = create_train_state(jax.random.key(3), toy_params(), adam, ema=False)
    _, metrics = jax.jit(make_train_step(loss_fn, adam))(state, ToyBatches()[0])
    key = jax.random.fold_in(state.key, 0)
    gradients, _ = jax.jit(jax.grad(loss_fn, has_aux=True))(state.params, state, ToyBatches()[0], key)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-6)
    assert float(metrics["grad_norm"]) > 1e-2


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "schedule_free_adamw", "prodigy"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_state_keeps_its_dtypes(name, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), toy_params())
    adam = optimizer(1e-2, 0, 8, name=name)
    state = create_train_state(jax.random.key(7), params, adam, power_ema=(0.1,))

    def loss(params, *given):
        return loss_fn(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), *given)

    step = jax.jit(make_train_step(loss, adam, 0.9, power_ema=(0.1,)))
    with jax.numpy_dtype_promotion("standard"):
        new, _ = step(state, ToyBatches()[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_an_update_that_is_not_finite_changes_nothing_where_a_state_is_chosen_either_way(
    backend, monkeypatch
):
    """Elementwise as on accelerators, and by a conditional: the same finite updates, and none of NaN."""
    after = {}
    for here in ("cpu", backend):
        state, train_step = toy()
        monkeypatch.setattr(jax, "default_backend", lambda here=here: here)
        step = jax.jit(train_step)
        good, _ = step(state, ToyBatches()[0])
        spoilt = jax.tree.map(
            lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, ToyBatches()[1]
        )
        kept, metrics = step(good, spoilt)
        assert float(metrics["skipped"]) == 1 and int(kept.step) == 2
        chex.assert_trees_all_equal(kept.replace(step=good.step), good)
        after[here] = good.params
    chex.assert_trees_all_close(after["cpu"], after[backend], rtol=1e-6)
