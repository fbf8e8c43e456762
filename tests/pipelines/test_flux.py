"""FLUX.1 against the pipelines of diffusers, on tiny random folders."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_img2img as img2img_module
from diffusers.pipelines.flux import pipeline_flux_inpaint as inpaint_module
from flux_folders import SCHEDULERS, packed, write_flux
from picture_checks import (
    KEY,
    as_tensor,
    assert_images_agree,
    assert_latents_agree,
    known_noise,
    mask,
    picture,
    start_noise,
    states_of,
    without_posterior_noise,
)
from reference_pipelines import LATENT, SIZE, noise, open_reference, ours, theirs
from sd3_folders import CHANNELS

from jaxldm import pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError

PROMPT = "a cat, the dog"
STEPS = {"num_inference_steps": 5, "guidance_scale": 3.0, "max_sequence_length": 20}
START = noise(channels=CHANNELS)
SQUARE = {"height": SIZE, "width": SIZE}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux")
    return {name: write_flux(root / name, name) for name in SCHEDULERS}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: pipelines.load(folder) for name, folder in folders.items()}


TOKENS = packed(theirs(START))


def reference_latents(reference, **call):
    tokens = reference(PROMPT, output_type="latent", **call).images
    return diffusers.FluxPipeline._unpack_latents(tokens, call["height"], call["width"], 2)


def test_dev(folders, pipes):
    """Its guidance is an input, on the grid that the number of tokens shifts: those of an oblong picture."""
    reference = open_reference(diffusers.FluxPipeline, folders["dev"])
    size, start = {"height": SIZE, "width": SIZE // 2}, START[:, :, : LATENT // 2]
    latents = reference_latents(reference, latents=packed(theirs(start)), **size, **STEPS)
    drawn = pipes["dev"](KEY, PROMPT, latents=start, output="latents", **STEPS)
    assert_latents_agree(drawn, latents)
    assert pipes["dev"].num_image_tokens((SIZE, SIZE // 2)) == 8
    other = pipes["dev"](KEY, PROMPT, latents=start, output="latents", **STEPS | {"guidance_scale": 1.0})
    assert np.abs(other - drawn).max() > 1e-3  # it is used
    with pytest.warns(UserWarning, match="ignored: give true_cfg_scale"):
        again = pipes["dev"](KEY, PROMPT, "bad", latents=start, output="latents", **STEPS)
    np.testing.assert_array_equal(again, drawn)
    assert_images_agree(pipes["dev"].decode(drawn), reference, latents)


class UniPCOnThisGrid(diffusers.UniPCMultistepScheduler):
    """Their pipeline lets it choose its grid and cut its times to whole ones; here it has FLUX's
    grid, at its own times.
    """

    def set_timesteps(self, num_inference_steps, device=None, sigmas=None, mu=None):
        even = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(num_inference_steps, device, sigmas=even, mu=mu)
        self.timesteps = 1000 * self.sigmas[:-1]


def test_states_in_place_of_texts(pipes):
    length = STEPS["max_sequence_length"]
    given = states_of(pipes["dev"], [PROMPT], ["bad"], max_sequence_length=length)
    call = dict(latents=START, output="latents", true_cfg_scale=2.0, **STEPS)
    expected = pipes["dev"](KEY, PROMPT, "bad", **call)
    np.testing.assert_array_equal(pipes["dev"](KEY, **given, **call), expected)


def test_another_solver(folders, pipes):
    """Theirs starts at t = 1 - 1e-6, ours at 1: they differ by 7e-4, with the other solvers by 1e-5."""
    reference = open_reference(diffusers.FluxPipeline, folders["dev"])
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    reference.scheduler = UniPCOnThisGrid.from_config(reference.scheduler.config, **flow)
    latents = reference_latents(reference, latents=TOKENS, **SQUARE, **STEPS)
    drawn = pipes["dev"](KEY, PROMPT, latents=START, solver="unipc", output="latents", **STEPS)
    assert_latents_agree(drawn, latents)


def test_schnell(folders, pipes):
    """Four steps without a shift, and without guidance; the reference is given a scale and ignores it."""
    reference = open_reference(diffusers.FluxPipeline, folders["schnell"])
    assert pipes["schnell"].default_steps() == 4 and pipes["dev"].default_steps() == 28
    call = {"max_sequence_length": 20, "guidance_scale": 0.0}
    latents = reference_latents(reference, latents=TOKENS, num_inference_steps=4, **SQUARE, **call)
    drawn = pipes["schnell"](KEY, PROMPT, latents=START, output="latents", **call)
    assert_latents_agree(drawn, latents)
    with pytest.raises(InvalidArgumentError, match=r"takes no guidance.*which is 3\.5; true_cfg_scale"):
        pipes["schnell"](KEY, PROMPT, guidance_scale=3.5)


def test_texts_are_as_long_as_in_training(pipes):
    for name, tokens in (("dev", 512), ("schnell", 256)):
        cond, uncond = pipes[name].encode_prompts([PROMPT, "a hat"], None, (SIZE, SIZE))
        assert cond["encoder_hidden_states"].shape == uncond["encoder_hidden_states"].shape == (2, tokens, 24)
    assert pipes["dev"].default_size == (128 * 2, 128 * 2)  # 1024 pixels at the published factor of 8


def test_reference_quirks(folders, pipes):
    """A true scale without a negative prompt guides nothing then; schnell gets as many tokens as dev."""
    quirky = pipelines.load(folders["schnell"], reference_quirks=True)
    reference = open_reference(diffusers.FluxPipeline, folders["schnell"])
    call = {"max_sequence_length": 20, "true_cfg_scale": 2.0}
    latents = reference_latents(reference, latents=TOKENS, num_inference_steps=4, **SQUARE, **call)
    assert_latents_agree(quirky(KEY, PROMPT, latents=START, output="latents", **call), latents)
    guided = pipes["schnell"](KEY, PROMPT, latents=START, output="latents", **call)
    assert np.abs(guided - ours(latents)).max() > 1e-3
    cond, _ = quirky.encode_prompts([PROMPT], None, (SIZE, SIZE))
    assert cond["encoder_hidden_states"].shape == (1, 512, 24)


def test_image_to_image_with_true_guidance_and_other_texts_for_t5(folders, pipes, monkeypatch):
    """2.5 of 5 steps: the half is taken, too."""
    reference = open_reference(diffusers.FluxImg2ImgPipeline, folders["dev"])
    without_posterior_noise(monkeypatch, img2img_module, [theirs(start_noise(channels=CHANNELS))])
    texts = dict(negative_prompt="bad", prompt_2="the cat sat.", negative_prompt_2="dogs!")
    call = dict(strength=0.5, true_cfg_scale=2.5, **texts, **STEPS)
    latents = reference_latents(reference, image=as_tensor(picture()), **SQUARE, **call)
    steps = []
    call |= {"progress": lambda done, _: steps.append(int(done))}
    drawn = pipes["dev"](KEY, PROMPT, image=picture(), output="latents", **call)
    jax.effects_barrier()
    assert_latents_agree(drawn, latents)
    assert max(steps) == 3 == pipes["dev"].num_callbacks(1, **call, image=picture())


def test_inpainting(folders, pipes, monkeypatch):
    """What stays is put back after each step; the reference's noise for it is fed ours."""
    reference = open_reference(diffusers.FluxInpaintPipeline, folders["dev"])
    without_posterior_noise(monkeypatch, inpaint_module, [theirs(start_noise(channels=CHANNELS))])
    noises = [None, *map(packed, known_noise(3, 2, CHANNELS))]
    scale_noise = reference.scheduler.scale_noise

    def scaled(image, timestep, start):
        fed = noises.pop(0)
        return scale_noise(image, timestep, start if fed is None else fed)

    monkeypatch.setattr(reference.scheduler, "scale_noise", scaled)
    white = torch.from_numpy(mask() / np.float32(255))[None, None]
    call = dict(strength=0.6, **STEPS)
    given = {"image": as_tensor(picture()), "mask_image": white} | SQUARE
    latents = reference_latents(reference, **given, **call)
    drawn = pipes["dev"](KEY, PROMPT, image=picture(), mask_image=mask(), output="latents", **call)
    assert_latents_agree(drawn, latents)


