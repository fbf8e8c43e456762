"""One picture of a folder, of a shard or of a table, before it is decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

TEXT_KEYS = ("text", "caption")  # of a column or an entry with captions
CONTROL_KEYS = ("conditioning_image", "conditioning_image_file_name")  # of one with pictures for a ControlNet


class Example(NamedTuple):
    """One picture of a folder.

    Attributes:
        name: relative to the folder; unique.
        read: () -> the content of its file.
        split: "train" and so on, or None where the folder has no splits.
        label: name of its class, or None.
        caption: in words, or None.
        problem: why it cannot be used, or None.
        control: () -> the content of the file of its condition picture; None: it has none.
    """

    name: str
    read: Callable[[], bytes]
    split: str | None = None
    label: str | None = None
    caption: str | None = None
    problem: str | None = None
    control: Callable[[], bytes] | None = None


class Skipped(NamedTuple):
    """A picture that is not used, and why."""

    name: str
    reason: str
