"""The table of students: every row has a recipe that can be trained, and the teacher's figures come out."""

import dataclasses

import pytest

from experiments.few_steps import digits, judge
from jaxldm.training import check_recipe, make_mesh


@pytest.fixture
def options(random_run, tmp_path):
    return digits.Digits(random_run("smoke"), tmp_path / "out", students=(), num_images=20, quick=True)


def test_every_row_has_a_recipe_that_can_be_trained(options):
    recipes = {name: digits.recipe_of(options, name) for name in digits.STUDENTS}
    assert len({str(recipe.to_dict()) for recipe in recipes.values()}) == len(recipes)
    dataset = recipes["lcm"].load_data()
    for recipe in recipes.values():
        few = recipe.diffusion.few_steps
        assert few.guidance_scale in (None, digits.RANGE, (1.0, 1.0)) or not few.takes_scale
        check_recipe(dataclasses.replace(recipe, max_train_images=64), dataset, make_mesh(1))


def test_the_teachers_rows(options, monkeypatch, capsys):
    monkeypatch.setattr(digits, "TEACHER_STEPS", (1, 2))
    monkeypatch.setattr(digits, "STRAIGHTNESS_STEPS", 3)
    digits.main(options)
    out = options.output_dir / "quick"
    table = (out / "digits.md").read_text().splitlines()
    assert len(table) == 2 + 2 + 2 * len(options.guidance_scales)
    assert [row.split("|")[4].strip() for row in table[4:]] == ["1", "2", "2", "4"]  # evaluations
    assert (out / "digits.png").exists()
    rows = (out / "straightness.md").read_text().splitlines()[4:]
    assert [float(row.split("|")[3]) > 0 for row in rows] == [True, True]  # the teacher's, at both scales
    before = table
    digits.main(options)
    assert (out / "digits.md").read_text().splitlines() == before  # nothing is drawn again


def test_the_second_judge_knows_real_digits(random_run):
    from jaxldm import data

    dataset = data.load("mnist5k")
    assert judge.known(judge.second_judge(dataset), dataset) > 0.7  # by a fraction of the digits
