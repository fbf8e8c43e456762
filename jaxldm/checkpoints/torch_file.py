"""Arrays from the files that PyTorch and NumPy pickle, read without running anything that is in them.

| form | content |
|---|---|
| zip (`torch.save` since 1.6) | `NAME/data.pkl` and one entry of raw numbers per storage |
| TorchScript (`torch.jit.save`) | the same, of modules, next to their code, which is not looked at |
| stream (`torch.save` before 1.6) | five pickles in a row, then the storages |
| pickle of NumPy arrays | nested dictionaries, as jax-fid has them |

A pickle is a program: it names functions and calls them. Here a name is looked up in the table below, where
each function builds an array or a container and nothing else; any other name ends the reading.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import mmap
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import ml_dtypes
import numpy as np

from jaxldm.errors import CheckpointError
from jaxldm.reading import check_regular, reading, shown

STREAM_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number
PICKLES = (".bin", ".pt", ".pth")  # endings of such files
_LARGEST_PICKLE = 2**26  # bytes of the pickle in a zip: names and shapes, no numbers
_MOST_TENSORS, _DEEPEST = 10_000, 40
# Instructions of pickles that no file of arrays has.
_UNKNOWN_OPCODES = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "INST", "OBJ"}

STORAGES = {
    "FloatStorage": np.dtype("<f4"), "DoubleStorage": np.dtype("<f8"), "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"), "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"), "BoolStorage": np.dtype("?"),
}  # fmt: skip


def read_torch_file(path: Path | str) -> dict[str, np.ndarray]:
    """All tensors of a file in one of the forms above, by the names that lead to them joined by dots.

    Raises:
        CheckpointError: no such file, damaged, not of these forms, or a pickle that names a function which
            arrays do not need: it may be meant to run a program.
    """
    path = Path(path)
    check_regular(path, "weight file")
    try:
        with reading(path), path.open("rb") as file:
            start = file.read(len(STREAM_START))
            file.seek(0)
            if start.startswith(b"PK"):
                return _read_zip(file)
            # A map gives no more than the file has, whatever length a pickle claims; a file would try.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _read_stream(content) if start == STREAM_START else _read_pickle(content)
    except CheckpointError as error:
        if isinstance(error.__cause__, _Refused):
            raise CheckpointError(
                f"{path} is not read: its pickle asks for {error.__cause__}, which arrays do not need and "
                "which may run a program. Take the file from its own project, or a .safetensors file of the "
                "same weights"
            ) from error
        raise CheckpointError(f"{error}: it is damaged, or no file of weights") from error


class _Refused(Exception):
    """The name in a pickle that is not in the table."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A row of numbers in the file, by its key there."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class _TensorOf:
    """A tensor, whose numbers are read when the whole pickle is."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, numbers: np.ndarray) -> np.ndarray:
        """The tensor, given the numbers of its storage."""
        whole = all(isinstance(n, int) and n >= 0 for n in (self.offset, *self.shape, *self.strides))
        if not whole or len(self.shape) != len(self.strides) or len(self.shape) > 32:
            raise ValueError("a tensor without a proper shape")
        size = math.prod(self.shape)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if size > 0 and (last >= len(numbers) or size > len(numbers)):
            raise ValueError("a tensor larger than its storage")
        if size == 0:
            return np.zeros(self.shape, numbers.dtype)
        steps = [step * numbers.itemsize for step in self.strides]
        view = np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, steps, writeable=False)
        return np.array(view, order="C")


class _Module:
    """A module of TorchScript: its tensors and submodules by name."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("a module without attributes")
        self.attributes = state


class _PickledArray:
    """A NumPy array while its pickle is read: `numpy.ndarray` itself would trust the sizes it is given."""

    array: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.array = _from_bytes(content, dtype, shape, "F" if fortran else "C")


