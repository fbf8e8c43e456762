"""Fine-tuning a finished model: what moves, what stays to the last bit, what is written, what is refused."""

import dataclasses
import re
import shutil

import chex
import jax
import numpy as np
import pytest
from finetuned import changed, names_of, tuned, write_model, write_pictures
from PIL import Image
from tiny_models import latent_pipeline

from jaxldm import checkpoints, models, pipelines, training
from jaxldm.commands.export import Export
from jaxldm.commands.finetune import Finetune, hint_of
from jaxldm.commands.finetunings import finetune_rows
from jaxldm.commands.info import describe
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError, UnknownNameError
from jaxldm.pipelines.few_steps import FewSteps
from jaxldm.training.finetune_recipe import make_finetuning
from jaxldm.training.finetuning import tuned_of
from jaxldm.training.runs import LORA_FILE

pytestmark = pytest.mark.usefixtures("shapes_once")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures with captions: fewer than a data set for training from the beginning has."""
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def lora_run(source, pictures, tmp_path_factory, compile_once):
    options = {"rank": 4, "alpha": 2.0, "targets": ["*"], "epochs": 60, "save_every": 20}
    return tuned(source, pictures, tmp_path_factory.mktemp("runs") / "lora", "lora", **options)


@pytest.mark.parametrize(
    ("method", "options", "rows"),
    [
        ("full", {}, []),
        ("lora", {"rank": 4}, [("rank", "4, alpha 4"), ("targets", "all projections of attention")]),
        (
            "lora",
            {"alpha": 2.0, "targets": ("*/to_q", "*/to_v")},
            [("rank", "8, alpha 2"), ("targets", "*/to_q, */to_v")],
        ),
        ("dreambooth", {"instance_prompt": "sks dog"}, [("prompt", "sks dog")]),
        (
            "textual-inversion",
            {"word": "<my-cat>", "initial_text": "cat"},
            [("word", "<my-cat>, at first like cat"), ("vectors", "1, learned in texts of the kind object")],
        ),
        ("controlnet", {"control_images": "edges"}, [("control", "edges of the pictures")]),
    ],
)
def test_info_says_what_moves(method, options, rows):
    own = make_finetuning("SD", method, options)
    assert finetune_rows(own) == [("method", method), ("from", own.source), *rows]


def test_frozen_parameters_stay_to_the_last_bit_and_the_rest_is_a_model(source, pictures, tmp_path, capsys):
    options = {"freeze": ["down_blocks_*", "conv_in/*"], "sample_every": 2, "sample_steps": 1}
    run = tuned(source, pictures, tmp_path / "run", "freeze", **options)
    before, after = pipelines.load(source), pipelines.load(run.path)
    moved = changed(before, after)
    still = names_of(before) - moved
    own = ("unet/down_blocks", "unet/conv_in")
    assert {name for name in still if name.startswith("unet/")} == {
        name for name in names_of(before) if name.startswith(own)
    }
    assert moved and all(name.startswith("unet/") for name in moved)
    assert list((run.path / "finetune" / "samples").glob("*.png"))
    assert after.family is before.family and after.scheduler == before.scheduler
    assert after.tokenizer.files == before.tokenizer.files
    images = after(jax.random.key(0), "a red cat", num_inference_steps=1)
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()
    about = describe(str(run.path))
    assert "a run of the recipe finetune" in about
    assert re.search(
        rf"method +freeze\n +from +{re.escape(str(source))}\n +frozen +down_blocks_\*, conv_in/\*\n", about
    )
    # Commands that are suggested draw what it has learnt, not a cat in the snow.
    caption = training.read_data(run.path).captions("train", 1)[0]
    assert hint_of(run, training.read_recipe(run.path)).endswith(f"--prompt '{caption}'")
    Export(str(run.path), str(tmp_path / "exported")).run()
    assert f"--prompt '{caption}' " in capsys.readouterr().out


def test_lora_becomes_one_file_for_the_model_it_was_trained_on(source, lora_run):
    before = pipelines.load(source)
    moved = changed(before, pipelines.with_lora(before, lora_run.path))
    assert moved and all(re.search(r"unet/.*weight", name) for name in moved)
    assert not (lora_run.path / "model_index.json").exists()
    with pytest.raises(CheckpointError, match=r"holds a LoRA .*jaxldm sample .*--lora"):
        pipelines.load(lora_run.path)
    assert f"--lora {lora_run.path}" in describe(str(lora_run.path))
    assert hint_of(lora_run, training.read_recipe(lora_run.path)) in describe(str(lora_run.path))


def test_checkpoints_of_an_adapter_hold_no_network(source, lora_run):
    step = training.kept_steps(lora_run.path, "finetune")[-1]
    kept = training.read_kept(lora_run.path, step, "finetune").params
    file = lora_run.path / "finetune" / "checkpoints" / str(step) / "manifest.json"
    assert step == 120 and "frozen" not in file.read_text()
    written = checkpoints.load_lora(lora_run.path)
    assert 2 * len(written.layers) == len(jax.tree.leaves(kept))


def test_the_loss_falls_on_pictures_that_are_seen_often(lora_run):
    loss = training.read_log(lora_run.stage("finetune").log)["loss"]
    assert len(loss) == 120 and np.mean(loss[-20:]) < 0.8 * np.mean(loss[:20])


def test_diffusers_reads_the_folder_of_a_lora(source, lora_run):
    """Its pipeline finds the file by its name, and has the same weights when it has merged it."""
    import diffusers

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(source)
    theirs.load_lora_weights(str(lora_run.path))
    theirs.fuse_lora()
    merged = pipelines.with_lora(pipelines.load(source), lora_run.path / LORA_FILE)
    wanted = checkpoints.to_state_dict(merged.unet.params)
    found = {name.replace(".base_layer.", "."): part for name, part in theirs.unet.state_dict().items()}
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name].numpy(), tensor, atol=1e-6 * max(1, np.abs(tensor).max()))


def test_a_new_adapter_is_the_identity(source):
    pipe = pipelines.load(source)
    recipe = training.FinetuneRecipe(source=str(source), lora=training.LoraRecipe(targets=("*",), alpha=3.0))
    own = tuned_of(recipe, pipe)
    chex.assert_trees_all_equal(own.network(own.init(jax.random.key(0)), own.frozen), pipe.unet.params)


def test_a_killed_run_goes_on_to_the_same_bits(lora_run, tmp_path):
    """From the checkpoint of step 80, by the command without the model and the pictures."""
    shutil.copytree(lora_run.path, tmp_path / "run")
    (tmp_path / "run" / LORA_FILE).unlink()
    shutil.rmtree(tmp_path / "run" / "finetune" / "checkpoints" / "120")
    recipe = Finetune(run_dir=str(tmp_path / "run"), resume=True).make_recipe(tmp_path / "run")
    assert recipe == training.read_recipe(lora_run.path)
    said = []
    run = training.train(recipe, tmp_path / "run", resume=True, devices=1, log=said.append, bar=False)
    assert "resuming from the checkpoint of step 80" in said
    assert (run.path / LORA_FILE).read_bytes() == (lora_run.path / LORA_FILE).read_bytes()
    other = dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, learning_rate=1.0))
    with pytest.raises(CheckpointError, match=r"finetune\.learning_rate"):
        training.train(other, run.path, resume=True, devices=1)


def test_a_model_of_classes(tmp_path):
    """All of it moves, and nothing else."""
    pipelines.save(latent_pipeline(), tmp_path / "model")
    for n in range(6):
        path = tmp_path / "classes" / "abc"[n % 3] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * n, np.uint8)).save(path)
    with pytest.raises(InvalidArgumentError, match="3 channels, the model draws 1"):
        tuned(tmp_path / "model", tmp_path / "classes", tmp_path / "run", "full")
    pipe = latent_pipeline()
    vae = models.build(
        "mini-autoencoder", **{**vars_of(pipe.vae.config), "in_channels": 3, "out_channels": 3}
    )
    colour = pipe.replace(vae=pipelines.Network(vae, models.init(vae, jax.random.key(0))))
    pipelines.save(colour, tmp_path / "colour")
    run = tuned(tmp_path / "colour", tmp_path / "classes", tmp_path / "run", "full")
    assert pipelines.kind_of(run.path) == "run"
    networks = {name for name in names_of(colour) if name.startswith("unet/")}
    assert changed(colour, pipelines.load(run.path)) == networks
    (tmp_path / "classes" / "c").rename(tmp_path / "classes" / "b" / "c")
    with pytest.raises(DataError, match="draws 3 classes, and classes has 2"):
        tuned(tmp_path / "colour", tmp_path / "classes", tmp_path / "other", "full")


def vars_of(config):
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def test_what_does_not_fit_is_refused_before_anything_is_written(source, pictures, tmp_path):
    def refused(error, words, data=pictures, method="lora", model=source, **options):
        with pytest.raises(error, match=words) as caught:
            tuned(model, data, tmp_path / "run", method, **options)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    refused(InvalidArgumentError, "no layer is named '\\*/to_w'", targets=["*/to_w"])
    refused(InvalidArgumentError, "rank must be", rank=0)
    refused(InvalidArgumentError, "rank 99 is more than", rank=99)
    refused(InvalidArgumentError, "no parameter is named 'up_block'", method="freeze", freeze=["up_block"])
    refused(InvalidArgumentError, "freezes all", method="freeze", freeze=["*"])
    refused(InvalidArgumentError, "method freeze needs freeze, as in", method="freeze")
    refused(InvalidArgumentError, "rank has no effect with method full", method="full", rank=4)
    refused(InvalidArgumentError, "freeze has no effect with method lora", freeze=["conv_in/*"])
    refused(UnknownNameError, "lora", method="loar")
    refused(UnknownNameError, "learning_rate", learning_rat=1.0)
    refused(InvalidArgumentError, "image_size must be a multiple of 2, and 16 is", image_size=15)
    refused(InvalidArgumentError, "batch_size 8 is more than the 4", batch_size=8)
    refused(CheckpointError, "does not exist", model=tmp_path / "nothing")
    long = write_pictures(tmp_path / "long", caption="a {} " + "cat " * 40)
    refused(InvalidArgumentError, r"4 of 4 captions are longer than the 77 tokens.*shorten them", data=long)
    silent = write_pictures(tmp_path / "silent")
    for n in range(4):
        (silent / f"{n}.txt").unlink()
    refused(DataError, r"have no captions: put a \.txt", data=silent)
    small = write_pictures(tmp_path / "small", size=8)
    refused(DataError, "its 8x8 pixels are fewer than 16x16", data=small)


def test_models_that_this_loss_would_spoil_are_refused(source, pictures, tmp_path):
    pipe = pipelines.load(source)
    pipelines.save(dataclasses.replace(pipe, few_steps=FewSteps(method="lcm")), tmp_path / "student")
    with pytest.raises(CheckpointError, match=r"is a student of few steps, .* fine-tune its teacher"):
        training.finetune_recipe(tmp_path / "student", pictures)
    unet = models.from_config(dataclasses.replace(pipe.unet.config, in_channels=9))
    inpainting = pipe.replace(unet=pipelines.Network(unet, models.init(unet, jax.random.key(0))))
    pipelines.save(inpainting, tmp_path / "inpainting")
    with pytest.raises(CheckpointError, match="is an inpainting model"):
        training.finetune_recipe(tmp_path / "inpainting", pictures)


def test_the_command_makes_the_recipe(source, pictures, tmp_path):
    words = {"source": str(source), "data": str(pictures)}
    recipe = Finetune(**words, rank=4, targets=("*/to_q",), epochs=3).make_recipe(tmp_path)
    assert recipe == training.finetune_recipe(source, pictures, rank=4, targets=("*/to_q",), epochs=3)
    assert recipe == training.Recipe.from_dict(recipe.to_dict()) and recipe.image_size == 16
    with pytest.raises(InvalidArgumentError, match="--from is missing"):
        Finetune(data=str(pictures)).make_recipe(tmp_path)
    with pytest.raises(InvalidArgumentError, match="finetune takes all else"):
        dataclasses.replace(recipe, classifier=training.ClassifierRecipe())
