"""Tiny random files of IP-Adapters under the published names, and image encoders."""

import numpy as np
import safetensors.numpy
import torch
import transformers
from reference_pipelines import shaken

ENCODER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "projection_dim": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QUERIES, WIDTH, HEADS, LAYERS = 3, 8, 1, 4  # of the resampler; diffusers knows four layers alone


def write_encoder(folder, seed=0, **changes):
    """A CLIP image tower as transformers saves it."""
    torch.manual_seed(seed)
    config = transformers.CLIPVisionConfig(**(ENCODER | changes))
    shaken(transformers.CLIPVisionModelWithProjection(config), seed, 0.2).save_pretrained(folder)
    return folder


def write_adapter(path, unet, plus=False, seed=0):
    """A plain or a plus adapter for a U-Net of diffusers."""
    random, text = np.random.default_rng(seed), unet.config.cross_attention_dim
    shapes = {f"image_proj.{name}": shape for name, shape in (_plus if plus else _plain)(text).items()}
    attention = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    modules = dict(unet.named_modules())
    for number, name in enumerate(attention):
        width = modules[name.removesuffix(".processor")].to_q.out_features
        shapes |= {f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight": (width, text) for kind in "kv"}
    tensors = {
        name: (random.standard_normal(shape) / max(1, shape[-1]) ** 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }
    safetensors.numpy.save_file(tensors, path)
    return path


def _plain(text):
    width = ENCODER["projection_dim"]
    shapes = {"proj.weight": (4 * text, width), "proj.bias": (4 * text,)}
    return shapes | {"norm.weight": (text,), "norm.bias": (text,)}


def _plus(text):
    inner = 64 * HEADS
    shapes = {
        "latents": (1, QUERIES, WIDTH),
        "proj_in.weight": (WIDTH, ENCODER["hidden_size"]),
        "proj_in.bias": (WIDTH,),
        "proj_out.weight": (text, WIDTH),
        "proj_out.bias": (text,),
        "norm_out.weight": (text,),
        "norm_out.bias": (text,),
    }
    for i in range(LAYERS):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{i}.{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
        shapes |= {
            f"layers.{i}.0.to_q.weight": (inner, WIDTH),
            f"layers.{i}.0.to_kv.weight": (2 * inner, WIDTH),
            f"layers.{i}.0.to_out.weight": (WIDTH, inner),
            f"layers.{i}.1.1.weight": (4 * WIDTH, WIDTH),
            f"layers.{i}.1.3.weight": (WIDTH, 4 * WIDTH),
        }
    return shapes
