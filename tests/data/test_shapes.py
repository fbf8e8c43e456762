"""Captioned shapes: the same everywhere, as their attributes say, and read again from their pixels."""

import numpy as np
import pytest

from jaxldm import data
from jaxldm.data import captioned_shapes, shapes
from jaxldm.errors import DataError, InvalidArgumentError, UnknownNameError
from jaxldm.metrics.shapes import asked_of, read_shapes, shares_as_asked

ALL = shapes.SEEN + tuple(sorted(shapes.HELD_OUT))
NUMBERS = np.arange(1200)


@pytest.fixture(scope="module")
def pictures():
    attributes = shapes.draw_attributes(11, NUMBERS, ALL)
    return attributes, shapes.render(11, NUMBERS, attributes, 32)


def test_twelve_pairs_are_held_out_two_of_each_shape_and_colour():
    assert len(shapes.HELD_OUT) == 12 and len(shapes.SEEN) == 24
    for axis in (0, 1):
        assert sorted(pair[axis] for pair in shapes.HELD_OUT) == sorted(2 * list(range(6)))
    attributes = shapes.draw_attributes(0, np.arange(5000))
    seen = {(int(shape), int(colour)) for shape, colour in zip(*attributes[:2], strict=True)}
    assert seen == set(shapes.SEEN)


def test_random_numbers_are_those_of_splitmix64():
    """Its published first outputs for the seed 1234567, which C prints, too."""
    state, outputs = np.array([1234567], np.uint64), []
    for _ in range(3):
        outputs.append(int(shapes._mix(state)[0]))
        state = state + np.uint64(0x9E3779B97F4A7C15)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_picture_depends_on_its_seed_and_number_alone(pictures):
    attributes, images = pictures
    few = np.array([1100, 3, 700])
    again = shapes.render(11, few, shapes.draw_attributes(11, few, ALL), 32)
    np.testing.assert_array_equal(again, images[few])
    other = shapes.render(12, few, shapes.Attributes(*(values[few] for values in attributes)), 32)
    assert (other != again).any(axis=(1, 2, 3)).all()


def test_coverage_sums_to_the_area_of_the_shape():
    radius, turn = np.array([0.3]), np.array([13.0])
    for shape, area in enumerate(shapes.areas()):
        covered = shapes.coverage(shape, np.array([[0.51, 0.49]]), radius, turn, 256)
        assert covered.mean() == pytest.approx(area * 0.09, rel=2e-3)


def test_attributes_are_read_from_rendered_pictures(pictures):
    attributes, images = pictures
    shares = shares_as_asked(read_shapes(images), attributes._asdict())
    assert shares["all"] >= 0.999, shares


def test_attributes_are_read_at_64_pixels_with_noise_and_a_slight_blur(pictures):
    attributes = shapes.Attributes(*(values[:150] for values in pictures[0]))
    images = shapes.render(11, NUMBERS[:150], attributes, 64)
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 8, images.shape), 0, 255).astype(np.uint8)
    assert shares_as_asked(read_shapes(noisy), attributes._asdict())["all"] >= 0.99
    padded = np.pad(images.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = sum(padded[:, i : i + 64, j : j + 64] for i in range(3) for j in range(3)) / 9
    shares = shares_as_asked(read_shapes(blurred.astype(np.uint8)), attributes._asdict())
    assert shares["all"] >= 0.97


def test_what_shows_no_shape_is_none_of_them(pictures):
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    plain = np.full((2, 32, 32, 3), 30, np.uint8)
    two = np.maximum(pictures[1][:1], 0).copy()
    two[0] = 30
    two[0, 2:9, 2:9], two[0, 20:30, 20:30] = (255, 0, 0), (255, 0, 0)
    for images in (noise, plain, two):
        assert (read_shapes(images).shape == -1).all()
    with pytest.raises(DataError, match="uint8"):
        read_shapes(noise[..., :1])


def test_a_wrong_colour_is_no_right_answer(pictures):
    shape, colour = pictures[0].shape[:150], pictures[0].colour[:150]
    swapped = read_shapes(pictures[1][:150, ..., ::-1])
    red = colour == 0
    assert (swapped.shape == shape).all() and (swapped.colour[red] == 2).all()


def test_captions_say_what_they_do_not_leave_out(pictures):
    attributes, _ = pictures
    texts = shapes.captions(11, NUMBERS, attributes)
    assert texts == shapes.captions(11, NUMBERS, attributes) and len(set(texts)) / len(texts) > 0.3
    shown = [dict(zip(shapes.KINDS, row, strict=True)) for row in np.stack(attributes, axis=1).tolist()]
    assert [asked_of(shapes.caption(list(one.values()))) for one in shown] == shown
    for text, one in zip(texts, shown, strict=True):
        assert asked_of(text).items() <= one.items(), text
        assert "  " not in text and "{" not in text and text == text.strip(" ,") and "a orange" not in text
    shares = {kind: np.mean([kind in asked_of(text) for text in texts]) for kind in ("shape", "colour")}
    assert all(0.92 < share < 0.98 for share in shares.values())


def test_the_dataset_is_prepared_without_network_and_read_with_its_captions(tmp_path, monkeypatch):
    sizes = {"train": (1, 40), "validation": (2, 10), "test": (3, 10), "held_out": (4, 10)}
    monkeypatch.setattr(captioned_shapes, "SPLITS", sizes)
    dataset = data.load("captioned_shapes", data_dir=tmp_path)
    assert dataset.image_shape == (32, 32, 3) and dataset.num_classes == 36
    images, labels = dataset.arrays("train")
    texts = dataset.captions("train")
    assert images.shape == (40, 32, 32, 3) and len(texts) == 40 and dataset.captions("test", 3) is not None
    found = read_shapes(data.to_uint8(images))
    np.testing.assert_array_equal(found.shape * 6 + found.colour, labels)
    for n, text in enumerate(texts):
        assert asked_of(text).items() <= {kind: int(getattr(found, kind)[n]) for kind in shapes.KINDS}.items()
    with pytest.raises(UnknownNameError, match="64"):
        data.load("captioned_shapes/65", data_dir=tmp_path)


def test_errors_name_the_argument():
    with pytest.raises(InvalidArgumentError, match="image_size"):
        shapes.render(0, NUMBERS[:1], shapes.draw_attributes(0, NUMBERS[:1]), 4)
    with pytest.raises(DataError, match="one for each"):
        shapes.render(0, NUMBERS[:2], shapes.draw_attributes(0, NUMBERS[:1]), 32)
