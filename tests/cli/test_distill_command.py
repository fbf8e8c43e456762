"""`jaxldm distill`: what is typed, and what is refused before anything is read or trained."""

import dataclasses
import inspect
import json
import re
import shutil

import jax
import numpy as np
import pytest
from command_lines import complaint
from PIL import Image

from jaxldm import diffusion as D
from jaxldm import models, pipelines
from jaxldm.commands import hints
from jaxldm.commands.adapters import check_adapter_guidance
from jaxldm.commands.distill import Distill
from jaxldm.commands.info import describe, most_steps
from jaxldm.data import load
from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.pipelines.few_steps import FewSteps, entry_of
from jaxldm.training.few_steps.job import few_steps_of, scheduler_of
from jaxldm.training.few_steps.methods import TAUGHT
from jaxldm.training.few_steps.teachers import check_channels
from jaxldm.training.runs import check_run_folder, open_run

SIZES = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 7, "sample_size": 28, "in_channels": 1}


def pipeline(class_names=(), broken=False, prediction=None, **changes):
    module = models.build("tiny-dit", **{**SIZES, "num_classes": 10, **changes})
    params = models.init(module, jax.random.key(0))
    if broken:
        params = jax.tree.map(lambda leaf: leaf * np.nan, params)
    network = pipelines.Network(module, params)
    return pipelines.class_to_image(network, prediction or D.v(D.VP.named("cosine")), class_names=class_names)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "export"
    pipelines.save(pipeline(), folder)
    return folder


def test_the_options_become_the_recipe(teacher, tmp_path):
    command = Distill(
        str(teacher),
        method="progressive",
        num_steps=2,
        guidance_scale=(2.0,),
        options=("start_steps=8",),
        epochs=3,
        dataset="mnist5k",
        seed=5,
    )
    adapter = Distill(str(teacher), method="lcm", rank=4, alpha=2.0, dataset="mnist5k")
    lora = adapter.make_recipe(tmp_path / "none").diffusion.few_steps.lora
    assert (lora.rank, lora.scale, lora.targets) == (4, 0.5, None)
    assert command.out() == teacher.with_name("export-progressive")
    recipe = command.make_recipe(tmp_path / "none")
    few = recipe.diffusion.few_steps
    assert (few.num_steps, few.guidance_scale, few.numbers) == (2, (2.0, 2.0), {"start_steps": 8})
    assert (recipe.diffusion.epochs, recipe.seed, recipe.name) == (3, 5, "export-progressive")


