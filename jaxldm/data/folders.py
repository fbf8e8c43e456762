"""A person's own pictures as a dataset: class folders, pictures with captions, parquet files, tar shards.

    pictures/cats/1.jpg, pictures/dogs/2.png        a class for each subfolder
    pictures/1.jpg, pictures/1.txt                  a caption next to each picture
    pictures/1.jpg, pictures/metadata.jsonl         {"file_name": "1.jpg", "text": "a cat"} in each line
    pictures/*.parquet                              columns image and text (or caption) and label
    ..., "conditioning_image": "edges/1.png"}       an entry of a line or a column: what a ControlNet sees
    pictures/*.tar                                  shards of webdataset: 1.jpg with 1.txt, 1.json or 1.cls

Every picture is decoded once when the folder is opened; what cannot be used is listed, and the others are
read from disk again, batch by batch. A file of several frames or pages cannot be used: which one is meant
is not known.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxldm.arguments import a_path, checked, count, flag, instance, number, optional, several
from jaxldm.data.buckets import A_BUCKETS, Buckets, assign_buckets, cover, only_bucket
from jaxldm.data.dataset import Dataset, central_square, padded_square
from jaxldm.data.example import Example, Skipped
from jaxldm.data.images import from_uint8, to_uint8
from jaxldm.data.layouts import SPLIT_NAMES, SUFFIXES, examples_in
from jaxldm.data.pictures import decode_picture, rgb_of
from jaxldm.data.splits import split_records
from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.files import expanded
from jaxldm.reading import shortened

MOST_SKIPPED = 0.1  # share of the pictures; with more the folder is refused
FEWEST = 10  # pictures: each tenth is for validation and for testing
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class FolderRows:
    """Pictures on disk, decoded by batch: `image` float32 [B, H, W, 3] in [-1, 1] and `label` int32 [B].

    Attributes:
        examples: where they are.
        labels: the class of each.
        image_size: side to which the central square of each is scaled.
        pad_to: side of the black square in whose centre it is placed, or None.
        sizes: (height, width) of buckets instead of squares; then `take` is for rows of one bucket.
        bucket_of: the bucket of each.
        originals: (height, width) of each as it is on disk.
    """

    examples: tuple[Example, ...]
    labels: Int[np.ndarray, "N"]
    image_size: int
    pad_to: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    bucket_of: Int[np.ndarray, "N"] | None = None
    originals: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def captions(self, rows: Int[np.ndarray, "B"]) -> list[str] | None:
        """The captions of the pictures `rows`; None where they have none."""
        texts = [self.examples[row].caption for row in rows]
        return None if None in texts else [str(text) for text in texts]

    def sizes_and_crops(self) -> Int[np.ndarray, "N 6"]:
        """Of each picture (height, width) on disk, (top, left) where it is cut, scaled, and its new size.

        What SDXL is conditioned on (Podell et al. 2023, section 2.2).
        """
        original = np.array(self.originals, np.int32).reshape(-1, 2)
        if self.bucket_of is not None:
            target = np.array(self.sizes, np.int32)[self.bucket_of]
        else:
            target = np.full_like(original, self.image_size)
        scale = (target / original).max(1, keepdims=True)
        crop = np.rint((original * scale - target) / 2).astype(np.int32)
        padded = target if self.pad_to is None else np.full_like(target, self.pad_to)
        return np.concatenate([original, crop, padded], axis=1)

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, np.ndarray]:
        """The pictures `rows`. Raises `DataError` for one that can no longer be read."""

        size = None if self.bucket_of is None else self.sizes[only_bucket(self.bucket_of[rows])]

        def image(row: int) -> np.ndarray:
            example = self.examples[row]
            return self._square(_pixels(example)) if size is None else cover(_pixels(example), size)

        return {"image": from_uint8(np.stack(_in_threads(image, rows))), "label": self.labels[rows]}

    def control_images(self, rows: Int[np.ndarray, "B"]) -> Float[np.ndarray, "B H W 3"]:
        """The condition pictures of `rows`, in [0, 1], cut and scaled as the squares of the pictures.

        Raises:
            DataError: a picture that has none, one of another size than its picture, one that is damaged.
        """

        def image(row: int) -> np.ndarray:
            return self._square(self._control_pixels(row))

        return np.stack(_in_threads(image, rows)).astype(np.float32) / 255

    def check_control_images(self) -> None:
        """Read each condition picture once. Raises `DataError` as `control_images` does."""
        _in_threads(lambda row: self._control_pixels(row).shape, np.arange(len(self)))

    def _control_pixels(self, row: int) -> Any:
        example, (height, width) = self.examples[row], self.originals[row]
        if example.control is None:
            raise DataError(
                f"{example.name} has no condition picture: name one in its line of metadata.jsonl, as in "
                '{"file_name": "1.jpg", "conditioning_image": "edges/1.png", "text": "a cat"}, or take '
                "control_images='edges' (--control-images edges)"
            )
        name = f"the condition picture of {example.name}"
        pixels = to_uint8(rgb_of(decode_picture(example.control(), name), name=name))
        if pixels.shape[:2] != (height, width):
            raise DataError(
                f"{name} has {pixels.shape[1]}x{pixels.shape[0]} pixels, and that has {width}x{height}: "
                "resize one of them"
            )
        return pixels

    def _square(self, pixels: Any) -> np.ndarray:
        square = central_square(pixels, self.image_size)
        return square if self.pad_to is None else padded_square(square, self.pad_to)


def _in_threads(make: Callable[[int], Any], rows: Int[np.ndarray, "B"]) -> list[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(make, [int(row) for row in rows]))


def _pixels(example: Example) -> Any:
    content = example.read()
    return to_uint8(rgb_of(decode_picture(content, example.name), name=example.name))


@checked(
    folder=a_path,
    image_size=optional(count(1, 2**16)),
    pad_to=optional(count(1, 2**16)),
    max_skipped=number(0, 1),
    buckets=optional(A_BUCKETS),
    hold_out=flag,
)
def load_folder(
    folder: str | os.PathLike,
    *,
    image_size: int | None = None,
    pad_to: int | None = None,
    max_skipped: float = MOST_SKIPPED,
    buckets: Buckets | None = None,
    hold_out: bool = True,
) -> Dataset:
    """Returns the pictures of a folder as a dataset; the docstring of this module has the layouts.

    Subfolders that are all named train, validation (val) or test are splits. Without them every tenth picture
    is for validation and every tenth for testing, in the order of a hash of their names.

    Args:
        folder: of the pictures.
        image_size: side to which the central square of each is scaled. None: that of the pictures, where all
            are squares of one size. Smaller pictures are skipped.
        pad_to: side of the black square in whose centre each picture is then placed.
        max_skipped: largest share of pictures that may be skipped.
        buckets: in place of `image_size`: the training pictures keep about their ratio of sides (see
            `jaxldm.data.buckets`); those of the other splits are squares of the buckets' `image_size`.
        hold_out: False: the only split is train, with every picture (of its folder, where there are splits),
            and one picture is enough.

    Returns:
        The dataset; its `skipped` lists what cannot be used: damaged files, pictures that are too small,
        animations, captions that are missing where others have one.

    Raises:
        DataError: no folder, no pictures, fewer than ten with `hold_out`, more skipped than allowed, layouts
            mixed.
        InvalidArgumentError: `image_size` is needed; a size out of range.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: give the folder of your pictures, or a TFDS name")
    if image_size is not None and image_size < 1:
        raise InvalidArgumentError(f"image_size must be 1 or more, got {image_size}")
    if buckets is not None and (pad_to is not None or image_size not in (None, buckets.image_size)):
        raise InvalidArgumentError("buckets say the sizes of the images: leave image_size and pad_to out")
    found = sorted(examples_in(root), key=lambda example: hashlib.sha256(example.name.encode()).digest())
    if not found:
        raise DataError(
            f"{root} has no pictures: it may hold {', '.join(SUFFIXES[:4])} in class folders or with "
            "captions, .parquet files or .tar shards"
        )
    sizes = _check_all(found)
    if buckets is not None:
        image_size = buckets.image_size
    if image_size is None:
        image_size = _common_size(root, [size for size in sizes if isinstance(size, tuple)])
    if pad_to is not None and pad_to < image_size:
        raise InvalidArgumentError(f"pad_to must be >= {image_size}, the images' side, got {pad_to}")
    usable, skipped = _usable(found, sizes, lambda size: _least_size(size, image_size, buckets))
    _check_enough(root, list(usable), skipped, max_skipped, FEWEST if hold_out else 1)
    dataset = _dataset(root, usable, tuple(skipped), image_size, pad_to, hold_out)
    return dataset if buckets is None else _bucketed(dataset, usable, buckets)


