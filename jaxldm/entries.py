"""The entries of a file -> typed values: one way for the configs of models, schedulers, adapters and runs.

What a value may be is an annotation, as fields of dataclasses have it: `int | None`, `tuple[int, ...]`,
`Mapping[str, float]`, `Annotated[int, Bounds(1, 1000)]`, a dataclass. A number is finite unless its bounds
say otherwise, true is not 1, and lists become tuples.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxldm.errors import CheckpointError, InvalidArgumentError, JaxldmError
from jaxldm.exact import LARGEST_INT64
from jaxldm.reading import reason, shortened, shown

T = TypeVar("T")
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    type(None): "null",
}


class Bounds(NamedTuple):
    """Limits of a number in `Annotated[int, Bounds(...)]`, both allowed; infinity allows infinity."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if math.isinf(self.high):
            return "" if math.isinf(self.low) else f" of {self.low:g} or more"
        return f" up to {self.high:g}" if math.isinf(self.low) else f" from {self.low:g} to {self.high:g}"


class Read(NamedTuple):
    """How a value is made where no annotation says it: `Annotated[D.Prediction, Read(function)]`.

    Attributes:
        function: (the entry, its place for messages) -> the value; raises `CheckpointError`.
    """

    function: Callable[[Any, str], Any]


class _WrongValue(Exception):
    """A value that its annotation does not allow; (place, words)."""


def read_value(value: Any, kind: Any, place: str) -> Any:
    """A value of a file, as its annotation says.

    Args:
        value: as JSON has it.
        kind: the annotation.
        place: where the value is, for the message: "config.json: num_layers".

    Raises:
        CheckpointError: another type, or out of bounds: the place, what is allowed, and what is there.
    """
    try:
        return _convert(value, kind, place)
    except _WrongValue as error:
        where, words, found = error.args
        raise CheckpointError(f"{where} must be {words}, not {shown(found)}") from None


