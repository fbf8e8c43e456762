"""Training on captions: states of a frozen encoder, and a run that is a folder of Stable Diffusion."""

import dataclasses
import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
from PIL import Image

from jaxldm import checkpoints, models, pipelines, training
from jaxldm import diffusion as D
from jaxldm.commands.eval import load_classifier
from jaxldm.commands.info import describe
from jaxldm.data import ArrayRows
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError
from jaxldm.training.diffusion import Condition, make_loss
from jaxldm.training.text import (
    STATES,
    CaptionedRows,
    encode_captions,
    load_text_encoder,
    text_width,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dark", "light", "picture"]
BERT = models.BertConfig(
    vocab_size=len(WORDS),
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=12,
)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny BERT of random weights, with a tokenizer of nine words."""
    folder = tmp_path_factory.mktemp("encoder")
    module = models.from_config(BERT)
    checkpoints.save(folder / "text_encoder", module, models.init(module, jax.random.key(0)))
    (folder / "tokenizer").mkdir()
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 512, "pad_token": "[PAD]"}
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def recipe(encoder_folder, tmp_path_factory):
    """The smallest recipe with captions, on 40 plain pictures."""
    tmp_path = tmp_path_factory.mktemp("data")
    for n in range(40):
        path = tmp_path / "pictures" / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 250 * (n % 2), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"a {('dark', 'light')[n % 2]} picture")
    stage = {"epochs": 1, "batch_size": 8, "save_every": 0}
    return training.Recipe(
        name="tiny-text",
        data=str(tmp_path / "pictures"),
        autoencoder=training.AutoencoderRecipe(
            preset="sd-vae",
            overrides={
                "block_out_channels": (8,),
                "down_block_types": ("DownEncoderBlock2D",),
                "up_block_types": ("UpDecoderBlock2D",),
                "layers_per_block": 1,
                "norm_num_groups": 4,
            },
            **stage,
        ),
        diffusion=training.DiffusionRecipe(
            preset="sd15-unet",
            overrides={
                "block_out_channels": (8,),
                "down_block_types": ("CrossAttnDownBlock2D",),
                "up_block_types": ("UpBlock2D",),
                "mid_block_type": None,
                "layers_per_block": 1,
                "attention_head_dim": 2,
                "norm_num_groups": 4,
            },
            prediction=D.v(D.VP.named("cosine")),
            sample_every=1,
            sample_steps=2,
            samples_per_class=1,
            **stage,
        ),
        text=training.TextRecipe(encoder=str(encoder_folder), max_length=6),
    )


def test_states_are_those_of_the_pipelines_and_are_kept(encoder_folder, tmp_path, monkeypatch):
    text = load_text_encoder(training.TextRecipe(encoder=str(encoder_folder), max_length=6))
    assert text_width(training.TextRecipe(encoder=str(encoder_folder), max_length=6)) == 8
    captions = ["a dark picture", "a light picture", "a dark picture"]
    found = encode_captions(text, captions, tmp_path / "captions.npz")
    assert found.states.shape == (3, 6, 8) and found.which[0] == found.which[2] != found.which[1]
    network = pipelines.Network(text.module, text.params)
    expected = pipelines.prompts.encode_texts(network, text.tokenizer, ["", *captions]).hidden
    np.testing.assert_allclose(found.null, expected[0], atol=2e-3)
    rows = CaptionedRows(ArrayRows({"mean": np.arange(3.0)}), found)
    taken = rows.take(np.array([2, 1]))
    assert taken["mean"].tolist() == [2, 1] and taken[STATES].dtype == np.float32
    np.testing.assert_allclose(taken[STATES], expected[[3, 2]], atol=2e-3)
    monkeypatch.setattr(type(text.module), "__call__", None)  # a second time they come from the cache
    again = encode_captions(text, captions, tmp_path / "captions.npz")
    np.testing.assert_array_equal(again.states, found.states)


def test_a_dropped_caption_is_the_empty_one(monkeypatch):
    seen = []

    def network(module):
        def call(params, x, t, condition, dropout_key):
            seen.append(condition[STATES])
            return x

        return call

    monkeypatch.setattr(models, "network", network)
    recipe = training.DiffusionRecipe(condition_dropout=0.5)
    null = np.full((3, 2), -7, np.float32)
    loss_fn = make_loss(recipe, models.build("tiny-dit"), Condition(STATES, STATES, null))
    states = np.arange(64 * 6, dtype=np.float32).reshape(64, 3, 2)
    loss_fn({}, None, {"mean": np.zeros((64, 2, 2, 1), np.float32), STATES: states}, jax.random.key(0))
    dropped = (np.asarray(seen[0]) == null).all(axis=(1, 2))
    assert 20 < dropped.sum() < 44
    np.testing.assert_array_equal(np.asarray(seen[0])[~dropped], states[~dropped])


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    return training.train(recipe, tmp_path_factory.mktemp("runs") / "run", log=lambda line: None, bar=False)


def test_a_run_is_a_pipeline_folder_that_draws_from_prompts(run, tmp_path):
    pipe = pipelines.load(run.path)
    assert pipelines.kind_of(run.path) == "text-to-image" and pipe.family.name == "StableDiffusion"
    assert pipe.tokenizer.max_length == 6
    assert list((run.path / "diffusion" / "samples").glob("*.png"))
    text = describe(str(run.path))
    assert "run of the recipe tiny-text" in text and "text_encoder" in text and "--prompt" in text
    with pytest.raises(CheckpointError, match="draws from texts"):
        load_classifier(str(run.path))
    pipelines.save(pipe, tmp_path / "exported")
    assert not any(row.difference for row in pipelines.compare(pipe, pipelines.load(tmp_path / "exported")))


def test_diffusers_draws_the_same_pictures_from_it(run):
    import torch

    prompts = ["a dark picture", "a light picture"]
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(run.path)
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    start = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    expected = theirs(prompts, latents=start, output_type="np", height=8, width=8, **options).images
    images = pipelines.load(run.path)(jax.random.key(0), prompts, latents=latents, **options)
    assert images.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(np.clip(images, -1, 1) / 2 + 0.5, expected, atol=2e-3)


def test_what_does_not_fit_is_refused_before_anything_is_written(recipe, tmp_path):
    def refused(error, words, **changes):
        with pytest.raises(error, match=words):
            training.train(dataclasses.replace(recipe, **changes), tmp_path / "run", log=print)
        assert not (tmp_path / "run").exists()

    longer = dataclasses.replace(recipe.text, max_length=13)
    absent = dataclasses.replace(recipe.text, encoder=str(tmp_path / "absent"))
    of_classes = training.DiffusionRecipe(preset="tiny-dit")
    refused(InvalidArgumentError, "more than the 12 tokens", text=longer)
    refused(CheckpointError, "absent", text=absent)
    refused(InvalidArgumentError, "UNet2DConditionModel", diffusion=of_classes)
    refused(InvalidArgumentError, "without text", text=None)
    silent = shutil.copytree(recipe.data, tmp_path / "pictures", ignore=shutil.ignore_patterns("*.txt"))
    refused(DataError, "trained on captions", data=str(silent))
    with pytest.raises(InvalidArgumentError, match="needs an autoencoder"):
        dataclasses.replace(recipe, autoencoder=None)
