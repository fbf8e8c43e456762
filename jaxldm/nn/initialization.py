"""Initial values of parameters: each parameter has an initializer, and `init_params` draws all at once.

Drawing parameter by parameter, as Flax does, works here too, but XLA compiles each draw by itself: a U-Net of
a hundred parameters then compiles for ten seconds to run for forty milliseconds. With the initializers known,
one flat row of uniform and one of normal numbers are enough for the whole model. Where the parameters are to
be split over devices (`drawn_in_parts`), each is drawn by itself, from its place in that row on, so that no
device has the row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, cast

import flax.linen as nn
import jax
import jax.core
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

Shape = tuple[int, ...]
Placement = Callable[[Sequence[str], Shape], Sharding]  # of a parameter, by its path


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
_placement: ContextVar[Placement | None] = ContextVar("placement", default=None)  # see `drawn_in_parts`
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


@contextlib.contextmanager
def drawn_in_parts(placement: Placement) -> Iterator[None]:
    """Within it `init_params` draws each device's part of each parameter there, and no array whole.

    The numbers are those that are drawn without it.
    """
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


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
    place = _placement.get()
    if not all(isinstance(initializers.get(path), Initializer) for path in shapes):
        zero = [None if spec is None else jnp.zeros(spec.shape, spec.dtype) for spec in inputs]

        def draw(key: PRNGKeyArray) -> Any:
            params = cast(dict[Any, Any], traverse_util.flatten_dict(module.init(key, *zero)["params"]))
            return traverse_util.unflatten_dict({path: params[path] for path in shapes})

        where = {path: None if place is None else place(path, spec.shape) for path, spec in shapes.items()}
        return jax.jit(draw, out_shardings=traverse_util.unflatten_dict(where))(key)
    plan = {path: (initializers[path], spec.shape) for path, spec in shapes.items()}
    if place is not None and _has_places(key):
        return traverse_util.unflatten_dict(_draw_in_parts(key, plan, place))
    return traverse_util.unflatten_dict(dict(zip(plan, _draw(key, tuple(plan.values())), strict=True)))


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


def _has_places(key: PRNGKeyArray) -> bool:
    """Whether number n of the rows that a key draws depends on the key and n alone, and both are known."""
    if isinstance(key, jax.core.Tracer) or str(jax.random.key_impl(key)) != "threefry2x32":
        return False
    return getattr(jax.config, "jax_threefry_partitionable", True)


def _draw_in_parts(
    key: PRNGKeyArray, plan: Mapping[tuple[str, ...], tuple[Initializer, Shape]], place: Placement
) -> dict[tuple[str, ...], Float[Array, " ..."]]:
    """What `_draw` draws, each parameter from its place in the row on, and on its devices at once."""
    rows, used = np.asarray(jax.random.key_data(jax.random.split(key))), {"uniform": 0, "normal": 0}
    row_of, values = dict(zip(used, rows, strict=True)), {}
    for path, (initializer, shape) in plan.items():
        kind = initializer.kind
        start = np.array(divmod(used.get(kind, 0), 2**32))
        key_from = np.concatenate([row_of.get(kind, rows[0]), start]).astype(np.uint32)
        values[path] = _one_drawn(initializer, shape, place(path, shape))(key_from)
        if kind in used:
            used[kind] += math.prod(shape)
    return values


@functools.lru_cache(maxsize=512)  # parameters of one kind and shape are one program
def _one_drawn(initializer: Initializer, shape: Shape, sharding: Sharding) -> Callable[[Any], Any]:
    def draw(key_from: UInt32[Array, "4"]) -> Float[Array, " ..."]:
        key = jax.random.wrap_key_data(key_from, impl=_THREEFRY_FROM)
        if initializer.kind == "constant":
            return initializer(key, shape)
        return initializer.scaled(getattr(jax.random, initializer.kind)(key, shape, jnp.float32), shape)

    return jax.jit(draw, out_shardings=sharding)


def _bits_from(key_from: UInt32[Array, "4"], bit_width: int, shape: Shape) -> UInt32[Array, " ..."]:
    """The random bits of a row from a place on, as `jax_threefry_partitionable` defines them.

    Number n of the row is a hash of the key and of n, so that each device can count for itself.
    """
    assert bit_width == 32 and math.prod(shape) < 2**32
    key_1, key_2, start_high, start_low = key_from
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        steps = np.uint32(math.prod(shape[axis + 1 :]))
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * steps
    low = place + start_low
    high = start_high + (low < start_low).astype(jnp.uint32)
    first, second = jax.extend.random.threefry2x32_p.bind(key_1, key_2, high, low)
    return first ^ second


def _only_draws(*_: Any) -> Any:
    raise NotImplementedError("a key with a place in its row draws, and nothing else")


# Keys [4]: threefry's two numbers, and the place in the row as high and low half.
_THREEFRY_FROM = jax.extend.random.define_prng_impl(
    key_shape=(4,),
    seed=_only_draws,
    split=_only_draws,
    random_bits=_bits_from,
    fold_in=_only_draws,
    name="threefry2x32_from",
    tag="from",
)
