"""Checks of what people hand to public functions: one decorator, and a check for each kind of argument.

    @checked(path=A_PATH, num_inference_steps=count(1), shift=optional(number(above=0)))
    def karras(path, num_inference_steps, *, shift=None): ...

A check is a function (name, value) -> value. It returns what the function should be given, such as the float
of a NumPy number, or raises `InvalidArgumentError`: what is allowed, what was given, what to write instead.
Checks look at types, shapes and concrete numbers, once a call on the host. Inside of jit, vmap and grad the
numbers of arrays cannot be seen: tracers pass where arrays do, and nothing is added to a program.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxldm.errors import InvalidArgumentError, one_of, path_error, shown
from jaxldm.exact import LARGEST_FLOAT32, LARGEST_INT32, LARGEST_UINT32
from jaxldm.functions import arguments_of, instead_of, signature_error, takes

Check = Callable[[str, Any], Any]
Function = TypeVar("Function", bound=Callable[..., Any])


def checked(**checks: Check) -> Callable[[Function], Function]:
    """A decorator that applies the checks to the arguments of these names, those that a call gives.

    >>> @checked(steps=count(1))
    ... def run(steps=10):
    ...     return steps
    >>> run(np.int64(3)), run()
    (3, 10)
    """

    def decorate(function: Function) -> Function:
        parameters = inspect.signature(function).parameters
        places = {
            name: place
            for place, (name, parameter) in enumerate(parameters.items())
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        }
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        unknown = set() if takes_any else set(checks) - set(parameters)
        assert not unknown, f"{function.__qualname__} has no argument {unknown}"

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = list(args)
            for name, check in checks.items():
                if name in kwargs:
                    kwargs[name] = check(name, kwargs[name])
                elif places.get(name, len(given)) < len(given):
                    given[places[name]] = check(name, given[places[name]])
            try:
                return function(*given, **kwargs)
            except TypeError as error:
                wrong = signature_error(function, given, kwargs)
                if wrong is None:
                    raise
                raise wrong from error
            except OSError as error:  # what the system refuses of a path among the arguments
                refused = path_error(error, [*given, *kwargs.values()])
                if refused is None:
                    raise
                raise refused from error

        return cast(Function, call)

    return decorate


def check_all(checks: Mapping[str, Check], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by name, those that have a check as it returns them."""
    return {name: checks[name](name, value) if name in checks else value for name, value in values.items()}


def refuse(name: str, wanted: str, value: Any, instead: str = "") -> InvalidArgumentError:
    """The error for an argument: raise it."""
    instead = instead and f": write {instead}"
    return InvalidArgumentError(f"{name} must be {wanted}, got {shown(value)}{instead}")


def optional(check: Check) -> Check:
    """None, or what the check allows."""
    return lambda name, value: None if value is None else check(name, value)


def is_tracer(value: Any) -> bool:
    """Whether the value belongs to a jit, vmap or grad around the call, so that it cannot be looked at."""
    return isinstance(value, jax.core.Tracer)


def _scalar(name: str, wanted: str, value: Any) -> Any:
    """A Python or NumPy number as it is, and that of an array without axes."""
    if is_tracer(value):
        raise InvalidArgumentError(
            f"{name} must be {wanted} that is known before anything is compiled, got a traced array: leave "
            "it out of what jit, vmap or grad trace (static_argnames, or a closure)"
        )
    if isinstance(value, (np.ndarray, jax.Array)) and value.ndim == 0 and not _is_key(value):
        return np.asarray(value)[()]
    return value


def _a_number(
    finite: str, low: float | None, high: float | None, above: float | None, below: float | None
) -> str:
    """In words: "a finite number in (0, 1]", "a positive number"."""
    least, most = (above if low is None else low), (below if high is None else high)
    if least is not None and most is not None:
        return f"a number in {'(' if low is None else '['}{least:g}, {most:g}{')' if high is None else ']'}"
    if (above, low) == (0, None):
        return "a positive number"
    words = [f"of at least {low:g}"] if low is not None else []
    words += [f"above {above:g}"] if above is not None else []
    words += [f"of at most {high:g}"] if high is not None else []
    words += [f"below {below:g}"] if below is not None else []
    return " ".join([f"a {finite}number", *words])


