"""Errors for people: each says what was given, what is allowed and what to type instead.

One type per kind of mistake, all raised before anything is compiled or written. The command line catches
`JaxldmError`, prints its one line and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JaxldmError(Exception):
    """Base of every error that is the caller's to mend."""


class UnknownNameError(JaxldmError, KeyError):
    """A solver, preset, dataset, spacing, ... of that name does not exist."""

    def __init__(self, kind: str, given: object, choices: Iterable[str]):
        choices = list(choices)
        near = difflib.get_close_matches(str(given), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {given!r}: choose one of {', '.join(choices)}{hint}")

    def __str__(self) -> str:  # KeyError would print the repr, quotes included
        return str(self.args[0])


class InvalidArgumentError(JaxldmError, ValueError):
    """A number or an option is outside what is allowed, or two options exclude each other."""


class DataError(JaxldmError, ValueError):
    """Images or labels of the wrong shape, range or type, or with NaN in them."""


class CheckpointError(JaxldmError, OSError):
    """A run folder, checkpoint or weight file is missing, half-written, corrupted or of another model."""


class StorageError(JaxldmError, OSError):
    """Writing failed: disk full, no permission, not a folder."""


class DivergenceError(JaxldmError, ArithmeticError):
    """Training made a loss or a gradient that is not finite; the message holds the likely cause and cure."""


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
