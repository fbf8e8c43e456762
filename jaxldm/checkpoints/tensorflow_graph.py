"""The constants of a frozen TensorFlow graph (`GraphDef`, a .pb file), without TensorFlow.

A message of protocol buffers is a row of fields, each a number with the kind of its content: a whole number
(0), eight bytes (1), bytes with their length in front (2) or four bytes (5). Four messages of
tensorflow/core/framework are needed here: graph.proto, node_def.proto, attr_value.proto, tensor.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxldm.errors import CheckpointError
from jaxldm.reading import check_regular, reading

_DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 3: np.dtype("<i4"), 9: np.dtype("<i8")}


class _Damage(ValueError):
    """What is wrong with the bytes."""


def read_tensorflow_graph(path: Path | str) -> dict[str, np.ndarray]:
    """The constants of numbers in a frozen graph, by the names of their nodes.

    Raises:
        CheckpointError: no such file, damaged, or not a graph with constants.
    """
    path = Path(path)
    check_regular(path, "weight file")
    try:
        with reading(path):
            constants = dict(_constants(memoryview(path.read_bytes())))
    except CheckpointError as error:
        raise CheckpointError(f"{error}: it is damaged, or no frozen TensorFlow graph") from error
    if not constants:
        raise CheckpointError(
            f"{path} has no constants: it is not a frozen TensorFlow graph with its weights"
        )
    return constants


def _constants(graph: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    for number, node in _fields(graph):
        if number != 1:  # GraphDef.node
            continue
        name, kind, tensor = "", "", None
        for field, value in _fields(_message(node)):
            if field == 1:
                name = bytes(_message(value)).decode()
            elif field == 2:
                kind = bytes(_message(value)).decode()
            elif field == 5:  # NodeDef.attr: an entry of a map, key 1 and value 2
                entry = dict(_fields(_message(value)))
                if bytes(_message(entry.get(1, b""))) == b"value":
                    tensor = dict(_fields(_message(entry.get(2, b"")))).get(8)  # AttrValue.tensor
        if kind == "Const" and tensor is not None:
            array = _tensor(_message(tensor))
            if array is not None:
                yield name, array


def _tensor(message: memoryview) -> np.ndarray | None:
    """A TensorProto as an array; None for types that are no numbers."""
    kind, shape, content, floats = 0, [], None, []
    for field, value in _fields(message):
        if field == 1:
            kind = value
        elif field == 2:  # TensorShapeProto.dim, Dim.size
            dims = [dict(_fields(_message(dim))) for number, dim in _fields(_message(value)) if number == 2]
            shape = [dim.get(1, 0) for dim in dims]
        elif field == 4:
            content = _message(value)
        elif field == 5:  # float_val, packed or one by one
            floats.append(value)
    if kind not in _DTYPES or (content is None and not floats):
        return None
    if content is None:  # one number stands for all that follow
        given = np.concatenate([np.frombuffer(value, "<f4") for value in floats])
        size = math.prod(shape)
        if size > 2**20 or len(given) > size:
            raise _Damage("a constant of another size than its shape")
        return np.concatenate([given, np.repeat(given[-1:], size - len(given))]).reshape(shape)
    return np.frombuffer(content, _DTYPES[kind]).reshape(shape)


def _message(value: Any) -> memoryview:
    if isinstance(value, int):
        raise _Damage("a number where a message should be")
    return memoryview(value)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """The fields of a message: (number, whole number or bytes)."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        if kind == 2:
            length, place = _varint(message, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise _Damage(f"a field of kind {kind}")
        if place + length > len(message):
            raise _Damage("cut off")
        yield key >> 3, message[place : place + length]
        place += length


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """A whole number in groups of seven bits, the lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise _Damage("cut off")
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise _Damage("a number of more than ten bytes")
