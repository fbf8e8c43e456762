"""What pipelines of diffusers do otherwise around the network, with the switch on and off."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as inpaint_module
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3_inpaint as inpaint_module_3
from picture_checks import (
    KEY,
    as_tensor,
    assert_latents_agree,
    mask,
    picture,
    start_noise,
    without_posterior_noise,
)
from reference_pipelines import SIZE, noise, open_reference, theirs, write_sd, write_sdxl
from sd3_folders import write_sd3

from jaxldm import diffusion as D
from jaxldm import pipelines

PROMPT, STEPS = "a cat", {"num_inference_steps": 4, "guidance_scale": 6.0}
WRITERS = {"sd": write_sd, "sdxl": write_sdxl, "sd3": write_sd3}


@pytest.fixture(scope="module")
def models_of(tmp_path_factory):
    """name -> (folder, ours as it draws, ours as diffusers draws)."""
    known = {}

    def model(name):
        if name not in known:
            folder = WRITERS[name](tmp_path_factory.mktemp(name) / "folder")
            pipes = (pipelines.load(folder, reference_quirks=quirks) for quirks in (False, True))
            known[name] = folder, *pipes
        return known[name]

    return model


@pytest.mark.parametrize("name", WRITERS)
def test_clip_skip_is_of_the_prompt_alone(models_of, name):
    """The states of the negative prompt are those behind all layers."""
    _, plain, quirky = models_of(name)
    skipped, whole = (pipe.encode_prompts(["a"], ["bad"], clip_skip=1)[1] for pipe in (plain, quirky))
    expected = plain.encode_prompts(["a"], ["bad"])[1]
    np.testing.assert_array_equal(whole["encoder_hidden_states"], expected["encoder_hidden_states"])
    assert np.abs(skipped["encoder_hidden_states"] - expected["encoder_hidden_states"]).max() > 1e-3


def test_a_scale_below_1_guides_nothing(models_of):
    folder, plain, quirky = models_of("sd")
    reference = open_reference(diffusers.StableDiffusionPipeline, folder, "ddim")
    call = dict(num_inference_steps=4, guidance_scale=0.5)
    start = theirs(noise())
    latents = reference(PROMPT, negative_prompt="bad", latents=start, output_type="latent", **call).images
    call |= {"latents": noise(), "output": "latents", "solver": "ddim"}
    assert_latents_agree(quirky(KEY, PROMPT, "bad", **call), latents)
    apart = plain(KEY, PROMPT, "bad", **call) - quirky(KEY, PROMPT, "bad", **call)
    assert np.abs(apart).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd", diffusers.StableDiffusionImg2ImgPipeline),
        ("sd3", diffusers.StableDiffusion3Img2ImgPipeline),
    ],
)
def test_strength_times_steps_is_of_binary_floats(models_of, name, kind):
    """50 steps at 0.58 are 28 there, and 29 here."""
    folder, plain, quirky = models_of(name)
    reference = open_reference(kind, folder)
    solver = "ddim" if name == "sd" else None  # PNDM has more rows than steps
    if name == "sd":
        reference = open_reference(kind, folder, "ddim")
    taken = []
    for steps, strength in ((50, 0.58), (50, 0.57), (10, 0.7), (10, 0.3), (7, 0.42857142857142855), (4, 1.0)):
        reference.scheduler.set_timesteps(steps)
        expected = reference.get_timesteps(steps, strength, "cpu")[1]
        call = dict(num_inference_steps=steps, strength=strength, solver=solver, image=picture())
        ours = [int(D.steps_in(pipe.grid(**call)[1])) for pipe in (plain, quirky)]
        assert ours[1] == expected, (steps, strength)
        taken.append(ours)
    if name == "sd":
        assert taken[0] == [29, 28]


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_inpainting_puts_the_known_part_back_with_the_first_noise(models_of, monkeypatch, strength):
    folder, plain, quirky = models_of("sd")
    reference = open_reference(diffusers.StableDiffusionInpaintPipeline, folder, "ddim")
    without_posterior_noise(monkeypatch, inpaint_module, [theirs(start_noise())])
    white = torch.from_numpy(mask() / np.float32(255))[None, None]
    common = dict(image=as_tensor(picture()), mask_image=white, strength=strength, height=SIZE, width=SIZE)
    latents = reference(PROMPT, output_type="latent", **common, **STEPS).images
    call = dict(image=picture(), mask_image=mask(), strength=strength, output="latents", solver="ddim")
    assert_latents_agree(quirky(KEY, PROMPT, **call, **STEPS), latents)
    apart = plain(KEY, PROMPT, **call, **STEPS) - quirky(KEY, PROMPT, **call, **STEPS)
    assert np.abs(apart).max() > 1e-3


def test_inpainting_on_a_flow(models_of, monkeypatch):
    """From latents that the call names, which are that noise."""
    folder, _, quirky = models_of("sd3")
    reference = open_reference(diffusers.StableDiffusion3InpaintPipeline, folder)
    start = noise(channels=16)
    without_posterior_noise(monkeypatch, inpaint_module_3, [theirs(start)])
    white = torch.from_numpy(mask() / np.float32(255))[None, None]
    more = {"max_sequence_length": 20}
    common = dict(image=as_tensor(picture()), mask_image=white, strength=1.0, height=SIZE, width=SIZE)
    latents = reference(PROMPT, output_type="latent", **common, **STEPS, **more).images
    call = dict(image=picture(), mask_image=mask(), strength=1.0, latents=start, output="latents")
    assert_latents_agree(quirky(KEY, PROMPT, **call, **STEPS, **more), latents)
