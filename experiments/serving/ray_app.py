"""A model on all machines of a Ray cluster, for `serve run` and `serve deploy`; copy it to change it.

serve run experiments.serving.ray_app:build folder=/srv/models/mini-ldm slots=16 max_replicas=8 gpus=1
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxldm import serving
from jaxldm.commands.serve import TOKEN, read_size
from jaxldm.errors import InvalidArgumentError
from jaxldm.serving.ray_serve import Scale, application_of, folder_worker
from jaxldm.serving.server import Settings

# Each is read from a word, as `serve run` has them, or a value of a file of `serve deploy`.
MODEL = {"folder": str, "family": str, "dtype": str, "devices": int}
SCALE = {field.name: int if isinstance(field.default, int) else float for field in dataclasses.fields(Scale)}
LIMITS = {"max_queue": int, "max_queue_seconds": float, "requests_per_second": float, "burst": int}


def words(value: Any) -> tuple[str, ...]:
    """Several values: "1 4 16", or a list of them."""
    several = value.split() if isinstance(value, str) else value if isinstance(value, list) else [value]
    return tuple(map(str, several))


SETTINGS = {
    "slots": lambda value: tuple(map(int, words(value))),
    "solvers": words,
    "sizes": lambda value: tuple(map(read_size, words(value))),
    "max_steps": int,
    "max_images": int,
}


def build(arguments: Mapping[str, Any]) -> Any:
    """The application.

    Args:
        arguments: `folder`, and what else `jaxldm serve` and `Scale` know.

    Raises:
        InvalidArgumentError: of names and values that are not for it.
    """
    known = MODEL | SCALE | LIMITS | SETTINGS
    for name in arguments:
        if name not in known:
            raise InvalidArgumentError(f"there is no argument {name!r}: give {', '.join(known)}")
    if "folder" not in arguments:
        raise InvalidArgumentError("name the model, as in folder=/srv/models/mini-ldm")

    def given(table: Mapping[str, Any]) -> dict[str, Any]:
        return {name: read(arguments[name]) for name, read in table.items() if name in arguments}

    model = given(MODEL)
    name = Path(model["folder"]).resolve().name
    settings = Settings(name=name, limits=serving.Limits(**given(LIMITS)), **given(SETTINGS))
    make = functools.partial(folder_worker, settings=settings, **model)
    return application_of(make, settings, Scale(**given(SCALE)), os.environ.get(TOKEN) or None)
