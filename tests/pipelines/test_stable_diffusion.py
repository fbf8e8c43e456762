"""Stable Diffusion 1.x and 2.x against the pipelines of diffusers, on tiny random folders that it wrote."""

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.latent_consistency_models import (
    pipeline_latent_consistency_img2img as lcm_img2img_module,
)
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img_module
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as inpaint_module
from diffusers.schedulers import scheduling_ddpm, scheduling_lcm
from picture_checks import (
    KEY,
    as_tensor,
    assert_images_agree,
    assert_latents_agree,
    known_noise,
    mask,
    picture,
    start_noise,
    without_posterior_noise,
)
from reference_pipelines import LATENT, REFERENCE, SIZE, noise, open_reference, theirs, write_sd

from jaxldm import pipelines

PROMPTS, NEGATIVE = ["a cat", "the dog sat, at last!"], "bad"
STEPS = {"num_inference_steps": 5, "guidance_scale": 6.0}
FAMILIES = {
    "sd15": {},
    "sd2": {"scheduler": "sd2", "use_linear_projection": True},
    "inpainting": {"in_channels": 9},
    "lcm": {"scheduler": "lcm", "time_cond_proj_dim": 256},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("stable-diffusion")
    return {name: write_sd(root / name, **options) for name, options in FAMILIES.items()}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: pipelines.load(folder) for name, folder in folders.items()}


@pytest.mark.parametrize(
    ("family", "solver"),
    [
        *(("sd15", name) for name in (None, *REFERENCE)),
        *(("sd2", name) for name in (None, *list(REFERENCE)[1:])),
    ],
)
def test_text_to_image(folders, pipes, family, solver):
    """None is the folder's own: PNDM for SD 1.5, DDIM for SD 2."""
    reference = open_reference(StableDiffusionPipeline, folders[family], solver)
    start = noise(2)
    rescale = {"guidance_rescale": 0.6} if family == "sd2" else {}
    latents = reference(
        PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        latents=theirs(start),
        output_type="latent",
        **STEPS,
        **rescale,
    ).images
    scale = float(reference.scheduler.init_noise_sigma)
    if scale != 1:  # it counts in x / alpha
        scale *= pipes[family].grid(solver=solver, num_inference_steps=5)[1].alpha[0]
    call = dict(solver=solver, latents=scale * start, **STEPS, **rescale)
    assert_latents_agree(pipes[family](KEY, PROMPTS, NEGATIVE, output="latents", **call), latents)
    assert_images_agree(pipes[family](KEY, PROMPTS, NEGATIVE, **call), reference, latents)


@pytest.mark.parametrize(
    ("solver", "rows"),
    [
        ("euler", {"timesteps": [999, 700, 350, 20]}),
        ("euler", {"sigmas": [14.0, 5.0, 1.0, 0.2, 0.0]}),
        ("dpmpp_2m", {"timesteps": [981, 640, 300, 41]}),
        ("ddpm", {"timesteps": [950, 500, 100]}),
    ],
)
def test_rows_that_a_call_writes_down(folders, pipes, monkeypatch, solver, rows):
    """Timesteps, and noise levels with the 0 at their end that the reference wants."""
    reference = open_reference(
        StableDiffusionPipeline, folders["sd15"], solver if solver in REFERENCE else None
    )
    if solver == "ddpm":
        betas = reference.scheduler.config
        reference.scheduler = DDPMScheduler.from_config(betas, clip_sample=False)
        queue = [theirs(np.asarray(jax.random.normal(key, (1, LATENT, LATENT, 4)))) for key in step_keys(3)]
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **options: queue.pop(0))
    start = noise()
    call = {"guidance_scale": 6.0, **rows}
    latents = reference(PROMPTS[0], latents=theirs(start), output_type="latent", **call).images
    scale = float(reference.scheduler.init_noise_sigma)
    if scale != 1:
        scale *= pipes["sd15"].grid(solver=solver, **rows)[1].alpha[0]
    given = dict(solver=solver, latents=scale * start, output="latents", **call)
    assert_latents_agree(pipes["sd15"](KEY, PROMPTS[0], **given), latents)


def step_keys(count):
    """The keys of image 0 of KEY at its steps."""
    return [jax.random.fold_in(jax.random.fold_in(KEY, 0), i) for i in range(count)]


def test_clip_skip(folders, pipes):
    """The states before the encoder's last layer, normalised as those behind it are."""
    reference = open_reference(StableDiffusionPipeline, folders["sd15"])
    ids = reference.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    states = reference.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    norms = dict(reference.text_encoder.named_modules())
    norm = next(module for name, module in norms.items() if name.endswith("final_layer_norm"))
    cond, _ = pipes["sd15"].encode_prompts(PROMPTS, clip_skip=1)
    np.testing.assert_allclose(cond["encoder_hidden_states"], norm(states).detach().numpy(), atol=1e-4)


def test_without_guidance_the_negative_prompt_is_not_asked(folders, pipes):
    reference = open_reference(StableDiffusionPipeline, folders["sd15"], "ddim")
    start = noise()
    latents = reference(
        PROMPTS[0], latents=theirs(start), output_type="latent", num_inference_steps=3, guidance_scale=1.0
    ).images
    drawn = pipes["sd15"](
        KEY,
        PROMPTS[0],
        latents=start,
        output="latents",
        num_inference_steps=3,
        guidance_scale=1.0,
        solver="ddim",
    )
    assert_latents_agree(drawn, latents)


