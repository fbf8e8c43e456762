"""What `save_samples` leaves on the disk, also when the disk is full."""

import errno

import numpy as np
import pytest
from PIL import Image

from jaxldm.errors import DataError, StorageError
from jaxldm.pipelines import check_output_folder, columns_for, images, save_samples


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def random_images(count, channels=1, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 4, 6, channels)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_files_hold_the_images(tmp_path, channels):
    drawn, labels = random_images(5, channels), np.array([3, 7, 3, 7, 3])
    save_samples(tmp_path / "new" / "out", drawn, labels, columns=2)
    saved = np.load(tmp_path / "new" / "out" / "samples.npz")
    assert saved["images"].dtype == np.uint8 and saved["images"].shape == (5, 4, 6, channels)
    np.testing.assert_allclose(saved["images"] / 127.5 - 1, drawn, atol=0.5 / 127.5 + 1e-6)
    assert np.issubdtype(saved["labels"].dtype, np.integer)
    np.testing.assert_array_equal(saved["labels"], labels)
    files = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert files == sorted(
        ["grid.png", "samples.npz", *(f"image-{k:05d}-class-{labels[k]}.png" for k in range(5))]
    )
    for k in range(5):
        picture = pixels_of(tmp_path / "new" / "out" / f"image-{k:05d}-class-{labels[k]}.png")
        np.testing.assert_array_equal(picture.reshape(4, 6, channels), saved["images"][k])
    assert pixels_of(tmp_path / "new" / "out" / "grid.png").shape[:2] == (3 * 6 + 2, 2 * 8 + 2)


def test_without_classes_the_labels_are_minus_one(tmp_path):
    save_samples(tmp_path, random_images(2))
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["labels"], [-1, -1])
    assert (tmp_path / "image-00001.png").exists()


def test_a_second_call_replaces_the_pictures_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "image-of-me.png").write_text("mine")
    save_samples(tmp_path, random_images(5), np.arange(5))
    save_samples(tmp_path, random_images(2, seed=1), np.array([7, 8]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grid.png",
        "image-00000-class-7.png",
        "image-00001-class-8.png",
        "image-of-me.png",
        "notes.txt",
        "samples.npz",
    ]


@pytest.mark.parametrize("broken", ["os.fsync", "jaxldm.files._write", "jaxldm.files._exchange"])
def test_a_full_disk_leaves_the_earlier_images_whole(tmp_path, monkeypatch, broken):
    save_samples(tmp_path, random_images(3), np.arange(3))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(StorageError, match=r"disk is full|No space"):
        save_samples(tmp_path, random_images(3, seed=1), np.arange(3))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nan_is_refused_before_anything_is_written(tmp_path):
    drawn = random_images(2)
    drawn[1, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        save_samples(tmp_path / "out", drawn)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("a file")
    for folder in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(StorageError, match="is a file"):
            check_output_folder(folder)
    assert check_output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b" and not (tmp_path / "a").exists()


@pytest.mark.parametrize("num_images", [1, 2, 5, 16, 64, 100])
@pytest.mark.parametrize("num_labels", [1, 2, 3, 10])
def test_a_column_of_the_grid_is_one_class(num_images, num_labels):
    columns = columns_for(num_images, num_labels)
    assert 1 <= columns <= max(num_images, 1)
    if num_labels <= columns:
        assert columns % num_labels == 0
    assert images.columns_for(64, 2) == 8
