"""A recipe of your own: a Python file with a value `RECIPE`, and what it is about in its docstring."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxldm.errors import InvalidArgumentError, JaxldmError, shown
from jaxldm.files import expanded

if TYPE_CHECKING:
    from jaxldm.training import Recipe

_NEEDED = 'RECIPE = training.Recipe(name="...", ...)'


class RecipeFile(NamedTuple):
    """What a file says.

    Attributes:
        recipe: its `RECIPE`.
        about: its docstring, "" without one.
    """

    recipe: Recipe
    about: str


def is_recipe_file(name: str) -> bool:
    """Whether what was typed in place of a recipe's name is a file."""
    return name.endswith(".py")


def read_recipe_file(name: str) -> RecipeFile:
    """Runs a file, and returns its recipe; data in a folder has its whole path.

    Raises:
        InvalidArgumentError: there is no such file, it fails, or has no recipe.
    """
    from jaxldm import data, training

    path = expanded(name)
    if not path.is_file():
        raise InvalidArgumentError(
            f"there is no file {name}: give a Python file with {_NEEDED}, or the name of a recipe, which "
            "`jaxldm info` lists"
        )
    values = vars(_executed(path))
    if "RECIPE" not in values:
        others = [key for key, value in values.items() if issubclass(type(value), training.Recipe)]
        hint = f"call it RECIPE in place of {others[0]}" if others else f"it needs {_NEEDED}"
        raise InvalidArgumentError(f"{name} has no RECIPE: {hint}")
    recipe = values["RECIPE"]
    if not issubclass(type(recipe), training.Recipe):
        raise InvalidArgumentError(f"RECIPE in {name} must be a training.Recipe, got {_words(recipe)}")
    recipe = dataclasses.replace(recipe, data=data.source_name(recipe.data))
    about = values.get("__doc__")
    return RecipeFile(recipe, inspect.cleandoc(about) if isinstance(about, str) else "")


def _executed(path: Path) -> types.ModuleType:
    """The module that a file makes, which no cache of bytecode has and `import` does not find by its name."""
    module = types.ModuleType("jaxldm_recipe_file")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses of the file look for their annotations
    text = path.read_bytes()
    try:
        exec(compile(text, path, "exec", dont_inherit=True), vars(module))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the file raises is its own: SystemExit, GeneratorExit, ...
        raise InvalidArgumentError(_failure(path, error)) from error
    return module


def _failure(path: Path, error: BaseException) -> str:
    """Where a file failed, and what Python would print at last."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, error = [error.lineno], SyntaxError(error.msg)
    place = f"{path}, line {lines[-1]}" if lines else str(path)
    what = [] if isinstance(error, JaxldmError) else [type(error).__name__]
    return ": ".join([place, *what, *filter(None, [_words(error, str)])])


def _words(value: object, to_text: Callable[[object], str] = shown) -> str:
    """A value of the file in words, whatever its own methods do."""
    try:
        return to_text(value)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001
        return f"a value of type {type(value).__name__}"
