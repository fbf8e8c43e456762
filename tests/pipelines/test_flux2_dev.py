"""FLUX.2-dev against the pipeline of diffusers, on a tiny random folder."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from flux2_folders import CHANNELS, LAYERS, open_flux2, write_flux2
from picture_checks import KEY, assert_latents_agree, states_of
from PIL import Image
from reference_pipelines import SIZE, theirs

from jaxldm import cli, pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

SIDE = SIZE // 4
TEXT = {"max_sequence_length": 232, "text_encoder_out_layers": LAYERS}
OURS = {"num_inference_steps": 5, "guidance_scale": 4.0, **TEXT}
SQUARE = {"height": SIZE, "width": SIZE}
PICTURE = np.zeros((32, 32, 3), np.uint8)
PROMPTS = ["a cat", "the dog sat on a cat, and the hat"]


def noise(count):
    return np.random.default_rng(0).standard_normal((count, SIDE, SIDE, CHANNELS)).astype(np.float32)


def latents_of(reference, prompts, count, **options):
    """What the transformer of diffusers draws, [N, c, h, w]."""
    call = OURS | SQUARE | {"output_type": "latent"} | options
    tokens = reference(prompt=prompts, latents=theirs(noise(count)), **call).images
    return tokens.reshape(count, SIDE, SIDE, CHANNELS).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_flux2(tmp_path_factory.mktemp("flux2_dev"))


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return open_flux2(folder)


@pytest.fixture(scope="module")
def their_latents(reference):
    return latents_of(reference, PROMPTS, 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_become_the_states_of_the_reference(side, tmp_path):
    """At every token, those that fill a row as well; of texts that are cut, and with tokens typed by hand."""
    folder = write_flux2(tmp_path, side)
    texts = [*PROMPTS, "", "a cat " * 30, "two [IMG] cats [INST] <s>"]
    with torch.no_grad():
        expected, _ = open_flux2(folder).encode_prompt(texts, **TEXT)
    pipe = pipelines.load(folder)
    with pytest.warns(UserWarning, match="longer than the 232 tokens"):
        given = states_of(pipe, texts, None, **TEXT)["prompt_embeds"]
    assert given.shape == expected.shape
    np.testing.assert_allclose(given, expected, atol=1e-5 * float(expected.abs().max()))
    assert pipe.tokenizer.padding_side == side


def test_text_to_image(pipe, their_latents, reference):
    """The states handed in draw the same."""
    drawn, images = (
        pipe(KEY, PROMPTS, latents=noise(2), output=output, **OURS) for output in ("latents", "images")
    )
    assert_latents_agree(drawn, their_latents)
    statistics = reference.vae.bn
    mean, variance = (x.view(1, -1, 1, 1) for x in (statistics.running_mean, statistics.running_var))
    raw = reference._unpatchify_latents(their_latents * torch.sqrt(variance + 1e-4) + mean)
    with torch.no_grad():
        decoded = reference.vae.decode(raw).sample.numpy().transpose(0, 2, 3, 1)
    grey = [np.rint((np.clip(side, -1, 1) + 1) * 127.5) for side in (images, decoded)]
    assert np.ptp(grey[1]) > 20 and np.abs(grey[0] - grey[1]).max() <= 2
    given = {"prompt_embeds": states_of(pipe, PROMPTS, None, **TEXT)["prompt_embeds"]}
    again = pipe(KEY, latents=noise(2), output="latents", **given, **OURS)
    np.testing.assert_array_equal(again, drawn)


def test_a_picture_to_look_at_and_another_guidance(pipe, reference):
    pixels = np.random.default_rng(1).integers(0, 256, (64, 72, 3), dtype=np.uint8)
    latents = latents_of(reference, PROMPTS[0], 1, image=Image.fromarray(pixels), guidance_scale=1.0)
    call = OURS | SQUARE | {"guidance_scale": 1.0, "latents": noise(1), "output": "latents"}
    drawn = pipe(KEY, PROMPTS[0], image=pixels, **call)
    assert_latents_agree(drawn, latents)
    assert np.abs(pipe(KEY, PROMPTS[0], image=pixels, **call | {"guidance_scale": 3.0}) - drawn).max() > 1e-3


def test_several_pictures_to_look_at(pipe, reference):
    """Each of its own size, the image of the first one's where the call names none."""
    rng = np.random.default_rng(2)
    first, second = (rng.integers(0, 256, (64, side, 3), dtype=np.uint8) for side in (64, 72))
    start = rng.standard_normal((1, 16, 16, CHANNELS)).astype(np.float32)
    call = {"image": [Image.fromarray(first), Image.fromarray(second)], "latents": theirs(start)}
    tokens = reference(prompt=PROMPTS[0], output_type="latent", **OURS | {"num_inference_steps": 2}, **call)
    given = OURS | {"num_inference_steps": 2, "latents": start, "output": "latents", "image": first}
    drawn = pipe(KEY, PROMPTS[0], further_images=[second], **given)
    assert_latents_agree(drawn, tokens.images.reshape(1, 16, 16, CHANNELS).permute(0, 3, 1, 2))
    assert np.abs(drawn - pipe(KEY, PROMPTS[0], **given)).max() > 1e-3


