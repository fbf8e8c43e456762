"""What PyTorch's sides of the accelerator benchmarks share: random modules, compiling, the device."""

from __future__ import annotations

import copy
import functools
from typing import Any

import diffusers
import jax
import torch
import transformers

from experiments.benchmarks.timing import cores
from jaxldm import models


def device() -> torch.device | None:
    """Where PyTorch runs next to JAX: None if it does not see the accelerator that JAX sees."""
    if jax.default_backend() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda") if jax.default_backend() == "gpu" and torch.cuda.is_available() else None


def prepare() -> dict[str, Any]:
    """Uses every core; returns what the table says about PyTorch."""
    torch.set_num_threads(cores())
    return {"threads": torch.get_num_threads()}


def forget() -> None:
    """Drops compiled functions and memory: another size would make shapes dynamic, which is slower."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(run: Any) -> int:
    """Bytes of device memory that one run takes."""
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def compiled(pipe: diffusers.DiffusionPipeline, backend: str, mode: str) -> diffusers.DiffusionPipeline:
    """The same weights, with network and decoder under torch.compile; what is left is text, milliseconds."""
    options = {"mode": mode} if backend == "inductor" else {}
    compile_ = functools.partial(torch.compile, backend=backend, **options)
    vae, other = copy.copy(pipe.vae), copy.copy(pipe)
    vae.decode = compile_(pipe.vae.decode)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(other, name, compile_(getattr(pipe, name)))
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
