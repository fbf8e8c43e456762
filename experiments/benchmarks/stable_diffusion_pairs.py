"""Stable Diffusion 1.5 and XL at their published sizes or small, with random weights: jaxldm's side.

`stable_diffusion_torch.py` is the side of diffusers, `one_card.py` times both, and
`tests/benchmarks/test_stable_diffusion_benchmark.py` checks that with the same weights they draw the same.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks.random_networks import random_network
from jaxldm import checkpoints, models, pipelines
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from jaxldm.pipelines.families.stable_diffusion_xl import STABLE_DIFFUSION_XL

PROMPT = "a cat in the snow, by the river, at dawn"
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
# The small ones, for a CPU: one level with attention.
_VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),
}


TORCH_SIDE = "experiments.benchmarks.stable_diffusion_torch"


class Family(NamedTuple):
    """A model by the presets of its parts, (preset, fields of the small one)."""

    title: str
    parts: dict[str, tuple[str, dict[str, Any]]]
    guidance_scale: float


FAMILIES = {
    "sd15": Family(
        "SD 1.5",
        {
            "unet": (
                "sd15-unet",
                _UNET
                | {
                    "cross_attention_dim": 32,
                    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                },
            ),
            "vae": ("sd-vae", _VAE),
            "text_encoder": ("clip-l", _TEXT),
        },
        7.5,
    ),
    "sdxl": Family(
        "SDXL",
        {
            "unet": (
                "sdxl-unet",
                _UNET
                | {
                    "cross_attention_dim": 64,
                    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                    "transformer_layers_per_block": (1, 2),
                    "addition_time_embed_dim": 8,
                    "projection_class_embeddings_input_dim": 32 + 6 * 8,
                },
            ),
            "vae": ("sdxl-vae", _VAE),
            "text_encoder": ("clip-l", _TEXT),
            "text_encoder_2": ("openclip-bigg", _TEXT | {"projection_dim": 32}),
        },
        5.0,
    ),
}


def modules(family: str, dtype: str, quick: bool) -> dict[str, Any]:
    """The modules of a model by the names of their folders."""
    parts = FAMILIES[family].parts.items()
    return {
        name: models.build(preset, dtype=dtype, **(small if quick else {})) for name, (preset, small) in parts
    }


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of letters, in the files that both sides open: 77 tokens like any other."""
    letters = "abcdefghijklmnopqrstuvwxyz,"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    names = {"bos_token": "<|startoftext|>"} | dict.fromkeys(
        ("eos_token", "unk_token", "pad_token"), "<|endoftext|>"
    )
    entries = names | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))


def our_pipeline(family: str, dtype: str, quick: bool) -> pipelines.Pipeline:
    """A whole model with random weights."""
    parts: dict[str, Any] = {
        name: random_network(module, dtype) for name, module in modules(family, dtype, quick).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = checkpoints.load_tokenizer(folder)
    parts |= {"tokenizer": tokenizer} | ({"tokenizer_2": tokenizer} if "text_encoder_2" in parts else {})
    parts["scheduler"] = SCHEDULER | {"_class_name": "DPMSolverMultistepScheduler"}
    return pipelines.Pipeline(STABLE_DIFFUSION_XL if "text_encoder_2" in parts else STABLE_DIFFUSION, parts)


def our_draw(pipe: pipelines.Pipeline, latents: np.ndarray, steps: int, guidance: float) -> np.ndarray:
    """Pixels [N, H, W, 3] in [0, 1], on the host."""
    side = latents.shape[1] * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "solver": "dpmpp_2m"}
    images = pipe(jax.random.key(0), [PROMPT], latents=latents, height=side, width=side, **options)
    return (images + 1) / 2


def latent_shape(pipe: pipelines.Pipeline, pixels: int) -> tuple[int, int, int]:
    """(h, w, c) of the latents of square images."""
    return pipe.latent_shape((pixels, pixels))


def our_denoiser(pipe: pipelines.Pipeline) -> pipelines.Network:
    """The U-Net."""
    return pipe.unet


def network_inputs(module: Any, side: int) -> dict[str, np.ndarray]:
    """Inputs of a U-Net in one step of one image with guidance: two rows of everything, float32."""
    config, rng = module.config, np.random.default_rng(1)
    shapes = {
        "x": (side, side, config.in_channels),
        "encoder_hidden_states": (77, config.cross_attention_dim),
    }
    inputs = {name: rng.standard_normal((2, *shape)).astype(np.float32) for name, shape in shapes.items()}
    inputs["t"] = np.full(2, 500, np.float32)
    if config.addition_embed_type is not None:
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["text_embeds"] = rng.standard_normal((2, width)).astype(np.float32)
        inputs["time_ids"] = np.tile(np.float32([1024, 1024, 0, 0, 1024, 1024]), (2, 1))
    return inputs
