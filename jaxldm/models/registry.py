"""Models by name: presets, building, initialising and counting parameters, configs as dictionaries."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
from flax import traverse_util
from jaxtyping import PRNGKeyArray

from jaxldm import entries as entries_of
from jaxldm.arguments import a_module, a_params, checked, instance, one_key
from jaxldm.entries import known_names, read_value
from jaxldm.errors import CheckpointError, InvalidArgumentError, Table, UnknownNameError, one_of
from jaxldm.models import (
    adaptive_depth_dit,
    autoencoder_asym_kl,
    autoencoder_conv,
    autoencoder_dc,
    autoencoder_kl,
    autoencoder_kl_flux2,
    autoencoder_kl_qwen_image,
    autoencoder_tiny,
    bert,
    clip,
    clip_text,
    clip_vision,
    consistency_decoder_vae,
    controlnet,
    d2it,
    deepfloyd_if,
    digit_classifier,
    dinov2,
    dit,
    dit_transformer_2d,
    dydit,
    flux2_transformer_2d,
    flux_controlnet,
    flux_transformer_2d,
    k_unet_2d_condition,
    ldm_bert,
    maskgit_transformer,
    mistral,
    ncsnpp,
    paella_vq_model,
    patch_discriminator,
    pixart_transformer_2d,
    qwen2_5_vl,
    qwen3,
    qwen_image_transformer_2d,
    sd3_controlnet,
    sd3_transformer_2d,
    siglip_vision,
    sit,
    stable_diffusion_unets,
    t2i_adapter,
    t5_encoder,
    token_pruning_dit,
    unet_2d,
    unet_2d_condition,
    uvit_2d,
    vq_model,
    wuerstchen_diffnext,
    wuerstchen_prior,
    z_image_transformer_2d,
)
from jaxldm.models.config import ModelConfig
from jaxldm.models.inputs import SCALAR_INPUTS
from jaxldm.nn.initialization import init_params, shapes_of
from jaxldm.reading import reading, reason, shown

# A new architecture adds one line here and one to PRESETS. The key is the `_class_name` of its config.json.
ARCHITECTURES: dict[str, tuple[type[nn.Module], type[ModelConfig]]] = {
    "UNet2DModel": (unet_2d.UNet2DModel, unet_2d.UNet2DConfig),
    "UNet2DConditionModel": (
        unet_2d_condition.UNet2DConditionModel,
        unet_2d_condition.UNet2DConditionConfig,
    ),
    "ControlNetModel": (controlnet.ControlNetModel, controlnet.ControlNetConfig),
    "FluxControlNetModel": (flux_controlnet.FluxControlNetModel, flux_controlnet.FluxControlNetConfig),
    "SD3ControlNetModel": (sd3_controlnet.SD3ControlNetModel, sd3_controlnet.SD3ControlNetConfig),
    "T2IAdapter": (t2i_adapter.T2IAdapter, t2i_adapter.T2IAdapterConfig),
    "DiT": (dit.DiT, dit.DiTConfig),
    "SiT": (sit.SiT, sit.SiTConfig),
    "DyDiT": (dydit.DyDiT, dydit.DyDiTConfig),
    "AdaptiveDepthDiT": (
        adaptive_depth_dit.AdaptiveDepthDiT,
        adaptive_depth_dit.AdaptiveDepthDiTConfig,
    ),
    "TokenPruningDiT": (token_pruning_dit.TokenPruningDiT, token_pruning_dit.TokenPruningDiTConfig),
    "D2iT": (d2it.D2iT, d2it.D2iTConfig),
    "DiTTransformer2DModel": (
        dit_transformer_2d.DiTTransformer2DModel,
        dit_transformer_2d.DiTTransformer2DConfig,
    ),
    "FluxTransformer2DModel": (
        flux_transformer_2d.FluxTransformer2DModel,
        flux_transformer_2d.FluxTransformer2DConfig,
    ),
    "Flux2Transformer2DModel": (
        flux2_transformer_2d.Flux2Transformer2DModel,
        flux2_transformer_2d.Flux2Transformer2DConfig,
    ),
    "PixArtTransformer2DModel": (
        pixart_transformer_2d.PixArtTransformer2DModel,
        pixart_transformer_2d.PixArtTransformer2DConfig,
    ),
    "SD3Transformer2DModel": (
        sd3_transformer_2d.SD3Transformer2DModel,
        sd3_transformer_2d.SD3Transformer2DConfig,
    ),
    "ConvAutoencoder": (autoencoder_conv.ConvAutoencoder, autoencoder_conv.ConvAutoencoderConfig),
    "AutoencoderKL": (autoencoder_kl.AutoencoderKL, autoencoder_kl.AutoencoderKLConfig),
    "AutoencoderKLFlux2": (
        autoencoder_kl_flux2.AutoencoderKLFlux2,
        autoencoder_kl_flux2.AutoencoderKLFlux2Config,
    ),
    "AutoencoderKLQwenImage": (
        autoencoder_kl_qwen_image.AutoencoderKLQwenImage,
        autoencoder_kl_qwen_image.AutoencoderKLQwenImageConfig,
    ),
    "AsymmetricAutoencoderKL": (
        autoencoder_asym_kl.AsymmetricAutoencoderKL,
        autoencoder_asym_kl.AsymmetricAutoencoderKLConfig,
    ),
    "AutoencoderDC": (autoencoder_dc.AutoencoderDC, autoencoder_dc.AutoencoderDCConfig),
    "AutoencoderTiny": (autoencoder_tiny.AutoencoderTiny, autoencoder_tiny.AutoencoderTinyConfig),
    "CLIPModel": (clip.CLIPModel, clip.CLIPConfig),
    "CLIPTextModel": (clip_text.CLIPTextModel, clip_text.CLIPTextConfig),
    "CLIPTextModelWithProjection": (
        clip_text.CLIPTextModelWithProjection,
        clip_text.CLIPTextWithProjectionConfig,
    ),
    "CLIPVisionModelWithProjection": (
        clip_vision.CLIPVisionModelWithProjection,
        clip_vision.CLIPVisionConfig,
    ),
    "ConsistencyDecoderVAE": (
        consistency_decoder_vae.ConsistencyDecoderVAE,
        consistency_decoder_vae.ConsistencyDecoderVAEConfig,
    ),
    "Dinov2Model": (dinov2.Dinov2Model, dinov2.Dinov2Config),
    "T5EncoderModel": (t5_encoder.T5EncoderModel, t5_encoder.T5EncoderConfig),
    "T5ForConditionalGeneration": (t5_encoder.T5EncoderModel, t5_encoder.T5EncoderConfig),  # its encoder
    "Qwen3Model": (qwen3.Qwen3Model, qwen3.Qwen3Config),
    "Qwen3ForCausalLM": (qwen3.Qwen3Model, qwen3.Qwen3Config),  # without its last layer
    "Qwen2_5_VLTextModel": (qwen2_5_vl.Qwen2_5_VLTextModel, qwen2_5_vl.Qwen2_5_VLTextConfig),
    "Qwen2_5_VLForConditionalGeneration": (  # its language model, without its last layer
        qwen2_5_vl.Qwen2_5_VLTextModel,
        qwen2_5_vl.Qwen2_5_VLTextConfig,
    ),
    "MistralModel": (mistral.MistralModel, mistral.MistralConfig),
    "MistralForCausalLM": (mistral.MistralModel, mistral.MistralConfig),  # without its last layer
    # Its language model, without its last layer.
    "Mistral3ForConditionalGeneration": (mistral.MistralModel, mistral.MistralConfig),
    "QwenImageTransformer2DModel": (
        qwen_image_transformer_2d.QwenImageTransformer2DModel,
        qwen_image_transformer_2d.QwenImageTransformer2DConfig,
    ),
    "ZImageTransformer2DModel": (
        z_image_transformer_2d.ZImageTransformer2DModel,
        z_image_transformer_2d.ZImageTransformer2DConfig,
    ),
    "BertModel": (bert.BertModel, bert.BertConfig),
    "SiglipVisionModel": (siglip_vision.SiglipVisionModel, siglip_vision.SiglipVisionConfig),
    "ReduxImageEncoder": (siglip_vision.ReduxImageEncoder, siglip_vision.ReduxImageEncoderConfig),
    "LDMBertModel": (ldm_bert.LDMBertModel, ldm_bert.LDMBertConfig),
    "MaskGITTransformer": (
        maskgit_transformer.MaskGITTransformer,
        maskgit_transformer.MaskGITTransformerConfig,
    ),
    "UVit2DModel": (uvit_2d.UVit2DModel, uvit_2d.UVit2DConfig),
    "VQModel": (vq_model.VQModel, vq_model.VQModelConfig),
    "WuerstchenPrior": (wuerstchen_prior.WuerstchenPrior, wuerstchen_prior.WuerstchenPriorConfig),
    "WuerstchenDiffNeXt": (
        wuerstchen_diffnext.WuerstchenDiffNeXt,
        wuerstchen_diffnext.WuerstchenDiffNeXtConfig,
    ),
    "PaellaVQModel": (paella_vq_model.PaellaVQModel, paella_vq_model.PaellaVQModelConfig),
    "DigitClassifier": (digit_classifier.DigitClassifier, digit_classifier.DigitClassifierConfig),
    "PatchDiscriminator": (
        patch_discriminator.PatchDiscriminator,
        patch_discriminator.PatchDiscriminatorConfig,
    ),
}

# Networks of the same `_class_name` as another: (whether a config.json is of it, module, config).
VARIANTS: dict[str, tuple[Callable[[Mapping[str, Any]], bool], type[nn.Module], type[ModelConfig]]] = {
    "UNet2DConditionModel": (
        k_unet_2d_condition.has_k_blocks,
        k_unet_2d_condition.KUNet2DConditionModel,
        k_unet_2d_condition.KUNet2DConditionConfig,
    ),
    "UNet2DModel": (ncsnpp.has_skip_blocks, ncsnpp.NCSNppModel, ncsnpp.NCSNppConfig),
}

# DiTs with routers, which are trained by a recipe of their own (`training.DynamicRecipe`).
DYNAMIC = ("DyDiT", "AdaptiveDepthDiT", "TokenPruningDiT", "D2iT")

# Submodules of inputs that a network takes besides those of its teacher, see `init_from`.
FURTHER = {f"{name}_{kind}" for name in SCALAR_INPUTS for kind in ("embedding", "embedder")} | {
    *("cond_proj", "time_router", "token_router", "grain_block", "grain_head", "grain_embedding"),
    *("fine_embedder", "fine_final_layer"),
}

# Today's class of a `Transformer2DModel` in older folders, by its norm_type.
TRANSFORMER_2D_MODELS = {
    "ada_norm_zero": "DiTTransformer2DModel",
    "ada_norm_single": "PixArtTransformer2DModel",
}

PRESETS: dict[str, ModelConfig] = Table("preset")
PRESETS |= {
    **autoencoder_conv.PRESETS,
    **unet_2d.PRESETS,
    **stable_diffusion_unets.PRESETS,
    **controlnet.PRESETS,
    **flux_controlnet.PRESETS,
    **sd3_controlnet.PRESETS,
    **t2i_adapter.PRESETS,
    **deepfloyd_if.PRESETS,
    **dit.PRESETS,
    **sit.PRESETS,
    **dydit.PRESETS,
    **adaptive_depth_dit.PRESETS,
    **token_pruning_dit.PRESETS,
    **d2it.PRESETS,
    **flux_transformer_2d.PRESETS,
    **flux2_transformer_2d.PRESETS,
    **pixart_transformer_2d.PRESETS,
    **sd3_transformer_2d.PRESETS,
    **autoencoder_kl.PRESETS,
    **autoencoder_kl_flux2.PRESETS,
    **autoencoder_kl_qwen_image.PRESETS,
    **autoencoder_tiny.PRESETS,
    **autoencoder_asym_kl.PRESETS,
    **autoencoder_dc.PRESETS,
    **consistency_decoder_vae.PRESETS,
    **vq_model.PRESETS,
    **maskgit_transformer.PRESETS,
    **uvit_2d.PRESETS,
    **wuerstchen_prior.PRESETS,
    **wuerstchen_diffnext.PRESETS,
    **paella_vq_model.PRESETS,
    **digit_classifier.PRESETS,
    **patch_discriminator.PRESETS,
    **clip_text.PRESETS,
    **clip_vision.PRESETS,
    **dinov2.PRESETS,
    **t5_encoder.PRESETS,
    **qwen3.PRESETS,
    **qwen2_5_vl.PRESETS,
    **mistral.PRESETS,
    **qwen_image_transformer_2d.PRESETS,
    **z_image_transformer_2d.PRESETS,
    **bert.PRESETS,
    **ldm_bert.PRESETS,
    **siglip_vision.PRESETS,
}


A_MODEL_CONFIG = instance(ModelConfig, "a config of a model, such as models.DiTConfig(...)")


@checked(config=A_MODEL_CONFIG)
def class_name(config: ModelConfig) -> str:
    """The architecture that a config belongs to."""
    return _entry(config)[0]


@checked(config=A_MODEL_CONFIG)
def from_config(config: ModelConfig) -> nn.Module:
    """The module that a config describes."""
    return _entry(config)[1](config)


def _entry(config: ModelConfig) -> tuple[str, Any]:
    """(the name, the module) of the architecture."""
    kinds = [(name, module, kind) for name, (module, kind) in ARCHITECTURES.items()]
    kinds += [(name, module, kind) for name, (_, module, kind) in VARIANTS.items()]
    return next((name, module) for name, module, kind in kinds if type(config) is kind)


def build(name: str, **overrides: Any) -> nn.Module:
    """The preset called `name`, with fields of its config replaced.

    Example: `build("tiny-dit", sample_size=7, in_channels=4, patch_size=1)`.

    Raises:
        UnknownNameError: no preset of that name, or no such field in its config.
        InvalidArgumentError: a value that its field cannot have.
    """
    config = PRESETS[one_of("preset", name, PRESETS)]
    kinds = entries_of.field_types(type(config))
    for key in overrides:
        if key not in kinds:
            raise UnknownNameError(f"field of {type(config).__name__}", key, kinds)
    try:
        changed = dataclasses.replace(config, **overrides)
    except ArithmeticError as error:  # of the config's own checks: a width of 0
        given = ", ".join(f"{key}={shown(value)}" for key, value in overrides.items())
        raise InvalidArgumentError(f"{name} cannot have {given}: {reason(error)}") from error
    return from_config(changed)


@checked(module=a_module, key=one_key)
def init(module: nn.Module, key: PRNGKeyArray) -> dict:
    """Fresh float32 parameters of a module: the nested dictionary inside `{"params": ...}`."""
    return init_params(module, key, *module.example_inputs())


@checked(module=a_module, key=one_key, params=a_params)
def init_from(module: nn.Module, key: PRNGKeyArray, params: Mapping[str, Any]) -> dict:
    """Parameters of a module with further inputs or routers that begin as those of a network without them.

    A network takes further numbers as its config says: `scalar_inputs` of `UNet2DModel`, `DiT` and `SiT`,
    `time_cond_proj_dim` of `UNet2DConditionModel`. What such a number adds to the embedding of the time is
    zero at first, so that the student computes what its teacher does, whatever the numbers. Routers of a
    dynamic DiT (`DyDiT` and others) are open at first.

    >>> import dataclasses, jax
    >>> from jaxldm import models
    >>> teacher = models.build("tiny-dit", depth=1)
    >>> student = models.build("tiny-dit", depth=1, scalar_inputs=("guidance_scale",))
    >>> params = models.init(teacher, jax.random.key(0))
    >>> sorted(models.init_from(student, jax.random.key(1), params).keys() - params.keys())
    ['guidance_scale_embedder']

    Args:
        module: with the further inputs.
        key: draws the first layers of their embeddings.
        params: of the network without them, unchanged in the result.

    Raises:
        InvalidArgumentError: the parameters are of a network that differs in more than these inputs.
    """
    wanted = cast(dict[Any, Any], traverse_util.flatten_dict(shapes(module)))
    given = cast(dict[Any, Any], traverse_util.flatten_dict(params))
    new = {path for path in wanted.keys() - given.keys() if FURTHER & set(path)}
    odd = [path for path in given.keys() - wanted.keys()] or [*wanted.keys() - given.keys() - new]
    odd = odd or [path for path in given if tuple(given[path].shape) != wanted[path].shape]
    if odd:
        path = min(odd)
        own, other = (f"{list(tree[path].shape)}" if path in tree else "none" for tree in (wanted, given))
        raise InvalidArgumentError(
            f"params do not fit this {type(module).__name__}: of {'/'.join(path)} it has {own}, they have "
            f"{other}; give those of a network that differs in its further inputs alone"
        )
    fresh = init_params(module, key, *cast(Any, module).example_inputs(), wanted=new.__contains__)
    fresh = cast(dict[Any, Any], traverse_util.flatten_dict(fresh))
    return traverse_util.unflatten_dict({path: given.get(path, fresh.get(path)) for path in wanted})


@checked(module=a_module)
def shapes(module: nn.Module) -> dict:
    """The parameters' shapes and dtypes as `jax.ShapeDtypeStruct`, computed without memory for them.

    Those of equal modules are found once: tracing a U-Net of Stable Diffusion takes seconds, and a folder
    that is opened asks several times.
    """
    x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    return jax.tree.map(lambda leaf: leaf, _shapes_once(module, x64))


@functools.lru_cache(maxsize=256)
def _shapes_once(module: nn.Module, x64: bool) -> dict:  # the dtypes depend on x64
    return shapes_of(module, *cast(Any, module).example_inputs())["params"]


def a_name_or_module(name: str, value: Any) -> Any:
    """A module, or the name of a preset, of which its module is made."""
    return build(value) if isinstance(value, str) else a_module(name, value)


@checked(name_or_module=a_name_or_module)
def count_params(name_or_module: str | nn.Module) -> int:
    """Number of trained parameters of a model, from shapes alone: also for presets larger than the memory."""
    module: Any = name_or_module
    untrained = getattr(module, "untrained", ())  # such as tables of positions
    leaves = cast(dict[str, Any], traverse_util.flatten_dict(shapes(module), sep="/"))
    return sum(leaf.size for path, leaf in leaves.items() if path not in untrained)


@checked(config=A_MODEL_CONFIG)
def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json: the class and the fields, in the names of the published architecture."""
    if config.library == "transformers":
        return {"architectures": [class_name(config)], "model_type": config.model_type, **config.to_dict()}
    return {"_class_name": class_name(config), **config.to_dict()}


