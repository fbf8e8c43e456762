"""Run folders, as training leaves them: what pipelines read there, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxldm import checkpoints
from jaxldm.checkpoints.embedding_file import EMBEDDING_FILE
from jaxldm.checkpoints.lora import FILE_NAMES
from jaxldm.checkpoints.pipeline_folder import INDEX_FILE
from jaxldm.entries import read_value, read_values
from jaxldm.errors import CheckpointError
from jaxldm.files import holder
from jaxldm.pipelines.few_steps import training_of
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.reading import read_json

RUN_CONFIG = "config.json"
CONTROL_FOLDER = "trained-controlnet"  # in the run that trained it


def read_run(folder: Path) -> tuple[str, tuple[int, ...], int]:
    """Recipe, image shape and number of classes of a run."""
    config = read_json(folder / RUN_CONFIG)
    if isinstance(config, Mapping) and "_class_name" in config:
        raise CheckpointError(f"{folder} holds one network, no whole model: give its folder, {folder.parent}")
    place = f"{folder / RUN_CONFIG} is no config.json of a run"
    kinds = {"recipe": Mapping[str, Any], "data": Mapping[str, Any]}
    entries = read_values(config, kinds, place)
    try:
        recipe, data = entries["recipe"], entries["data"]
        name, shape, names = recipe["name"], data["image_shape"], data["class_names"]
    except KeyError as error:
        raise CheckpointError(f"{place}: it lacks {error}") from error
    return (
        read_value(name, str, f"{place}: name"),
        read_value(shape, tuple[int, int, int], f"{place}: image_shape"),
        len(read_value(names, tuple[str, ...], f"{place}: class_names")),
    )


def check_finished(folder: Path) -> None:
    """Raise `CheckpointError` for a run that holds no finished model, with what to do."""
    read_run(folder)  # refuses what is no run
    if (folder / "diffusion" / "model").is_dir():
        raise CheckpointError(f"{folder} is a run of version 0.1: export it with that version, and load that")
    entries = read_json(folder / RUN_CONFIG)["recipe"]
    if entries.get("finetune") is not None:
        _check_finetuned(folder, entries["finetune"])
    elif entries.get("diffusion", {}) is None and entries.get("masked_tokens") is None:
        raise CheckpointError(
            f"{folder} is the run of an autoencoder alone, which draws nothing: give the run of a recipe "
            "that draws, such as mini-ldm"
        )
    if not (folder / INDEX_FILE).exists():
        process = holder(folder)
        if process is not None:
            raise CheckpointError(
                f"{folder} holds no finished model yet: {process} is training it, wait until that ends"
            )
        raise CheckpointError(
            f"{folder} holds no finished model yet: go on with its training, with "
            f"`jaxldm {training_of(entries)} --run-dir {folder} --resume`"
        )
    for name, (_, kind) in checkpoints.read_model_index(folder).items():
        config = {} if kind.endswith("Scheduler") else checkpoints.read_config(folder / name)
        found = config.get("_class_name", kind)
        if found != kind:
            raise CheckpointError(f"{folder} mixes two models: {name} is a {found}, its index says {kind}")


def _check_finetuned(folder: Path, entries: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a run whose result is a file for another model."""
    for file, what, option in (
        (FILE_NAMES[0], "LoRA", "lora"),
        (EMBEDDING_FILE, "word", "embedding"),
        (CONTROL_FOLDER, "ControlNet", "control-image FILE --controlnet"),
    ):
        if (folder / file).exists():
            raise CheckpointError(
                f"{folder} holds a {what} and no model: draw with the model that it was trained on, jaxldm "
                f"sample {entries.get('source')} --{option} {folder}"
            )


def controlnet_of(folder: str | Path) -> str | Path:
    """The folder of a ControlNet, where `folder` is the run that trained it; any other folder as it is.

    Raises:
        CheckpointError: the training is not finished.
    """
    path = Path(folder).expanduser()
    if (path / CONTROL_FOLDER).is_dir():
        return path / CONTROL_FOLDER
    if (path / RUN_CONFIG).is_file() and "recipe" in read_json(path / RUN_CONFIG):
        entries = read_json(path / RUN_CONFIG)["recipe"]
        if ((entries or {}).get("finetune") or {}).get("control"):
            raise CheckpointError(
                f"{path} holds no finished ControlNet yet: go on with its training, with `jaxldm "
                f"{training_of(entries)} --run-dir {path} --resume`"
            )
    return folder


def check_data_of_run(pipe: Pipeline, folder: Path) -> None:
    """Refuse networks of other images or classes than those that the run was trained on."""
    _, shape, num_classes = read_run(folder)
    if pipe.image_shape() != shape or pipe.num_classes not in (None, num_classes):
        raise CheckpointError(
            f"{folder} mixes two models: its networks draw {pipe.image_shape()} images of {pipe.num_classes} "
            f"classes, its {RUN_CONFIG} has {shape} and {num_classes}"
        )
