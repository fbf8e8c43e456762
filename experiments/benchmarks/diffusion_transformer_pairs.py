"""DiT-XL/2, SD3 medium and FLUX.1-dev at their published sizes or small, with random weights: jaxldm's side.

`diffusion_transformer_torch.py` is the side of diffusers, `one_card.py` times both, and
`tests/benchmarks/test_diffusion_transformers_benchmark.py` checks that with the same weights they compute and
draw the same. Texts are given as random states of their encoders, so that what is timed is the transformer,
the sampler and the decoder.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks.random_networks import random_network
from jaxldm import models, pipelines, schedulers
from jaxldm.pipelines.families.class_to_image import CLASS_TO_IMAGE
from jaxldm.pipelines.families.flux import FLUX
from jaxldm.pipelines.families.stable_diffusion_3 import STABLE_DIFFUSION_3

TORCH_SIDE = "experiments.benchmarks.diffusion_transformer_torch"
LABEL = 207
_SMALL_VAE = {
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


class Family(NamedTuple):
    """A model by the configs of its parts, and its text.

    tokens: of the text, None for labels; branches: rows of a network call for one image.
    """

    title: str
    transformer: Any
    small: dict[str, Any]
    vae: str
    guidance_scale: float
    tokens: int | None
    branches: int
    scheduler: dict[str, Any]


FAMILIES = {
    "dit-xl": Family(
        "DiT-XL/2",
        models.DiTTransformer2DConfig(out_channels=8),
        {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 2},
        "sd-vae",
        4.0,
        None,
        2,
        _BETAS | {"_class_name": "DPMSolverMultistepScheduler"},
    ),
    "sd3": Family(
        "SD3 medium",
        models.PRESETS["sd3-medium"],
        {
            "num_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "caption_projection_dim": 64,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32,
        },
        "sd3-vae",
        7.0,
        333,
        2,
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    ),
    "flux": Family(
        "FLUX.1-dev",
        models.PRESETS["flux-dev"],
        {
            "num_layers": 1,
            "num_single_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "axes_dims_rope": (8, 12, 12),
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32,
        },
        "flux-vae",
        3.5,
        512,
        1,
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True},
    ),
}


def with_fixed_text(family: pipelines.Family, cond: dict[str, np.ndarray]) -> pipelines.Family:
    """The family with the arrays that its network takes in place of any text; the negative has their sign
    changed. No text encoder is needed.
    """
    uncond = {name: -array for name, array in cond.items()}
    folder = family.folder._replace(check=lambda pipe: None)
    return family._replace(encode=lambda pipe, request: (cond, uncond), folder=folder)


def modules(family: str, dtype: str, quick: bool) -> dict[str, Any]:
    """The transformer and the autoencoder by the names of their folders."""
    entry = FAMILIES[family]
    config = dataclasses.replace(entry.transformer, dtype=dtype, **(entry.small if quick else {}))
    vae = models.build(entry.vae, dtype=dtype, **(_SMALL_VAE if quick else {}))
    return {"transformer": models.from_config(config), "vae": vae}


def text_states(family: str, config: Any) -> dict[str, np.ndarray]:
    """The states of one text, float32, by the names of the network's arguments."""
    rng, tokens = np.random.default_rng(2), FAMILIES[family].tokens
    shapes = {
        "encoder_hidden_states": (1, tokens, config.joint_attention_dim),
        "pooled_projections": (1, config.pooled_projection_dim),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def latent_shape(pipe: Any, pixels: int) -> tuple[int, int, int]:
    """(h, w, c) of the latents of square images."""
    return pipe.latent_shape() if pipe.family is CLASS_TO_IMAGE else pipe.latent_shape((pixels, pixels))


def our_pipeline(family: str, dtype: str, quick: bool) -> pipelines.Pipeline:
    """A whole model with random weights."""
    parts = modules(family, dtype, quick)
    return pipeline_of(family, {name: random_network(module, dtype) for name, module in parts.items()})


def pipeline_of(family: str, networks: dict[str, pipelines.Network]) -> pipelines.Pipeline:
    """The model with these networks."""
    transformer, vae = networks["transformer"], networks["vae"]
    scheduler = FAMILIES[family].scheduler
    if family == "dit-xl":
        return pipelines.class_to_image(transformer, schedulers.from_config(scheduler).prediction, vae)
    cond = text_states(family, transformer.config)
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    if family == "sd3":
        return pipelines.Pipeline(with_fixed_text(STABLE_DIFFUSION_3, cond), parts)
    encoders = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return pipelines.Pipeline(with_fixed_text(FLUX, cond), parts | encoders)


def our_draw(pipe: Any, latents: np.ndarray, steps: int, guidance: float) -> np.ndarray:
    """Pixels [N, H, W, 3] in [0, 1], on the host. A model of labels takes only N from the latents."""
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "batch_size": len(latents)}
    if pipe.family is CLASS_TO_IMAGE:
        pipe = pipe.replace(images_per_device=len(latents))  # by default a large model draws one at a time
        images = pipe(jax.random.key(0), [LABEL] * len(latents), solver="dpmpp_2m", **options)
    else:
        side = latents.shape[1] * pipe.latent_spec.factor
        images = pipe(jax.random.key(0), "", latents=latents, height=side, width=side, **options)
    return (images + 1) / 2


def our_denoiser(pipe: Any) -> pipelines.Network:
    """The transformer."""
    return pipe.transformer


def network_inputs(module: Any, side: int) -> dict[str, np.ndarray]:
    """Inputs of a transformer in one step of one image, float32: a row for each branch of guidance."""
    kind = type(module).__name__
    family = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}.get(kind, "dit-xl")
    rows, rng = FAMILIES[family].branches, np.random.default_rng(1)
    channels = getattr(module.config, "latent_channels", module.config.in_channels)
    inputs = {"x": rng.standard_normal((rows, side, side, channels)).astype(np.float32)}
    inputs["t"] = np.full(rows, 0.5 if family == "flux" else 500, np.float32)
    if family == "dit-xl":
        return inputs | {"labels": np.asarray([LABEL, 1000], np.int32)}
    states = text_states(family, module.config)
    inputs |= {name: np.repeat(array, rows, axis=0) for name, array in states.items()}
    return inputs | ({"guidance": np.full(rows, 3.5, np.float32)} if family == "flux" else {})
