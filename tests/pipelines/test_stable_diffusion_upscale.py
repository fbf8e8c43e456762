"""The x4 upscaler of Stable Diffusion 2 against the pipeline of diffusers, on a tiny folder."""

import diffusers
import jax
import numpy as np
import pytest
from compilations import COMPILATIONS
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_upscale as module
from picture_checks import KEY, as_tensor, assert_images_agree, assert_latents_agree
from reference_pipelines import (
    LATENT,
    SIZE,
    autoencoder,
    noise,
    open_reference,
    text_encoder,
    theirs,
    unet,
    write_tokenizer,
)

from jaxldm import diffusion as D
from jaxldm import pipelines
from jaxldm.cli import main
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.families.deepfloyd_if import noised_pictures

PROMPTS, NEGATIVE = ["a cat", "the dog"], "bad"
STEPS = {"num_inference_steps": 3, "guidance_scale": 5.0, "noise_level": 30}
SMALL = np.random.default_rng(0).integers(0, 256, (LATENT, LATENT, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("upscale") / "model"
    tokenizer, size = write_tokenizer(place / "tokenizer")
    vae = autoencoder()
    vae.register_to_config(scaling_factor=0.08333)
    pipe = diffusers.StableDiffusionUpscalePipeline(
        unet=unet(16, in_channels=7, num_class_embeds=100, only_cross_attention=(True,)),
        vae=vae,
        text_encoder=text_encoder(size, 16, 2),
        tokenizer=tokenizer,
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear"),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        max_noise_level=60,
    )
    pipe.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


def noise_of_picture(count):
    """What `noised_pictures` draws for the first images of KEY, as the path of no signal would show it."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, np.arange(count))
    folded = jax.vmap(jax.random.fold_in, (0, None))(keys, np.uint32(2**32 - 2))
    return np.asarray(D.solvers.noise_like(folded, np.zeros((count, LATENT, LATENT, 3), np.float32)))


def test_upscaled_pictures(folder, pipe, monkeypatch):
    reference = open_reference(diffusers.StableDiffusionUpscalePipeline, folder)
    fed = [theirs(noise_of_picture(2))]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: fed.pop(0))
    pictures = np.stack([SMALL, SMALL[::-1]])
    given = {"image": as_tensor(pictures[0]).repeat(2, 1, 1, 1) / 2 + 0.5}
    given["image"][1] = as_tensor(pictures[1])[0] / 2 + 0.5
    call = dict(negative_prompt=[NEGATIVE] * 2, latents=theirs(noise(2)), **given, **STEPS)
    latents = reference(PROMPTS, output_type="latent", **call).images
    ours = dict(image=pictures, latents=noise(2), **STEPS)
    drawn = pipe(KEY, PROMPTS, NEGATIVE, output="latents", **ours)
    assert_latents_agree(drawn, latents)
    images = pipe.decode(drawn)
    assert images.shape == (2, SIZE, SIZE, 3)
    assert_images_agree(images, reference, latents)
    count = COMPILATIONS.count
    other = pipe(KEY, PROMPTS, NEGATIVE, output="latents", **ours | {"noise_level": 1})
    assert COMPILATIONS.count == count and np.abs(other - drawn).max() > 1e-3


def test_the_noise_is_of_the_images_key(pipe):
    keys = pipelines.call.image_keys(KEY, 3)
    picture = np.zeros((3, LATENT, LATENT, 3), np.float32)
    three = noised_pictures(pipe.low_res_scheduler, keys, picture, np.full(3, 60))
    np.testing.assert_array_equal(
        three[:1],
        noised_pictures(
            pipe.low_res_scheduler, keys._replace(data=keys.data[:1]), picture[:1], np.array([60])
        ),
    )
    assert np.abs(three[0] - three[1]).max() > 0.1


def test_folders_both_ways(pipe, tmp_path):
    pipelines.save(pipe, tmp_path)
    opened = open_reference(diffusers.DiffusionPipeline, tmp_path)
    assert type(opened) is diffusers.StableDiffusionUpscalePipeline and opened.config.max_noise_level == 60
    assert pipelines.load(tmp_path).max_noise_level == 60


def test_the_command(folder, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(SMALL).save(tmp_path / "small.png")
    words = ["sample", str(folder), "--prompt", "a cat", "--num-inference-steps", "1", "--quiet"]
    words += ["--output-dir", str(tmp_path / "out")]
    image = ["--image", str(tmp_path / "small.png")]
    assert main([*words, *image, "--options", "noise_level=5"]) == 0
    assert np.load(tmp_path / "out" / "samples.npz")["images"].shape == (1, SIZE, SIZE, 3)
    capsys.readouterr()
    assert main(words) == 2 and "give image=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "give image="),
        ({"image": SMALL, "noise_level": 61}, "noise_level must be .*60"),
        ({"image": SMALL, "strength": 0.5}, "strength is not for StableDiffusionUpscale"),
        ({"image": SMALL, "height": LATENT, "width": LATENT}, "image is 16x16 pixels"),
        ({"image": SMALL, "resize": "crop"}, "this model enlarges"),
        ({"image": pipelines.Latents(noise())}, "takes pixels, no latents"),
    ],
)
def test_wrong_calls(pipe, call, words):
    count = COMPILATIONS.count
    with pytest.raises(InvalidArgumentError, match=words):
        pipe(KEY, "a cat", **call)
    assert COMPILATIONS.count == count


def test_another_unet_is_refused(folder, pipe, tmp_path):
    unet(16).save_pretrained(tmp_path / "unet")
    from jaxldm import checkpoints

    other = pipelines.Network(*checkpoints.load(tmp_path / "unet"))
    with pytest.raises(CheckpointError, match="4 input channels and num_class_embeds None, not the 7"):
        pipe.replace(unet=other).check_parts()
