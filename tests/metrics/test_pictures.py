"""Grids hold each image in its place; PNG files are whole or not there."""

import errno
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxldm.errors import DataError, InvalidArgumentError, StorageError
from jaxldm.metrics import image_grid, labelled_grid, nearest_neighbour_panel, save_png


@given(
    number=st.integers(1, 7),
    columns=st.none() | st.integers(1, 9),
    padding=st.integers(0, 3),
    scale=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
)
def test_each_image_is_in_its_cell_and_all_else_is_border(number, columns, padding, scale, channels):
    images = np.random.default_rng(0).integers(100, 255, size=[number, 4, 5, channels]).astype(np.uint8)
    grid = image_grid(images, columns, padding=padding, scale=scale)
    across = min(int(np.ceil(np.sqrt(number))) if columns is None else columns, number)
    rows = -(-number // across)
    assert grid.shape == (
        rows * (4 * scale + padding) + padding,
        across * (5 * scale + padding) + padding,
        channels,
    )
    for k, image in enumerate(images):
        top = padding + k // across * (4 * scale + padding)
        left = padding + k % across * (5 * scale + padding)
        cell = grid[top : top + 4 * scale, left : left + 5 * scale]
        np.testing.assert_array_equal(cell, np.kron(image, np.ones([scale, scale, 1], np.uint8)))
        cell[:] = 0
    assert (grid[grid != 0] == 32).all()


def test_floats_in_minus_one_to_one_become_black_to_white():
    grid = image_grid(np.array([-1.0, 1.0]).reshape(2, 1, 1, 1), columns=2, padding=0)
    assert grid.ravel().tolist() == [0, 255]


@pytest.mark.parametrize("options", [{"columns": 0}, {"scale": 0}, {"padding": -1}])
def test_a_grid_of_nothing_is_refused(options):
    with pytest.raises(InvalidArgumentError):
        image_grid(np.zeros([2, 2, 2, 1]), **options)
    with pytest.raises(DataError, match=r"\[B, H, W, C\]"):
        image_grid(np.zeros([2, 2, 1]))


def test_a_labelled_grid_is_the_grid_with_text_around_it():
    images = np.random.default_rng(0).integers(100, 255, size=[6, 9, 9, 1]).astype(np.uint8)
    grid = image_grid(images, 3)
    title = "a title that is much wider than three small images"
    picture = labelled_grid(
        images, 3, title=title, column_labels=["a", "b", "c"], row_labels=["one", "two"], font_size=12
    )
    dark = (picture == 32).all(axis=2)  # the border around the images, which text on white hardly has
    rows, columns = np.flatnonzero(dark.sum(1) > 20), np.flatnonzero(dark.sum(0) > 12)
    top, left = rows[0], columns[0]
    inside = picture[top : top + grid.shape[0], left : left + grid.shape[1]]
    np.testing.assert_array_equal(inside, np.broadcast_to(grid, inside.shape))
    assert picture.shape[1] > 2 * grid.shape[1], "the title widens the picture"
    edges = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
    assert all((edge == 255).all() for edge in edges), "no text is cut off"
    ink = (picture < 128).any(axis=2)
    assert ink[:top].any() and ink[top:, :left].any(), "labels above and at the left"
    bare = labelled_grid(images, 3)
    assert (bare.shape[0] < picture.shape[0]) and (bare.shape[1] < picture.shape[1])


@pytest.mark.parametrize("labels", [{"column_labels": ["a"]}, {"row_labels": ["a", "b", "c"]}])
def test_labels_must_fit_the_grid(labels):
    with pytest.raises(InvalidArgumentError, match="must have"):
        labelled_grid(np.zeros([4, 3, 3, 3]), 2, **labels)


def test_a_label_is_one_line():
    images = np.zeros([1, 3, 3, 3], np.uint8)
    one, two = ({"column_labels": [label], "row_labels": [label]} for label in ("red star", " red\n\tstar"))
    np.testing.assert_array_equal(labelled_grid(images, 1, **one), labelled_grid(images, 1, **two))


def test_the_panel_shows_the_closest_pairs_first():
    reference = np.stack([np.full([2, 2, 1], level) for level in (-1.0, 0.0, 1.0)])
    images = np.stack([np.full([2, 2, 1], level) for level in (0.4, 0.9)])
    panel = nearest_neighbour_panel(images, reference, scale=1)
    cells = [panel[2 + 4 * row, 2 + 4 * column, 0] for row in range(2) for column in range(2)]
    assert (
        cells == image_grid(np.array([0.9, 1.0, 0.4, 0.0]).reshape(4, 1, 1, 1), 4, padding=0).ravel().tolist()
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_holds_the_very_pixels(tmp_path, channels):
    picture = np.random.default_rng(0).integers(0, 256, size=[6, 5, channels]).astype(np.uint8)
    save_png(tmp_path / "new" / "picture.png", picture)
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "new" / "picture.png")).reshape(6, 5, -1), picture
    )


@pytest.mark.parametrize(
    "picture", [np.zeros([4, 4, 1]), np.zeros([4, 4], np.uint8), np.zeros([4, 4, 2], np.uint8)]
)
def test_what_is_no_picture_is_refused(tmp_path, picture):
    with pytest.raises(DataError, match=r"uint8 \[H, W, C\]"):
        save_png(tmp_path / "picture.png", picture)


def test_a_full_disk_keeps_the_older_picture_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    save_png(path, np.zeros([4, 4, 1], np.uint8))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        save_png(path, np.ones([4, 4, 1], np.uint8))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["picture.png"]


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        save_png(tmp_path / "file" / "picture.png", np.zeros([4, 4, 1], np.uint8))
