"""Stable Diffusion 1.x, 2.x, XL and 3, FLUX.1 and Z-Image as one file, in the layout of the original code."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from jaxldm import models
from jaxldm.checkpoints import single_file_configs as configs
from jaxldm.checkpoints import single_file_names as names
from jaxldm.checkpoints import single_file_sd3 as sd3
from jaxldm.checkpoints import single_file_z_image as z_image
from jaxldm.checkpoints.names import from_state_dict, published
from jaxldm.checkpoints.safetensors_file import Tensor, open_safetensors, safetensors_chunks
from jaxldm.checkpoints.single_file_flux import flux_config, flux_table
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.files import storage_errors, write_together
from jaxldm.models.config import ModelConfig
from jaxldm.models.flux_transformer_2d import FluxTransformer2DConfig
from jaxldm.models.sd3_transformer_2d import SD3Transformer2DConfig
from jaxldm.models.z_image_transformer_2d import ZImageTransformer2DConfig


class Part(NamedTuple):
    """A component in an original file: what its names begin with, its table, and how its config is found."""

    prefix: str
    table: Callable[[Any], names.Table]
    config: Callable[[configs.Shapes, Any], ModelConfig]
    preset: str


def _family(unet: str, vae: str, **text_encoders: Part) -> dict[str, Part]:
    return {
        "unet": Part("model.diffusion_model.", names.unet_table, configs.unet_config, unet),
        "vae": Part("first_stage_model.", names.vae_table, configs.vae_config, vae),
        **text_encoders,
    }


def _clip(prefix: str) -> Part:
    return Part(prefix, names.clip_table, configs.clip_config, "clip-l")


def _openclip(prefix: str, preset: str) -> Part:
    return Part(prefix, names.openclip_table, configs.openclip_config, preset)


def _t5(prefix: str) -> Part:
    return Part(prefix, names.t5_table, configs.t5_config, "t5-xxl")


FAMILIES: dict[str, dict[str, Part]] = {
    "1.x": _family("sd15-unet", "sd-vae", text_encoder=_clip("cond_stage_model.transformer.")),
    "2.x": _family("sd21-unet", "sd-vae", text_encoder=_openclip("cond_stage_model.model.", "openclip-h")),
    "XL": _family(
        "sdxl-unet",
        "sdxl-vae",
        text_encoder=_clip("conditioner.embedders.0.transformer."),
        text_encoder_2=_openclip("conditioner.embedders.1.model.", "openclip-bigg"),
    ),
    "XL refiner": _family(
        "sdxl-refiner-unet",
        "sdxl-vae",
        text_encoder_2=_openclip("conditioner.embedders.0.model.", "openclip-bigg"),
    ),
    "SD3": {
        "transformer": Part("model.diffusion_model.", sd3.sd3_table, sd3.sd3_config, "sd3-medium"),
        "vae": Part("first_stage_model.", names.vae_table, configs.vae_config, "sd3-vae"),
        "text_encoder": Part(
            "text_encoders.clip_l.transformer.",
            sd3.unprojected_clip_table,
            sd3.unprojected_clip_config,
            "clip-l",
        ),
        "text_encoder_2": Part(
            "text_encoders.clip_g.transformer.",
            sd3.projected_clip_table,
            sd3.projected_clip_config,
            "openclip-bigg",
        ),
        "text_encoder_3": _t5("text_encoders.t5xxl.transformer."),
    },
    "FLUX": {
        "transformer": Part("model.diffusion_model.", flux_table, flux_config, "flux-dev"),
        "vae": Part("vae.", names.vae_table, configs.vae_config, "flux-vae"),
        "text_encoder": _clip("text_encoders.clip_l.transformer."),
        "text_encoder_2": _t5("text_encoders.t5xxl.transformer."),
    },
    "Z-Image": {
        "transformer": Part(
            "model.diffusion_model.", z_image.z_image_table, z_image.z_image_config, "z-image"
        ),
        "vae": Part("vae.", names.vae_table, configs.vae_config, "flux-vae"),
        "text_encoder": Part(
            "text_encoders.qwen3_4b.transformer.", z_image.qwen3_table, z_image.qwen3_config, "qwen3-4b"
        ),
    },
}
# How names begin that only the denoiser of a family has.
_SIGNS = {
    "model.diffusion_model.double_blocks.": "FLUX",
    "model.diffusion_model.joint_blocks.": "SD3",
    "model.diffusion_model.cap_pad_token": "Z-Image",
}
# FLUX and Z-Image come as files of one component, whose names have no prefix: how they begin.
_ALONE = {
    "double_blocks.": ("FLUX", "transformer"),
    "joint_blocks.": ("SD3", "transformer"),
    "cap_pad_token": ("Z-Image", "transformer"),
    "decoder.up.": ("FLUX", "vae"),
}
_TRANSFORMERS = {
    FluxTransformer2DConfig: "FLUX",
    SD3Transformer2DConfig: "SD3",
    ZImageTransformer2DConfig: "Z-Image",
}

# What files hold beside the components: the noise schedule, averages of weights, training losses, buffers.
_NOTHING_TO_LOAD = re.compile(
    r"(model_ema|first_stage_model\.(loss|model_ema)|denoiser)\..*"
    r"|betas|alphas_cumprod(_prev)?|(sqrt|log)_.*|posterior_.*|lvlb_weights|logvar|scale_factor"
    r"|edm_(mean|std)"
    r"|.*\.(position_ids|logit_scale|attn_mask)"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?"
    r"|text_encoders\.clip_l\.transformer\.text_projection\.weight"
    r"|text_encoders\.t5xxl\.transformer\.encoder\.embed_tokens\.weight"
    r"|(model\.diffusion_model\.)?norm_final\.weight|text_encoders\.qwen3_4b\.transformer\.lm_head\.weight"
)
# CLIP in files made with an early transformers, many fine-tunes of Stable Diffusion 1 among them.
_EARLY_CLIP = re.compile(r"^(cond_stage_model\.transformer\.)(?=(embeddings|encoder|final_layer_norm)\.)")
_LATENT_STATISTICS = {"edm_mean": "latents_mean", "edm_std": "latents_std"}  # of Playground v2.5


def load_single_file(path: Path | str, *, dtype: str | None = None) -> dict[str, tuple[nn.Module, dict]]:
    """Opens an original single file: name -> (module, params) for unet or transformer, vae, text_encoder,
    text_encoder_2, text_encoder_3: those that it holds.

    The file holds no config. Sizes are read from its shapes, the rest is that of the family's preset: heads
    of 64 (8 heads in Stable Diffusion 1), 32 groups, the published factors of the autoencoder (FLUX's, where
    it is alone in the file). Whether the U-Net predicts eps or v, the file does not tell. Of two sets of
    U-Net weights the plain one is loaded, not the average (`model_ema`). Stable Diffusion 2's last text
    layer, which nothing uses, is left out, and so is the projection of Stable Diffusion 3's smaller CLIP.

    Args:
      dtype: "float32", "bfloat16" or "float16", for the parameters and for what the modules compute in;
        None: float32.

    Raises:
      CheckpointError: no such file, a damaged or a pickled one; not one of the layouts; tensors missing,
        left over in a component, or of another shape, each named.
      UnknownNameError: another dtype.
    """
    stored = open_safetensors(path).tensors
    state = {_EARLY_CLIP.sub(r"\1text_model.", name): tensor for name, tensor in stored.items()}
    try:
        parts = _parts_of_file(state)
        components, used = {}, set()
        for name, part in parts.items():
            own = {
                key.removeprefix(part.prefix): tensor
                for key, tensor in state.items()
                if key.startswith(part.prefix)
            }
            if own:
                components[name], taken = _load_part(name, part, own, state, dtype)
                used |= {part.prefix + key for key in taken}
        _check_left_over(path, state, used, parts)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return components


def save_single_file(path: Path | str, components: Mapping[str, tuple[nn.Module, dict]]) -> None:
    """Writes components as one original file, the inverse of `load_single_file`; whole or not at all.

    Any of unet, transformer, vae, text_encoder, text_encoder_2, text_encoder_3. The text encoders say which
    layout it is: three of them, SD3; both, XL; only the second, XL's refiner; one of OpenCLIP ("gelu"), 2.x;
    otherwise 1.x. With the transformer of SD3, FLUX or Z-Image it is theirs, the last two as ComfyUI has
    them; FLUX's alone, or its autoencoder (one without `quant_conv`), gets the names of Black Forest Labs'
    own files, flux1-dev.safetensors and ae.safetensors, and Z-Image's alone those of its published file.

    Raises:
      UnknownNameError: a component of another name.
      CheckpointError: a tensor or a transformer that has no place in an original layout; an autoencoder alone
        with other factors than FLUX's.
      StorageError: disk full, no permission, a folder of that name.
    """
    parts = _parts_of_components(components)
    tensors: dict[str, Tensor] = {}
    for name, (module, params) in components.items():
        part = parts[one_of("component of a single file", name, parts)]
        original = names.to_original(published(params), part.table(module.config))
        tensors |= {part.prefix + key: tensor for key, tensor in original.items()}
        for key, field in _LATENT_STATISTICS.items():
            if getattr(module.config, field, None) is not None:
                tensors[key] = np.asarray(getattr(module.config, field), np.float32).reshape(1, -1, 1, 1)
    with storage_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_together({Path(path): safetensors_chunks(tensors)})


def _load_part(
    name: str, part: Part, own: dict[str, Tensor], state: Mapping[str, Tensor], dtype: str | None
) -> tuple[tuple[nn.Module, dict], set[str]]:
    """((module, params), the original names that were read)."""
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    try:
        config = part.config(shapes, models.PRESETS[part.preset])
    except KeyError as error:
        missing = f"{part.prefix}{error.args[0]}"
        raise CheckpointError(f"the {name} is not whole: it has no tensor {missing}") from error
    except InvalidArgumentError as error:
        raise CheckpointError(f"the {name} has shapes of no model: {error}") from error
    if name == "vae" and _LATENT_STATISTICS.keys() <= state.keys():
        found = {
            field: tuple(map(float, np.asarray(state[key]).ravel()))
            for key, field in _LATENT_STATISTICS.items()
        }
        scale = models.PRESETS["playground-vae"].scaling_factor
        config = dataclasses.replace(config, scaling_factor=scale, **found)
    module = models.from_config(config if dtype is None else dataclasses.replace(config, dtype=dtype))
    template = models.shapes(module)
    wanted, table = published(template), part.table(config)
    try:
        params = from_state_dict(names.from_original(own, wanted, table), template, dtype=dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    taken = {names.place_of(tensor, table).name for tensor in wanted}
    if part.table is names.openclip_table and not configs.has_projection(config):
        unused = rf"transformer\.resblocks\.{config.num_hidden_layers}\.|text_projection$"
        taken |= {key for key in own if re.match(unused, key)}
    return (module, params), taken


def _alone(family: str, name: str) -> dict[str, Part]:
    return {name: FAMILIES[family][name]._replace(prefix="")}


def _parts_of_file(state: Mapping[str, Tensor]) -> Mapping[str, Part]:
    for sign, (family, name) in _ALONE.items():
        if any(key.startswith(sign) for key in state):
            return _alone(family, name)
    return FAMILIES[_family_of_file(state)]


def _family_of_file(state: Mapping[str, Tensor]) -> str:
    """The family of the denoiser, or whose text encoders the file holds, or whose text the U-Net takes."""
    for sign, family in _SIGNS.items():
        if any(key.startswith(sign) for key in state):
            return family
    texts = {
        family: [part.prefix for name, part in parts.items() if name.startswith("text_encoder")]
        for family, parts in FAMILIES.items()
    }
    for family, prefixes in texts.items():
        if all(any(key.startswith(prefix) for key in state) for prefix in prefixes):
            return family
    unet = FAMILIES["1.x"]["unet"].prefix
    widths = {
        tensor.shape[-1]
        for key, tensor in state.items()
        if key.startswith(unet) and key.endswith(".attn2.to_k.weight")
    }
    for family, parts in FAMILIES.items():
        if "unet" in parts and widths == {models.PRESETS[parts["unet"].preset].cross_attention_dim}:
            return family
    raise CheckpointError(
        "not a single file of Stable Diffusion 1.x, 2.x, XL or 3, FLUX or Z-Image: it has no text encoder "
        "and no denoiser of these under their original names; its first tensors are "
        f"{', '.join(sorted(state)[:3]) or 'none at all'}"
    )


def _parts_of_components(components: Mapping[str, tuple[nn.Module, dict]]) -> Mapping[str, Part]:
    family = _family_of_components(components)
    if family in ("FLUX", "Z-Image") and len(components) == 1:
        if "vae" in components:
            _check_factors(components["vae"][0].config)
        return _alone(family, next(iter(components)))
    return FAMILIES[family]


def _check_factors(config: Any) -> None:
    """A file of an autoencoder alone does not hold its factors, and is read as FLUX's."""
    flux, given = ((of.scaling_factor, of.shift_factor) for of in (models.PRESETS["flux-vae"], config))
    if given != flux:
        raise CheckpointError(
            f"a file of an autoencoder alone is read with FLUX's scaling_factor and shift_factor, {flux}; "
            f"this one has {given}: save it as a folder (checkpoints.save), or together with its transformer"
        )


