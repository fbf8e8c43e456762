"""One way to call every denoising network: t and sign as the paths of this library have them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxldm.arguments import a_module, a_params, checked
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.models.inputs import fitting
from jaxldm.nn.reuse import Probe, Reached, Session, collection_of, session_in


class Convention(NamedTuple):
    """How a published network counts time and signs its output: class attribute `convention` of its module.

    On a path t grows from data to noise, and a velocity points from data to noise. A module without the
    attribute has the path's t and sign.

    Attributes:
        time: the path's t `[B]` -> t as the network was published.
        output: the network's output -> the output with this library's sign.
        continuous: the network was trained with t in [0, 1] and cannot be used on a path of discrete
            timesteps.
    """

    time: Callable[[Float[Array, " B"]], Float[Array, " B"]] = lambda t: t
    output: Callable[[Float[Array, "B H W C"]], Float[Array, "B H W C"]] = lambda output: output
    continuous: bool = False


UNIT_TIME = Convention(continuous=True)
FROM_NOISE_TO_DATA = Convention(time=lambda t: 1 - t, output=lambda velocity: -velocity, continuous=True)


@checked(module=a_module)
def convention(module: nn.Module) -> Convention:
    """How the module counts time and signs its output."""
    return getattr(module, "convention", Convention())


def check_inputs(module: Any, x: Any, t: Any) -> None:
    """Raises `InvalidArgumentError` for x that is no batch of the network's inputs, or t not one for each."""
    for name, value in (("x", x), ("t", t)):
        if not (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.number)):
            raise InvalidArgumentError(f"{name} must be an array of numbers, got {shown(value)}")
    example = module.example_inputs()[0] if hasattr(module, "example_inputs") else None
    if example is None or len(example.shape) != 4:
        return  # no network of images: what it takes is for the module to say
    if not jnp.issubdtype(x.dtype, jnp.floating):
        fix = ": write x / 127.5 - 1 of 8-bit images" if x.dtype == jnp.uint8 else ""
        raise InvalidArgumentError(f"x must be floating-point numbers, got {shown(x)}{fix}")
    channels = example.shape[-1]
    if x.ndim != 4 or x.shape[-1] != channels:
        first = x.ndim == 4 and x.shape[1] == channels
        hint = ", which looks like [B, C, H, W]: write jnp.moveaxis(x, 1, -1)" if first else ""
        raise InvalidArgumentError(f"x must be [B, H, W, {channels}], got shape {list(x.shape)}{hint}")
    if t.shape != x.shape[:1]:
        raise InvalidArgumentError(f"t must be [B], one for each of {x.shape[0]} images, got {shown(t)}")


