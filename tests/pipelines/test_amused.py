"""aMUSEd against the pipelines of diffusers, fed the random numbers that ours draws: equal tokens."""

import dataclasses
import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
from amused_folders import CODEBOOK, FACTOR, MASK, FedNumbers, write_amused
from compilations import COMPILATIONS
from picture_checks import states_of
from PIL import Image

from jaxldm import cli, pipelines
from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError, UnknownNameError

KEY = jax.random.key(7)
HEIGHT, WIDTH = 6, 10  # 15 tokens: half of them is no whole number, so that no rounding decides
SIZE = {"height": HEIGHT, "width": WIDTH}
PROMPTS = ["a cat", "the dog sat!"]
KINDS = {
    "text": diffusers.AmusedPipeline,
    "image": diffusers.AmusedImg2ImgPipeline,
    "mask": diffusers.AmusedInpaintPipeline,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_amused(tmp_path_factory.mktemp("amused") / "folder")


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


def opened(kind, folder):
    reference = KINDS[kind].from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    return reference


def tokens_of(reference, monkeypatch, *args, size=(HEIGHT, WIDTH), **call):
    """What the reference draws, given the numbers of our images of KEY."""
    count = len(args[0]) if isinstance(args[0], list) else 1
    FedNumbers(monkeypatch, D.image_keys(KEY, count), size[0] // FACTOR, size[1] // FACTOR)
    tokens = reference(*args, output_type="latent", **call).images.numpy()
    monkeypatch.undo()
    return tokens


def picture(height=HEIGHT, width=WIDTH):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask(height=HEIGHT, width=WIDTH):
    """White over a row of tokens and two of the next."""
    white = np.zeros((height, width), np.uint8)
    white[:2], white[2:4, :4] = 255, 255
    return white


CALLS = {
    "as published: 12 steps, guidance 10": (12, {}, {}),
    "other options": (
        5,
        {"negative_prompt": ["bad", "bad bat"], "guidance_scale": 4.0, "temperature": (4.5, 0.5)},
        {"crops_coords_top_left": (3, 5), "aesthetic_score": 7.0},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_tokens_of_texts_are_those_of_diffusers(folder, pipe, monkeypatch, name):
    steps, common, ours = CALLS[name]
    common = common | SIZE | {"num_inference_steps": steps}
    names = {
        "crops_coords_top_left": "micro_conditioning_crop_coord",
        "aesthetic_score": "micro_conditioning_aesthetic_score",
    }
    theirs = {names[option]: value for option, value in ours.items()}
    expected = tokens_of(opened("text", folder), monkeypatch, PROMPTS, **common, **theirs)
    drawn = pipe(KEY, PROMPTS, output="latents", **common, **ours)
    assert drawn.dtype == np.int32 and len(np.unique(drawn)) > 5
    np.testing.assert_array_equal(drawn, expected)
    if ours:  # they are used
        assert (pipe(KEY, PROMPTS, output="latents", **common) != drawn).any()


def test_images_are_those_that_diffusers_makes_of_the_tokens(folder, pipe):
    images = pipe(KEY, PROMPTS, num_inference_steps=12, **SIZE)
    tokens = pipe(KEY, PROMPTS, num_inference_steps=12, output="latents", **SIZE)
    vqvae = opened("text", folder).vqvae
    shape = (2, HEIGHT // FACTOR, WIDTH // FACTOR, 4)
    with torch.no_grad():
        looked_up = vqvae.decode(torch.from_numpy(tokens), force_not_quantize=True, shape=shape)
    expected = looked_up.sample.clip(0, 1).numpy().transpose(0, 2, 3, 1)
    assert images.shape == (2, HEIGHT, WIDTH, 3) and images.dtype == np.float32
    assert np.ptp(expected) > 0.2
    np.testing.assert_allclose((images + 1) / 2, expected, atol=1e-4)
    np.testing.assert_array_equal(pipe.decode(tokens), images)


@pytest.mark.parametrize(("steps", "strength"), [(12, 0.5), (7, 0.8)])
def test_image_to_image(folder, pipe, monkeypatch, steps, strength):
    call = {"num_inference_steps": steps, "strength": strength}
    reference = opened("image", folder)
    expected = tokens_of(reference, monkeypatch, PROMPTS[0], Image.fromarray(picture()), **call)
    drawn = pipe(KEY, PROMPTS[0], image=picture(), output="latents", **call)
    np.testing.assert_array_equal(drawn, expected)
    given = pipe.image_tokens(pipelines.as_images(picture()))
    kept = (drawn == given).mean()
    assert 0 < kept < 1 and len(np.unique(given)) > 3


def test_at_strength_1_diffusers_leaves_the_image_as_it_is_and_masks_it_afterwards(folder, pipe, monkeypatch):
    """It looks up the share of step -1, which is the last one: nothing is masked. Ours draws all again."""
    call = {"num_inference_steps": 7, "strength": 1.0}
    reference = opened("image", folder)
    theirs = tokens_of(reference, monkeypatch, PROMPTS[0], Image.fromarray(picture()), **call)
    given = pipe.image_tokens(pipelines.as_images(picture()))
    assert (theirs == given).mean() > 0.5
    call = {"num_inference_steps": 7, "output": "latents"}
    drawn = pipe(KEY, PROMPTS[0], image=picture(), strength=1.0, **call)
    np.testing.assert_array_equal(drawn, pipe(KEY, PROMPTS[0], **SIZE, **call))


@pytest.mark.parametrize(("steps", "strength"), [(5, None), (11, 0.6)])
def test_inpainting(folder, pipe, monkeypatch, steps, strength):
    """Its pipeline puts a linear schedule in place of the folder's."""
    size = (8, 12)  # 4x6 tokens, of which 8 are drawn again
    image, white = picture(*size), mask(*size)
    call = {"num_inference_steps": steps} | ({} if strength is None else {"strength": strength})
    reference = opened("mask", folder)
    assert reference.scheduler.config.masking_schedule == "linear"
    pictures = [Image.fromarray(array) for array in (image, white)]
    expected = tokens_of(reference, monkeypatch, PROMPTS[0], *pictures, size=size, **call)
    drawn = pipe(KEY, PROMPTS[0], image=image, mask_image=white, output="latents", **call)
    np.testing.assert_array_equal(drawn, expected)
    given = pipe.image_tokens(pipelines.as_images(image))
    kept = white[::FACTOR, ::FACTOR] == 0
    np.testing.assert_array_equal(drawn[0][kept], given[0][kept])
    assert (drawn[0] != given[0]).any()


def test_diffusers_inpaints_no_size_whose_tokens_are_not_divisible_once_more(folder, pipe):
    """It rounds the mask to 2x4 tokens where there are 3x5: at a factor of 16, sizes are multiples of 256."""
    pictures = [Image.fromarray(array) for array in (picture(), mask())]
    with pytest.raises(RuntimeError, match="invalid for input of size 8"):
        opened("mask", folder)(PROMPTS[0], *pictures, num_inference_steps=2)
    drawn = pipe(KEY, PROMPTS[0], image=picture(), mask_image=mask(), num_inference_steps=2)
    assert drawn.shape == (1, HEIGHT, WIDTH, 3)


def test_a_token_is_drawn_again_where_one_of_its_pixels_is_white(pipe):
    given = pipe.image_tokens(pipelines.as_images(picture()))
    white = np.zeros((HEIGHT, WIDTH), np.uint8)
    white[1, 1] = 255
    call = {"num_inference_steps": 5, "output": "latents", "image": picture(), "mask_image": white}
    drawn = pipe(KEY, PROMPTS[0], **call)
    np.testing.assert_array_equal(np.argwhere(drawn != given), [[0, 0, 0]])


def test_tokens_that_are_known_stay_and_the_schedule_may_be_another(pipe):
    start = np.full((2, 3, 5), MASK)
    start[:, 1, 1:4] = [[3, 0, 7], [5, 5, 1]]
    call = {"num_inference_steps": 12, "output": "latents", "mask_schedule": "square", "temperature": 0.0}
    drawn = pipe(KEY, PROMPTS, latents=start, **call)
    np.testing.assert_array_equal(drawn[:, 1, 1:4], start[:, 1, 1:4])
    assert ((drawn >= 0) & (drawn < CODEBOOK)).all()


def test_an_image_is_its_own_and_nothing_compiles_again(pipe):
    keys = D.image_keys(KEY, 4)
    call = {"num_images_per_prompt": 2, "num_inference_steps": 12, "output": "latents", **SIZE}
    four = pipe(keys, PROMPTS, **call)
    assert (four[0] != four[1]).any() and (four[2] != four[3]).any()
    third = keys[2:3]
    before = COMPILATIONS.count
    alone = pipe(third, PROMPTS[1], **call | {"num_images_per_prompt": 1})
    pipe(KEY, "bat", "cat", **SIZE, num_inference_steps=9, guidance_scale=2.0, output="latents")
    pipe(KEY, "bat", image=picture(), mask_image=mask(), mask_schedule="arccos", output="latents")
    assert COMPILATIONS.count == before
    np.testing.assert_array_equal(alone[0], four[2])
    on_two = pipe(keys, PROMPTS, devices=jax.devices()[:2], **call)
    np.testing.assert_array_equal(on_two, four)


def test_another_callback_compiles_nothing(pipe):
    call, seen = {"num_inference_steps": 3, "output": "latents", **SIZE}, []
    pipe(KEY, "a cat", progress=lambda done, total: seen.append((int(done), int(total))), **call)
    before = COMPILATIONS.count
    pipe(KEY, "a cat", progress=lambda done, total: seen.append(int(done)), **call)
    assert COMPILATIONS.count == before
    assert sorted(seen[:3]) == [(1, 3), (2, 3), (3, 3)] and sorted(seen[3:]) == [1, 2, 3]
    again = pipe(KEY, **states_of(pipe, ["a cat"], [""]), **call)
    np.testing.assert_array_equal(again, pipe(KEY, "a cat", **call))


def test_without_guidance_the_negative_prompt_is_not_asked(pipe):
    call = {"guidance_scale": 1.0, "num_inference_steps": 3, "output": "latents", **SIZE}
    with pytest.warns(UserWarning, match="the negative prompt is ignored: guidance_scale is 1"):
        drawn = pipe(KEY, PROMPTS[0], "bad", **call)
    np.testing.assert_array_equal(drawn, pipe(KEY, PROMPTS[0], **call))


def test_diffusers_opens_the_folder_that_ours_wrote(pipe, tmp_path, monkeypatch):
    half = {
        name: jax.tree.map(lambda leaf: leaf * np.float32(0.9), network.params)
        for name, network in pipe.networks.items()
    }
    changed = pipe.replace(
        **{name: pipe.networks[name].replace(params=params) for name, params in half.items()}
    )
    pipelines.save(changed, tmp_path / "ours")
    call = {"num_inference_steps": 12, **SIZE}
    expected = tokens_of(opened("text", tmp_path / "ours"), monkeypatch, PROMPTS, **call)
    again = pipelines.load(tmp_path / "ours")
    np.testing.assert_array_equal(again(KEY, PROMPTS, output="latents", **call), expected)
    assert not any(tensor.difference for tensor in pipelines.compare(changed, again))
    assert again.scheduler["mask_token_id"] == MASK


def test_the_command_draws_and_names_options_that_it_has_no_use_for(folder, pipe, tmp_path, capsys):
    words = ["sample", str(folder), "--output-dir", str(tmp_path / "out"), "--prompt", "a cat", "--seed", "7"]
    assert cli.main([*words, "--height", str(HEIGHT), "--width", str(WIDTH)]) == 0
    images = np.load(tmp_path / "out" / "samples.npz")["images"]
    expected = pipe(KEY, "a cat", **SIZE)
    np.testing.assert_allclose(images, np.rint((expected + 1) * 127.5), atol=1)
    capsys.readouterr()
    assert cli.main([*words, "--solver", "euler"]) == 2
    assert "--solver" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"height": 7}, InvalidArgumentError, "height 7 is not divisible by 2"),
        (
            {"latents": np.full((1, 3, 5), 99)},
            InvalidArgumentError,
            "latents must lie in .* or be 27, got 99",
        ),
        ({"latents": np.zeros((1, 3, 5))}, InvalidArgumentError, "whole numbers"),
        (
            {"latents": np.zeros((1, 3, 5), int), "height": 8},
            InvalidArgumentError,
            "3x5 tokens, 4x5 are needed",
        ),
        ({"latents": np.zeros((1, 3, 5), int), "image": picture()}, InvalidArgumentError, "both a start"),
        ({"mask_image": mask()}, InvalidArgumentError, "give image, too"),
        ({"image": picture(), "mask_image": mask()[1:]}, DataError, "6x10"),
        ({"image": picture(), "strength": 0}, InvalidArgumentError, "strength"),
        ({"image": picture(), "strength": 0.1, "num_inference_steps": 5}, InvalidArgumentError, "10 or more"),
        ({"strength": 0.5}, InvalidArgumentError, "give image"),
        ({"num_inference_steps": 0}, InvalidArgumentError, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, InvalidArgumentError, "num_images_per_prompt"),
        ({"guidance_scale": np.nan}, InvalidArgumentError, "guidance_scale"),
        ({"temperature": -1}, InvalidArgumentError, "temperature"),
        ({"mask_schedule": "cosin"}, UnknownNameError, "cosine"),
        ({"output": "tokens"}, UnknownNameError, "latents"),
        ({"negative_prompt": ["a", "b", "c"]}, InvalidArgumentError, "3 texts in negative_prompt"),
    ],
)
def test_impossible_requests_are_refused(pipe, options, kind, words):
    with pytest.raises(kind, match=words):
        pipe(KEY, PROMPTS[0], **options)


def test_parts_of_different_models_are_refused(folder, tmp_path):
    def changed(name, part, **entries):
        shutil.copytree(folder, tmp_path / name)
        path = tmp_path / name / part
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        return tmp_path / name

    scheduler = "scheduler/scheduler_config.json"
    for name, part, entries, words in (
        ("mask", scheduler, {"mask_token_id": 99}, "token 99, its transformer knows 28"),
        ("schedule", scheduler, {"masking_schedule": "steep"}, "'steep', which is not known"),
    ):
        with pytest.raises(CheckpointError, match=words):
            pipelines.load(changed(name, part, **entries))
    pipe = pipelines.load(folder)
    small = dataclasses.replace(pipe.text_encoder.config, projection_dim=11)
    with pytest.raises(CheckpointError, match="pooled text of 11, its transformer takes 10"):
        module = type(pipe.text_encoder.module)(small)
        pipe.replace(text_encoder=pipelines.Network(module, {})).check_parts()
