"""Things by name: of a table, of another package's entry points, or as `package.module:name`."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxldm.errors import InvalidArgumentError, UnknownNameError, shown
from jaxldm.reading import reason


def names(table: Mapping[str, Any], group: str) -> list[str]:
    """The names of the table, then those that installed packages add under the entry-point group."""
    return [*table, *(entry.name for entry in _entry_points(group) if entry.name not in table)]


def find(kind: str, name: str, table: Mapping[str, Any], group: str, wanted: type | None = None) -> Any:
    """The function of that name, or the value of another kind.

    Args:
        kind: what it is or makes, for messages: "solver".
        name: in the table, of an entry point, or "package.module:function".
        table: of this library.
        group: of entry points, such as "jaxldm.solvers".
        wanted: what the values are; None: functions.

    Raises:
        UnknownNameError: no such name.
        InvalidArgumentError: a "package.module:function" that cannot be imported, or is something else.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    noun = "function" if wanted is None else wanted.__name__
    form = f"package.module:{'function' if wanted is None else noun.upper()}"
    place = name if isinstance(name, str) and ":" in name else None
    for entry in _entry_points(group):
        place = f"{entry.module}:{entry.attr}" if place is None and entry.name == name else place
    if place is None:
        raise UnknownNameError(kind, name, names(table, group), form)
    value = _import(kind, place, form)
    if not (callable(value) if wanted is None else isinstance(value, wanted)):
        raise InvalidArgumentError(f"{kind} {shown(name)} must name a {noun}, got {shown(value)}")
    return value


def check_options(kind: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises `InvalidArgumentError` for an option that is no keyword of the function."""
    for option in options:
        if not has_option(function, option):
            known = ", ".join(_keywords(function)) or "none"
            raise InvalidArgumentError(f"{kind} {shown(name)} has no option {shown(option)}; it has: {known}")


def call(kind: str, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """function(*args, **options), or `InvalidArgumentError` where it does not take these."""
    check_options(kind, name, function, options)
    try:
        _signature(function).bind(*args, **options)
    except TypeError as error:
        raise InvalidArgumentError(f"{kind} {shown(name)} cannot be made so: {reason(error)}") from error
    return function(*args, **options)


def has_option(function: Callable[..., Any], option: str) -> bool:
    """Whether the function has that keyword, or takes any."""
    parameters = _signature(function).parameters.values()
    return option in _keywords(function) or any(p.kind is p.VAR_KEYWORD for p in parameters)


def _keywords(function: Callable[..., Any]) -> list[str]:
    parameters = _signature(function).parameters.values()
    others = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind not in others]


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature; of functions in C that do not tell theirs, one that takes anything."""
    try:
        return inspect.signature(function)
    except ValueError:
        kinds = {"args": inspect.Parameter.VAR_POSITIONAL, "options": inspect.Parameter.VAR_KEYWORD}
        return inspect.Signature([inspect.Parameter(name, kind) for name, kind in kinds.items()])


def _entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
    return sorted(importlib.metadata.entry_points(group=group), key=lambda entry: entry.name)


def _import(kind: str, name: str, form: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
            raise ValueError("these are no names of Python")
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except Exception as error:  # whatever the other module does when it is imported
        missing = isinstance(error, ModuleNotFoundError)
        hint = "; for a file in this folder put PYTHONPATH=. in front of the command" if missing else ""
        raise InvalidArgumentError(
            f"{kind} {shown(name)} must be {form}, importable from here: {reason(error)}{hint}"
        ) from error
    return value
