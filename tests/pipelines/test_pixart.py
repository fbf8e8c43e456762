"""PixArt's pipelines against those of diffusers, on tiny random folders."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from picture_checks import KEY, assert_images_agree, assert_latents_agree, states_of
from pixart_folders import KINDS, write_pixart
from reference_pipelines import LATENT, open_reference, theirs
from t5_parts import t5_encoder

from jaxldm import pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

PROMPTS = {"prompt": "The cat at the zoo.", "negative_prompt": "a DOG"}
STEPS = {"num_inference_steps": 4, "guidance_scale": 4.0}
AS_IT_IS = {"use_resolution_binning": False, "clean_caption": False}  # of the reference


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_pixart(tmp_path_factory.mktemp(name), name) for name in KINDS}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: pipelines.load(folder) for name, folder in folders.items()}


def noise(count=1, size=(LATENT, LATENT)):
    return np.random.default_rng(0).standard_normal((count, *size, 4)).astype(np.float32)


@pytest.mark.parametrize("solver", [None, "euler"])
def test_text_to_image(folders, pipes, solver):
    """None is the folder's own, DPM-Solver++. Capital letters count for nothing, in both."""
    reference = open_reference(PixArtSigmaPipeline, folders["sigma"], solver)
    latents = reference(**PROMPTS, latents=theirs(noise()), output_type="latent", **STEPS, **AS_IT_IS).images
    call = dict(latents=noise(), solver=solver, **STEPS)
    drawn = pipes["sigma"](KEY, **PROMPTS, output="latents", **call)
    assert_latents_agree(drawn, latents)
    images = pipes["sigma"](KEY, **PROMPTS, **call) if solver is None else pipes["sigma"].decode(drawn)
    assert_images_agree(images, reference, latents)
    lower = {name: text.lower() + " " for name, text in PROMPTS.items()}
    np.testing.assert_array_equal(pipes["sigma"](KEY, **lower, output="latents", **call), drawn)


def test_several_prompts_an_oblong_size_and_the_empty_negative_prompt(folders, pipes):
    """Every text is masked after its own tokens; 300 places, as many as the reference takes."""
    reference = open_reference(PixArtSigmaPipeline, folders["sigma"])
    prompts, size = ["a cat", "the cat at the zoo, a dog!"], {"height": 24, "width": 16}
    start = noise(2, (12, 8))
    latents = reference(prompts, latents=theirs(start), output_type="latent", **size, **STEPS, **AS_IT_IS)
    drawn = pipes["sigma"](KEY, prompts, latents=start, output="latents", **size, **STEPS)
    assert_latents_agree(drawn, latents.images)


def test_states_and_their_mask_in_place_of_texts(pipes):
    given = states_of(pipes["sigma"], [PROMPTS["prompt"]], [PROMPTS["negative_prompt"]])
    call = dict(latents=noise(), output="latents", **STEPS)
    expected = pipes["sigma"](KEY, **PROMPTS, **call)
    np.testing.assert_array_equal(pipes["sigma"](KEY, **given, **call), expected)
    whole = given | {"prompt_attention_mask": np.ones_like(given["prompt_attention_mask"])}
    assert np.abs(pipes["sigma"](KEY, **whole, **call) - expected).max() > 1e-3
    del given["prompt_attention_mask"]
    with pytest.raises(InvalidArgumentError, match="prompt_attention_mask is missing"):
        pipes["sigma"](KEY, **given, **call)


def test_a_text_that_is_cut(folders, pipes):
    reference = open_reference(PixArtSigmaPipeline, folders["sigma"])
    call = dict(prompt=PROMPTS["prompt"], **STEPS, max_sequence_length=4)
    latents = reference(**call, latents=theirs(noise()), output_type="latent", **AS_IT_IS).images
    with pytest.warns(UserWarning, match="4 tokens of the text encoder: it does not see 'at the zoo.'"):
        drawn = pipes["sigma"](KEY, **call, latents=noise(), output="latents")
    assert_latents_agree(drawn, latents)


