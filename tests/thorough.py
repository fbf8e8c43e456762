"""The slow tests that `make test` leaves to `make test-thorough`, by name in `thorough.txt`.

They are the larger combinations of what other tests check at a small size; which ones is chosen by measured
seconds. A line names a test of all its parameters, or with one of them in brackets.
"""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
LIST = pathlib.Path(__file__).with_suffix(".txt")


@functools.cache
def names() -> frozenset[str]:
    """The lines: `tests/room/test_file.py::test_name[parameters]`."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def has(nodeid: str) -> bool:
    """Whether the test is one of them."""
    return nodeid in names() or nodeid.partition("[")[0] in names()


def unknown() -> list[str]:
    """Lines that name no test."""
    return sorted(
        name for name in names() if name.partition("[")[0] not in _tests_of(name.partition("::")[0])
    )


@functools.cache
def _tests_of(file: str) -> frozenset[str]:
    if not (ROOT / file).is_file():
        return frozenset()
    functions = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    return frozenset(f"{file}::{node.name}" for node in functions if isinstance(node, ast.FunctionDef))
