"""A dataset: named splits of labelled images, in memory or read from disk by index."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxldm.data.batches import Rows
from jaxldm.data.example import Skipped
from jaxldm.data.images import check_labels, from_uint8
from jaxldm.errors import DataError, one_of

SPLITS = ("train", "validation", "test")
MAX_BYTES_IN_MEMORY = 16 * 2**30


@dataclasses.dataclass(frozen=True)
class RecordRows:
    """Records with random access, as columns `image` float32 [B, H, W, C] in [-1, 1] and `label` int32 [B].

    Attributes:
        source: records with `__getitems__`, as `tfds.data_source` returns them; images uint8 [h, w, C].
        records: the record number of each row.
        image_key, label_key: the names of the two features; `label_key` None gives every image label 0.
        image_size: side to which the central square of each image is scaled, or None.
        where: the folder, for error messages.
        pad_to: side of the black square in whose centre each image is placed, or None.
        caption_key: the name of the feature that describes an image in words, or None.
        fix: what to do where the files are damaged, for error messages.
    """

    source: Any
    records: Int[np.ndarray, "N"]
    image_key: str
    label_key: str | None
    image_size: int | None
    where: str
    pad_to: int | None = None
    caption_key: str | None = None
    fix: str = "delete it and run again"

    def __len__(self) -> int:
        return len(self.records)

    def _read(self, rows: Int[np.ndarray, "B"]) -> Any:
        try:
            return self.source.__getitems__(self.records[rows].tolist())
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise DataError(f"cannot read {self.where} ({error}): {self.fix}") from error

    def captions(self, rows: Int[np.ndarray, "B"]) -> list[str] | None:
        """The captions of the examples `rows`; None for a dataset without."""
        if self.caption_key is None:
            return None
        texts = [example[self.caption_key] for example in self._read(rows)]
        return [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in texts]

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, np.ndarray]:
        examples = self._read(rows)
        images = [example[self.image_key] for example in examples]
        if self.image_size is not None:
            images = [central_square(image, self.image_size) for image in images]
        if self.pad_to is not None:
            images = [padded_square(image, self.pad_to) for image in images]
        labels = [0 if self.label_key is None else example[self.label_key] for example in examples]
        return {"image": from_uint8(np.stack(images)), "label": np.asarray(labels, dtype=np.int32)}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labelled images in the splits train, validation and test.

    Attributes:
        name: as given to `load`.
        image_shape: (H, W, C).
        class_names: one name per class.
        parts: the rows of each split.
        skipped: what a folder of pictures holds that cannot be used, as (name, reason).
        license: whose pictures they are and on what terms, to be named wherever one is shown; "" if unknown.
    """

    name: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    parts: Mapping[str, Rows]
    skipped: tuple[Skipped, ...] = ()
    license: str = ""

    @property
    def num_classes(self) -> int:
        """The number of classes; labels are in [0, num_classes)."""
        return len(self.class_names)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.parts)

    def rows(self, split: str) -> Rows:
        """Returns the rows of a split, from which `Batches` read from disk. Raises `UnknownNameError`."""
        return self.parts[one_of(f"split of {self.name}", split, self.parts)]

    def captions(self, split: str, limit: int | None = None) -> list[str] | None:
        """The captions of the first `limit` examples of a split (None: of all); None for data without.

        Raises `UnknownNameError` for another split name.
        """
        rows = self.rows(split)
        read = getattr(rows, "captions", None)
        return None if read is None else read(np.arange(len(rows))[:limit])

    def arrays(
        self, split: str, limit: int | None = None
    ) -> tuple[Float[np.ndarray, "N H W C"], Int[np.ndarray, "N"]]:
        """Returns the first `limit` examples of a split (None: all of them) in memory: images float32
        [N, H, W, C] in [-1, 1] and labels int32 [N].

        Raises `UnknownNameError` for another split name, `DataError` if they need more than 16 GiB or have a
        label that is none of the classes.
        """
        rows = self.rows(split)
        numbers = np.arange(len(rows))[:limit]
        size = 4 * len(numbers) * int(np.prod(self.image_shape))
        if size > MAX_BYTES_IN_MEMORY:
            raise DataError(
                f"{self.name} {split} needs {size / 2**30:.0f} GiB of memory: give Batches "
                f"dataset.rows({split!r}) instead of arrays"
            )
        columns = rows.take(numbers)
        name = f"the labels of {self.name} {split}"
        return columns["image"], check_labels(columns["label"], len(numbers), self.num_classes, name)


def central_square(image: UInt8[np.ndarray, "h w C"], size: int) -> UInt8[np.ndarray, "{size} {size} C"]:
    """Returns the central square of `image` uint8 [h, w, C], scaled to [size, size, C]."""
    from PIL import Image

    height, width, channels = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    if side == size:
        return square
    picture = Image.fromarray(square[..., 0] if channels == 1 else square)
    resampling = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    return np.asarray(picture.resize((size, size), resampling)).reshape(size, size, channels)


def padded_square(image: UInt8[np.ndarray, "h w C"], size: int) -> UInt8[np.ndarray, "{size} {size} C"]:
    """Returns `image` uint8 [h, w, C] in the centre of a black square [size, size, C]."""
    height, width, _ = image.shape
    top, left = (size - height) // 2, (size - width) // 2
    return np.pad(image, ((top, size - height - top), (left, size - width - left), (0, 0)))