def test_alpha_takes_the_size(folders, pipes):
    reference = open_reference(PixArtAlphaPipeline, folders["alpha"])
    call = dict(**PROMPTS, height=16, width=24, **STEPS)
    start = noise(1, (8, 12))
    latents = reference(**call, latents=theirs(start), output_type="latent", **AS_IT_IS).images
    drawn = pipes["alpha"](KEY, **call, latents=start, output="latents")
    assert_latents_agree(drawn, latents)
    cond, uncond = pipes["alpha"].encode_prompts(["a cat"], None, (16, 24))
    assert cond["encoder_hidden_states"].shape == (1, 120, 16)
    assert cond["resolution"].tolist() == [[16, 24]] == uncond["resolution"].tolist()


def test_inpainting_keeps_what_the_mask_leaves(pipes):
    """The reference has no such pipeline; a network of latents needs none of its own."""
    image, mask = noise(), np.zeros((16, 16), bool)
    mask[:, :8] = True
    given = dict(image=pipelines.Latents(image), mask_image=mask, output="latents")
    drawn = pipes["sigma"](KEY, "a cat", **given, **STEPS)
    np.testing.assert_allclose(drawn[:, :, 4:], image[:, :, 4:], atol=1e-5)
    assert np.abs(drawn - image)[:, :, :4].mean() > 0.1


def test_a_folder_that_ours_wrote_is_opened_by_diffusers(pipes, tmp_path):
    for name, kind in KINDS.items():
        pipelines.save(pipes[name], tmp_path / name)
        reference = open_reference(kind, tmp_path / name)
        assert type(reference.transformer).__name__ == "PixArtTransformer2DModel"
        again = pipelines.load(tmp_path / name)
        assert again.family is pipes[name].family
        assert not [row for row in pipelines.compare(again, pipes[name]) if row.difference]


def test_the_published_folders_name_an_older_class(folders, pipes, tmp_path):
    """`Transformer2DModel`, which diffusers has split since."""
    folder = tmp_path / "pixart"
    shutil.copytree(folders["sigma"], folder)
    for path, change in (
        (folder / "model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        (folder / "transformer" / "config.json", {"_class_name": "Transformer2DModel"}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    again = pipelines.load(folder)
    assert again.transformer.module == pipes["sigma"].transformer.module


@pytest.mark.parametrize(
    ("side", "bins"),
    [
        (256, pipeline_pixart_sigma.ASPECT_RATIO_256_BIN),
        (512, pipeline_pixart_sigma.ASPECT_RATIO_512_BIN),
        (1024, pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN),
        (2048, pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN),
    ],
)
def test_the_sizes_of_the_training_are_those_of_the_reference(pipes, side, bins):
    config = dataclasses.replace(pipes["sigma"].transformer.config, sample_size=side // 2)
    module = dataclasses.replace(pipes["sigma"].transformer.module, config=config)
    network = pipes["sigma"].transformer.replace(module=module)
    pipe = pipes["sigma"].replace(transformer=network)
    assert pipe.default_size == (side, side)
    for height, width in ((1080, 1920), (1920, 1080), (333, 333), (600, 800), (100, 900), (2000, 400)):
        expected = PixArtImageProcessor.classify_height_width_bin(height, width, bins)
        assert pipe.nearest_size(height, width) == expected
    ours = {pipe.nearest_size(*map(int, pair)) for pair in bins.values()}
    assert ours == {(int(height), int(width)) for height, width in bins.values()}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"height": 18}, InvalidArgumentError, "18"),
        ({"max_sequence_length": 1}, InvalidArgumentError, "2 or more, not 1: 300"),
        ({"prompt_2": "a"}, UnknownNameError, "prompt_2"),
        ({"true_cfg_scale": 2.0}, InvalidArgumentError, "guidance_scale alone"),
    ],
)
def test_bad_calls_are_refused_before_anything_is_compiled(pipes, call, error, message):
    with pytest.raises(error, match=message):
        pipes["sigma"](KEY, "a cat", **call)


def test_sizes_of_nothing_are_refused(pipes):
    with pytest.raises(InvalidArgumentError, match="above 0"):
        pipes["sigma"].nearest_size(0, 10)


def test_parts_of_other_models_are_refused(folders, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(folders["sigma"], folder)
    shutil.rmtree(folder / "text_encoder")
    t5_encoder(width=24).save_pretrained(folder / "text_encoder")
    with pytest.raises(CheckpointError, match=r"mixes two models: .*24 wide, its transformer takes 16"):
        pipelines.load(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    with pytest.raises(CheckpointError, match="lacks text_encoder"):
        pipelines.load(folder)
