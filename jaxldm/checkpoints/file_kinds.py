"""Which of the small files next to a model a file is, by its tensors: for messages about the wrong option."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxldm.errors import CheckpointError

# Kind -> its option on the command line, its function in Python.
TAKEN_BY = {
    "a LoRA": ("--lora", "pipelines.with_lora"),
    "an IP-Adapter": ("--ip-adapter", "pipelines.with_ip_adapter"),
    "a file of textual inversion": ("--embedding", "pipelines.with_embedding"),
}
_OF_LORA = re.compile(r"[._](lora[._](A|B|down|up|linear_layer)|hada_w\d|lokr_w\d)")
_OF_WORDS = ({"emb_params"}, {"clip_l", "clip_g"})


def kind_of_file(tensors: Mapping[str, Any]) -> str | None:
    """A key of `TAKEN_BY`, or None for something else.

    Args:
        tensors: anything with a shape, by the names in the file.
    """
    if {"image_proj", "ip_adapter"} <= {name.split(".")[0] for name in tensors}:
        return "an IP-Adapter"
    if any(_OF_LORA.search(name) for name in tensors):
        return "a LoRA"
    if set(tensors) in _OF_WORDS or "string_to_param.*" in tensors:
        return "a file of textual inversion"
    one = list(tensors.items())
    if len(one) == 1 and "." not in one[0][0] and len(one[0][1].shape) in (1, 2):
        return "a file of textual inversion"
    return None


def check_kind_of_file(path: Path, tensors: Mapping[str, Any], wanted: str) -> None:
    """Raise `CheckpointError` for a file of another kind in `TAKEN_BY` than the one that is wanted."""
    kind = kind_of_file(tensors)
    if kind not in (None, wanted):
        option, function = TAKEN_BY[kind]
        raise CheckpointError(f"{path} is {kind}, not {wanted}: give it to {option}, in Python to {function}")