@checked(module=a_module)
def network(module: nn.Module) -> Callable[..., Float[Array, "B ..."]]:
    """A denoising network as a function `(params, x, t, condition=None, *, dropout_key=None) -> output`.

    t `[B]` and the output are the path's, whatever the published form of the module: t is 0 (or the first
    timestep) at the data, 1 (or the last timestep) at the noise, and a velocity points to the noise. Training
    and all pipelines call their networks through this function.

    Its arguments are the module's parameters (the inside of `{"params": ...}`), noisy images or latents x
    `[B, H, W, C]`, t `[B]` floating, and the condition: None; an array, the module's argument after t (labels
    `[B]`, or the states of a text); or a mapping of the module's keyword arguments to arrays. A `dropout_key`
    turns dropout on, for training, where the module has it. It returns `[B, H, W, C]`, 2C channels for a
    network with learned variance, and raises `InvalidArgumentError` for a condition that lacks an argument of
    the module or has one too many, and for shapes that do not fit. Labels and token ids outside of their
    tables are refused where they can be seen; inside jit they cannot, and the nearest row answers: check them
    before.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> sit = models.build("sit-s-8")
    >>> x, t, labels = jnp.zeros((2, 32, 32, 4)), jnp.ones(2), jnp.zeros(2, jnp.int32)
    >>> jax.eval_shape(models.network(sit), models.shapes(sit), x, t, labels).shape
    (2, 32, 32, 4)
    """
    call_with = applied(module)
    has_dropout = "train" in inspect.signature(module.__call__).parameters

    def call(
        params: Any,
        x: Float[Array, "B ..."],
        t: Float[Array, " B"],
        condition: Array | Mapping[str, Any] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B ..."]:
        if dropout_key is None or not has_dropout:
            return call_with(params, x, t, condition)
        return call_with(params, x, t, condition, {"train": True}, rngs={"dropout": dropout_key})

    return call


@checked(module=a_module, params=a_params)
def caching_network(
    module: nn.Module, params: Any
) -> Callable[[Any, Any, Any, Any, Any, Any], tuple[Any, Any]]:
    """A denoising network that may reuse what it computed in an earlier step: for `D.cached_denoiser`.

    It is `(cache, memory, i, x, t, condition=None) -> (output, memory)`, with x, t, condition and output as
    of `network(module)`, a cache of `D.caching`, and what the call of the step before returned as memory;
    None begins a run. i is the number of the step. Where the step computes, the output is that of the plain
    network.

    Args:
        module: a U-Net or a transformer for latents of `models.build`.
        params: its parameters.

    Raises:
        InvalidArgumentError: when called, a module that has nothing to reuse, or not by this cache.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import diffusion as D, models
    >>> dit = models.build("tiny-dit", depth=2)
    >>> call = models.caching_network(dit, models.init(dit, jax.random.key(0)))
    >>> x, t = jnp.zeros((1, 28, 28, 1)), jnp.ones(1)
    >>> output, memory = call(D.caching.fora(2), None, 0, x, t)
    >>> output, memory = call(D.caching.fora(2), memory, 1, x, t)
    """
    call_with = applied(module)

    def call(cache: Any, memory: Any, i: Any, x: Any, t: Any, condition: Any = None) -> tuple[Any, Any]:
        collections = collection_of(Session(cache, memory, jnp.asarray(i, jnp.int32)))
        output, left = call_with(params, x, t, condition, collections=collections, mutable=list(collections))
        session = session_in(left)
        if not session.runs:
            raise _nothing_to_reuse(module)
        return output, session.left()

    return call


def check_reuse(module: nn.Module, params: Any, cache: Any) -> None:
    """Raises `InvalidArgumentError` for a network that has nothing to reuse, or not by this cache.

    It is traced up to the first block that may be reused: nothing is compiled.
    """
    collections = collection_of(Probe(cache, None, jnp.int32(0)))

    def call(params: Any, *inputs: Any) -> None:
        module.apply({"params": params, **collections}, *inputs, mutable=list(collections))

    try:
        jax.eval_shape(call, params, *cast(Any, module).example_inputs())
    except Reached:
        return
    raise _nothing_to_reuse(module)


def _nothing_to_reuse(module: nn.Module) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{type(module).__name__} has nothing that a cache can reuse: leave the cache out"
    )


def applied(module: nn.Module) -> Callable[..., Any]:
    """`network(module)` as `(params, x, t, condition, more={}, **options)`, with options of `module.apply`.

    `more` are further keyword arguments of the module, `collections` further ones besides "params". With an
    option that makes `apply` return a pair, `mutable` for one, the result is (output, what else it returned).
    """
    counts, signature = convention(module), inspect.signature(module.__call__)

    def call(
        params: Any,
        x: Any,
        t: Any,
        condition: Any,
        more: Mapping[str, Any] | None = None,
        collections: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> Any:
        named: dict[str, Any] = dict(condition) if isinstance(condition, Mapping) else {}
        inputs = (x, counts.time(t))
        if condition is not None and not isinstance(condition, Mapping):
            inputs = (*inputs, condition)
        named |= more or {}
        try:
            signature.bind(*inputs, **named)
        except TypeError as error:
            raise InvalidArgumentError(
                f"the condition does not fit {type(module).__name__}: {error}"
            ) from error
        check_inputs(module, x, t)
        with fitting(module):
            result = cast(Any, module.apply({"params": params, **collections}, *inputs, **named, **options))
        if options.get("mutable"):
            return counts.output(result[0]), result[1]
        return counts.output(result)

    return call
