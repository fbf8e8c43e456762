"""Small models of SD3, FLUX, FLUX.2, Z-Image and Qwen-Image, and what is known of their published files."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffusers
import numpy as np
import transformers
from diffusers.loaders import single_file_utils

from jaxldm import models

VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
}
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}
SD3 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 1,  # as wide as the published ones, 64
    "caption_projection_dim": 64,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 5,
}
SD35 = SD3 | {"num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
WIDTH = 128  # of FLUX and Z-Image here: one head as wide as the published ones
FLUX = {
    "in_channels": 24,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 1,
    "num_attention_heads": 1,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "guidance_embeds": True,
}
Z_IMAGE = {"in_channels": 4, "dim": WIDTH, "n_heads": 1, "n_kv_heads": 1, "n_layers": 2, "cap_feat_dim": 10}
FLUX2 = {
    "in_channels": 12,
    "out_channels": 8,
    "num_layers": 2,
    "num_single_layers": 1,
    "num_attention_heads": 1,
    "joint_attention_dim": 10,
    "timestep_guidance_channels": 6,
}
QWEN_IMAGE = {
    "in_channels": 16,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 1,
    "joint_attention_dim": 10,
}
QWEN = {
    "vocab_size": 40,
    "hidden_size": 10,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}


def t5():
    return transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu", **T5))


def sd3_models():
    clips = [
        transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(projection_dim=width, **CLIP))
        for width in (64, 24)
    ]
    return {
        "transformer": diffusers.SD3Transformer2DModel(**SD35),
        "vae": diffusers.AutoencoderKL(**VAE),
        "text_encoder": clips[0],
        "text_encoder_2": clips[1],
        "text_encoder_3": t5(),
    }


def flux_models():
    return {
        "transformer": diffusers.FluxTransformer2DModel(**FLUX),
        "vae": diffusers.AutoencoderKL(**VAE),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
        "text_encoder_2": t5(),
    }


def z_image_models():
    lengths = list(models.PRESETS["z-image"].axes_lens)
    return {
        "transformer": diffusers.ZImageTransformer2DModel(**Z_IMAGE, axes_lens=lengths),
        "text_encoder": transformers.Qwen3Model(transformers.Qwen3Config(**QWEN)),
    }


def without_prefix(state):
    """Names that are those of the folder."""
    return {name.removeprefix("model.diffusion_model."): tensor for name, tensor in state.items()}


def convert_flux2(state):
    """By the reference, which takes no prefix."""
    return single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(without_prefix(state))


def convert_flux(state):
    """The reference's conversion at any width; the published width is a constant of its code."""
    width = next(tensor.shape[0] for name, tensor in state.items() if name.endswith("img_in.weight"))
    function = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    code = function.__code__
    assert 3072 in code.co_consts
    consts = tuple(width if const == 3072 else const for const in code.co_consts)
    return type(convert_flux)(code.replace(co_consts=consts), vars(single_file_utils))(state)


class Case(NamedTuple):
    """A family of files.

    Attributes:
        random_models: -> the reference's models, small.
        convert: tensors of the transformer in the file -> published tensors, by the reference.
        prefix: of the transformer's tensors in a file of the transformer alone.
        shapes: some tensors of that file and their shapes.
        more_alone: tensors that such a file may also hold.
        names: some names in a file of all components.
        more: tensors of such a file -> those that it may also hold.
        published: preset -> (the preset to read configs with, the reference's name for it or None where it
            reads no such file, the number of tensors, names and shapes in the published file).
        changes: (tensor of the transformer, its new shape or None to leave it out, the message).
    """

    random_models: Callable[[], dict[str, Any]]
    convert: Callable[[dict], dict]
    prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    more_alone: Mapping[str, np.ndarray]
    names: tuple[str, ...]
    more: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    published: Mapping[str, tuple[str, str | None, int | None, Mapping[str, tuple[int, ...]]]]
    changes: tuple[tuple[str, tuple[int, ...] | None, str], ...]


def _with_second_embedding(state):
    """T5's embedding a second time, and OpenAI's projection, which nothing uses."""
    encoders = "text_encoders"
    return {
        f"{encoders}.t5xxl.transformer.encoder.embed_tokens.weight": state[
            f"{encoders}.t5xxl.transformer.shared.weight"
        ],
        f"{encoders}.clip_l.transformer.text_projection.weight": np.zeros((64, 64), np.float32),
        f"{encoders}.clip_l.logit_scale": np.zeros((), np.float32),
        f"{encoders}.clip_g.logit_scale": np.zeros((), np.float32),
    }


