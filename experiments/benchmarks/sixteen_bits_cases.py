"""Small random networks of every family in diffusers or transformers, and how both sides are called.

Narrow, but as deep as errors need to grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.deprecated import wuerstchen

from experiments.benchmarks.sixteen_bits_case import (
    TEXT,
    UNIT_T,
    Case,
    T,
    X,
    constant,
    each,
    normal,
    tokens,
)
from experiments.benchmarks.sixteen_bits_unets import UNETS

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
