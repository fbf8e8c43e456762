"""Annotations: they can be evaluated, and public functions name the axes of the arrays they take and return.

The tests of each room check them at run time, see `annotations`.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing

import annotations
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Array, Float

import jaxldm

MODULES = [module.name for module in pkgutil.walk_packages(jaxldm.__path__, "jaxldm.")]
ROOMS = ("diffusion", "diffusion.solvers", "nn", "models", "metrics")  # that work on arrays
SHAPE = re.compile(r"\[[A-Z]\b[^\]]*\]")  # in docstrings: [B], [B, H, W, C]


def functions_of(name: str, value: object):
    """(name, function): a function by itself, or the methods and properties of a class."""
    value = inspect.unwrap(value) if callable(value) else value
    if inspect.isfunction(value):
        yield name, value
    elif inspect.isclass(value):
        for method, function in vars(value).items():
            function = getattr(function, "fget", None) or getattr(function, "__func__", function)
            function = inspect.unwrap(function) if callable(function) else function
            if inspect.isfunction(function):
                yield f"{name}.{method}", function


def names_for_type_checkers(module) -> set[str]:
    """The names that a file imports under `if TYPE_CHECKING`."""
    blocks = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names}


@pytest.mark.parametrize("name", MODULES)
def test_annotations_can_be_evaluated(name):
    """A name that is not imported, or a shape without quotes, is seen by no other tool."""
    module = importlib.import_module(name)
    known = dict.fromkeys(names_for_type_checkers(module), typing.Any)
    for key, value in vars(module).items():
        if getattr(value, "__module__", None) == name:
            for _, function in functions_of(key, value):
                if function.__code__.co_filename == module.__file__:  # else Python's own, of a dataclass
                    typing.get_type_hints(function, localns=known, include_extras=True)


def has_bare_array(hint: object) -> bool:
    """Whether an annotation holds the type of an array without dtype and axes."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return False
    return hint in (jax.Array, np.ndarray) or any(has_bare_array(part) for part in typing.get_args(hint))


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_name_the_axes_of_their_arrays(room):
    module, found = importlib.import_module(f"jaxldm.{room}"), []
    for public in module.__all__:
        for name, function in functions_of(public, getattr(module, public)):
            if name.rpartition(".")[2].startswith("_") and not name.endswith("__call__"):
                continue
            hints = typing.get_type_hints(function, include_extras=True)
            parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
            found += [f"{name}: {p} has no annotation" for p in parameters if p not in hints]
            found += [f"{name}: {p} has no axes" for p, hint in hints.items() if has_bare_array(hint)]
            for parameter in parameters:
                text = rf"^ +{parameter}: (.*\n(?: {{9,}}.*\n)*)"
                about = re.search(text, inspect.getdoc(function) or "", re.M)
                only_there = about and SHAPE.search(about[1]) and "tree" not in about[1]
                if only_there and hints.get(parameter) is typing.Any:
                    found.append(f"{name}: {parameter} has axes in its docstring alone")
    assert not found, "\n".join(found)


def _product(x: Float[Array, "B C"], y: Float[Array, "C D"]) -> Float[Array, "B D"]:
    if y.shape[1] == 7:
        raise ValueError("seven")
    return x if y.shape[1] == 5 else x @ y


@dataclasses.dataclass(frozen=True)
class _Row:
    numbers: tuple[float, ...]

    def __post_init__(self):
        if self.numbers is not None:
            object.__setattr__(self, "numbers", tuple(self.numbers))


product = annotations.checked(_product, typechecker=annotations.check)
Row = annotations.checked(_Row, typechecker=annotations.check)


def test_a_wrong_shape_or_type_is_found():
    x, y = jnp.zeros((2, 3)), np.zeros((3, 4), np.float32)
    with annotations.checking(True):
        assert product(x, y).shape == (2, 4)
        for arguments in ((x[0], y), (x.astype(int), y.astype(int)), (x, np.zeros((3, 5)))):
            with pytest.raises(jaxtyping.TypeCheckError):
                product(*arguments)
    with annotations.checking(False):
        assert product(x, np.zeros((3, 5))).shape == (2, 3)


def test_the_error_of_the_function_itself_comes_first():
    with annotations.checking(True), pytest.raises(ValueError, match="seven"):
        product(jnp.zeros((2, 3)), jnp.zeros((4, 7)))


def test_fields_are_checked_when_they_are_made():
    with annotations.checking(True):
        assert Row([0.5, 1]).numbers == (0.5, 1)
        for numbers in (None, ["a"]):
            with pytest.raises(jaxtyping.TypeCheckError):
                Row(numbers)
