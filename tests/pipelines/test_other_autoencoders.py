"""Another autoencoder in a pipeline: TAESD in the folder, in its place, and for previews."""

import jax
import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img_module
from picture_checks import (
    KEY,
    as_tensor,
    assert_latents_agree,
    mask,
    picture,
    start_noise,
    without_posterior_noise,
)
from reference_pipelines import SIZE, open_reference, ours, shaken, theirs, write_sd

from jaxldm import checkpoints, pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError

CALL = {"num_inference_steps": 3, "guidance_scale": 6.0, "strength": 0.7}


def write_tiny(folder, latent_channels=4):
    """TAESD of two levels, as the autoencoder of `write_sd` has."""
    torch.manual_seed(0)
    levels = {f"{side}_block_out_channels": (6, 6) for side in ("encoder", "decoder")}
    blocks = {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
    shaken(AutoencoderTiny(**levels, **blocks, latent_channels=latent_channels), 1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("other-autoencoders")
    return write_sd(root / "sd"), write_tiny(root / "tiny")


def test_tiny_in_place_of_the_folders_own(folders, monkeypatch, tmp_path):
    folder, tiny = folders
    reference = open_reference(
        StableDiffusionImg2ImgPipeline, folder, "ddim", vae=AutoencoderTiny.from_pretrained(tiny)
    )
    without_posterior_noise(monkeypatch, img2img_module, [theirs(start_noise())])
    monkeypatch.setattr(img2img_module, "retrieve_latents", lambda encoded, **options: encoded.latents)
    latents = reference("a cat", image=as_tensor(picture()), output_type="latent", **CALL).images
    pipe = pipelines.load(folder, vae=tiny)
    drawn, seen = [], []
    preview = pipelines.previewer(pipe.vae, lambda *what: seen.append(what), every=2)
    call = dict(image=picture(), solver="ddim", on_x0=preview, **CALL)
    drawn = pipe(KEY, "a cat", output="latents", **call)
    assert_latents_agree(drawn, latents)
    with torch.no_grad():
        expected = ours(reference.vae.decode(latents).sample)
    np.testing.assert_allclose(pipe.decode(drawn), np.clip(expected, -1, 1), atol=2 / 127.5)
    assert [step for step, *_ in seen] == [2] and seen[0][2].shape == (1, SIZE, SIZE, 3)
    pipelines.save(pipe, tmp_path / "saved")
    again = StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert isinstance(again.vae, AutoencoderTiny)
    reopened = pipelines.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, reopened.vae.params, pipe.vae.params)
    same = pipelines.load(folder, vae=checkpoints.load(tiny))
    assert same.vae.module == pipe.vae.module


def test_inpainting_shows_the_kept_part_to_a_decoder_that_takes_it(folders, tmp_path):
    """As diffusers' inpainting pipeline calls it: with the image and the mask, in pixels."""
    torch.manual_seed(0)
    levels = {"down_block_out_channels": (4, 4), "up_block_out_channels": (4, 8), "norm_num_groups": 2}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    reference = shaken(AsymmetricAutoencoderKL(**levels, **kinds, sample_size=SIZE), 1)
    reference.save_pretrained(tmp_path)
    pipe = pipelines.load(folders[0], vae=tmp_path)
    call = dict(image=picture(), mask_image=mask(), solver="ddim", num_inference_steps=2)
    latents, images = (pipe(KEY, "a cat", output=output, **call) for output in ("latents", "images"))
    white = torch.from_numpy(mask()[None, None] / np.float32(255))
    with torch.no_grad():
        z = theirs(latents) / reference.config.scaling_factor
        plain, expected = (
            reference.decode(z).sample,
            reference.decode(z, image=as_tensor(picture()), mask=white).sample,
        )
    assert np.abs(ours(plain) - ours(expected)).max() > 0.2
    np.testing.assert_allclose(images, np.clip(ours(expected), -1, 1), atol=2 / 127.5)


def test_an_autoencoder_of_another_model_is_refused(folders, tmp_path):
    folder, _ = folders
    with pytest.raises(CheckpointError, match="its autoencoder has 3 latent channels, its U-Net draws 4"):
        pipelines.load(folder, vae=write_tiny(tmp_path / "three", 3))
    with pytest.raises(CheckpointError, match="no model folder"):
        pipelines.load(folder, vae=tmp_path / "nowhere")
    with pytest.raises(InvalidArgumentError, match="the folder of an autoencoder"):
        pipelines.load(folder, vae=("one", "two", "three"))
