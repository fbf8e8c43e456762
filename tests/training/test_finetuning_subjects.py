"""Fine-tuning on one subject: DreamBooth with pictures of its class, and the embeddings of a new word."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from finetuned import changed, names_of, tuned, write_model, write_pictures
from flax import traverse_util
from safetensors.torch import load_file

from jaxldm import checkpoints, pipelines, training
from jaxldm import diffusion as D
from jaxldm.checkpoints.embedding_file import EMBEDDING_FILE
from jaxldm.commands.finetune import hint_of
from jaxldm.commands.info import describe
from jaxldm.data import ArrayRows
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError
from jaxldm.pipelines.words import table_of
from jaxldm.training.denoiser_loss import Condition
from jaxldm.training.finetuning import Tuned, make_loss
from jaxldm.training.prior_preservation import PairedRows

SUBJECT = {"instance_prompt": "a photo of sks cat", "class_prompt": "a photo of a cat"}

pytestmark = pytest.mark.usefixtures("shapes_once")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures without captions."""
    folder = write_pictures(tmp_path_factory.mktemp("data") / "pictures")
    for path in folder.glob("*.txt"):
        path.unlink()
    return folder


def test_dreambooth_draws_pictures_of_the_class_and_trains_on_both(source, pictures, tmp_path, compile_once):
    more = {"num_class_images": 6, "sample_steps": 1, "epochs": 1}
    run = tuned(source, pictures, tmp_path / "run", "dreambooth", **SUBJECT, **more)
    drawn = sorted((run.path / "class-images").glob("*.png"))
    assert len(drawn) == 6
    log = training.read_log(run.stage("finetune").log)
    assert len(log["step"]) == 3  # each of six pictures once, two at a time
    assert np.all(log["loss"] > log["prior"]) and np.all(log["prior"] > 0)
    moved = changed(pipelines.load(source), pipelines.load(run.path))
    assert moved and all(name.startswith("unet/") for name in moved)
    recipe = training.finetune_recipe(source, pictures, "dreambooth", **SUBJECT, rank=2)
    assert recipe.finetune.lora == training.LoraRecipe(rank=2) and recipe.finetune.learning_rate == 1e-4
    assert "--lora" in hint_of(training.RunFolder(tmp_path / "lora"), recipe)


def test_the_class_has_a_mean_of_its_own():
    """loss = mean over the subject + weight * mean over the class, each with its own condition."""
    recipe = training.FinetuneRecipe(
        source="nowhere",
        prompt="a",
        prior=training.PriorRecipe(prompt="b", weight=0.25),
        condition_dropout=0.0,
        sample_latents=False,
    )
    prediction = D.epsilon(D.VP.named("linear"))
    network = lambda params, x, t, condition: 0 * x + condition["c"][:, None, None, None]  # noqa: E731
    same = Tuned(lambda key: {}, lambda params, frozen: params, None, lambda params: None, lambda *_: None)
    on = Condition({"c": np.float32(0)})
    loss = make_loss(recipe, prediction, network, same, on)
    batch = {"mean": jnp.zeros((4, 8, 8, 1)), "c": jnp.full(4, 3.0)}
    batch |= {"prior_mean": jnp.zeros((4, 8, 8, 1)), "prior_c": jnp.full(4, 5.0)}
    state = type("State", (), {"frozen": None})
    value, metrics = loss({}, state, batch, jax.random.key(0))
    # The target is noise of variance 1: (c - eps)^2 has the mean c^2 + 1.
    np.testing.assert_allclose(metrics["prior"], 26, rtol=0.1)
    np.testing.assert_allclose(value - 0.25 * metrics["prior"], 10, rtol=0.2)


def test_the_fewer_of_a_pair_are_repeated():
    rows = PairedRows(ArrayRows({"a": np.arange(2)}), ArrayRows({"a": np.arange(10, 15)}))
    taken = rows.take(np.arange(len(rows)))
    assert taken["a"].tolist() == [0, 1, 0, 1, 0] and taken["prior_a"].tolist() == [10, 11, 12, 13, 14]


WORD = {"word": "<my-cat>", "initial_text": "cat", "num_vectors": 2, "learning_rate": 0.1}


