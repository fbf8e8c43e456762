"""FLUX.1 Fill, Control and Kontext against the pipelines of diffusers, on tiny random folders."""

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch
from compilations import COMPILATIONS
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux import pipeline_flux_fill as fill_module
from flux_folders import packed, write_flux
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
from reference_pipelines import SIZE, open_reference, theirs
from sd3_folders import CHANNELS

from jaxldm import checkpoints, pipelines
from jaxldm.cli import main
from jaxldm.errors import CheckpointError, InvalidArgumentError

# One latent covers 2x2 pixels here, so that a mask has 4 channels and not 64.
KINDS = {
    "fill": (
        diffusers.FluxFillPipeline,
        {"in_channels": 4 * (2 * CHANNELS + 4), "out_channels": 4 * CHANNELS},
    ),
    "control": (diffusers.FluxControlPipeline, {"in_channels": 8 * CHANNELS, "out_channels": 4 * CHANNELS}),
    "kontext": (diffusers.FluxKontextPipeline, {}),
}
PROMPT = "a cat, the dog"
STEPS = {"num_inference_steps": 3, "guidance_scale": 3.0, "max_sequence_length": 12}
START = start_noise(channels=CHANNELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux-pictures")
    return {name: write_flux(root / name, "dev", kind, **more) for name, (kind, more) in KINDS.items()}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: pipelines.load(folder) for name, folder in folders.items()}


def assert_agrees(pipe, reference, ours, theirs_):
    """The latents of both, then the pictures."""
    tokens = reference(
        prompt=PROMPT, height=SIZE, width=SIZE, output_type="latent", **STEPS, **theirs_
    ).images
    latents = diffusers.FluxPipeline._unpack_latents(tokens, SIZE, SIZE, 2)
    drawn = pipe(KEY, PROMPT, output="latents", **STEPS, **ours)
    assert_latents_agree(drawn, latents)
    assert_images_agree(pipe.decode(drawn), reference, latents)
    return drawn


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_fill(folders, pipes, monkeypatch, strength):
    reference = open_reference(diffusers.FluxFillPipeline, folders["fill"])
    without_posterior_noise(monkeypatch, fill_module, [theirs(START)])
    white = torch.from_numpy(mask() / np.float32(255))[None, None]
    given = {"image": as_tensor(picture()) / 2 + 0.5, "mask_image": white, "strength": strength}
    ours = {"image": picture(), "mask_image": mask(), "strength": strength}
    assert_agrees(pipes["fill"], reference, ours, given)


def test_control(folders, pipes, monkeypatch):
    reference = open_reference(diffusers.FluxControlPipeline, folders["control"])
    mode = lambda self, generator=None: self.mode()  # noqa: E731
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", mode)
    # Their tensors are taken as they are here, and not from [0, 1].
    given = {"control_image": as_tensor(picture()), "latents": packed(theirs(START))}
    drawn = assert_agrees(pipes["control"], reference, {"image": picture(), "latents": START}, given)
    other = pipes["control"](KEY, PROMPT, image=picture(1), latents=START, output="latents", **STEPS)
    assert np.abs(other - drawn).max() > 1e-3  # it is used


@pytest.mark.parametrize("size", [(8, 20), None])
def test_kontext(folders, pipes, size):
    """A picture of any size, or none."""
    reference = open_reference(diffusers.FluxKontextPipeline, folders["kontext"])
    given, ours = {"latents": packed(theirs(START)), "max_area": SIZE**2}, {"latents": START}
    if size is not None:
        cat = picture().reshape(-1)[: 3 * size[0] * size[1]].reshape(*size, 3)
        given |= {"image": as_tensor(cat) / 2 + 0.5, "_auto_resize": False}
        ours |= {"image": cat, "height": SIZE, "width": SIZE}
    assert_agrees(pipes["kontext"], reference, ours, given)


def test_kontext_draws_the_size_of_its_picture(pipes):
    pipe = pipes["kontext"]
    call = pipelines.Call(image=picture()[:8])
    assert pipe.family.read_inputs(pipe, call, 1).size == (8, SIZE)
    with pytest.raises(InvalidArgumentError, match="image height 7 is not divisible by 4"):
        pipes["kontext"](KEY, PROMPT, image=picture()[:7], **STEPS)


