"""Small random networks of every family in diffusers or transformers, and how both sides are called.

Narrow, but as deep as errors need to grow. Times and scales are numbers that bfloat16 has, so that what is
measured is how a network computes, and not how its caller rounds t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.deprecated import wuerstchen

Inputs = Mapping[str, Any]


class Case(NamedTuple):
    """A network and what it is called with.

    Attributes:
        make: () -> the reference's model.
        inputs: (random numbers) -> arrays by the names of our arguments, images channels last.
        theirs: (model, inputs as tensors, images channels first) -> its output.
        ours: (output of our module) -> the array to compare.
        method: of our module.
        exact: inputs that its published pipeline gives it in float32.
    """

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[np.random.Generator], dict[str, np.ndarray]]
    theirs: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]
    ours: Callable[[Any], Any] = lambda output: output
    method: str = "__call__"
    exact: tuple[str, ...] = ("t", "guidance", "time_ids", "micro_conds", "resolution", "aspect_ratio")


def normal(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    """Normal numbers of a shape."""
    return lambda rng: rng.standard_normal(shape).astype(np.float32)


def constant(values: Any, dtype: Any = np.float32) -> Callable[[np.random.Generator], np.ndarray]:
    """The same for every seed."""
    return lambda rng: np.asarray(values, dtype)


def tokens(*shape: int, below: int) -> Callable[[np.random.Generator], np.ndarray]:
    """Whole numbers, the last of each row the largest: the end of the text."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        numbers = rng.integers(3, below - 1, shape, dtype=np.int32)
        numbers[:, -1] = below - 1
        return numbers

    return draw


def each(**draw: Callable[[np.random.Generator], np.ndarray]) -> Callable[..., dict[str, np.ndarray]]:
    """Inputs by name."""
    return lambda rng: {name: one(rng) for name, one in draw.items()}


T = constant([20.0, 484.0])  # of 1000; bfloat16 has them
UNIT_T = constant([0.125, 0.5])
X, TEXT = normal(2, 8, 8, 4), normal(2, 7, 24)
# ---------------------------------------------------------------- U-Nets

UNET = {
    "sample_size": 8,
    "norm_num_groups": 8,
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}
SDXL = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 4),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
IF_1 = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "act_fn": "gelu",
    "cross_attention_dim": 64,
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "attention_head_dim": 16,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_norm": "group_norm",
}
IF_2 = IF_1 | {
    "in_channels": 6,
    "mid_block_scale_factor": 1 / 0.7071,
    "mid_block_only_cross_attention": True,
    "class_embed_type": "timestep",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "time_embedding_act_fn": "gelu",
}
K_BLOCKS = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 5,
    "act_fn": "gelu",
    "attention_head_dim": 16,
    "norm_num_groups": None,
    "time_cond_proj_dim": 16,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "cross_attention_dim": 24,
    "layers_per_block": 2,
    "mid_block_type": None,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
    "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    "block_out_channels": (32, 64, 64),
}
SKIP_BLOCKS = {
    "sample_size": 8,
    "time_embedding_type": "fourier",
    "norm_eps": 1e-6,
    "norm_num_groups": None,
    "mid_block_scale_factor": 2**0.5,
    "block_out_channels": (32, 32, 32),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
}


