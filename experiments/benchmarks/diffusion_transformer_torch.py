"""DiT-XL/2, SD3 medium and FLUX.1-dev of diffusers, with random weights: the other side of the benchmark."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch

from experiments.benchmarks.diffusion_transformer_pairs import FAMILIES, LABEL, modules, text_states
from experiments.benchmarks.torch_common import random_module


def pipeline(family: str, dtype: str, quick: bool, device: torch.device) -> diffusers.DiffusionPipeline:
    """The same model in diffusers, with the random weights that it starts with."""
    parts: dict[str, Any] = {
        name: random_module(module.config, dtype, device)
        for name, module in modules(family, dtype, quick).items()
    }
    entries = dict(FAMILIES[family].scheduler)
    parts["scheduler"] = getattr(diffusers, entries.pop("_class_name"))(**entries)
    if family == "dit-xl":
        pipe = diffusers.DiTPipeline(**parts)
    elif family == "sd3":
        names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2")
        pipe = diffusers.StableDiffusion3Pipeline(**parts, **dict.fromkeys((*names, "tokenizer_3")))
    else:
        names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        pipe = diffusers.FluxPipeline(**parts, **dict.fromkeys(names))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, latents: np.ndarray, steps: int, guidance: float) -> np.ndarray:
    """Pixels [N, H, W, 3] in [0, 1], on the host."""
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    if isinstance(pipe, diffusers.DiTPipeline):
        return pipe([LABEL] * len(latents), **options).images
    device, dtype = pipe.vae.device, pipe.vae.dtype
    side = latents.shape[1] * pipe.vae_scale_factor
    x = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()).to(device, dtype)
    flux = isinstance(pipe, diffusers.FluxPipeline)
    if flux:
        x = pipe._pack_latents(x, *x.shape)
    states = text_states("flux" if flux else "sd3", pipe.transformer.config)
    text, pooled = (torch.from_numpy(array).to(device, dtype) for array in states.values())
    given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    if not flux:
        given |= {"negative_prompt_embeds": -text, "negative_pooled_prompt_embeds": -pooled}
    return pipe(latents=x, height=side, width=side, **given, **options).images


def network(transformer: Any, inputs: dict[str, np.ndarray], dtype: str) -> Callable[[], Any]:
    """One call of the transformer, as its pipeline calls it."""
    device = next(transformer.parameters()).device
    given = {}
    for name, value in inputs.items():
        tensor = torch.from_numpy(value).to(device)
        given[name] = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
    x, t = given.pop("x").permute(0, 3, 1, 2).contiguous(), given.pop("t")
    if "labels" in given:
        call = functools.partial(transformer, x, t, class_labels=given["labels"])
    elif "guidance" in given:
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        ids = diffusers.FluxPipeline._prepare_latent_image_ids(len(x), rows, columns, device, x.dtype)
        texts = torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=device, dtype=x.dtype)
        tokens = diffusers.FluxPipeline._pack_latents(x, *x.shape)
        call = functools.partial(transformer, tokens, timestep=t, img_ids=ids, txt_ids=texts, **given)
    else:
        call = functools.partial(transformer, x, timestep=t, **given)

    @torch.no_grad()
    def run():
        output = call(return_dict=False)[0]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return output

    return run
