"""Qwen-Image against the pipelines of diffusers, on a tiny random folder."""

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_img2img as img2img_module
from diffusers.pipelines.qwenimage import pipeline_qwenimage_inpaint as inpaint_module
from flux_folders import packed
from picture_checks import (
    KEY,
    as_tensor,
    assert_latents_agree,
    known_noise,
    mask,
    picture,
    start_noise,
    states_of,
    without_posterior_noise,
)
from qwen_image_folders import write_qwen_image
from reference_pipelines import SIZE, noise, open_reference, ours, theirs

from jaxldm import pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.families.qwen_image import DROPPED

CHANNELS = 16
NOISE = noise(2, channels=CHANNELS)
PROMPTS = ["a cat", "the dog sat on a cat, and the hat"]
# Of the chat around a text 34 tokens are left out, and of this tokenizer the chat has some 200 more.
OURS = {"num_inference_steps": 4, "max_sequence_length": 256}
THEIRS = OURS | {"height": SIZE, "width": SIZE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen_image(tmp_path_factory.mktemp("qwen_image"))


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return open_reference(diffusers.QwenImagePipeline, folder)


def reference_latents(reference, prompts, **call):
    """[N, c, h, w] of the tokens that they return."""
    call = THEIRS | {"output_type": "latent"} | call
    tokens = reference(prompts, **call).images
    return diffusers.FluxPipeline._unpack_latents(tokens, call["height"], call["width"], 2)


@pytest.fixture(scope="module")
def their_latents(reference):
    return reference_latents(reference, PROMPTS, negative_prompt=["bad"] * 2, latents=packed(theirs(NOISE)))


def assert_images_agree(images, reference, latents):
    """2 grey levels of 255, of what the reference decodes from its own latents."""
    config = reference.vae.config
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        decoded = reference.vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    grey = [np.rint((side + 1) * 127.5) for side in (images, ours(decoded))]
    assert np.ptp(grey[1]) > 20  # not a flat picture
    assert np.abs(grey[0] - grey[1]).max() <= 2


def test_text_to_image(pipe, reference, their_latents):
    """Texts of different lengths, and guidance at their scale of 4."""
    drawn = pipe(KEY, PROMPTS, "bad", latents=NOISE, output="latents", **OURS)
    assert_latents_agree(drawn, their_latents)
    assert_images_agree(pipe.decode(drawn), reference, their_latents)
    given = states_of(pipe, PROMPTS, ["bad"] * 2, max_sequence_length=256)
    assert given["prompt_embeds"].shape == (2, 256, 24)
    again = pipe(KEY, latents=NOISE, output="latents", num_inference_steps=4, **given)
    np.testing.assert_array_equal(again, drawn)


def test_without_guidance_and_without_a_negative_prompt(pipe, reference):
    """At scale 1 it is theirs without one; else ours steers away from a space. An oblong picture."""
    start = NOISE[:1, :, :4]
    call = dict(latents=packed(theirs(start)), width=SIZE // 2)
    plain = reference_latents(reference, PROMPTS[1], **call)
    given = dict(latents=start, output="latents", **OURS)
    assert_latents_agree(pipe(KEY, PROMPTS[1], true_cfg_scale=1.0, **given), plain)
    steered = reference_latents(reference, PROMPTS[1], negative_prompt=" ", true_cfg_scale=2.5, **call)
    assert_latents_agree(pipe(KEY, PROMPTS[1], true_cfg_scale=2.5, **given), steered)
    assert (plain - steered).abs().max() > 0.01
    assert pipe.num_image_tokens((SIZE, SIZE // 2)) == 8
    assert pipe.default_size == (128 * 2, 128 * 2)  # 1024 pixels at the published factor of 8


def test_reference_quirks(folder, pipe, reference, their_latents):
    """Without a negative prompt nothing is guided then, at their scale of 4; with one it is."""
    quirky = pipelines.load(folder, reference_quirks=True)
    start = NOISE[:1, :, :4]
    plain = reference_latents(reference, PROMPTS[1], latents=packed(theirs(start)), width=SIZE // 2)
    given = dict(latents=start, output="latents", **OURS)
    assert_latents_agree(quirky(KEY, PROMPTS[1], **given), plain)
    assert np.abs(ours(plain) - pipe(KEY, PROMPTS[1], **given)).max() > 0.01
    assert_latents_agree(quirky(KEY, PROMPTS, "bad", **given | {"latents": NOISE}), their_latents)


def test_image_to_image(folder, pipe, monkeypatch):
    """2 of 4 steps, guided."""
    reference = open_reference(diffusers.QwenImageImg2ImgPipeline, folder)
    start = theirs(start_noise(channels=CHANNELS))[:, None]
    without_posterior_noise(monkeypatch, img2img_module, [start])
    call = dict(negative_prompt="bad", strength=0.5)
    latents = reference_latents(reference, PROMPTS[0], image=as_tensor(picture()), **call)
    given = dict(image=picture(), output="latents", **call, **OURS)
    assert_latents_agree(pipe(KEY, PROMPTS[0], **given), latents)


def test_inpainting(folder, pipe, monkeypatch):
    """What stays is put back after each step; the reference's noise for it is fed ours."""
    reference = open_reference(diffusers.QwenImageInpaintPipeline, folder)
    start = theirs(start_noise(channels=CHANNELS))[:, None]
    without_posterior_noise(monkeypatch, inpaint_module, [start])
    noises = [None, *map(packed, known_noise(2, 2, CHANNELS))]
    scale_noise = reference.scheduler.scale_noise

    def scaled(image, timestep, start):
        fed = noises.pop(0)
        return scale_noise(image, timestep, start if fed is None else fed)

    monkeypatch.setattr(reference.scheduler, "scale_noise", scaled)
    white = torch.from_numpy(mask() / np.float32(255))[None, None]
    call = dict(negative_prompt="bad", strength=0.5)
    given = {"image": as_tensor(picture()), "mask_image": white}
    latents = reference_latents(reference, PROMPTS[0], **given, **call)
    given = dict(image=picture(), mask_image=mask(), output="latents", **call, **OURS)
    assert_latents_agree(pipe(KEY, PROMPTS[0], **given), latents)


def test_a_folder_that_ours_wrote_is_opened_by_diffusers(pipe, their_latents, tmp_path):
    """Its text encoder is the language model alone, as is said and as its class says."""
    with pytest.warns(
        UserWarning, match="text_encoder without the weights that see images: .* Qwen2_5_VLTextModel"
    ):
        pipelines.save(pipe, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "Qwen2_5_VLTextModel"]
    reference = open_reference(diffusers.QwenImagePipeline, tmp_path)
    call = dict(negative_prompt=["bad"] * 2, latents=packed(theirs(NOISE)))
    latents = reference_latents(reference, PROMPTS, **call)
    np.testing.assert_allclose(latents.numpy(), their_latents.numpy(), atol=1e-5)
    again = pipelines.load(tmp_path)
    assert not any(row.difference for row in pipelines.compare(pipe, again))
    for name, network in again.networks.items():
        jax.tree.map(np.testing.assert_array_equal, network.params, pipe.networks[name].params)


@pytest.mark.parametrize("length", [256, 220, 190])
def test_texts_that_are_too_long_are_cut_as_theirs_are(pipe, reference, length):
    """The states are those of tokens 35 to 34 + length, of texts however long."""
    expected, kept = reference.encode_prompt(PROMPTS, "cpu", max_sequence_length=length)
    kept = torch.ones(expected.shape[:2]) if kept is None else kept
    given = states_of(pipe, PROMPTS, None, max_sequence_length=length)
    ours, mask = given["prompt_embeds"], given["prompt_attention_mask"]
    assert ours.shape == (2, length, 24) and mask.sum() == kept.sum()
    np.testing.assert_allclose(ours[mask == 1], expected.detach()[kept == 1], atol=1e-4)
    assert reference.prompt_template_encode_start_idx == DROPPED


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"guidance_scale": 4.0}, "write true_cfg_scale=4 in place of guidance_scale"),
        ({"true_cfg_scale": -1.0}, "true_cfg_scale must be .* not -1"),
        ({"max_sequence_length": 1025}, "between 1 and 1024, not 1025"),
        ({"height": 18, "width": 16}, "18"),
        ({"latents": noise(channels=4)}, r"latents must be \[N, h, w, 16\]"),
    ],
)
def test_calls_that_cannot_be(pipe, call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        pipe(KEY, PROMPTS[0], **{"max_sequence_length": 64} | call)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"joint_attention_dim": 10}, "states 24 wide, its transformer takes 10"),
        ("transformer", {"in_channels": 16}, "16 latent channels, its transformer takes 4"),
    ],
)
def test_parts_of_different_models_are_refused(pipe, part, change, message):
    network = getattr(pipe, part)
    module = type(network.module)(dataclasses.replace(network.config, **change))
    with pytest.raises(CheckpointError, match=message):
        pipe.replace(**{part: network.replace(module=module)}).check_parts()


@pytest.mark.parametrize(
    "name",
    ["QwenImageEditPlusPipeline", "QwenImageLayeredPipeline", "QwenImageControlNetPipeline"],
)
def test_pipelines_that_edit_draw_layers_or_follow_pictures_are_refused(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(
        CheckpointError, match=f"{name}.* not supported: of Qwen-Image .*QwenImagePipeline"
    ) as caught:
        pipelines.load(tmp_path)
    assert "\n" not in str(caught.value)
