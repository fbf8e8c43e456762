"""What a picture of a captioned shape has wrong, as findings and as sentences, and pictures that are wrong.

A finding is one attribute: what was asked for and what `jaxldm.metrics.shapes.read_shapes` saw. There are few
of them, so that the states of their sentences are a table, and a finding is its number in it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from jaxldm.data import shapes
from jaxldm.metrics.shapes import UNCLEAR

MOST = 3  # findings of a picture that are shown
NONE = 0  # the number of no finding
# (attribute, asked, seen) of each finding, from number 1 on. A picture without a clear shape has no size and
# no place either, and only the shape is a finding.
FINDINGS = tuple(
    (kind, asked, seen)
    for kind, words in shapes.KINDS.items()
    for asked in range(len(words))
    for seen in (*range(len(words)), *((UNCLEAR,) if kind in ("shape", "colour") else ()))
    if seen != asked
)
_NUMBERS = {finding: number for number, finding in enumerate(FINDINGS, start=NONE + 1)}


def sentence(kind: str, asked: int, seen: int) -> str:
    """A finding in words.

    >>> sentence("colour", 0, 2), sentence("shape", 3, -1)
    ('colour wrong: asked red, got blue', 'shape unclear: asked star')
    """
    words = shapes.KINDS[kind]
    if seen == UNCLEAR:
        return f"{kind} unclear: asked {words[asked]}"
    return f"{kind} wrong: asked {words[asked]}, got {words[seen]}"


def sentences() -> list[str]:
    """Those of all findings by their numbers; of no finding the empty one."""
    return ["", *(sentence(*finding) for finding in FINDINGS)]


def findings_of(found: shapes.Attributes, asked: shapes.Attributes) -> Int[np.ndarray, "N MOST"]:
    """The numbers of the first findings of each picture, shape first; `NONE` where there are fewer."""
    numbers = np.full((len(found.shape), MOST), NONE, np.int32)
    for row, (seen, wanted) in enumerate(
        zip(zip(*found, strict=True), zip(*asked, strict=True), strict=True)
    ):
        triples = zip(shapes.KINDS, map(int, wanted), map(int, seen), strict=True)
        own = [_NUMBERS[triple] for triple in triples if triple in _NUMBERS][:MOST]
        numbers[row, : len(own)] = own
    return numbers


def right_attributes(found: shapes.Attributes, asked: shapes.Attributes) -> Int[np.ndarray, "N"]:
    """How many attributes of each picture are as asked, 0 to 5."""
    return np.sum([np.equal(a, b) for a, b in zip(found, asked, strict=True)], axis=0).astype(np.int32)


def made_wrong(random: np.random.Generator, asked: shapes.Attributes) -> shapes.Attributes:
    """The attributes with one or two of them, drawn at random, replaced by others."""
    values = np.stack(asked, axis=1)
    sizes = np.array([len(words) for words in shapes.KINDS.values()])
    kinds = random.permuted(np.tile(np.arange(len(sizes)), (len(values), 1)), axis=1)[:, :2]
    both = random.random(len(values)) < 0.5
    for place, some in ((0, np.ones_like(both)), (1, both)):
        rows = np.flatnonzero(some)
        kind = kinds[rows, place]
        step = 1 + (random.random(len(rows)) * (sizes[kind] - 1)).astype(int)
        values[rows, kind] = (values[rows, kind] + step) % sizes[kind]
    return shapes.Attributes(*values.T.astype(np.int32))
