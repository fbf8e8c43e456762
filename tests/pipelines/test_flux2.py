"""FLUX.2 klein against the pipeline of diffusers, on a tiny random folder."""

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from flux2_folders import CHANNELS, LAYERS, write_flux2_klein
from picture_checks import KEY, assert_latents_agree, states_of
from PIL import Image
from reference_pipelines import SIZE, open_reference, ours, theirs

from jaxldm import cli, pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.families.flux2 import empirical_mu

SIDE = SIZE // 4
TEXT = {"max_sequence_length": 64, "text_encoder_out_layers": LAYERS}
OURS = {"num_inference_steps": 5, "guidance_scale": 4.0, **TEXT}
THEIRS = OURS | {"output_type": "latent"}
PROMPTS = ["a cat", "the dog sat on a cat, and the hat"]


def noise(count, height=SIDE, width=SIDE):
    shape = (count, height, width, CHANNELS)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def normalised(reference, latents):
    """Their pipeline returns the latents of the convolutions; ours those that it draws."""
    statistics = reference.vae.bn
    mean, variance = (x.view(1, -1, 1, 1) for x in (statistics.running_mean, statistics.running_var))
    return (reference._patchify_latents(latents) - mean) / torch.sqrt(variance + 1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_flux2_klein(tmp_path_factory.mktemp("flux2"))


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return open_reference(diffusers.Flux2KleinPipeline, folder)


@pytest.fixture(scope="module")
def their_latents(reference):
    return reference(prompt=PROMPTS, latents=theirs(noise(2)), height=SIZE, width=SIZE, **THEIRS).images


def test_text_to_image_with_guidance(pipe, reference, their_latents):
    drawn, images = (
        pipe(KEY, PROMPTS, latents=noise(2), output=output, **OURS) for output in ("latents", "images")
    )
    assert_latents_agree(drawn, normalised(reference, their_latents))
    with torch.no_grad():
        decoded = reference.vae.decode(their_latents).sample
    grey = [np.rint((np.clip(side, -1, 1) + 1) * 127.5) for side in (images, ours(decoded))]
    assert np.ptp(grey[1]) > 20 and np.abs(grey[0] - grey[1]).max() <= 2
    given = states_of(pipe, PROMPTS, None, **TEXT)
    without = {name: value for name, value in OURS.items() if name not in TEXT}
    again = pipe(KEY, latents=noise(2), output="latents", **given, **without, **TEXT)
    np.testing.assert_array_equal(again, drawn)


def test_a_distilled_model_is_drawn_without_guidance(pipe, reference, tmp_path):
    """In 4 steps, an oblong image; and the folder that says so is opened by diffusers."""
    distilled = dataclasses.replace(pipe, options={"is_distilled": True})
    start, text = noise(1, SIDE, 2 * SIDE), PROMPTS[1]
    drawn = distilled(KEY, text, latents=start, output="latents", **TEXT)
    pipelines.save(distilled, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["is_distilled"] is True and index["text_encoder"] == ["transformers", "Qwen3Model"]
    opened = open_reference(diffusers.Flux2KleinPipeline, tmp_path)
    call = {"height": SIZE, "width": 2 * SIZE, "num_inference_steps": 4, "output_type": "latent", **TEXT}
    for model in (reference, opened):
        latents = model(prompt=text, latents=theirs(start), guidance_scale=1.0, **call).images
        assert_latents_agree(drawn, normalised(model, latents))
    again = pipelines.load(tmp_path)
    assert not any(row.difference for row in pipelines.compare(distilled, again))
    for part in ("transformer", "vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, *(getattr(p, part).params for p in (distilled, again)))
    with pytest.raises(InvalidArgumentError, match="leave out guidance_scale, which is 4"):
        again(KEY, text, guidance_scale=4)


def test_a_picture_to_look_at(pipe, reference):
    """Of another size than the image, whose tokens count in the shift alone."""
    pixels = np.random.default_rng(1).integers(0, 256, (64, 72, 3), dtype=np.uint8)
    size = {"height": SIZE, "width": SIZE}
    call = THEIRS | {"guidance_scale": 1.0} | size
    latents = reference(Image.fromarray(pixels), PROMPTS[0], latents=theirs(noise(1)), **call).images
    given = OURS | {"guidance_scale": 1.0} | size
    drawn = pipe(KEY, PROMPTS[0], image=pixels, latents=noise(1), output="latents", **given)
    assert_latents_agree(drawn, normalised(reference, latents))


def test_another_scheduler_is_not_shifted_by_the_size(pipe, reference):
    config = dict(pipe.scheduler) | {"use_dynamic_shifting": False}
    whole, own = reference.scheduler, pipe.replace(scheduler=config)
    reference.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    try:
        call = THEIRS | {"height": SIZE, "width": SIZE}
        latents = reference(prompt=PROMPTS, latents=theirs(noise(2)), **call).images
    finally:
        reference.scheduler = whole
    drawn = own(KEY, PROMPTS, latents=noise(2), output="latents", **OURS)
    assert_latents_agree(drawn, normalised(reference, latents))


def test_levels_of_a_call_count_as_50_steps_with_reference_quirks(folder, pipe, reference):
    """Theirs then is the shift of 50 steps, whatever the number of levels."""
    quirky, levels = pipelines.load(folder, reference_quirks=True), [1.0, 0.7, 0.3]
    call = {"guidance_scale": 1.0, **TEXT}
    reference_call = call | {"height": SIZE, "width": SIZE, "output_type": "latent"}
    latents = reference(prompt=PROMPTS[0], latents=theirs(noise(1)), sigmas=levels, **reference_call).images
    given = dict(latents=noise(1), sigmas=levels, output="latents", **call)
    assert_latents_agree(quirky(KEY, PROMPTS[0], **given), normalised(reference, latents))
    assert np.abs(quirky(KEY, PROMPTS[0], **given) - pipe(KEY, PROMPTS[0], **given)).max() > 1e-3


def test_the_shift_is_theirs():
    for tokens in (16, 256, 4096, 4300, 4301, 9000):
        for steps in (1, 4, 10, 50, 200):
            assert empirical_mu(tokens, steps) == pytest.approx(
                compute_empirical_mu(tokens, steps), abs=1e-12
            )


def test_the_command_line_draws_the_same(folder, pipe, tmp_path):
    options = ["--height", str(SIZE), "--width", str(SIZE), "--num-inference-steps", "5", "--num-images", "1"]
    own = ["--options", "max_sequence_length=64", "text_encoder_out_layers=[1,2]"]
    paths = ["--output-dir", str(tmp_path)]
    assert cli.main(["sample", str(folder), "--prompt", PROMPTS[0], *options, *own, *paths]) == 0
    (path,) = tmp_path.glob("image-*.png")
    size = {"height": SIZE, "width": SIZE}
    drawn = pipe(jax.random.key(0), PROMPTS[0], **OURS | size)
    assert np.abs(np.asarray(Image.open(path)) - (drawn[0] + 1) * 127.5).max() <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text_encoder_out_layers": (1, 4)}, r"must be 2 numbers from 0 to 3.*got \[1, 4\]"),
        ({"text_encoder_out_layers": (1, 2, 3)}, "must be 2 numbers"),
        ({"max_sequence_length": 129}, "between 1 and 128, not 129"),
        ({"height": 18, "width": 16}, "18"),
        ({"strength": 0.5}, "strength"),
        ({"latents": noise(1)[..., :4]}, r"latents must be \[N, h, w, 12\]"),
    ],
)
def test_calls_that_cannot_be(pipe, call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        pipe(KEY, PROMPTS[0], **TEXT | call)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"joint_attention_dim": 10}, "states 12 wide, its transformer takes 10"),
        ("transformer", {"in_channels": 8}, "12 latent channels, its transformer takes 8 and draws 8"),
        ("transformer", {"guidance_embeds": True}, "as no FLUX.2 klein does"),
    ],
)
def test_parts_of_different_models_are_refused(pipe, part, change, message):
    network = getattr(pipe, part)
    module = type(network.module)(dataclasses.replace(network.config, **change))
    with pytest.raises(CheckpointError, match=message):
        pipe.replace(**{part: network.replace(module=module)}).check_parts()
