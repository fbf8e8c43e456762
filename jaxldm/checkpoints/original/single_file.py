"""Stable Diffusion, FLUX, Z-Image and Qwen-Image as one file, in the layout of the original code."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxldm import models
from jaxldm.arguments import a_dtype, a_path, checked, optional
from jaxldm.checkpoints.folder import check_stored
from jaxldm.checkpoints.gguf_file import open_gguf
from jaxldm.checkpoints.names import from_state_dict, published, several_networks
from jaxldm.checkpoints.original import autoencoder
from jaxldm.checkpoints.original.flux import FLUX
from jaxldm.checkpoints.original.flux2 import FLUX2
from jaxldm.checkpoints.original.layout import Component, Family, from_original, place_of, to_original
from jaxldm.checkpoints.original.packed import Codes, keep_codes, split_scales
from jaxldm.checkpoints.original.qwen_image import QWEN_IMAGE
from jaxldm.checkpoints.original.stable_diffusion import SD1, SD2, SDXL, SDXL_REFINER
from jaxldm.checkpoints.original.stable_diffusion_3 import SD3
from jaxldm.checkpoints.original.z_image import Z_IMAGE
from jaxldm.checkpoints.safetensors_file import Tensor, open_safetensors, safetensors_chunks
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.files import write_atomically
from jaxldm.reading import reading

# The first whose names a file has: FLUX.2 has double blocks, too.
FAMILIES = {
    family.name: family for family in (SD1, SD2, SDXL, SDXL_REFINER, SD3, FLUX2, FLUX, Z_IMAGE, QWEN_IMAGE)
}
# What files hold besides components: noise schedules, averages of weights, training losses, buffers.
_TRAINING_LEFTOVERS = (
    r"(model_ema|first_stage_model\.(loss|model_ema)|denoiser)\..*"
    r"|betas|alphas_cumprod(_prev)?|(sqrt|log)_.*|posterior_.*|lvlb_weights|logvar|scale_factor"
    r"|.*\.(position_ids|logit_scale|attn_mask)"
)


@checked(path=a_path, dtype=optional(a_dtype))
def load_single_file(path: Path | str, *, dtype: str | None = None) -> dict[str, tuple[nn.Module, dict]]:
    """Opens an original single file.

    The file holds no config. Sizes are read from its shapes, the rest is that of the family's preset: heads
    of width 64 (8 heads in Stable Diffusion 1), 32 groups, the published factors of the autoencoder. The
    tensors of an autoencoder alone tell Stable Diffusion (4 channels) from FLUX (16), but not XL from 1 or
    SD3 from FLUX: those need a `dataclasses.replace(config, scaling_factor=...)`, unless `save_single_file`
    wrote the file, whose metadata hold the factors. The file does not say whether the U-Net predicts eps or
    v. Of two sets of U-Net weights the plain one is loaded, not the average (`model_ema`). The last text
    layer of Stable Diffusion 2, which nothing uses, is left out, and so is the projection of Stable Diffusion
    3's smaller CLIP. Weights in 8 or 4 bits (`packed`) stay so inside of the blocks of the denoising network.

    Args:
        path: a .safetensors file, or a .gguf file of FLUX, FLUX.2, SD 3, Z-Image or Qwen-Image (F32, F16,
            BF16, Q8_0, Q4_0 and others).
        dtype: "float32", "bfloat16" or "float16", for the parameters and for the computation; None is
            float32.

    Returns:
        name -> (module, params), for those of unet, transformer, vae, text_encoder, text_encoder_2 and
        text_encoder_3 that the file holds.

    Raises:
        CheckpointError: no such file, a damaged or a pickled one; not one of the layouts; tensors missing,
            left over in a component, or of another shape, which it names.
        UnknownNameError: another dtype.
    """
    if Path(path).suffix == ".gguf":
        stored, metadata = open_gguf(path), {}
        codes = Codes({name: tensor for name, tensor in stored.items() if tensor.kind}, {})
    else:
        stored, metadata = open_safetensors(path)
        with reading(path):
            stored, codes = split_scales(stored)
    with reading(path):
        family, bare = _family_of_file(stored)
        state = {family.rename(name): tensor for name, tensor in stored.items()}
        components = _bare(family, bare) if bare else family.components
        loaded, used = {}, set()
        for name, component in components.items():
            own = {
                key.removeprefix(component.prefix): tensor
                for key, tensor in state.items()
                if key.startswith(component.prefix)
            }
            if own:
                own_codes = _codes_of(component, family, codes)
                loaded[name], read = _load_component(name, component, own, state, own_codes, metadata, dtype)
                used |= {component.prefix + key for key in read}
        left = _left_over(family, components, state.keys() - used, state)
    if left:
        warnings.warn(f"{path}: not loaded, of no component: {', '.join(left[:8])}", stacklevel=2)
    return loaded


@checked(path=a_path, components=several_networks)
def save_single_file(path: Path | str, components: Mapping[str, tuple[nn.Module, dict]]) -> None:
    """Writes components as one original file, the inverse of `load_single_file`; all of it or nothing.

    The layout follows from the components. A transformer has that of its own family. Without one, three text
    encoders have SD3's layout; two, XL's; the second alone, that of XL's refiner; one OpenCLIP ("gelu"),
    2.x's; all others, 1.x's. FLUX, FLUX.2, Z-Image and Qwen-Image are written as ComfyUI has them; a
    component of theirs alone, and any autoencoder alone, with the names of the published files of that
    component (flux1-dev.safetensors, ae.safetensors). The autoencoder's factors are metadata of the file,
    which other programs ignore.

    Args:
        path: the file to write.
        components: any of unet, transformer, vae, text_encoder, text_encoder_2, text_encoder_3.

    Raises:
        UnknownNameError: a component of another name.
        CheckpointError: a tensor or a transformer that has no place in an original layout.
        StorageError: disk full, no permission, a folder of that name.
    """
    family = _family_of_components(components)
    layout = family.components
    alone = next(iter(components)) if len(components) == 1 else None
    if alone is not None and family.writes_bare and alone in family.bare:
        layout = _bare(family, alone)
    tensors: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    for name, (module, params) in components.items():
        component = layout[one_of("component of a single file", name, layout)]
        original = to_original(published(params), component.table(module.config))
        tensors |= {component.prefix + key: tensor for key, tensor in original.items()}
        if name == "vae":
            tensors |= autoencoder.statistics(module.config)
            metadata |= autoencoder.factors(module.config)
    write_atomically(path, safetensors_chunks(tensors, metadata))


def _bare(family: Family, name: str) -> dict[str, Component]:
    """The only component of a file whose names have no prefix."""
    return {name: family.components[name]._replace(prefix="")}


def _load_component(
    name: str,
    component: Component,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    codes: Codes,
    metadata: Mapping[str, str],
    dtype: str | None,
) -> tuple[tuple[nn.Module, dict], set[str]]:
    """((module, params), the original names that were read)."""
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    try:
        config: Any = component.config(shapes, models.PRESETS[component.preset])
        if name == "vae":
            config = autoencoder.with_factors(autoencoder.with_statistics(config, state), metadata)
    except KeyError as error:
        missing = f"{component.prefix}{error.args[0]}"
        raise CheckpointError(f"the {name} is not whole: it has no tensor {missing}") from error
    except InvalidArgumentError as error:
        raise CheckpointError(f"the {name} has shapes of no model: {error}") from error
    check_stored(config, own)
    module = models.from_config(config if dtype is None else dataclasses.replace(config, dtype=dtype))
    template = models.shapes(module)
    wanted, table = published(template), component.table(config)
    try:
        numbers = from_original(own, wanted, table)
        template, numbers = keep_codes(module, template, numbers, table, codes)
        params = from_state_dict(numbers, template, dtype=dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    read = {place_of(tensor, table).name for tensor in wanted}
    unused = component.unused(config)
    if unused is not None:
        read |= {key for key in own if re.match(unused, key)}
    return (module, params), read


def _codes_of(component: Component, family: Family, codes: Codes) -> Codes:
    """The quantised weights of a component, by their names in it."""

    def own(values: Mapping[str, Any]) -> dict[str, Any]:
        renamed = {family.rename(name): value for name, value in values.items()}
        start = component.prefix
        return {name.removeprefix(start): value for name, value in renamed.items() if name.startswith(start)}

    return Codes(own(codes.weights), own(codes.scales))


def _family_of_file(state: Mapping[str, Tensor]) -> tuple[Family, str | None]:
    """(family, the only component where the names have no prefix).

    Recognised by names that only this component or this denoiser has, else by the prefixes of the text
    encoders, else by the width of the text that the U-Net takes.
    """
    for family in FAMILIES.values():
        for name, start in family.bare.items():
            if _has(state, start):
                shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
                of_sd = name == "vae" and autoencoder.is_of_stable_diffusion(shapes)
                return SD1 if of_sd else family, name
    for family in FAMILIES.values():
        if family.signature is not None and _has(state, family.signature):
            return family, None
    for family in FAMILIES.values():
        encoders = [part for name, part in family.components.items() if name.startswith("text_encoder")]
        if encoders and all(_has(state, part.prefix) for part in encoders):
            return family, None
    widths = {
        tuple(tensor.shape)[-1:]
        for key, tensor in state.items()
        if key.startswith(SD1.components["unet"].prefix) and key.endswith(".attn2.to_k.weight")
    }
    for family in FAMILIES.values():
        if "unet" not in family.components:
            continue
        preset: Any = models.PRESETS[family.components["unet"].preset]
        if widths == {(preset.cross_attention_dim,)}:
            return family, None
    roots = {key.split(".")[0] for key in state}
    if roots == {"first_stage_model"}:  # an autoencoder alone, as earlier versions wrote it
        return SD1 if "first_stage_model.quant_conv.weight" in state else SD3, None
    raise CheckpointError(
        "not a single file of Stable Diffusion, FLUX, FLUX.2, Z-Image or Qwen-Image: it has no text encoder "
        "and no denoiser of these under their original names; its first tensors are "
        f"{', '.join(sorted(state)[:3]) or 'none at all'}"
    )


def _has(state: Mapping[str, Tensor], start: str) -> bool:
    return any(key.startswith(start) for key in state)


def _family_of_components(components: Mapping[str, tuple[nn.Module, dict]]) -> Family:
    configs: dict[str, Any] = {name: module.config for name, (module, _) in components.items()}
    if "transformer" in configs:
        kind = type(configs["transformer"])
        for family in FAMILIES.values():
            transformer = family.components.get("transformer")
            if transformer and type(models.PRESETS[transformer.preset]) is kind:
                return family
        name = models.class_name(configs["transformer"])
        raise CheckpointError(f"a {name} has no original single-file layout here")
    if "text_encoder_3" in configs:
        return SD3
    if configs.keys() == {"vae"}:
        return FLUX
    if "text_encoder_2" in configs:
        return SDXL if "text_encoder" in configs else SDXL_REFINER
    if "text_encoder" in configs and configs["text_encoder"].hidden_act == "gelu":
        return SD2
    return SD1


def _left_over(
    family: Family, components: Mapping[str, Component], unread: set[str], state: Mapping[str, Tensor]
) -> list[str]:
    """The names of unread tensors of no component. Raises `CheckpointError` for those within one."""
    ignored = re.compile("|".join(filter(None, (_TRAINING_LEFTOVERS, family.ignored))))
    left = sorted(key for key in unread if not ignored.fullmatch(key))
    roots = tuple({part.prefix and part.prefix.split(".")[0] + "." for part in components.values()})
    inside = [f"{key} {tuple(state[key].shape)}" for key in left if key.startswith(roots)]
    if inside:
        shown = inside[:8] + ([f"and {len(inside) - 8} more"] if len(inside) > 8 else [])
        raise CheckpointError("the weights do not fit the model: left over: " + "; ".join(shown))
    return left
