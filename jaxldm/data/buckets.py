"""Aspect-ratio buckets: pictures of any size in a bounded number of sizes with one number of tokens.

Every picture goes into the bucket whose ratio of sides is nearest to its own, is scaled until it covers it,
and loses what sticks out at two opposite sides. A batch is of one bucket. What does not fill a batch at the
end of an epoch is carried over into the first batch of that bucket in the next one, so that each example is
seen once an epoch and no batch has a shape of its own. Sources: Podell et al. 2023 (SDXL), section 2.3;
NovelAI 2022.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray, Shaped, UInt8

from jaxldm.arguments import (
    array,
    check_fields,
    checked,
    count,
    instance,
    number,
    one_key,
    optional,
    pair,
    several,
)
from jaxldm.data.batches import Rows
from jaxldm.errors import DataError, InvalidArgumentError

Size = tuple[int, int]  # (height, width)
MOST_BUCKETS = 64


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Which sizes pictures are brought to.

    Attributes:
        image_size: side of the square one.
        multiple: each side is a multiple of it: the pixels of a token, for example 8 for an autoencoder that
            halves three times, 16 with patches of 2 on top.
        max_aspect: largest ratio of the longer side to the shorter one.
        slack: the share by which a size may have fewer tokens than the square one; 0: exactly as many.
    """

    image_size: int
    multiple: int
    max_aspect: float = 2.0
    slack: float = 0.0

    def __post_init__(self):
        check_fields(
            self,
            image_size=count(1, 2**16),
            multiple=count(1, 2**12),
            max_aspect=number(1, 64),
            slack=number(0, 0.5),
        )
        if self.image_size % self.multiple:
            raise InvalidArgumentError(
                f"image_size must be a multiple of {self.multiple} (the pixels of a token), got "
                f"{self.image_size}"
            )
        if len(self.sizes) > MOST_BUCKETS:
            raise InvalidArgumentError(
                f"{len(self.sizes)} sizes are more than {MOST_BUCKETS}, each of which is compiled: give a "
                "smaller max_aspect or slack, or a larger multiple"
            )

    @property
    def tokens(self) -> int:
        """Of the square size."""
        return (self.image_size // self.multiple) ** 2

    @functools.cached_property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) of each bucket, from the tallest to the widest.

        For each height the widest that has no more tokens than the square.

        >>> Buckets(96, 8).sizes
        ((128, 72), (96, 96), (72, 128))
        """
        found = []
        for rows in range(1, self.tokens + 1):
            columns = self.tokens // rows
            enough = rows * columns >= (1 - self.slack) * self.tokens - 1e-9
            if enough and max(rows, columns) <= self.max_aspect * min(rows, columns) + 1e-9:
                found.append((rows * self.multiple, columns * self.multiple))
        widest = {
            width: size for size in found for width in [size[1]]
        }  # of several heights the last: the tallest
        return tuple(sorted(set(widest.values()), key=lambda size: size[1] / size[0]))


A_BUCKETS = instance(Buckets, "data.Buckets(image_size, multiple)")


@checked(sizes=several(pair(1), "a list of (height, width)"), buckets=A_BUCKETS)
def assign_buckets(sizes: Sequence[Size], buckets: Buckets) -> Int[np.ndarray, "N"]:
    """The bucket of each picture: that whose ratio of sides is nearest, by the logarithm.

    >>> assign_buckets([(500, 500), (1000, 600), (300, 400)], Buckets(96, 8))
    array([1, 0, 1], dtype=int32)
    """
    if not len(sizes):
        return np.zeros(0, np.int32)
    own = np.log([width / height for height, width in sizes])
    ratios = np.log([width / height for height, width in buckets.sizes])
    return np.abs(own[:, None] - ratios).argmin(1).astype(np.int32)


@checked(image=array("whole", "[h, w, C]", axes=3), size=pair(1))
def cover(image: UInt8[np.ndarray, "h w C"], size: Size) -> UInt8[np.ndarray, "H W C"]:
    """Returns the centre of `image` uint8 [h, w, C], scaled until it covers `size` and cut to it."""
    from PIL import Image

    height, width, channels = image.shape
    scale = max(size[0] / height, size[1] / width)
    # The part of the picture that stays, in its own pixels.
    tall, wide = size[0] / scale, size[1] / scale
    top, left = (height - tall) / 2, (width - wide) / 2
    if (height, width) == tuple(size):
        return image
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    resampling = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    box = (max(left, 0.0), max(top, 0.0), min(left + wide, width), min(top + tall, height))
    resized = picture.resize((size[1], size[0]), resampling, box=box)
    return np.asarray(resized).reshape(*size, channels)


def buckets_of(rows: Any) -> Int[np.ndarray, "N"] | None:
    """The bucket of each example of `rows`, or of the rows that it is a view of; None without buckets."""
    own, inner = getattr(rows, "bucket_of", None), getattr(rows, "rows", getattr(rows, "first", None))
    if own is not None or inner is None:
        return own
    found, numbers = buckets_of(inner), getattr(rows, "numbers", None)
    if found is None:
        return None
    return found[: len(rows)] if numbers is None else found[numbers]


@dataclasses.dataclass(frozen=True)
class JoinedBuckets:
    """The rows of each bucket, which have one shape, as the rows of all.

    Attributes:
        parts: of the buckets that have examples, in order.
        bucket_of: the bucket of each example.
    """

    parts: tuple[Rows, ...]
    bucket_of: Int[np.ndarray, "N"]

    @functools.cached_property
    def _places(self) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """The part of each example, and its place in it."""
        _, part = np.unique(self.bucket_of, return_inverse=True)
        place = np.zeros(len(part), np.int64)
        for own in range(len(self.parts)):
            place[part == own] = np.arange((part == own).sum())
        return part, place

    def __len__(self) -> int:
        return len(self.bucket_of)

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        """Rows of one bucket. Raises `DataError` for others."""
        part, place = self._places
        return self.parts[only_bucket(part[rows])].take(place[rows])


def only_bucket(buckets: Int[np.ndarray, "B"]) -> int:
    """The bucket that all are of. Raises `DataError`."""
    different = np.unique(buckets)
    if len(different) != 1:
        raise DataError(f"rows of {len(different)} buckets have no one shape: take those of one bucket")
    return int(different[0])


class Place(NamedTuple):
    """Where a step is: the epoch, the bucket of its batch, and which batch of that bucket it is, from 0."""

    epoch: int
    bucket: int
    batch: int


class BucketedBatches:
    """Batches of one bucket each: `batches[step]` for any step >= 0, a pure function of the key and the step.

    Bucket b with n_b examples has an endless stream: its examples in a new order for each epoch, one epoch
    after the other. Batch k of the bucket is the stream's part [k B, (k + 1) B). Epoch e has those batches
    that end in it, of bucket b the numbers floor(e n_b / B) to floor((e + 1) n_b / B) - 1, in an order drawn
    for the epoch; so the rest of a bucket is carried over.

    `len(batches)` is the mean number of steps of an epoch, N // B.

    Args:
        rows: examples, of which those of one bucket have one shape.
        bucket_of: the bucket of each example [N].
        batch_size: examples in a batch, B.
        key: a JAX key.
        part: the places in a batch to read, and no others, as of `Batches`.

    Raises:
        InvalidArgumentError: `batch_size` is more than there are examples.
    """

    @checked(
        rows=instance(Rows, "the rows of a split"),
        bucket_of=array("whole", "[N]", axes=1),
        batch_size=count(1),
        key=one_key,
        part=optional(instance(slice, "a slice of the places in a batch")),
    )
    def __init__(
        self,
        rows: Rows,
        bucket_of: Int[np.ndarray, "N"],
        batch_size: int,
        key: PRNGKeyArray,
        *,
        part: slice | None = None,
    ):
        if not 1 <= batch_size <= len(rows):
            raise InvalidArgumentError(
                f"batch_size must be between 1 and the number of examples, {len(rows)}, got {batch_size}"
            )
        if len(bucket_of) != len(rows):
            raise InvalidArgumentError(
                f"bucket_of must have one bucket for each of the {len(rows)} examples, got {len(bucket_of)}"
            )
        self.rows, self.batch_size, self.key = rows, batch_size, key
        self.part = slice(None) if part is None else part
        self._members = [np.flatnonzero(bucket_of == bucket) for bucket in np.unique(bucket_of)]
        self._sizes = np.array([len(members) for members in self._members], np.int64)
        self._epoch: tuple[int, Any] = (-1, None)  # the last one's order: read and set at once
        self._streams: dict[tuple[int, int], Int[np.ndarray, "n"]] = {}

    def __len__(self) -> int:
        return max(1, len(self.rows) // self.batch_size)

    @property
    def num_buckets(self) -> int:
        """Buckets that have examples: so many shapes occur."""
        return len(self._members)

    def _finished(self, epochs: int) -> Int[np.ndarray, "buckets"]:
        """The number of batches of each bucket that end in the first so many epochs."""
        return epochs * self._sizes // self.batch_size

    def place(self, step: int) -> Place:
        """Where a step is."""
        low, high = 0, step * self.batch_size + self.batch_size * len(self._sizes) + 1
        while low < high - 1:  # the last epoch that begins at `step` or before
            middle = (low + high) // 2
            low, high = (middle, high) if self._finished(middle).sum() <= step else (low, middle)
        first, last = self._finished(low), self._finished(low + 1)
        kept_epoch, order = self._epoch
        if kept_epoch != low:
            key = jax.random.fold_in(jax.random.fold_in(self.key, low), 2**31)
            order = np.asarray(jax.random.permutation(key, int((last - first).sum())))
            self._epoch = low, order
        number = int(order[step - first.sum()])
        ends = np.cumsum(last - first)
        bucket = int(np.searchsorted(ends, number, side="right"))
        return Place(low, bucket, int(first[bucket] + number - (ends[bucket] - (last - first)[bucket])))

    def _order(self, bucket: int, epoch: int) -> Int[np.ndarray, "n"]:
        """The examples of a bucket in the order of an epoch."""
        order = self._streams.get((bucket, epoch))
        if order is None:
            key = jax.random.fold_in(jax.random.fold_in(self.key, epoch), bucket)
            members = self._members[bucket]
            order = members[np.asarray(jax.random.permutation(key, len(members)))]
            if len(self._streams) > 2 * len(self._members):
                self._streams = {}  # a new one: threads of `Reader` share them
            self._streams[bucket, epoch] = order
        return order

    def row_numbers(self, step: int) -> Int[np.ndarray, "B"]:
        """The examples of batch `step`."""
        _, bucket, batch = self.place(step)
        size = int(self._sizes[bucket])
        wanted = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)[self.part]
        epochs, places = np.divmod(wanted, size)
        return np.concatenate(
            [self._order(bucket, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        )

    @checked(step=count())
    def __getitem__(self, step: int) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        return self.rows.take(self.row_numbers(step))

    def __iter__(self) -> Iterator[dict[str, Shaped[np.ndarray, "B ..."]]]:
        """Yields the first `len(batches)` batches."""
        return (self[step] for step in range(len(self)))
