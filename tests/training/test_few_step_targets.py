"""What the losses of the methods compare with what, and with which weight: by the papers' formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from points import FLOW, batch_of, network, setting, teacher_of

from jaxldm import few_steps
from jaxldm.training import Player, create_train_state
from jaxldm.training.few_steps.method import TABLE, TEACHER
from jaxldm.training.few_steps.methods import METHODS

AVERAGED = {"lcm", "cd", "shortcut"}  # Luo et al. 2023, Song et al. 2023, Frans et al. 2025
STUDENT = teacher_of(1.2)
OTHER = {**STUDENT, "points": STUDENT["points"] + 0.7, "late": jnp.asarray(0.2)}


def state_of(name, own):
    """(players, the state of a student that knows half of it)."""
    made = METHODS[name].make_loss(own)
    players = [Player("student", made, own.optimizer, 0.9)] if callable(made) else made
    frozen = {TEACHER: teacher_of(), TABLE: jnp.ones((2, 5, 2, 2, 1))}
    params = {player.name: STUDENT for player in players}
    state = create_train_state(jax.random.key(0), params, players, frozen=frozen)
    return players, state.replace(params=STUDENT, ema_params=STUDENT) if callable(made) else state


@pytest.mark.parametrize("name", METHODS)
def test_a_moving_average_is_the_target_where_the_paper_says_so_and_nowhere_else(name):
    """The loss moves with the average alone, or not by a bit."""
    players, state = state_of(name, setting(name, (1.0, 4.0) if name == "guidance" else (1.0, 1.0)))
    several = len(players) > 1
    for player in players:

        def loss(params, average, player=player):
            averages = {other.name: average for other in players} if several else average
            found = state.replace(ema_params=averages)
            return player.loss(params, found, batch_of(), jax.random.key(4))[0]

        loss = jax.jit(loss)
        same, moved, none = (loss(STUDENT, average) for average in (STUDENT, OTHER, None))
        assert (same != moved) == (name in AVERAGED)
        if not several:
            np.testing.assert_allclose(same, none, rtol=1e-6)


def test_the_next_round_of_progressive_distillation_begins_with_the_average():
    _, state = state_of("progressive", setting("progressive"))
    after = METHODS["progressive"].next_round(state.replace(ema_params=OTHER))
    for tree in (after.params, after.ema_params, after.frozen[TEACHER]):
        chex.assert_trees_all_equal(tree, OTHER)
    without = METHODS["progressive"].next_round(state.replace(ema_params=None))
    assert without.ema_params is None
    chex.assert_trees_all_equal(without.frozen[TEACHER], STUDENT)


@pytest.fixture
def compared(monkeypatch):
    """What `consistency_loss` was given: (x_t, t, x_s, s, its options)."""
    given = []
    real = few_steps.consistency_loss

    def seen(f, target, x_t, t, x_s, s, **options):
        given.append((x_t, t, x_s, s, options))
        return real(f, target, x_t, t, x_s, s, **options)

    monkeypatch.setattr(few_steps, "consistency_loss", seen)
    return given


@pytest.mark.parametrize(("name", "weighted"), [("cd", False), ("ect", True), ("ict", True)])
@pytest.mark.parametrize("step", [0, 5])
def test_weights_and_distances_of_consistency(name, weighted, step, compared):
    """Song and Dhariwal 2024, eq. 8 and section 3.3: 1 / (sigma_t - sigma_s), and c = 0.00054 sqrt(d)."""
    own = setting(name)._replace(network=lambda *inputs: network(FLOW, *inputs), prediction=FLOW)
    (player,), state = state_of(name, own)
    player.loss(STUDENT, state.replace(step=jnp.int32(step)), batch_of(), jax.random.key(4))
    x_t, t, x_s, s, options = compared[0]
    sigma_t, sigma_s = (np.asarray(time, np.float64) / (1 - np.asarray(time, np.float64)) for time in (t, s))
    assert (sigma_s < sigma_t).all()
    weight = options.get("weight")
    assert (weight is not None) == weighted
    if weighted:  # both have the noise of one draw
        np.testing.assert_allclose(weight, 1 / (sigma_t - sigma_s), rtol=2e-3)
        t, s = (time.reshape(-1, 1, 1, 1) for time in (t, s))
        x_0 = batch_of()["mean"]
        np.testing.assert_allclose(x_s - (1 - s) * x_0, s / t * (x_t - (1 - t) * x_0), atol=1e-5)
    c = 0.00054 * np.sqrt(4)  # of 2 x 2 x 1 pixels
    error = np.stack([np.full((2, 2, 1), size) for size in (0.0, 2e-4, 1e-3, 1.0)]).astype(np.float32)
    found = options["distance"](jnp.asarray(error))
    expected = np.sqrt(np.sum(error.astype(np.float64) ** 2, (1, 2, 3)) + c**2) - c
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-9)
