"""Stable Diffusion 1.5 and XL of diffusers, with random weights: the other side of the benchmark."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from experiments.benchmarks.stable_diffusion_pairs import PROMPT, SCHEDULER, modules, write_tokenizer
from experiments.benchmarks.torch_common import random_module


def pipeline(family: str, dtype: str, quick: bool, device: torch.device) -> diffusers.DiffusionPipeline:
    """The same model in diffusers, with the random weights that it starts with."""
    parts: dict[str, Any] = {
        name: random_module(module.config, dtype, device)
        for name, module in modules(family, dtype, quick).items()
    }
    parts["scheduler"] = diffusers.DPMSolverMultistepScheduler(**SCHEDULER)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        parts["tokenizer"] = transformers.CLIPTokenizer.from_pretrained(folder)
    if "text_encoder_2" in parts:
        parts["tokenizer_2"] = parts["tokenizer"]
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts, **none)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, latents: np.ndarray, steps: int, guidance: float) -> np.ndarray:
    """Pixels [N, H, W, 3] in [0, 1], on the host."""
    x = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()).to(pipe.device, pipe.vae.dtype)
    side = latents.shape[1] * pipe.vae_scale_factor
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    return pipe([PROMPT], latents=x, height=side, width=side, **options).images


def network(unet: Any, inputs: dict[str, np.ndarray], dtype: str) -> Callable[[], Any]:
    """One call of the U-Net, [2, c, h, w]."""
    device = next(unet.parameters()).device
    given = {
        name: torch.from_numpy(value).to(device, getattr(torch, dtype)) for name, value in inputs.items()
    }
    x, text = given.pop("x").permute(0, 3, 1, 2).contiguous(), given.pop("encoder_hidden_states")
    t = given.pop("t")[0].long()  # as the pipeline gives it, or it is compiled a second time
    more = {"added_cond_kwargs": given} if given else {}

    @torch.no_grad()
    def run():
        output = unet(x, t, text, return_dict=False, **more)[0]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return output

    return run
