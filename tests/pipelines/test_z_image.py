"""Z-Image against the pipelines of diffusers, on a tiny random folder. They count guidance from 0."""

import dataclasses
import warnings

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.z_image import pipeline_z_image as text_module
from diffusers.pipelines.z_image import pipeline_z_image_img2img as img2img_module
from diffusers.pipelines.z_image import pipeline_z_image_inpaint as inpaint_module
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
from reference_pipelines import SIZE, noise, open_reference, theirs
from z_image_folders import write_z_image

from jaxldm import pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.families.z_image import TEMPLATE
from jaxldm.pipelines.prompts import encode_texts

CHANNELS = 16
NOISE = noise(2, channels=CHANNELS)
# 16 and 40 tokens of text, with what the chat adds: the image has another place behind each.
PROMPTS = ("a cat", "{} the dog sat on a cat, and the hat")
OURS = {"num_inference_steps": 5, "guidance_scale": 4.0, "max_sequence_length": 64}
THEIRS = OURS | {"guidance_scale": 3.0, "height": SIZE, "width": SIZE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_z_image(tmp_path_factory.mktemp("z_image"))


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return open_reference(diffusers.ZImagePipeline, folder)


@pytest.fixture(scope="module")
def their_latents(reference):
    """Their pipeline writes into the list of prompts that it is given, so each call gets a new one."""
    prompts, negative = list(PROMPTS), ["bad", "bad"]
    call = dict(negative_prompt=negative, latents=theirs(NOISE), output_type="latent", **THEIRS)
    latents = reference(prompts, **call).images
    assert prompts[0] == TEMPLATE.format(PROMPTS[0]) != PROMPTS[0]
    return latents


def test_text_to_image(pipe, reference, their_latents):
    """By the folder's own solver, Euler, on texts of different lengths."""
    prompts = list(PROMPTS)
    images = pipe(KEY, prompts, "bad", latents=NOISE, **OURS)
    drawn = pipe(KEY, prompts, "bad", latents=NOISE, output="latents", **OURS)
    assert prompts == list(PROMPTS)
    assert_latents_agree(drawn, their_latents)
    assert_images_agree(images, reference, their_latents)
    given = states_of(
        pipe, prompts, ["bad", "bad"], **{name: OURS[name] for name in OURS if "length" in name}
    )
    assert set(given) >= {"prompt_embeds", "negative_prompt_attention_mask"}
    again = pipe(KEY, latents=NOISE, output="latents", **given, **OURS)
    np.testing.assert_array_equal(again, drawn)


def test_another_solver(folder, pipe, monkeypatch):
    """Heun's scheduler takes no sigmas: both use the grid that it makes itself, its last t shifted twice."""
    reference = open_reference(diffusers.ZImagePipeline, folder)
    reference.scheduler = diffusers.FlowMatchHeunDiscreteScheduler.from_config(reference.scheduler.config)

    def own_grid(scheduler, num_inference_steps, device, sigmas, mu):
        scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler.timesteps, num_inference_steps

    monkeypatch.setattr(text_module, "retrieve_timesteps", own_grid)
    call = dict(latents=theirs(NOISE[:1]), output_type="latent", **THEIRS)
    latents = reference(PROMPTS[0], **call).images
    rows = {"_spacing": "linspace", "_shift_t_min_twice": True}
    own = pipe.replace(scheduler=dict(pipe.scheduler) | rows)
    given = dict(solver="flow_heun", latents=NOISE[:1], output="latents")
    assert_latents_agree(own(KEY, PROMPTS[0], **given, **OURS), latents)


def test_guidance_up_to_a_length_and_a_part_of_the_way(pipe, reference, their_latents):
    limits = {"cfg_normalization": 0.9, "cfg_truncation": 0.35}
    call = dict(negative_prompt=["bad", "bad"], latents=theirs(NOISE), output_type="latent")
    latents = reference(list(PROMPTS), **call, **limits, **THEIRS).images
    drawn, *others = (
        pipe(KEY, PROMPTS, "bad", latents=NOISE, output="latents", **options, **OURS)
        for options in (limits, {"cfg_normalization": 0.9}, {"cfg_truncation": 0.35}, {})
    )
    assert_latents_agree(drawn, latents)
    for other in others:  # both act
        assert np.abs(other - drawn).max() > 0.01


def test_turbo_is_not_guided(pipe, reference):
    """And a scheduler that shifts by the number of tokens, 4 x 2 in an oblong picture."""
    config = dict(pipe.scheduler) | {"use_dynamic_shifting": True}
    given = dict(num_inference_steps=8, max_sequence_length=64)
    start, plain = NOISE[:1, :, :4], reference.scheduler
    reference.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    try:
        call = dict(height=SIZE, width=SIZE // 2, guidance_scale=0.0, output_type="latent", **given)
        latents = reference(PROMPTS[0], latents=theirs(start), **call).images
    finally:
        reference.scheduler = plain
    own = pipe.replace(scheduler=config)
    drawn = own(KEY, PROMPTS[0], guidance_scale=1.0, latents=start, output="latents", **given)
    assert_latents_agree(drawn, latents)
    assert own.num_image_tokens((SIZE, SIZE // 2)) == 8


def test_image_to_image(folder, pipe, monkeypatch):
    """Half of 5 steps is 3 of them."""
    reference = open_reference(diffusers.ZImageImg2ImgPipeline, folder)
    without_posterior_noise(monkeypatch, img2img_module, [theirs(start_noise(channels=CHANNELS))])
    call = dict(image=as_tensor(picture()), strength=0.5, output_type="latent", **THEIRS)
    latents = reference(PROMPTS[1], **call).images
    drawn = pipe(KEY, PROMPTS[1], image=picture(), strength=0.5, output="latents", **OURS)
    assert_latents_agree(drawn, latents)


def test_inpainting(folder, pipe, monkeypatch):
    """What stays is put back after each step. The reference takes its first noise for it, and is fed ours."""
    reference = open_reference(diffusers.ZImageInpaintPipeline, folder)
    start = theirs(start_noise(channels=CHANNELS))
    without_posterior_noise(monkeypatch, inpaint_module, [start])
    noises = [start, *known_noise(3, 2, CHANNELS)]
    scale = reference.scheduler.scale_noise
    monkeypatch.setattr(reference.scheduler, "scale_noise", lambda x, t, _: scale(x, t, noises.pop(0)))
    white = torch.from_numpy(mask() / np.float32(255))[None, None]
    call = dict(image=as_tensor(picture()), mask_image=white)
    latents = reference(PROMPTS[0], strength=0.6, output_type="latent", **call, **THEIRS).images
    given = dict(image=picture(), mask_image=mask(), strength=0.6, output="latents")
    assert_latents_agree(pipe(KEY, PROMPTS[0], **given, **OURS), latents)


def test_a_folder_that_ours_wrote_is_opened_by_diffusers(pipe, their_latents, tmp_path):
    pipelines.save(pipe, tmp_path)
    reference = open_reference(diffusers.ZImagePipeline, tmp_path)
    call = dict(latents=theirs(NOISE), output_type="latent", **THEIRS)
    latents = reference(list(PROMPTS), negative_prompt=["bad", "bad"], **call).images
    np.testing.assert_array_equal(latents.numpy(), their_latents.numpy())
    again = pipelines.load(tmp_path)
    assert not any(row.difference for row in pipelines.compare(pipe, again))
    assert jax.tree.structure(again.transformer) == jax.tree.structure(pipe.transformer)


def encoded(pipe, text, length):
    return encode_texts(
        pipe.text_encoder,
        pipe.tokenizer,
        [text],
        skip=1,
        final_norm=False,
        max_length=length,
        mask=True,
        template=TEMPLATE,
    )


@pytest.mark.parametrize(
    ("length", "lost"),
    [(64, ""), (44, ""), (24, "cat, and the hat"), (12, "dog sat on a cat, and the hat")],
)
def test_texts_that_are_too_long_are_cut_as_theirs_are(pipe, reference, length, lost):
    """And named without the chat around them; its end is cut first, and is not worth a word."""
    expected, _ = reference.encode_prompt(PROMPTS[1], "cpu", False, max_sequence_length=length)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = encoded(pipe, PROMPTS[1], length)
    np.testing.assert_allclose(ours.hidden[ours.mask == 1], expected[0].detach(), atol=1e-4)
    assert len(caught) == bool(lost)
    if lost:
        assert f"does not see {lost!r}" in str(caught[0].message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"guidance_scale": 0.0}, "for the 0 of a model card of Z-Image write 1"),
        ({"guidance_scale": 0.5}, "write 1.5"),
        ({"max_sequence_length": 97}, "between 1 and 96, not 97"),
        ({"height": 18, "width": 16}, "18"),
        ({"cfg_normalization": -0.5}, "0 or more, not -0.5"),
        ({"latents": noise(channels=4)}, r"latents must be \[N, h, w, 16\]"),
    ],
)
def test_calls_that_cannot_be(pipe, call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        pipe(KEY, PROMPTS[0], **{"max_sequence_length": 64} | call)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"cap_feat_dim": 10}, "states 12 wide, its transformer takes 10"),
        ("transformer", {"in_channels": 4}, "16 latent channels, its transformer takes 4"),
    ],
)
def test_parts_of_different_models_are_refused(pipe, part, change, message):
    network = getattr(pipe, part)
    module = type(network.module)(dataclasses.replace(network.config, **change))
    with pytest.raises(CheckpointError, match=message):
        pipe.replace(**{part: network.replace(module=module)}).check_parts()