def test_image_to_image(folders, pipes, monkeypatch):
    reference = open_reference(StableDiffusionImg2ImgPipeline, folders["sd15"], "ddim")
    without_posterior_noise(monkeypatch, img2img_module, [theirs(start_noise())])
    latents = reference(
        PROMPTS[0], image=as_tensor(picture()), strength=0.61, output_type="latent", **STEPS
    ).images
    drawn = pipes["sd15"](
        KEY, PROMPTS[0], image=picture(), strength=0.61, output="latents", solver="ddim", **STEPS
    )
    assert_latents_agree(drawn, latents)


def test_reference_quirks(folders, monkeypatch):
    """With the switch noise of our own begins in the scale of diffusers, and PNDM is cut where it cuts it."""
    pipe = pipelines.load(folders["sd15"], reference_quirks=True)
    reference = open_reference(StableDiffusionPipeline, folders["sd15"])
    latents = reference(PROMPTS[0], latents=theirs(start_noise()), output_type="latent", **STEPS).images
    assert_latents_agree(pipe(KEY, PROMPTS[0], output="latents", **STEPS), latents)
    reference = open_reference(StableDiffusionImg2ImgPipeline, folders["sd15"])
    without_posterior_noise(monkeypatch, img2img_module, [theirs(start_noise())])
    call = dict(strength=0.61, **STEPS)
    latents = reference(PROMPTS[0], image=as_tensor(picture()), output_type="latent", **call).images
    drawn = pipe(KEY, PROMPTS[0], image=picture(), output="latents", **call)
    assert_latents_agree(drawn, latents)


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_inpainting_by_putting_the_known_part_back(folders, pipes, monkeypatch, strength):
    """The reference takes its first noise at every step, ours a fresh one: it is fed ours."""
    reference = open_reference(StableDiffusionInpaintPipeline, folders["sd15"], "ddim")
    without_posterior_noise(monkeypatch, inpaint_module, [theirs(start_noise())])
    first = 5 - int(5 * strength)
    noises = known_noise(5 - first, first)
    if strength < 1:
        noises.insert(0, theirs(start_noise()))
    add_noise = reference.scheduler.add_noise
    monkeypatch.setattr(
        reference.scheduler, "add_noise", lambda image, _, t: add_noise(image, noises.pop(0), t)
    )
    white = torch.from_numpy(mask() / np.float32(255))[None, None]
    common = dict(image=as_tensor(picture()), mask_image=white, strength=strength, height=SIZE, width=SIZE)
    latents = reference(PROMPTS[0], output_type="latent", **common, **STEPS).images
    drawn = pipes["sd15"](
        KEY,
        PROMPTS[0],
        image=picture(),
        mask_image=mask(),
        strength=strength,
        latents=start_noise() if strength == 1 else None,  # else scaled by sigma[0], which DDIM takes as 1
        output="latents",
        solver="ddim",
        **STEPS,
    )
    assert_latents_agree(drawn, latents)
    kept = mask()[::2, ::2] == 0
    image = pipelines.encode_images(pipes["sd15"].vae, pipelines.as_images(picture()))
    np.testing.assert_allclose(drawn[0][kept], image[0][kept], atol=1e-6)


def test_inpainting_by_a_network_that_takes_the_mask(folders, pipes, monkeypatch):
    reference = open_reference(StableDiffusionInpaintPipeline, folders["inpainting"], "ddim")
    without_posterior_noise(monkeypatch, inpaint_module, [theirs(noise())])
    white = torch.from_numpy(mask() / np.float32(255))[None, None]
    common = dict(image=as_tensor(picture()), mask_image=white, height=SIZE, width=SIZE)
    latents = reference(PROMPTS[0], latents=theirs(noise()), output_type="latent", **common, **STEPS).images
    drawn = pipes["inpainting"](
        KEY,
        PROMPTS[0],
        image=picture(),
        mask_image=mask(),
        latents=noise(),
        output="latents",
        solver="ddim",
        **STEPS,
    )
    assert_latents_agree(drawn, latents)


def feed_steps(monkeypatch, count):
    """The reference draws at its steps what ours draws for image 0 of KEY."""
    steps = [theirs(np.asarray(jax.random.normal(key, (1, LATENT, LATENT, 4)))) for key in step_keys(count)]
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *args, **options: steps.pop(0))


def test_latent_consistency_model(folders, pipes, monkeypatch):
    """The network takes the guidance scale; each step but the last adds fresh noise."""
    reference, pipe = open_reference(LatentConsistencyModelPipeline, folders["lcm"]), pipes["lcm"]
    feed_steps(monkeypatch, 3)
    call = dict(guidance_scale=3.0, num_inference_steps=4)
    latents = reference(PROMPTS[0], latents=theirs(noise()), output_type="latent", **call).images
    assert pipe.is_guidance_distilled and pipe.default_steps() == 4
    drawn = pipe(KEY, PROMPTS[0], latents=noise(), output="latents", guidance_scale=3.0)
    assert_latents_agree(drawn, latents)


def test_latent_consistency_model_from_an_image(folders, pipes, monkeypatch):
    """The strength takes away the noisiest of the timesteps that the distillation visited."""
    reference = open_reference(LatentConsistencyModelImg2ImgPipeline, folders["lcm"])
    without_posterior_noise(monkeypatch, lcm_img2img_module, [theirs(start_noise())])
    feed_steps(monkeypatch, 3)
    call = dict(strength=0.7, guidance_scale=3.0, num_inference_steps=4)
    latents = reference(PROMPTS[0], image=as_tensor(picture()), output_type="latent", **call).images
    drawn = pipes["lcm"](KEY, PROMPTS[0], image=picture(), output="latents", **call)
    assert_latents_agree(drawn, latents)
