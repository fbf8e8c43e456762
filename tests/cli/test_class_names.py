"""Names of classes on the command line: those of a run's data."""

import json
from types import SimpleNamespace

import pytest

from jaxldm.commands.class_names import describe_classes, with_class_names


def model(num_classes, class_names=()):
    replace = lambda class_names: model(num_classes, class_names)  # noqa: E731
    return SimpleNamespace(num_classes=num_classes, class_names=class_names, replace=replace)


def test_a_model_has_the_names_of_its_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"class_names": ["bars", "rings"]}}))
    assert with_class_names(model(2), tmp_path).class_names == ("bars", "rings")
    assert with_class_names(model(2, ("a", "b")), tmp_path).class_names == ("a", "b")
    for other in (model(3), model(None)):
        assert with_class_names(other, tmp_path).class_names == ()


@pytest.mark.parametrize("text", [None, "{", "[]", '{"data": {}}', '{"data": {"class_names": [1, 2]}}'])
def test_a_model_without_names_stays_as_it_is(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert with_class_names(model(2), tmp_path).class_names == ()


@pytest.mark.parametrize(
    ("pipe", "said"),
    [
        (model(None), "none"),
        (model(3), "0 to 2"),
        (model(3, ("0", "1", "2")), "0 to 2"),
        (model(3, ("bars", "rings", "dots")), "0 to 2: bars, rings, dots"),
        (
            model(30, tuple(f"n{n}" for n in range(30))),
            "0 to 29: n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, ..., n29",
        ),
    ],
)
def test_names_are_shown_where_they_say_more_than_numbers(pipe, said):
    assert describe_classes(pipe) == said
