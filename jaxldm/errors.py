"""User errors: each message says what was given, what is allowed and what to type instead.

One type per kind of error, raised before anything is compiled or written. The command line catches
`JaxldmError`, prints its message as one line and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_CHOICES, MAX_LISTED = 40, 300  # a list of more names, or of more characters, is shown in part
MAX_GIVEN = 80  # characters of what was given, in a message


class JaxldmError(Exception):
    """Base class of all user errors."""


class UnknownNameError(JaxldmError, KeyError):
    """There is no solver, preset, dataset, spacing, ... of that name."""

    def __init__(self, kind: str, given: object, choices: Iterable[str], otherwise: str = ""):
        choices, text, shown = list(choices), str(given)[:MAX_GIVEN], repr(given)
        shown = shown if len(shown) <= MAX_GIVEN else f"{shown[: MAX_GIVEN - 4]} ..."
        near = difflib.get_close_matches(text, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(choices)
        if len(choices) > MAX_CHOICES or len(listed) > MAX_LISTED:
            similar = difflib.get_close_matches(text, choices, n=8, cutoff=0.3)
            listed = f"{len(choices)} names, such as {', '.join(similar or choices[:8])}"
        listed += f", or {otherwise}" if otherwise else ""
        super().__init__(f"unknown {kind} {shown}: choose one of {listed}{hint}")

    def __str__(self) -> str:  # KeyError would print the repr, quotes included
        return str(self.args[0])


class InvalidArgumentError(JaxldmError, ValueError):
    """A value or an option is not allowed, or two options exclude each other."""


class DataError(JaxldmError, ValueError):
    """Images or labels of the wrong shape, range or type, or with NaN in them."""


class CheckpointError(JaxldmError, OSError):
    """A run folder, checkpoint or weight file is missing, incomplete, damaged or of another model."""


class StorageError(JaxldmError, OSError):
    """Writing failed: the disk is full, permission is missing, a folder is a file."""


class DivergenceError(JaxldmError, ArithmeticError):
    """A loss or gradient of training is not finite; the message holds the likely cause and its fix."""


class MissingDependencyError(JaxldmError, ImportError):
    """An optional package is not installed; the message holds the `pip install` line."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}: type  pip install 'jaxldm[{extra}]'")


def one_of(kind: str, given: str, choices: Iterable[str]) -> str:
    """Returns `given` when it is one of `choices`, raises `UnknownNameError` otherwise."""
    choices = list(choices)
    if given not in choices:
        raise UnknownNameError(kind, given, choices)
    return given
