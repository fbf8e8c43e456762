"""Pipelines: conditions -> latents -> images. What a person calls.

from jaxldm import pipelines

pipe = pipelines.load("runs/mini-ldm")                      # or an exported folder
images = pipe(jax.random.key(0), class_labels=[3, 7], num_images=16, guidance_scale=3.0)

pipe = pipelines.load("stable-diffusion-xl-base-1.0", dtype="bfloat16")    # a folder with model_index.json
images = pipe(jax.random.key(0), prompt=["a cat"], num_inference_steps=30, solver="dpmpp_2m")
"""

from jaxldm.pipelines.amused import Amused
from jaxldm.pipelines.class_folders import load_original
from jaxldm.pipelines.deepfloyd_if import DeepFloydIF, DeepFloydIFSuperResolution
from jaxldm.pipelines.flux import Flux
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
from jaxldm.pipelines.image_inputs import as_images, as_masks
from jaxldm.pipelines.images import check_drawn, check_output_folder, columns_for, save_samples
from jaxldm.pipelines.latent_diffusion import Images, LatentDiffusion, Settings, draw, named_solver
from jaxldm.pipelines.latent_images import decode_images, encode_images
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pixart import PixArtAlpha, PixArtSigma
from jaxldm.pipelines.prompts import encode_texts
from jaxldm.pipelines.schedulers import Plan, default_solver, make_plan
from jaxldm.pipelines.stable_diffusion import StableDiffusion
from jaxldm.pipelines.stable_diffusion_3 import StableDiffusion3
from jaxldm.pipelines.stable_diffusion_xl import StableDiffusionXL
from jaxldm.pipelines.text_folders import PIPELINES, modules_in, with_lora
from jaxldm.pipelines.text_pipeline import TextPipeline
from jaxldm.pipelines.text_to_image import TextToImage
from jaxldm.pipelines.wuerstchen import Wuerstchen, WuerstchenDecoder, WuerstchenPrior
from jaxldm.pipelines.z_image import ZImage

__all__ = [
    "PIPELINES",
    "Amused",
    "DeepFloydIF",
    "DeepFloydIFSuperResolution",
    "Flux",
    "Images",
    "LatentDiffusion",
    "Network",
    "PixArtAlpha",
    "PixArtSigma",
    "Plan",
    "Settings",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "TensorComparison",
    "TextPipeline",
    "TextToImage",
    "Wuerstchen",
    "WuerstchenDecoder",
    "WuerstchenPrior",
    "ZImage",
    "as_images",
    "as_masks",
    "check_drawn",
    "check_export_folder",
    "check_output_folder",
    "columns_for",
    "compare",
    "components",
    "decode_images",
    "default_solver",
    "draw",
    "encode_images",
    "encode_texts",
    "is_denoiser",
    "kind_of",
    "load",
    "load_original",
    "make_plan",
    "modules_in",
    "named_solver",
    "save",
    "save_samples",
    "with_lora",
]