def test_control_of_dev_and_the_lora_that_makes_it_one(tmp_path):
    """Twice the channels change nothing; then a file with Black Forest Labs' names of every kind."""
    dev = pipelines.load(write_flux(tmp_path / "dev", "dev"))
    control, call = pipelines.as_flux_control(dev), {"latents": START, "output": "latents", **STEPS}
    plain = dev(KEY, PROMPT, **call)
    np.testing.assert_allclose(control(KEY, PROMPT, image=picture(), **call), plain, atol=1e-5)
    rng, width = np.random.default_rng(0), 16
    shapes = {
        "img_in.lora_A.weight": (2, 8 * CHANNELS),
        "img_in.lora_B.weight": (width, 2),
        "img_in.lora_B.bias": (width,),
        "double_blocks.0.img_attn.qkv.lora_A.weight": (2, width),
        "double_blocks.0.img_attn.qkv.lora_B.weight": (3 * width, 2),
        "double_blocks.0.img_attn.qkv.lora_B.bias": (3 * width,),
        "double_blocks.0.txt_attn.norm.key_norm.scale": (8,),
        "single_blocks.0.norm.query_norm.scale": (8,),
    }
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "control.safetensors")
    changed = pipelines.with_lora(control, tmp_path / "control.safetensors")
    before, after = (checkpoints.to_state_dict(pipe.transformer.params) for pipe in (control, changed))
    down, up = (tensors[f"img_in.lora_{part}.weight"] for part in "AB")
    wanted = {
        "x_embedder.weight": before["x_embedder.weight"] + up @ down,
        "x_embedder.bias": before["x_embedder.bias"] + tensors["img_in.lora_B.bias"],
        "transformer_blocks.0.attn.norm_added_k.weight": tensors[
            "double_blocks.0.txt_attn.norm.key_norm.scale"
        ],
        "single_transformer_blocks.0.attn.norm_q.weight": tensors["single_blocks.0.norm.query_norm.scale"],
    }
    down, up = (tensors[f"double_blocks.0.img_attn.qkv.lora_{part}.weight"] for part in "AB")
    bias = tensors["double_blocks.0.img_attn.qkv.lora_B.bias"]
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        place, own = f"transformer_blocks.0.attn.{name}", slice(part * width, (part + 1) * width)
        wanted[f"{place}.weight"] = before[f"{place}.weight"] + up[own] @ down
        wanted[f"{place}.bias"] = before[f"{place}.bias"] + bias[own]
    for name, tensor in after.items():
        np.testing.assert_allclose(tensor, wanted.get(name, before[name]), atol=1e-5, err_msg=name)
    images = [changed(KEY, PROMPT, image=picture(seed), **call) for seed in (0, 1)]
    assert np.abs(images[0] - images[1]).max() > 1e-3
    with pytest.raises(InvalidArgumentError, match="got one of the family FluxControl"):
        pipelines.as_flux_control(control)


def test_folders_both_ways(pipes, tmp_path):
    for name, (kind, more) in KINDS.items():
        pipelines.save(pipes[name], tmp_path / name)
        opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name)
        assert type(opened) is kind
        assert opened.transformer.config.in_channels == more.get("in_channels", 4 * CHANNELS)


def test_the_command(folders, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(picture()).save(tmp_path / "cat.png")
    words = ["sample", str(folders["control"]), "--prompt", PROMPT, "--num-inference-steps", "1", "--quiet"]
    words += ["--output-dir", str(tmp_path / "out")]
    given = ["--image", str(tmp_path / "cat.png"), "--options", "max_sequence_length=12"]
    assert main([*words, *given]) == 0
    assert np.load(tmp_path / "out" / "samples.npz")["images"].shape == (1, SIZE, SIZE, 3)
    capsys.readouterr()
    assert main(words) == 2 and "give image=, the picture to change" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "call", "words"),
    [
        ("fill", {"image": picture()}, "give image and mask_image"),
        ("fill", {}, "give image and mask_image"),
        ("control", {}, "give image="),
        ("control", {"image": picture(), "mask_image": mask()}, "mask_image is not for FluxControl"),
        ("control", {"image": picture(), "width": 8}, "image is 16x16"),
        ("kontext", {"image": picture(), "strength": 0.5}, "strength is not for FluxKontext"),
    ],
)
def test_wrong_calls(pipes, name, call, words):
    count = COMPILATIONS.count
    with pytest.raises(InvalidArgumentError, match=words):
        pipes[name](KEY, PROMPT, **call)
    assert COMPILATIONS.count == count


def test_another_transformer_is_refused(pipes):
    for name, words in (("fill", "a mask and a picture"), ("control", "not the 32 of latents and a picture")):
        with pytest.raises(CheckpointError, match=words):
            pipes[name].replace(transformer=pipes["kontext"].transformer).check_parts()
    with pytest.raises(CheckpointError, match="16 latent channels, its transformer takes 32"):
        pipes["kontext"].replace(transformer=pipes["control"].transformer).check_parts()