@pytest.fixture(scope="module")
def word_run(source, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "word"
    return tuned(source, pictures, folder, "textual-inversion", **WORD, sample_every=2, sample_steps=1)


def test_only_the_new_rows_of_the_table_move(source, word_run):
    before = pipelines.load(source)
    after = pipelines.with_embedding(before, word_run.path)
    tables = [
        traverse_util.flatten_dict(pipe.text_encoder.params)[table_of(pipe.text_encoder.params)]
        for pipe in (before, after)
    ]
    number = len(tables[0])
    assert len(tables[1]) == number + 2
    np.testing.assert_array_equal(tables[1][:number], tables[0])
    assert len(changed(before, after)) == 1 < len(names_of(before))
    letters = before.tokenizer.backend.encode("cat", add_special_tokens=False).ids[:2]
    moved = np.abs(np.asarray(tables[1][number:]) - np.asarray(tables[0])[letters])
    assert (moved.max(axis=1) > 0).all()
    assert list((word_run.path / "finetune" / "samples").glob("*.png"))


def test_the_word_stands_in_prompts(source, word_run):
    pipe = pipelines.with_embedding(pipelines.load(source), word_run.path / EMBEDDING_FILE)
    ids = pipe.tokenizer(["a <my-cat> b", "a <my-cat> <my-cat>_1 b"]).input_ids
    first = pipelines.load(source).tokenizer.largest_token + 1
    np.testing.assert_array_equal(ids[0], ids[1])
    assert [first, first + 1] in [list(pair) for pair in zip(ids[0], ids[0][1:], strict=False)]
    with_it, without = pipe.encode_prompts(["a <my-cat>", "a cat"])[0]["encoder_hidden_states"]
    assert np.abs(with_it - without).max() > 1e-3
    with pytest.raises(CheckpointError, match=r"holds a word and no model.*--embedding"):
        pipelines.load(word_run.path)
    assert f"--embedding {word_run.path} --prompt '<my-cat> in the snow'" in describe(str(word_run.path))


def test_a_model_with_the_word_is_saved_and_opened(source, word_run, tmp_path):
    pipe = pipelines.with_embedding(pipelines.load(source), word_run.path)
    pipelines.save(pipe, tmp_path / "saved")
    again = pipelines.load(tmp_path / "saved")
    assert not changed(pipe, again)
    texts = ["a <my-cat> in a box"]
    np.testing.assert_array_equal(again.tokenizer(texts).input_ids, pipe.tokenizer(texts).input_ids)


def test_diffusers_reads_the_word(source, word_run):
    """The same states of a prompt as ours."""
    assert load_file(word_run.path / EMBEDDING_FILE)["<my-cat>"].shape == (2, 8)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    theirs.load_textual_inversion(str(word_run.path))
    ours = pipelines.with_embedding(pipelines.load(source), word_run.path)
    prompt = "a <my-cat> on a mat"
    wanted, _ = theirs.encode_prompt(prompt, torch.device("cpu"), 1, False)
    found = ours.encode_prompts([prompt])[0]["encoder_hidden_states"]
    np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-5)


def test_what_cannot_be_a_word_or_a_subject_is_refused(source, pictures, word_run, tmp_path):
    def refused(error, words, method="textual-inversion", **options):
        given = {**(WORD if method == "textual-inversion" else SUBJECT), **options}
        given = {name: value for name, value in given.items() if value is not None}
        with pytest.raises(error, match=words) as caught:
            tuned(source, pictures, tmp_path / "run", method, **given)
        assert len(str(caught.value)) < 400 and not (tmp_path / "run").exists()

    refused(InvalidArgumentError, "'a' is a token of this tokenizer already", word="a")
    refused(InvalidArgumentError, "one word without spaces", word="my cat")
    refused(InvalidArgumentError, "needs initial_text, as in", initial_text=None)
    refused(InvalidArgumentError, "initial_text must be a text", initial_text=" ")
    refused(DataError, "there is no folder", method="dreambooth", class_images=tmp_path / "nothing")
    refused(InvalidArgumentError, "num_vectors must be", num_vectors=0)
    refused(InvalidArgumentError, "rank has no effect", rank=2)
    refused(InvalidArgumentError, "class_prompt has no effect", class_prompt="a photo of a cat")
    refused(InvalidArgumentError, "needs instance_prompt", method="dreambooth", instance_prompt=None)
    refused(
        InvalidArgumentError, "needs class_prompt", method="dreambooth", class_prompt=None, prior_weight=2.0
    )
    refused(
        InvalidArgumentError,
        "num_class_images has no effect",
        method="dreambooth",
        class_images="a",
        num_class_images=3,
    )
    pipe = pipelines.load(source)
    checkpoints.save_embedding(tmp_path / "wide.safetensors", "<wide>", np.zeros((1, 9), np.float32))
    with pytest.raises(CheckpointError, match="9 wide, the text encoder's are 8"):
        pipelines.with_embedding(pipe, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="no file of one word"):
        checkpoints.load_embedding(source / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InvalidArgumentError, match="already"):
        pipelines.with_embedding(pipelines.with_embedding(pipe, word_run.path), word_run.path)