def count(low: int = 0, high: int = LARGEST_INT32) -> Check:
    """A whole number from `low` to `high`, returned as an int.

    >>> count(1)("order", np.int64(2))
    2
    """
    least = f" of at least {low}" if low > -LARGEST_INT32 else ""
    wanted = f"a whole number from {low} to {high}" if high < 10**6 else f"a whole number{least}"

    def check(name: str, value: Any) -> int:
        given = _scalar(name, wanted, value)
        is_whole = isinstance(given, (int, np.integer)) and not isinstance(given, (bool, np.bool_))
        if is_whole and low <= given <= high:
            return int(given)
        if is_whole and given > high:
            raise refuse(name, f"a whole number from {low} to {high}", value)
        whole = isinstance(given, (float, np.floating)) and math.isfinite(given) and given == int(given)
        raise refuse(name, wanted, value, f"{name}={int(given)}" if whole and low <= given <= high else "")

    return check


def number(
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    note: str = "",
) -> Check:
    """A finite number that float32 holds, in these bounds, returned as a float.

    Args:
        low: the least.
        high: the most.
        above: a bound that is not reached.
        below: likewise.
        infinite: infinity will do.
        note: added to what is wanted: "(0.995 in the paper)".

    >>> number(0, 1)("eta", np.float32(0.5))
    0.5
    """
    wanted = _a_number("" if infinite else "finite ", low, high, above, below) + (f" {note}" if note else "")

    def check(name: str, value: Any) -> float:
        given = _scalar(name, wanted, value)
        other = (bool, np.bool_, np.complexfloating)
        if isinstance(given, other) or not isinstance(given, (int, float, np.number)):
            raise refuse(name, wanted, value)
        try:
            # float32's 0.58 is 0.58 here, too: the decimal that was typed (see `jaxldm.exact`).
            plain = float(str(given) if isinstance(given, np.floating) else given)
        except OverflowError:
            raise refuse(name, wanted, value) from None
        within = abs(plain) <= LARGEST_FLOAT32 or (infinite and math.isinf(plain))
        within = within and (low is None or plain >= low) and (high is None or plain <= high)
        if not (within and (above is None or plain > above) and (below is None or plain < below)):
            raise refuse(name, wanted, value)
        return plain

    return check


def flag(name: str, value: Any) -> bool:
    """True or False."""
    given = _scalar(name, "True or False", value)
    if not isinstance(given, (bool, np.bool_)):
        raise refuse(name, "True or False", value)
    return bool(given)


def text(name: str, value: Any) -> str:
    """A string; half characters, as of bytes that are not UTF-8, are none."""
    if not isinstance(value, str) or (not value.isascii() and re.search("[\ud800-\udfff]", value)):
        raise refuse(name, "a text", value)
    return value


def a_path(name: str, value: Any) -> Any:
    """A file or folder: a string, or a `pathlib.Path`; never empty."""
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise refuse(name, "the path of a file or folder", value)
    return value


def a_module(name: str, value: Any) -> Any:
    """A Flax module, or what is applied as one."""
    if callable(getattr(value, "apply", None)) and callable(value) and not isinstance(value, type):
        return value
    return instance((), "a module such as models.build('tiny-dit')")(name, value)


def a_params(name: str, value: Any) -> Any:
    """Parameters of a module: nested dictionaries of arrays, or of their shapes; tracers pass."""

    def fits(entry: Any) -> bool:
        if isinstance(entry, Mapping):
            return all(isinstance(key, str) and fits(inside) for key, inside in entry.items())
        return hasattr(entry, "shape") and hasattr(entry, "dtype")

    if isinstance(value, Mapping) and set(value) == {"params"}:
        raise refuse(name, "what is inside of {'params': ...}", value, "variables['params']")
    if not isinstance(value, Mapping) or not fits(value):
        raise refuse(name, "nested dictionaries of arrays such as models.init(module, key)", value)
    return value


def choice(kind: str, choices: Sequence[str] | Mapping[str, Any]) -> Check:
    """One of these names; `UnknownNameError` for others."""
    return lambda name, value: one_of(kind, value, choices)


DTYPES = ("float32", "bfloat16", "float16")  # of parameters and computations, as configs name them


def a_dtype(name: str, value: Any) -> str:
    """The name of a dtype; `UnknownNameError` for others."""
    return one_of("dtype", value, DTYPES)


def instance(cls: type | tuple[type, ...], example: str) -> Check:
    """A value of that class.

    Args:
        cls: one, or several.
        example: how people make one: "a path such as D.Flow()".
    """
    classes = cls if isinstance(cls, tuple) else (cls,)

    def check(name: str, value: Any) -> Any:
        if isinstance(value, classes):
            return value
        uncalled = (
            getattr(value, "__name__", "") if inspect.isroutine(value) or inspect.isclass(value) else ""
        )
        raise refuse(name, example, value, f"{uncalled}()" if uncalled.isidentifier() else "")

    return check


