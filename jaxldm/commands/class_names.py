"""Names of classes: those of a run's data, as `info` shows and `sample` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxldm.entries import read_value
from jaxldm.errors import CheckpointError
from jaxldm.reading import read_json

RUN_CONFIG = "config.json"
MOST_DIGITS = 18  # of a label: more are no int64
MOST_NAMES = 20  # that are shown, of more the first ones and the last


def with_class_names(pipe: Any, folder: Path | str) -> Any:
    """The model of a run with the names of the classes that it was trained on; any other model as it is."""
    if not pipe.num_classes or getattr(pipe, "class_names", None) != ():
        return pipe
    names = _names_of_run(Path(folder).expanduser() / RUN_CONFIG)
    return pipe.replace(class_names=names) if len(names) == pipe.num_classes else pipe


def _names_of_run(config: Path) -> tuple[str, ...]:
    """What the config.json of a run says; none where there is no such file, or a damaged one."""
    if not config.is_file():
        return ()
    try:
        names = read_json(config)["data"]["class_names"]
        return read_value(names, tuple[str, ...], str(config))
    except (CheckpointError, KeyError, TypeError):  # the model can be drawn from without it
        return ()


def read_labels(words: Sequence[int | str] | None) -> list[int | str] | None:
    """Labels as they are typed: numbers, and names of classes.

    >>> read_labels(("3", "tench", "-1"))
    [3, 'tench', -1]
    """
    if words is None:
        return None
    is_number = lambda word: word.removeprefix("-").isdecimal() and len(word) <= MOST_DIGITS  # noqa: E731
    return [int(word) if is_number(str(word)) else word for word in words]


def describe_classes(pipe: Any) -> str:
    """The labels of a model, and their names where these are no numbers."""
    if pipe.num_classes is None:
        return "none"
    names, labels = list(getattr(pipe, "class_names", ())), f"0 to {pipe.num_classes - 1}"
    if not names or names == [str(label) for label in range(len(names))]:
        return labels
    if len(names) > MOST_NAMES:
        names = [*names[: MOST_NAMES // 2], "...", names[-1]]
    return f"{labels}: {', '.join(names)}"
