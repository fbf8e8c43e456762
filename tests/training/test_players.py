"""Several networks that move in turn, and a batch in parts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_params

from jaxldm.errors import InvalidArgumentError
from jaxldm.training.mesh import batch_sharding, make_mesh
from jaxldm.training.optimizer import optimizer
from jaxldm.training.state import create_train_state
from jaxldm.training.step import Player, compile_train_step, ema_decay_at, make_train_step, update_ema

ADAM = optimizer(1e-1, warmup_steps=3, total_steps=12)
OTHER = optimizer(1e-2, warmup_steps=5, total_steps=12)


def towards_the_other(name):
    """The squared distance from where the other player is, plus a draw: what it sees shows in the loss."""

    def loss(params, state, batch, key):
        draw = jax.random.normal(key)
        seen = state.params[name]["w"]
        return jnp.mean((params["w"] - seen) ** 2) + 0.0 * draw, {"draw": draw, "seen": jnp.sum(seen)}

    return loss


def two_players(**turn):
    return (
        Player("maker", towards_the_other("critic"), ADAM, ema_decay=0.9),
        Player("critic", towards_the_other("maker"), OTHER, **turn),
    )


def begin(players):
    params = {"maker": {"w": jnp.arange(3.0)}, "critic": {"w": -jnp.ones(3)}}
    return create_train_state(jax.random.key(7), params, players)


def test_players_move_in_turn_and_see_what_the_ones_before_have_become():
    players = two_players()
    state = begin(players)
    new, metrics = jax.jit(make_train_step(players))(state, {})
    key = jax.random.fold_in(state.key, 0)
    expected = {}
    now = state
    for place, player in enumerate(players):
        own = now.params[player.name]
        (loss, aux), gradients = jax.value_and_grad(player.loss, has_aux=True)(
            own, now, {}, jax.random.fold_in(key, place)
        )
        updates, _ = player.optimizer.update(gradients, now.opt_state[player.name], own)
        now = now.replace(params=now.params | {player.name: {"w": own["w"] + updates["w"]}})
        names = {"loss": loss, "learning_rate": player.optimizer.learning_rate(0), **aux}
        expected |= names if place == 0 else {f"{player.name}_{name}": names[name] for name in names}
    chex.assert_trees_all_close(new.params, now.params, rtol=1e-6)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    assert float(metrics["critic_seen"]) != float(jnp.sum(state.params["maker"]["w"]))  # it had moved
    assert float(metrics["draw"]) != float(metrics["critic_draw"])
    average = update_ema(state.params["maker"], new.params["maker"], ema_decay_at(0.9, 0))
    chex.assert_trees_all_close(new.ema_params, {"maker": average}, rtol=1e-6)
    assert set(new.evaluation_params) == {"maker", "critic"}
    chex.assert_trees_all_equal(new.evaluation_params["critic"], new.params["critic"])


@pytest.mark.parametrize("every", [3, 7])  # computed in every update on a CPU, and in its own alone
def test_a_player_whose_turn_it_is_not_stays_bit_for_bit(every):
    """start=2: it moves after 2, 2 + every, ... finished updates, and counts its own for its schedule."""
    players = two_players(every=every, start=2)
    step, state, moved = jax.jit(make_train_step(players)), begin(players), []
    for number in range(3 * every):
        before = jax.device_get((state.params["critic"], state.opt_state["critic"]))
        state, metrics = step(state, {})
        after = jax.device_get((state.params["critic"], state.opt_state["critic"]))
        if number % every == 2:
            rate = OTHER.learning_rate(len(moved))
            np.testing.assert_allclose(metrics["critic_learning_rate"], rate, rtol=1e-6)
            assert np.isfinite(metrics["critic_loss"]) and after[1].count == len(moved) + 1
            assert (before[0]["w"] != after[0]["w"]).all()
            moved.append(number)
        else:
            chex.assert_trees_all_equal(before, after)
            assert np.isnan(metrics["critic_loss"]) and np.isfinite(metrics["loss"])
    assert moved == [2, 2 + every, 2 + 2 * every]
    assert int(state.opt_state["maker"].count) == 3 * every


def test_a_player_with_a_loss_that_is_not_finite_stays_and_the_other_moves():
    players = two_players()
    bad = Player("critic", lambda *args: (jnp.float32(jnp.inf) * jnp.sum(args[0]["w"]), {}), OTHER)
    state = begin(players)
    new, metrics = jax.jit(make_train_step((players[0], bad)))(state, {})
    assert float(metrics["skipped"]) == 1.0 and np.isfinite(metrics["loss"])
    chex.assert_trees_all_equal(new.params["critic"], state.params["critic"])
    chex.assert_trees_all_equal(new.opt_state["critic"], state.opt_state["critic"])
    assert (new.params["maker"]["w"] != state.params["maker"]["w"]).any()


def test_gradients_that_are_not_finite_are_skipped_too():
    """The loss is 0, its derivative at 0 is infinite."""
    loss = lambda params, state, batch, key: (jnp.sum(jnp.sqrt(params["w"])), {})  # noqa: E731
    state = create_train_state(jax.random.key(0), {"w": jnp.zeros(2)}, ADAM)
    new, metrics = jax.jit(make_train_step(loss, ADAM, 0.9))(state, {})
    assert float(metrics["loss"]) == 0.0 and float(metrics["skipped"]) == 1.0
    chex.assert_trees_all_equal(new.params, state.params)
    chex.assert_trees_all_equal(new.ema_params, state.ema_params)


def squares(params, state, batch, key):
    error = jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"] - batch["y"]
    return jnp.mean(error**2), {"bias": jnp.mean(error), "draw": jax.random.normal(key)}


@pytest.mark.parametrize("devices", [1, 8])
def test_four_parts_of_16_are_one_batch_of_64(devices):
    numbers = np.random.default_rng(0)
    batch = {
        "x": numbers.normal(size=(64, 6)).astype(np.float32),
        "y": numbers.normal(size=(64, 1)).astype(np.float32),
    }
    mesh, found = make_mesh(devices), {}
    for accumulate in (1, 4):
        state = create_train_state(jax.random.key(1), toy_params(), ADAM)
        step = compile_train_step(make_train_step(squares, ADAM, 0.9, accumulate=accumulate), mesh)
        state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        found[accumulate] = jax.device_get((state.params, state.opt_state.mu)), metrics
    chex.assert_trees_all_close(found[1][0], found[4][0], rtol=2e-5, atol=1e-7)
    for name in ("loss", "grad_norm", "bias", "learning_rate"):
        np.testing.assert_allclose(found[1][1][name], found[4][1][name], rtol=2e-6, err_msg=name)
    key = jax.random.fold_in(jax.random.key(1), 0)
    draws = [float(jax.random.normal(jax.random.fold_in(key, part))) for part in range(4)]
    np.testing.assert_allclose(found[4][1]["draw"], np.mean(draws), rtol=1e-5)


def test_what_cannot_be_is_refused():
    maker, critic = two_players()
    with pytest.raises(InvalidArgumentError, match="two players have one name"):
        make_train_step((maker, maker))
    with pytest.raises(InvalidArgumentError, match="have their own optimizer"):
        make_train_step((maker, critic), ADAM)
    with pytest.raises(InvalidArgumentError, match="optimizer is missing"):
        make_train_step(squares)
    with pytest.raises(InvalidArgumentError, match="dict with the parameters of each player"):
        create_train_state(jax.random.key(0), {"maker": {"w": jnp.ones(3)}}, (maker, critic))
    state = create_train_state(jax.random.key(0), toy_params(), ADAM)
    with pytest.raises(InvalidArgumentError, match="64 examples cannot be split into 3 equal parts"):
        make_train_step(squares, ADAM, accumulate=3)(state, {"x": jnp.ones((64, 6)), "y": jnp.ones((64, 1))})
