"""The weight files of a model folder: one file, or shards with an index, in one or several variants.

| file | content |
|---|---|
| `STEM.safetensors` | all tensors |
| `STEM.fp16.safetensors` | all tensors, in the variant fp16 |
| `STEM-00001-of-00003.safetensors` ... | the tensors of a large model, in several files (shards) |
| `STEM.safetensors.index.json`, `STEM.safetensors.index.fp16.json` | which tensor is in which shard |

STEM is `diffusion_pytorch_model` in folders of diffusers and `model` in those of transformers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxldm.checkpoints.safetensors_file import (
    StoredTensor,
    Tensor,
    open_safetensors,
    refuse_pickle,
    safetensors_chunks,
)
from jaxldm.errors import CheckpointError
from jaxldm.reading import read_json, reading

MAX_SHARD_SIZE = 10 * 10**9  # bytes, as in diffusers
_PICKLES = ("{stem}*.bin", "pytorch_model*.bin", "*.ckpt", "*.pt", "*.pth")


def open_weights(folder: Path, stem: str, variant: str | None = None) -> tuple[Path, dict[str, StoredTensor]]:
    """The weight file of a folder, or the index of its shards, and all tensors, not read yet.

    Args:
        folder: of the model.
        stem: `STEM` in the table above.
        variant: for example "fp16"; None: the plain files, or the only variant.

    Raises:
        CheckpointError: no such files, only pickle files, several variants to choose from, a damaged file, an
            index that does not agree with its shards.
    """
    with reading(folder):
        found = find_weights(folder, stem, variant)
        if found is None:
            single = _places(folder, stem, variant)[1]
            raise CheckpointError(f"there is no weight file {single}{_what_is_found(folder, stem)}")
        return found, open_found(found)


def find_weights(folder: Path, stem: str, variant: str | None = None) -> Path | None:
    """The weight file of a folder, or the index of its shards; None where there is neither."""
    if variant is None and not any(path.exists() for path in _places(folder, stem, None)):
        variant = _only_variant(folder, stem)
    return next((path for path in _places(folder, stem, variant) if path.exists()), None)


def open_found(path: Path) -> dict[str, StoredTensor]:
    """The tensors of what `find_weights` found."""
    return _open_shards(path) if path.suffix == ".json" else open_safetensors(path).tensors


def _places(folder: Path, stem: str, variant: str | None) -> tuple[Path, Path]:
    """The paths of a variant's index and single file."""
    middle = "" if variant is None else f".{variant}"
    return folder / f"{stem}.safetensors.index{middle}.json", folder / f"{stem}{middle}.safetensors"


def _variants(folder: Path, stem: str) -> list[str]:
    patterns = (rf"{stem}\.([\w-]+)\.safetensors", rf"{stem}\.safetensors\.index\.([\w-]+)\.json")
    found = {
        match[1]
        for path in folder.iterdir()
        for pattern in patterns
        if (match := re.fullmatch(pattern, path.name)) and not re.search(r"-\d+-of-\d+$", match[1])
    }
    return sorted(found)


def _only_variant(folder: Path, stem: str) -> str | None:
    variants = _variants(folder, stem)
    if len(variants) > 1:
        raise CheckpointError(
            f"{folder} has weights in the variants {', '.join(variants)} only: choose one, with "
            f"variant={variants[0]!r}"
        )
    return variants[0] if variants else None


def _what_is_found(folder: Path, stem: str) -> str:
    """What the folder holds instead, for a message. Raises `CheckpointError` for a pickle file."""
    variants = _variants(folder, stem)
    if variants:
        return f"; there are the variants {', '.join(variants)}"
    shards = sorted(folder.glob(f"{stem}*-of-*.safetensors"))
    if shards:
        return f"; there is {shards[0].name}, but no {stem}.safetensors.index.json: copy that, too"
    for pattern in _PICKLES:
        for pickle in sorted(folder.glob(pattern.format(stem=stem))):
            refuse_pickle(pickle)
    return ""


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) and place for place in places.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    outside = sorted({place for place in places.values() if Path(place).name != place or place == ".."})
    if outside:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(outside)}")
    shards = sorted(set(places.values()))
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise CheckpointError(f"{index} names files that do not exist: {', '.join(absent)}")
    contents = {shard: open_safetensors(index.parent / shard).tensors for shard in shards}
    problems = [f"{name} is not in {place}" for name, place in places.items() if name not in contents[place]]
    problems += [
        f"{name} is in {shard} "
        + (f"and not only in {places[name]}" if name in places else "but not in the index")
        for shard, tensors in contents.items()
        for name in tensors
        if places.get(name) != shard
    ]
    if problems:
        raise CheckpointError(f"{index} does not agree with its files: {'; '.join(problems)}")
    return {name: contents[place][name] for name, place in places.items()}


def weight_contents(
    stem: str, tensors: Mapping[str, Tensor], max_shard_size: int = MAX_SHARD_SIZE
) -> dict[str, bytes | Iterable[bytes | memoryview]]:
    """Name -> content of the files for these tensors, for `files.write_together`: one, or shards and index.

    A shard has at most `max_shard_size` bytes of tensors, or a single larger tensor.
    """
    sizes = {name: math.prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {f"{stem}.safetensors": safetensors_chunks(tensors)}
    files = {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
    places = {name: file for file, shard in files.items() for name in shard}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    return {
        **{
            file: safetensors_chunks({name: tensors[name] for name in shard}) for file, shard in files.items()
        },
        f"{stem}.safetensors.index.json": (json.dumps(index, indent=2) + "\n").encode(),
    }


def is_plain_weights(stem: str, name: str) -> bool:
    """Whether a file of this name has weights of `weight_contents`, and is not of a variant."""
    return re.fullmatch(rf"{re.escape(stem)}(-.*-of-.*)?\.safetensors(\.index\.json)?", name) is not None
