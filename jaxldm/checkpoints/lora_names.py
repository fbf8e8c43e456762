"""Every name under which programs know the modules of a model, and what of the model each of them is.

| written by | the U-Net's module `down_blocks.0.attentions.1...attn1.to_q` is |
|---|---|
| kohya's scripts | `lora_unet_down_blocks_0_attentions_1_..._to_q` |
| the same for XL | `lora_unet_input_blocks_4_1_...`: the names of the original files |
| diffusers, PEFT | `unet.down_blocks.0.attentions.1...attn1.to_q` |
| older diffusers | the same, with `.processor.to_q_lora` at its end |
| ComfyUI and others | `diffusion_model.input_blocks.4.1...`, or diffusers' names behind the same prefix |
| LyCORIS, OneTrainer | `lycoris_down_blocks_0_...`, `lora_transformer_...` |
| Black Forest Labs | `double_blocks.0.img_attn.qkv`, and whole scales of norms |
| XLabs (FLUX) | `double_blocks.0.processor.qkv_lora1`: of the image 1, of the text 2 |

In the original files of FLUX, SD 3 and Z-Image queries, keys and values are one matrix (in single blocks of
FLUX.1 with the first one of the feed-forward): a layer of it changes three or four modules here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
from flax import traverse_util

from jaxldm.checkpoints.names import ENCODER_PREFIXES, PublishedTensor, published_whole
from jaxldm.checkpoints.original.flux import flux_table
from jaxldm.checkpoints.original.flux2 import flux2_table
from jaxldm.checkpoints.original.layout import SAME, Form, Table, place_of, rows
from jaxldm.checkpoints.original.stable_diffusion import unet_table
from jaxldm.checkpoints.original.stable_diffusion_3 import sd3_table
from jaxldm.checkpoints.original.z_image import z_image_table
from jaxldm.errors import CheckpointError
from jaxldm.models.flux2_transformer_2d import Flux2Transformer2DConfig
from jaxldm.models.flux_transformer_2d import FluxTransformer2DConfig
from jaxldm.models.sd3_transformer_2d import SD3Transformer2DConfig
from jaxldm.models.unet_2d_condition import UNet2DConditionConfig
from jaxldm.models.z_image_transformer_2d import ZImageTransformer2DConfig

# What kohya's names begin with, for each component.
KOHYA = {
    "unet": ("lora_unet_", "lycoris_"),
    "transformer": ("lora_unet_", "lora_transformer_", "lycoris_"),
    "prior": (),  # Wuerstchen's, of which only diffusers has files
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
COMPONENT_NAMES = tuple(KOHYA)
DENOISERS = ("unet", "transformer", "prior")
ORIGINAL_PREFIXES = ("diffusion_model.", "model.diffusion_model.")
# Of text encoders in original files and ComfyUI, for each component.
_ENCODERS = {
    "text_encoder": ("clip_l", "clip_h", "qwen3_4b"),
    "text_encoder_2": ("clip_g", "t5xxl"),
    "text_encoder_3": ("t5xxl",),
}
_TABLES = {
    UNet2DConditionConfig: unet_table,
    FluxTransformer2DConfig: flux_table,
    Flux2Transformer2DConfig: flux2_table,
    SD3Transformer2DConfig: sd3_table,
    ZImageTransformer2DConfig: z_image_table,
}
_LEAVES = ("weight", "bias")
# Modules of blocks of FLUX's original files -> what XLabs calls the layer that changes them.
_XLABS = {
    **{"img_attn.qkv": "qkv_lora1", "img_attn.proj": "proj_lora1"},
    **{"txt_attn.qkv": "qkv_lora2", "txt_attn.proj": "proj_lora2"},
    **{"linear1": "qkv_lora", "linear2": "proj_lora"},
}


class Target(NamedTuple):
    """What a module of a file is in the model: published tensors that make up its weight, and its bias.

    Attributes:
        component: "unet", ...
        weight: the tensors, each with how it is stored in the file's layout.
        bias: the same.
    """

    component: str
    weight: tuple[tuple[PublishedTensor, Form], ...] = ()
    bias: tuple[tuple[PublishedTensor, Form], ...] = ()


def targets(networks: Mapping[str, tuple[nn.Module, dict]]) -> dict[str, Target]:
    """Every spelling of every module -> what it is."""
    found: dict[str, Target] = {}
    for component, (network, params) in networks.items():
        bare = component in DENOISERS or len(networks) == 1
        modules, originals = _modules(
            component, network.config, published_whole(traverse_util.flatten_dict(params))
        )
        for module, target in modules.items():
            for spelling in _spellings(component, module, bare):
                found.setdefault(spelling, target)
        for module, target in originals.items():
            for spelling in _original_spellings(component, module, bare):
                found.setdefault(spelling, target)
    return found


def _modules(
    component: str, config: Any, tensors: Mapping[str, PublishedTensor]
) -> tuple[dict[str, Target], dict[str, Target]]:
    """(modules by their published names, modules by the names of original files where there are some)."""
    table: Table = next((make(config) for kind, make in _TABLES.items() if type(config) is kind), {})
    modules: dict[str, Target] = {}
    parts: dict[str, dict[str, list[tuple[PublishedTensor, Form]]]] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in _LEAVES or not module:
            continue
        target = modules.get(module, Target(component))
        modules[module] = target._replace(**{leaf: ((tensor, SAME),)})
        try:
            place = place_of(name, table)
        except CheckpointError:  # the original layout does not have it
            continue
        original, _, there = place.name.rpartition(".")
        if there == leaf or (leaf, there) == ("weight", "scale"):  # of a norm
            parts.setdefault(original, {}).setdefault(leaf, []).append((tensor, place.form))
    originals = {
        original: Target(component, **{leaf: _in_order(each) for leaf, each in leaves.items()})
        for original, leaves in parts.items()
    }
    if type(config) is FluxTransformer2DConfig:
        originals |= dict(_of_xlabs(originals))
    return modules, originals


def _of_xlabs(originals: Mapping[str, Target]) -> Iterator[tuple[str, Target]]:
    """XLabs' names of modules of FLUX; in single blocks, of queries, keys and values alone."""
    for name, target in originals.items():
        kind, _, rest = name.partition(".")
        number, _, module = rest.partition(".")
        if kind not in ("double_blocks", "single_blocks") or module not in _XLABS:
            continue
        if module == "linear1":
            weight, bias = (
                tuple((tensor, rows(part)) for part, (tensor, _) in enumerate(leaf[:3]))
                for leaf in (target.weight, target.bias)
            )
            target = target._replace(weight=weight, bias=bias)
        yield f"{kind}.{number}.{_XLABS[module]}", target


