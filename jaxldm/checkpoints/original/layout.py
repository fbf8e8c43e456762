"""How tensors of an original file correspond to published ones, and what a family of files looks like.

"Published" names and layouts are those of diffusers and transformers, which this library's parameters follow
(`checkpoints.names`); "original" ones are those of the code that a model was trained with. A table per
architecture, made from its config, maps each published module or tensor to its place in the original file.
Both directions read the same table; below an entry's module, names are the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxldm.checkpoints.safetensors_file import Tensor
from jaxldm.errors import CheckpointError
from jaxldm.models.config import ModelConfig
from jaxldm.reading import shortened

Shapes = Mapping[str, tuple[int, ...]]  # of one component, by original name, without the component's prefix


class Form(NamedTuple):
    """How a published tensor is stored in the original layout, as a pair of functions.

    Attributes:
        to_published: original tensor -> published tensor. Where the shape does not allow the change, the
            tensor is returned as it is, so that the error about it shows the shape in the file.
        from_published: all published tensors that share one original tensor, ordered by `part` -> the
            original tensor, or None where the original layout has none.
        part: which of the published tensors that share one original tensor.
        constant: shape -> the published tensor, for one that no original file needs to hold.
    """

    to_published: Callable[[Tensor], Tensor]
    from_published: Callable[..., Tensor | None]
    part: int = 0
    constant: Callable[[tuple[int, ...]], np.ndarray] | None = None


# Stored unchanged. Where several published tensors share one original tensor, they are equal.
SAME = Form(lambda tensor: tensor, lambda first, *copies: first)


class Place(NamedTuple):
    """The place of a published tensor in an original file: a name and a form."""

    name: str
    form: Form = SAME


Table = dict[str, Place]


@dataclasses.dataclass(frozen=True)
class Converted:
    """A tensor computed from others when it is used: `np.asarray(it)`."""

    sources: tuple[Tensor, ...]
    shape: tuple[int, ...]
    convert: Callable[..., np.ndarray]
    becomes: Any = None  # the dtype where `convert` changes it

    @property
    def dtype(self) -> np.dtype:
        """That of the sources, if `convert` keeps it."""
        return np.dtype(self.sources[0].dtype if self.becomes is None else self.becomes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.convert(*map(np.asarray, self.sources)), dtype, copy=copy)


# The two directions of each form.


def _transpose(tensor: Tensor) -> Tensor:
    return Converted((tensor,), tuple(tensor.shape)[::-1], np.transpose)


def _pixels_to_linear(tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    if set(shape[2:]) != {1}:
        return tensor
    return Converted((tensor,), shape[:2], lambda array: array.reshape(shape[:2]))


def _linear_to_pixels(tensor: Tensor) -> Tensor:
    return Converted((tensor,), (*tensor.shape, 1, 1), lambda array: array[:, :, None, None])


def _swap_halves(tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    if not shape or shape[0] % 2:
        return tensor
    return Converted((tensor,), shape, lambda array: np.concatenate(np.split(array, 2)[::-1]))


def _concatenate(*tensors: Tensor) -> Tensor:
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    return Converted(tensors, shape, lambda *arrays: np.concatenate(arrays))


def _identity(shape: tuple[int, ...]) -> np.ndarray:
    rows, columns = shape
    return np.eye(rows, columns, dtype=np.float32)


def _drop_identity(tensor: Tensor) -> None:
    if not np.array_equal(np.asarray(tensor), _identity(tensor.shape)):
        raise CheckpointError("which is no identity matrix")


def rows(part: int, sizes: tuple[int, ...] = (1, 1, 1)) -> Form:
    """The form of one of several tensors that the original layout stores as one, on top of each other.

    Args:
        part: which of them; 0 is the first.
        sizes: the rows of each, in units of their greatest common divisor; three of equal size by default.
    """

    def slice_rows(tensor: Tensor) -> Tensor:
        shape = tuple(tensor.shape)
        unit, rest = divmod(shape[0], sum(sizes)) if shape else (0, 1)
        if rest:
            return tensor
        first, last = unit * sum(sizes[:part]), unit * sum(sizes[: part + 1])
        return Converted((tensor,), (last - first, *shape[1:]), lambda array: array[first:last])

    return Form(slice_rows, _concatenate, part)


# A linear layer that the original stores as a 1x1 convolution.
PIXELWISE = Form(_pixels_to_linear, _linear_to_pixels)
TRANSPOSED = Form(_transpose, _transpose)
# The two halves of the rows in the other order: (shift, scale) instead of (scale, shift).
SWAPPED = Form(_swap_halves, _swap_halves)
# An identity matrix in the published layout, which original files do not hold.
IDENTITY = Form(lambda tensor: tensor, _drop_identity, constant=_identity)


def places(modules: Mapping[str, str], form: Form = SAME) -> dict[str, Place]:
    """A table from published to original names, all of one form."""
    return {published: Place(original, form) for published, original in modules.items()}


def place_of(name: str, table: Table) -> Place:
    """The place of the published tensor `name`: its own entry, or that of the innermost module with one.

    Raises:
        CheckpointError: neither exists; the original layout has no such tensor.
    """
    if name in table:
        return table[name]
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = table.get(".".join(parts[:length]))
        if module is not None:
            return Place(".".join([module.name, *parts[length:]]), module.form)
    raise CheckpointError(f"the original layout has no place for {name}")


def from_original(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], table: Table
) -> dict[str, Tensor]:
    """Published tensors from original ones, not read yet.

    Args:
        tensors: of the file, by original name.
        wanted: anything with the shapes of the published tensors, by published name.
        table: of the architecture.

    Returns:
        Those of `wanted` that the file holds.
    """
    found: dict[str, Tensor] = {}
    for name, like in wanted.items():
        place = place_of(name, table)
        if place.form.constant is not None:
            found[name] = place.form.constant(tuple(like.shape))
        elif place.name in tensors:
            found[name] = place.form.to_published(tensors[place.name])
    return found


def to_original(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Original tensors from published ones, not read yet: the inverse of `from_original`.

    Raises:
        CheckpointError: a tensor that the original layout has no place for.
    """
    sharing: dict[str, list[tuple[str, Form]]] = {}
    for name in state:
        place = place_of(name, table)
        sharing.setdefault(place.name, []).append((name, place.form))
    tensors: dict[str, Tensor] = {}
    for original, members in sharing.items():
        in_order = sorted(members, key=lambda member: member[1].part)
        try:
            tensor = members[0][1].from_published(*(state[name] for name, _ in in_order))
        except CheckpointError as error:
            raise CheckpointError(f"the original layout has no place for {members[0][0]}, {error}") from error
        if tensor is not None:
            tensors[original] = tensor
    return tensors


