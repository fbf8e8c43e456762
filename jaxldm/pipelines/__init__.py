"""Pipelines: conditions -> latents -> images. What a person calls.

from jaxldm import pipelines

pipe = pipelines.load("runs/mini-ldm")                      # or an exported folder
images = pipe(jax.random.key(0), class_labels=[3, 7], num_images=16, guidance_scale=3.0)
"""

from jaxldm.pipelines.folders import (
    TensorComparison,
    check_export_folder,
    compare,
    components,
    is_denoiser,
    kind_of,
    load,
    save,
)
from jaxldm.pipelines.images import check_drawn, check_output_folder, columns_for, save_samples
from jaxldm.pipelines.latent_diffusion import Images, LatentDiffusion, Settings, draw, named_solver

__all__ = [
    "Images",
    "LatentDiffusion",
    "Settings",
    "TensorComparison",
    "check_drawn",
    "check_export_folder",
    "check_output_folder",
    "columns_for",
    "compare",
    "components",
    "draw",
    "is_denoiser",
    "kind_of",
    "load",
    "named_solver",
    "save",
    "save_samples",
]
