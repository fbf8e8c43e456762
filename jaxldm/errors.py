"""User errors: each message says what was given, what is allowed and what to type instead.

One type per kind of error, raised before anything is compiled or written. The command line catches
`JaxldmError`, prints its message as one line and exits with code 2.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

MAX_CHOICES, MAX_LISTED = 40, 360  # a list of more names, or of more characters, is shown in part
MAX_SHOWN = 60  # characters of a value that was given
MAX_PATH = 240  # of a path
# What other programs call the same thing -> its name here: the first that can be chosen.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("fp32", "float"), ("float32",)),
    **dict.fromkeys(("fp16", "half"), ("float16",)),
    "bf16": ("bfloat16",),
    **dict.fromkeys(("steps", "num_steps", "n_steps"), ("num_inference_steps",)),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "scale"), ("guidance_scale",)),
    **dict.fromkeys(("seed", "generator", "rng"), ("key",)),
    **dict.fromkeys(("scheduler", "sampler"), ("solver",)),
    **dict.fromkeys(("labels", "label", "classes", "class_ids"), ("class_labels",)),
    **dict.fromkeys(("num_samples", "n", "num_images"), ("num_images", "num_images_per_prompt")),
    "num_images_per_prompt": ("num_images",),
    **dict.fromkeys(("init_image", "input_image"), ("image",)),
    "mask": ("mask_image",),
    "output_type": ("output",),
    **dict.fromkeys(("callback", "callback_on_step_end"), ("on_step",)),
    **dict.fromkeys(("eps", "noise"), ("epsilon",)),
    **dict.fromkeys(("x_0", "x0"), ("sample",)),
    "v": ("v_prediction",),
    **dict.fromkeys(("dpm++", "dpmpp", "dpmsolver++", "dpm++_2m"), ("dpmpp_2m",)),
    "euler_a": ("euler_ancestral",),
}
Value = TypeVar("Value")


class JaxldmError(Exception):
    """Base class of all user errors."""


class UnknownNameError(JaxldmError, KeyError):
    """There is no solver, preset, dataset, spacing, ... of that name."""

    def __init__(self, kind: str, given: object, choices: Iterable[str], otherwise: str = ""):
        choices, text = list(choices), _as_name(given)
        near = nearest(text, choices)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(choices)
        if len(choices) > MAX_CHOICES or len(listed) > MAX_LISTED:
            others = [choice for choice in choices if choice not in near]
            similar = near + difflib.get_close_matches(text, others, n=7, cutoff=0.3)
            listed = f"{len(choices)} names, such as {', '.join(similar or choices[:8])}"
        listed += f", or {otherwise}" if otherwise else ""
        super().__init__(f"unknown {kind} {shown(given)}: choose one of {listed}{hint}")

    def __str__(self) -> str:  # KeyError would print the repr, quotes included
        return str(self.args[0])


class Stopped(KeyboardInterrupt):
    """Ctrl-C in a training, after all was saved and a line of its log has said how to go on."""


class InvalidArgumentError(JaxldmError, ValueError):
    """A value or an option is not allowed, or two options exclude each other."""


class SignatureError(InvalidArgumentError, TypeError):
    """A call with an argument that the function does not have, or without one that it needs."""


class DataError(JaxldmError, ValueError):
    """Images or labels of the wrong shape, range or type, or with NaN in them."""


class CheckpointError(JaxldmError, OSError):
    """A run folder, checkpoint or weight file is missing, incomplete, damaged or of another model."""


class StorageError(JaxldmError, OSError):
    """The disk is full, a permission is missing, a folder is a file, another writer does not end."""


class DivergenceError(JaxldmError, ArithmeticError):
    """A loss or gradient of training is not finite; the message holds the likely cause and its fix."""


class MissingDependencyError(JaxldmError, ImportError):
    """An optional package is not installed; the message holds the `pip install` line."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}: type  pip install 'jaxldm[{extra}]'")


