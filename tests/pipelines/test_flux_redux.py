"""FLUX.1 Redux against the pipeline of diffusers, on a tiny folder."""

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from flux_folders import write_flux
from picture_checks import KEY
from PIL import Image
from reference_pipelines import shaken, text_encoder, write_tokenizer
from t5_parts import t5_encoder, t5_tokenizer

from jaxldm import models, pipelines
from jaxldm.cli import main
from jaxldm.errors import CheckpointError, InvalidArgumentError

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)


def parts():
    torch.manual_seed(0)
    options = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 5}
    config = transformers.SiglipVisionConfig(hidden_size=12, image_size=16, **options)
    return {
        "image_encoder": shaken(transformers.SiglipVisionModel(config), 1, 0.1),
        "feature_extractor": transformers.SiglipImageProcessor(size={"height": 16, "width": 16}),
        "image_embedder": shaken(ReduxImageEncoder(redux_dim=12, txt_in_features=24), 2, 0.1),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("redux")
    tokenizer, size = write_tokenizer(root / "words")
    texts = {"text_encoder": text_encoder(size, 16, 5), "tokenizer": tokenizer}
    texts |= {"text_encoder_2": t5_encoder(24), "tokenizer_2": t5_tokenizer()}
    diffusers.FluxPriorReduxPipeline(**parts(), **texts).save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


def test_states_of_pictures_and_texts(folder, pipe):
    reference = diffusers.FluxPriorReduxPipeline.from_pretrained(folder)
    weights = {"prompt_embeds_scale": [0.5, 2.0], "pooled_prompt_embeds_scale": [1.0, -0.5]}
    images = [Image.fromarray(each) for each in PICTURES]
    expected = reference(images, prompt=["a cat", "the dog"], **weights)
    states = pipe(KEY, ["a cat", "the dog"], image=PICTURES, **weights)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        wanted = getattr(expected, name).detach().numpy()
        assert states[name].shape == wanted.shape
        np.testing.assert_allclose(states[name], wanted, atol=1e-3 * np.abs(wanted).max())


def test_without_text_encoders(folder, pipe, tmp_path):
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    alone = pipe.replace(**dict.fromkeys(texts))
    pipelines.save(alone, tmp_path)
    reference = diffusers.FluxPriorReduxPipeline.from_pretrained(tmp_path)
    assert reference.text_encoder is None and reference.feature_extractor.size["height"] == 16
    embedded = reference.image_embedder(reference.encode_image(Image.fromarray(PICTURES[0]), "cpu", 1))
    states = pipelines.load(tmp_path)(KEY, image=PICTURES[0])
    assert states["prompt_embeds"].shape == (1, 512 + 9, 24) and not states["prompt_embeds"][:, :512].any()
    wanted = embedded.image_embeds.detach().numpy()
    np.testing.assert_allclose(states["prompt_embeds"][:, 512:], wanted, atol=1e-4)
    assert states["pooled_prompt_embeds"].shape == (1, 768)
    with pytest.raises(InvalidArgumentError, match="without text encoders: leave prompt out"):
        alone(KEY, "a cat", image=PICTURES[0])
    with pytest.raises(CheckpointError, match="it has text_encoder alone"):
        alone.replace(text_encoder=pipe.text_encoder).check_parts()


def test_the_towers(folder, pipe):
    reference = transformers.SiglipVisionModel.from_pretrained(folder / "image_encoder")
    pixels = np.random.default_rng(1).standard_normal((2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    encoded = pipe.image_encoder(pixels)
    np.testing.assert_allclose(encoded.last_hidden_state, expected.last_hidden_state.numpy(), atol=1e-4)
    np.testing.assert_allclose(encoded.pooled, expected.pooler_output.numpy(), atol=1e-4)
    assert models.count_params("siglip-so400m") == 428_225_600
    assert models.count_params("flux-redux") == 64_503_808


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "give image="),
        ({"image": PICTURES, "prompt_embeds_scale": [1.0, 2.0, 3.0]}, "one for each of 2 pictures"),
        ({"image": PICTURES, "prompt": ["a", "b", "c"]}, "prompt"),
    ],
)
def test_wrong_calls(pipe, call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        pipe(KEY, **call)


def test_the_command(folder, pipe, tmp_path, capsys):
    flux = write_flux(tmp_path / "flux", "dev")
    files = [tmp_path / f"{n}.png" for n in range(2)]
    for file, pixels in zip(files, PICTURES, strict=True):
        Image.fromarray(pixels).save(file)
    words = ["sample", str(flux), "--num-inference-steps", "1", "--quiet"]
    words += ["--height", "16", "--width", "16", "--output-dir", str(tmp_path / "out")]
    of_pictures = ["--redux", str(folder), "--redux-image", *map(str, files), "--redux-scale", "0.5", "2"]
    assert main([*words, *of_pictures]) == 0
    drawn = np.load(tmp_path / "out" / "samples.npz")["images"]
    states = pipe(KEY, image=PICTURES, prompt_embeds_scale=[0.5, 2], pooled_prompt_embeds_scale=[0.5, 2])
    size = {"height": 16, "width": 16}
    same = pipelines.load(flux)(jax.random.key(0), **states, **size, num_inference_steps=1)
    assert drawn.shape == same.shape == (1, 16, 16, 3)
    wanted = np.clip((same + 1) * 127.5, 0, 255)
    assert np.abs(drawn.astype(np.float32) - wanted).max() <= 1
    for changed, text in (
        ([*words, "--redux", str(folder)], "--redux is of --redux-image"),
        ([*words, *of_pictures, "3"], "--redux-scale has 3 numbers for 2 pictures"),
        ([*words, *of_pictures, "--negative-prompt", "bad"], "--negative-prompt is not for --redux"),
        ([*words, *of_pictures[2:], "--redux", str(flux)], "is a Flux, not FLUX.1 Redux"),
    ):
        assert main(changed) == 2 and text in capsys.readouterr().err