class Component(NamedTuple):
    """A network in an original file.

    Attributes:
        prefix: what its names begin with.
        table: config -> published module or tensor -> its place.
        config: (shapes by original name, the preset's config) -> the config that they belong to. A `KeyError`
            names a tensor that the file lacks.
        preset: the preset that gives what shapes do not show: heads, groups, activations, factors.
        unused: config -> a pattern of the names that files hold although the model does not use them.
    """

    prefix: str
    table: Callable[[Any], Table]
    config: Callable[[Shapes, Any], ModelConfig]
    preset: str
    unused: Callable[[Any], str | None] = lambda config: None


class Family(NamedTuple):
    """A kind of original files.

    Attributes:
        name: for messages.
        components: name -> component, all that such a file may hold.
        signature: how a name begins that only files with this family's denoiser hold, or None.
        bare: component -> how one of its names begins in a file of this component alone, whose names have no
            prefix.
        writes_bare: whether a component of `bare` that is saved alone is saved without prefix.
        ignored: a pattern of the names of tensors that belong to no component.
        rename: name in the file -> the name that the tables know, for files of older programs.
    """

    name: str
    components: Mapping[str, Component]
    signature: str | None = None
    bare: Mapping[str, str] = {}
    writes_bare: bool = False
    ignored: str = ""
    rename: Callable[[str], str] = lambda name: name


def count(shapes: Shapes, pattern: str) -> int:
    """1 + the largest number that the pattern's group has at the start of a name; 0 where none matches.

    Raises:
        CheckpointError: a number that there are not as many tensors for.
    """
    found = [match.group(1) for name in shapes if (match := re.match(pattern, name))]
    longest = max(map(len, found), default=0)
    largest = max(map(int, found), default=-1) if longest < 10 else len(shapes)
    if largest >= len(shapes):
        number = shortened(max(found, key=len if longest >= 10 else int), 20)
        raise CheckpointError(f"a tensor is named as of block {number}, but there are {len(shapes)} tensors")
    return largest + 1


def first_ending(shapes: Shapes, ending: str) -> tuple[int, ...]:
    """The shape of the first tensor whose name ends so. Raises `KeyError` where there is none."""
    for name, shape in shapes.items():
        if name.endswith(ending):
            return shape
    raise KeyError(f"*{ending}")
