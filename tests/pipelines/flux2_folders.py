"""A tiny random folder of FLUX.2 klein, written by diffusers."""

import diffusers
import torch
import transformers
from reference_pipelines import SIZE, shaken
from z_image_folders import tokenizer

WIDTH, LAYERS = 12, (1, 2)  # of the text encoder, and those of which the transformer takes the states
CHANNELS = 12  # 2x2 latents of 3


def text_encoder(vocabulary, seed=5):
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rope_theta=1e6,
        max_position_embeddings=128,
    )
    torch.manual_seed(seed)
    return shaken(transformers.Qwen3ForCausalLM(config), seed, 0.2)


def autoencoder(seed=3):
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=SIZE,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=CHANNELS // 4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    torch.nn.init.uniform_(vae.bn.running_mean, -0.5, 0.5)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.5)
    return shaken(vae, seed)


def transformer(seed=1):
    torch.manual_seed(seed)
    made = diffusers.Flux2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=len(LAYERS) * WIDTH,
        axes_dims_rope=(2, 4, 4, 2),
        guidance_embeds=False,
    )
    return shaken(made, seed, 0.1)


def write_flux2_klein(folder):
    words, _ = tokenizer()
    thinking = [transformers.AddedToken(f"<{sign}think>", normalized=False) for sign in ("", "/")]
    words.add_tokens(thinking)
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        transformer=transformer(),
    )
    pipe.save_pretrained(folder)
    return folder