def test_a_folder_that_ours_wrote_is_opened_by_diffusers(folders, pipes, tmp_path):
    pipelines.save(pipes["schnell"], tmp_path)
    call = {"max_sequence_length": 20, "num_inference_steps": 2, **SQUARE}
    before, after = (
        reference_latents(open_reference(diffusers.FluxPipeline, folder), latents=TOKENS, **call)
        for folder in (folders["schnell"], tmp_path)
    )
    np.testing.assert_array_equal(after.numpy(), before.numpy())
    again = pipelines.load(tmp_path)
    assert not any(row.difference for row in pipelines.compare(pipes["schnell"], again))
    assert jax.tree.structure(again.transformer) == jax.tree.structure(pipes["schnell"].transformer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled_projection_dim": 30}, "its CLIP gives a pooled state 16 wide, its transformer takes 30"),
        ({"joint_attention_dim": 44}, "its T5 gives states 24 wide, its transformer takes 44"),
        ({"in_channels": 16}, "16 latent channels, its transformer takes 4"),
    ],
)
def test_parts_of_different_models_are_refused(pipes, changes, message):
    transformer = pipes["dev"].transformer
    config = dataclasses.replace(transformer.config, **changes)
    module = dataclasses.replace(transformer.module, config=config)
    mixed = pipes["dev"].replace(transformer=dataclasses.replace(transformer, module=module))
    with pytest.raises(CheckpointError, match=message):
        mixed.check_parts()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequence_length": 600}, "between 1 and 512, not 600"),
        ({"prompt_2": ["a", "b"]}, "prompt_2"),
        ({"height": 18, "width": 16}, "18"),
        ({"latents": np.zeros((1, 8, 8, 4), np.float32)}, "latents must be"),
        ({"true_cfg_scale": -1.0}, "true_cfg_scale must be"),
    ],
)
def test_calls_that_cannot_be(pipes, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        pipes["dev"](KEY, PROMPT, **options)
