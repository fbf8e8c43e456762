"""Options that several commands have, and how options are shown in `--help`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.exact import LARGEST_FLOAT32, LARGEST_INT32
from jaxldm.reading import shown as shown_value


def shown(metavar: str, default: str | None = None, name: str | None = None) -> Any:
    """An option with its value shown as `metavar`, its default described, and perhaps another name."""
    hint = f"(default: {default})" if default else None
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint, name=name)


def first_devices(count: int | None) -> list[Any] | None:
    """The first `count` devices of JAX; None, which leaves the choice to the library, for None.

    Raises `InvalidArgumentError` for more devices than there are.
    """
    if count is None:
        return None
    import jax

    if not 1 <= count <= jax.device_count():
        raise InvalidArgumentError(f"devices must be between 1 and {jax.device_count()}, got {count}")
    return jax.devices()[:count]


def devices_or_mesh(devices: int | None, mesh: str | None) -> dict[str, Any]:
    """The arguments `devices` and `mesh` of `training.train`, where only the first devices may be meant.

    Raises:
        UnknownNameError, InvalidArgumentError: as `read_mesh`; more devices than there are.
    """
    if mesh is not None:
        return {"mesh": read_mesh(mesh, devices)}
    first_devices(devices)
    return {"devices": devices}


def batch_size(value: int | Literal["auto"] | None) -> int | None:
    """The batch size of a recipe; raises `InvalidArgumentError` for 0, which stands for "auto" in recipes."""
    from jaxldm.training.stage_recipe import AUTO

    if value == "auto":
        return AUTO
    if value == AUTO:
        raise InvalidArgumentError("--batch-size must be >= 1 or auto, got 0")
    return value


def mesh_sizes(text: str) -> dict[str, int]:
    """The axes of --mesh, as in "fsdp=2,tensor=4": name -> devices along it.

    Raises:
        UnknownNameError: an axis that a mesh does not have.
        InvalidArgumentError: anything else than counts, each name once.
    """
    from jaxldm.models.sharding import AXES

    sizes: dict[str, int] = {}
    for word in text.replace(",", " ").split():
        name, _, size = word.partition("=")
        one_of("axis of --mesh", name, AXES)
        if not size.isdecimal() or not 1 <= int(size) <= LARGEST_INT32 or name in sizes:
            raise InvalidArgumentError(
                f"--mesh takes AXIS=DEVICES, each axis once, as in fsdp=2,tensor=4, got {shown_value(text)}"
            )
        sizes[name] = int(size)
    if not sizes:
        raise InvalidArgumentError("--mesh is empty: give axes, as in --mesh tensor=4")
    return sizes


def read_mesh(text: str, devices: int | None = None) -> Any:
    """The mesh of --mesh over the first `devices` devices, or all; the rest of them along `data`.

    Raises:
        UnknownNameError, InvalidArgumentError: as `mesh_sizes`; axes that do not divide the devices.
    """
    import jax

    from jaxldm import models

    sizes = mesh_sizes(text)
    wanted, data = math.prod(sizes.values()), sizes.pop("data", None)
    first_devices(devices)
    there = jax.device_count() if devices is None else devices
    if wanted > there or (data is not None and devices is not None and wanted != there):
        hint = virtual_devices(wanted) if devices is None and jax.default_backend() == "cpu" else ""
        raise InvalidArgumentError(f"--mesh {text} needs {wanted} devices, got {there}{hint}")
    there = there if data is None else wanted
    return models.make_mesh(there, **sizes)


def virtual_devices(count: int) -> str:
    """How a processor becomes so many devices, to try a mesh: the end of a message."""
    setting = f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
    return f": to try it on a CPU, put {setting} in front of the command"


def named_values(texts: tuple[str, ...] | None, option: str, names: Sequence[str]) -> dict[str, Any]:
    """The values of an option of the form NAME=VALUE: JSON, or text where they are none.

    Raises:
        UnknownNameError: a name that is not in `names`.
        InvalidArgumentError: a word without a name, or a name twice.
    """
    values: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or name in values:
            raise InvalidArgumentError(
                f"--{option} takes NAME=VALUE, each name once, got {shown_value(text)}"
            )
        if not names:
            raise InvalidArgumentError(f"this model has no options of its own: leave out --{option} {text}")
        one_of(f"name of --{option}", name, names)
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def numbers(texts: tuple[str, ...] | None, option: str) -> list[float] | None:
    """The numbers of an option, separated by spaces or commas; None for None."""
    if texts is None:
        return None
    words = [word for text in texts for word in text.replace(",", " ").split()]
    try:
        given = [float(word) for word in words]
    except ValueError:
        hint = "; the name of a spacing goes to --spacing" if option == "sigmas" else ""
        raise InvalidArgumentError(
            f"--{option} must be numbers, got {shown_value(' '.join(words))}{hint}"
        ) from None
    for number in given:
        if not 0 <= number <= LARGEST_FLOAT32:
            raise InvalidArgumentError(f"--{option} must be finite numbers of 0 or more, got {number}")
    return given
