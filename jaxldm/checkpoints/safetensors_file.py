"""The safetensors file format: opening by the header, reading tensors when they are used, and writing.

A file is eight bytes (the length of the header), the header (JSON: name -> dtype, shape, first and last byte)
and the bytes of the tensors. It holds no code. https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from jaxldm.errors import CheckpointError
from jaxldm.reading import check_regular, parse_json, shown

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
        "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64, "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu, "BF16": ml_dtypes.bfloat16,
        "F16": np.float16, "F32": np.float32, "F64": np.float64,
    }.items()
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the limit of the format's own library
_MOST_AXES = 32  # of an array
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@runtime_checkable
class Tensor(Protocol):
    """An array, or anything else with a shape and a dtype that `np.asarray` accepts."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __array__(self, /, *args: Any, **kwargs: Any) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet: `np.asarray(it)` maps its bytes into memory, read-only.

    The mapping covers only this tensor and ends with the last array that uses it.
    """

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        size = math.prod(self.shape) * self.dtype.itemsize
        if size == 0:
            return np.zeros(self.shape, dtype or self.dtype)
        try:
            raw = np.memmap(self.path, np.uint8, "r", self.offset, (size,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} has changed while it was read: {error}") from error
        array = np.asarray(raw).view(self.dtype).reshape(self.shape)
        return np.array(array, dtype or self.dtype, copy=copy)


class Contents(NamedTuple):
    """A safetensors file.

    Attributes:
        tensors: not read yet, in the order of their bytes.
        metadata: the strings stored with them.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def open_safetensors(path: Path | str) -> Contents:
    """Reads the header of a safetensors file; the tensors are read when they are used.

    Raises:
        CheckpointError: no such file, a pickle file, an invalid header or one that claims more or less than
            the file holds (an incomplete download or copy), tensors that overlap or are named twice, an
            unknown dtype.
    """
    path = Path(path)
    check_regular(path, "weight file")
    refuse_pickle(path)
    start = b""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise _Damage(_too_long(start, length, size))
            header = file.read(length)
        return _read_header(path, header, 8 + length, size)
    except _Damage as error:
        refuse_pickle(path, start)
        raise CheckpointError(
            f"{path} ({size} bytes) is damaged ({error}): write or download it again (of a run: "
            "train with --resume)"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_safetensors(path: Path | str) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, bit for bit, in host memory. Raises as `open_safetensors` does."""
    return {name: np.array(tensor) for name, tensor in open_safetensors(path).tensors.items()}


def refuse_pickle(path: Path, start: bytes = b"") -> None:
    """Raises `CheckpointError` when the name or the first bytes of a file are those of a pickle file."""
    if path.suffix not in _PICKLE_SUFFIXES and not start.startswith(_PICKLE_STARTS):
        return
    raise CheckpointError(
        f"{path} is a pickle file, which can run any program when it is opened, so it is not read. Take "
        "the .safetensors file of the same weights; if there is none, and you trust this one, convert it "
        "once with PyTorch:  "
        f"s = torch.load({path.name!r}, weights_only=True); s = s.get('state_dict', s); "
        "safetensors.torch.save_file({k: v.contiguous() for k, v in s.items() if hasattr(v, 'shape')}, "
        f"{path.with_suffix('.safetensors').name!r})"
    )


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a safetensors file; by default, `metadata` marks it as in the layout of PyTorch."""
    return b"".join(safetensors_chunks(tensors, metadata))


def safetensors_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The same in pieces: the header, then one tensor after the other, each read when it is requested."""
    # Wide dtypes first: then every tensor is aligned, as the format asks of writers.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict({"format": "pt"} if metadata is None else metadata)}
    end = 0
    for name in order:
        shape, dtype = tensors[name].shape, np.dtype(tensors[name].dtype)
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        array = np.asarray(tensors[name])
        assert array.shape == tuple(tensors[name].shape) and array.dtype == tensors[name].dtype, name
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class _Damage(Exception):
    """What is wrong with a file's bytes."""


def _too_long(start: bytes, length: int, size: int) -> str:
    if size < 8:
        return "too short for a header"
    if start.startswith(b"version "):
        return "it is the pointer of Git LFS and not the file: fetch it with `git lfs pull`"
    return f"its header claims {length} bytes, {size - 8} follow"


def _read_header(path: Path, header: bytes, data_start: int, file_size: int) -> Contents:
    if not header.startswith(b"{"):
        raise _Damage("its header is not a JSON object")
    try:
        entries = parse_json(header, "its header")
    except CheckpointError as error:
        raise _Damage(str(error)) from error
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _Damage("its __metadata__ are not strings")
    spans = {name: _span(name, entry, file_size) for name, entry in entries.items()}
    end, before = 0, "the header"
    tensors = {}
    for name in sorted(spans, key=lambda name: spans[name][2:]):
        dtype, shape, first, last = spans[name]
        if first != end:
            what = "overlaps" if first < end else "leaves a gap after"
            raise _Damage(f"tensor {name!r} at bytes {first} to {last} {what} {before}, which ends at {end}")
        tensors[name] = StoredTensor(path, name, dtype, shape, data_start + first)
        end, before = last, repr(name)
    if end != file_size - data_start:
        raise _Damage(f"its header claims {end} bytes of tensors, {file_size - data_start} follow")
    return Contents(tensors, metadata)


def _span(name: str, entry: Any, room: int) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, the byte after the last) of a header's entry, in a file of `room` bytes."""
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        what = f"the header's entry of {shown(name)}"
        raise _Damage(f"{what} is not a dtype, a shape and two offsets") from None
    if len(shape) > _MOST_AXES:
        raise _Damage(f"tensor {shown(name)} has {len(shape)} axes; at most {_MOST_AXES} are possible")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, first, last)):
        numbers = f"{shown(list(shape))}, {shown(first)}, {shown(last)}"
        raise _Damage(f"the shape or the offsets of {shown(name)} are not counts: {numbers}")
    if max(shape, default=0) > room and 0 in shape:  # sizes of models are read from shapes
        raise _Damage(f"tensor {shown(name)} is empty, but {shown(list(shape))}, larger than the file")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Damage(f"tensor {shown(name)} is of dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _Damage(
            f"tensor {shown(name)}, {dtype} {shown(list(shape))}, has {last - first} bytes instead of "
            f"{shown(math.prod(shape) * DTYPES[dtype].itemsize)}"
        )
    return DTYPES[dtype], shape, first, last
