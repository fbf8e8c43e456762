"""Pipelines: labels or texts -> latents -> images. What a person calls.

from jaxldm import pipelines

pipe = pipelines.load("runs/mini-ldm")                      # or an exported folder
images = pipe(jax.random.key(0), class_labels=[3, 7], num_images=16, guidance_scale=3.0)

pipe = pipelines.load("stable-diffusion-xl-base-1.0", dtype="bfloat16")    # a folder with model_index.json
images = pipe(jax.random.key(0), prompt=["a cat"], num_inference_steps=30, solver="dpmpp_2m")

`generate.py` is the call on one screen, `families/` has what differs from family to family, and
`family.py` how to add one.
"""

from jaxldm.pipelines.cache_calibration import calibrate_cache
from jaxldm.pipelines.call import Call, Defaults, Request
from jaxldm.pipelines.comparison import TensorComparison, compare, components
from jaxldm.pipelines.control import with_control
from jaxldm.pipelines.families import FAMILIES, PIPELINES
from jaxldm.pipelines.families.class_to_image import class_to_image
from jaxldm.pipelines.families.flux_pictures import as_flux_control
from jaxldm.pipelines.families.wuerstchen import join_wuerstchen
from jaxldm.pipelines.family import Family, Folder, default_latent_spec
from jaxldm.pipelines.folders import (
    check_export_folder,
    is_denoiser,
    kind_of,
    load,
    load_original,
    modules_in,
    save,
    with_lora,
)
from jaxldm.pipelines.generate import generate
from jaxldm.pipelines.images import check_drawn, check_output_folder, columns_for, save_samples
from jaxldm.pipelines.inputs import Latents, LatentSpec, as_images, as_masks
from jaxldm.pipelines.inversion import invert
from jaxldm.pipelines.ip_adapter import encode_image_prompts, with_ip_adapter
from jaxldm.pipelines.latents import decode_images, encode_images
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.previews import previewer
from jaxldm.pipelines.prompts import encode_texts
from jaxldm.pipelines.pruning import prune, unit_importance
from jaxldm.pipelines.quantization import calibrate_quantization, quantize
from jaxldm.pipelines.weak_guidance import (
    PerturbedAttention,
    SkipLayers,
    read_weak_guidance,
    with_free_u,
    with_token_merging,
)
from jaxldm.pipelines.words import with_embedding, with_word

__all__ = [
    "FAMILIES",
    "PIPELINES",
    "Call",
    "Defaults",
    "Family",
    "Folder",
    "LatentSpec",
    "Latents",
    "Network",
    "PerturbedAttention",
    "Pipeline",
    "Request",
    "SkipLayers",
    "TensorComparison",
    "as_flux_control",
    "as_images",
    "as_masks",
    "calibrate_cache",
    "calibrate_quantization",
    "check_drawn",
    "check_export_folder",
    "check_output_folder",
    "class_to_image",
    "columns_for",
    "compare",
    "components",
    "decode_images",
    "default_latent_spec",
    "encode_image_prompts",
    "encode_images",
    "encode_texts",
    "generate",
    "invert",
    "is_denoiser",
    "join_wuerstchen",
    "kind_of",
    "load",
    "load_original",
    "modules_in",
    "previewer",
    "prune",
    "quantize",
    "read_weak_guidance",
    "save",
    "save_samples",
    "unit_importance",
    "with_control",
    "with_embedding",
    "with_free_u",
    "with_ip_adapter",
    "with_lora",
    "with_token_merging",
    "with_word",
]
