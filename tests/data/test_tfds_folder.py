"""A data set that TFDS has prepared, by its folder: without TensorFlow and what made it."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxldm import data
from jaxldm.data.tfds_folder import prepared_folder
from jaxldm.errors import DataError, InvalidArgumentError, UnknownNameError


class TinyCaptioned(tfds.core.GeneratorBasedBuilder):
    """Forty grey squares with classes and captions, in two configs."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="small"), tfds.core.BuilderConfig(name="large"))

    def _info(self):
        features = {
            "picture": tfds.features.Image(shape=(None, None, 3)),
            "kind": tfds.features.ClassLabel(names=["dark", "light"]),
            "text": tfds.features.Text(),
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, license="CC0, by nobody")

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        side = 8 if self.builder_config.name == "small" else 16
        for i in range(40):
            file = io.BytesIO()  # as bytes, an Image feature is stored without TensorFlow
            Image.fromarray(np.full((side, side, 3), 6 * i, np.uint8)).save(file, format="PNG")
            yield i, {"picture": file.getvalue(), "kind": int(i >= 20), "text": f"grey {i}"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of the data set, `<config>/1.0.0` in it."""
    root = tmp_path_factory.mktemp("data")
    for config in ("small", "large"):
        builder = TinyCaptioned(config=config, data_dir=root, file_format="array_record")
        builder.download_and_prepare()
    return root / "tiny_captioned"


@pytest.fixture
def copy(prepared, tmp_path):
    """The folder of one version, to break."""
    return shutil.copytree(prepared / "small" / "1.0.0", tmp_path / "any name" / "1.0.0")


def test_it_is_read_whole_from_the_version_and_from_the_folders_above(prepared):
    for folder in (prepared / "small" / "1.0.0", prepared / "small"):
        dataset = data.load(str(folder), image_size=8)
        assert dataset.name == "tiny_captioned/small" and dataset.image_shape == (8, 8, 3)
        assert dataset.class_names == ("dark", "light") and dataset.license == "CC0, by nobody"
        rows = {split: len(dataset.rows(split)) for split in dataset.splits}
        assert rows == {"train": 32, "validation": 4, "test": 4}
        levels, texts = [], []
        for split in dataset.splits:
            images, labels = dataset.arrays(split)
            level = data.to_uint8(images[:, 3, 3, 0])
            np.testing.assert_array_equal(labels, level >= 120)
            levels.extend(level.tolist())
            texts += dataset.captions(split)
        assert sorted(levels) == [6 * i for i in range(40)]
        assert texts == [f"grey {level // 6}" for level in levels]
    with pytest.raises(InvalidArgumentError, match="differ in size: give image_size"):
        data.load(str(prepared / "large"))


def test_of_several_versions_the_newest_is_read(copy):
    newer = copy.with_name("1.10.0")
    shutil.copytree(copy, newer)
    shutil.copytree(copy, copy.with_name("1.9.0"))
    assert prepared_folder(copy.parent) == newer
    (newer / "dataset_info.json").unlink()  # one that was never finished
    assert prepared_folder(copy.parent).name == "1.9.0"


def test_of_several_configs_one_has_to_be_given(prepared):
    with pytest.raises(DataError, match=r"holds 2 data sets of TFDS, .*large.*; .*small.*: give the folder"):
        data.load(str(prepared), image_size=8)


def test_other_folders_are_folders_of_pictures(tmp_path):
    """Versions are folders of their own with a description, and a class may be called 1.0.0."""
    for label in ("1.0.0", "b"):
        (tmp_path / label).mkdir()
        for n in range(6):
            Image.fromarray(np.full((8, 8, 3), n, np.uint8)).save(tmp_path / label / f"{n}.png")
    assert prepared_folder(tmp_path) is None and prepared_folder(tmp_path / "nowhere") is None
    assert data.load(str(tmp_path)).class_names == ("1.0.0", "b")


def test_neither_tensorflow_nor_the_builder_is_needed(prepared):
    program = f"""if True:
        import sys
        from jaxldm import data
        images, _ = data.load({str(prepared / "small")!r}, image_size=8).arrays("test")
        print(len(images), {{"tensorflow", "torch"}} & set(sys.modules))
    """
    environment = {**os.environ, "JAXLDM_DATA_DIR": "/nowhere", "TFDS_DATA_DIR": "/nowhere"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["4", "set()"], result.stderr


def test_what_is_damaged_is_one_line_with_the_folder(copy):
    def complaint():
        with pytest.raises(DataError) as caught:
            data.load(str(copy), image_size=8).arrays("train")
        text = str(caught.value)
        assert str(copy) in text and "\n" not in text and len(text) < 500
        return text

    (shard,) = copy.glob("*train.array_record*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert "prepare it again" in complaint()
    shard.write_bytes(whole)
    description = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(description | {"fileFormat": "tfrecord"}))
    assert "cannot be read at random: prepare it again" in complaint()
    (copy / "dataset_info.json").write_text("{")
    assert "cannot open" in complaint()
    (copy / "dataset_info.json").write_text(json.dumps(description))
    (copy / "features.json").unlink()
    assert "cannot open" in complaint()


@pytest.mark.parametrize("harm", ["absent", "empty", "cut", "a text", "a folder", "fewer", "more"])
def test_shards_are_opened_and_counted_before_any_record_is_read(copy, harm):
    (shard,) = copy.glob("*train.array_record*")
    whole = shard.read_bytes()
    if harm in ("fewer", "more"):
        described = json.loads((copy / "dataset_info.json").read_text())
        described["splits"][0]["shardLengths"] = ["30" if harm == "fewer" else "50"]
        (copy / "dataset_info.json").write_text(json.dumps(described))
    else:
        shard.unlink()
    if harm == "a folder":
        shard.mkdir()
    elif harm in ("empty", "cut", "a text"):
        shard.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "a text": b"hello"}[harm])
    with pytest.raises(DataError, match="prepare it again") as caught:
        data.load(str(copy), image_size=8)
    assert str(shard) in str(caught.value)


def test_a_data_set_without_images_to_train_on_says_what_it_needs(copy):
    described = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(described | {"splits": []}))
    with pytest.raises(DataError, match="no split 'train', only none: prepare it with one"):
        data.load(str(copy), image_size=8)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnist5k/x", "^the dataset mnist5k has no configs: give mnist5k in place of 'mnist5k/x'$"),
        ("mnist5k:9.9.9", r"^unknown version of mnist5k '9\.9\.9': choose one of 1\.0\.0$"),
        ("emnist/digit", "^unknown config of emnist 'digit': choose one of .*; did you mean 'digits'"),
    ],
)
def test_a_config_or_version_that_there_is_not(tmp_path, name, words):
    with pytest.raises((InvalidArgumentError, UnknownNameError), match=words):
        data.load(name, data_dir=tmp_path)
    assert not any(tmp_path.iterdir())


def test_buckets_are_refused(prepared):
    with pytest.raises(InvalidArgumentError, match="has a data set of TFDS"):
        data.load(str(prepared / "small"), buckets=data.Buckets(image_size=8, multiple=4, max_aspect=2))
