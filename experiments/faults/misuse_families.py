"""Whole calls that people get wrong with newer families of models, each refused in one line."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from experiments.faults.misuse_cases import KEY
from experiments.faults.misuse_files import place
from experiments.faults.small_folders import zeros
from jaxldm import checkpoints, models, pipelines

Calls = list[tuple[str, Any, str]]  # name, the call, the words of its refusal
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
SMALL_QWEN: dict[str, Any] = {"vocab_size": 300, "hidden_size": 12, "intermediate_size": 12}
SMALL_QWEN |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT = {"max_sequence_length": 64}


def _pipeline(name: str, scheduler: dict[str, Any], **parts: Any) -> pipelines.Pipeline:
    networks: dict[str, Any] = {part: zeros(models.from_config(config)) for part, config in parts.items()}
    texts = (
        {"tokenizer": checkpoints.load_tokenizer(place() / "tokenizer")} if "text_encoder" in parts else {}
    )
    return pipelines.Pipeline(pipelines.PIPELINES[name], {**networks, **texts, "scheduler": scheduler})


@functools.cache
def flux2(dev: bool = False) -> pipelines.Pipeline:
    """FLUX.2 klein or dev, of 12 channels."""
    text: dict[str, Any] = {**SMALL_QWEN, "head_dim": 6, "max_position_embeddings": 128}
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 3}
    kinds = {f"{way}_block_types": (kind,) * 2 for way, kind in (("down", DOWN), ("up", UP))}
    transformer = {"in_channels": 12, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    transformer |= {"attention_head_dim": 12, "joint_attention_dim": 24, "axes_dims_rope": (2, 4, 4, 2)}
    return _pipeline(
        "Flux2Pipeline" if dev else "Flux2KleinPipeline",
        FLOW,
        transformer=models.Flux2Transformer2DConfig(**transformer, guidance_embeds=dev),
        vae=models.AutoencoderKLFlux2Config(**sizes, **kinds),
        text_encoder=models.MistralConfig(**text) if dev else models.Qwen3Config(**text),
    )


DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


@functools.cache
def qwen_image() -> pipelines.Pipeline:
    """Qwen-Image, of 16 channels."""
    transformer = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12}
    vae: dict[str, Any] = {"base_dim": 4, "dim_mult": (1, 2), "num_res_blocks": 1}
    return _pipeline(
        "QwenImagePipeline",
        FLOW,
        transformer=models.QwenImageTransformer2DConfig(
            **transformer, joint_attention_dim=12, axes_dims_rope=(2, 4, 6)
        ),
        vae=models.AutoencoderKLQwenImageConfig(**vae, temperal_downsample=(True,)),
        text_encoder=models.Qwen2_5_VLTextConfig(**SMALL_QWEN, mrope_section=(1, 1, 1)),
    )


@functools.cache
def consistency() -> pipelines.Pipeline:
    """A consistency model of three classes."""
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (4,)}
    unet = models.UNet2DConfig(
        **sizes,
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        num_classes=2,
    )
    made = _pipeline("ConsistencyModelPipeline", {"_class_name": "CMStochasticIterativeScheduler"}, unet=unet)
    return made.replace(diffusers_class="ConsistencyModelPipeline")


@functools.cache
def score() -> pipelines.Pipeline:
    """NCSN++."""
    unet = models.NCSNppConfig(
        sample_size=8,
        block_out_channels=(4,),
        layers_per_block=1,
        down_block_types=("SkipDownBlock2D",),
        up_block_types=("SkipUpBlock2D",),
        mid_block_type=None,
    )
    made = _pipeline("ScoreSdeVePipeline", {"_class_name": "ScoreSdeVeScheduler"}, unet=unet)
    return made.replace(diffusers_class="ScoreSdeVePipeline")


def calls_of_families() -> Calls:
    """FLUX.2, Qwen-Image, consistency and score-based models, and their networks."""
    image = np.zeros((16, 16, 3), np.uint8)
    inpainting = {"image": image, "mask_image": image[..., 0]}
    embeds = np.zeros((1, 4, 7), np.float32)
    network, x, t = score().denoiser, np.zeros((2, 8, 8, 3), np.float32), np.ones(2, np.float32)
    return [
        ("flux2: strength", lambda: flux2()(KEY, "a", image=image, strength=0.5, **TEXT), "strength"),
        (
            "flux2: mask",
            lambda: flux2()(KEY, "a", **inpainting, **TEXT),
            "mask_image",
        ),
        ("flux2: layers", lambda: flux2()(KEY, "a", text_encoder_out_layers=(1, 9), **TEXT), "from 0 to 2"),
        ("flux2: embeds", lambda: flux2()(KEY, prompt_embeds=embeds, **TEXT), r"\[P, T, 24\]"),
        ("flux2: distilled", lambda: _distilled(), "leave out guidance_scale, which is 4"),
        ("flux2: length", lambda: flux2()(KEY, "a", max_sequence_length=200), "between 1 and 128"),
        ("flux2-dev: layers", lambda: flux2(True)(KEY, "a", text_encoder_out_layers=(3, 1), **TEXT), "to 2"),
        ("flux2-dev: scale", lambda: flux2(True)(KEY, "a", guidance_scale=-1.0, **TEXT), "of 0 or more"),
        ("flux2-dev: embeds", lambda: flux2(True)(KEY, prompt_embeds=embeds, **TEXT), r"\[P, T, 24\]"),
        (
            "flux2-dev: own",
            lambda: flux2(True)(KEY, "a", caption_upsample_temperature=0.1),
            "caption_upsample",
        ),
        ("qwen: guidance_scale", lambda: qwen_image()(KEY, "a", guidance_scale=4.0), "true_cfg_scale=4"),
        ("qwen: length", lambda: qwen_image()(KEY, "a", max_sequence_length=2000), "between 1 and 1024"),
        ("qwen: size", lambda: qwen_image()(KEY, "a", height=18, width=16), "18"),
        ("qwen: mask of embeds", lambda: qwen_image()(KEY, prompt_embeds=embeds[..., :1]), "mask|P, T"),
        ("qwen: clip_skip", lambda: qwen_image()(KEY, "a", clip_skip=1), "clip_skip"),
        ("consistency: scale", lambda: consistency()(KEY, [0], guidance_scale=2.0), "no null class"),
        ("consistency: negative", lambda: consistency()(KEY, [0], negative_labels=1), "negative labels out"),
        ("consistency: label", lambda: consistency()(KEY, [3]), "3"),
        ("consistency: order", lambda: consistency()(KEY, [0], timesteps=[0, 22]), "largest first"),
        ("consistency: levels", lambda: consistency()(KEY, [0], timesteps=[40]), "from 39 to 0"),
        ("score: classes", lambda: score()(KEY, [0]), "no classes"),
        ("score: prompt", lambda: score()(KEY, prompt="a cat"), "prompt|class"),
        ("score: channels", lambda: network(x[..., :1], t), "an input is"),
        ("score: labels", lambda: network(x, t, np.zeros(2, np.int32)), "argument"),
    ]


def _distilled() -> Any:
    return flux2().replace(is_distilled=True)(KEY, "a", guidance_scale=4.0, **TEXT)
