"""One update as a pure function, and the same function compiled for a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxldm.arguments import as_array, check_fields, checked, count, function, number, optional, refuse, text
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.training.mesh import A_MESH, batch_sharding, replicated, state_shardings
from jaxldm.training.optimizer import AN_OPTIMIZER, Optimizer
from jaxldm.training.power_ema import SOME_LENGTHS, gamma_of, name_of, step_towards, update_power_ema
from jaxldm.training.state import A_STATE, Params, TrainState

Batch = Any  # a dict of arrays with the examples along axis 0
Metrics = dict[str, Float[Array, ""]]
LossFunction = Callable[[Params, TrainState, Batch, PRNGKeyArray], tuple[Float[Array, ""], Metrics]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
A_LOSS = function("(params, state, batch, key) -> (loss, metrics)")


@dataclasses.dataclass(frozen=True)
class Player:
    """One of several networks that train each other, such as an autoencoder and its discriminator.

    Attributes:
        name: its entry in the dicts `params`, `opt_state` and `ema_params` of the state.
        loss: `loss(params, state, batch, key) -> (loss, metrics)`; `params` are the player's own, those of
            the others are in `state.params`.
        optimizer: of its parameters.
        ema_decay: of their moving average; None: none is kept.
        every: it moves in every so-manieth update,
        start: beginning with the update after so many.
    """

    name: str
    loss: LossFunction
    optimizer: Optimizer
    ema_decay: float | None = None
    every: int = 1
    start: int = 0

    def __post_init__(self):
        check_fields(
            self,
            name=text,
            loss=A_LOSS,
            optimizer=AN_OPTIMIZER,
            ema_decay=optional(number(0, 1)),
            every=count(1),
            start=count(0),
        )

    @property
    def always(self) -> bool:
        """Whether it moves in every update."""
        return self.every == 1 and self.start == 0

    def turns(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """How often it has moved in the first `step` updates."""
        return step if self.always else jnp.maximum(0, step - self.start + self.every - 1) // self.every

    def moves(self, step: Int[Array, ""]) -> Any:
        """Whether it moves in the update after `step`."""
        return (step >= self.start) & ((step - self.start) % self.every == 0)


def some_players(name: str, value: Any) -> tuple[Player, ...]:
    """Players with different names."""
    wanted = "a loss, or players such as (training.Player(name, loss, optimizer), ...)"
    if (
        isinstance(value, (str, bytes))
        or hasattr(value, "_fields")
        or not isinstance(value, Sequence)
        or not value
    ):
        raise refuse(name, wanted, value)
    for player in value:
        if not isinstance(player, Player):
            raise refuse(f"each of {name}", "a training.Player(name, loss, optimizer)", player)
    names = [player.name for player in value]
    if len(set(names)) < len(names):
        raise InvalidArgumentError(f"{name}: two players have one name, got {', '.join(names)}")
    return tuple(value)


def a_loss_or_players(name: str, value: Any) -> Any:
    """A loss function, or players."""
    return A_LOSS(name, value) if callable(value) else some_players(name, value)


def ema_decay_at(ema_decay: float, step: int | Int[Array, ""]) -> Float[Array, ""]:
    """The decay after `step` finished updates: min(ema_decay, (1 + step) / (10 + step)).

    The second term lets the average forget the random start quickly; it no longer matters after about
    9 / (1 - ema_decay) steps. Source: the `num_updates` rule of TensorFlow's ExponentialMovingAverage.
    """
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(ema_decay, (1.0 + n) / (10.0 + n))


def update_ema(ema_params: Params, params: Params, decay: Float[Array, ""]) -> Params:
    """ema <- decay ema + (1 - decay) params, written as a step towards `params` so that equal stays equal.

    Computed in float32 at least; each average keeps its dtype.
    """
    return step_towards(ema_params, params, 1.0 - decay)


@checked(
    loss_fn=a_loss_or_players,
    optimizer=optional(AN_OPTIMIZER),
    ema_decay=optional(number(0, 1)),
    accumulate=count(1),
    power_ema=SOME_LENGTHS,
)
def make_train_step(
    loss_fn: LossFunction | Sequence[Player],
    optimizer: Optimizer | None = None,
    ema_decay: float | None = None,
    *,
    accumulate: int = 1,
    power_ema: Sequence[float] = (),
) -> TrainStep:
    """Return a pure `train_step(state, batch) -> (state, metrics)`, of one network or of several players.

    Players move in turn, in the order given: each sees in `state` what those before it have just become, and
    one whose turn it is not stays as it is, bit for bit, its optimizer's state too.

    Args:
        loss_fn: `loss_fn(params, state, batch, key) -> (loss, metrics)`: a float32 scalar, the mean over the
            batch, and a dict of numbers to log. Gradients are taken with respect to `params`, which are
            `state.params`; of the state it may use `step` (for schedules inside the loss) and `frozen`.
            `key` is `fold_in(state.key, state.step)`. Or players, each of which has a loss: the key of
            player i is `fold_in(key, i)`.
        optimizer: see `jaxldm.training.optimizer`; players have their own.
        ema_decay: of the moving average after each update; the state must then hold `ema_params`.
        accumulate: the batch is split into so many parts that follow one another, and their gradients and
            metrics are averaged: an update as of the whole batch with the memory of a part. The key of part
            i is `fold_in(key, i)`.
        power_ema: the relative lengths of the power-function averages that the state keeps, see
            `post_hoc_ema`; of one network.

    Returns:
        The step. Its metrics are `loss`, `grad_norm` (before clipping), `learning_rate`, `skipped` and those
        of the loss; of the second and later players "NAME_loss" and so on. Those of a player whose turn it
        is not are NaN. An update whose loss or gradients are not finite is skipped: parameters, optimizer
        and moving average stay as they are, only `step` goes on, and `skipped` is 1 instead of 0.
    """
    if callable(loss_fn):
        if optimizer is None:
            raise InvalidArgumentError("optimizer is missing: write make_train_step(loss_fn, optimizer)")
        return _step_of_one(_Turn(loss_fn, optimizer, ema_decay, accumulate, tuple(power_ema)))
    if optimizer is not None or ema_decay is not None or len(power_ema):
        raise InvalidArgumentError(
            "players have their own optimizer and ema_decay, and no power_ema: write make_train_step(players)"
        )
    return _step_of_players(loss_fn, accumulate)


class _Own(NamedTuple):
    """What an update changes of one network."""

    params: Params
    opt_state: Any
    ema_params: Params | None
    averages: dict[str, Params] | None


@dataclasses.dataclass(frozen=True)
class _Turn:
    """One update of one network."""

    loss_fn: LossFunction
    optimizer: Optimizer
    ema_decay: float | None
    accumulate: int
    power_ema: tuple[float, ...] = ()

    def __call__(
        self, own: _Own, state: TrainState, batch: Batch, key: PRNGKeyArray, turn: Int[Array, ""]
    ) -> tuple[_Own, Metrics]:
        loss, aux, gradients = self.gradients(own.params, state, batch, key)
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        moved = _when_finite(finite, lambda own: self.moved(own, gradients, turn), own)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": self.optimizer.learning_rate(turn),
            "skipped": jnp.where(finite, 0.0, 1.0),
            **aux,
        }
        return moved, metrics

    def moved(self, own: _Own, gradients: Params, turn: Int[Array, ""]) -> _Own:
        """Parameters, optimizer and averages after an update by these gradients."""
        updates, opt_state = self.optimizer.update(gradients, own.opt_state, own.params)
        params = optax.apply_updates(own.params, updates)
        ema_params, averages = own.ema_params, own.averages
        if self.ema_decay is not None:
            ema_params = update_ema(ema_params, params, ema_decay_at(self.ema_decay, turn))
        if self.power_ema:
            averages = self.averages(averages, params, turn)
        return _Own(params, opt_state, ema_params, averages)

    def averages(self, averages: Any, params: Params, turn: Int[Array, ""]) -> dict[str, Params]:
        """The power-function averages after this update."""
        names = [name_of(length) for length in self.power_ema]
        if sorted(names) != sorted(averages or ()):
            raise InvalidArgumentError(
                f"the state keeps the power-function averages {', '.join(averages or ()) or 'of none'}, the "
                f"step {', '.join(names)}: give create_train_state and make_train_step the same power_ema"
            )
        return {
            name: update_power_ema(averages[name], params, gamma_of(length), turn)
            for name, length in zip(names, self.power_ema, strict=True)
        }

    def loss(self, *arguments: Any) -> tuple[Any, dict[str, Any]]:
        """What the loss function returns, if it is what it should."""
        found = self.loss_fn(*arguments)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
            got = f"a tuple of {len(found)}" if isinstance(found, tuple) else shown(found)
            raise InvalidArgumentError(
                f"loss_fn must return (loss, metrics), got {got}: write return loss, {{}} where there is "
                "nothing else to log"
            )
        loss, metrics = found
        if np.shape(loss) != () or getattr(loss, "dtype", None) != jnp.float32:
            raise InvalidArgumentError(
                f"loss_fn must return a float32 scalar as its loss, got {shown(loss)}: "
                "write jnp.mean(loss.astype(jnp.float32))"
            )
        for name, value in metrics.items():
            as_array(f"the metric {name} of loss_fn", "a number or an array of numbers", value)
        return loss, dict(metrics)

    def gradients(self, params: Params, state: TrainState, batch: Batch, key: PRNGKeyArray):
        """(loss, other metrics, gradients), averaged over the parts of the batch."""

        def of(batch, key):
            (loss, aux), gradients = jax.value_and_grad(self.loss, has_aux=True)(params, state, batch, key)
            return loss, aux, gradients

        if self.accumulate == 1:
            return of(batch, key)

        def add(total, part):
            number, batch = part
            loss, aux, gradients = of(batch, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, gradients), (loss, aux)

        parts = jnp.arange(self.accumulate), _parts(batch, self.accumulate)
        total, metrics = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        loss, aux = jax.tree.map(functools.partial(jnp.mean, axis=0), metrics)
        return loss, aux, jax.tree.map(lambda gradient: gradient / self.accumulate, total)


def _when_finite(finite: Bool[Array, ""], update: Callable[[_Own], _Own], own: _Own) -> _Own:
    """`update(own)`, or `own` as it is.

    A conditional on a processor: with an elementwise choice the new and the old state are in memory together,
    and an update of AdamW takes twice as long. On an accelerator the host would wait for the gradients.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(finite, update, lambda own: own, own)
    return _chosen(finite, update(own), own)


