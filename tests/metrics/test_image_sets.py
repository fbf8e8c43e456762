"""Folders and files of images read batch by batch, and the features of a pass kept on disk."""

import io
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.faults.kill_points import killed, moments
from jaxldm.data import ArrayRows, from_uint8
from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.metrics import extraction, image_sets
from jaxldm.metrics.extraction import FeatureNetwork, extract
from jaxldm.metrics.image_sets import array_set, open_image_set, rows_set
from jaxldm.metrics.pairs import pair_distances
from jaxldm.metrics.resizing import VARIANTS, inception_inputs


def pixels(number, size=(6, 5), channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, [number, *size, channels], dtype=np.uint8)


def write(folder, images, suffix="png"):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
            folder / f"{number:03}.{suffix}"
        )
    return folder


def everything(images, size=3):
    return np.concatenate(list(images.batches(size)))


def test_a_folder_an_npz_file_and_an_array_are_the_same_images(tmp_path):
    images = pixels(7)
    np.savez(tmp_path / "x.npz", arr_0=images, labels=np.arange(7))
    np.savez_compressed(tmp_path / "small.npz", images)
    sets = [open_image_set(write(tmp_path / "folder", images)), array_set(images, "array")]
    sets += [open_image_set(tmp_path / name) for name in ("x.npz", "small.npz")]
    for found in sets:
        assert (found.count, found.size) == (7, (6, 5))
        np.testing.assert_array_equal(everything(found), images)
        assert [len(batch) for batch in found.batches(3)] == [3, 3, 1]
    assert len({found.digest for found in sets}) == 4  # of the files' bytes


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_are_the_images_of_an_array_and_are_read_batch_by_batch(monkeypatch, channels):
    monkeypatch.setattr(image_sets, "AT_ONCE", 4)
    images, taken = pixels(7, channels=channels), []

    class Rows(ArrayRows):
        def take(self, rows):
            taken.append(len(rows))
            return super().take(rows)

    found = rows_set(Rows({"image": from_uint8(images)}), images.shape[1:], "name")
    expected = array_set(images, "name")
    np.testing.assert_array_equal(everything(found), everything(expected))
    assert found._replace(batches=None) == expected._replace(batches=None)
    assert taken == [4, 3, 3, 3, 1]


def test_grey_images_have_three_equal_channels(tmp_path):
    images = pixels(2, channels=1)
    for found in (open_image_set(write(tmp_path / "grey", images)), array_set(images, "array")):
        np.testing.assert_array_equal(everything(found), np.repeat(images, 3, axis=-1))


def test_the_digest_changes_with_a_pixel(tmp_path):
    images = pixels(3)
    before = open_image_set(write(tmp_path / "a", images)).digest
    assert open_image_set(write(tmp_path / "b", images)).digest == before
    images[1, 0, 0, 0] ^= 1
    assert open_image_set(write(tmp_path / "b", images)).digest != before


def test_jpeg_files_are_noticed(tmp_path):
    assert open_image_set(write(tmp_path / "a", pixels(2), "jpg")).lossy
    assert not open_image_set(write(tmp_path / "b", pixels(2))).lossy


def test_mixed_sizes_and_mixed_colours_are_refused(tmp_path):
    write(tmp_path / "a", pixels(2))
    Image.fromarray(pixels(1, (6, 6))[0]).save(tmp_path / "a" / "wide.png")
    with pytest.raises(DataError, match=r"several sizes, 000\.png of 5x6 and wide\.png of 6x6"):
        everything(open_image_set(tmp_path / "a"))
    write(tmp_path / "b", pixels(2))
    Image.fromarray(pixels(1)[0, ..., 0]).save(tmp_path / "b" / "grey.png")
    with pytest.raises(DataError, match=r"mixes grey and coloured pictures.*grey\.png grey"):
        everything(open_image_set(tmp_path / "b"))


def test_what_holds_no_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and no more")
    np.savez(tmp_path / "two.npz", a=pixels(1), b=pixels(1))
    np.savez(tmp_path / "float.npz", a=pixels(1).astype(np.float32))
    np.savez(tmp_path / "none.npz", a=pixels(0))
    np.savez(tmp_path / "object.npz", a=np.array([{}], object))
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": (-5, 4, 4, 3)}
    )
    with zipfile.ZipFile(tmp_path / "less.npz", "w") as archive:
        archive.writestr("a.npy", head.getvalue())
    for name, message in {
        "empty": "has no pictures",
        "text.txt": "neither a folder",
        "bad.npz": "cannot be read",
        "two.npz": "one array of images",
        "float.npz": "uint8",
        "none.npz": "at least one",
        "less.npz": r"at least one, got shape \(-5, 4, 4, 3\)",
        "object.npz": "one array of images",
        "absent": "there are no images",
    }.items():
        with pytest.raises(DataError, match=message):
            open_image_set(tmp_path / name)
    write(tmp_path / "cut", pixels(1))
    (tmp_path / "cut" / "000.png").write_bytes((tmp_path / "cut" / "000.png").read_bytes()[:60])
    with pytest.raises(DataError, match="cannot be read"):
        open_image_set(tmp_path / "cut")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "images", [pixels(1) / 255, pixels(1).astype(int), pixels(1, channels=4), pixels(1, channels=1)]
)
def test_inputs_of_inception_are_made_of_8_bit_colours_alone(variant, images):
    """Numbers in [0, 1] would all be black, and a fourth channel would be taken for a colour."""
    with pytest.raises(InvalidArgumentError, match=r"images must be uint8 \[B, H, W, 3\]"):
        inception_inputs(images, variant)


