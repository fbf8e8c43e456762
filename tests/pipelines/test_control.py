"""Stable Diffusion with ControlNets against diffusers, on tiny random folders that it wrote."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from compilations import compilations
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
)
from diffusers.pipelines.controlnet import pipeline_controlnet_img2img as img2img_module
from diffusers.pipelines.controlnet import pipeline_controlnet_inpaint as inpaint_module
from picture_checks import (
    KEY,
    as_tensor,
    assert_images_agree,
    assert_latents_agree,
    mask,
    picture,
    start_noise,
    without_posterior_noise,
)
from PIL import Image
from reference_pipelines import SIZE, controlnet, noise, open_reference, theirs, write_sd

from jaxldm import pipelines
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError

PROMPTS = ["a cat", "the dog sat"]
STEPS = {"num_inference_steps": 4, "guidance_scale": 6.0}


def in_unit(*pixels):
    """Pictures as the reference takes those of control, [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2) / np.float32(255))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, two ControlNets, and the model with both as diffusers saves it."""
    root = tmp_path_factory.mktemp("control")
    found = {"sd15": write_sd(root / "sd15"), "inpainting": write_sd(root / "inpainting", in_channels=9)}
    networks = [controlnet(16, seed, global_pool_conditions=seed == 12) for seed in (11, 12)]
    for name, network in zip(("edges", "pooled"), networks, strict=True):
        network.save_pretrained(root / name)
        found[name] = root / name
    whole = reference_of(found, StableDiffusionControlNetPipeline, "sd15", networks)
    whole.save_pretrained(root / "both")
    return found | {"both": root / "both"}


def reference_of(folders, kind, name, networks):
    networks = networks if len(networks) > 1 else networks[0]
    return open_reference(kind, folders[name], "ddim", controlnet=networks)


@pytest.fixture(scope="module")
def pipe(folders):
    return pipelines.load(folders["sd15"], controlnet=folders["edges"])


@pytest.mark.parametrize(
    "options",
    [
        {"controlnet_conditioning_scale": 0.8},
        {"control_guidance_start": 0.25, "control_guidance_end": 0.8},
        {"guess_mode": True, "controlnet_conditioning_scale": 1.5},
        {"guidance_scale": 1.0},
    ],
)
def test_text_to_image(folders, pipe, options):
    """Two prompts, a picture for each."""
    edges = ControlNetModel.from_pretrained(folders["edges"])
    reference = reference_of(folders, StableDiffusionControlNetPipeline, "sd15", [edges])
    call, pictures = STEPS | options, [picture(1), picture(2)]
    latents = reference(
        PROMPTS, image=in_unit(*pictures), latents=theirs(noise(2)), output_type="latent", **call
    ).images
    call |= dict(latents=noise(2), solver="ddim", control_image=pictures)
    assert_latents_agree(pipe(KEY, PROMPTS, output="latents", **call), latents)
    if "guess_mode" in options:
        assert_images_agree(pipe(KEY, PROMPTS, **call), reference, latents)
    without = pipe(KEY, PROMPTS, output="latents", **call | {"controlnet_conditioning_scale": 0})
    assert np.abs(without - pipe(KEY, PROMPTS, output="latents", **call)).max() > 0.01


def test_several_from_one_folder_and_back(folders, tmp_path):
    """The second pools its residuals; ours writes what diffusers opens."""
    pipe = pipelines.load(folders["both"])
    assert [name for name in pipe.networks if "control" in name] == ["controlnet", "controlnet_1"]
    pipelines.save(pipe, tmp_path / "ours")
    pipelines.save(pipe, tmp_path / "ours")  # replaces itself
    again = pipelines.load(tmp_path / "ours")
    assert again.controlnet_1.module == pipe.controlnet_1.module
    reference = open_reference(StableDiffusionControlNetPipeline, tmp_path / "ours", "ddim")
    call = STEPS | {
        "controlnet_conditioning_scale": [0.5, 0.9],
        "control_guidance_start": [0.0, 0.5],
        "control_guidance_end": [0.5, 1.0],
    }
    images = [in_unit(picture(1)), in_unit(picture(2))]
    latents = reference(
        PROMPTS[0], image=images, latents=theirs(noise()), output_type="latent", **call
    ).images
    given = dict(latents=noise(), solver="ddim", control_image=[picture(1), picture(2)])
    assert_latents_agree(pipe(KEY, PROMPTS[0], output="latents", **call, **given), latents)


def test_image_to_image(folders, pipe, monkeypatch):
    edges = ControlNetModel.from_pretrained(folders["edges"])
    reference = reference_of(folders, StableDiffusionControlNetImg2ImgPipeline, "sd15", [edges])
    without_posterior_noise(monkeypatch, img2img_module, [theirs(start_noise())])
    call = STEPS | {"strength": 0.8, "control_guidance_start": 0.3}
    latents = reference(
        PROMPTS[0],
        image=as_tensor(picture()),
        control_image=in_unit(picture(1)),
        output_type="latent",
        controlnet_conditioning_scale=1.0,
        **call,
    ).images
    call |= dict(image=picture(), control_image=picture(1), solver="ddim")
    assert_latents_agree(pipe(KEY, PROMPTS[0], output="latents", **call), latents)


def test_inpainting_by_a_network_that_takes_the_mask(folders, monkeypatch):
    """The ControlNet sees the latents alone."""
    edges = ControlNetModel.from_pretrained(folders["edges"])
    reference = reference_of(folders, StableDiffusionControlNetInpaintPipeline, "inpainting", [edges])
    without_posterior_noise(monkeypatch, inpaint_module, [theirs(noise())])
    white = torch.from_numpy(mask() / np.float32(255))[None, None]
    latents = reference(
        PROMPTS[0],
        image=as_tensor(picture()),
        mask_image=white,
        control_image=in_unit(picture(1)),
        controlnet_conditioning_scale=1.0,
        latents=theirs(noise()),
        height=SIZE,
        width=SIZE,
        output_type="latent",
        **STEPS,
    ).images
    pipe = pipelines.load(folders["inpainting"], controlnet=[folders["edges"]])
    assert pipe.family.folder.class_name(pipe) == "StableDiffusionControlNetInpaintPipeline"
    call = dict(image=picture(), mask_image=mask(), control_image=picture(1), latents=noise())
    drawn = pipe(KEY, PROMPTS[0], output="latents", solver="ddim", **call, **STEPS)
    assert_latents_agree(drawn, latents)


def test_other_pictures_scales_and_steps_compile_nothing(pipe):
    call = dict(num_inference_steps=3, solver="ddim")
    pipe(KEY, PROMPTS[0], control_image=picture(1), **call)
    for options in (
        {"controlnet_conditioning_scale": 0.3},
        {"control_guidance_start": 0.4, "control_guidance_end": 0.9},
        {"guess_mode": True},
        {"control_image": picture(3)},
    ):
        given = {"control_image": picture(1)} | call | options
        assert compilations(lambda given=given: pipe(KEY, PROMPTS[0], **given)) == 0, options


def test_pictures_of_any_kind_and_size(pipe):
    """Images are as large as the picture; grey ones have three equal channels; `resize` makes them fit."""
    call = dict(num_inference_steps=1, output="latents")
    grey = picture(1)[:, :8, 0]
    drawn = pipe(KEY, PROMPTS[0], control_image=grey, **call)
    assert drawn.shape[1:3] == (8, 4)
    again = pipe(KEY, PROMPTS[0], control_image=Image.fromarray(grey), **call)
    np.testing.assert_array_equal(drawn, again)
    tall = np.repeat(np.repeat(grey, 2, axis=0), 2, axis=1)
    pipe(KEY, PROMPTS[0], control_image=tall, resize="stretch", height=8, width=4, **call)
    two = dict(num_images_per_prompt=2, height=16, width=8, **call)
    both = pipe(KEY, PROMPTS[0], control_image=[grey, tall], resize="stretch", **two)
    np.testing.assert_array_equal(both[0], drawn[0])
    with pytest.raises(InvalidArgumentError, match=r"control_image is 32x16 pixels .*, or give resize"):
        pipe(KEY, PROMPTS[0], control_image=[Image.fromarray(grey), tall], **two)
    start = dict(image=picture(), strength=1.0)  # as large as in `test_image_to_image`, which compiles it
    pipe(KEY, PROMPTS[0], control_image=tall, resize="crop", **start, **call)


def test_without_control_images(folders, pipe):
    """A pipeline without its ControlNet draws what the model draws, at whatever scale."""
    plain = pipelines.with_control(pipe, [])
    assert plain.family.folder.class_name(plain) == "StableDiffusionPipeline"
    with pytest.raises(InvalidArgumentError, match="give control_image="):
        pipe(KEY, PROMPTS[0])
    with pytest.raises(InvalidArgumentError, match="guess_mode is for a model with a ControlNet"):
        plain(KEY, PROMPTS[0], guess_mode=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"control_image": [picture(1), picture(2)]}, "2 arrays in control_image, but 1 images"),
        ({"control_image": picture()[:, :8], "height": 16}, "control_image is 16x8 pixels .* not 16x"),
        ({"control_image": np.zeros((16, 16, 4), np.float32)}, "has 4 channels, the network takes 3"),
        ({"controlnet_conditioning_scale": [1.0, 2.0]}, "2 values of controlnet_conditioning_scale for 1"),
        ({"controlnet_conditioning_scale": "much"}, "controlnet_conditioning_scale must be a finite number"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "must be below control_guidance_end"),
        ({"control_guidance_end": 1.5}, "control_guidance_end must be"),
        ({"adapter_conditioning_scale": 0.5}, "adapter_conditioning_scale is not for a ControlNet"),
        ({"control_image": "edges.png"}, "must be a picture"),
    ],
)
def test_wrong_options_are_refused_before_compiling(pipe, options, words):
    def call():
        with pytest.raises((InvalidArgumentError, DataError), match=words) as caught:
            pipe(KEY, PROMPTS[0], **{"control_image": picture()} | options)
        assert "\n" not in str(caught.value)
        return 0

    assert compilations(call) == 0


def test_networks_of_other_models_are_refused(folders, tmp_path):
    plain = pipelines.load(folders["sd15"])
    wide = controlnet(32, 3)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(
        CheckpointError, match="text states of width 32, the denoising network 16: give"
    ) as caught:
        pipelines.with_control(plain, tmp_path / "wide")
    assert str(caught.value).startswith(f"{tmp_path / 'wide'} is a ControlNet of another model")
    with pytest.raises(
        CheckpointError, match="holds a whole model, and a ControlNet or T2I-Adapter is wanted"
    ):
        pipelines.with_control(plain, folders["sd15"])
    with pytest.raises(CheckpointError, match="AutoencoderKL is no control network"):
        pipelines.with_control(plain, folders["sd15"] / "vae")
    network = pipelines.load(folders["sd15"], controlnet=folders["edges"]).controlnet
    broken = jax.tree.map(lambda leaf: np.full_like(np.asarray(leaf), np.nan), network.params)
    with pytest.raises(CheckpointError, match="holds NaN or infinity, in"):
        pipelines.with_control(plain, dataclasses.replace(network, params=broken))
    with pytest.raises(CheckpointError, match="there is no"):
        pipelines.with_control(plain, tmp_path / "nothing")