FLUX_PUBLISHED = {
    "img_in.weight": (3072, 64),
    "txt_in.weight": (3072, 4096),
    "vector_in.in_layer.weight": (3072, 768),
    "double_blocks.18.img_mod.lin.weight": (18432, 3072),
    "double_blocks.18.txt_attn.qkv.weight": (9216, 3072),
    "double_blocks.18.txt_attn.norm.query_norm.scale": (128,),
    "double_blocks.18.img_mlp.0.weight": (12288, 3072),
    "single_blocks.37.linear1.weight": (21504, 3072),
    "single_blocks.37.linear2.weight": (3072, 15360),
    "single_blocks.37.modulation.lin.bias": (9216,),
    "single_blocks.37.norm.key_norm.scale": (128,),
    "final_layer.linear.weight": (64, 3072),
    "final_layer.adaLN_modulation.1.weight": (6144, 3072),
}
CASES = {
    "SD3": Case(
        sd3_models,
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        "model.diffusion_model.",
        {"joint_blocks.0.x_block.attn.qkv.weight": (3 * 64, 64)},
        {},
        (
            "model.diffusion_model.joint_blocks.2.context_block.adaLN_modulation.1.bias",
            "first_stage_model.decoder.up.1.block.0.conv1.weight",
            "text_encoders.clip_g.transformer.text_projection.weight",
            "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight",
        ),
        _with_second_embedding,
        {
            "sd3-medium": (
                "sd3-medium",
                "sd3",
                None,
                {
                    "pos_embed": (1, 36864, 1536),
                    "x_embedder.proj.weight": (1536, 16, 2, 2),
                    "joint_blocks.23.context_block.adaLN_modulation.1.weight": (3072, 1536),
                    "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536),
                    "joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
                    "y_embedder.mlp.0.weight": (1536, 2048),
                    "final_layer.linear.weight": (64, 1536),
                },
            ),
            "sd35-medium": (
                "sd3-medium",
                "sd35_medium",
                None,
                {
                    "pos_embed": (1, 147456, 1536),
                    "joint_blocks.12.x_block.adaLN_modulation.1.weight": (13824, 1536),
                    "joint_blocks.12.x_block.attn2.ln_q.weight": (64,),
                    "joint_blocks.23.context_block.attn.qkv.weight": (4608, 1536),
                },
            ),
            "sd35-large": (
                "sd3-medium",
                "sd35_large",
                None,
                {
                    "pos_embed": (1, 36864, 2432),
                    "joint_blocks.37.x_block.mlp.fc1.weight": (9728, 2432),
                    "joint_blocks.37.context_block.attn.ln_k.weight": (64,),
                    "context_embedder.weight": (2432, 4096),
                },
            ),
        },
        (
            ("joint_blocks.1.context_block.mlp.fc2.bias", None, r"missing: .*1\.ff_context\.net\.2\.bias"),
            ("joint_blocks.0.x_block.attn.qkv.weight", (195, 64), r"attn\.to_q\.weight is \(65, 64\) in"),
            (
                "joint_blocks.0.surprise",
                (3,),
                r"left over: model\.diffusion_model\.joint_blocks\.0\.surprise",
            ),
            ("x_embedder.proj.weight", None, r"the transformer is not whole: .*x_embedder\.proj\.weight"),
        ),
    ),
    "FLUX": Case(
        flux_models,
        convert_flux,
        "",
        {
            "double_blocks.1.img_attn.qkv.weight": (3 * WIDTH, WIDTH),
            "single_blocks.0.linear1.bias": (7 * WIDTH,),
        },
        {},
        (
            "model.diffusion_model.double_blocks.0.txt_mlp.2.bias",
            "vae.encoder.down.0.downsample.conv.weight",
            "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
            "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight",
        ),
        _with_second_embedding,
        {
            "flux-dev": (
                "flux-dev",
                "flux-dev",
                780,
                FLUX_PUBLISHED | {"guidance_in.out_layer.bias": (3072,)},
            ),
            "flux-schnell": ("flux-dev", "flux-schnell", 776, FLUX_PUBLISHED),
        },
        (
            ("double_blocks.1.txt_mlp.2.bias", None, r"transformer: .*missing: .*ff_context\.net\.2\.bias"),
            (
                "single_blocks.0.linear1.weight",
                (7 * WIDTH + 7, WIDTH),
                r"attn\.to_q\.weight is \(129, 128\) in",
            ),
            ("single_blocks.0.linear1.weight", (WIDTH, WIDTH), r"proj_mlp\.weight is \(128, 128\) in"),
            ("double_blocks.0.surprise", (3,), r"left over: double_blocks\.0\.surprise \(3,\)"),
            ("img_in.weight", None, r"the transformer is not whole: it has no tensor img_in\.weight"),
            ("double_blocks.0.img_attn.norm.query_norm.scale", (64,), "shapes of no model: axes_dims_rope"),
        ),
    ),
    "Z-Image": Case(
        z_image_models,
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
        "",
        {"noise_refiner.1.attention.qkv.weight": (3 * WIDTH, WIDTH)},
        {"norm_final.weight": np.ones(WIDTH, np.float32)},  # a norm of no layer
        ("text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_norm.weight",),
        lambda state: {},
        {
            "z-image": (
                "z-image",
                "z-image-turbo",
                None,
                {
                    "x_embedder.weight": (3840, 64),
                    "x_pad_token": (1, 3840),
                    "t_embedder.mlp.0.weight": (1024, 256),
                    "cap_embedder.0.weight": (2560,),
                    "cap_embedder.1.weight": (3840, 2560),
                    "context_refiner.1.attention.out.weight": (3840, 3840),
                    "layers.29.attention.qkv.weight": (11520, 3840),
                    "layers.29.attention.k_norm.weight": (128,),
                    "layers.29.feed_forward.w1.weight": (10240, 3840),
                    "layers.29.adaLN_modulation.0.weight": (15360, 256),
                    "final_layer.adaLN_modulation.1.weight": (3840, 256),
                    "final_layer.linear.weight": (64, 3840),
                },
            )
        },
        (
            ("layers.1.feed_forward.w2.weight", None, r"missing: layers\.1\.feed_forward\.w2\.weight"),
            ("layers.1.attention.qkv.weight", (383, WIDTH), r"to_q\.weight is \(383, 128\) in the file"),
            ("layers.0.surprise", (3,), r"left over: layers\.0\.surprise \(3,\)"),
            ("x_embedder.weight", None, r"the transformer is not whole: it has no tensor x_embedder\.weight"),
            ("layers.0.attention.q_norm.weight", (64,), "shapes of no model: axes_dims"),
        ),
    ),
    "FLUX.2": Case(
        lambda: {"transformer": diffusers.Flux2Transformer2DModel(**FLUX2)},
        convert_flux2,
        "",
        {
            "double_blocks.1.txt_attn.qkv.weight": (3 * WIDTH, WIDTH),
            "single_blocks.0.linear1.weight": (9 * WIDTH, WIDTH),
        },
        {},
        ("double_stream_modulation_img.lin.weight", "guidance_in.out_layer.weight"),
        lambda state: {},
        {
            "flux2-dev": (
                "flux2-klein-4b",
                "flux-2-dev",
                None,
                {
                    "img_in.weight": (6144, 128),
                    "txt_in.weight": (6144, 15360),
                    "guidance_in.in_layer.weight": (6144, 256),
                    "double_stream_modulation_txt.lin.weight": (36864, 6144),
                    "single_stream_modulation.lin.weight": (18432, 6144),
                    "double_blocks.7.img_mlp.0.weight": (36864, 6144),
                    "single_blocks.47.linear2.weight": (6144, 24576),
                    "final_layer.adaLN_modulation.1.weight": (12288, 6144),
                },
            ),
            "flux2-klein-9b": ("flux2-klein-4b", "flux-2-dev", None, {"img_in.weight": (4096, 128)}),
        },
        (
            ("double_blocks.1.txt_mlp.2.weight", None, r"missing: .*1\.ff_context\.linear_out\.weight"),
            ("double_blocks.0.img_attn.qkv.weight", (387, WIDTH), r"attn\.to_q\.weight is \(129, 128\) in"),
            ("double_blocks.0.surprise", (3,), r"left over: double_blocks\.0\.surprise \(3,\)"),
            ("img_in.weight", None, r"the transformer is not whole: it has no tensor img_in\.weight"),
            ("double_blocks.0.img_attn.norm.query_norm.scale", (64,), "shapes of no model: axes_dims_rope"),
        ),
    ),
    "Qwen-Image": Case(
        lambda: {"transformer": diffusers.QwenImageTransformer2DModel(**QWEN_IMAGE)},
        without_prefix,
        "",
        {"transformer_blocks.1.attn.add_k_proj.weight": (WIDTH, WIDTH)},
        {},
        ("txt_norm.weight", "transformer_blocks.0.img_mod.1.bias"),
        lambda state: {},
        {
            "qwen-image": (
                "qwen-image",
                None,
                1933,
                {
                    "img_in.weight": (3072, 64),
                    "txt_in.weight": (3072, 3584),
                    "transformer_blocks.59.attn.norm_added_k.weight": (128,),
                    "transformer_blocks.59.img_mlp.net.0.proj.weight": (12288, 3072),
                    "proj_out.weight": (64, 3072),
                },
            )
        },
        (
            ("transformer_blocks.1.attn.to_add_out.bias", None, r"missing: .*1\.attn\.to_add_out\.bias"),
            ("transformer_blocks.0.surprise", (3,), r"left over: transformer_blocks\.0\.surprise \(3,\)"),
            ("proj_out.weight", None, r"the transformer is not whole: it has no tensor proj_out\.weight"),
            ("transformer_blocks.0.attn.norm_q.weight", (64,), "shapes of no model: axes_dims_rope"),
        ),
    ),
}