def function(signature: str) -> Check:
    """Something that can be called with as many arguments as the signature has: "(x, t) -> x_0"."""
    words = signature.split("->")[0].split(")")[0].strip("( ")
    arguments = words.split(",") if words else []
    any_number = any("*" in argument for argument in arguments)

    def check(name: str, value: Any) -> Any:
        wanted = f"a function {signature}"
        instead = instead_of(value)
        if instead or not callable(value) or inspect.isclass(value):
            raise refuse(name, wanted, value, instead)
        if not any_number and not takes(value, len(arguments)):
            raise InvalidArgumentError(f"{name} must be {wanted}, got one of {arguments_of(value)}")
        return value

    return check


def some_devices(name: str, value: Any) -> tuple[Any, ...]:
    """One device or more."""
    devices = several(instance(jax.Device, "one of jax.devices()"))(name, value)
    if not devices:
        raise InvalidArgumentError(f"{name} is empty: leave it out, or name one or more of jax.devices()")
    return devices


def several(check: Check, wanted: str = "a list") -> Check:
    """A list, tuple or iterator of what the check allows, as a tuple; `wanted` is for the message."""

    def check_each(name: str, value: Any) -> tuple[Any, ...]:
        is_several = isinstance(value, (list, tuple, range, np.ndarray)) and not hasattr(value, "_fields")
        if not is_several and not isinstance(value, Iterator):
            raise refuse(name, wanted, value)
        return tuple(check(f"{name}[{k}]", item) for k, item in enumerate(value))

    return check_each


def pair(low: int = 0, high: int = LARGEST_INT32) -> Check:
    """Two whole numbers, such as (height, width) or (top, left)."""

    def check(name: str, value: Any) -> tuple[int, ...]:
        numbers = several(count(low, high), "two whole numbers")(name, value)
        if len(numbers) != 2:
            raise refuse(name, "two whole numbers", value)
        return numbers

    return check


def check_fields(self: Any, **checks: Check) -> None:
    """Applies the checks to fields of a frozen dataclass, in its `__post_init__`."""
    for name, check in checks.items():
        object.__setattr__(self, name, check(name, getattr(self, name)))


_KINDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "floating": ("floating-point numbers", (jnp.floating,)),
    "whole": ("whole numbers", (jnp.integer,)),
    "real": ("numbers", (jnp.floating, jnp.integer)),
    "any": ("numbers", (jnp.floating, jnp.integer, jnp.bool_)),
}


def array(
    kind: str = "real",
    shape: str = "",
    *,
    axes: int | tuple[int, int] | None = None,
    low: float | None = None,
    high: float | None = None,
    filled: bool = False,
    finite: bool = False,
    instead: str = "",
) -> Check:
    """An array, a number or a list of them; tracers pass. Lists are returned as NumPy arrays.

    Python's numbers stay what they are: JAX gives them the dtype of what they are combined with. Numbers that
    a device would change, beyond int32 or float32, are refused where they can be seen.

    Args:
        kind: of `_KINDS`: "floating", "whole", "real", "any".
        shape: in words, for the message: "[B, H, W, C]".
        axes: how many there are: one number, or the fewest and the most.
        low: with `high` the bounds of the numbers, where they can be seen without waiting for a device: in
            NumPy's arrays and in lists.
        high: see above.
        filled: there is at least one number.
        finite: neither NaN nor infinity, likewise.
        instead: what to write, for arrays of another kind.
    """
    words, kinds = _KINDS[kind]
    fewest, most = (axes, axes) if isinstance(axes, int) else (axes or (0, 64))
    wanted = f"an array of {words}" + (f" {shape}" if shape else "")
    if most == 0:
        wanted = f"a {words[:-1]}"
    wanted += "" if low is None or high is None else f" from {low:g} to {high:g}"

    def check(name: str, value: Any) -> Any:
        given = as_array(name, wanted, value)
        if not any(jnp.issubdtype(given.dtype, kind) for kind in kinds):
            raise refuse(name, wanted, value, instead)
        if not fewest <= len(given.shape) <= most or (filled and 0 in given.shape):
            raise refuse(name, wanted, value)
        if not isinstance(given, np.ndarray):
            return given
        _check_held(name, given)
        if finite and not np.isfinite(given).all():
            raise InvalidArgumentError(f"{name} must be finite, got NaN or infinity in {shown(value)}")
        if low is not None and high is not None:
            outside = given[~((given >= low) & (given <= high))]
            if outside.size:
                raise InvalidArgumentError(f"{name} must be {wanted}, got {outside.flat[0]} in it")
        return value if type(value) in (int, float) else given

    return check


