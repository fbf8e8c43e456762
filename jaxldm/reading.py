"""Reading files so that whatever is in them, the outcome is their content or one line that names the file.

Only regular files are read, and no more of them than a file of its kind has. What is wrong with a file, be it
found here, by a library or by the code that builds something of its content, becomes one error (`reading`).
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxldm.errors import CheckpointError, JaxldmError

MAX_JSON_BYTES = 32 * 2**20  # the largest published ones, vocabularies and indices of shards, have a few
MAX_MESSAGE = 330  # characters of an error's line, without the path
_MAX_DIGITS = 100  # of a whole number in JSON


@contextlib.contextmanager
def reading(what: Path | str, kind: type[JaxldmError] = CheckpointError) -> Iterator[None]:
    """Turns what goes wrong while a file is read, or something is built of its content, into a `kind`.

    Errors of this library that are a `kind` get the name of the file, where they lack it; its other errors
    pass as they are. Put as little into the block as possible: everything else that is raised there counts as
    the file's fault.

    Args:
        what: the file or folder, for the message.
        kind: `CheckpointError`, or `DataError` for images and labels.

    Raises:
        kind: "FILE cannot be read: what was wrong", of one line.
    """
    try:
        yield
    except kind as error:
        text, longest = str(error), MAX_MESSAGE + len(str(what))
        if str(what) not in text:
            raise kind(named(what, text)) from error
        if len(text) <= longest and "\n" not in text:
            raise
        raise kind(shortened(text, longest)) from error
    except (JaxldmError, NameError, ImportError):  # of the call or of the program, and of no file
        raise
    except Exception as error:
        raise kind(named(what, f"it cannot be read: {reason(error)}")) from error
    except BaseException as error:  # Rust's panics, of `tokenizers`, are no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise kind(named(what, f"it cannot be read: {reason(error)}")) from error


def named(what: Path | str, text: str) -> str:
    """ "FILE: text" in one line, the text cut to what a message may have."""
    return f"{what}: {shortened(text, MAX_MESSAGE)}"


def shortened(text: str, length: int) -> str:
    """The text in one line of at most so many characters."""
    text = " ".join(text[: 20 * length].split())
    return text if len(text) <= length else text[: length - 4] + " ..."


def some_of(problems: Sequence[str], most: int = 8, length: int = MAX_MESSAGE - 60) -> str:
    """The first of several problems in a line for a message, and how many more there are.

    >>> some_of(["a", "b", "c"], most=2)
    'a; b; and 1 more'
    """
    listed = ""
    for number, problem in enumerate(problems):
        longer = f"{listed}; {problem}" if number else shortened(problem, length)
        if number == most or len(longer) > length:
            return f"{listed}; and {len(problems) - number} more"
        listed = longer
    return listed


def shown(value: Any, length: int = 60) -> str:
    """A value of a file as a message shows it."""
    return shortened(repr(value), length)


def reason(error: BaseException) -> str:
    """The cause of an error of another library, in words and in one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = shortened(str(error), 200)
    if isinstance(error, ValueError | OSError | EOFError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check_regular(path: Path | str, what: str = "file", kind: type[JaxldmError] = CheckpointError) -> None:
    """Raise `kind` unless `path` is a regular file: no folder, pipe or device, which may never end.

    Args:
        path: of the file; a link is followed.
        what: the word for it in "there is no weight file PATH".
        kind: of error.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise kind(f"there is no {what} {path}") from None
    except (OSError, ValueError) as error:
        raise kind(named(path, f"it cannot be read: {reason(error)}")) from error
    if not stat.S_ISREG(mode):
        is_folder = stat.S_ISDIR(mode)
        raise kind(f"{path} is a {'folder' if is_folder else 'pipe or device'}, not a {what}")


def read_bytes(
    path: Path | str, limit: int, what: str = "file", kind: type[JaxldmError] = CheckpointError
) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises `kind` for anything else."""
    check_regular(path, what, kind)
    with reading(path, kind), open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise kind(f"{path} has more than the {limit} bytes that a {what} may have")
    return content


def read_json(
    path: Path | str, what: str = "file", kind: type[JaxldmError] = CheckpointError
) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        kind: no regular file, too large, not UTF-8 or not JSON, no object, a name that occurs twice, NaN, a
            number of more digits than any has.
    """
    return parse_json(read_bytes(path, MAX_JSON_BYTES, what, kind), path, kind)


def parse_json(
    content: bytes | str, where: Path | str, kind: type[JaxldmError] = CheckpointError
) -> dict[str, Any]:
    """The object in the text of a JSON file, as `read_json`; `where` names it in messages."""
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        entries = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_constant,
        )
        if "\\ud" in text or "\\uD" in text:  # half a character, which can be neither printed nor written
            json.dumps(entries, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError, MemoryError) as error:
        raise kind(f"{where} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(entries, dict):
        raise kind(f"{where} does not hold a JSON object")
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{shown(twice)} occurs twice")
    return entries


def _whole_number(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {shortened(text, 40)} is out of range")
    return number


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is not a number")
    return float(text)  # diffusers writes -Infinity where there is no bound