def _family_of_components(components: Mapping[str, tuple[nn.Module, dict]]) -> str:
    if "transformer" in components:
        config = components["transformer"][0].config
        if type(config) not in _TRANSFORMERS:
            raise CheckpointError(f"a {models.class_name(config)} has no original single-file layout here")
        return _TRANSFORMERS[type(config)]
    if "text_encoder_3" in components:
        return "SD3"
    if set(components) == {"vae"} and not components["vae"][0].config.use_quant_conv:
        return "FLUX"
    if "text_encoder_2" in components:
        return "XL" if "text_encoder" in components else "XL refiner"
    if "text_encoder" in components:
        return "2.x" if components["text_encoder"][0].config.hidden_act == "gelu" else "1.x"
    return "1.x"


def _check_left_over(
    path: Path | str, state: Mapping[str, Tensor], used: set[str], parts: Mapping[str, Part]
) -> None:
    left = sorted(key for key in state if key not in used and not _NOTHING_TO_LOAD.fullmatch(key))
    roots = tuple({part.prefix and part.prefix.split(".")[0] + "." for part in parts.values()})
    inside = [f"{key} {tuple(state[key].shape)}" for key in left if key.startswith(roots)]
    if inside:
        shown = inside[:8] + ([f"and {len(inside) - 8} more"] if len(inside) > 8 else [])
        raise CheckpointError("the weights do not fit the model: left over: " + "; ".join(shown))
    if left:
        warnings.warn(f"{path}: not loaded, of no component: {', '.join(left[:8])}", stacklevel=3)
