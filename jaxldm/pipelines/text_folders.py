"""Text-to-image models on disk: folders in the layout of diffusers, with a model_index.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.stable_diffusion import StableDiffusion
from jaxldm.pipelines.stable_diffusion_xl import StableDiffusionXL
from jaxldm.pipelines.starts import INPAINTING_CHANNELS
from jaxldm.pipelines.text_to_image import TextToImage

# `_class_name` of model_index.json -> the pipeline here. One class of ours does what several do there.
PIPELINES: dict[str, type[TextToImage]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionImg2ImgPipeline": StableDiffusion,
    "StableDiffusionInpaintPipeline": StableDiffusion,
    "LatentConsistencyModelPipeline": StableDiffusion,
    "LatentConsistencyModelImg2ImgPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusionXLImg2ImgPipeline": StableDiffusionXL,
    "StableDiffusionXLInpaintPipeline": StableDiffusionXL,
}
# Components that a pipeline must have, and those that it may lack (the refiner's first text encoder).
_NEEDED: dict[type[TextToImage], tuple[str, ...]] = {
    StableDiffusion: ("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
    StableDiffusionXL: ("unet", "vae", "scheduler", "text_encoder_2", "tokenizer_2"),
}
_OPTIONAL: dict[type[TextToImage], tuple[str, ...]] = {
    StableDiffusion: (),
    StableDiffusionXL: ("text_encoder", "tokenizer"),
}
_FLAGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")


def load_text_to_image(
    folder: Path, index: Mapping[str, Any], dtype: str | None = None, variant: str | None = None
) -> TextToImage:
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
    there = [name for name in (*_NEEDED[kind], *_OPTIONAL[kind]) if _names_something(index.get(name))]
    missing = [name for name in _NEEDED[kind] if name not in there]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}: a {index['_class_name']} needs {', '.join(_NEEDED[kind])}"
        )
    loaded = checkpoints.load_components(folder, dtype=dtype, only=there, variant=variant)
    parts = dict.fromkeys(_OPTIONAL[kind]) | {
        name: Network(*part) if isinstance(part, tuple) else part for name, part in loaded.items()
    }
    flags = {flag: bool(index[flag]) for flag in _FLAGS if flag in index and kind is StableDiffusionXL}
    pipe = kind(**parts, **flags)
    _check_parts_fit(pipe, folder)
    return pipe


def modules_in(folder: str | Path) -> dict[str, nn.Module]:
    """The networks that a text-to-image folder names, from their configs alone: no weights are read.

    Raises:
      CheckpointError: a config is missing, damaged or of an unknown class.
    """
    folder = Path(folder)
    known = {name for names in (*_NEEDED.values(), *_OPTIONAL.values()) for name in names}
    networks = known - {"tokenizer", "tokenizer_2", "scheduler"}
    return {
        name: models.from_config(models.config_from_dict(checkpoints.read_config(folder / name)))
        for name in checkpoints.read_model_index(folder)
        if name in networks
    }


def save_text_to_image(pipe: TextToImage, folder: Path) -> None:
    """Writes a folder that `pipelines.load` and diffusers open, under the class name that fits the model."""
    kind = type(pipe)
    if kind not in _NEEDED:
        raise InvalidArgumentError(f"a {kind.__name__} has no folder layout: save its components one by one")
    components = {}
    for name in (*_NEEDED[kind], *_OPTIONAL[kind]):
        part = getattr(pipe, name)
        components[name] = (part.module, part.params) if isinstance(part, Network) else part
    if kind is StableDiffusionXL:
        components |= {flag: getattr(pipe, flag) for flag in _FLAGS}
    checkpoints.save_components(folder, _class_name(pipe), components)


def with_lora(pipe: TextToImage, path: str | Path, scale: float | Mapping[str, float] = 1.0) -> TextToImage:
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


def _class_name(pipe: TextToImage) -> str:
    family = "StableDiffusionXL" if isinstance(pipe, StableDiffusionXL) else "StableDiffusion"
    if pipe.unet.config.in_channels == INPAINTING_CHANNELS:
        return f"{family}InpaintPipeline"
    if pipe.text_encoder is None:  # the refiner
        return f"{family}Img2ImgPipeline"
    return "LatentConsistencyModelPipeline" if pipe.knows_guidance else f"{family}Pipeline"


def _names_something(entry: Any) -> bool:
    """Whether an entry of model_index.json is a component that is there, and not [null, null]."""
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _check_parts_fit(pipe: TextToImage, folder: Path) -> None:
    """Refuses parts of different models in one folder."""
    unet = pipe.unet.config
    encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    width = sum(encoder.config.hidden_size for encoder in encoders if encoder is not None)
    if width != unet.cross_attention_dim:
        raise CheckpointError(
            f"{folder} mixes two models: its text encoders give states {width} wide, its U-Net takes "
            f"{unet.cross_attention_dim}"
        )
    if unet.out_channels != pipe.vae.config.latent_channels:
        raise CheckpointError(
            f"{folder} mixes two models: its autoencoder has {pipe.vae.config.latent_channels} latent "
            f"channels, its U-Net draws {unet.out_channels}"
        )
