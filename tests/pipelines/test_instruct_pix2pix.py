"""InstructPix2Pix of Stable Diffusion and of SDXL against the pipelines of diffusers, on tiny folders."""

import diffusers
import numpy as np
import pytest
from compilations import COMPILATIONS
from picture_checks import KEY, as_tensor, assert_images_agree, assert_latents_agree, picture, start_noise
from reference_pipelines import SIZE, open_reference, theirs, write_sd, write_sdxl

from jaxldm import checkpoints, pipelines
from jaxldm import diffusion as D
from jaxldm.cli import main
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines import Latents

KINDS = {
    "sd": (write_sd, diffusers.StableDiffusionInstructPix2PixPipeline),
    "sdxl": (write_sdxl, diffusers.StableDiffusionXLInstructPix2PixPipeline),
}
PROMPT, NEGATIVE = "make the cat sit", "bad"
STEPS = {"num_inference_steps": 3, "guidance_scale": 6.0, "solver": "ddim"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("instruct-pix2pix"), {}
    for name, (write, kind) in KINDS.items():
        made[name] = write(root / name, in_channels=8)
        open_reference(kind, made[name]).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: pipelines.load(folder) for name, folder in folders.items()}


def reference_latents(reference, **more):
    call = {"num_inference_steps": 3, "guidance_scale": 6.0, "image_guidance_scale": 1.5} | more
    return reference(
        PROMPT,
        image=as_tensor(picture()) / 2 + 0.5,  # its processor expects [0, 1] and scales that itself
        negative_prompt=NEGATIVE,
        latents=theirs(start_noise()),
        output_type="latent",
        **call,
    ).images


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("sd", {}),
        ("sdxl", {"guidance_rescale": 0.6, "image_guidance_scale": 2.0}),
        ("sd", {"guidance_scale": 1.0}),
    ],
)
def test_edited_pictures(folders, pipes, name, more):
    """With a scale of 1 both draw under the picture and the text alone."""
    reference = open_reference(KINDS[name][1], folders[name], "ddim")
    latents = reference_latents(reference, **more)
    pipe, call = pipes[name], STEPS | {"image": picture(), "latents": start_noise()} | more
    negative = None if more.get("guidance_scale") == 1 else NEGATIVE
    drawn = pipe(KEY, PROMPT, negative, output="latents", **call)
    assert_latents_agree(drawn, latents)
    assert_images_agree(pipe.decode(drawn), reference, latents)


def test_cosxl_takes_scaled_latents(folders, pipes):
    options = {"is_cosxl_edit": True}
    reference = open_reference(KINDS["sdxl"][1], folders["sdxl"], "ddim", **options)
    pipe = pipes["sdxl"].replace(**options)
    drawn = pipe(KEY, PROMPT, NEGATIVE, image=picture(), latents=start_noise(), output="latents", **STEPS)
    assert_latents_agree(drawn, reference_latents(reference))


def test_another_scale_compiles_nothing(pipes):
    call = STEPS | {"image": picture(), "output": "latents"}
    first, count = pipes["sd"](KEY, PROMPT, **call, image_guidance_scale=1.0), COMPILATIONS.count
    other = pipes["sd"](KEY, PROMPT, **call, image_guidance_scale=4.0)
    assert COMPILATIONS.count == count and np.abs(first - other).max() > 1e-3
    latents = pipelines.encode_images(pipes["sd"].vae, picture()[None] / np.float32(127.5) - 1)
    again = pipes["sd"](KEY, PROMPT, **call | {"image": Latents(latents)}, image_guidance_scale=4.0)
    np.testing.assert_allclose(again, other, atol=1e-4)


def test_equal_scales_are_guidance_from_nothing():
    rng = np.random.default_rng(0)
    nothing, between, both = rng.standard_normal((3, 2, 4, 4, 1)).astype(np.float32)
    mixed = D.guide_chain((nothing, between, both), (np.full(2, 3.0, np.float32), 3.0))
    np.testing.assert_allclose(mixed, D.guide(nothing, both, 3.0), atol=1e-5)
    with pytest.raises(InvalidArgumentError, match="one fewer than outputs, got 2 for 2"):
        D.guide_chain((nothing, both), (1.0, 2.0))


def test_folders_both_ways(pipes, tmp_path):
    for name, (_, kind) in KINDS.items():
        pipelines.save(pipes[name], tmp_path / name)
        opened = open_reference(diffusers.DiffusionPipeline, tmp_path / name)
        assert type(opened) is kind and opened.unet.config.in_channels == 8


def test_the_command(folders, pipes, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(picture()).save(tmp_path / "cat.png")
    words = ["sample", str(folders["sd"]), "--prompt", PROMPT, "--num-inference-steps", "2", "--quiet"]
    words += ["--output-dir", str(tmp_path / "out")]
    scale = ["--options", "image_guidance_scale=2"]
    assert main([*words, "--image", str(tmp_path / "cat.png"), *scale]) == 0
    images = np.load(tmp_path / "out" / "samples.npz")["images"]
    assert images.shape == (1, SIZE, SIZE, 3)
    capsys.readouterr()
    assert main(words) == 2 and "give image=, the picture to change" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, ["give image="]),
        ({"image": picture(), "strength": 0.5}, ["strength is not for InstructPix2Pix"]),
        ({"image": picture(), "image_guidance_scale": 0.5}, ["image_guidance_scale", "1", "0.5"]),
        ({"image": picture()[:, :15]}, ["width 15 is not divisible by 2"]),
        ({"image": picture(), "height": 32}, ["image is 16x16", "not 32x16"]),
    ],
)
def test_wrong_calls(pipes, call, words):
    count = COMPILATIONS.count
    with pytest.raises(InvalidArgumentError) as error:
        pipes["sd"](KEY, PROMPT, **call)
    assert all(word in str(error.value) for word in words) and len(str(error.value)) < 400, error.value
    assert COMPILATIONS.count == count


def test_another_unet_is_refused(folders, pipes, tmp_path):
    unet = pipes["sd"].unet
    plain = write_sd(tmp_path / "plain")
    other = pipelines.Network(*checkpoints.load(plain / "unet"))
    with pytest.raises(CheckpointError, match="4 input channels, not the 8 of latents and a picture"):
        pipes["sd"].replace(unet=other)(KEY, PROMPT, image=picture())
    assert unet.config.in_channels == 8
