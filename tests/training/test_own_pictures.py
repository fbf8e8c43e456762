"""Training on a folder of pictures: what is given to the stages, and what is written beside them."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image

from jaxldm import training
from jaxldm.commands.train import Train
from jaxldm.data import ArrayRows
from jaxldm.data.batches import RowsView
from jaxldm.data.load import described_source
from jaxldm.errors import DataError, InvalidArgumentError, UnknownNameError
from jaxldm.training import stages
from jaxldm.training.sealed import sealed

RECIPE = dataclasses.replace(
    training.RECIPES["smoke-dit"], image_size=14, max_train_images=70, classifier=None
)


@pytest.fixture
def pictures(tmp_path):
    for n in range(100):
        path = tmp_path / "pictures" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 16, 3), n, np.uint8)).save(path)
    (tmp_path / "pictures" / "a" / "broken.png").write_bytes(b"nothing")
    return tmp_path / "pictures"


@pytest.fixture
def contexts(monkeypatch):
    """The contexts that the stages of a run are given; nothing is trained."""
    given = []
    module = sys.modules["jaxldm.training.train"]  # the package has a function of that name
    task = module.TASKS["diffusion"]._replace(prepare=given.append)
    monkeypatch.setitem(module.TASKS, "diffusion", task)
    monkeypatch.setattr(module, "run_job", lambda context, stage, job: None)
    return given


def test_skipped_pictures_are_counted_and_listed(tmp_path, pictures, contexts):
    lines = []
    run = training.train(RECIPE, tmp_path / "run", dataset=str(pictures), log=lines.append)
    listed = (run.path / "skipped-pictures.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in listed] == ["a/broken.png"]
    assert "1 of 101 pictures are not used" in lines[0]
    assert training.read_recipe(run.path).data == str(pictures)
    assert training.read_config(run.path)["data"]["class_names"] == ["a", "b"]


def test_many_pictures_are_read_from_disk_by_batch_and_are_the_same(
    tmp_path, pictures, contexts, monkeypatch
):
    run = training.train(RECIPE, tmp_path / "run", dataset=pictures, log=print)
    in_memory = contexts[0].train_rows()
    monkeypatch.setattr(stages, "MAX_BYTES_AS_ARRAYS", 0)
    on_disk = contexts[0].train_rows()
    assert isinstance(in_memory, ArrayRows) and isinstance(on_disk, RowsView)
    assert len(in_memory) == len(on_disk) == 70 and contexts[0].some("test", 3)[0].shape == (3, 14, 14, 3)
    some = np.array([3, 69, 0])
    for rows in (in_memory, on_disk):
        renamed = stages.with_names(rows, mean="image").take(some)
        np.testing.assert_array_equal(renamed["mean"], in_memory.columns["image"][some])
        assert list(renamed) == ["mean"]
    assert not (run.path / "unet").exists()


def test_too_many_broken_ones_are_refused_before_anything_is_written(tmp_path, pictures):
    for n in range(12):
        (pictures / "a" / f"broken{n}.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="more than 10%"):
        training.train(RECIPE, tmp_path / "run", dataset=pictures, log=print)
    assert not (tmp_path / "run").exists()


def test_the_command_line_takes_a_folder_by_its_whole_path(tmp_path, pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Train("smoke-dit", dataset="pictures", image_size=14).make_recipe(tmp_path / "run")
    assert recipe.data == str(pictures) and recipe.image_size == 14


def test_pictures_that_changed_are_refused_at_resume(tmp_path, pictures, contexts):
    """Before they are read; their numbers are what config.json has."""

    def resume():
        training.train(RECIPE, run.path, dataset=pictures, resume=True, log=print)

    (pictures / "notes.txt").write_text("no caption")
    run = training.train(RECIPE, tmp_path / "run", dataset=pictures, log=print)
    config = training.read_config(run.path)
    assert config["data"]["files"]["number"] == 101
    (pictures / "notes.txt").write_text("neither a caption nor a picture")
    (pictures / ".hidden.png").write_bytes(b"")
    resume()
    moved, kept = pictures / "a" / "4.png", tmp_path / "4.png"
    moved.rename(kept)
    with pytest.raises(
        DataError, match=r"began with the 101 files of .*1 fewer now.*start a new run"
    ) as raised:
        resume()
    assert "\n" not in str(raised.value)
    (pictures / "b" / "4.png").write_bytes(kept.read_bytes())
    with pytest.raises(DataError, match="files of other names or sizes now"):
        resume()
    (pictures / "b" / "4.png").unlink()
    moved.write_bytes(kept.read_bytes() + b"0")
    with pytest.raises(DataError, match="files of other names or sizes now"):
        resume()
    moved.write_bytes(kept.read_bytes())
    resume()
    for n in range(3):
        (pictures / "c").mkdir(exist_ok=True)
        (pictures / "c" / f"{n}.png").write_bytes(kept.read_bytes())
    with pytest.raises(DataError, match="3 more now"):
        resume()
    assert training.read_config(run.path) == config


def test_captions_are_among_the_files_and_an_older_run_goes_on(tmp_path, pictures, contexts):
    (pictures / "a" / "0.txt").write_text("grey")
    described = described_source(str(pictures))
    assert described["number"] == 102 and described_source("mnist5k") == {}
    (pictures / "a" / "0.txt").write_text("a grey square")
    assert described_source(str(pictures)) != described
    (pictures / "a" / "0.txt").unlink()
    run = training.train(RECIPE, tmp_path / "run", dataset=pictures, log=print)
    config = training.read_config(run.path)
    del config["data"]["files"]
    for path in (run.config, *run.config_copies):
        path.write_bytes(sealed(config))
    (pictures / "a" / "4.png").unlink()
    training.train(RECIPE, run.path, dataset=pictures, resume=True, log=print)
    assert "files" not in training.read_config(run.path)["data"]


LARGE = dataclasses.replace(
    RECIPE, max_train_images=None, diffusion=dataclasses.replace(RECIPE.diffusion, batch_size=128)
)


def test_a_batch_of_the_recipe_is_made_smaller_than_the_folder_and_the_run_keeps_that(
    tmp_path, pictures, contexts
):
    lines, options = [], {"dataset": pictures, "devices": 1}
    run = training.train(LARGE, tmp_path / "run", **options, log=lines.append)
    number = len(contexts[0].train_rows())
    assert 64 < number < 100  # a tenth for validation, and one for testing
    said = [line for line in lines if "batches are smaller" in line]
    assert said == [
        f"there are {number} training images, so batches are smaller: diffusion 64 in place of 128"
    ]
    assert contexts[0].recipe.diffusion.batch_size == 64
    assert training.read_recipe(run.path).diffusion.batch_size == 64
    training.train(LARGE, run.path, **options, resume=True, log=lines.append)
    assert contexts[1].recipe == contexts[0].recipe


def test_batches_that_are_split_stay_multiples_of_their_parts(tmp_path, pictures, contexts):
    split = dataclasses.replace(LARGE, diffusion=dataclasses.replace(LARGE.diffusion, accumulate=3))
    split = dataclasses.replace(split, diffusion=dataclasses.replace(split.diffusion, batch_size=144))
    training.train(split, tmp_path / "run", dataset=pictures, devices=2, log=print)
    assert contexts[0].recipe.diffusion.batch_size == 48 and contexts[0].mesh.size == 2


def test_a_typed_batch_or_one_for_own_data_is_refused_by_the_name_of_its_stage(
    tmp_path, pictures, contexts, monkeypatch, capsys
):
    monkeypatch.setitem(training.RECIPES, "smoke-dit", dataclasses.replace(LARGE, image_size=None))
    words = {"dataset": str(pictures), "image_size": 14, "run_dir": str(tmp_path / "run")}
    said = r"diffusion: batch_size 100 is more than the \d\d training images, \d+ more being held out: give"
    with pytest.raises(InvalidArgumentError, match=rf"{said} at most \d\d, as in --batch-size 64 \("):
        Train("smoke-dit", batch_size=100, **words).run()
    with pytest.raises(InvalidArgumentError, match="diffusion: batch_size 128 is more than"):
        training.train(dataclasses.replace(LARGE, data=str(pictures)), tmp_path / "run", log=print)
    with pytest.raises(UnknownNameError, match="difusion"):
        training.train(LARGE, tmp_path / "run", dataset=pictures, keep_batch_size=["difusion"], log=print)
    assert not (tmp_path / "run").exists() and not contexts
    Train("smoke-dit", **words).run()
    assert contexts[0].recipe.diffusion.batch_size == 64
