"""Where the pictures of a folder are, their classes and captions; `folders` shows the layouts."""

from __future__ import annotations

import codecs
import functools
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxldm.data.example import CONTROL_KEYS, TEXT_KEYS, Example
from jaxldm.data.parquet import parquet_examples
from jaxldm.errors import DataError
from jaxldm.reading import check_regular, parse_json, read_bytes, reading, shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation"}
SPLIT_NAMES |= {"test": "test"}
METADATA = "metadata.jsonl"
MAX_PICTURE_BYTES = 256 * 2**20
MAX_CAPTION_BYTES = 2**16
MAX_LINES_BYTES = 2**30  # of metadata.jsonl
_FILE_KEYS = ("file_name", "image", "image_file_name")  # of a line there


def examples_in(root: Path) -> list[Example]:
    """All pictures of a folder, whatever its layout, and those that cannot be used with the reason.

    Raises:
        DataError: layouts mixed; a list of captions, a table or a shard that cannot be read at all.
    """
    files = files_in(root)
    by_suffix = {suffix: [path for path in files if path.suffix.lower() == suffix] for suffix in _READERS}
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    kinds = [name for name, paths in {**by_suffix, "pictures": pictures}.items() if paths]
    if len(kinds) > 1:
        raise DataError(f"{root} mixes {' and '.join(kinds)}: put each kind into a folder of its own")
    for suffix, paths in by_suffix.items():
        if paths:
            return [example for path in paths for example in _READERS[suffix](path, root)]
    return _picture_files(root, pictures)


def files_in(root: Path) -> list[Path]:
    """All files of a folder but the hidden ones, sorted. Raises `DataError`."""
    with reading(root, DataError):
        return sorted(path for path in root.rglob("*") if path.is_file() and not _hidden(path, root))


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)


def _picture_files(root: Path, pictures: Sequence[Path]) -> list[Example]:
    """Pictures as files: classes are subfolders, captions come from metadata.jsonl or from .txt files."""
    listed = _metadata(root)
    controls = {entry.control for entry in listed.values()}
    present = {Path(os.path.normpath(path)) for path in pictures}
    pictures = [path for path in pictures if Path(os.path.normpath(path)) not in controls]
    places = [path.relative_to(root).parts for path in pictures]
    tops = {parts[0] for parts in places if len(parts) > 1}
    has_splits = "train" in tops and tops <= set(SPLIT_NAMES)
    examples = []
    for path, parts in zip(pictures, places, strict=True):
        split = SPLIT_NAMES[parts[0]] if has_splits and len(parts) > 1 else None
        inner = parts[1:] if split else parts
        entry = listed.get(path, _Line())
        caption, problem, control = entry.caption, None, None
        text = path.with_suffix(".txt")
        if caption is None and text.is_file():
            try:
                caption = _text(read_bytes(text, MAX_CAPTION_BYTES, "caption", DataError), text)
            except DataError as error:
                problem = str(error)
        if entry.control in present:
            control = _reader_of_file(entry.control)
        elif entry.control is not None:
            problem = (
                f"there is no {entry.control.relative_to(os.path.normpath(root))}, its condition picture"
            )
        label = inner[0] if len(inner) > 1 and not listed else None
        read = _reader_of_file(path)
        examples.append(Example("/".join(parts), read, split, label, caption, problem, control))
    for path in listed:
        if Path(os.path.normpath(path)) not in present:
            name = path.relative_to(root).as_posix()
            problem = "metadata.jsonl names it, but there is no such file"
            examples.append(Example(name, bytes, problem=problem))
    return examples


def _reader_of_file(path: Path) -> Callable[[], bytes]:
    return functools.partial(read_bytes, path, MAX_PICTURE_BYTES, "picture", DataError)


class _Line(NamedTuple):
    """What metadata.jsonl says of a picture: its caption and the file of its condition picture."""

    caption: str | None = None
    control: Path | None = None


def _metadata(root: Path) -> dict[Path, _Line]:
    """The line of each picture in each metadata.jsonl in the folder, as imagefolder has it."""
    found: dict[Path, _Line] = {}
    for path in sorted(root.rglob(METADATA)):
        lines = read_bytes(path, MAX_LINES_BYTES, "list of captions", DataError)
        lines = lines.removeprefix(codecs.BOM_UTF8).splitlines()  # Windows begins a text with it
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            entries = parse_json(line, place, DataError)
            name, text, control = (
                next((entries[key] for key in keys if key in entries), "")
                for keys in (_FILE_KEYS, TEXT_KEYS, CONTROL_KEYS)
            )
            if not all(isinstance(value, str) for value in (name, text, control)) or not name:
                raise DataError(
                    f'{place} must be like {{"file_name": "1.jpg", "text": "a cat"}}, not {shown(entries)}'
                )
            own = _inside(root, path.parent, control, place) if control else None
            found[_inside(root, path.parent, name, place)] = _Line(" ".join(text.split()), own)
    return found


