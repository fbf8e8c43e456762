"""The words of a command line against the fields of a command, before tyro reads them: one line for people.

What is wrong is said with the option as it was typed and what it takes, in words.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.exact import LARGEST_FLOAT32, LARGEST_INT64
from jaxldm.reading import shown

RUN = "RUN"  # how the help shows an argument that is the folder of a run
_WORDS = {int: "a whole number", float: "a number", str: "a value", bool: "nothing"}
_SEVERAL = {int: "whole numbers", float: "numbers", str: "values"}


class Option(NamedTuple):
    """What a field of a command takes on the command line.

    Attributes:
        name: as typed, "--num-images"; of a positional argument as the help has it, "RUN".
        kind: int, float, str, or bool for a flag.
        words: that may stand in its place, such as "auto".
        several: whether it takes any number of values.
        positional: whether it has no name in front.
        required: whether it must be given.
    """

    name: str
    kind: type
    several: bool
    positional: bool
    required: bool
    words: tuple[str, ...] = ()

    @property
    def takes(self) -> str:
        """Its values, in words."""
        found = f"one or more {_SEVERAL[self.kind]}" if self.several else _WORDS[self.kind]
        return " or ".join((found, *self.words))


def check_words(words: Sequence[str], command_class: type, name: str) -> None:
    """Checks all words behind a command's name.

    Raises:
        UnknownNameError: an option that the command does not have.
        InvalidArgumentError: an option given twice, without value or with one that it cannot take; arguments
            that are missing or too many.
    """
    options = options_of(command_class)
    named = {option.name: option for option in options if not option.positional}
    positional, seen, left = [option for option in options if option.positional], set(), list(words)
    if {"-h", "--help"} & set(words):
        return
    arguments = []
    while left:
        word = left.pop(0)
        if not is_option(word):
            arguments.append(word)
            continue
        typed, given, value = word.partition("=")
        if not typed.startswith("--"):
            raise InvalidArgumentError(
                f"unknown option {shown(word)}: options begin with --, and a value that begins with - is "
                "written with =, as in --prompt=-1"
            )
        if typed == "--import":
            raise InvalidArgumentError(f"--import goes before the command: jaxldm --import MODULE {name} ...")
        option = named[one_of(f"option of `jaxldm {name}`", typed.replace("_", "-"), named)]
        if option.name in seen:
            raise InvalidArgumentError(f"{option.name} is given twice: leave one of them out")
        seen.add(option.name)
        _check_values(option, [value] if given else _values(option, left), name)
    for argument, option in zip(arguments, positional, strict=False):
        _check_values(option, [argument], name)
        if option.name == RUN:
            check_no_recipe(argument)
    if len(arguments) > len(positional):
        extra = shown(arguments[len(positional)])
        raise InvalidArgumentError(f"`jaxldm {name}` has no place for {extra} (see `jaxldm {name} --help`)")
    for option in positional[len(arguments) :]:
        if option.required:
            raise InvalidArgumentError(f"`jaxldm {name}` needs {option.name} (see `jaxldm {name} --help`)")


def check_no_recipe(folder: str) -> None:
    """Raises `InvalidArgumentError` for the name of a recipe where the folder of a run is wanted."""
    if "/" in folder or os.path.exists(folder):
        return
    from jaxldm import training
    from jaxldm.commands.hints import command

    if folder not in training.RECIPES:
        return
    run = f"runs/{folder}"
    train = "" if os.path.isdir(run) else f"train it with `{command('train', folder)}`, then "
    raise InvalidArgumentError(
        f"{folder} is the name of a recipe, and there is no such folder: {train}give the run, {run}"
    )


def options_of(command_class: type) -> list[Option]:
    """The options and arguments of a command, in order."""
    hints = typing.get_type_hints(command_class, include_extras=True)
    fields = dataclasses.fields(command_class)
    return [_option(field, hints[field.name]) for field in fields]


def is_option(word: str) -> bool:
    """Whether a word is the name of an option, and no value: "-1" and "-inf" are numbers."""
    return word.startswith("-") and len(word) > 1 and _as_number(word) is None


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    extras, positional = [], "Positional" in str(field.type)
    while typing.get_origin(hint) is Annotated:
        extras += hint.__metadata__
        hint = hint.__origin__
    words: list[str] = []
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint, *others = (kind for kind in typing.get_args(hint) if kind is not type(None))
        words = [word for kind in others for word in typing.get_args(kind)]  # of a Literal
    several = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if several else hint
    metavar = next((extra.metavar for extra in extras if getattr(extra, "metavar", None)), field.name)
    own = next((extra.name for extra in extras if getattr(extra, "name", None)), field.name)
    name = metavar if positional else "--" + own.replace("_", "-")
    required = field.default is dataclasses.MISSING
    return Option(name, kind, several, positional, required, tuple(words))


def _values(option: Option, left: list[str]) -> list[str]:
    """Takes the values of an option from the words behind it."""
    most = 0 if option.kind is bool else len(left) if option.several else 1
    values = []
    while left and len(values) < most and not is_option(left[0]):
        values.append(left.pop(0))
    return values


def _check_values(option: Option, values: list[str], name: str) -> None:
    help_ = f"(see `jaxldm {name} --help`)"
    if option.kind is bool:
        if values:
            raise InvalidArgumentError(f"{option.name} takes no value, got {shown(values[0])}: {help_}")
        return
    if not values:
        raise InvalidArgumentError(f"{option.name} needs {option.takes} {help_}")
    for value in values:
        if value in option.words:
            continue
        if option.kind is str:
            _check_text(option, value)
            continue
        number = _as_whole(value) if option.kind is int else _as_number(value)
        if number is None:
            raise InvalidArgumentError(f"{option.name} must be {option.takes}, got {shown(value)} {help_}")
        if option.kind is int and abs(number) > LARGEST_INT64:
            raise InvalidArgumentError(
                f"{option.name} must be {option.takes} of at most {LARGEST_INT64}, got {shown(value)}"
            )
        if option.kind is float and not abs(number) <= LARGEST_FLOAT32:
            raise InvalidArgumentError(
                f"{option.name} must be finite, and at most {LARGEST_FLOAT32:.2g}, got {shown(value)}"
            )


def _check_text(option: Option, value: str) -> None:
    if value == "None":
        raise InvalidArgumentError(f"{option.name} None: leave {option.name} out instead")
    if not value.strip() and not option.several:
        raise InvalidArgumentError(f"{option.name} is empty: give it a value, or leave it out")


def _as_whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_text(words: Sequence[str]) -> None:
    """Raises `InvalidArgumentError` for a word that is not UTF-8, or holds a zero byte."""
    for place, word in enumerate(words, 1):
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidArgumentError(
                f"argument {place} is not UTF-8, {shown(word)}: rename the file, or type it in UTF-8"
            ) from None
        if "\0" in word:
            raise InvalidArgumentError(f"argument {place} holds a zero byte: {shown(word)}")
