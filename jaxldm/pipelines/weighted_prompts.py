"""Prompts of any length, in chunks, and with weights, as people write them for A1111's web UI.

    pipe(key, "a (red:1.3) fox, [[snow]]", prompt_syntax="weights")

| written | weight of the words |
|---|---|
| `(fox)` | times 1.1; `((fox))` times 1.21 |
| `[fox]` | divided by 1.1 |
| `(fox:1.3)` | times 1.3 |
| `\\(fox\\)` | the brackets themselves |
| `BREAK` | the next word begins a chunk |

A chunk is the start of the text, 75 tokens and the end of the text, as the encoder was trained on; it ends at
a comma where there is one among its last 20 tokens. The states of all chunks stand one behind the other. The
states of a weighted token are multiplied by its weight, and all states of its chunk then scaled so that their
mean is what it was. The pooled state is that of the first chunk.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxldm.arguments import checked, text
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import Encoded, encode_ids, encode_texts

SYNTAXES = ("plain", "chunks", "weights")
STRONGER = 1.1
COMMA_WITHIN = 20  # tokens before the end of a chunk in which a comma is looked for
_PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<word>[^\\()\[\]:]+|[\\:])"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Piece(NamedTuple):
    """A part of a prompt and its weight; `text` None is a break between chunks."""

    text: str | None
    weight: float = 1.0


class Chunk(NamedTuple):
    """A row of tokens as the encoder takes it, and their weights."""

    ids: Int[np.ndarray, " T"]
    weights: Float[np.ndarray, " T"]


@checked(prompt=text)
def read_weights(prompt: str) -> list[Piece]:
    """A prompt as parts of one weight each.

    Brackets that are not closed count up to the end, and those that were not opened are text.

    >>> [tuple(piece) for piece in read_weights("a (red:1.5) [fox]")]
    [('a ', 1.0), ('red', 1.5), (' ', 1.0), ('fox', 0.9090909090909091)]
    """
    pieces: list[Piece] = []
    opened: list[tuple[str, int]] = []

    def close(bracket: str, factor: float, literal: str) -> None:
        """Weigh what stands behind the last open bracket of that kind."""
        places = [place for place, (kind, _) in enumerate(opened) if kind == bracket]
        if not places:
            pieces.append(Piece(literal))
            return
        first = opened.pop(places[-1])[1]
        pieces[first:] = [piece._replace(weight=piece.weight * factor) for piece in pieces[first:]]

    for match in _PIECE.finditer(prompt):
        if match["bracket"] in ("(", "["):
            opened.append((match["bracket"], len(pieces)))
        elif match["bracket"] == ")":
            close("(", STRONGER, ")")
        elif match["bracket"] == "]":
            close("[", 1 / STRONGER, "]")
        elif match["weight"] is not None:
            close("(", float(match["weight"]), match[0])
        else:
            parts = [match["escaped"]] if match["escaped"] else _BREAK.split(match["word"])
            pieces += [piece for part in parts for piece in (Piece(None), Piece(part))][1:]
    for bracket, first in opened:
        factor = STRONGER if bracket == "(" else 1 / STRONGER
        pieces[first:] = [piece._replace(weight=piece.weight * factor) for piece in pieces[first:]]
    return _joined(pieces)


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces, those of one weight next to each other as one."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else Piece(None)
        if piece.text is not None and last.text is not None and last.weight == piece.weight:
            joined[-1] = last._replace(text=last.text + piece.text)
        else:
            joined.append(piece)
    return joined or [Piece("")]


def read_chunks(tokenizer: Any, prompt: str, syntax: str, length: int | None = None) -> list[Chunk]:
    """A prompt as rows of tokens, at least one.

    Args:
        tokenizer: of CLIP, from `checkpoints.load_tokenizer`.
        prompt: a text.
        syntax: "chunks" or "weights", see `SYNTAXES`.
        length: tokens of a row, the two at its ends among them; None: the tokenizer's.
    """
    length = cast(int, tokenizer.max_length) if length is None else length
    start, end = tokenizer.ends
    room, comma = length - 2, tokenizer.ids_of(",")[-1]
    rows: list[list[tuple[int, float]]] = [[]]
    last_comma = -1
    for part in [Piece(prompt)] if syntax == "chunks" else read_weights(prompt):
        if part.text is None:
            rows.append([])
            last_comma = -1
            continue
        for token in tokenizer.ids_of(part.text):
            row, moved = rows[-1], []
            if len(row) == room:
                if token != comma and 0 <= room - last_comma <= COMMA_WITHIN and last_comma >= 0:
                    row[last_comma + 1 :], moved = [], row[last_comma + 1 :]
                rows.append(moved)
                last_comma = -1
            if token == comma:
                last_comma = len(rows[-1])
            rows[-1].append((token, part.weight))
    if len(rows) > 1 and not rows[-1]:
        rows.pop()
    return [_chunk(row, length, start, end, tokenizer.pad_token_id) for row in rows]


def _chunk(row: Sequence[tuple[int, float]], length: int, start: int, end: int, pad: int) -> Chunk:
    ids, weights = np.full(length, pad, np.int32), np.ones(length, np.float32)
    ids[: len(row) + 2] = [start, *(token for token, _ in row), end]
    weights[1 : len(row) + 1] = [weight for _, weight in row]
    return Chunk(ids, weights)


def text_encoding(
    syntax: str, texts: Iterable[tuple[Network | None, Any, Sequence[str]]]
) -> Callable[..., Encoded]:
    """The function that a family's `encode` calls in place of `encode_texts`.

    Args:
        syntax: one of `SYNTAXES`; "plain" is `encode_texts` itself.
        texts: (encoder, tokenizer, texts) of everything that the call encodes: all get as many chunks as the
            longest, so that branches and encoders go together.
    """
    if syntax == "plain":
        return encode_texts
    count = max(
        len(read_chunks(tokenizer, prompt, syntax, _length(encoder, tokenizer)))
        for encoder, tokenizer, prompts in texts
        if encoder is not None
        for prompt in prompts
    )
    return functools.partial(_encode_chunks, syntax=syntax, count=count)


def _length(encoder: Network, tokenizer: Any) -> int:
    """Tokens of a row: as many as the tokenizer makes, and the encoder has places for."""
    return min(tokenizer.max_length, getattr(encoder.config, "max_position_embeddings", tokenizer.max_length))


def _encode_chunks(
    encoder: Network,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    syntax: str,
    count: int,
    skip: int = 0,
    final_norm: bool = True,
    warn: bool = True,
) -> Encoded:
    """As `encode_texts`, `count` chunks of each text; nothing is cut, so there is nothing to warn of."""
    del warn
    length, known = _length(encoder, tokenizer), {}
    empty = read_chunks(tokenizer, "", syntax, length)
    for prompt in dict.fromkeys(texts):
        chunks = read_chunks(tokenizer, prompt, syntax, length)
        rows = [
            _encode_chunk(encoder, chunk, skip, final_norm)
            for chunk in chunks + empty * (count - len(chunks))
        ]
        known[prompt] = Encoded(np.concatenate([row.hidden for row in rows], axis=1), rows[0].pooled)
    return jax.tree.map(lambda *rows: np.concatenate(rows), *(known[prompt] for prompt in texts))


def _encode_chunk(encoder: Network, chunk: Chunk, skip: int, final_norm: bool) -> Encoded:
    """The weighted states of one row, which keep their mean."""
    encoded = jax.tree.map(np.asarray, encode_ids(encoder, chunk.ids[None], None, skip, final_norm))
    if (chunk.weights == 1).all():
        return encoded
    weighted = encoded.hidden * chunk.weights[:, None]
    before, after = encoded.hidden.mean(dtype=np.float64), weighted.mean(dtype=np.float64)
    return encoded._replace(hidden=weighted * np.float32(before / after if after else 1.0))