class Counting:
    """A network of two layers that counts how many images it sees."""

    def __init__(self, sha256="a"):
        self.seen = 0
        self.network = FeatureNetwork(
            "toy", "plain", sha256, ("mean", "twice"), self.prepare, self.apply, 2.0
        )

    def prepare(self, images):
        self.seen += len(images)
        return images.astype(np.float32)

    @staticmethod
    def apply(params, x):
        mean = x.mean((1, 2))
        return {"mean": mean, "twice": params * mean}


def test_features_are_those_of_the_images_and_are_computed_once(tmp_path):
    images = pixels(21)
    toy, progress = Counting(), []
    source = array_set(images, "toy")
    found = extract(source, toy.network, ["mean"], tmp_path, batch_size=8, progress=progress.append)
    np.testing.assert_allclose(found["mean"], images.mean((1, 2)), rtol=1e-5)
    assert sum(progress) == 21 and toy.seen == 24  # the last batch is filled
    extract(source, toy.network, ["mean"], tmp_path)
    assert toy.seen == 24
    both = extract(source, toy.network, ["mean", "twice"], tmp_path)
    np.testing.assert_allclose(both["twice"], 2 * images.mean((1, 2)), rtol=1e-5)
    assert toy.seen > 24  # the missing layer only, in one pass more


def test_other_weights_and_other_images_are_computed_again(tmp_path):
    first, second = Counting("a"), Counting("b")
    extract(array_set(pixels(3), "x"), first.network, ["mean"], tmp_path)
    extract(array_set(pixels(3), "x"), second.network, ["mean"], tmp_path)
    extract(array_set(pixels(3, seed=1), "x"), first.network, ["mean"], tmp_path)
    assert second.seen > 0 and first.seen == 2 * second.seen
    assert len(list(tmp_path.rglob("*.npy"))) == 3


def test_a_network_is_compiled_once_for_all_sets(tmp_path):
    toy, traced = Counting(), []

    def apply(params, x):
        traced.append(x.shape)
        return toy.apply(params, x)

    network = toy.network._replace(apply=apply)
    for seed, count in enumerate((8, 13, 16)):
        extract(array_set(pixels(count, seed=seed), "x"), network, ["mean"], tmp_path, batch_size=8)
    assert len(traced) == 1


def test_networks_are_computed_in_full_float32(tmp_path):
    """Accelerators round the factors of products to 19 or 16 bits unless told otherwise."""
    precisions = []

    def apply(params, *images):
        precisions.append(str(jax.make_jaxpr(lambda x: x @ x.T)(images[0][:, 0, 0])))
        mean = images[0].mean((1, 2, 3))
        return mean if len(images) == 2 else {"mean": mean[:, None]}

    network = Counting().network._replace(apply=apply)
    source = array_set(pixels(3), "x")
    extract(source, network, ["mean"], tmp_path)
    pair_distances(source, source, apply, None)
    assert len(precisions) == 2 and all("HIGHEST" in text for text in precisions)


def test_a_pass_that_fails_leaves_nothing_behind(tmp_path):
    toy = Counting()
    broken = toy.network._replace(params=np.float32(np.nan))
    with pytest.raises(DataError, match="toy gives NaN for x"):
        extract(array_set(pixels(3), "x"), broken, ["twice"], tmp_path)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"x" * 200,
        lambda content: content[:-4] + bytes(4),  # another number, of which nothing but a checksum tells
    ],
)
def test_damaged_features_are_computed_again(tmp_path, damage):
    toy, source = Counting(), array_set(pixels(3), "x")
    whole = np.array(extract(source, toy.network, ["mean"], tmp_path)["mean"])
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(damage(file.read_bytes()))
    found, seen = extract(source, toy.network, ["mean"], tmp_path), toy.seen
    assert np.array_equal(found["mean"], whole) and seen > 3
    extract(source, toy.network, ["mean"], tmp_path)
    assert toy.seen == seen


def test_features_killed_at_any_moment_are_whole_or_absent(tmp_path, monkeypatch):
    toy, source = Counting(), array_set(pixels(3), "x")
    run = lambda x: toy.apply(2.0, x)  # noqa: E731
    monkeypatch.setattr(extraction, "_compiled", lambda *options: run)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    layers = ["mean", "twice"]

    def write(folder):
        return extract(source, toy.network, layers, folder)

    points = moments(tmp_path / "counted", lambda: write(tmp_path / "counted"))
    wanted = {layer: np.array(rows) for layer, rows in write(tmp_path / "counted").items()}
    for at in points:
        folder = tmp_path / str(at)
        folder.mkdir()
        killed(folder, at, lambda folder=folder: write(folder))
        assert all(np.array_equal(rows, wanted[layer]) for layer, rows in write(folder).items())
        names = {path.name for path in folder.rglob("*") if path.is_file()}
        assert names == {"mean.npy", "mean.sum", "twice.npy", "twice.sum"}


def test_pairs_are_compared_one_by_one():
    x, y = pixels(7), pixels(7, seed=1)

    def distance(params, a, b):
        return params * abs(a - b).mean((1, 2, 3))

    found = pair_distances(array_set(x, "x"), array_set(y, "y"), distance, 127.5, batch_size=3)
    np.testing.assert_allclose(found, np.abs(x.astype(float) - y).mean((1, 2, 3)), rtol=1e-5)
    with pytest.raises(DataError, match="x has 7 images of 5x6, y 6 of 5x6"):
        pair_distances(array_set(x, "x"), array_set(y[:6], "y"), lambda *_: None, None)
