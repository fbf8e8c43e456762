"""A pipeline in the layout of diffusers: model_index.json and a folder for each component.

model_index.json holds the library and class of each component, as in `"unet": ["diffusers", "UNet2DModel"]`,
or `[null, null]` for an absent one, and options of the pipeline: `"force_zeros_for_empty_prompt": true`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxldm import __version__, models
from jaxldm.arguments import a_dtype, a_path, checked, instance, optional, several, text
from jaxldm.checkpoints.folder import load_as, read_config, save
from jaxldm.checkpoints.names import COMPONENTS, Placement, a_placement
from jaxldm.checkpoints.tokenizer import Tokenizer, load_tokenizer
from jaxldm.errors import CheckpointError, StorageError, one_of
from jaxldm.files import (
    finish_interrupted,
    folder_written_whole,
    is_temporary,
    storage_errors,
    write_atomically,
)
from jaxldm.reading import read_json, reading, shortened, shown

INDEX_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler_config.json"
PROCESSOR_FILE = "preprocessor_config.json"
# Components that no image needs: safety checkers, and what prepares images for them.
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")

# Several networks of one class as one component of diffusers: NAME, NAME_1, NAME_2, ... are their folders.
SEVERAL = {
    "MultiControlNetModel": "ControlNetModel",
    "MultiAdapter": "T2IAdapter",
}

Network = tuple[nn.Module, dict]
Component = Network | Tokenizer | dict[str, Any]


def is_tokenizer(name: str, kind: str) -> bool:
    """Whether a component of this class is a tokenizer, or a processor of texts and images that has one."""
    return "Tokenizer" in kind or (name.startswith("tokenizer") and kind.endswith("Processor"))


@checked(folder=a_path)
def read_model_index(folder: Path | str) -> dict[str, tuple[str, str]]:
    """The components of a pipeline folder: name -> (library, class). Absent ones are left out.

    Several control networks are "controlnet", "controlnet_1" and so on.

    Raises:
        CheckpointError: no such folder, no model_index.json in it, or not one.
    """
    path = Path(folder) / INDEX_FILE
    if not path.parent.is_dir():
        raise CheckpointError(f"there is no pipeline folder {path.parent}")
    finish_interrupted(path.parent)
    if not path.exists():
        raise CheckpointError(
            f"{path.parent} has no {INDEX_FILE}: it is not a pipeline folder, or it is not complete"
        )
    components = {}
    for name, entry in read_json(path).items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or not all(isinstance(text, str) for text in entry):
            raise CheckpointError(
                f"{path} has {shown(entry)} as {shortened(name, 60)}; a component is [library, class]"
            )
        if Path(name).name != name or name == ".." or "\0" in name:
            raise CheckpointError(f"{path} names a component outside its folder: {shown(name)}")
        components[name] = (entry[0], entry[1])
    for name, (library, kind) in list(components.items()):
        if kind in SEVERAL:
            places = itertools.takewhile(
                lambda place: (path.parent / place).is_dir(),
                itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1))),
            )
            components |= dict.fromkeys([name, *places], (library, SEVERAL[kind]))
    return components


def _several_as_one(index: dict[str, Any]) -> dict[str, Any]:
    """The entries of model_index.json, with NAME, NAME_1, ... as the one component that diffusers knows."""
    for kind, single in SEVERAL.items():
        names = [name for name, entry in index.items() if entry == ["diffusers", single]]
        if len(names) > 1:
            first = min(names, key=len)
            index = {name: entry for name, entry in index.items() if name not in names}
            index[first] = ["diffusers", kind]
    return index


@checked(
    pipeline_folder=a_path,
    dtype=optional(a_dtype),
    only=optional(several(text)),
    sharding=optional(a_placement),
    variant=optional(text),
)
def load_components(
    pipeline_folder: Path | str,
    dtype: str | None = None,
    only: Iterable[str] | None = None,
    *,
    sharding: Placement = None,
    variant: str | None = None,
) -> dict[str, Component]:
    """Opens the components of a pipeline folder that diffusers or `save_components` wrote.

    Absent ones and those that no image needs (`NOT_NEEDED`) are left out.

    Args:
        pipeline_folder: with model_index.json.
        dtype: as in `load`, for every network; so are `sharding` and `variant`.
        only: the names of the components to open, which may be in `NOT_NEEDED`; None: all others.

    Returns:
        name -> (module, params) for a network, a `Tokenizer`, or the dictionary of scheduler_config.json.

    Raises:
        CheckpointError: the folder or a file in it is missing, damaged or of an unknown class.
        UnknownNameError: `only` names a component that the folder does not have; another dtype.
    """
    folder = Path(pipeline_folder)
    index = read_model_index(folder)
    names = [name for name in index if name not in NOT_NEEDED] if only is None else list(only)

    def component(name: str) -> Component:
        _, kind = index[one_of(f"component of {folder}", name, index)]
        if kind.endswith("Scheduler") or name.endswith("scheduler"):
            return {"_class_name": kind, **read_json(folder / name / SCHEDULER_FILE)}
        if is_tokenizer(name, kind):
            return load_tokenizer(folder / name)
        if "ImageProcessor" in kind:
            return {"_class_name": kind, **read_json(folder / name / PROCESSOR_FILE)}
        entries = _of_class(read_config(folder / name), kind)
        return load_as(entries, folder / name, dtype=dtype, sharding=sharding, variant=variant)

    with ThreadPoolExecutor(2) as pool:  # while one is traced for its shapes, another is read
        components = dict(zip(names, pool.map(component, names), strict=True))
    for name, found in components.items():
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        if isinstance(found, Tokenizer) and isinstance(encoder, tuple):
            with reading(folder):
                check_vocabulary(name, found, encoder[0].config)
    return components


def check_vocabulary(name: str, tokenizer: Tokenizer, config: Any) -> None:
    """Raise `CheckpointError` where a tokenizer has tokens that its text encoder has no embedding of.

    Such a token would silently get that of the last one.
    """
    rows, largest = getattr(config, "vocab_size", None), tokenizer.largest_token
    if rows is not None and largest >= rows:
        raise CheckpointError(
            f"its {name} has tokens up to {largest}, its text encoder embeddings of {rows}: words were added "
            "to the tokenizer alone, or the two are of different models"
        )


def _of_class(entries: dict[str, Any], kind: str) -> dict[str, Any]:
    """The entries of config.json with the class that model_index.json names.

    The config of a text encoder may name the whole model that the encoder is a part of.
    """
    key, value = ("_class_name", kind) if "_class_name" in entries else ("architectures", [kind])
    return entries | {key: value}


@checked(
    folder=a_path,
    class_name=text,
    components=COMPONENTS,
    options=optional(instance(Mapping, "a dictionary of entries of model_index.json")),
)
def save_components(
    folder: Path | str,
    class_name: str,
    components: Mapping[str, Component | bool | int | float | str | None],
    *,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Writes a pipeline folder that `load_components` and diffusers open: all of it or nothing.

    An earlier pipeline in `folder` is replaced.

    Args:
        folder: to write.
        class_name: of the pipeline in diffusers, for example "StableDiffusionPipeline".
        components: name -> (module, params), a `Tokenizer`, a scheduler's dictionary with `_class_name`, or
            None for an absent component; or a number, string or bool: an option of the pipeline.
        options: more entries of model_index.json, which may be dictionaries (DiT's `id2label`).

    Raises:
        StorageError: the folder holds other files, is a file, or cannot be written.
        CheckpointError: a scheduler's dictionary without `_class_name`.
    """
    folder = Path(os.path.abspath(folder))
    finish_interrupted(folder)
    _check_may_replace(folder)
    index: dict[str, Any] = {"_class_name": class_name, "_jaxldm_version": __version__}
    index |= options or {}
    with folder_written_whole(folder) as partial:
        for name, component in components.items():
            index[name] = save_component(partial / name, component)
        index = _several_as_one(index)
        (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_component(folder: Path, component: Any) -> Any:
    """Writes a component and returns its entry in model_index.json; one that is there is replaced."""
    if component is None:
        return [None, None]
    if isinstance(component, bool | int | float | str):
        return component
    if isinstance(component, Tokenizer):
        component.save(folder)
        return ["transformers", component.class_name]
    if isinstance(component, Mapping):
        if "_class_name" not in component:
            raise CheckpointError(f"{folder.name} is a dictionary without _class_name, so not a scheduler")
        is_processor = "ImageProcessor" in component["_class_name"]
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        kept = {name: component[name] for name in component if not (is_processor and name == "_class_name")}
        text = json.dumps(kept, indent=2) + "\n"
        write_atomically(folder / (PROCESSOR_FILE if is_processor else SCHEDULER_FILE), text.encode())
        return ["transformers" if is_processor else "diffusers", component["_class_name"]]
    module, params = component
    save(folder, module, params)
    config = module.config
    in_diffusers = config.library != "diffusers" or config.published
    library = config.package or config.library
    return [library if in_diffusers else "jaxldm", models.class_name(config)]


def _check_may_replace(folder: Path) -> None:
    """Raises `StorageError` unless the folder is new, empty, or a pipeline's and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file: choose another folder")
    files = {name for name in os.listdir(folder) if not is_temporary(name)} if folder.exists() else set()
    if INDEX_FILE in files:
        files -= {INDEX_FILE, *read_model_index(folder)}
    if files:
        raise StorageError(
            f"{folder} already holds other files ({', '.join(sorted(files)[:3])}): choose a new or an empty "
            "folder"
        )
