"""What PyTorch's sides of the accelerator benchmarks share: random modules, compiling, the device."""

from __future__ import annotations

import copy
import functools
from typing import Any

import diffusers
import torch
import transformers

from jaxldm import models


def device() -> torch.device:
    """The first GPU that PyTorch sees, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget() -> None:
    """Drops compiled functions and memory: another size would make shapes dynamic, which is slower."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def compiled(
    pipe: diffusers.DiffusionPipeline, backend: str = "inductor", whole: bool = True
) -> diffusers.DiffusionPipeline:
    """The same weights, with network and decoder under torch.compile; what is left is text, milliseconds.

    whole: False compiles each kind of block of the network once, as diffusers advises for FLUX, where that
    takes an eighth of the minutes for nearly the same speed. It changes the network of `pipe` itself.
    """
    compile_ = functools.partial(torch.compile, backend=backend)
    vae, other = copy.copy(pipe.vae), copy.copy(pipe)
    vae.decode = compile_(pipe.vae.decode)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    if whole:
        setattr(other, name, compile_(getattr(pipe, name)))
    else:
        getattr(pipe, name).compile_repeated_blocks(backend=backend)
    other.vae = vae
    return other


def denoiser(pipe: diffusers.DiffusionPipeline) -> Any:
    """The U-Net or transformer."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def random_module(config: Any, dtype: str, device: torch.device) -> torch.nn.Module:
    """The same architecture with the random weights that it starts with, made on the device in that dtype."""
    entries = models.config_to_dict(config)
    entries = {
        name: value
        for name, value in entries.items()
        if not name.startswith("_") and name not in ("architectures", "model_type")
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with device:
            if config.library == "diffusers":
                model = getattr(diffusers, models.class_name(config))(**entries)
            else:
                kind = getattr(transformers, models.class_name(config))
                model = kind(kind.config_class(**entries))
    finally:
        torch.set_default_dtype(before)
    if device.type == "cuda" and config.library == "diffusers":
        model = model.to(memory_format=torch.channels_last)  # what diffusers advises for convolutions
    return model.eval()