def read_values(entries: Mapping[str, Any], kinds: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The entries that `kinds` names, each as its annotation says; the others unchanged."""
    return {
        key: read_value(value, kinds[key], f"{place}: {key}") if key in kinds else value
        for key, value in entries.items()
    }


def build(kind: type[T], entries: Any, place: str) -> T:
    """A dataclass of the entries of a file; absent ones have their default.

    Raises:
        CheckpointError: no object, an unknown key, a missing one, a value of another type, or values that the
            dataclass itself refuses.
    """
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{place} must be an object, not {shown(entries)}")
    kinds = field_types(kind)
    for key in entries:
        if key not in kinds:
            raise CheckpointError(unknown_key(place, key, kinds))
    missing = [
        field.name
        for field in dataclasses.fields(typing.cast(Any, kind))
        if field.name not in entries
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise CheckpointError(f"{place} lacks {', '.join(missing)}")
    return make(kind, read_values(entries, kinds, place), place)


def make(kind: type[T], values: Mapping[str, Any], place: str) -> T:
    """`kind(**values)`; what its own checks refuse becomes a `CheckpointError` with the place."""
    try:
        return kind(**values)
    except (JaxldmError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        text = shortened(str(error), 300) if isinstance(error, JaxldmError) else reason(error)
        raise CheckpointError(f"{place} does not describe a {kind.__name__}: {text}") from error


def check_types(self: Any) -> None:
    """Checks every field of a frozen dataclass by its annotation, in `__post_init__`: lists become tuples.

    A field that a file's `Read` makes has the value that it makes.

    Raises:
        InvalidArgumentError: another type, or out of bounds.
    """
    for name, kind in _value_types(type(self)).items():
        try:
            value = _convert(_plain(getattr(self, name)), kind, name)
        except _WrongValue as error:
            where, words, found = error.args
            raise InvalidArgumentError(f"{where} must be {words}, got {shown(found)}") from None
        object.__setattr__(self, name, value)


@functools.cache
def _value_types(kind: type) -> Mapping[str, Any]:
    return {name: _without_readers(annotation) for name, annotation in field_types(kind).items()}


def _without_readers(kind: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated and any(isinstance(note, Read) for note in args[1:]):
        return args[0]
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(_without_readers, args))]  # noqa: UP007 (of any number)
    return kind


def _plain(value: Any) -> Any:
    """Numbers of NumPy as those of Python, in tuples and in dictionaries, too."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def unknown_key(place: str, key: Any, known: Iterable[str]) -> str:
    """The message about a key that nothing here knows, with the closest name that is known."""
    names = sorted(known)
    near = difflib.get_close_matches(str(key)[:100], names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {shortened(', '.join(names), 200)}"
    return f"{place} has an unknown key {shown(key)}; {hint}"


def known_names(given: Any, known: Iterable[str]) -> str:
    """ "known: ..." with at most a line of names, and the closest to the given one, for a message."""
    known, whole = list(known), str(given)[:100]
    name, plain = _without_kind(whole), {_without_kind(each): each for each in reversed(known)}
    begin = [each for each in reversed(plain) if len(name) > 2 and each.startswith(name)]
    near = difflib.get_close_matches(whole, known, n=1, cutoff=0.9)
    near = near or [plain[each] for each in (difflib.get_close_matches(name, plain, n=1) or begin)[:1]]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"known: {shortened(', '.join(known), 200)}{hint}"


def _without_kind(name: str) -> str:
    """The name of a class without the ending of its kind, which makes unrelated names look alike."""
    return re.sub(r"(?<=.)(Scheduler|Model|Pipeline)$", "", name)


@functools.cache
def field_types(kind: type) -> Mapping[str, Any]:
    """The annotation of each field of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _convert(value: Any, kind: Any, place: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Annotated:
        reader = next((note for note in args[1:] if isinstance(note, Read)), None)
        return _bounded(value, kind, args, place) if reader is None else reader.function(value, place)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, kind, args, place)
    if origin is typing.Literal:
        return value if value in args and type(value) is not bool else _wrong(value, kind, place)
    if origin in (tuple, list) or (origin is collections.abc.Sequence):
        return _items(value, kind, args, place)
    if origin in (dict, collections.abc.Mapping) or kind in (dict, Mapping):
        if not isinstance(value, Mapping):
            _wrong(value, kind, place)
        of_value = args[1] if args else Any
        return {
            key: _convert(entry, of_value, f"{place}.{shortened(str(key), 60)}")
            for key, entry in value.items()
        }
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return build(typing.cast(type, kind), value, place)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return value if abs(value) < 2**1023 else _wrong(value, kind, place)
    if kind is int and isinstance(value, int) and abs(value) > LARGEST_INT64:
        raise _WrongValue(place, "a whole number of at most 19 digits", value)
    fits = isinstance(value, type(None) if kind is None else typing.cast(type, kind))
    return (
        value if fits and not (isinstance(value, bool) and kind is not bool) else _wrong(value, kind, place)
    )


def _bounded(value: Any, kind: Any, args: tuple, place: str) -> Any:
    bounds = next(note for note in args if isinstance(note, Bounds))
    if not (isinstance(value, float) and math.isinf(value)):  # the bounds say whether it may be infinite
        try:
            value = _convert(value, args[0], place)
        except _WrongValue as error:
            where, words, found = error.args
            raise _WrongValue(where, words_of(kind) if where == place else words, found) from None
    for number in value if isinstance(value, tuple) else (value,):
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if is_number and not bounds.low <= number <= bounds.high:
            _wrong(value, kind, place)
    return value


def _one_of(value: Any, kind: Any, args: tuple, place: str) -> Any:
    inside = None
    for choice in args:
        try:
            return _convert(value, choice, place)
        except _WrongValue as error:
            inside = error if error.args[0] != place else inside  # within a list or an object of this choice
    if inside is not None:
        raise inside
    return _wrong(value, kind, place)


def _items(value: Any, kind: Any, args: tuple, place: str) -> tuple:
    if not isinstance(value, list | tuple):
        _wrong(value, kind, place)
    of_items = args[:1] * len(value) if args[1:] in ((), (...,)) else args
    if len(of_items) != len(value):
        raise _WrongValue(place, f"a list of {len(of_items)}", value)
    return tuple(
        _convert(item, of, f"{place}[{n}]") for n, (item, of) in enumerate(zip(value, of_items, strict=True))
    )


def _wrong(value: Any, kind: Any, place: str) -> typing.NoReturn:
    raise _WrongValue(place, words_of(kind), value)


def words_of(kind: Any) -> str:
    """An annotation in words: "a whole number or null"."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return words_of(args[0]) + "".join(str(note) for note in args[1:] if isinstance(note, Bounds))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words_of(choice) for choice in args))
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if origin in (tuple, list, collections.abc.Sequence):
        item = words_of(args[0]) if args else "anything"
        return (
            f"a list of {item.removeprefix('a ')}s"
            if item in ("a number", "a whole number", "a string")
            else "a list"
        )
    if kind is None:
        return "null"
    if origin in (dict, collections.abc.Mapping) or kind in (dict, Mapping) or dataclasses.is_dataclass(kind):
        return "an object"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
