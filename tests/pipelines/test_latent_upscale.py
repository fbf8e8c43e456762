"""The x2 latent upscaler against the pipeline of diffusers, on a tiny folder."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from compilations import COMPILATIONS
from picture_checks import KEY, assert_images_agree, assert_latents_agree
from reference_pipelines import (
    autoencoder,
    open_reference,
    shaken,
    text_encoder,
    theirs,
    unet,
    write_tokenizer,
)

from jaxldm import checkpoints, models, pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

STEPS = {"num_inference_steps": 2, "guidance_scale": 3.0}
SMALL = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
LEVELS = {
    "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    "block_out_channels": (32, 64, 64),
}


def k_unet():
    """The published one, with three levels of two layers."""
    torch.manual_seed(1)
    module = diffusers.UNet2DConditionModel(
        sample_size=8,
        act_fn="gelu",
        attention_head_dim=16,
        norm_num_groups=None,
        time_cond_proj_dim=128 + 16,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=16,
        layers_per_block=2,
        in_channels=8,
        mid_block_type=None,
        out_channels=5,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        **LEVELS,
    )
    return shaken(module, 1, 0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("latent-upscale") / "model"
    tokenizer, size = write_tokenizer(place / "tokenizer")
    pipe = diffusers.StableDiffusionLatentUpscalePipeline(
        unet=k_unet(),
        vae=autoencoder(),
        text_encoder=text_encoder(size, 16, 2),
        tokenizer=tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample"
        ),
    )
    pipe.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


def first_sigma():
    """sigma_t of the first row: diffusers multiplies latents by sigma_t / alpha_t, here they are x_t."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.float32(np.sqrt(1 - np.prod(1 - betas)))


def noise(seed):
    return np.random.default_rng(seed).standard_normal((1, 8, 16, 4)).astype(np.float32)


def test_latents_and_pictures(folder, pipe):
    reference = open_reference(diffusers.StableDiffusionLatentUpscalePipeline, folder)
    small = noise(1)[:, :4, :8]
    call = dict(negative_prompt=["bad"], latents=theirs(noise(0)), image=theirs(small), **STEPS)
    latents = reference(["a cat"], output_type="latent", **call).images
    image = pipelines.Latents(small)
    ours = dict(image=image, latents=first_sigma() * noise(0), **STEPS)
    drawn = pipe(KEY, "a cat", "bad", output="latents", **ours)
    assert_latents_agree(drawn, latents)
    images = pipe.decode(drawn)
    assert images.shape == (1, 16, 32, 3)
    assert_images_agree(images, reference, latents)
    count = COMPILATIONS.count
    other = pipe(KEY, "the dog", output="latents", **ours | {"num_inference_steps": 3})
    assert COMPILATIONS.count == count and np.abs(other - drawn).max() > 1e-3


def test_pixels_are_encoded(folder, pipe):
    """The mean of their latents; diffusers draws from their Gaussian, whose deviation is nothing here."""
    encode = jax.jit(lambda params, x: models.encode_latents(pipe.vae.module, params, x))
    mean = encode(pipe.vae.params, np.float32(SMALL[None] / 127.5 - 1))
    ours = dict(latents=noise(0), num_inference_steps=1, guidance_scale=3.0, output="latents")
    of_pixels = pipe(KEY, "a cat", image=SMALL, **ours)
    of_latents = pipe(KEY, "a cat", image=pipelines.Latents(np.asarray(mean)), **ours)
    np.testing.assert_allclose(of_pixels, of_latents, atol=1e-4)


def test_folders_both_ways(pipe, tmp_path):
    pipelines.save(pipe, tmp_path)
    opened = open_reference(diffusers.DiffusionPipeline, tmp_path)
    assert type(opened) is diffusers.StableDiffusionLatentUpscalePipeline
    for name, tensor in k_unet().state_dict().items():
        assert torch.equal(opened.unet.state_dict()[name], tensor), name
    assert pipelines.load(tmp_path).unet.config == pipe.unet.config


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "give image="),
        ({"image": SMALL, "strength": 0.5}, "strength is not for StableDiffusionLatentUpscale"),
        ({"image": SMALL[:, :10]}, "not divisible by 8"),
        ({"image": SMALL, "prompt_embeds": np.zeros((1, 3, 16))}, "prompt_embeds is not for"),
    ],
)
def test_wrong_calls(pipe, call, words):
    count = COMPILATIONS.count
    prompt = None if "prompt_embeds" in call else "a cat"
    with pytest.raises(InvalidArgumentError, match=words):
        pipe(KEY, prompt, **call)
    assert COMPILATIONS.count == count


def test_another_unet_is_refused(pipe, tmp_path):
    unet(16).save_pretrained(tmp_path / "unet")
    other = pipelines.Network(*checkpoints.load(tmp_path / "unet"))
    with pytest.raises(CheckpointError, match="none of the K blocks"):
        pipe.replace(unet=other).check_parts()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conv_in_kernel": 3}, "conv_in_kernel is 1 in a U-Net with K blocks, not 3"),
        ({"block_out_channels": (32, 48, 64)}, "multiples of 32, not 48"),
        ({"attention_head_dim": 24}, "cannot be split into heads of 24"),
        ({"down_block_types": ("DownBlock2D",) * 3}, "KDownBlock2D"),
    ],
)
def test_configs_that_cannot_be(pipe, changes, words):
    with pytest.raises((InvalidArgumentError, UnknownNameError), match=words):
        dataclasses.replace(pipe.unet.config, **changes)
