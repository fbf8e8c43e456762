"""Models that draw in few steps: the defaults of a call, and what it refuses before anything is compiled."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import models, pipelines, schedulers
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.few_steps import FewSteps
from jaxldm.schedulers import GridRule

V, KEY = D.v(D.VP.named("cosine")), jax.random.key(0)
LCM = schedulers.to_config(V, GridRule(spacing="lcm", original_steps=50))
INPUT = FewSteps(method="lcm", solver="lcm", guidance="input", guidance_scale=(1.5, 4.0))
INSIDE = FewSteps(method="lcm", solver="lcm", guidance="inside", guidance_scale=(3.0, 3.0))
MADE_FOR = FewSteps(method="progressive", default_steps=2, only_steps=(2,), guidance="inside")


def student(few, scheduler=None):
    sizes = {"hidden_size": 8, "depth": 1, "num_heads": 1, "patch_size": 4, "sample_size": 8}
    inputs = ("guidance_scale",) if few.guidance == "input" else ()
    module = models.build("tiny-dit", **sizes, in_channels=1, num_classes=3, scalar_inputs=inputs)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: 0.3 * rng.standard_normal(spec.shape, np.float32), models.shapes(module)
    )
    pipe = pipelines.class_to_image(pipelines.Network(module, params), V)
    pipe = pipe if scheduler is None else pipe.replace(scheduler=scheduler)
    return dataclasses.replace(pipe, few_steps=few)


@pytest.mark.parametrize(
    ("few", "options", "words"),
    [
        (INPUT, {"guidance_scale": 1.0}, "guidance scales from 1.5 to 4, got 1: take one of these"),
        (INPUT, {"guidance_scale": 4.5}, "guidance scales from 1.5 to 4, got 4.5: take one of these"),
        (INPUT, {"num_inference_steps": 51}, "ask for 1 to 50 steps"),
        (INSIDE, {"guidance_scale": 4.0}, "guidance of scale 3 is inside this lcm student"),
        (MADE_FOR, {"num_inference_steps": 4}, "made for 2 steps, not for 4"),
        (MADE_FOR, {"timesteps": [999]}, "made for 2 steps, not for 1"),
    ],
)
def test_what_a_student_was_not_made_for_is_refused_before_its_network_is_asked(
    few, options, words, monkeypatch
):
    pipe = student(few, LCM if few.solver == "lcm" else None)

    def asked(*arguments, **named):
        raise AssertionError("the network is traced")

    monkeypatch.setattr(type(pipe.denoiser.module), "__call__", asked)
    with pytest.raises(InvalidArgumentError, match=words):
        pipe(KEY, [1], **options)
    with pytest.raises(InvalidArgumentError, match="the network is traced"):
        pipe(KEY, [1])


def test_negative_labels_of_a_student_with_guidance_inside_are_ignored_with_a_word():
    for few in (INSIDE, INPUT):
        pipe = student(few, LCM)
        with pytest.warns(UserWarning, match="negative class is ignored: guidance is inside this lcm"):
            drawn = pipe(KEY, [1], negative_labels=2, num_inference_steps=1)
        np.testing.assert_array_equal(drawn, pipe(KEY, [1], num_inference_steps=1))


@pytest.mark.parametrize(
    ("few", "this", "instead"),
    [
        (INSIDE, "this lcm student", "prune its teacher, and distil that"),
        (FewSteps(method="drifting"), "this drifting model", "prune a model of many steps"),
    ],
)
def test_what_needs_many_steps_refuses_a_model_of_few_by_its_name(few, this, instead):
    pipe, images = student(few), np.zeros((1, 8, 8, 1), np.float32)
    with pytest.raises(InvalidArgumentError, match=f"{this} draws in few steps, .* a model of many steps"):
        pipelines.invert(pipe, images, [1])
    with pytest.raises(InvalidArgumentError, match=f"{this} has another loss .*: {instead}"):
        pipelines.unit_importance(pipe, KEY, images, [1])


def test_negative_labels_are_ignored_with_the_name_of_the_model():
    pipe = student(dataclasses.replace(INSIDE, method="mean_flow", solver="ddim"))
    with pytest.warns(UserWarning, match="guidance is inside this mean_flow model"):
        pipe(KEY, [1], negative_labels=2, num_inference_steps=1)


def test_a_rescaling_of_guidance_that_is_inside_is_ignored_with_a_word():
    pipe = student(INSIDE, LCM)
    with pytest.warns(UserWarning, match="guidance_rescale is ignored: guidance is inside this lcm student"):
        drawn = pipe(KEY, [1], guidance_rescale=0.7, num_inference_steps=1)
    np.testing.assert_array_equal(drawn, pipe(KEY, [1], num_inference_steps=1))


def test_a_student_of_as_many_steps_as_its_teacher_takes_the_default_of_the_family():
    own = student(dataclasses.replace(INPUT, method="guidance", solver="ddim", default_steps=None))
    teacher = dataclasses.replace(own, few_steps=None)
    assert own.default_steps() == teacher.default_steps() == 50
    assert student(INSIDE, LCM).default_steps() == 4 and student(MADE_FOR).default_steps() == 2
    with pytest.raises(InvalidArgumentError, match="steps must be from 1"):
        FewSteps(method="lcm", default_steps=0)
