"""The cost of a forward pass, from shapes alone: multiply-accumulates and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxldm.arguments import a_dtype, as_array, checked, instance
from jaxldm.arguments import function as a_function
from jaxldm.errors import InvalidArgumentError
from jaxldm.functions import takes
from jaxldm.models.registry import a_name_or_module, shapes

A_FUNCTION = a_function("(*arrays) -> arrays")


@checked(name_or_module=a_name_or_module)
def count_macs(name_or_module: str | nn.Module, *inputs: Any, **options: Any) -> int:
    """Multiply-accumulates of one forward pass, as papers count their "Gflops", from shapes alone.

    The default inputs are the model's `example_inputs()`, one image of the config's size. Others are arrays
    or their shapes, and options of `module.apply` such as `method`. See `macs_of` for what counts.

    >>> from jaxldm import models
    >>> models.count_macs("dit-xl-2") // 10**6
    118621
    """
    module: Any = name_or_module
    inputs = inputs or module.example_inputs()
    return macs_of(
        lambda params, *x: module.apply({"params": params}, *x, **options), shapes(module), *inputs
    )


@checked(function=A_FUNCTION)
def macs_of(function: Callable[..., Any], *inputs: Any) -> int:
    """Multiply-accumulates of `function(*inputs)`, which is traced and not run.

    Matrix products and convolutions count, those inside a scan once per iteration; additions, norms,
    activations and the softmax, a few per cent of a network, do not. A condition counts with its most
    expensive branch, a dilated convolution without the zeros between pixels.

    Args:
        function: of arrays.
        inputs: arrays or `jax.ShapeDtypeStruct`, in trees of any form; None where the function takes None.

    Raises:
        InvalidArgumentError: a loop with an unknown number of iterations (`jax.lax.while_loop`).
    """
    return _macs(_traced(function, inputs))


def macs_of_traced(traced: jax.stages.Traced) -> int:
    """`macs_of` of a function that is traced already, `jax.jit(function).trace(*inputs)`."""
    return _macs(traced.jaxpr.jaxpr)


@checked(function=A_FUNCTION)
def largest_product(function: Callable[..., Any], *inputs: Any) -> int:
    """Bytes of the largest result of a matrix product or convolution in `function(*inputs)`, from shapes.

    Such a result lies in memory as a whole, so the function needs at least as much. The arguments are those
    of `macs_of`.

    >>> import jax.numpy as jnp
    >>> largest_product(lambda x: (x @ x.T).sum(), jnp.ones((1000, 2)))
    4000000
    """
    return _largest(_traced(function, inputs))


class Memory(NamedTuple):
    """Bytes that a compiled forward pass needs on its device.

    Attributes:
        weights: the parameters.
        inputs_and_outputs: x, t, the condition and the output.
        temporary: XLA's buffers for everything in between. A lower bound on a CPU, where the libraries that
            it calls allocate more: with 4096 tokens about two arrays of attention weights.
    """

    weights: int
    inputs_and_outputs: int
    temporary: int


@checked(name_or_module=a_name_or_module, dtype=a_dtype)
def forward_memory(
    name_or_module: str | nn.Module, *inputs: Any, dtype: str = "float32", **options: Any
) -> Memory:
    """Memory of one forward pass as XLA compiles it for this platform; no weights are allocated.

    The arguments are those of `compile_forward`.
    """
    return memory_of(compile_forward(name_or_module, *inputs, dtype=dtype, **options))


@checked(name_or_module=a_name_or_module, dtype=a_dtype)
def compile_forward(
    name_or_module: str | nn.Module, *inputs: Any, dtype: str = "float32", **options: Any
) -> jax.stages.Compiled:
    """A forward pass, compiled from shapes alone: a function of parameters and inputs.

    Compiling takes seconds for blocks in a scan (`config.scan`), and up to minutes for a large model without.

    Args:
        name_or_module: a preset's name, or a module.
        inputs, options: as for `count_macs`.
        dtype: of the parameters; the compute dtype is the config's.
    """
    module: Any = name_or_module
    inputs = inputs or module.example_inputs()
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes(module))
    forward = jax.jit(lambda params, *x: module.apply({"params": params}, *x, **options))
    return forward.lower(params, *inputs).compile()


@checked(
    compiled=instance(jax.stages.Compiled, "a compiled function, such as models.compile_forward('tiny-dit')")
)
def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """Memory of a compiled function whose first argument is the weights, such as `compile_forward`'s."""
    (params, *_), _ = compiled.args_info
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    analysis = cast(Any, compiled.memory_analysis())
    moved = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return Memory(weights, moved - weights, analysis.temp_size_in_bytes)


def _traced(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    for place, tree in enumerate(inputs):
        for leaf in jax.tree.leaves(tree):
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                as_array(f"inputs[{place}]", "an array or its jax.ShapeDtypeStruct, or a tree of them", leaf)
    if not takes(function, len(inputs)):
        raise InvalidArgumentError(
            f"function must be one of {len(inputs)} arrays, as many as inputs are given"
        )
    return jax.make_jaxpr(function)(*inputs).jaxpr


def _macs(jaxpr: Any) -> int:
    return sum(_macs_of_equation(equation) for equation in jaxpr.eqns)


def _macs_of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        features = params["dimension_numbers"].rhs_spec[0]
        kernel = equation.invars[1].aval.shape
        taps = math.prod(kernel) // kernel[features]
        return _size(equation.outvars[0]) * taps // math.prod(params["lhs_dilation"])
    # A flash kernel, cuDNN's or Tokamax's: query, key, value [B, N, H, D].
    if name.startswith("dot_product_attention_fwd") or params.get("name") == "hopper_attention":
        query, key = (variable.aval.shape for variable in equation.invars[:2])
        return 2 * math.prod(query) * key[1]
    if name == "scan":
        return params["length"] * _macs(params["jaxpr"].jaxpr)
    inner = [_macs(jaxpr) for jaxpr in _jaxprs_in(params.values())]
    if name == "while" and any(inner):
        raise InvalidArgumentError(
            "the number of iterations of a while loop is not known before it runs, so that its "
            "multiply-accumulates cannot be counted: count the function inside"
        )
    return max(inner, default=0) if name == "cond" else sum(inner)


def _largest(jaxpr: Any) -> int:
    results = [0]
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            (result,) = equation.outvars
            results.append(_size(result) * result.aval.dtype.itemsize)
        results += map(_largest, _jaxprs_in(equation.params.values()))
    return max(results)


def _jaxprs_in(values: Any) -> Iterator[Any]:
    """The functions that an equation calls: among its parameters, alone or in a tuple."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _jaxprs_in(value)
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
        elif hasattr(value, "eqns"):
            yield value


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)
