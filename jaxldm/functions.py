"""Functions and constructors: what they take, what makes them, and what those of other people give back."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, get_origin

import numpy as np

from jaxldm.errors import InvalidArgumentError, SignatureError, nearest, shown


def takes(value: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many arguments by place; True where it does not tell."""
    try:
        inspect.signature(value).bind(*range(count))
    except ValueError:  # some functions in C
        return True
    except TypeError:
        return False
    return True


def arguments_of(value: Callable[..., Any]) -> str:
    """The names of a function's arguments, for messages: "(x, t)"; "other arguments" where it has many."""
    try:
        names = ", ".join(str(name) for name in inspect.signature(value).parameters)
    except ValueError:
        return "other arguments"
    return f"({names})" if len(names) <= 60 else "other arguments"


def signature_error(
    function: Callable[..., Any],
    args: Iterable[Any],
    options: Mapping[str, Any],
    *,
    name: str = "",
    hidden: int = 0,
) -> SignatureError | None:
    """The error for a call that a function does not take; None: it takes it.

    Args:
        function: of Python.
        args: by place.
        options: by name.
        name: of the function, where people call it otherwise.
        hidden: so many first arguments are not shown.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        parameters = list(signature.parameters.values())[hidden:]
        others = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        names = [p.name for p in parameters if p.name not in ("self", "cls") and p.kind not in others]
        open_ended = len(names) < len(parameters)
        unknown = next((name for name in options if name not in names), None)
        wrong = str(error)[:120]
        if unknown is not None and not open_ended:
            near = nearest(unknown, names)
            wrong = f"it has no argument {unknown[:60]!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        elif unknown is not None and nearest(unknown, names):
            wrong += f"; did you mean {nearest(unknown, names)[0]!r}?"
        listed = ", ".join(names[:8]) + (", ..." if open_ended or len(names) > 8 else "")
        return SignatureError(f"{name or function.__name__}({listed}): {wrong}")
    return None


def instead_of(value: Any) -> str:
    """What to write in place of what makes a function, and is none itself; "" of anything else.

    Of a function of this library that makes functions it is the call, as "D.min_snr(5.0)"; of a module of
    Flax, which computes nothing without its parameters, a function of both.
    """
    if getattr(value, "scope", value) is None and callable(getattr(value, "apply", None)):
        return "lambda x, t, *condition: models.network(module)(params, x, t, *condition)"
    function = inspect.unwrap(value) if inspect.isfunction(value) else value
    module = str(getattr(function, "__module__", ""))
    made = getattr(function, "__annotations__", {}).get("return")
    if not module.startswith("jaxldm.") or made is None:
        return ""
    if isinstance(made, str):
        made = getattr(function, "__globals__", {}).get(made, made)
    if get_origin(made) is not collections.abc.Callable and not str(made).startswith("Callable["):
        return ""
    room = "D.search" if module.startswith("jaxldm.diffusion.search.") else module.split(".")[1]
    given = [
        parameter.name if parameter.default is parameter.empty else repr(parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return f"{'D' if room == 'diffusion' else room}.{function.__name__}({', '.join(given)})"


def returned(who: str, value: Any, shape: Sequence[int] | None = None, *, or_one: bool = False) -> Any:
    """What somebody's function gave back: an array, or a number where any shape will do.

    Args:
        who: the function, as messages name it: "the network".
        value: what it returned.
        shape: that of the array; None: any.
        or_one: or one number for all.

    Raises:
        InvalidArgumentError: nothing, several values, or an array of another shape.
    """
    wanted = "an array" if shape is None else f"an array {list(shape)}{' or one number' * or_one}"
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        if (shape is None or or_one) and isinstance(value, (int, float)):
            return value
        got, hint = shown(value), ": is a return missing?" if value is None else ""
        if isinstance(value, (tuple, list)):
            got = f"a {type(value).__name__} of {len(value)}"
            hint = ": return one of them (Flax gives (output, variables) where mutable= is set)"
        raise InvalidArgumentError(f"{who} must return {wanted}, got {got}{hint}")
    if shape is not None and np.shape(value) != tuple(shape) and not (or_one and np.shape(value) == ()):
        raise InvalidArgumentError(f"{who} must return {wanted}, got one of shape {list(np.shape(value))}")
    return value


class NamedFields:
    """Base of dataclasses that say in one line which fields they have, for a name that is none of them."""

    def __new__(cls, *args: Any, **given: Any) -> Self:
        known = _names_of_fields(cls)
        for name in given if known else ():
            if name not in known:
                raise SignatureError(
                    f"{cls.__name__} has no field {name!r}: {_where_else(name, given, known)}"
                )
        return super().__new__(cls)


@functools.cache
def _names_of_fields(cls: type) -> tuple[str, ...]:
    """The names that a constructor takes; none where it takes any."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        return ()
    return tuple(p.name for p in parameters)


def _where_else(name: str, given: Mapping[str, Any], known: Sequence[str]) -> str:
    """What to write in place of a field that there is not."""
    for other, value in given.items():
        if dataclasses.is_dataclass(value) and name in _names_of_fields(type(value)):
            return f"it is one of {other}, so write {other}=dataclasses.replace(old.{other}, {name}=...)"
    near = nearest(name, known)
    return f"choose one of {', '.join(known)[:250]}" + (f"; did you mean {near[0]!r}?" if near else "")
