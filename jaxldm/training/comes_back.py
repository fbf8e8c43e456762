"""Whether a recipe can be read back from config.json, where every later command looks for it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

from jaxldm import diffusion as D
from jaxldm import schedulers
from jaxldm.errors import InvalidArgumentError, JaxldmError, shown
from jaxldm.reading import parse_json, reason
from jaxldm.training.few_steps.job import scheduler_of
from jaxldm.training.recipes import Recipe


def check_comes_back(recipe: Recipe) -> None:
    """Write a recipe to text, read it back, and compare: equal values of the same types.

    Raises:
        InvalidArgumentError: the field that would be another one, or none, for `--resume` and for `sample`.
    """
    problem = _why_not(recipe)
    if problem is not None:
        raise InvalidArgumentError(
            f"the recipe {shown(recipe.name)} cannot be read back from the config.json of its run: {problem}"
        )


def _why_not(recipe: Recipe) -> str | None:
    try:
        entries = recipe.to_dict()
        problem = _unwritable(entries, "")
        if problem is not None:
            return problem
        again = Recipe.from_dict(parse_json(json.dumps(entries), "its text"))
    except JaxldmError as error:
        return str(error)
    return _difference(recipe, again, "") or _scheduler_problem(recipe)


def _unwritable(value: Any, place: str) -> str | None:
    """The first entry that JSON does not have."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                return f"{place} has the key {shown(key)}, which is no string"
            problem = _unwritable(entry, _inner(place, key))
            if problem is not None:
                return problem
        return None
    if isinstance(value, list):
        return next(
            filter(None, (_unwritable(entry, f"{place}[{n}]") for n, entry in enumerate(value))), None
        )
    try:
        parse_json(json.dumps({"value": value}), "it")
    except (TypeError, ValueError, RecursionError, JaxldmError) as error:
        why = str(error) if isinstance(error, JaxldmError) else reason(error)
        return f"{place} is {shown(value)}: {why}"
    return None


def _difference(value: Any, again: Any, place: str) -> str | None:
    """The first field that reading gives as another value, or as a value of another type."""
    if isinstance(value, D.Prediction) and isinstance(again, D.Prediction):
        return _other_prediction(value, again, place)
    both = (value, again)
    kinds = [Mapping if isinstance(each, Mapping) else type(each) for each in both]
    if kinds[0] is not kinds[1]:
        return f"{place or 'it'} is of the class {_name(type(value))}, and comes back as {_name(type(again))}"
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        parts = [(_inner(place, name), getattr(value, name), getattr(again, name)) for name in names]
    elif isinstance(value, Mapping):
        parts = [(_inner(place, str(key)), value[key], again.get(key)) for key in value]
    elif isinstance(value, (tuple, list)):
        parts = [(f"{place}[{n}]", *pair) for n, pair in enumerate(zip(value, again, strict=False))]
    else:
        return None if value == again else f"{place} is {shown(value)}, and comes back as {shown(again)}"
    return next(filter(None, (_difference(old, new, inner) for inner, old, new in parts)), None)


def _other_prediction(value: D.Prediction, again: D.Prediction, place: str) -> str | None:
    own = type(value.path)
    if own is not type(again.path) or value != again:
        return f"{place} comes back as {again.name} on the path {shown(again.path)}"
    module = sys.modules.get(own.__module__)
    if own.__module__ != "__main__" and getattr(module, "__spec__", None) is None:
        return (
            f"{place} has the path {own.__qualname__} of the recipe's file: put the class into a module that "
            "the file imports, and give  jaxldm --import MODULE  with every command"
        )
    return None


def _scheduler_problem(recipe: Recipe) -> str | None:
    """Why the prediction cannot be written into scheduler_config.json, with which the training ends."""
    own = recipe.diffusion
    if own is None:
        return None
    try:
        schedulers.to_config(own.prediction) if own.few_steps is None else scheduler_of(own)
    except JaxldmError as error:
        return f"diffusion.prediction: {error}"
    return None


def _inner(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
