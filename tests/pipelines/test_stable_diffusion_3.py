"""Stable Diffusion 3 and 3.5 against the pipelines of diffusers, on tiny random folders."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3_img2img as img2img_module
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3_inpaint as inpaint_module
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
from sd3_folders import CHANNELS, write_sd3

from jaxldm import pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError

PROMPT = "a cat, the dog"
STEPS = {"num_inference_steps": 5, "guidance_scale": 4.0}
MORE = {"max_sequence_length": 20}
NOISE = noise(channels=CHANNELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SD 3.5's kind of transformer."""
    return write_sd3(tmp_path_factory.mktemp("sd3"), dual_attention_layers=(0,), qk_norm="rms_norm")


def opened(folder):
    """Ours, on the rows of diffusers, which shifts the last one twice."""
    pipe = pipelines.load(folder)
    return pipe.replace(scheduler=pipe.scheduler | {"_shift_t_min_twice": True})


@pytest.fixture(scope="module")
def pipe(folder):
    return opened(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return open_reference(diffusers.StableDiffusion3Pipeline, folder)


def test_clip_skip(pipe, reference):
    """Of both CLIPs; the reference skips layers for the prompt alone."""
    with torch.no_grad():
        states = reference.encode_prompt(PROMPT, None, None, clip_skip=1, **MORE)[0].numpy()
    cond, uncond = pipe.encode_prompts([PROMPT], [PROMPT], clip_skip=1, **MORE)
    np.testing.assert_allclose(cond["encoder_hidden_states"], states, atol=1e-4)
    np.testing.assert_array_equal(*(branch["encoder_hidden_states"] for branch in (cond, uncond)))
    plain, _ = pipe.encode_prompts([PROMPT], **MORE)
    assert np.abs(plain["encoder_hidden_states"] - states).max() > 0.01


def test_states_in_place_of_texts(pipe):
    given = states_of(pipe, [PROMPT], ["bad"], **MORE)
    call = dict(latents=NOISE, output="latents", **STEPS, **MORE)
    np.testing.assert_array_equal(pipe(KEY, **given, **call), pipe(KEY, PROMPT, "bad", **call))


@pytest.fixture(scope="module")
def their_latents(reference):
    return reference(PROMPT, latents=theirs(NOISE), output_type="latent", **STEPS, **MORE).images


def test_text_to_image(pipe, reference, their_latents):
    """By the folder's own solver, Euler."""
    images = pipe(KEY, PROMPT, latents=NOISE, **STEPS, **MORE)
    drawn = pipe(KEY, PROMPT, latents=NOISE, output="latents", **STEPS, **MORE)
    assert_latents_agree(drawn, their_latents)
    assert_images_agree(images, reference, their_latents)


def test_another_solver_and_other_texts_for_each_encoder(folder, pipe):
    reference = open_reference(diffusers.StableDiffusion3Pipeline, folder)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler
    reference.scheduler = scheduler.from_config(reference.scheduler.config)
    texts = dict(
        negative_prompt="bad",
        prompt_2="a hat",
        prompt_3="the cat sat.",
        negative_prompt_2="at",
        negative_prompt_3="dogs!",
    )
    call = texts | STEPS | MORE
    latents = reference(PROMPT, latents=theirs(NOISE), output_type="latent", **call).images
    drawn = pipe(KEY, PROMPT, latents=NOISE, solver="flow_heun", output="latents", **call)
    assert_latents_agree(drawn, latents)


def test_a_shift_by_the_number_of_tokens(reference, pipe):
    """An oblong picture: its 4 x 2 tokens, not its pixels, choose the shift."""
    config = dict(pipe.scheduler) | {"use_dynamic_shifting": True, "shift": 1.0}
    del config["_shift_t_min_twice"]  # that is of a static shift
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    start = NOISE[:, :, :4]
    plain, reference.scheduler = reference.scheduler, dynamic
    try:
        call = dict(height=SIZE, width=SIZE // 2, **STEPS, **MORE)
        latents = reference(PROMPT, latents=theirs(start), output_type="latent", **call).images
    finally:
        reference.scheduler = plain
    dynamic = pipe.replace(scheduler=config)
    drawn = dynamic(KEY, PROMPT, latents=start, output="latents", **STEPS, **MORE)
    assert_latents_agree(drawn, latents)
    assert dynamic.num_image_tokens((SIZE, SIZE // 2)) == 8


def test_levels_of_a_call_are_shifted_as_in_diffusers_with_reference_quirks_alone(pipe):
    levels, scheduler = [1.0, 0.6, 0.3], diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=levels)
    quirky = dataclasses.replace(pipe, reference_quirks=True)
    for drawn, expected in ((pipe, [*levels, 0.0]), (quirky, scheduler.sigmas)):
        np.testing.assert_allclose(drawn.grid(sigmas=levels)[1].sigma[:4], expected, atol=1e-6)


def test_image_to_image(folder, pipe, monkeypatch):
    reference = open_reference(diffusers.StableDiffusion3Img2ImgPipeline, folder)
    without_posterior_noise(monkeypatch, img2img_module, [theirs(start_noise(channels=CHANNELS))])
    call = dict(strength=0.5, **STEPS, **MORE)
    latents = reference(PROMPT, image=as_tensor(picture()), output_type="latent", **call).images
    drawn = pipe(KEY, PROMPT, image=picture(), output="latents", **call)
    assert_latents_agree(drawn, latents)


def test_inpainting(folder, pipe, monkeypatch):
    """What stays is put back after each step. The reference takes its first noise for it, and is fed ours."""
    reference = open_reference(diffusers.StableDiffusion3InpaintPipeline, folder)
    start = theirs(start_noise(channels=CHANNELS))
    without_posterior_noise(monkeypatch, inpaint_module, [start])
    noises = [start, *known_noise(3, 2, CHANNELS)]
    scale = reference.scheduler.scale_noise
    monkeypatch.setattr(reference.scheduler, "scale_noise", lambda x, t, _: scale(x, t, noises.pop(0)))
    white = torch.from_numpy(mask() / np.float32(255))[None, None]
    common = dict(image=as_tensor(picture()), mask_image=white, height=SIZE, width=SIZE)
    call = dict(strength=0.5, **STEPS, **MORE)
    latents = reference(PROMPT, output_type="latent", **common, **call).images
    drawn = pipe(KEY, PROMPT, image=picture(), mask_image=mask(), output="latents", **call)
    assert_latents_agree(drawn, latents)


def encoded(pipe, **options):
    """(states, pooled) as the network takes them."""
    return tuple(pipe.encode_prompts([PROMPT], None, (SIZE, SIZE), **MORE, **options)[0].values())


@pytest.mark.parametrize("missing", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_any_encoder_may_be_left_out(pipe, reference, missing):
    """It is zeros then, and nothing else changes; of T5 diffusers says the same."""
    whole, whole_pooled = encoded(pipe)
    states, pooled = encoded(pipe.replace(**{missing: None}))
    zeroed, zeroed_pooled = whole.copy(), whole_pooled.copy()
    if missing == "text_encoder_3":
        zeroed[:, 77:] = 0
    else:
        part = slice(0, 16) if missing == "text_encoder" else slice(16, 36)
        zeroed[:, :77, part], zeroed_pooled[:, part] = 0, 0
    assert not np.array_equal(zeroed, whole)
    np.testing.assert_array_equal(states, zeroed)
    np.testing.assert_array_equal(pooled, zeroed_pooled)
    if missing == "text_encoder_3":
        kept, reference.text_encoder_3 = reference.text_encoder_3, None
        try:
            expected = reference.encode_prompt(PROMPT, None, None, max_sequence_length=20)
        finally:
            reference.text_encoder_3 = kept
        np.testing.assert_allclose(states, expected[0].detach(), atol=1e-4)
        np.testing.assert_allclose(pooled, expected[2].detach(), atol=1e-4)
    only = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
    alone = pipe.replace(**only | {missing: getattr(pipe, missing)})
    alone.check_parts()
    states, pooled = encoded(alone)
    np.testing.assert_array_equal(states, whole - zeroed)
    np.testing.assert_array_equal(pooled, whole_pooled - zeroed_pooled)


def test_a_folder_without_t5(tmp_path):
    folder = write_sd3(tmp_path, with_t5=False, num_layers=1)
    pipe = opened(folder)
    assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is None
    reference = open_reference(
        diffusers.StableDiffusion3Pipeline, folder, text_encoder_3=None, tokenizer_3=None
    )
    latents = reference(PROMPT, latents=theirs(NOISE), output_type="latent", **STEPS, **MORE).images
    assert_latents_agree(pipe(KEY, PROMPT, latents=NOISE, output="latents", **STEPS, **MORE), latents)


def test_a_folder_that_ours_wrote_is_opened_by_diffusers(pipe, their_latents, tmp_path):
    pipelines.save(pipe, tmp_path)
    reference = open_reference(diffusers.StableDiffusion3Pipeline, tmp_path)
    assert type(reference.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    latents = reference(PROMPT, latents=theirs(NOISE), output_type="latent", **STEPS, **MORE).images
    np.testing.assert_array_equal(latents.numpy(), their_latents.numpy())
    again = pipelines.load(tmp_path)
    assert not any(row.difference for row in pipelines.compare(pipe, again))
    assert jax.tree.structure(again.transformer) == jax.tree.structure(pipe.transformer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_3": None}, "its text_encoder_3 has no tokenizer_3"),
        (dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3")), "without a text encoder"),
        ({"transformer": {"pooled_projection_dim": 30}}, "a pooled state 36 wide, .* takes up to 40 and 30"),
        (
            {"transformer": {"joint_attention_dim": 44}},
            "its T5 gives states 40 wide, .* takes 44",
        ),
        ({"transformer": {"in_channels": 4}}, "16 latent channels, its transformer takes 4"),
    ],
)
def test_parts_of_different_models_are_refused(pipe, changes, message):
    config = pipe.transformer.module.config
    if "transformer" in changes:
        config = dataclasses.replace(config, **changes["transformer"])
        module = dataclasses.replace(pipe.transformer.module, config=config)
        changes = {"transformer": dataclasses.replace(pipe.transformer, module=module)}
    with pytest.raises(CheckpointError, match=message):
        pipe.replace(**changes).check_parts()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequence_length": 600}, "between 1 and 512, not 600"),
        ({"prompt_3": ["a", "b"]}, "prompt_3"),
        ({"height": 18}, "18"),
    ],
)
def test_calls_that_cannot_be(pipe, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        pipe(KEY, PROMPT, **options)
