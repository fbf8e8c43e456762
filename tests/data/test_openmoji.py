"""OpenMoji: groups, captions and pictures as the packages have them, and a split that holds out names."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import data
from jaxldm.data import openmoji
from jaxldm.errors import MissingDependencyError, UnknownNameError

FEW = ("1F418", "1F44B", "1F44B-1F3FF", "1F600", "1F1F3-1F1F4", "1F1E7-1F1FB", "2764-FE0F", "0031-FE0F-20E3")
NAMES = ("elephant", "waving hand", "waving hand dark skin tone", "grinning face", "Norway", "Bouvet Island")


@pytest.fixture(scope="module")
def emoji():
    """Every emoji with a name."""
    return openmoji.find_emoji()


@pytest.fixture(scope="module")
def few(emoji):
    """Every fortieth of them, and some that are known."""
    return [entry for n, entry in enumerate(emoji) if n % 40 == 0 or entry.path.stem in FEW]


def test_nearly_four_thousand_have_a_name_of_their_own_and_every_group_has_some(emoji):
    names = [entry.name for entry in emoji]
    assert len(set(names)) == len(names) and 3900 <= len(names) <= 4100
    groups = collections.Counter(openmoji.GROUPS[entry.group] for entry in emoji)
    assert set(groups) == set(openmoji.GROUPS) and groups["flags"] == 270
    assert set(NAMES) <= set(names) and not any(":" in name or "_" in name for name in names)


@pytest.mark.parametrize(
    ("character", "group"),
    {"😀": 0, "👋": 1, "🐘": 3, "🍕": 4, "🚂": 5, "⚽": 6, "💡": 7, "❤": 0, "♻": 8, "🇳": 9}.items(),
)
def test_groups_are_those_of_unicode(character, group):
    assert openmoji.group_of(ord(character)) == group


def test_a_tenth_is_held_out_by_names_without_their_tones_of_skin(emoji):
    splits = openmoji.split_names([entry.name for entry in emoji], [str(n) for n in range(len(emoji))])
    share = 1 - splits.count("train") / len(splits)
    assert 0.08 < share < 0.12 and min(splits.count("validation"), splits.count("test")) > 150
    sides = collections.defaultdict(set)
    for entry, split in zip(emoji, splits, strict=True):
        if entry.name.endswith(" skin tone"):
            sides[entry.name.split(" light skin")[0].split(" dark skin")[0].split(" medium")[0]].add(split)
    assert len(sides) > 300 and all(len(found) == 1 for found in sides.values())


@given(st.lists(st.tuples(st.sampled_from("abcdefghijklmnop"), st.sampled_from("012345")), max_size=24))
def test_pictures_that_are_linked_by_names_or_pixels_are_in_one_split_whatever_their_order(pairs):
    names = [
        f"{name} {tone} skin tone" for (name, _), tone in zip(pairs, ["light", "dark"] * 12, strict=False)
    ]
    found = openmoji.split_names(names, [picture for _, picture in pairs])
    by_key = collections.defaultdict(set)
    for (name, picture), split in zip(pairs, found, strict=True):
        by_key[name].add(split)
        by_key["pixels", picture].add(split)
    assert all(len(splits) == 1 for splits in by_key.values())
    assert openmoji.split_names(names[::-1], [picture for _, picture in pairs[::-1]]) == found[::-1]


def test_pictures_are_drawn_on_white_and_halved_by_means(few):
    entry = next(entry for entry in few if entry.name == "Norway")
    image = openmoji.render(entry.path)
    assert image.shape == (128, 128, 3) and (image[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    red, green, blue = image[image.shape[0] // 2 - 20, 40].astype(int)
    assert red > 150 and max(green, blue) < 100  # the red field of its flag
    small = openmoji.halved(image)
    mean = image.reshape(64, 2, 64, 2, 3).astype(float).mean((1, 3))
    assert np.abs(small - mean).max() <= 0.5


@pytest.mark.parametrize("side", ["64", "128"])
def test_the_dataset_has_captions_groups_and_terms_and_no_held_out_picture_in_training(
    few, tmp_path, monkeypatch, side
):
    monkeypatch.setattr(openmoji, "find_emoji", lambda: few)
    name = "openmoji" if side == "64" else "openmoji/128"
    dataset = data.load(name, data_dir=tmp_path)
    assert dataset.image_shape == (int(side), int(side), 3) and dataset.class_names == openmoji.GROUPS
    assert "CC BY-SA 4.0" in dataset.license
    found = {}
    for split in dataset.splits:
        images, labels = dataset.arrays(split)
        for caption, image, label in zip(dataset.captions(split), data.to_uint8(images), labels, strict=True):
            assert caption not in found
            found[caption] = (split, image, openmoji.GROUPS[label])
    assert set(found) == {entry.name for entry in few} and found["elephant"][2] == "animals and nature"
    assert found["Norway"][0] == found["Bouvet Island"][0]  # they are one picture
    assert found["waving hand"][0] == found["waving hand dark skin tone"][0]
    trained = {image.tobytes() for split, image, _ in found.values() if split == "train"}
    assert not any(image.tobytes() in trained for split, image, _ in found.values() if split != "train")


def test_other_sides_and_missing_packages_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="64, 128"):
        data.load("openmoji/32", data_dir=tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(MissingDependencyError, match=r"resvg-py.*jaxldm\[openmoji\]"):
        data.load("openmoji", data_dir=tmp_path)
