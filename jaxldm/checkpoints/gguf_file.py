"""Tensors of GGUF files (llama.cpp's format, versions 2 and 3), in which diffusion transformers are shared.

F32, F16 and BF16 are plain numbers; `gguf_types` has those whose numbers share scales.
Nothing is read before it is used; shapes are those of PyTorch, the reverse of the file's.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxldm.checkpoints.gguf_types import NAMES, TYPES, Scales
from jaxldm.errors import CheckpointError
from jaxldm.reading import check_regular, reading, shown

MAGIC = b"GGUF"
_PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16)}
_KNOWN = ("F32", "F16", "BF16", *TYPES)
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST, _LONGEST = 100_000, 2**20  # entries of the header; letters of a name


class GgufTensor(NamedTuple):
    """A tensor of a file, not read yet.

    Attributes:
        shape: as in PyTorch.
        kind: a name of `TYPES`, or "" of plain numbers.
        raw: its bytes.
        dtype: of plain numbers; of the others float32, what they stand for.
    """

    shape: tuple[int, ...]
    kind: str
    raw: np.ndarray
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not self.kind:
            return np.array(self.raw.view(self.dtype).reshape(self.shape), dtype, copy=copy)
        scales = self._scales()
        groups = self.codes().reshape(*scales.scale.shape, -1).astype(np.float32)
        groups = groups * scales.scale[..., None].astype(np.float32)
        if scales.offset is not None:
            groups = groups + scales.offset[..., None]
        return np.array(groups.reshape(self.shape), dtype, copy=copy)

    def _blocks(self) -> np.ndarray:
        return self.raw.reshape(-1, TYPES[self.kind].num_bytes)

    def _scales(self) -> Scales:
        return TYPES[self.kind].scales(self._blocks())

    def scales(self) -> np.ndarray:
        """What codes are multiplied with, `[rows, groups]`."""
        return self._scales().scale.reshape(math.prod(self.shape[:-1]), -1)

    def offsets(self) -> np.ndarray | None:
        """What is added then, likewise; None: nothing."""
        offset = self._scales().offset
        return None if offset is None else offset.reshape(math.prod(self.shape[:-1]), -1)

    def codes(self) -> np.ndarray:
        """int8 of the tensor's shape."""
        return TYPES[self.kind].codes(self._blocks()).reshape(self.shape)


def open_gguf(path: Path | str) -> dict[str, GgufTensor]:
    """The tensors of a file by their names.

    Raises:
        CheckpointError: no such file, a damaged one, or types that are not known here, which are named.
    """
    path = Path(path)
    check_regular(path, "weight file")
    content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    with reading(path):
        header = _Header(content)
        count, entries = header.start()
        shapes: dict[str, tuple[int, ...]] = {}
        alignment = 32
        for _ in range(entries):
            name, value = header.text(), header.value()
            if name == "general.alignment":
                alignment = int(value)
            elif name.startswith("comfy.gguf.orig_shape."):
                shapes[name.removeprefix("comfy.gguf.orig_shape.")] = tuple(int(side) for side in value)
        infos = [header.info() for _ in range(count)]
        if not 1 <= alignment <= 2**20:
            raise CheckpointError(f"general.alignment is {alignment}: the file is damaged")
        _check_types({name: kind for name, _, kind, _ in infos})
        first = -(-header.place // alignment) * alignment
        return {
            name: _tensor(content, first + offset, kind, dims, shapes.get(name), name)
            for name, dims, kind, offset in infos
        }


def _check_types(kinds: Mapping[str, int]) -> None:
    """Raise `CheckpointError` for tensors, name -> number of its type, of a type that is not read."""
    unread = {name: kind for name, kind in kinds.items() if kind not in _PLAIN}
    types = {name: NAMES.get(kind, f"number {kind}") for name, kind in unread.items()}
    unknown = {kind: name for name, kind in reversed(types.items()) if kind not in TYPES}
    if unknown:
        kind, name = sorted(unknown.items())[0]
        others = f" (and others of {', '.join(sorted(unknown)[1:])})" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"its tensor {shown(name)} is of type {kind}{others}; known: {', '.join(_KNOWN)}: take a file of "
            "the same model in Q4_K or Q8_0"
        )


def _tensor(
    content: np.ndarray,
    start: int,
    kind: int,
    dims: tuple[int, ...],
    shape: tuple[int, ...] | None,
    name: str,
) -> GgufTensor:
    own = dims[::-1]
    size = math.prod(own)
    if kind in _PLAIN:
        length, dtype = size * _PLAIN[kind].itemsize, _PLAIN[kind]
    else:
        block = TYPES[NAMES[kind]]
        if not own or own[-1] % block.size:
            raise CheckpointError(
                f"{shown(name)} has rows of {own[-1:]} numbers, no multiple of {block.size}"
            )
        length, dtype = size // block.size * block.num_bytes, np.dtype(np.float32)
    if start + length > len(content):
        raise CheckpointError(f"it ends within the tensor {shown(name)}: it is damaged")
    if shape is not None and math.prod(shape) != size:
        raise CheckpointError(f"{shown(name)} is of {size} numbers, and its own shape is {shape}")
    whole = own if shape is None or kind not in _PLAIN else shape
    return GgufTensor(whole, "" if kind in _PLAIN else NAMES[kind], content[start : start + length], dtype)


class _Header:
    """Reads the header of a file from its start, never beyond its end."""

    def __init__(self, content: np.ndarray):
        self.content, self.place = content, 0

    def take(self, length: int) -> bytes:
        if not 0 <= length <= len(self.content) - self.place:
            raise CheckpointError("it ends within its header: it is damaged, or no GGUF file")
        self.place += length
        return self.content[self.place - length : self.place].tobytes()

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def count(self, what: str, most: int = _MOST) -> int:
        found = self.number("Q")
        if found > most:
            raise CheckpointError(f"it claims {found} {what}: it is damaged")
        return found

    def start(self) -> tuple[int, int]:
        """(number of tensors, of entries)."""
        if self.take(4) != MAGIC:
            raise CheckpointError("it is no GGUF file, which begins with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise CheckpointError(f"it is of GGUF version {version}; known: 2 and 3")
        return self.count("tensors"), self.count("entries")

    def text(self) -> str:
        return self.take(self.count("letters", _LONGEST)).decode()

    def value(self, kind: int | None = None) -> Any:
        kind = self.number("I") if kind is None else kind
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, length = self.number("I"), self.count("values", 2**22)
            if inner == _ARRAY:
                raise CheckpointError("it has arrays of arrays: it is damaged")
            return [self.value(inner) for _ in range(length)]
        if kind not in _VALUES:
            raise CheckpointError(f"it has a value of kind {kind}: it is damaged")
        return self.number(_VALUES[kind])

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, the file's dims, type, offset) of a tensor."""
        name, axes = self.text(), self.number("I")
        if axes > 8:
            raise CheckpointError(f"{shown(name)} has {axes} axes: the file is damaged")
        dims = tuple(self.count("numbers", 2**40) for _ in range(axes))
        return name, dims, self.number("I"), self.number("Q")
