"""What a refusal says: the field that it is about, and what to send instead of one that does not exist."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from jaxldm.errors import nearest, shown

TEXTS, CLASSES, IMAGES = (
    ("prompt", "negative_prompt"),
    ("class_labels", "negative_labels"),
    ("image", "strength"),
)


def no_such_field(name: str, fields: Collection[str]) -> str:
    """One line about a field that does not exist: why, where the reason is the model, and what to send.

    Args:
        name: what was sent.
        fields: what requests of this model have.
    """
    start = f"there is no field {shown(name)}: "
    if name in TEXTS and "class_labels" in fields:
        return start + 'this model draws classes; send class_labels, as in {"class_labels": [3, 7]}'
    if name in CLASSES and "prompt" in fields:
        return start + 'this model draws what a text says; send prompt, as in {"prompt": "a cat in the snow"}'
    if name in IMAGES:
        return start + "this model starts from noise alone; leave it out"
    if name == "solver":
        return start + "all is drawn with the model's own solver; leave it out, or start with --solvers"
    near = nearest(name, fields)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{start}send {', '.join(fields)}{hint}"


def param_in(message: str, names: Sequence[str]) -> str | None:
    """The field that a message of the pipeline is about: the first that it names."""
    words = (_SAID_AS.get(word, word) for word in re.findall(r"\w+", message.lower()))
    return next((word for word in words if word in names), None)


_SAID_AS = {"class": "class_labels", "classes": "class_labels", "labels": "class_labels", "text": "prompt"}
