"""The parts of `jaxldm inspect` that choose and cut: no network is trained and none is called."""

import json
import types

import numpy as np
import pytest
import tiny_models

from jaxldm import pipelines
from jaxldm.commands import inspect_checkpoints as checkpoints
from jaxldm.commands import inspect_figures as figures
from jaxldm.commands import inspect_sections as sections
from jaxldm.commands import inspect_subject as subjects
from jaxldm.commands.inspect import Inspect, facts
from jaxldm.data import Dataset, shapes
from jaxldm.errors import InvalidArgumentError, UnknownNameError


def test_words_beyond_the_tokens_that_are_read_are_left_out():
    offsets = [(0, 0), (0, 1), (2, 5), (6, 8), (8, 10), (0, 0)]  # start, a, red, ci, rc, end
    encoded = types.SimpleNamespace(offsets=offsets)
    tokenizer = types.SimpleNamespace(backend=types.SimpleNamespace(encode=lambda text: encoded))
    assert subjects.words_of(tokenizer, "a red circ") == (("a", (1,)), ("red", (2,)), ("circ", (3, 4)))
    assert subjects.words_of(tokenizer, "a red circ", 4) == (("a", (1,)), ("red", (2,)), ("circ", (3,)))
    assert subjects.words_of(tokenizer, "a red circ", 3) == (("a", (1,)), ("red", (2,)))
    assert subjects.words_of(None, "a red circ") == ()


@pytest.mark.parametrize(("number", "shown"), [(3, 3), (20, 20), (36, 10)])
def test_classes_are_as_many_as_colours_can_tell_apart(number, shown):
    labels = np.tile(np.arange(number), 2)
    nothing = np.zeros((len(labels), 1, 1, 1), np.float32)
    names = tuple(map(str, range(number)))
    subject = subjects.Subject(None, nothing, nothing, labels, names, {}, {}, "images")
    rows = sections.rows_of_few_classes(subject)
    assert len(set(labels[rows])) == shown and len(rows) == 2 * shown
    sentence = sections.classes_left_out(subject, rows)
    assert sentence == (" Shown are 10 of 36 classes, so that colours are distinct." * (shown < number))
    chosen = labels[subjects.chosen_rows(subject, ())].tolist()
    assert chosen == ([0, 12, 24] if number == 36 else [0, 1, 2])


def test_classes_may_be_named(monkeypatch, tmp_path):
    """As for `jaxldm sample`: by number, and by a name of the run's data or of the folder."""
    names = ["bars", "rings, circles", "dots"]
    (tmp_path / "config.json").write_text(json.dumps({"data": {"class_names": names}}))
    nothing = np.zeros((6, 1, 1, 1), np.float32)

    def of_run(options, pipe):
        return subjects.Subject(pipe, nothing, nothing, np.arange(6) // 2, tuple(names), {}, {}, "images")

    monkeypatch.setattr(pipelines, "kind_of", lambda folder: "run")
    monkeypatch.setattr(pipelines, "load", lambda folder, **options: tiny_models.latent_pipeline())
    monkeypatch.setattr(subjects, "is_run_of_captions", lambda folder: False)
    monkeypatch.setattr(subjects, "_of_run", of_run)
    subject = subjects.load_subject(Inspect(folder=str(tmp_path)))
    assert subjects.chosen_rows(subject, ("dots", "circles", "0")) == [4, 2, 0]
    with pytest.raises(UnknownNameError, match="class 'crosses'"):
        subjects.chosen_rows(subject, ("crosses",))
    with pytest.raises(InvalidArgumentError, match="--class-labels 3: there are images of class 0, 1, 2"):
        subjects.chosen_rows(subject, ("3",))
    unnamed = subject._replace(pipe=tiny_models.latent_pipeline())
    with pytest.raises(InvalidArgumentError, match="nobody named the classes of this model: give 'bars'"):
        subjects.chosen_rows(unnamed, ("bars",))


def test_the_name_of_a_layer_stays_beside_its_row():
    name = "down_blocks_1.attentions_0.transformer_blocks_0.attn1"
    lines = figures.in_lines(name).split("\n")
    assert "".join(lines) == name and max(map(len, lines)) <= figures.LINE
    assert figures.in_lines("blocks_2.attn") == "blocks_2.attn"


def test_large_images_are_compared_by_the_means_of_their_blocks():
    random = np.random.default_rng(0)
    small, large = random.uniform(-1, 1, (2, 8, 6, 3)), random.uniform(-1, 1, (1, 70, 64, 3))
    np.testing.assert_allclose(checkpoints.pixel_rows(small), small.reshape(2, -1), rtol=1e-6)
    rows = checkpoints.pixel_rows(large)
    assert rows.shape == (1, 23 * 21 * 3)
    np.testing.assert_allclose(rows[0, :3], large[0, :3, :3].mean((0, 1)), rtol=1e-5)


def test_the_share_of_shapes_that_show_what_the_caption_says():
    shown = shapes.draw_attributes(7, np.arange(8))
    images = shapes.render(7, np.arange(8), shown, 32) / 127.5 - 1
    captions = [shapes.caption(row, left_out=["size"]) for row in np.stack(shown, axis=1).tolist()]
    drawn = checkpoints.Drawn(1, images, np.zeros(8, np.int32), tuple(captions))
    assert checkpoints.share_as_asked(drawn) == 1
    wrong = drawn._replace(captions=("a large star", *captions[1:4], *["a cross"] * 4))
    right = sum(row == shapes.SHAPES.index("cross") for row in shown.shape[4:])
    first = shown.shape[0] == shapes.SHAPES.index("star") and shown.size[0] == 1
    assert checkpoints.share_as_asked(wrong) == (first + 3 + right) / 8


@pytest.mark.parametrize("terms", ["by nobody, CC BY-SA 4.0", ""])
def test_the_terms_of_the_pictures_are_among_the_facts(terms):
    """Those of a run are test images; what a model drew is nobody's."""
    dataset = Dataset("some", (8, 8, 1), ("a",), {}, license=terms)
    nothing = np.zeros((1, 8, 8, 1), np.float32)
    subject = subjects.Subject(
        tiny_models.latent_pipeline(), nothing, nothing, np.zeros(1, np.int32), ("a",), {}, {}, "images"
    )
    found = dict(facts(subject._replace(dataset=dataset)))
    assert found.get("pictures", "") == terms and found["looked at"] == "1 images"
    assert "pictures" not in dict(facts(subject))
