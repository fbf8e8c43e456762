"""Tiny random folders of Stable Diffusion 3, written by diffusers."""

import diffusers
import torch
from reference_pipelines import LATENT, SIZE, shaken, text_encoder, write_tokenizer
from t5_parts import t5_encoder, t5_tokenizer

CHANNELS = 16  # fewer the reference does not inpaint with


def autoencoder(seed=3):
    """As `reference_pipelines.autoencoder`, its latents shifted, and without the outer 1x1 layers."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    return shaken(vae, seed)


def transformer(seed=1, **more):
    torch.manual_seed(seed)
    options = {
        "sample_size": LATENT,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 36,
        "pos_embed_max_size": 8,
    }
    return shaken(diffusers.SD3Transformer2DModel(**options | more), seed, 0.1)


def write_sd3(folder, with_t5=True, **more):
    """16 and 20 wide CLIPs, T5 40 wide; `more` is for the transformer."""
    tokenizer, size = write_tokenizer(folder / "tokenizer")
    tokenizer_2, _ = write_tokenizer(folder / "tokenizer_2", pad="!")
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer(**more),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=text_encoder(size, 16, 5, projection=16, layers=3),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder(size, 20, 6, projection=20, layers=3),
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5_encoder(40) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    pipe.save_pretrained(folder)
    return folder