def test_levels_of_a_call_count_as_50_steps_with_reference_quirks(folder, pipe, reference):
    levels = [1.0, 0.7, 0.3]
    options = dict(max_sequence_length=232, text_encoder_out_layers=LAYERS, sigmas=levels, guidance_scale=2.0)
    tokens = reference(
        prompt=PROMPTS[0], latents=theirs(noise(1)), output_type="latent", **SQUARE, **options
    ).images
    call = options | SQUARE | {"latents": noise(1), "output": "latents"}
    quirky = pipelines.load(folder, reference_quirks=True)(KEY, PROMPTS[0], **call)
    assert_latents_agree(quirky, tokens.reshape(1, SIDE, SIDE, CHANNELS).permute(0, 3, 1, 2))
    assert np.abs(quirky - pipe(KEY, PROMPTS[0], **call)).max() > 1e-3


def test_a_call_that_says_nothing_takes_50_steps_at_a_scale_of_4(pipe):
    assert pipe.defaults.num_inference_steps == 50 and pipe.defaults.guidance_scale == 4.0
    assert pipe.is_guidance_distilled
    with pytest.warns(UserWarning, match="the negative prompt is ignored: give true_cfg_scale"):
        pipe(KEY, PROMPTS[0], "a dog", **OURS | SQUARE | {"num_inference_steps": 1})


def test_a_folder_that_ours_wrote_is_opened_by_diffusers(pipe, their_latents, tmp_path):
    """Its text encoder is the language model alone, and its tokenizer still a part of a processor."""
    with pytest.warns(
        UserWarning, match=r"text_encoder without the weights that see images: .* MistralModel"
    ):
        pipelines.save(pipe, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "Flux2Pipeline"
    assert index["text_encoder"] == ["transformers", "MistralModel"]
    assert index["tokenizer"] == ["transformers", "PixtralProcessor"]
    processor = json.loads((tmp_path / "tokenizer" / "processor_config.json").read_text())
    assert processor["processor_class"] == "PixtralProcessor"
    opened = open_flux2(tmp_path)
    np.testing.assert_allclose(latents_of(opened, PROMPTS, 2), their_latents, atol=1e-5)
    again = pipelines.load(tmp_path)
    assert not any(row.difference for row in pipelines.compare(pipe, again))
    for part in ("transformer", "vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, *(getattr(p, part).params for p in (pipe, again)))


def test_the_command_line_draws_the_same(folder, pipe, tmp_path, capsys):
    options = ["--height", str(SIZE), "--width", str(SIZE), "--num-inference-steps", "5", "--num-images", "1"]
    own = ["--options", "max_sequence_length=232", "text_encoder_out_layers=[1,2]"]
    paths = ["--output-dir", str(tmp_path)]
    assert cli.main(["sample", str(folder), "--prompt", PROMPTS[0], *options, *own, *paths]) == 0
    (path,) = tmp_path.glob("image-*.png")
    drawn = pipe(jax.random.key(0), PROMPTS[0], **OURS | SQUARE)
    assert np.abs(np.asarray(Image.open(path)) - (drawn[0] + 1) * 127.5).max() <= 1


@pytest.mark.parametrize("name", ["Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline"])
def test_other_pipelines_of_flux2_are_refused_in_one_line(name, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(CheckpointError, match=r"is not supported: of FLUX.2 there are dev and klein"):
        pipelines.load(tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            {"text_encoder_out_layers": (1, 4)},
            InvalidArgumentError,
            "must be 2 numbers from 0 to 3",
        ),
        ({"max_sequence_length": 257}, InvalidArgumentError, "between 1 and 256, not 257"),
        ({"guidance_scale": -1.0}, InvalidArgumentError, "4 is a good start"),
        ({"strength": 0.5}, InvalidArgumentError, "strength"),
        ({"height": 18, "width": 16}, InvalidArgumentError, "18"),
        ({"further_images": [PICTURE]}, InvalidArgumentError, "give the first picture as image"),
        ({"image": PICTURE, "further_images": PICTURE}, InvalidArgumentError, "must be a list of pictures"),
        (
            {"image": PICTURE, "further_images": [PICTURE[1:]]},
            InvalidArgumentError,
            r"further_images\[0\]: .*31",
        ),
        ({"image": PICTURE, "further_images": ["a.png"]}, InvalidArgumentError, r"further_images\[0\]: "),
        ({"caption_upsample_temperature": 0.15}, UnknownNameError, "caption_upsample_temperature"),
    ],
)
def test_calls_that_cannot_be(pipe, call, error, message):
    with pytest.raises(error, match=message):
        pipe(KEY, PROMPTS[0], **TEXT | call)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"joint_attention_dim": 10}, "states 12 wide, its transformer takes 10"),
        ("transformer", {"in_channels": 8}, "12 latent channels, its transformer takes 8 and draws 8"),
        ("transformer", {"guidance_embeds": False}, "takes no guidance as an input, as FLUX.2-dev does"),
    ],
)
def test_parts_of_different_models_are_refused(pipe, part, change, message):
    network = getattr(pipe, part)
    module = type(network.module)(dataclasses.replace(network.config, **change))
    with pytest.raises(CheckpointError, match=message):
        pipe.replace(**{part: network.replace(module=module)}).check_parts()
