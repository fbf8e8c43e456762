import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.commands.options import devices_or_mesh
from jaxldm.data import Dataset
from jaxldm.errors import (
    CheckpointError,
    DataError,
    InvalidArgumentError,
    StorageError,
    UnknownNameError,
)
from jaxldm.training import RECIPES, AutoencoderRecipe, DiffusionRecipe, Recipe, make_mesh
from jaxldm.training.longer import hint_to_train_longer
from jaxldm.training.runs import RunFolder, begin_stage, open_run, read_config, read_recipe, recipe_to_resume
from jaxldm.training.stages import stage_keys
from jaxldm.training.store import TrainingStore
from jaxldm.training.train import check_recipe, max_devices, train

SMOKE = RECIPES["smoke"]


class Digits:
    """As much of a data set as the checks ask for."""

    __class__ = Dataset  # to `isinstance`

    name, image_shape, num_classes, class_names = "mnist5k", (28, 28, 1), 10, tuple("0123456789")
    license, splits = "", ("train", "test")

    def rows(self, split):
        return range(4000)

    def captions(self, split, limit=None):
        return ["a digit"]


class Shapes(Digits):
    """The same in colour, for recipes with captions."""

    name, image_shape = "captioned_shapes", (32, 32, 3)


def changed(stage, **changes):
    return dataclasses.replace(SMOKE, **{stage: dataclasses.replace(getattr(SMOKE, stage), **changes)})


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_whole_and_survives_json(name, tmp_path):
    recipe = RECIPES[name]
    assert recipe.name == name
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again.to_dict() == recipe.to_dict()
    assert again.generator == recipe.generator
    if recipe.diffusion is not None:
        assert again.diffusion.prediction == recipe.diffusion.prediction
    if again.text is not None:  # the encoder itself is in a package, which need not be installed
        config = models.PRESETS[again.text.encoder]
        entries = models.config_to_dict(config) | {"architectures": [models.class_name(config)]}
        (tmp_path / "config.json").write_text(json.dumps(entries))
        again = dataclasses.replace(again, text=dataclasses.replace(again.text, encoder=str(tmp_path)))
    check_recipe(again, Digits() if again.text is None else Shapes(), make_mesh(1))


def test_lists_of_json_become_tuples_again():
    weight, time = {"name": "min_snr", "gamma": 5.0}, {"name": "logit_normal", "std": 0.5}
    path = D.Interpolant("gvp", gamma=(0.001, 0.1))
    recipe = changed("diffusion", prediction=D.velocity(path), weight=weight, time=time)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"name": "x", "colour": 1}, "recipe has an unknown key 'colour'; known: autoencoder"),
        (
            {"name": "x", "diffusion": {"epoch": 1}},
            "recipe: diffusion has an unknown key 'epoch'; did you mean 'epochs'",
        ),
        (
            {"name": "x", "diffusion": {"prediction": {"beta": 1}}},
            r"recipe: diffusion: prediction: .*no option 'beta'",
        ),
        (
            {"name": "x", "diffusion": {"prediction": {"name": "eps"}}},
            "recipe: diffusion: prediction: .*epsilon",
        ),
        (
            {"name": "x", "diffusion": {"prediction": {"path": {"type": "ddpm"}}}},
            "recipe: diffusion: prediction: .*vp",
        ),
        (
            {"name": "x", "diffusion": {"prediction": {"path": {"type": "vp", "zero_terminal_snr": True}}}},
            "v_prediction",
        ),
        (
            {"name": "x", "diffusion": {"prediction": {"name": "velocity"}}},
            "recipe: diffusion: prediction: .*velocity",
        ),
        ({"name": "x", "diffusion": {"weight": {"name": "p3"}}}, "weight.*min_snr"),
        ({"name": "x", "diffusion": {"time": {"name": "logit_normal", "spread": 1}}}, "time.*spread"),
        ({"name": "x", "diffusion": {"epochs": 0}}, "epochs must be >= 1"),
        ({"name": "x", "diffusion": 3}, "recipe: diffusion must be an object or null, not 3"),
        ({"name": "x", "diffusion": {"epochs": "9"}}, "diffusion: epochs must be a whole number, not '9'"),
        ({"name": "x", "diffusion": {"overrides": [1]}}, "overrides must be an object"),
        ({"name": "x", "diffusion": {"prediction": 1}}, "prediction must be an object"),
        ({"name": 3}, "recipe: name must be a string"),
        ({}, "name"),
    ],
)
def test_a_damaged_recipe_says_where(entries, words):
    with pytest.raises(CheckpointError, match=words):
        Recipe.from_dict(entries)