def _check_held(name: str, given: np.ndarray) -> None:
    """Refuses numbers that would become others, or infinite, on a device."""
    if given.dtype.kind in "iu":
        most = LARGEST_UINT32 if given.dtype.kind == "u" else LARGEST_INT32
    else:
        most = LARGEST_FLOAT32
    if given.dtype.itemsize < 8 or jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        return
    outside = given[((given > most) | (given < -most - 1)) & np.isfinite(given)]
    if outside.size:
        kind = f"numbers of at most {most:.3g}"
        raise InvalidArgumentError(f"{name} must hold {kind} in size, as devices do, got {outside.flat[0]:g}")


def as_array(name: str, wanted: str, value: Any) -> Any:
    """Arrays and tracers as they are, numbers and lists of them as NumPy arrays."""
    if isinstance(value, jax.Array) or is_tracer(value):
        return value
    if value is None or isinstance(value, (str, bytes, dict)) or callable(value):
        raise refuse(name, wanted, value)
    try:
        traced = any(map(is_tracer, jax.tree.leaves(value)))
        array = jnp.asarray(value) if traced else np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise refuse(name, wanted, value) from None
    if not traced and array.dtype.kind in "OUSMmV":
        raise refuse(name, wanted, value)
    return array


def a_tree(name: str, value: Any) -> Any:
    """An array, or a tree of arrays; None where there is no condition."""
    return jax.tree.map(lambda leaf: as_array(name, "an array or a tree of arrays", leaf), value)


def a_condition(name: str, value: Any) -> Any:
    """An array [B, ...], or a tree of them; None where there is no condition."""
    tree = a_tree(name, value)
    if any(np.ndim(leaf) == 0 for leaf in jax.tree.leaves(tree)):
        raise refuse(name, "an array [B, ...] or a tree of arrays", value)
    return tree


def check_shapes(**arrays: Any) -> None:
    """Raises `InvalidArgumentError` unless the arrays are of one shape."""
    if len({np.shape(array) for array in arrays.values()}) > 1:
        raise shapes_differ(arrays)


def shapes_differ(arrays: Mapping[str, Any], wanted: str = "") -> InvalidArgumentError:
    """The error for arrays whose shapes do not go together: raise it."""
    listed = ", ".join(f"{name} {list(np.shape(array))}" for name, array in arrays.items())
    return InvalidArgumentError(f"the shapes do not go together: {listed}{wanted}")


def check_dims(**arrays: tuple[Any, str]) -> None:
    """Raises `InvalidArgumentError` unless axes of one name have one length.

    Args:
        arrays: name -> (the array, the names of its axes): "B H W C"; a number is that length, and with # in
            front 1 will do, too.
    """
    lengths: dict[str, int] = {}
    for array, axes in arrays.values():
        for axis, length in zip(axes.split(), np.shape(array), strict=True):
            wanted = int(axis) if axis.isdigit() else lengths.setdefault(axis.strip("#"), length)
            if axis.startswith("#") and 1 in (length, wanted):
                lengths[axis[1:]] = max(length, wanted)
            elif length != wanted:
                names = ", ".join(f"{name} [{', '.join(axes.split())}]" for name, (_, axes) in arrays.items())
                shapes = {name: array for name, (array, _) in arrays.items()}
                raise shapes_differ(shapes, f": {names} are wanted")


def check_broadcast(**arrays: Any) -> None:
    """Raises `InvalidArgumentError` unless the arrays go with each other, all empty or none."""
    shapes = [np.shape(array) for array in arrays.values()]
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        raise shapes_differ(arrays) from None
    if len({0 in shape for shape in shapes}) > 1:
        raise shapes_differ(arrays)


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def one_key(name: str, value: Any) -> Any:
    """One key; an old one, uint32 numbers, is wrapped."""
    keys = a_key(name, value)
    if keys.ndim:
        raise refuse(name, "one key", value, f"{name}[0]")
    return keys


def a_key(name: str, value: Any) -> Any:
    """A key or an array of keys; old ones, uint32 numbers, are wrapped."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        raise refuse(name, "a key", value, f"jax.random.key({shown(value)})")
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise refuse(name, "a key", value, "jax.random.key(0)")
    if _is_key(value):
        return value
    size = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    if value.dtype != np.uint32 or value.ndim < 1 or value.shape[-1:] != size:
        raise refuse(name, "a key", value, "jax.random.key(0)")
    return jax.random.wrap_key_data(jnp.asarray(value))