def _chosen(new_ones: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new arrays or the old ones, elementwise."""
    return jax.tree.map(lambda new, old: jnp.where(new_ones, new, old), new, old)


def _parts(batch: Batch, number: int) -> Batch:
    """The batch as parts that follow one another along a new axis 0.

    Part i has the examples i, i + number, ...: so every device keeps its own, where they are split over it.
    """

    def split(column):
        if column.shape[0] % number:
            raise InvalidArgumentError(
                f"a batch of {column.shape[0]} examples cannot be split into {number} equal parts: choose an "
                "accumulate that divides it"
            )
        return jnp.swapaxes(jnp.reshape(column, (-1, number, *column.shape[1:])), 0, 1)

    return jax.tree.map(split, batch)


def _step_of_one(turn: _Turn) -> TrainStep:
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state = A_STATE("state", state)
        if turn.ema_decay is not None and state.ema_params is None:
            raise InvalidArgumentError(
                "the state keeps no moving average: write create_train_state(..., ema=True), or no ema_decay"
            )
        key = jax.random.fold_in(state.key, state.step)
        own = _Own(state.params, state.opt_state, state.ema_params, state.averages)
        own, metrics = turn(own, state, batch, key, state.step)
        return state.replace(step=state.step + 1, **own._asdict()), metrics

    return train_step


def _step_of_players(players: Sequence[Player], accumulate: int) -> TrainStep:
    turns = [_Turn(player.loss, player.optimizer, player.ema_decay, accumulate) for player in players]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state = A_STATE("state", state)
        key, new, metrics = jax.random.fold_in(state.key, state.step), state, {}
        for place, (player, turn) in enumerate(zip(players, turns, strict=True)):
            update = functools.partial(
                turn,
                state=new,
                batch=batch,
                key=jax.random.fold_in(key, place),
                turn=player.turns(state.step),
            )
            trees = (new.params, new.opt_state, new.ema_params)
            own = _Own(*(_of(tree, player.name) for tree in trees), averages=None)
            if player.always:
                own, found = update(own)
            else:
                own, found = _when_due(player, state.step, update, own)
            new = new.replace(
                **{
                    name: {**(getattr(new, name) or {}), player.name: part}
                    for name, part in own._asdict().items()
                    if part is not None
                }
            )
            skipped = jnp.maximum(metrics.get("skipped", 0.0), found["skipped"])
            metrics |= found if place == 0 else {f"{player.name}_{name}": found[name] for name in found}
            metrics["skipped"] = skipped
        return new.replace(step=state.step + 1), metrics

    return train_step


def _of(tree: Any, name: str) -> Any:
    """The entry of a player; None where it has no moving average."""
    return None if tree is None else cast(Any, tree).get(name)


_SLOWER_INSIDE = 5  # times, inside of a conditional of XLA's CPU backend


def _when_due(
    player: Player, step: Int[Array, ""], update: Callable[[_Own], tuple[_Own, Metrics]], own: _Own
) -> tuple[_Own, Metrics]:
    """The update where it is due.

    Inside of a conditional XLA's CPU backend has one thread: a discriminator took five times as long. So a
    player that only starts late, or moves in more than every fifth update, is there computed in all of them,
    and kept when it is due.
    """
    due, stay = player.moves(step), _stay(update)
    if jax.default_backend() != "cpu" or player.every >= _SLOWER_INSIDE:
        return jax.lax.cond(due, update, stay, own)
    return _chosen(due, update(own), stay(own))


def _stay(update: Callable[[_Own], tuple[_Own, Metrics]]) -> Callable[[_Own], tuple[_Own, Metrics]]:
    """What takes the place of an update that is not due."""

    def stay(own):
        _, metrics = jax.eval_shape(update, own)
        floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
        nothing = lambda leaf: jnp.full(leaf.shape, jnp.nan if floating(leaf) else 0, leaf.dtype)  # noqa: E731
        return own, jax.tree.map(nothing, metrics) | {"skipped": jnp.zeros((), jnp.float32)}

    return stay


@checked(train_step=function("(state, batch) -> (state, metrics)"), mesh=A_MESH)
def compile_train_step(train_step: TrainStep, mesh: Mesh) -> TrainStep:
    """`jax.jit` of a train step over a mesh: state as `state_shardings` says, batch split, metrics whole.

    Give it a state that lies there already, `jax.device_put(state, state_shardings(mesh, state))`. The state
    is donated: its memory is used for the new one, and the old one must not be touched afterwards.
    """

    def placed_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        shardings = state_shardings(mesh, state)
        new_state, metrics = train_step(state, batch)
        return jax.lax.with_sharding_constraint(new_state, shardings), metrics

    return jax.jit(
        placed_step,
        donate_argnums=0,
        in_shardings=(None, batch_sharding(mesh)),
        out_shardings=(None, replicated(mesh)),
    )
