"""`jaxldm distill`: what is typed, and what is refused before anything is read or trained."""

import re

import jax
import pytest
from command_lines import complaint

from jaxldm import diffusion as D
from jaxldm import models, pipelines
from jaxldm.commands.distill import Distill
from jaxldm.training.few_steps.methods import TAUGHT

SIZES = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 7, "sample_size": 28, "in_channels": 1}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "export"
    module = models.build("tiny-dit", **SIZES, num_classes=10)
    network = pipelines.Network(module, models.init(module, jax.random.key(0)))
    pipelines.save(pipelines.class_to_image(network, D.v(D.VP.named("cosine"))), folder)
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
    names = re.findall(r"^      (\w+)  +\S", Distill.__doc__.partition("Methods:")[2], re.MULTILINE)
    assert names == list(TAUGHT)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--method is missing"),
        (["--method", "lcn"], "did you mean 'lcm'"),
        (["--method", "mean_flow"], "method"),
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


def test_the_teachers_own_folder_is_no_place_for_the_student(capsys, teacher):
    assert "the teacher's own folder" in complaint(
        capsys, "distill", teacher, "--method", "lcm", "--run-dir", teacher
    )