def test_the_help_has_every_method():
    text = inspect.cleandoc(Distill.__doc__)  # Python 3.13 has done so already
    names = re.findall(r"^  (\w+)  +\S", text.partition("Methods:")[2], re.MULTILINE)
    assert names == list(TAUGHT)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--method is missing"),
        (["--method", "lcn"], "did you mean 'lcm'"),
        (["--method", "mean_flow"], "has no teacher: `jaxldm train mini-mean-flow`"),
        (["--method", "guidance", "--options", "huber=1"], "the method guidance has no numbers"),
        (["--method", "cd", "--options", "levels=1"], "levels must be a whole number from 2"),
        (["--method", "dmd", "--options", "critic_updates=9999"], "the 496 updates of this training"),
        (["--method", "reflow", "--options", "pairs=10"], "pairs must be at least one batch, 64"),
        (["--method", "progressive", "--epochs", "1", "--batch-size", "4000"], "divided into 2 rounds"),
        (["--method", "lcm", "--num-steps", "4"], "--num-steps has no effect on lcm"),
        (["--method", "progressive", "--num-steps", "3"], "halves the steps"),
        (["--method", "ect", "--guidance-scale", "3"], "--guidance-scale is not for ect"),
        (["--method", "lcm", "--guidance-scale", "1", "2", "3"], "takes one scale, or the lowest"),
        (["--method", "lcm", "--options", "hubber=1"], "did you mean 'huber'"),
        (["--method", "lcm", "--epochs", "0"], "epochs must be >= 1"),
        (["--method", "lcm", "--alpha", "2"], "--alpha is of an adapter: give its --rank"),
        (["--method", "lcm", "--rank", "0"], "rank must be"),
        (["--method", "dmd", "--rank", "4"], "trains more than one network"),
        (["--method", "lcm", "--rank", "4", "--guidance-scale", "1", "4"], "give one scale"),
        (["--method", "lcm", "--rank", "4", "--targets", "*/to_z", "--quiet"], "no layer is named '*/to_z'"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(capsys, teacher, tmp_path, words, expected):
    out = tmp_path / "out"
    line = complaint(capsys, "distill", teacher, "--dataset", "mnist5k", "--run-dir", out, *words)
    assert expected in line and not out.exists()


def pixels(folder, colours):
    """20 pictures of each class."""
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for number in range(20):
            Image.new("L", (28, 28), colour).save(folder / name / f"{number}.png")
    return folder


def test_images_of_other_classes_than_the_teachers_are_refused(capsys, tmp_path):
    few = pixels(tmp_path / "few", {"a": 0, "b": 255})
    letters = pixels(tmp_path / "letters", dict.fromkeys("abcdefghij", 9))
    named = tmp_path / "named"
    pipelines.save(pipeline(tuple("0123456789"), in_channels=3), named)
    words = ("distill", named, "--method", "lcm", "--run-dir", tmp_path / "out", "--dataset")
    assert "its num_classes is 2, not 10" in complaint(capsys, *words, few)
    three = tmp_path / "three"  # another number than the preset's, which the recipe then has
    pipelines.save(pipeline(in_channels=3, num_classes=3), three)
    line = complaint(capsys, "distill", three, *words[2:], few)
    assert f"{three} draws 3 classes, and few has 2" in line
    line = complaint(capsys, *words, letters)
    assert f"class 0 of {named} is '0', and of letters 'a'" in line and not (tmp_path / "out").exists()


def test_images_of_other_channels_than_those_of_the_autoencoder_are_refused(tmp_path):
    module = models.build("mini-autoencoder", block_out_channels=(8, 8, 8))
    vae = pipelines.Network(module, models.init(module, jax.random.key(0)))
    denoiser = pipeline(in_channels=4, sample_size=7).denoiser
    pipe = pipelines.class_to_image(denoiser, D.v(D.VP.named("cosine")), vae)
    pipelines.save(pipe, tmp_path / "grey")
    colour = load(str(pixels(tmp_path / "colour", dict.fromkeys("abcdefghij", 9))))
    recipe = Distill(str(tmp_path / "grey"), method="ect", dataset="mnist5k").make_recipe(tmp_path / "none")
    check_channels(tmp_path / "grey", recipe, load("mnist5k"))
    with pytest.raises(DataError, match="for images of 1 channel, and those of colour have 3"):
        check_channels(tmp_path / "grey", recipe, colour)


def test_a_teacher_that_is_not_finite_is_refused(capsys, tmp_path):
    pipelines.save(pipeline(broken=True), tmp_path / "broken")
    words = ("--method", "lcm", "--dataset", "mnist5k", "--run-dir", tmp_path / "out")
    assert "holds NaN or infinity" in complaint(capsys, "distill", tmp_path / "broken", *words)


def test_a_run_goes_on_however_its_teacher_is_spelled_and_with_nothing_else(teacher, tmp_path, monkeypatch):
    recipe = Distill(str(teacher), method="cd", dataset="mnist5k").make_recipe(tmp_path / "none")
    open_run(tmp_path / "run", recipe, recipe.load_data(), resume=False, log=print)
    monkeypatch.chdir(teacher.parent)
    for spelled in (str(teacher), f"{teacher}/", teacher.name, f"./{teacher.name}/"):
        for method in (None, "cd"):
            again = Distill(spelled, method=method, run_dir=str(tmp_path / "run"), resume=True)
            assert again.make_recipe(tmp_path / "run") == recipe
    other = Distill(str(teacher), resume=True, dataset="mnist").make_recipe(tmp_path / "run")
    assert other == dataclasses.replace(recipe, data="mnist")  # which `train` refuses
    with pytest.raises(InvalidArgumentError, match="holds a run of the method cd, not of progressive"):
        Distill(str(teacher), method="progressive", resume=True).make_recipe(tmp_path / "run")


def test_a_teacher_named_by_a_relative_path_is_found_from_anywhere_until_it_moves(
    teacher, tmp_path, monkeypatch, capsys
):
    shutil.copytree(teacher, tmp_path / "here" / "teacher")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command = Distill("teacher", method="cd", dataset="mnist5k")
    recipe = command.make_recipe(tmp_path / "none")
    assert recipe.diffusion.few_steps.teacher == str(tmp_path / "here" / "teacher")
    run = open_run(tmp_path / "run", recipe, recipe.load_data(), resume=False, log=print)
    monkeypatch.chdir(tmp_path / "there")
    again = Distill("../here/teacher", resume=True).make_recipe(run.path)
    assert again == recipe and check_run_folder(run.path, again, resume=True)
    # The run of an older version, which kept the path as it was typed.
    few = dataclasses.replace(recipe.diffusion.few_steps, teacher="../here/teacher")
    old = dataclasses.replace(recipe, diffusion=dataclasses.replace(recipe.diffusion, few_steps=few))
    before = open_run(tmp_path / "old", old, recipe.load_data(), resume=False, log=print)
    assert check_run_folder(before.path, recipe, resume=True)
    monkeypatch.chdir(tmp_path)
    given = ("distill", tmp_path / "here" / "teacher", "--resume", "--run-dir")
    assert "a relative path, which leads nowhere from here: cd to" in complaint(capsys, *given, before.path)
    (tmp_path / "here" / "teacher").rename(tmp_path / "moved")
    for word in ("moved", "here/teacher"):
        line = complaint(capsys, "distill", word, *given[2:], run.path)
        assert f"{tmp_path}/here/teacher, is not there any more" in line
        assert line.endswith(f"as in `ln -s NEW {tmp_path}/here/teacher`\n")
    (tmp_path / "here" / "teacher").symlink_to(tmp_path / "moved")
    assert Distill("moved", resume=True).make_recipe(run.path) == recipe


@pytest.mark.parametrize(
    ("method", "options", "rows"),
    [
        ("lcm", {}, ("1 to 50, 4 by default, by the solver lcm", "guidance none")),
        ("lcm", {"guidance_scale": (3.0,)}, ("1 to 50, 4 by default", "guidance of scale 3, inside")),
        ("progressive", {"num_steps": 2}, ("steps 2, by the solver ddim", "guidance none")),
        (
            "guidance",
            {"guidance_scale": (1.0, 7.5)},
            ("1 to 1000, 50 by default, by the solver ddim", "of scales from 1 to 7.5, inside: the network"),
        ),
        ("ect", {}, ("1 to 50, 4 by default", "guidance outside, as of any other model: scale 3 by default")),
    ],
)
def test_info_says_how_a_student_draws(teacher, tmp_path, method, options, rows):
    given = {"guidance_scale": (1.0,)} if method in ("lcm", "progressive") else {}
    command = Distill(str(teacher), method=method, dataset="mnist5k", **given | options)
    recipe = command.make_recipe(tmp_path / "none").diffusion
    inputs = recipe.overrides.get("scalar_inputs", ())
    pipe = pipeline(scalar_inputs=inputs).replace(scheduler=scheduler_of(recipe))
    pipe = dataclasses.replace(pipe, few_steps=few_steps_of(recipe))
    pipelines.save(pipe, tmp_path / "student")
    text = " ".join(describe(str(tmp_path / "student")).split())
    for row in (f"student by {method}, from a teacher named export", *rows):
        assert row in text
    most = most_steps(pipe)
    if "steps 2" not in rows[0]:
        pipe.grid(num_inference_steps=most)
        with pytest.raises(InvalidArgumentError):
            pipe.grid(num_inference_steps=most + 1)


@pytest.mark.parametrize(
    ("method", "prediction", "words"),
    [
        (
            "lcm",
            D.v(D.VP.named("cosine")),
            "--solver lcm --num-inference-steps 4 --spacing lcm --guidance-scale 1",
        ),
        ("ect", D.v(D.VP.named("cosine")), "--solver lcm --num-inference-steps 4 --spacing lcm"),
        ("cd", D.flow(D.Flow()), "--solver lcm --num-inference-steps 4 --guidance-scale 1"),
        ("reflow", D.v(D.VP.named("cosine")), "--solver ddim --num-inference-steps 4 --guidance-scale 1"),
    ],
)
def test_the_hint_of_an_adapter_draws_with_its_teacher(tmp_path, method, prediction, words):
    pipelines.save(pipeline(prediction=prediction), tmp_path / "a teacher")
    given = Distill(str(tmp_path / "a teacher"), method=method, rank=2, dataset="mnist5k")
    recipe = given.make_recipe(tmp_path / "none")
    run = open_run(tmp_path / "run", recipe, recipe.load_data(), resume=False, log=print)
    hint = hints.sample_adapter(run.path)
    assert hint.startswith(f"jaxldm sample '{tmp_path / 'a teacher'}' --class-labels 0 1 --num-images 16")
    assert hint.endswith(f" --lora {run.path} {words}")
    whole = dataclasses.replace(recipe, diffusion=dataclasses.replace(recipe.diffusion, few_steps=None))
    run = open_run(tmp_path / "whole", whole, recipe.load_data(), resume=False, log=print)
    assert hints.sample_adapter(run.path) is None


@pytest.mark.parametrize("name", ["", "pytorch_lora_weights.safetensors"])
def test_guidance_on_top_of_that_inside_of_an_adapter_is_refused(capsys, teacher, tmp_path, name):
    few = FewSteps(method="lcm", solver="lcm", guidance="inside", guidance_scale=(3.0, 3.0))
    index = tmp_path / "model_index.json"
    given = ("sample", teacher, "--lora", tmp_path / name, "--output-dir", tmp_path / "out")
    index.write_text(json.dumps(entry_of(few)))
    for more in ([], ["--guidance-scale", "3"]):
        line = complaint(capsys, *given, *more)
        assert (
            "guidance of scale 3 is inside the adapter of" in line
            and "--guidance-scale 1, and --solver lcm" in line
        )
    assert "LoRA" in complaint(capsys, *given, "--guidance-scale", "1") or name
    for free in ({"guidance_scale": (1.0, 1.0)}, {"guidance": "outside"}):
        index.write_text(json.dumps(entry_of(dataclasses.replace(few, **free))))
        check_adapter_guidance([str(tmp_path)], 3.0)


def test_a_method_in_the_place_of_a_recipe_is_sent_to_distill(capsys, tmp_path):
    for word in ("lcm", "mini-lcm"):
        line = complaint(capsys, "train", word, "--run-dir", tmp_path / "out")
        assert "needs a teacher: jaxldm distill RUN --method lcm" in line


def test_the_teachers_own_folder_is_no_place_for_the_student(capsys, teacher):
    assert "the teacher's own folder" in complaint(
        capsys, "distill", teacher, "--method", "lcm", "--run-dir", teacher
    )
