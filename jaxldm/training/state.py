"""What a run is at one moment: one pytree, so that jit, sharding and checkpoints need no special case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jaxldm.arguments import a_tree, checked, flag, instance, one_key, refuse
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.named_optimizers import evaluated
from jaxldm.training.power_ema import SOME_LENGTHS, name_of

Params = Any  # a nested dict of float32 arrays


class TrainState(flax.struct.PyTreeNode):
    """Parameters, optimizer state, moving average and key of a run.

    Attributes:
        step: number of finished updates.
        params: what the optimizer moves. Of several players (`jaxldm.training.Player`) this and the two
            below are dicts by their names.
        opt_state: of the optimizer.
        ema_params: moving average of `params`; None where none is kept. Players without one have no entry.
        key: never changes: update n draws its random numbers from `fold_in(key, n)`, so a resumed run draws
            the same numbers as one that was never interrupted.
        frozen: any pytree that a loss may look at and no optimizer moves (a teacher, the base weights under
            an adapter); None where there is none.
        averages: moving averages of power-function profiles by their relative length
            (`jaxldm.training.post_hoc_ema`); None where none are kept.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema_params: Params | None
    key: PRNGKeyArray
    frozen: Any = None
    averages: dict[str, Params] | None = None

    @property
    def evaluation_params(self) -> Params:
        """The parameters to draw and to measure with: the average where there is one, the optimizer's too."""
        if isinstance(self.opt_state, dict):  # of players
            own = {name: evaluated(params, self.opt_state[name]) for name, params in self.params.items()}
            return {**own, **(self.ema_params or {})}
        return evaluated(self.params, self.opt_state) if self.ema_params is None else self.ema_params


def has_init(name: str, value: Any) -> Any:
    """An optimizer, or players that have one each."""
    if isinstance(value, (list, tuple)) and not callable(getattr(value, "init", None)):
        for player in value:
            has_init(f"the optimizer of each of {name}", getattr(player, "optimizer", player))
        return value
    if not callable(getattr(value, "init", None)) or isinstance(value, type):
        raise refuse(name, "an optimizer such as training.optimizer(1e-3)", value)
    return value


A_STATE = instance(TrainState, "a state from training.create_train_state")


def trained_params(name: str, value: Any) -> Any:
    """A tree of floating-point arrays."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(a_tree(name, value))[0]:
        if not jnp.issubdtype(getattr(leaf, "dtype", float), jnp.floating):
            raise refuse(
                f"{name}{jax.tree_util.keystr(path)}", "floating-point numbers, which are trained", leaf
            )
    return value


@checked(
    key=one_key, params=trained_params, optimizer=has_init, ema=flag, frozen=a_tree, power_ema=SOME_LENGTHS
)
def create_train_state(
    key: PRNGKeyArray,
    params: Params,
    optimizer,
    *,
    ema: bool = True,
    frozen: Any = None,
    power_ema: Sequence[float] = (),
) -> TrainState:
    """The state before the first update: `ema_params` starts as a copy of `params`.

    Given players in place of an optimizer, `params` are a dict by their names, and moving averages are kept
    of those with an `ema_decay`. `power_ema` are the relative lengths of power-function averages to keep.

    A copy, not the same arrays: the train step is given the whole state to overwrite, and one buffer cannot
    be given away twice. For the same reason the key and `frozen` are copied, as their owner may still want
    them.
    """
    copy = lambda tree: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)  # noqa: E731
    if callable(getattr(optimizer, "init", None)):
        opt_state, ema_params = optimizer.init(params), copy(params) if ema else None
    else:
        _check_names(params, [player.name for player in optimizer])
        opt_state = {player.name: player.optimizer.init(params[player.name]) for player in optimizer}
        averaged = [player.name for player in optimizer if player.ema_decay is not None]
        ema_params = {name: copy(params[name]) for name in averaged} or None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=copy(params),
        opt_state=opt_state,
        ema_params=ema_params,
        key=jnp.array(key, copy=True),
        frozen=copy(frozen),
        averages={name_of(length): copy(params) for length in power_ema} or None,
    )


def _check_names(params: Params, players: list[str]) -> None:
    if not isinstance(params, dict) or sorted(params) != sorted(players):
        given = ", ".join(map(str, params)) if isinstance(params, dict) else type(params).__name__
        raise InvalidArgumentError(
            f"params must be a dict with the parameters of each player ({', '.join(players)}), got {given}"
        )
