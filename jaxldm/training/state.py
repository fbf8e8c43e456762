"""What a run is at one moment: one pytree, so that jit, sharding and checkpoints need no special case."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jaxldm.arguments import a_tree, checked, flag, one_key, refuse

Params = Any  # a nested dict of float32 arrays


class TrainState(flax.struct.PyTreeNode):
    """Parameters, optimizer state, moving average and key of a run.

    Attributes:
        step: number of finished updates.
        params: what the optimizer moves.
        opt_state: of the optimizer.
        ema_params: moving average of `params`; None where none is kept.
        key: never changes: update n draws its random numbers from `fold_in(key, n)`, so a resumed run draws
            the same numbers as one that was never interrupted.
        frozen: any pytree that a loss may look at and no optimizer moves (a teacher, the base weights under
            an adapter); None where there is none.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema_params: Params | None
    key: PRNGKeyArray
    frozen: Any = None

    @property
    def evaluation_params(self) -> Params:
        """The parameters to draw and to measure with: the moving average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def has_init(name: str, value: Any) -> Any:
    """An optimizer."""
    if not callable(getattr(value, "init", None)) or isinstance(value, type):
        raise refuse(name, "an optimizer such as training.optimizer(1e-3)", value)
    return value


@checked(key=one_key, params=a_tree, optimizer=has_init, ema=flag, frozen=a_tree)
def create_train_state(
    key: PRNGKeyArray, params: Params, optimizer, *, ema: bool = True, frozen: Any = None
) -> TrainState:
    """The state before the first update: `ema_params` starts as a copy of `params`.

    A copy, not the same arrays: the train step is given the whole state to overwrite, and one buffer cannot
    be given away twice. For the same reason the key and `frozen` are copied, as their owner may still want
    them.
    """
    copy = lambda tree: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)  # noqa: E731
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=copy(params),
        opt_state=optimizer.init(params),
        ema_params=copy(params) if ema else None,
        key=jnp.array(key, copy=True),
        frozen=copy(frozen),
    )
