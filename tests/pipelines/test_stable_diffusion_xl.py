"""SDXL's base, its refiner and the hand-over against the pipelines of diffusers, on tiny random folders."""

import jax
import numpy as np
import pytest
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as img2img_module
from picture_checks import (
    KEY,
    as_tensor,
    assert_images_agree,
    assert_latents_agree,
    picture,
    start_noise,
    without_posterior_noise,
)
from reference_pipelines import noise, open_reference, theirs, write_sdxl

from jaxldm import pipelines
from jaxldm.errors import InvalidArgumentError

PROMPT = "a cat"
STEPS = {"num_inference_steps": 5, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sdxl")
    return {name: write_sdxl(root / name, refiner=name == "refiner") for name in ("base", "refiner")}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: pipelines.load(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("solver", [None, "ddim", "dpmpp_2m", "unipc"])
def test_text_to_image(folders, pipes, solver):
    """None is the folder's own, Euler. Without a negative prompt the other branch takes zeros."""
    reference = open_reference(StableDiffusionXLPipeline, folders["base"], solver)
    latents = reference(PROMPT, latents=theirs(noise()), output_type="latent", **STEPS).images
    call = dict(latents=noise(), solver=solver, **STEPS)
    drawn = pipes["base"](KEY, PROMPT, output="latents", **call)
    assert_latents_agree(drawn, latents)
    images = pipes["base"](KEY, PROMPT, **call) if solver is None else pipes["base"].decode(drawn)
    assert_images_agree(images, reference, latents)


def test_playground_walks_the_path_of_edm(folders, pipes):
    """The same U-Net, preconditioned as in EDM; the reference's autoencoder is left out."""
    reference = open_reference(StableDiffusionXLPipeline, folders["base"])
    reference.scheduler = EDMDPMSolverMultistepScheduler()
    latents = reference(PROMPT, latents=theirs(noise()), output_type="latent", **STEPS).images
    config = dict(reference.scheduler.config) | {"_class_name": "EDMDPMSolverMultistepScheduler"}
    pipe = pipes["base"].replace(scheduler=config)
    start = noise() * float(reference.scheduler.init_noise_sigma)
    assert_latents_agree(pipe(KEY, PROMPT, latents=start, output="latents", **STEPS), latents)


def test_other_texts_for_the_second_encoder_and_micro_conditioning(folders, pipes):
    reference = open_reference(StableDiffusionXLPipeline, folders["base"])
    texts = dict(negative_prompt="bad", prompt_2="the dog sat", negative_prompt_2="a bat!")
    sizes = dict(
        original_size=(96, 64),
        crops_coords_top_left=(3, 5),
        target_size=(32, 48),
        negative_original_size=(10, 12),
        negative_crops_coords_top_left=(2, 1),
        negative_target_size=(20, 24),
    )
    call = dict(**texts, **sizes, **STEPS)
    latents = reference(PROMPT, latents=theirs(noise()), output_type="latent", **call).images
    drawn = pipes["base"](KEY, PROMPT, latents=noise(), output="latents", **call)
    assert_latents_agree(drawn, latents)
    plain = pipes["base"](KEY, PROMPT, latents=noise(), output="latents", **texts, **STEPS)
    assert np.abs(plain - drawn).max() > 0.01  # the numbers are used


@pytest.mark.parametrize(
    ("name", "option", "instead"),
    [
        ("base", {"aesthetic_score": 7.0}, "a target_size"),
        ("base", {"negative_aesthetic_score": 1.0}, "a target_size"),
        ("refiner", {"target_size": (16, 16)}, "an aesthetic_score"),
        ("refiner", {"negative_target_size": (16, 16)}, "an aesthetic_score"),
    ],
)
def test_numbers_that_the_model_does_not_take_are_refused(pipes, name, option, instead):
    """They were ignored, in diffusers too."""
    words = f"{next(iter(option))} is not for this model, which takes {instead} in its place"
    with pytest.raises(InvalidArgumentError, match=words):
        pipes[name](KEY, PROMPT, **option, **STEPS)


def test_base_hands_over_to_the_refiner(folders, pipes):
    """With a solver that remembers, and that lowers its order where a run ends, but not where it is cut."""
    solver = "dpmpp_2m"
    base = open_reference(StableDiffusionXLPipeline, folders["base"], solver)
    refiner = open_reference(StableDiffusionXLImg2ImgPipeline, folders["refiner"], solver)
    steps = dict(num_inference_steps=8, guidance_scale=4.0)
    middle = base(PROMPT, latents=theirs(noise()), denoising_end=0.8, output_type="latent", **steps).images
    latents = refiner(PROMPT, image=middle, denoising_start=0.8, output_type="latent", **steps).images
    call = dict(solver=solver, output="latents", **steps)
    drawn = pipes["base"](KEY, PROMPT, latents=noise(), denoising_end=0.8, **call)
    drawn = pipes["refiner"](KEY, PROMPT, latents=drawn, denoising_start=0.8, **call)
    assert_latents_agree(drawn, latents)


def test_the_refiner_alone_is_image_to_image_with_an_aesthetic_score(folders, pipes, monkeypatch):
    reference = open_reference(StableDiffusionXLImg2ImgPipeline, folders["refiner"])
    without_posterior_noise(monkeypatch, img2img_module, [theirs(start_noise())])
    call = dict(strength=0.6, aesthetic_score=7.5, negative_aesthetic_score=1.0, **STEPS)
    latents = reference(PROMPT, image=as_tensor(picture()), output_type="latent", **call).images
    drawn = pipes["refiner"](KEY, PROMPT, image=picture(), output="latents", **call)
    assert_latents_agree(drawn, latents)
    assert pipes["refiner"].text_encoder is None and pipes["refiner"].requires_aesthetics_score


def test_a_folder_that_ours_wrote_is_opened_by_diffusers(pipes, tmp_path):
    for name, kind in (
        ("base", StableDiffusionXLPipeline),
        ("refiner", StableDiffusionXLImg2ImgPipeline),
    ):
        pipelines.save(pipes[name], tmp_path / name)
        reference = open_reference(kind, tmp_path / name)
        assert type(reference.scheduler).__name__ == "EulerDiscreteScheduler"
        assert reference.config.force_zeros_for_empty_prompt == (name == "base")
        assert (reference.text_encoder is None) == (name == "refiner")
        again = pipelines.load(tmp_path / name)
        assert not any(row.difference for row in pipelines.compare(pipes[name], again))
        assert jax.tree.structure(again.unet) == jax.tree.structure(pipes[name].unet)
