"""The state that a training begins with. On a mesh that splits it, no array of it is whole on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from jaxldm.models.sharding import drawn_on
from jaxldm.training.mesh import place_state, splits, state_shardings
from jaxldm.training.state import TrainState


def begin_on(
    mesh: Mesh | None,
    parts: Callable[[], tuple[Any, Any]],
    create: Callable[[PRNGKeyArray, Any, Any], TrainState],
    key: PRNGKeyArray,
) -> TrainState:
    """`create(key, *parts())`, each array made where `state_shardings` has it.

    Args:
        mesh: of the training. Where that splits nothing, and for None, JAX's default device has all of it.
        parts: -> (parameters, what is frozen): drawn, or arrays that lie on the mesh already.
        create: pure; copies what it is given.
        key: of the state.

    Raises:
        InvalidArgumentError: a mesh that splits nothing.
    """
    if mesh is None or not splits(mesh):
        return create(key, *parts())
    with drawn_on(mesh):
        given = place_state(mesh, (key, *parts()))
    return creation(mesh, create, given)(*given)


def creation(mesh: Mesh, create: Callable[..., TrainState], given: tuple[Any, ...]) -> Any:
    """`create` as a program that makes each array of the state where it lies."""
    shapes = jax.eval_shape(create, *given)
    return jax.jit(create, out_shardings=state_shardings(mesh, shapes))