def _usable(
    found: Sequence[Example],
    sizes: Sequence[tuple[int, int] | str],
    least: Callable[[tuple[int, int]], tuple[int, int]],
) -> tuple[dict[Example, tuple[int, int]], list[Skipped]]:
    """(pictures that can be used with their sizes, the others with the reason)."""
    has_captions = any(example.caption for example in found)
    has_labels = any(example.label is not None for example in found)
    usable: dict[Example, tuple[int, int]] = {}
    skipped: list[Skipped] = []
    for example, size in zip(found, sizes, strict=True):
        if isinstance(size, str):
            skipped.append(Skipped(example.name, size))
            continue
        problem, (height, width) = None, least(size)
        if size[0] < height or size[1] < width:
            problem = f"its {size[1]}x{size[0]} pixels are fewer than {width}x{height}"
        elif has_captions and not example.caption:
            problem = "it has no caption"
        elif has_labels and example.label is None:
            problem = "it lies in no class folder and has no label"
        if problem is None:
            usable[example] = size
        else:
            skipped.append(Skipped(example.name, problem))
    return usable, skipped


def _least_size(size: tuple[int, int], image_size: int, buckets: Buckets | None) -> tuple[int, int]:
    """(height, width) that a picture must have so that it is not enlarged."""
    if buckets is None:
        return image_size, image_size
    return buckets.sizes[int(assign_buckets([size], buckets)[0])]


