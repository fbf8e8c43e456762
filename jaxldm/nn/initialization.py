"""Initial values of parameters: each parameter has an initializer, and `init_params` draws all at once.

Drawing parameter by parameter, as Flax does, works here too, but XLA compiles each draw by itself: a U-Net of
a hundred parameters then compiles for ten seconds to run for forty milliseconds. With the initializers known,
one flat row of uniform and one of normal numbers are enough for the whole model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, PRNGKeyArray

Shape = tuple[int, ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Initializer:
    """The distribution of a parameter's initial values; called as a Flax initializer is.

    Attributes:
        kind: "uniform": U(-size, size); "normal": N(0, size^2); "constant": the value `size`.
        size: a number, or a function of the parameter's shape.
    """

    kind: str
    size: float | Callable[[Shape], float]

    def __call__(self, key: PRNGKeyArray, shape: Shape, dtype=jnp.float32) -> Float[Array, " ..."]:
        if self.kind == "constant":
            return jnp.full(shape, cast(float, self.size), dtype)
        draw = jax.random.uniform if self.kind == "uniform" else jax.random.normal
        return self.scaled(draw(key, (math.prod(shape),), dtype), shape)

    def scaled(self, standard: Float[Array, " ..."], shape: Shape) -> Float[Array, " ..."]:
        """Numbers of U(0, 1) or N(0, 1) in a row -> a parameter of this distribution."""
        size = self.size(shape) if callable(self.size) else self.size
        return (size * (2.0 * standard - 1.0 if self.kind == "uniform" else standard)).reshape(shape)


def constant(value: float) -> Initializer:
    """The same value everywhere."""
    return Initializer("constant", value)


_without_values: ContextVar[bool] = ContextVar("without_values", default=False)  # see `shapes_of`
zeros = constant(0.0)
ones = constant(1.0)


def normal(stddev: float) -> Initializer:
    """N(0, stddev^2)."""
    return Initializer("normal", stddev)


def fan_in_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear and convolutional layers."""
    return Initializer("uniform", 1.0 / math.sqrt(fan_in))


def _xavier_bound(shape: Shape) -> float:
    return math.sqrt(6.0 / (math.prod(shape[:-1]) + shape[-1]))


# U(-b, b), b = sqrt(6 / (fan in + fan out)), every axis but the last counted as input: Glorot & Bengio 2010,
# eq. 16. For a patch projection `[p, p, C, features]` that is what DiT has.
xavier_uniform = Initializer("uniform", _xavier_bound)


def parameter(module: nn.Module, name: str, initializer: Initializer, shape: Shape) -> Any:
    """`module.param` in float32, which also sows the initializer as an intermediate, for `init_params`.

    What is in the tree is returned as it is: an array, or a `Quantized` kernel.
    """
    sown = cast(Any, initializer)  # the first value is None
    module.sow("intermediates", name, sown, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    given = module.get_variable("params", name)
    if given is None and _without_values.get():
        given = jnp.zeros(shape, jnp.float32)
        module.put_variable("params", name, given)
    if given is not None and getattr(given, "shape", None) == tuple(shape):
        # `module.param` would trace the initializer for the shape: 40 % of the tracing of a large network.
        return given
    return module.param(name, initializer, shape, jnp.float32)


def shapes_of(module: nn.Module, *inputs: Any, **options: Any) -> dict:
    """The variables of `module.init` as `jax.ShapeDtypeStruct`, without tracing how each would be drawn."""

    def trace(key: PRNGKeyArray, *inputs: Any) -> Any:
        return module.init(key, *inputs, **options)

    token = _without_values.set(True)
    try:
        return cast(dict, jax.eval_shape(trace, jax.random.key(0), *inputs))
    finally:
        _without_values.reset(token)


def init_params(
    module: nn.Module,
    key: PRNGKeyArray,
    *inputs: Any,
    wanted: Callable[[tuple[str, ...]], bool] | None = None,
) -> dict:
    """Fresh parameters of a module from two flat draws; from Flax's if one has no `Initializer`.

    `wanted` says by its path whether a parameter is to be drawn; None: all of them.
    """
    variables = shapes_of(module, *inputs, mutable=["params", "intermediates"])
    shapes = cast(dict[Any, Any], traverse_util.flatten_dict(variables["params"]))
    shapes = {path: spec for path, spec in shapes.items() if wanted is None or wanted(path)}
    initializers = cast(dict[Any, Any], traverse_util.flatten_dict(variables.get("intermediates", {})))
    if not all(isinstance(initializers.get(path), Initializer) for path in shapes):
        zero = [None if spec is None else jnp.zeros(spec.shape, spec.dtype) for spec in inputs]

        def draw(key: PRNGKeyArray) -> Any:
            params = cast(dict[Any, Any], traverse_util.flatten_dict(module.init(key, *zero)["params"]))
            return traverse_util.unflatten_dict({path: params[path] for path in shapes})

        return jax.jit(draw)(key)
    plan = tuple((initializers[path], spec.shape) for path, spec in shapes.items())
    return traverse_util.unflatten_dict(dict(zip(shapes, _draw(key, plan), strict=True)))


@functools.partial(jax.jit, static_argnums=1)
def _draw(key: PRNGKeyArray, plan: tuple[tuple[Initializer, Shape], ...]) -> list[Float[Array, " ..."]]:
    """Cut each parameter out of one row of standard numbers per kind of distribution."""
    rows, used = {}, {"uniform": 0, "normal": 0}
    for kind, key_of_kind in zip(used, jax.random.split(key), strict=True):
        length = sum(math.prod(shape) for initializer, shape in plan if initializer.kind == kind)
        rows[kind] = getattr(jax.random, kind)(key_of_kind, (length,), jnp.float32)
    values = []
    for initializer, shape in plan:
        if initializer.kind == "constant":
            values.append(initializer(key, shape))
            continue
        start = used[initializer.kind]
        used[initializer.kind] += math.prod(shape)
        values.append(initializer.scaled(rows[initializer.kind][start : used[initializer.kind]], shape))
    return values