@checked(entries=instance(Mapping, "the entries of a config.json, a dictionary"))
def config_from_dict(entries: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `config_to_dict`; also reads the config.json of diffusers and transformers.

    Raises:
        CheckpointError: the class is missing or unknown, an unknown key, an unsupported value.
    """
    entries = dict(entries)
    architectures = read_value(
        entries.pop("architectures", None), tuple[str, ...] | None, "config.json: architectures"
    )
    name = entries.get("_class_name", architectures[0] if architectures else None)
    if name == "Transformer2DModel":
        norm = entries.get("norm_type")
        if norm not in tuple(TRANSFORMER_2D_MODELS):
            known = ", ".join(TRANSFORMER_2D_MODELS)
            raise CheckpointError(f"config.json has norm_type {shown(norm)}; known: {known}")
        name = TRANSFORMER_2D_MODELS[norm]
    if not isinstance(name, str) or name not in ARCHITECTURES:
        key = "_class_name" if "_class_name" in entries else "architectures"
        raise CheckpointError(f"config.json has {key} {shown(name)}; {known_names(name, ARCHITECTURES)}")
    kind = ARCHITECTURES[name][1]
    if name in VARIANTS and VARIANTS[name][0](entries):
        kind = VARIANTS[name][2]
    if kind.library == "transformers":
        entries.pop("model_type", None)
    with reading("config.json"):
        return kind.from_dict(entries)
