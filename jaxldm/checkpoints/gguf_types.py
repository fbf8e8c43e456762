"""The types of GGUF whose numbers share scales, as llama.cpp lays them out (`ggml-quants.c`).

A row is cut into blocks, and a block into groups of 16 or 32 numbers: a number is scale x code, plus the
offset of its group where the type has offsets.

| type | numbers, bytes of a block | group | number |
|---|---|---|---|
| Q8_0 | 32, 34 | 32 | d q, q in 8 bits with a sign |
| Q4_0, Q5_0 | 32, 18 and 22 | 32 | d (q - 8), d (q - 16) |
| Q4_1, Q5_1 | 32, 20 and 24 | 32 | d q + m |
| Q4_K, Q5_K | 256, 144 and 176 | 32 | (d s) q - (e m), s and m in 6 bits |
| Q6_K | 256, 210 | 16 | (d s) (q - 32), s in 8 bits with a sign |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Blocks = np.ndarray  # uint8 [n, bytes]


class Scales(NamedTuple):
    """Of n blocks of so many groups.

    Attributes:
        scale: `[n, groups]`, float16 or float32.
        offset: likewise float32, or None.
    """

    scale: np.ndarray
    offset: np.ndarray | None = None


class Type(NamedTuple):
    """How a block is laid out.

    Attributes:
        number: in files.
        size: numbers of a block.
        num_bytes: of a block.
        group: numbers that share a scale.
        bits: 4 where codes are from -8 to 7, else 8.
        has_offsets: whether groups have offsets.
        codes: blocks -> int8 `[n, size]`.
        scales: blocks -> `Scales`.
    """

    number: int
    size: int
    num_bytes: int
    group: int
    bits: int
    has_offsets: bool
    codes: Callable[[Blocks], np.ndarray]
    scales: Callable[[Blocks], Scales]


def _halves(stored: np.ndarray) -> np.ndarray:
    """[n, k, b] bytes -> [n, 2 k, b]: the lower halves of each b bytes, then the upper ones."""
    return np.stack([stored & 15, stored >> 4], 2).reshape(len(stored), -1, stored.shape[-1])


def _float16(stored: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(stored).view("<f2")


def _nibbles(blocks: Blocks, first: int) -> np.ndarray:
    """Codes from 0 to 15 of a block of 32."""
    return _halves(blocks[:, None, first : first + 16]).reshape(len(blocks), -1)


def _five_bits(blocks: Blocks, first: int) -> np.ndarray:
    """Codes from 0 to 31 of a block of 32: the highest bits first, then the others."""
    high = np.unpackbits(blocks[:, first : first + 4], axis=1, bitorder="little")
    return _nibbles(blocks, first + 4) | (high << 4)


def _one_scale(blocks: Blocks) -> Scales:
    return Scales(_float16(blocks[:, :2]))


def _scale_and_least(center: int) -> Callable[[Blocks], Scales]:
    """d q + m, with codes q - center."""

    def scales(blocks: Blocks) -> Scales:
        d, m = _float16(blocks[:, :4]).astype(np.float32).T
        return Scales(d[:, None], (m + center * d)[:, None])

    return scales


def _six_bit_scales(center: int) -> Callable[[Blocks], Scales]:
    """Of Q4_K and Q5_K: eight scales s and eight m in 12 bytes; codes are q - center."""

    def scales(blocks: Blocks) -> Scales:
        d, e = _float16(blocks[:, :4]).astype(np.float32).T[..., None]
        low, middle, high = blocks[:, 4:16].reshape(-1, 3, 4).transpose(1, 0, 2)
        s = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
        m = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=1)
        scale = d * s
        return Scales(scale, center * scale - e * m)

    return scales


def _q4_k_codes(blocks: Blocks) -> np.ndarray:
    return _signed(_halves(blocks[:, 16:].reshape(-1, 4, 32)).reshape(len(blocks), -1), 8)


def _q5_k_codes(blocks: Blocks) -> np.ndarray:
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = _halves(blocks[:, 48:].reshape(-1, 4, 32)) | (high << 4)
    return _signed(codes.reshape(len(blocks), -1), 0)


def _q6_k_codes(blocks: Blocks) -> np.ndarray:
    low = _halves(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    return _signed((low | (high.reshape(-1, 8, 32) << 4)).reshape(len(blocks), -1), 32)


def _q6_k_scales(blocks: Blocks) -> Scales:
    d = _float16(blocks[:, 208:]).astype(np.float32)
    return Scales(d * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8))


def _signed(codes: np.ndarray, center: int) -> np.ndarray:
    return codes.astype(np.int8) - np.int8(center)


TYPES: dict[str, Type] = {
    "Q8_0": Type(8, 32, 34, 32, 8, False, lambda b: np.ascontiguousarray(b[:, 2:]).view(np.int8), _one_scale),
    "Q4_0": Type(2, 32, 18, 32, 4, False, lambda b: _signed(_nibbles(b, 2), 8), _one_scale),
    "Q4_1": Type(3, 32, 20, 32, 4, True, lambda b: _signed(_nibbles(b, 4), 8), _scale_and_least(8)),
    "Q5_0": Type(6, 32, 22, 32, 8, False, lambda b: _signed(_five_bits(b, 2), 16), _one_scale),
    "Q5_1": Type(7, 32, 24, 32, 8, True, lambda b: _signed(_five_bits(b, 4), 0), _scale_and_least(0)),
    "Q4_K": Type(12, 256, 144, 32, 4, True, _q4_k_codes, _six_bit_scales(8)),
    "Q5_K": Type(13, 256, 176, 32, 8, True, _q5_k_codes, _six_bit_scales(0)),
    "Q6_K": Type(14, 256, 210, 16, 8, False, _q6_k_codes, _q6_k_scales),
}
# The published types that are not read, by their numbers in files.
_OTHERS = {
    **{9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS"},
    **{19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32"},
    **{27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
NAMES = {one.number: name for name, one in TYPES.items()} | _OTHERS


def scale_dtype(name: str) -> Any:
    """Of a type's scales: float16 where the file has them, float32 where they are computed."""
    return np.float16 if TYPES[name].scales is _one_scale else np.float32