def _bucketed(dataset: Dataset, sizes: dict[Example, tuple[int, int]], buckets: Buckets) -> Dataset:
    """The dataset with the pictures of its training split in buckets."""
    rows: Any = dataset.rows("train")
    own = assign_buckets([sizes[example] for example in rows.examples], buckets)
    train = dataclasses.replace(rows, sizes=buckets.sizes, bucket_of=own)
    return dataclasses.replace(dataset, parts={**dataset.parts, "train": train})


def _dataset(
    root: Path,
    originals: dict[Example, tuple[int, int]],
    skipped: tuple[Skipped, ...],
    image_size: int,
    pad_to: int | None,
    hold_out: bool,
) -> Dataset:
    usable = list(originals)
    names = sorted({example.label for example in usable if example.label is not None}, key=_numbers_first)
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers.get(example.label or "", 0) for example in usable], np.int32)
    own = np.array([example.split or "train" for example in usable])
    kept = {split: np.flatnonzero(own == split) for split in dict.fromkeys(SPLIT_NAMES.values())}
    sizes = {split: len(rows) for split, rows in kept.items() if len(rows)}
    parts, whole = {}, {"train": ("train", np.arange(sizes.get("train", 0)))}
    for split, (origin, records) in (split_records(sizes) if hold_out else whole).items():
        rows = kept[origin][records]
        examples = tuple(usable[row] for row in rows)
        known = tuple(originals[example] for example in examples)
        parts[split] = FolderRows(examples, labels[rows], image_size, pad_to, originals=known)
    side = image_size if pad_to is None else pad_to
    return Dataset(root.resolve().name, (side, side, 3), tuple(names) or ("image",), parts, skipped)


def _numbers_first(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isascii() and name.isdigit() and len(name) < 19 else (1, 0, name)


def _check_all(examples: Sequence[Example]) -> list[tuple[int, int] | str]:
    """(height, width) of each picture, or why it cannot be read."""

    def check(example: Example) -> tuple[int, int] | str:
        if example.problem is not None:
            return example.problem
        try:
            height, width, _ = _pixels(example).shape
        except DataError as error:
            return shortened(str(error).removeprefix(f"{example.name} "), 200)
        return height, width

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(check, examples))


def _common_size(root: Path, sizes: Sequence[tuple[int, int]]) -> int:
    different = set(sizes)
    if len(different) == 1 and len(set(sizes[0])) == 1:
        return sizes[0][0]
    if not sizes:
        return 1  # none can be used, which is said next
    raise InvalidArgumentError(
        f"the pictures of {root} are no squares of one size: give image_size (--image-size), for example 32"
    )


def _check_enough(
    root: Path, usable: list[Example], skipped: list[Skipped], most: float, fewest: int
) -> None:
    total = len(usable) + len(skipped)
    if len(skipped) > most * total:
        name, reason = skipped[0]
        raise DataError(
            f"{len(skipped)} of the {total} pictures of {root} cannot be used, more than {most:.0%}; the "
            f"first is {shortened(name, 80)}: {shortened(reason, 120)}"
        )
    if len(usable) < fewest:
        raise DataError(f"{root} has {len(usable)} pictures: at least {fewest} are needed")


@checked(skipped=several(instance(Skipped, "an entry of a dataset's `skipped`")))
def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """A line of JSON for each picture that is not used: its name and why."""
    return "".join(json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in skipped)


def identity(rows: FolderRows) -> str:
    """A hash of the content of the files, for caches of what was computed from them."""
    digest = hashlib.sha256(f"{rows.image_size} {rows.pad_to} {rows.sizes}".encode())
    for example in rows.examples:
        content = example.read()
        digest.update(f"{example.name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()
