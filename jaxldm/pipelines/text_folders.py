"""Text-to-image models on disk: folders in the layout of diffusers, with a model_index.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError
from jaxldm.pipelines.amused import Amused
from jaxldm.pipelines.deepfloyd_if import DeepFloydIF, DeepFloydIFSuperResolution
from jaxldm.pipelines.flux import Flux
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pixart import PixArtAlpha, PixArtSigma
from jaxldm.pipelines.stable_diffusion import StableDiffusion
from jaxldm.pipelines.stable_diffusion_3 import StableDiffusion3
from jaxldm.pipelines.stable_diffusion_xl import StableDiffusionXL
from jaxldm.pipelines.text_pipeline import TextPipeline
from jaxldm.pipelines.wuerstchen import Wuerstchen, WuerstchenDecoder, WuerstchenPrior
from jaxldm.pipelines.z_image import ZImage

# A new family adds one line.
FAMILIES: tuple[type[TextPipeline], ...] = (
    Amused,
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    PixArtSigma,
    PixArtAlpha,
    DeepFloydIF,
    DeepFloydIFSuperResolution,
    Wuerstchen,
    WuerstchenPrior,
    WuerstchenDecoder,
    ZImage,
)
# `_class_name` of model_index.json -> the pipeline here.
PIPELINES: dict[str, type[TextPipeline]] = {name: kind for kind in FAMILIES for name in kind.class_names}


def load_text_to_image(
    folder: Path, index: Mapping[str, Any], dtype: str | None = None, variant: str | None = None
) -> TextPipeline:
    """The pipeline in a folder whose model_index.json has these entries.

    Args:
      folder: as `diffusers` writes it, or `save_text_to_image`.
      index: the entries of its model_index.json.
      dtype: of parameters and computation; None is float32.
      variant: "fp16" for the files of that variant.

    Raises:
      UnknownNameError: no such dtype.
      CheckpointError: a component is missing, damaged, or of another model.
    """
    if dtype is not None:
        models.compute_dtype(dtype)
    kind = PIPELINES[index["_class_name"]]
    names = kind.component_names()
    there = [name for name in names if _names_something(index.get(name))]
    needed = [name for name in names if name not in kind.optional]
    missing = [name for name in needed if name not in there]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}: a {index['_class_name']} needs {', '.join(needed)}"
        )
    loaded = checkpoints.load_components(folder, dtype=dtype, only=there, variant=variant)
    parts = dict.fromkeys(kind.optional) | {
        name: Network(*part) if isinstance(part, tuple) else part for name, part in loaded.items()
    }
    pipe = kind(**parts, **{flag: index[flag] for flag in kind.flags if flag in index})
    try:
        pipe.check_parts()
    except CheckpointError as error:
        raise CheckpointError(f"{folder} mixes two models: {error}") from error
    return pipe


def modules_in(folder: str | Path) -> dict[str, nn.Module]:
    """The networks that a text-to-image folder names, from their configs alone: no weights are read.

    Raises:
      CheckpointError: a config is missing, damaged or of an unknown class.
    """
    folder = Path(folder)
    known = {name for kind in FAMILIES for name in kind.component_names()}
    return {
        name: models.from_config(models.config_from_dict(checkpoints.read_config(folder / name)))
        for name, (_, kind) in checkpoints.read_model_index(folder).items()
        if name in known and not kind.endswith("Scheduler") and "Tokenizer" not in kind
    }


def save_text_to_image(pipe: TextPipeline, folder: Path) -> None:
    """Writes a folder that `pipelines.load` and diffusers open, under the class name that fits the model."""
    components = dict(pipe.saved_options)
    for name in (*pipe.component_names(), *pipe.flags):
        part = getattr(pipe, name)
        components[name] = (part.module, part.params) if isinstance(part, Network) else part
    checkpoints.save_components(folder, pipe.saved_class_name, components)


def with_lora(pipe: TextPipeline, path: str | Path, scale: float | Mapping[str, float] = 1.0) -> TextPipeline:
    """The model with a LoRA file merged into its weights; the one that was given stays as it is.

    Args:
      path: a file of kohya's or of diffusers' kind, see `checkpoints.load_lora`.
      scale: of all networks, or of each by name ("unet", "text_encoder", ...).

    Raises:
      CheckpointError: no such file, or one that does not fit the model.
      UnknownNameError: a scale for a network that is not there.
    """
    parts = {name: (network.module, network.params) for name, network in pipe.networks.items()}
    merged = checkpoints.merge_lora(parts, checkpoints.load_lora(path), scale)
    return dataclasses.replace(pipe, **{name: Network(*part) for name, part in merged.items()})


def _names_something(entry: Any) -> bool:
    """Whether an entry of model_index.json is a component that is there, and not [null, null]."""
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
