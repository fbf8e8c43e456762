"""Starting values of parameters: each parameter has a law, and `starting_values` draws all of them at once.

Drawing parameter by parameter is Flax's way and works here too, but XLA compiles each draw for itself: a
U-Net of a hundred parameters then compiles for ten seconds to run for forty milliseconds. With the laws
known, one flat row of uniform and one of normal numbers serve the whole model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Law:
    """How a parameter starts, as a Flax initializer.

    `kind` "uniform": U(-size, size); "normal": N(0, size^2); "constant": the value `size`.
    """

    kind: str
    size: float

    def __call__(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        if self.kind == "constant":
            return jnp.full(shape, self.size, dtype)
        draw = jax.random.uniform if self.kind == "uniform" else jax.random.normal
        return self.scaled(draw(key, (math.prod(shape),), dtype)).reshape(shape)

    def scaled(self, standard: Array) -> Array:
        """Numbers of U(0, 1) or N(0, 1) -> numbers of this law."""
        return self.size * (2.0 * standard - 1.0 if self.kind == "uniform" else standard)


LawOfShape = Callable[[tuple[int, ...]], Law]


def zeros(shape: tuple[int, ...]) -> Law:
    """All zeros, whatever the shape."""
    return Law("constant", 0.0)


def ones(shape: tuple[int, ...]) -> Law:
    """All ones, whatever the shape."""
    return Law("constant", 1.0)


def normal(stddev: float) -> LawOfShape:
    """N(0, stddev^2), whatever the shape."""
    return lambda shape: Law("normal", stddev)


def fan_in_uniform(fan_in: int) -> LawOfShape:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): how PyTorch starts weights and biases of linear and conv layers."""
    return lambda shape: Law("uniform", 1.0 / math.sqrt(fan_in))


def xavier_uniform(shape: tuple[int, ...]) -> Law:
    """U(-b, b), b = sqrt(6 / (fan in + fan out)), every axis but the last counted as input.

    Glorot & Bengio 2010, eq. 16. For a patch projection `[p, p, C, features]` that is how DiT starts it.
    """
    return Law("uniform", math.sqrt(6.0 / (math.prod(shape[:-1]) + shape[-1])))


def parameter(module: nn.Module, name: str, law_of_shape: LawOfShape, shape: tuple[int, ...]) -> Array:
    """`module.param` in float32, which also leaves the law among the intermediates for `starting_values`."""
    law = law_of_shape(shape)
    module.sow("intermediates", name, law, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return module.param(name, law, shape, jnp.float32)


def starting_values(module: nn.Module, key: Array, *inputs: jax.ShapeDtypeStruct) -> dict:
    """Fresh parameters of a module from two flat draws.

    Modules with parameters that have no law go Flax's way.
    """

    def trace(key: Array, *inputs: Array) -> dict:
        return module.init(key, *inputs, mutable=["params", "intermediates"])

    variables = jax.eval_shape(trace, key, *inputs)
    shapes = traverse_util.flatten_dict(variables["params"])
    laws = traverse_util.flatten_dict(variables.get("intermediates", {}))
    if not all(isinstance(laws.get(path), Law) for path in shapes):
        zero = [jnp.zeros(spec.shape, spec.dtype) for spec in inputs]
        return jax.jit(lambda key: module.init(key, *zero)["params"])(key)
    plan = tuple((laws[path], spec.shape) for path, spec in shapes.items())
    return traverse_util.unflatten_dict(dict(zip(shapes, _draw(key, plan), strict=True)))


@functools.partial(jax.jit, static_argnums=1)
def _draw(key: Array, plan: tuple[tuple[Law, tuple[int, ...]], ...]) -> list[Array]:
    """Cuts each parameter out of one row of standard numbers per kind of law."""
    rows, used = {}, {"uniform": 0, "normal": 0}
    for kind, key_of_kind in zip(used, jax.random.split(key), strict=True):
        length = sum(math.prod(shape) for law, shape in plan if law.kind == kind)
        rows[kind] = getattr(jax.random, kind)(key_of_kind, (length,), jnp.float32)
    values = []
    for law, shape in plan:
        if law.kind == "constant":
            values.append(law(key, shape))
            continue
        start = used[law.kind]
        used[law.kind] += math.prod(shape)
        values.append(law.scaled(rows[law.kind][start : used[law.kind]]).reshape(shape))
    return values