@pytest.mark.parametrize(
    ("kind", "numbers", "words"),
    [
        (DiffusionRecipe, {"batch_size": -1}, "batch_size must be >= 1, or 0"),
        (DiffusionRecipe, {"save_every": -1}, "save_every"),
        (DiffusionRecipe, {"ema_decay": 1.0}, "ema_decay"),
        (AutoencoderRecipe, {"beta": -1.0}, "beta"),
        (AutoencoderRecipe, {"free_bits": float("nan")}, "free_bits"),
        (DiffusionRecipe, {"warmup_epochs": float("nan")}, "warmup_epochs"),
        (DiffusionRecipe, {"weight": {"name": "min_snr", "gamma": 0.0}}, "gamma"),
        (DiffusionRecipe, {"time": {"name": "logit_normal", "std": 0.0}}, "std"),
        (DiffusionRecipe, {"noise_offset": -0.1}, "noise_offset"),
        (DiffusionRecipe, {"condition_dropout": 1.1}, "condition_dropout"),
        (DiffusionRecipe, {"sample_guidance_scale": float("nan")}, "sample_guidance_scale"),
        (DiffusionRecipe, {"samples_per_class": 0}, "samples_per_class"),
    ],
)
def test_numbers_outside_their_range(kind, numbers, words):
    with pytest.raises(InvalidArgumentError, match=words):
        kind(**numbers)
    with pytest.raises(InvalidArgumentError, match="seed"):
        Recipe(name="x", seed=-1)


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        (changed("diffusion", preset="mini-unett"), UnknownNameError, "did you mean 'mini-unet'"),
        (changed("diffusion", overrides={"widths": 3}), UnknownNameError, "widths"),
        (
            changed("diffusion", time={"name": "logit_normal"}),
            InvalidArgumentError,
            "logit_normal needs a continuous path",
        ),
        (changed("diffusion", sample_steps=1001), InvalidArgumentError, "1001|1000"),
        (
            changed("diffusion", batch_size=257),
            InvalidArgumentError,
            "257 is more than the 256 training images",
        ),
        (changed("autoencoder", learning_rate=-1.0), InvalidArgumentError, "learning_rate"),
        (changed("classifier", b2=1.0), InvalidArgumentError, "b2"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(recipe, error, words):
    with pytest.raises(error, match=words):
        check_recipe(recipe, Digits(), make_mesh(1))


def test_a_batch_that_cannot_be_split_and_an_unknown_data_set(tmp_path):
    with pytest.raises(InvalidArgumentError, match="cannot be split over 8 devices"):
        check_recipe(changed("diffusion", batch_size=60), Digits(), make_mesh(8))
    with pytest.raises((UnknownNameError, DataError), match="mnist5"):
        train(dataclasses.replace(SMOKE, data="mnist5"), tmp_path / "run", devices=1)
    assert not (tmp_path / "run").exists()


def test_keys_differ_by_purpose_stage_and_seed_and_by_nothing_else():
    keys = [
        tuple(np.asarray(jax.random.key_data(key)))
        for seed in (0, 1)
        for stage in ("autoencoder", "diffusion")
        for key in stage_keys(seed, stage)
    ]
    assert len(set(keys)) == len(keys) == 16
    assert tuple(np.asarray(jax.random.key_data(stage_keys(0, "autoencoder").init))) == keys[0]


def test_a_new_run_folder_says_what_it_is_of(tmp_path):
    run = open_run(tmp_path / "a" / "run", SMOKE, Digits(), resume=False)
    entries = read_config(run.path)
    assert entries["data"] == {
        "name": "mnist5k",
        "image_shape": [28, 28, 1],
        "class_names": list("0123456789"),
    }
    assert entries["versions"]["jax"] == jax.__version__
    assert read_recipe(run.path).to_dict() == SMOKE.to_dict()
    assert open_run(run.path, SMOKE, Digits(), resume=True) == run
    assert not run.stage("diffusion").complete


def test_a_run_is_neither_overwritten_nor_resumed_as_another(tmp_path):
    run = open_run(tmp_path / "run", SMOKE, Digits(), resume=False)
    before = run.config.read_bytes()
    with pytest.raises(CheckpointError, match=r"already holds a run: add --resume"):
        open_run(run.path, SMOKE, Digits(), resume=False)
    other = dataclasses.replace(changed("diffusion", learning_rate=0.5), seed=3)
    with pytest.raises(
        CheckpointError, match=r"diffusion.learning_rate is 0.001 in it and 0.5 now \(and 1 more\)"
    ):
        open_run(run.path, other, Digits(), resume=True)
    assert run.config.read_bytes() == before


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        open_run(tmp_path / "none", SMOKE, Digits(), resume=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    with pytest.raises(CheckpointError, match=r"holds other things \(cat.png\)"):
        open_run(tmp_path / "photos", SMOKE, Digits(), resume=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        open_run(tmp_path / "file", SMOKE, Digits(), resume=False)
    for text in ("{", "[]", '{"format": 9, "recipe": {}}', '{"format": 2}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config.json"):
            read_recipe(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 1, "recipe": {}}')
    with pytest.raises(
        CheckpointError, match="is of format 1, this version reads 2: use the version"
    ) as raised:
        read_recipe(tmp_path)
    assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match="no run folder"):
        read_recipe(tmp_path / "photos")


def test_a_run_killed_before_its_config_was_written_starts_anew(tmp_path):
    said = []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.123.tmp").write_text("{")
    assert open_run(tmp_path / "run", SMOKE, Digits(), resume=True, log=said.append).config.is_file()
    assert len(said) == 1 and "at the beginning" in said[0]


@pytest.mark.parametrize("harm", ["lost", "flipped", "empty", "no JSON"])
def test_a_lost_or_damaged_config_is_written_again_from_its_copy(tmp_path, harm):
    run = open_run(tmp_path / "run", changed("diffusion", epochs=7), Digits(), resume=False)
    whole = run.config.read_bytes()
    if harm == "lost":
        run.config.unlink()
    else:
        flipped = whole.replace(b'"seed": 0', b'"seed": 1')
        run.config.write_bytes({"flipped": flipped, "empty": b"", "no JSON": whole[:-9]}[harm])
        assert flipped != whole
    said = []
    assert read_recipe(run.path) == recipe_to_resume(run.path) == changed("diffusion", epochs=7)
    with pytest.raises(CheckpointError, match="already holds a run"):
        open_run(run.path, SMOKE, Digits(), resume=False)
    open_run(run.path, changed("diffusion", epochs=7), Digits(), resume=True, log=said.append)
    assert run.config.read_bytes() == run.config_copy.read_bytes() == whole
    assert len(said) == 1 and "it is written again from its copy" in said[0]
    assert ("edited by hand (start another run" in said[0]) == (harm != "lost")
    run.config_copy.unlink()
    open_run(run.path, changed("diffusion", epochs=7), Digits(), resume=True, log=said.append)
    assert run.config_copy.read_bytes() == whole and len(said) == 1


def test_the_copy_of_a_stage_is_enough(tmp_path):
    """It is the recipe that the stage was begun with, whatever is given now."""
    longer, said = changed("diffusion", epochs=7), []
    run = open_run(tmp_path / "run", longer, Digits(), resume=False)
    begin_stage(run, "diffusion")
    whole = run.config.read_bytes()
    for path in (run.config, run.config_copy):
        path.unlink()
    assert recipe_to_resume(run.path) == longer
    with pytest.raises(CheckpointError, match="epochs"):
        open_run(run.path, SMOKE, Digits(), resume=True)
    open_run(run.path, longer, Digits(), resume=True, log=said.append)
    assert run.config.read_bytes() == run.config_copy.read_bytes() == whole
    assert len(said) == 1 and "was missing: it is written again from its copy" in said[0]


def test_without_any_copy_a_run_is_not_guessed(tmp_path):
    run = RunFolder(tmp_path)
    with TrainingStore(run.stage("diffusion").path / "checkpoints") as store:
        store.save(3, {"x": np.zeros(3)})
    for path in (run.config, run.config_copy):
        path.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json.*start a new run in another folder"):
        open_run(run.path, SMOKE, Digits(), resume=True)
    assert recipe_to_resume(run.path) is None


def test_a_stage_is_complete_when_its_model_is_there(tmp_path):
    """The denoising network is complete when the index of the pipeline, which is written last, is there."""
    run = RunFolder(tmp_path)
    for name in ("autoencoder", "classifier"):
        assert not run.stage(name).complete
        run.stage(name).model.mkdir(parents=True)
        assert run.stage(name).complete
    run.stage("diffusion").model.mkdir(parents=True)
    assert not run.stage("diffusion").complete
    run.index.write_text("{}")
    assert run.stage("diffusion").complete


def test_the_batch_is_split_over_as_many_devices_as_divide_every_batch():
    assert max_devices(SMOKE) == 8
    assert max_devices(changed("classifier", batch_size=100)) == 4
    assert max_devices(changed("diffusion", batch_size=63)) == 1


def test_a_run_may_be_on_any_mesh(tmp_path, monkeypatch):
    meshes = []
    room = sys.modules["jaxldm.training.train"]  # the module, not the function
    monkeypatch.setattr(room, "run_job", lambda context, stage, job: meshes.append(context.mesh))
    monkeypatch.setattr(room, "STAGES", ("classifier",))
    mesh = devices_or_mesh(None, "data=2,fsdp=2,tensor=2")["mesh"]
    recipe = changed("classifier", batch_size=32)
    train(recipe, tmp_path / "run", mesh=mesh, log=print)
    assert meshes == [mesh] and dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(InvalidArgumentError, match="leave devices out, or the mesh"):
        train(recipe, tmp_path / "other", mesh=mesh, devices=8)
    with pytest.raises(InvalidArgumentError, match="batch_size 6 cannot be split over 4 devices"):
        train(changed("classifier", batch_size=6), tmp_path / "other", mesh=mesh)
    with pytest.raises(InvalidArgumentError, match="8 devices"):
        devices_or_mesh(None, "fsdp=3")
    assert devices_or_mesh(2, None) == {"devices": 2} and not (tmp_path / "other").exists()


def test_whoever_resumes_with_more_epochs_reads_how_to_train_longer():
    epochs = RECIPES["smoke"].diffusion.epochs
    saved = dataclasses.replace(RECIPES["smoke"], data="my pictures")
    said = hint_to_train_longer(Path("runs/a"), saved, changed("diffusion", epochs=epochs + 4))
    words = "--from runs/a --data 'my pictures' --method full --epochs 4"
    assert said == f"train its network longer with `jaxldm train finetune {words}`, or begin a new run"
    for before, now in ((saved, saved), (changed("diffusion", epochs=epochs + 1), saved)):
        assert not hint_to_train_longer(Path("runs/a"), before, now)
    shortcut = RECIPES["mini-shortcut"]  # a network of few steps
    more = dataclasses.replace(shortcut.diffusion, epochs=shortcut.diffusion.epochs + 1)
    assert not hint_to_train_longer(Path("runs/a"), shortcut, dataclasses.replace(shortcut, diffusion=more))
