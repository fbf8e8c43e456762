"""SDXL, SD 3 and FLUX with ControlNets, and T2I-Adapters, against diffusers on tiny random folders."""

import tempfile

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from flux_folders import packed, write_flux
from picture_checks import KEY, as_tensor, assert_latents_agree, picture
from reference_pipelines import (
    SIZE,
    controlnet,
    noise,
    open_reference,
    shaken,
    theirs,
    write_sd,
    write_sdxl,
)
from sd3_folders import CHANNELS, write_sd3

from jaxldm import checkpoints, pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError

PROMPT = "a cat"
STEPS = {"num_inference_steps": 4, "guidance_scale": 4.0}


def in_unit(pixels):
    """A picture as the reference takes those of control, [1, 3, H, W] in [0, 1]."""
    return (as_tensor(pixels) + 1) / 2


@pytest.fixture
def mean_latents(monkeypatch):
    """The reference encodes pictures to the mean, as ours does, and not to a draw."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return write_sd(tmp_path_factory.mktemp("adapters") / "sd15")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return write_sdxl(tmp_path_factory.mktemp("adapters") / "sdxl")


def test_controlnet_of_sdxl(sdxl, tmp_path):
    """With the micro-conditioning and without attention in the middle; in guess mode without a negative."""
    network = controlnet(
        36,
        5,
        mid_block_type="UNetMidBlock2D",
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 4 * 6,
    )
    kind = diffusers.StableDiffusionXLControlNetPipeline
    reference = open_reference(kind, sdxl, "ddim", controlnet=network)
    reference.save_pretrained(tmp_path / "whole")
    pipe = pipelines.load(tmp_path / "whole")
    assert pipe.family.folder.class_name(pipe) == "StableDiffusionXLControlNetPipeline"
    for options in ({"control_guidance_end": 0.5}, {"guess_mode": True}):
        call = STEPS | {"controlnet_conditioning_scale": 0.7} | options
        latents = reference(
            PROMPT, image=in_unit(picture(1)), latents=theirs(noise()), output_type="latent", **call
        ).images
        given = dict(control_image=picture(1), latents=noise(), solver="ddim", output="latents")
        assert_latents_agree(pipe(KEY, PROMPT, **given, **call), latents)


def adapter(seed, **more):
    """A T2I-Adapter of the U-Net of one level, for pictures of `SIZE`."""
    torch.manual_seed(seed)
    options = {"channels": [8], "num_res_blocks": 1, "downscale_factor": 2}
    return shaken(diffusers.T2IAdapter(**options | more), seed, 0.2)


def test_adapters(sd15, tmp_path):
    """Two of them, of colours and of grey lines; ours writes them as diffusers reads them."""
    networks = [adapter(1), adapter(2, in_channels=1)]
    for place, network in enumerate(networks):
        network.save_pretrained(tmp_path / str(place))
    pipe = pipelines.load(sd15, controlnet=[tmp_path / "0", tmp_path / "1"])
    pipelines.save(pipe, tmp_path / "ours")
    reference = open_reference(diffusers.StableDiffusionAdapterPipeline, tmp_path / "ours", "ddim")
    grey = in_unit(picture(2)[..., :1].repeat(3, -1))[:, :1]
    call = STEPS | {"adapter_conditioning_scale": [0.8, 0.5]}
    latents = reference(
        PROMPT,
        image=[in_unit(picture(1)), grey],
        latents=theirs(noise()),
        output_type="latent",
        **call,
    ).images
    images = [picture(1), picture(2)[..., 0]]
    given = dict(control_image=images, latents=noise(), solver="ddim", output="latents")
    drawn = pipe(KEY, PROMPT, **given, **call)
    assert_latents_agree(drawn, latents)
    np.testing.assert_array_equal(pipelines.load(tmp_path / "ours")(KEY, PROMPT, **given, **call), drawn)
    plain = pipelines.load(sd15)(KEY, PROMPT, **given | {"control_image": None}, **STEPS)
    none = pipe(KEY, PROMPT, **given, **STEPS, adapter_conditioning_factor=0)
    np.testing.assert_allclose(none, plain, atol=1e-5)


def test_adapter_of_sdxl(sdxl):
    """In the first half of the steps."""
    network = adapter(3, adapter_type="full_adapter_xl")
    kind = diffusers.StableDiffusionXLAdapterPipeline
    reference = open_reference(kind, sdxl, "ddim", adapter=network)
    call = STEPS | {"adapter_conditioning_scale": 0.9, "adapter_conditioning_factor": 0.5}
    latents = reference(
        PROMPT,
        image=in_unit(picture(1)),
        latents=theirs(noise()),
        output_type="latent",
        height=SIZE,
        width=SIZE,
        **call,
    ).images
    module, params = of_reference(network)
    pipe = pipelines.with_control(pipelines.load(sdxl), pipelines.Network(module, params))
    given = dict(control_image=picture(1), latents=noise(), solver="ddim", output="latents")
    assert_latents_agree(pipe(KEY, PROMPT, **given, **call), latents)


def of_reference(network):
    """Our module and parameters of one of theirs."""
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        return checkpoints.load(folder)


def sd3_controlnet(seed, **more):
    torch.manual_seed(seed)
    options = {
        "sample_size": 8,
        "in_channels": CHANNELS,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 36,
        "pos_embed_max_size": 8,
    }
    return shaken(diffusers.SD3ControlNetModel(**options | more), seed, 0.1)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"force_zeros_for_pooled_projection": False},
        {"force_zeros_for_pooled_projection": False, "joint_attention_dim": None, "use_pos_embed": False},
    ],
)
def test_controlnet_of_sd3(tmp_path, mean_latents, own):
    """Trained without the pooled text and on latents without their shift, or as the transformer; the one of
    SD 3.5 large, which has no text and shares the first layer.
    """
    folder = write_sd3(tmp_path / "sd3", num_layers=3)
    network = sd3_controlnet(4, **own)
    ours = pipelines.Network(*of_reference(network))
    kind = diffusers.StableDiffusion3ControlNetPipeline
    reference = open_reference(kind, folder, controlnet=network)
    call = STEPS | {"controlnet_conditioning_scale": 0.7, "control_guidance_start": 0.25}
    call |= {"max_sequence_length": 20}
    start = noise(channels=CHANNELS)
    latents = reference(
        PROMPT,
        control_image=as_tensor(picture(1)),
        latents=theirs(start),
        output_type="latent",
        **call,
    ).images
    pipe = pipelines.load(folder, controlnet=ours)
    if not own:
        reference.save_pretrained(tmp_path / "whole")
        pipe = pipelines.load(tmp_path / "whole")
    pipe = pipe.replace(scheduler=pipe.scheduler | {"_shift_t_min_twice": True})
    given = dict(control_image=picture(1), latents=start, output="latents")
    drawn = pipe(KEY, PROMPT, **given, **call)
    assert_latents_agree(drawn, latents)
    if own:
        return
    with pytest.raises(InvalidArgumentError, match="guess_mode is for ControlNets of Stable Diffusion"):
        pipe(KEY, PROMPT, control_image=picture(1), guess_mode=True)
    again = pipelines.with_control(pipe, [pipe.controlnet] * 2)
    given["control_image"] = [picture(1)] * 2
    halves = again(KEY, PROMPT, **given, **call | {"controlnet_conditioning_scale": [0.4, 0.3]})
    np.testing.assert_allclose(halves, drawn, atol=1e-4)


def flux_controlnet(seed, **more):
    torch.manual_seed(seed)
    options = {
        "in_channels": 4 * CHANNELS,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "axes_dims_rope": [2, 2, 4],
    }
    return shaken(diffusers.FluxControlNetModel(**options | more), seed, 0.1)


def test_controlnets_of_flux(tmp_path, mean_latents):
    """A union next to one of a single kind, with dev's guidance."""
    folder = write_flux(tmp_path / "flux", "dev")
    guidance = {"guidance_embeds": True}
    networks = [flux_controlnet(1, num_mode=3, **guidance), flux_controlnet(2, **guidance)]
    kind = diffusers.FluxControlNetPipeline
    call = STEPS | {"max_sequence_length": 20, "height": SIZE, "width": SIZE}
    start = noise(channels=CHANNELS)
    reference = open_reference(kind, folder, controlnet=networks)
    options = {"controlnet_conditioning_scale": [0.7, 0.4], "control_guidance_end": [1.0, 0.5]}
    drawn = reference(
        PROMPT,
        control_image=[as_tensor(picture(1)), as_tensor(picture(2))],
        control_mode=[2, None],
        latents=packed(theirs(start)),
        output_type="latent",
        **call,
        **options,
    ).images
    latents = diffusers.FluxPipeline._unpack_latents(drawn, SIZE, SIZE, 2)
    ours = [pipelines.Network(*of_reference(network)) for network in networks]
    pipelines.save(pipelines.load(folder, controlnet=ours), tmp_path / "both")
    pipe = pipelines.load(tmp_path / "both")
    given = dict(control_image=[picture(1), picture(2)], latents=start, output="latents")
    assert_latents_agree(pipe(KEY, PROMPT, control_mode=[2, None], **given, **call, **options), latents)
    with pytest.raises(InvalidArgumentError, match="from 0 to 2, got None"):
        pipe(KEY, PROMPT, control_image=[picture(1)] * 2)
    with pytest.raises(InvalidArgumentError, match="controlnet_1 is none"):
        pipe(KEY, PROMPT, control_image=[picture(1)] * 2, control_mode=[0, 1])


def test_networks_of_other_families_are_refused(sd15, sdxl, tmp_path):
    sd3_controlnet(4).save_pretrained(tmp_path / "sd3")
    with pytest.raises(CheckpointError, match="is for a SD3Transformer2DModel"):
        pipelines.with_control(pipelines.load(sd15), tmp_path / "sd3")
    adapter(1, channels=[8, 16, 32]).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="a T2I-Adapter of another model: it has channels"):
        pipelines.load(sdxl, controlnet=tmp_path / "wide")
