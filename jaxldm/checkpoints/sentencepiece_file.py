"""The vocabulary in a `spiece.model` of T5: a protocol buffer, read without the protobuf library.

A protocol buffer message is a sequence of fields, each a key and a value. The key holds the field's number
and the type of its value: 0 is a number of variable length, 1 eight bytes, 2 a length and that many bytes, 5
four bytes. The numbers below are those of sentencepiece's `sentencepiece_model.proto`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxldm.errors import CheckpointError
from jaxldm.reading import reason

_MODEL_PIECE, _MODEL_TRAINER, _MODEL_NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_TRAINER_KIND, _NORMALIZER_CHARSMAP = 3, 2
_UNKNOWN, _CONTROL = 2, 3  # kinds of piece
_UNIGRAM = 1  # the type of trainer; 2 is byte pairs


class SentencePieces(NamedTuple):
    """The content of a `spiece.model`.

    Attributes:
        pieces: (text, log probability); the index is the token.
        unknown: the token for text that the pieces do not cover.
        control: the tokens that no text is split into: padding, end of text.
        charsmap: the compiled rules of normalisation (compatibility forms and kinds of space), or empty.
    """

    pieces: list[tuple[str, float]]
    unknown: int
    control: tuple[int, ...]
    charsmap: bytes


def read_sentencepieces(data: bytes) -> SentencePieces:
    """Reads the unigram vocabulary of a `spiece.model`. Kudo & Richardson 2018.

    Raises:
        CheckpointError: no such model, an incomplete one, another type than unigram, or no unknown piece.
    """
    pieces, kinds, trainer, charsmap = [], [], _UNIGRAM, b""
    try:
        for number, value in _fields(data):
            if number == _MODEL_PIECE:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(_PIECE_SCORE, bytes(4)))[0]
                if not math.isfinite(score):
                    raise ValueError(f"the score of a piece is {score}")
                pieces.append((piece[_PIECE_TEXT].decode(), score))
                kinds.append(piece.get(_PIECE_KIND, 1))
            elif number == _MODEL_TRAINER:
                trainer = dict(_fields(value)).get(_TRAINER_KIND, _UNIGRAM)
            elif number == _MODEL_NORMALIZER:
                charsmap = dict(_fields(value)).get(_NORMALIZER_CHARSMAP, b"")
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"not a sentencepiece model, or cut off: {reason(error)}") from error
    if not isinstance(charsmap, bytes):
        raise CheckpointError("a sentencepiece model with rules of normalisation that are no bytes")
    if trainer != _UNIGRAM:
        raise CheckpointError("a sentencepiece model of another type than T5's: only unigram is supported")
    if _UNKNOWN not in kinds:
        raise CheckpointError("a sentencepiece model without an unknown piece")
    control = tuple(token for token, kind in enumerate(kinds) if kind == _CONTROL)
    return SentencePieces(pieces, kinds.index(_UNKNOWN), control, charsmap)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field, in order; a field may be repeated. Values are int or bytes."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        if key & 7 == 0:
            value, at = _number(message, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            length, at = _number(message, at)
        elif key & 7 in (1, 5):
            length = 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"a field of unknown type {key & 7} at byte {at}")
        if at + length > len(message):
            raise ValueError(f"the field at byte {at} promises {length} bytes, {len(message) - at} are left")
        yield key >> 3, message[at : at + length]
        at += length


def _number(message: bytes, at: int) -> tuple[int, int]:
    """(number, position after it): seven bits a byte, lowest first, the top bit set in all but the last."""
    value = shift = 0
    while True:
        byte = message[at]
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