def path_error(error: OSError, given: Iterable[object]) -> StorageError | None:
    """The `StorageError` for a path that was handed in, or lies in one, and that the system refuses.

    A folder without permission lets nobody ask what is in it, and a name may be too long to be asked for.
    None for an error of a file of somebody else, and for one of this library.
    """
    if isinstance(error, JaxldmError) or not isinstance(error.filename, (str, bytes, os.PathLike)):
        return None
    place = os.path.abspath(os.fsdecode(error.filename))
    roots = [os.path.abspath(os.fsdecode(path)) for path in given if isinstance(path, (str, os.PathLike))]
    if not any(place == root or place.startswith(os.path.join(root, "")) for root in roots):
        return None
    return StorageError(
        f"{place if len(place) <= MAX_PATH else '...' + place[3 - MAX_PATH :]}: {cause(error)}"
    )


def cause(error: OSError) -> str:
    """Why the system refused a path, and what to do, whether it was to be read or to be written."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return "no permission: check who may read and write it and the folders above, or give another path"
    return f"{error.strerror}: check this path, or give another one"


def shown(value: object) -> str:
    """A value for a message: one short line, whatever it is.

    >>> shown("a" * 100), shown([1, 2])
    ("'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...", '[1, 2]')
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if dtype is not None and isinstance(shape, tuple):
        if str(dtype).startswith("key<"):
            return f"an array {list(shape)} of keys" if shape else "a key"
        if shape or type(value).__name__.endswith("Tracer"):
            return f"an array {list(shape)} of {dtype}"
    name = getattr(value, "__name__", None)
    if isinstance(name, str) and callable(value):
        return f"the {'class' if isinstance(value, type) else 'function'} {name}"
    try:
        line = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 (a repr of other people's, or more digits than Python prints)
        return f"a value of type {type(value).__name__}"
    return line if len(line) <= MAX_SHOWN else line[: MAX_SHOWN - 3] + "..."


def _as_name(given: object) -> str:
    """What somebody gave in place of a name, as a name: the dtype of NumPy or JAX, or the text itself."""
    if not isinstance(given, str):
        given = getattr(given, "__name__", None) or getattr(given, "name", None) or shown(given)
    return str(given).strip("'")


def nearest(name: str, choices: Iterable[str]) -> list[str]:
    """The choice that was meant by a name, if any: known elsewhere by it, in capitals, or with a slip.

    >>> nearest("fp16", ["float32", "float16"]), nearest("mini_LDM", ["tiny-dit", "mini-ldm"])
    (['float16'], ['mini-ldm'])
    """
    plain = {_plain(choice): choice for choice in reversed(list(choices))}
    known = [plain[other] for other in ELSEWHERE.get(_plain(name), ()) if other in plain]
    return known[:1] or [plain[other] for other in difflib.get_close_matches(_plain(name), plain, n=1)]


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_").replace(" ", "_")


class Table(dict[str, Value]):
    """Things by name, as a dictionary that says for a name that it lacks which ones there are.

    >>> Table("colour", red=1)["Red"]
    Traceback (most recent call last):
    jaxldm.errors.UnknownNameError: unknown colour 'Red': choose one of red; did you mean 'red'?
    """

    def __init__(self, kind: str, entries: Mapping[str, Value] | None = None, /, **more: Value):
        super().__init__(entries or {}, **more)
        self.kind = kind

    def __missing__(self, name: Any) -> Value:
        raise UnknownNameError(self.kind, name, self)

    def __reduce__(self) -> Any:
        return Table, (self.kind, dict(self))


def one_of(kind: str, given: str, choices: Iterable[str]) -> str:
    """Returns `given` when it is one of `choices`, raises `UnknownNameError` otherwise."""
    choices = list(choices)
    if not isinstance(given, str) or given not in choices:
        raise UnknownNameError(kind, given, choices)
    return given