def call_unet(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
    return model(inputs.pop("x"), inputs.pop("t"), **inputs, added_cond_kwargs=added or None).sample


def unet(fields: Mapping[str, Any], **more: Any) -> Case:
    """A U-Net on texts."""
    x = normal(2, 8, 8, fields.get("in_channels", 4))
    inputs = each(x=x, t=T, encoder_hidden_states=TEXT, **more)
    return Case(lambda: diffusers.UNet2DConditionModel(**fields), inputs, call_unet)


UNETS = {
    "SD 1.5's U-Net": unet(UNET),
    "SD 2.1's U-Net": unet(UNET | {"use_linear_projection": True, "attention_head_dim": (2, 4)}),
    "SDXL's U-Net": unet(
        SDXL, text_embeds=normal(2, 16), time_ids=constant([[512, 384, 0, 16, 1024, 640]] * 2)
    ),
    "DeepFloyd IF, stage I": unet(IF_1),
    "DeepFloyd IF, stage II": unet(IF_2, class_labels=constant([250, 100], np.int32)),
    "UNet2DModel": Case(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            norm_num_groups=8,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=11,
        ),
        each(x=X, t=T, class_labels=constant([3, 10], np.int32)),
        lambda model, inputs: model(inputs["x"], inputs["t"], inputs["class_labels"]).sample,
    ),
    "x2 latent upscaler's U-Net": Case(
        lambda: diffusers.UNet2DConditionModel(**K_BLOCKS),
        each(
            x=normal(2, 8, 8, 8),
            t=constant([-0.5, 0.25]),
            encoder_hidden_states=TEXT,
            timestep_cond=normal(2, 16),
        ),
        call_unet,
    ),
    "NCSN++": Case(
        lambda: diffusers.UNet2DModel(**SKIP_BLOCKS),
        each(x=normal(2, 8, 8, 3), t=constant([0.5, 4.0])),
        lambda model, inputs: model(inputs["x"], inputs["t"]).sample,
    ),
}
# ---------------------------------------------------------------- transformers that denoise

SD3 = {
    "sample_size": 12,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "caption_projection_dim": 64,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
    "num_layers": 5,
}
SD35 = SD3 | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}


def sd3(fields: Mapping[str, Any]) -> Case:
    """An MM-DiT."""
    return Case(
        lambda: diffusers.SD3Transformer2DModel(**fields),
        each(x=X, t=T, encoder_hidden_states=TEXT, pooled_projections=normal(2, 16)),
        lambda model, given: (
            model(given["x"], given["encoder_hidden_states"], given["pooled_projections"], given["t"]).sample
        ),
    )


