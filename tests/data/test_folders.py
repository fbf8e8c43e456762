"""Folders of people's own pictures: every layout, what is skipped, what is refused."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxldm import data
from jaxldm.data import Batches, Reader, map_batches
from jaxldm.data.batches import RowsView
from jaxldm.data.folders import identity
from jaxldm.errors import DataError, InvalidArgumentError


def picture(number: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """A plain picture whose grey level is its number."""
    content = io.BytesIO()
    Image.fromarray(np.full((*size, 3), number, np.uint8)).save(content, kind)
    return content.getvalue()


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def levels(dataset, split):
    """The numbers of the pictures of a split, and their labels."""
    images, labels = dataset.arrays(split)
    assert (images == images[:, :1, :1, :1]).all()
    return data.to_uint8(images)[:, 0, 0, 0].tolist(), labels.tolist()


def everything(dataset):
    return sorted(number for split in dataset.splits for number in levels(dataset, split)[0])


@pytest.fixture
def classes(tmp_path):
    """Ten cats and ten dogs."""
    return write(tmp_path, {f"{'cats' if n < 10 else 'dogs'}/{n}.png": picture(n) for n in range(20)})


def test_subfolders_are_classes_and_each_picture_is_in_one_split(classes):
    dataset = data.load(str(classes))
    assert dataset.class_names == ("cats", "dogs") and dataset.image_shape == (8, 8, 3)
    assert everything(dataset) == list(range(20)) and dataset.skipped == ()
    sizes = {split: len(dataset.rows(split)) for split in dataset.splits}
    assert sizes == {"train": 16, "validation": 2, "test": 2}
    numbers, labels = levels(dataset, "train")
    assert labels == [int(number >= 10) for number in numbers] and dataset.captions("train") is None


def test_adding_a_file_does_not_reorder_the_others(classes):
    before = [example.name for example in data.load(str(classes)).rows("train").examples]
    write(classes, {"cats/new.png": picture(99)})
    after = [example.name for example in data.load(str(classes)).rows("train").examples]
    kept = [name for name in after if name in before]
    assert kept == [name for name in before if name in kept] and len(kept) >= 13


def test_folders_named_train_and_test_are_splits(tmp_path):
    files = {f"{split}/c{n % 2}/{n}.png": picture(n) for split in ("train", "val", "test") for n in range(8)}
    dataset = data.load(str(write(tmp_path, files)))
    assert {split: len(dataset.rows(split)) for split in dataset.splits} == dict.fromkeys(
        ("train", "validation", "test"), 8
    )
    assert dataset.class_names == ("c0", "c1")


def test_captions_come_from_text_files_and_from_metadata_jsonl(tmp_path):
    text = {f"{n}.jpg": picture(n, kind="JPEG") for n in range(10)} | {
        f"{n}.txt": f" picture\n {n}" for n in range(10)
    }
    lines = "\n".join(json.dumps({"file_name": f"in/{n}.png", "text": f"picture {n}"}) for n in range(10))
    listed = {f"in/{n}.png": picture(n) for n in range(10)} | {"metadata.jsonl": lines}
    # As Windows saves a text, with a mark at its beginning.
    marked = {name: content if name.endswith("g") else "\ufeff" + content for name, content in text.items()}
    every = {"text": text, "listed": listed, "marked": marked}
    every["marked list"] = listed | {"metadata.jsonl": "\ufeff" + lines}
    for name, files in every.items():
        dataset = data.load(str(write(tmp_path / name, files)))
        numbers, labels = levels(dataset, "train")
        assert dataset.captions("train") == [f"picture {number}" for number in numbers]
        assert dataset.class_names == ("image",) and set(labels) == {0}


def test_shards_of_webdataset(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for n in range(6 * shard, 6 * shard + 6):
                parts = {"png": picture(n), "cls": str(n % 3).encode()}
                parts |= (
                    {"txt": f"number {n}".encode()}
                    if shard
                    else {"json": json.dumps({"caption": f"number {n}"}).encode()}
                )
                for suffix, content in parts.items():
                    member = tarfile.TarInfo(f"a.b/{n}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    dataset = data.load(str(tmp_path))
    numbers, labels = levels(dataset, "train")
    assert everything(dataset) == list(range(12)) and labels == [number % 3 for number in numbers]
    assert dataset.captions("train") == [f"number {number}" for number in numbers]


def test_parquet_as_hugging_face_writes_it(tmp_path):
    columns = {
        "image": [{"bytes": picture(n), "path": None} for n in range(12)],
        "text": [f"number {n}" for n in range(12)],
        "label": [n % 2 for n in range(12)],
    }
    features = {"info": {"features": {"label": {"names": ["even", "odd"], "_type": "ClassLabel"}}}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=5)
    dataset = data.load(str(tmp_path))
    numbers, labels = levels(dataset, "train")
    assert everything(dataset) == list(range(12)) and labels == [number % 2 for number in numbers]
    assert dataset.class_names == ("even", "odd")
    assert dataset.captions("train") == [f"number {number}" for number in numbers]


def test_what_cannot_be_used_is_skipped_and_listed(classes):
    write(classes, {"cats/broken.png": picture(50)[:40], "dogs/tiny.png": picture(51, (4, 30))})
    dataset = data.load(str(classes), image_size=8)
    assert everything(dataset) == list(range(20))
    reasons = dict(dataset.skipped)
    assert set(reasons) == {"cats/broken.png", "dogs/tiny.png"} and "30x4" in reasons["dogs/tiny.png"]
    write(classes, {"cats/broken.png": b"text"})
    named = dict(data.load(str(classes), image_size=8).skipped)["cats/broken.png"]
    assert named == "cannot be read as a picture: it is none, or of an unknown format"
    lines = data.describe_skipped(dataset.skipped).splitlines()
    assert [json.loads(line)["name"] for line in lines] == [name for name, _ in dataset.skipped]
    write(classes, {"cats/third.png": b"no picture"})
    with pytest.raises(DataError, match=r"3 of the 23 pictures .* more than 10%"):
        data.load(str(classes), image_size=8)
    assert len(data.load_folder(classes, image_size=8, max_skipped=0.2).skipped) == 3


def test_an_animation_is_skipped_and_listed(classes):
    frames, file = [Image.new("L", (8, 8), level) for level in (0, 255)], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    write(classes, {"cats/moving.gif": file.getvalue()})
    dataset = data.load(str(classes), image_size=8)
    assert everything(dataset) == list(range(20))
    [(name, reason)] = dataset.skipped
    with pytest.raises(DataError, match=r"1 of the 1 .* holds several frames"):
        data.load(str(write(classes / "alone", {"moving.gif": file.getvalue()})))
    assert name == "cats/moving.gif" and reason.startswith("holds several frames") and "seek" in reason


def test_a_missing_caption_and_a_missing_file_are_skipped(tmp_path):
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"picture {n}"}) for n in range(30)]
    files = {f"{n}.png": picture(n) for n in range(31)} | {"metadata.jsonl": "\n".join(lines)}
    root = write(tmp_path, files)
    (root / "7.png").unlink()
    assert {name: reason.split(",")[0] for name, reason in data.load(str(root)).skipped} == {
        "30.png": "it has no caption",
        "7.png": "metadata.jsonl names it",
    }


def test_pictures_of_other_sizes_need_a_size_and_are_cut_to_their_centre(tmp_path):
    wide = np.zeros((8, 20, 3), np.uint8)
    wide[:, 6:14] = 200
    content = io.BytesIO()
    Image.fromarray(wide).save(content, "PNG")
    root = write(tmp_path, {f"{n}.png": content.getvalue() for n in range(10)})
    with pytest.raises(InvalidArgumentError, match="image_size"):
        data.load(str(root))
    images, _ = data.load(str(root), image_size=4, pad_to=6).arrays("train")
    assert images.shape == (8, 6, 6, 3)
    assert (data.to_uint8(images)[:, 1:5, 1:5] == 200).all() and (images[:, 0] == -1).all()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no pictures"),
        ({f"{n}.png": picture(n) for n in range(4)}, "at least 10"),
        ({"a.png": picture(1), "b.tar": b"x"}, "mixes"),
        ({"a.tar": b"no shard" * 100}, "a.tar"),
        ({"a.parquet": b"no table"}, "a.parquet"),
        (
            {"a.png": picture(1), "metadata.jsonl": '{"file_name": "../b.png", "text": "b"}'},
            "not in the folder",
        ),
        ({"a.png": picture(1), "metadata.jsonl": '{"text": "b"}'}, "line 1 must be like"),
        ({"a.png": picture(1), "metadata.jsonl": "{"}, "line 1 cannot be read"),
    ],
)
def test_what_is_no_dataset_is_refused_in_one_line(tmp_path, files, words):
    with pytest.raises(DataError, match=words) as caught:
        data.load(str(write(tmp_path, files)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        data.load(str(tmp_path / "absent"))


def test_names_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mnist5k").mkdir()
    assert data.source_name("mine") == str(tmp_path / "mine") == data.source_name(tmp_path / "mine")
    assert data.source_name("mnist5k") == "mnist5k" and data.source_name("emnist/digits") == "emnist/digits"
    assert data.source_name("./mnist5k") == str(tmp_path / "mnist5k")


def test_rows_on_disk_are_read_by_batch_and_ahead(classes):
    import jax

    rows = data.load(str(classes)).rows("train")
    view = RowsView(rows, 12, {"mean": "image"})
    batches = Batches(view, 4, jax.random.key(0))
    ahead = Reader(batches)
    for step in (0, 1, 2, 7, 3):
        np.testing.assert_array_equal(ahead[step]["mean"], batches[step]["mean"])
    assert list(ahead[0]) == ["mean"] and len(ahead) == 3
    means = map_batches(lambda images: images.mean((1, 2, 3)), rows, 5)
    np.testing.assert_allclose(means, rows.take(np.arange(16))["image"][:, 0, 0, 0], atol=1e-6)
    first = identity(rows)
    write(classes, {rows.examples[0].name: picture(200)})
    assert identity(rows) != first