def _in_order(parts: Iterable[tuple[PublishedTensor, Form]]) -> tuple[tuple[PublishedTensor, Form], ...]:
    return tuple(sorted(parts, key=lambda part: part[1].part))


def _spellings(component: str, module: str, bare: bool) -> Iterator[str]:
    names = {module, *(module.removeprefix(prefix) for prefix in ENCODER_PREFIXES)}
    if not module.startswith(ENCODER_PREFIXES):
        names |= {prefix + module for prefix in ENCODER_PREFIXES}
    yield from (f"{component}.{name}" for name in names)
    if bare:
        yield from names
    if component in DENOISERS:
        yield from (f"{prefix}{module}" for prefix in ORIGINAL_PREFIXES)
    for encoder in _ENCODERS.get(component, ()):
        yield from (f"text_encoders.{encoder}.transformer.{name}" for name in names)
    for prefix in (*KOHYA.get(component, ()), *(("lora_te3_",) if component == "text_encoder_2" else ())):
        yield from (prefix + name.replace(".", "_") for name in names)


def _original_spellings(component: str, module: str, bare: bool) -> Iterator[str]:
    yield f"{component}.{module}"
    if bare:
        yield module
    yield from (f"{prefix}{module}" for prefix in ORIGINAL_PREFIXES)
    yield from (prefix + module.replace(".", "_") for prefix in KOHYA.get(component, ()))


def component_of(module: str) -> str:
    """The component of a module by its name in the file: "unet", where it is the denoiser's or not named."""
    for component, prefixes in KOHYA.items():
        if module.startswith(prefixes):
            return component
    for component, encoders in _ENCODERS.items():
        if module.startswith(tuple(f"text_encoders.{encoder}." for encoder in encoders)):
            return component
    first = module.split(".")[0]
    return first if first in KOHYA else "unet"