class _PickledType:
    """`numpy.dtype(code, ...)`, then its byte order."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(str(code))
        if self.dtype.hasobject or self.dtype.itemsize == 0 or self.dtype.fields:
            raise ValueError(f"an array of {code}")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">", "="):
            self.dtype = self.dtype.newbyteorder(state[1])


def _from_bytes(content: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    if not isinstance(dtype, _PickledType) or not isinstance(content, bytes | bytearray):
        raise ValueError("an array that is not of plain numbers")
    return np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(*_: Any) -> _PickledArray:
    return _PickledArray()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> np.ndarray:
    return _from_bytes(content, dtype, shape, order)


def _scalar(dtype: Any, content: Any) -> np.ndarray:
    return _from_bytes(content, dtype, ())


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in {encoding}")
    return text.encode("latin1")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _TensorOf:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without storage")
    return _TensorOf(storage, offset, tuple(shape), tuple(strides))


def _first(value: Any, *_: Any) -> Any:
    return value


_NUMPY = {
    "multiarray._reconstruct": _reconstruct,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _frombuffer,
}
BUILDERS: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _encode,
    "numpy.ndarray": None,  # only an argument of `_reconstruct`
    "numpy.dtype": _PickledType,
    **{f"numpy.{core}.{name}": build for core in ("core", "_core") for name, build in _NUMPY.items()},
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch.Size": tuple,
    "torch.jit._pickle.restore_type_tag": _first,
    **{f"torch.jit._pickle.build_{kind}list": _first for kind in ("int", "double", "bool", "tensor")},
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Builds what is in `BUILDERS`."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name in BUILDERS:
            return BUILDERS[name]
        if name.startswith("__torch__."):
            return _Module
        raise _Refused(shown(name))

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid[:5]
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(size, int):
            raise ValueError("a storage of an unknown kind")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("a storage that is a view of another")
        return _Storage(str(key), dtype, size)


def _load(file: io.BytesIO | mmap.mmap) -> Any:
    """What one pickle builds, after a look at its instructions.

    A number of a few digits in a pickle can make the unpickler fill the memory with an empty table.
    """
    start = file.tell()
    end_of_frame = 0
    for opcode, value, place in pickletools.genops(cast(Any, file)):
        if opcode.name == "FRAME":  # the unpickler would go on elsewhere than this look
            if (place or 0) < end_of_frame:
                raise ValueError("a frame within another in its pickle")
            end_of_frame = (place or 0) + 9 + int(value or 0)
        if opcode.name in _UNKNOWN_OPCODES:
            raise ValueError(f"the instruction {opcode.name} in its pickle")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(value or 0) > 100 * _MOST_TENSORS:
            raise ValueError("a table of unusual size in its pickle")
    file.seek(start)
    return _Unpickler(file).load()


def _read_zip(file: IO[bytes]) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("a zip file without data.pkl")
        folder = names[0].removesuffix("data.pkl")
        if archive.getinfo(names[0]).file_size > _LARGEST_PICKLE:
            raise ValueError("a data.pkl of unusual size")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("numbers with the high byte first")
        tree = _load(io.BytesIO(archive.read(names[0])))

        def numbers(storage: _Storage) -> np.ndarray:
            entry = archive.getinfo(f"{folder}data/{storage.key}")
            if entry.compress_type != zipfile.ZIP_STORED:  # PyTorch never packs them; a bomb would be packed
                raise ValueError("packed numbers")
            if entry.file_size < storage.size * storage.dtype.itemsize:
                raise ValueError("a storage that is cut off")
            return np.frombuffer(archive.read(entry), storage.dtype, storage.size)

        return _arrays(tree, numbers)


def _read_stream(file: mmap.mmap) -> dict[str, np.ndarray]:
    _load(file)  # the magic number
    _load(file)  # the version of the protocol
    system = _load(file)
    if not (isinstance(system, dict) and system.get("little_endian", False)):
        raise ValueError("numbers with the high byte first")
    tree, keys = _load(file), _load(file)
    wanted: dict[str, _Storage] = {}
    _collect(tree, lambda tensor: wanted.setdefault(tensor.storage.key, tensor.storage))
    stored = {}
    for key in map(str, keys):
        size = int.from_bytes(file.read(8), "little")
        if key not in wanted or size != wanted[key].size:
            raise ValueError("a storage of another size than its tensors")
        content = file.read(size * wanted[key].dtype.itemsize)
        stored[key] = np.frombuffer(content, wanted[key].dtype, size)
    return _arrays(tree, lambda storage: stored[storage.key])


def _read_pickle(file: mmap.mmap) -> dict[str, np.ndarray]:
    def no_storage(storage: _Storage) -> np.ndarray:
        raise ValueError("a tensor without storage")

    return _arrays(_load(file), no_storage)


def _arrays(tree: Any, numbers: Callable[[_Storage], np.ndarray]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in _leaves(tree).items():
        if isinstance(leaf, _TensorOf):
            arrays[name] = leaf.array(numbers(leaf.storage))
        elif isinstance(leaf, _PickledArray):
            arrays[name] = leaf.array
        elif isinstance(leaf, np.ndarray):
            arrays[name] = leaf
    if not arrays:
        raise ValueError("there are no tensors in it")
    if set(arrays) and all(name.startswith("state_dict.") for name in arrays):
        return {name.removeprefix("state_dict."): array for name, array in arrays.items()}
    return arrays


def _collect(tree: Any, use: Callable[[_TensorOf], Any]) -> None:
    for leaf in _leaves(tree).values():
        if isinstance(leaf, _TensorOf):
            use(leaf)


def _leaves(tree: Any) -> dict[str, Any]:
    """Everything in nested dictionaries and modules that is neither, by its path."""
    leaves: dict[str, Any] = {}
    waiting = [((), tree)]
    while waiting:
        path, value = waiting.pop()
        value = value.attributes if isinstance(value, _Module) else value
        if not isinstance(value, Mapping):
            leaves[".".join(path)] = value
        elif len(path) > _DEEPEST or len(leaves) + len(waiting) > _MOST_TENSORS:
            raise ValueError("nested too deeply")
        else:
            waiting += [((*path, str(name)), inner) for name, inner in reversed(list(value.items()))]
    return leaves
