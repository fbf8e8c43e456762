"""How much pictures differ by what pipelines of diffusers do otherwise: on tiny random models."""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.diffusers_schedulers.pipeline_runs import module_of_tests, quiet
from jaxldm import pipelines

KEY = jax.random.key(7)


@functools.cache
def pipes(write: str, *modules: str) -> tuple[pipelines.Pipeline, pipelines.Pipeline]:
    """A tiny model as jaxldm draws and as diffusers draws.

    Args:
        write: the function that writes its folder.
        modules: of tests/pipelines, in the order in which they need each other; it is in the last.
    """
    for name in ("reference_pipelines", *modules):
        module = module_of_tests(name)
    with tempfile.TemporaryDirectory() as place, quiet():
        folder = getattr(module, write)(pathlib.Path(place) / "folder")
        plain, quirky = (pipelines.load(folder, reference_quirks=quirks) for quirks in (False, True))
    return plain, quirky


def difference(models: tuple[pipelines.Pipeline, pipelines.Pipeline], *prompts: Any, **call: Any) -> float:
    """Of the latents of one call, as a part of the largest number."""
    plain, quirky = (np.asarray(pipe(KEY, *prompts, output="latents", **call)) for pipe in models)
    return float(np.abs(plain - quirky).max() / np.abs(quirky).max())


def without_a_negative_prompt() -> float:
    """Of Qwen-Image, at its scale of 4."""
    models = pipes("write_qwen_image", "t5_parts", "sd3_folders", "z_image_folders", "qwen_image_folders")
    return difference(models, "a cat", num_inference_steps=4, max_sequence_length=256, height=16, width=16)


def layers_of_the_negative() -> float:
    """Of Stable Diffusion, with one layer left out."""
    return _of_stable_diffusion("a cat", "bad", clip_skip=1)


def a_rounded_strength() -> float:
    """Of 50 steps at 0.58, of which 29 are taken here and 28 there."""
    return _of_stable_diffusion("a cat", strength=0.58, image=_picture(), num_inference_steps=50)


def noise_of_the_known_part() -> float:
    """Of inpainting by a network without mask channels."""
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 6:] = 255
    return _of_stable_diffusion("a cat", image=_picture(), mask_image=mask)


def _picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def _of_stable_diffusion(*prompts: str, **call: Any) -> float:
    start = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    call = {"num_inference_steps": 5, "solver": "ddim"} | call
    if "strength" not in call:
        call["latents"] = start
    return difference(pipes("write_sd"), *prompts, **call)


MEASURED: dict[str, Callable[[], float]] = {
    "no_negative": without_a_negative_prompt,
    "clip_skip": layers_of_the_negative,
    "strength": a_rounded_strength,
    "known_noise": noise_of_the_known_part,
}
