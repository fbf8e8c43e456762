"""What the owner of a model of few steps is advised to do, by whether its method has a teacher."""

import pytest

from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.few_steps import UNTAUGHT, FewSteps
from jaxldm.training.few_steps.methods import METHODS

INSIDE = {"guidance": "inside", "guidance_scale": (3.0, 3.0)}
INPUT = {"guidance": "input", "guidance_scale": (1.0, 4.0)}
ALONE = {"guidance": "inside"}


def test_the_methods_without_a_teacher_are_those_of_training():
    assert set(UNTAUGHT) == {name for name, method in METHODS.items() if not method.taught}
    assert FewSteps(method="lcm").is_taught and not FewSteps(method="mean_flow").is_taught


@pytest.mark.parametrize("method", METHODS)
def test_only_those_who_have_a_teacher_are_advised_to_distill(method):
    """Every sentence says what to do, and none of a method without a teacher speaks of one."""
    taught = METHODS[method].taught
    sentences = []
    for fields, check in (
        ({"only_steps": (1,), "default_steps": 1}, lambda few: few.check_steps(4)),
        (ALONE, lambda few: few.check_scale(3.0)),
        (INSIDE, lambda few: few.check_scale(4.0)),
        (INPUT, lambda few: few.check_scale(5.0)),
        (INSIDE, lambda few: few.check_scale(3.0, 2.0)),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            check(FewSteps(method=method, **fields))
        sentences.append(str(caught.value))
    assert all("leave" in sentence or "take one of these" in sentence for sentence in sentences)
    assert [("distill" in sentence) for sentence in sentences] == [taught] * 4 + [False]
    assert [("student" in sentence) for sentence in sentences] == [taught] * 5


@pytest.mark.parametrize(
    ("few", "check", "words"),
    [
        (
            FewSteps(method="drifting", only_steps=(1,), default_steps=1, **ALONE),
            lambda few: few.check_steps(4),
            "this drifting model was made for 1 step, not for 4: leave the number out",
        ),
        (
            FewSteps(method="drifting", **ALONE),
            lambda few: few.check_scale(3.0),
            "this drifting model was trained without guidance, and has no null class to guide it by: leave "
            "the guidance scale out",
        ),
        (
            FewSteps(method="mean_flow", **ALONE),
            lambda few: few.check_scale(4.0),
            "this mean_flow model was trained without guidance, and has no null class to guide it by: leave "
            "the guidance scale out, or train one whose FewStepsRecipe has guidance_scale=(4, 4)",
        ),
        (
            FewSteps(method="mean_flow", **INSIDE),
            lambda few: few.check_scale(4.0),
            "guidance of scale 3 is inside this mean_flow model, and more on top would double it: leave the "
            "guidance scale out, or train one whose FewStepsRecipe has guidance_scale=(4, 4)",
        ),
        (
            FewSteps(method="improved_mean_flow", **INPUT),
            lambda few: few.check_scale(5.0),
            "this improved_mean_flow model was trained for guidance scales from 1 to 4, got 5: take one of "
            "these, or train one whose FewStepsRecipe has another guidance_scale",
        ),
        (
            FewSteps(method="lcm", **INSIDE),
            lambda few: few.check_scale(4.0),
            "guidance of scale 3 is inside this lcm student, and more on top would double it: leave the "
            "guidance scale out, or distill with --guidance-scale 4",
        ),
    ],
)
def test_the_sentences(few, check, words):
    with pytest.raises(InvalidArgumentError) as caught:
        check(few)
    assert str(caught.value) == words