def _inside(root: Path, parent: Path, name: str, place: str) -> Path:
    path = Path(os.path.normpath(parent / name)) if "\0" not in name else root.parent
    if not path.is_relative_to(os.path.normpath(root)):
        raise DataError(f"{place} names {shown(name)}, which is not in the folder")
    return path


def _text(content: bytes, place: Path | str) -> str:
    with reading(place, DataError):
        return " ".join(content.decode("utf-8-sig").split())


def _tar_shard(path: Path, root: Path) -> list[Example]:
    """The examples of a shard of webdataset: files of one name up to their first dot."""
    import tarfile

    check_regular(path, "shard", DataError)
    members: dict[str, dict[str, Any]] = {}
    with reading(path, DataError), tarfile.open(path, "r:") as archive:
        for member in archive:
            base = member.name.rsplit("/", 1)[-1]
            if member.isreg() and not member.sparse and "." in base and not base.startswith("."):
                suffix = "." + base.split(".", 1)[1].lower()
                key = member.name[: len(member.name) - len(suffix)]
                members.setdefault(key, {})[suffix] = (member.offset_data, member.size)
    shard = path.relative_to(root).as_posix()
    return [
        _of_shard(path, f"{shard}/{key}", parts)
        for key, parts in members.items()
        if set(parts) & {*SUFFIXES, ".txt", ".json", ".cls"}
    ]


def _of_shard(path: Path, name: str, parts: dict[str, tuple[int, int]]) -> Example:
    def content(suffix: str, limit: int) -> bytes:
        return _part_of_shard(path, f"{name}{suffix}", parts[suffix], limit)

    picture = next((suffix for suffix in SUFFIXES if suffix in parts), None)
    if picture is None:
        return Example(name, bytes, problem="there is no picture of that name in the shard")
    caption = label = problem = None
    try:
        if ".json" in parts:
            entries = parse_json(content(".json", MAX_CAPTION_BYTES), f"{name}.json", DataError)
            caption = next((str(entries[key]) for key in TEXT_KEYS if key in entries), None)
        if ".txt" in parts:
            caption = _text(content(".txt", MAX_CAPTION_BYTES), f"{name}.txt")
        if ".cls" in parts:
            label = _text(content(".cls", MAX_CAPTION_BYTES), f"{name}.cls")
    except DataError as error:
        problem = str(error)
    read = functools.partial(_part_of_shard, path, f"{name}{picture}", parts[picture], MAX_PICTURE_BYTES)
    return Example(name, read, None, label, caption, problem)


def _part_of_shard(path: Path, name: str, place: tuple[int, int], limit: int) -> bytes:
    """The content of a file in a shard, by its place: (offset, size)."""
    offset, size = place
    if size > limit:
        raise DataError(f"{name} has {size} bytes, more than {limit}")
    with reading(path, DataError), path.open("rb") as file:
        file.seek(offset)
        read = file.read(size)
    if len(read) < size:
        raise DataError(f"{name} is incomplete")
    return read


def _parquet_file(path: Path, root: Path) -> list[Example]:
    return parquet_examples(path, path.relative_to(root).as_posix())


def described_files(root: Path) -> dict[str, Any]:
    """The files of a folder that are read as pictures or captions, by their names and sizes alone.

    Whoever goes on training compares them: with a picture less, held-out ones would become training pictures.

    Returns:
        {"number", "bytes", "crc32"}, empty where there are none. Raises `DataError`.
    """
    files = files_in(root)
    kinds = {*SUFFIXES, *_READERS}
    read = {path.with_suffix("") for path in files if path.suffix.lower() in SUFFIXES}
    names, total = [], 0
    for path in files:
        caption = path.suffix == ".txt" and path.with_suffix("") in read
        if caption or path.name == METADATA or path.suffix.lower() in kinds:
            with reading(path, DataError):
                size = path.stat().st_size
            names.append(f"{path.relative_to(root).as_posix()}:{size}")
            total += size
    crc = zlib.crc32(os.fsencode("\n".join(names)))
    return {"number": len(names), "bytes": total, "crc32": crc} if names else {}


_READERS = {".parquet": _parquet_file, ".tar": _tar_shard}