def call_flux(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Packed, numbered and unpacked as the pipeline of diffusers does it."""
    pipeline, x = diffusers.FluxPipeline, given["x"]
    batch, channels, height, width = x.shape
    out = model(
        pipeline._pack_latents(x, batch, channels, height, width),
        encoder_hidden_states=given["encoder_hidden_states"],
        pooled_projections=given["pooled_projections"],
        timestep=given["t"],
        img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", x.dtype),
        txt_ids=torch.zeros(given["encoder_hidden_states"].shape[1], 3, dtype=x.dtype),
        guidance=given["guidance"],
    ).sample
    return pipeline._unpack_latents(out, 8 * height, 8 * width, 8)


def call_flux2(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Packed and numbered as the pipeline of diffusers does it."""
    pipeline, x, texts = diffusers.Flux2KleinPipeline, given["x"], given["encoder_hidden_states"]
    out = model(
        pipeline._pack_latents(x),
        encoder_hidden_states=texts,
        timestep=given["t"],
        img_ids=pipeline._prepare_latent_ids(x),
        txt_ids=pipeline._prepare_text_ids(texts),
        guidance=given["guidance"],
    ).sample
    return out.permute(0, 2, 1).reshape(len(x), -1, *x.shape[2:])


def call_qwen_image(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Packed and unpacked as the pipeline of diffusers does it."""
    pipeline, x = diffusers.QwenImagePipeline, given["x"]
    batch, channels, height, width = x.shape
    out = model(
        pipeline._pack_latents(x, batch, channels, height, width),
        encoder_hidden_states=given["encoder_hidden_states"],
        encoder_hidden_states_mask=None,
        timestep=given["t"],
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
    ).sample
    return pipeline._unpack_latents(out, 8 * height, 8 * width, 8)[:, :, 0]


def call_z_image(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """They take a list of images of one frame, and a list of texts."""
    frames, texts = list(given["x"][:, :, None]), list(given["encoder_hidden_states"])
    return torch.stack(model(frames, given["t"], texts, patch_size=2).sample)[:, :, 0]


def wuerstchen_prior() -> torch.nn.Module:
    """Its result is (x - a) / |1 - b|: b starts at -3, since random numbers near 1 would make any error."""
    model = wuerstchen.WuerstchenPrior(c_in=4, c=64, c_cond=24, c_r=16, depth=4, nhead=4)
    with torch.no_grad():
        model.out[1].bias[4:] = -3.0
    return model


TRANSFORMERS = {
    "SD 3": sd3(SD3),
    "SD 3.5 medium": sd3(SD35),
    "FLUX.1-dev": Case(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=3,
            num_single_layers=4,
            guidance_embeds=True,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        each(
            x=X, t=UNIT_T, encoder_hidden_states=TEXT, pooled_projections=normal(2, 16),
            guidance=constant([1.0, 4.0]),
        ),
        call_flux,
    ),
    "FLUX.2-dev": Case(
        lambda: diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=3, num_single_layers=4, guidance_embeds=True, attention_head_dim=16,
            num_attention_heads=4, joint_attention_dim=24, axes_dims_rope=[4, 4, 4, 4],
        ),
        each(
            x=normal(2, 4, 4, 16), t=UNIT_T, encoder_hidden_states=TEXT, guidance=constant([1.0, 4.0]),
        ),
        call_flux2,
    ),
    "Qwen-Image": Case(
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=5, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        ),
        each(x=X, t=UNIT_T, encoder_hidden_states=TEXT),
        call_qwen_image,
    ),
    "Z-Image": Case(
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=64, n_heads=4, n_kv_heads=4, n_layers=5, cap_feat_dim=24,
            axes_dims=[4, 6, 6], axes_lens=[100, 16, 16],
        ),
        each(x=X, t=UNIT_T, encoder_hidden_states=normal(2, 32, 24)),
        call_z_image,
    ),
    "PixArt-Sigma": Case(
        lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64, num_layers=5,
            sample_size=8, caption_channels=24, interpolation_scale=2, use_additional_conditions=False,
        ),
        each(
            x=X, t=T, encoder_hidden_states=TEXT,
            encoder_attention_mask=constant([[1] * 7, [1] * 4 + [0] * 3], np.int32),
        ),
        lambda model, given: model(
            given.pop("x"), timestep=given.pop("t"), added_cond_kwargs=None, **given
        ).sample,
    ),
    "DiT": Case(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8,
            num_embeds_ada_norm=11, num_layers=5, sample_size=8,
        ),
        each(x=X, t=T, labels=constant([3, 10], np.int32)),
        lambda model, given: model(given["x"], given["t"], given["labels"]).sample,
    ),
    "aMUSEd's U-ViT": Case(
        lambda: diffusers.UVit2DModel(
            hidden_size=64, cond_embed_dim=16, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
            encoder_hidden_size=24, vocab_size=24, codebook_size=20, in_channels=32, num_hidden_layers=4,
            num_attention_heads=4, block_num_heads=4, intermediate_size=96, sample_size=8,
            block_out_channels=32, num_res_blocks=2,
        ),
        each(
            input_ids=lambda rng: rng.integers(0, 24, (2, 8, 8), dtype=np.int32),
            encoder_hidden_states=TEXT, pooled_text_emb=normal(2, 16),
            micro_conds=constant([[96, 64, 5, 3, 6]] * 2),
        ),
        lambda model, given: model(*given.values()),
    ),
    "Wuerstchen's prior": Case(
        wuerstchen_prior,
        each(x=X, t=UNIT_T, c=TEXT),
        lambda model, given: model(given["x"], given["t"], given["c"]),
        exact=(),
    ),
    "Wuerstchen's decoder": Case(
        lambda: wuerstchen.WuerstchenDiffNeXt(
            c_in=4, c_out=4, c_r=16, c_cond=32, c_hidden=[32, 48, 64], nhead=[-1, 4, 4], blocks=[2, 2, 2],
            level_config=["CT", "CTA", "CTA"], inject_effnet=[False, True, True], effnet_embd=8,
            clip_embd=24, dropout=[0.0, 0.1, 0.1],
        ),
        each(x=normal(2, 16, 16, 4), t=UNIT_T, effnet=normal(2, 3, 3, 8), encoder_hidden_states=TEXT),
        lambda model, given: model(*given.values()),
        exact=(),
    ),
}  # fmt: skip
# ---------------------------------------------------------------- autoencoders

LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "norm_num_groups": 8,
}


def autoencoder(make: Callable[[], Any], method: str, given: Any, theirs: Any, ours: Any = None) -> Case:
    """One way through an autoencoder."""
    name = {"encode": "x"}.get(method, "z")
    return Case(make, each(**{name: given}), theirs, ours or (lambda output: output), method)


AUTOENCODERS = {
    "AutoencoderKL, encoding": autoencoder(
        lambda: diffusers.AutoencoderKL(**LEVELS),
        "encode",
        normal(2, 16, 16, 3),
        lambda model, given: model.encode(given["x"]).latent_dist.mean,
        lambda output: output.mean,
    ),
    "AutoencoderKL, decoding": autoencoder(
        lambda: diffusers.AutoencoderKL(**LEVELS),
        "decode",
        normal(2, 8, 8, 4),
        lambda model, given: model.decode(given["z"]).sample,
    ),
    "aMUSEd's VQModel, encoding": autoencoder(
        lambda: diffusers.VQModel(**LEVELS, latent_channels=8, num_vq_embeddings=32),
        "encode",
        normal(2, 16, 16, 3),
        lambda model, given: model.encode(given["x"]).latents,
    ),
    "aMUSEd's VQModel, decoding indices": Case(
        lambda: diffusers.VQModel(**LEVELS, latent_channels=8, num_vq_embeddings=32),
        each(indices=lambda rng: rng.integers(0, 32, (2, 8, 8), dtype=np.int32)),
        lambda model, given: (
            model.decode(given["indices"].reshape(-1), force_not_quantize=True, shape=(2, 8, 8, 8)).sample
            if model.config.lookup_from_codebook
            else model.decoder(
                model.post_quant_conv(
                    model.quantize.get_codebook_entry(given["indices"].reshape(-1), (2, 8, 8, 8))
                )
            )
        ),
        method="decode_indices",
    ),
}
# ---------------------------------------------------------------- encoders of texts and images

CLIP = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}
TEXTS = {**CLIP, "max_position_embeddings": 11, "bos_token_id": 0, "eos_token_id": 59, "pad_token_id": 59}
IDS = each(input_ids=tokens(2, 11, below=60))


def encoder(kind: Any, config: Any) -> Case:
    """An encoder of texts: its last states."""
    return Case(
        lambda: kind(config),
        IDS,
        lambda model, given: model(given["input_ids"].long()).last_hidden_state,
        lambda output: output.last_hidden_state,
    )


ENCODERS = {
    "CLIP's text encoder": encoder(transformers.CLIPTextModel, transformers.CLIPTextConfig(**TEXTS)),
    "OpenCLIP's text encoder": encoder(
        transformers.CLIPTextModelWithProjection,
        transformers.CLIPTextConfig(**TEXTS, hidden_act="gelu", projection_dim=24),
    ),
    "T5": encoder(
        transformers.T5EncoderModel,
        transformers.T5Config(
            vocab_size=60, d_model=64, d_kv=16, d_ff=96, num_layers=5, num_heads=4,
            feed_forward_proj="gated-gelu",
        ),
    ),
    "Qwen3": encoder(
        transformers.Qwen3Model,
        transformers.Qwen3Config(**CLIP | {"num_key_value_heads": 2, "head_dim": 16}, rope_theta=1e6),
    ),
    "Mistral": encoder(
        transformers.MistralModel,
        transformers.MistralConfig(
            **CLIP | {"num_key_value_heads": 2, "head_dim": 16}, sliding_window=None,
        ),
    ),
    "MiniLM (BERT)": encoder(
        transformers.BertModel, transformers.BertConfig(**CLIP, max_position_embeddings=11)
    ),
    "CLIP's image encoder": Case(
        lambda: transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                **{k: v for k, v in CLIP.items() if k != "vocab_size"}, projection_dim=24, image_size=16,
                patch_size=4,
            )
        ),
        each(pixel_values=normal(2, 16, 16, 3)),
        lambda model, given: model(given["pixel_values"]).image_embeds,
        lambda output: output.image_embeds,
    ),
    "DINOv2": Case(
        lambda: transformers.Dinov2Model(
            transformers.Dinov2Config(
                hidden_size=64, num_hidden_layers=5, num_attention_heads=4, image_size=16, patch_size=4,
                layerscale_value=0.5,
            )
        ),
        each(pixel_values=normal(2, 16, 16, 3)),
        lambda model, given: model(given["pixel_values"]).last_hidden_state,
        lambda output: output.last_hidden_state,
    ),
}  # fmt: skip

CASES: dict[str, Case] = UNETS | TRANSFORMERS | AUTOENCODERS | ENCODERS
