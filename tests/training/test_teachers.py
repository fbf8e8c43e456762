"""Models that draw in few steps and are no teachers: what their owners are told to take."""

import dataclasses

import jax
import pytest

from jaxldm import diffusion as D
from jaxldm import models, pipelines, training
from jaxldm.errors import CheckpointError
from jaxldm.pipelines.few_steps import FewSteps

SIZES = {"hidden_size": 8, "depth": 1, "num_heads": 1, "patch_size": 7, "sample_size": 28, "in_channels": 1}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """method -> the folder of a model of few steps, of which nobody says the teacher."""
    module = models.build("tiny-dit", **SIZES, num_classes=10)
    network = pipelines.Network(module, models.init(module, jax.random.key(0)))
    pipe = pipelines.class_to_image(network, D.flow(D.Flow()))

    def of(method):
        folder = tmp_path_factory.mktemp("few") / method
        pipelines.save(dataclasses.replace(pipe, few_steps=FewSteps(method=method)), folder)
        return folder

    return of


@pytest.mark.parametrize("method", ["mean_flow", "drifting"])
def test_a_model_that_had_no_teacher_is_none_and_names_none(folder_of, method):
    folder = folder_of(method)
    with pytest.raises(CheckpointError) as caught:
        training.distill_recipe(folder, "cd", dataset="mnist5k")
    assert str(caught.value) == (
        f"{folder} was trained by {method} to draw in few steps itself, and is no teacher: take a diffusion "
        "model, such as the run of mini-ldm"
    )
    with pytest.raises(CheckpointError) as caught:
        training.finetune_recipe(folder, "pictures")
    assert str(caught.value) == (
        f"{folder} is a model of few steps by {method}, which this loss would spoil: fine-tune a diffusion "
        "model, and distil that (jaxldm distill)"
    )


def test_a_student_whose_teacher_is_not_known_had_one(folder_of):
    folder = folder_of("lcm")
    with pytest.raises(CheckpointError, match=r"itself a student, by lcm.* that it was distilled from"):
        training.distill_recipe(folder, "cd", dataset="mnist5k")
    with pytest.raises(CheckpointError, match="fine-tune its teacher, and distil that"):
        training.finetune_recipe(folder, "pictures")
