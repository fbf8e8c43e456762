"""The measure of the OpenMoji experiment: what it must find, and what it must not."""

import types

import jax
import numpy as np
import pytest

from experiments.captioned_shapes import score as shapes_score
from experiments.openmoji import features, score
from jaxldm import data, models
from jaxldm.commands.terminal import run_script
from jaxldm.data.batches import ArrayRows
from jaxldm.errors import CheckpointError
from jaxldm.models.registry import build
from jaxldm.pipelines.network import Network


class Captioned(ArrayRows):
    def captions(self, rows):
        return [f"number {int(row)}" for row in self.columns["name"][rows]]


@pytest.fixture(scope="module")
def dataset():
    """Blobs of random colour and place on white, as emoji are."""
    random, rows = np.random.default_rng(0), np.arange(64)
    images = np.full((240, 64, 64, 3), 255, np.uint8)
    for image in images:
        (x, y), radius = random.uniform(16, 48, 2), random.uniform(6, 16)
        inside = np.hypot(rows[:, None] - y, rows[None] - x) < radius
        image[inside] = random.integers(0, 256, 3)
    images, names = data.from_uint8(images), np.arange(240)
    bounds = {"train": slice(0, 200), "validation": slice(200, 220), "test": slice(220, 240)}
    parts = {
        split: Captioned({"image": images[part], "label": np.zeros_like(names[part]), "name": names[part]})
        for split, part in bounds.items()
    }
    return data.Dataset("blobs", (64, 64, 3), ("image",), parts)


@pytest.mark.parametrize("module", [score, shapes_score])
def test_without_a_run_it_says_how_to_make_one(module, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "runs" / "absent"
    with pytest.raises(CheckpointError, match=r"jaxldm train [a-z-]+ --run-dir .*absent`"):
        module.main(module.Score(folder))
    monkeypatch.setattr("sys.argv", [f"{module.__file__}", str(folder), "--guidance-scales", "1.5", "3"])
    with pytest.raises(SystemExit) as end:
        run_script(module.main, module.Score)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("score: ") and error.count("\n") == 1


def test_candidates_hold_the_own_picture_first_and_none_twice(dataset):
    found = score.tasks(dataset, asked=30, among=100)
    assert list(found) == ["training names", "held-out names"]
    everything = {
        name: data.to_uint8(image)
        for split in dataset.splits
        for name, image in zip(dataset.captions(split), dataset.arrays(split)[0], strict=True)
    }
    for kind, task in found.items():
        assert len(task.captions) == len(set(task.captions)) == 30 and len(task.candidates) == 100
        held_out = [int(caption.split()[1]) >= 200 for caption in task.captions]
        assert all(held_out) == (kind == "held-out names") and len(set(held_out)) == 1
        for caption, image in zip(task.captions, task.candidates, strict=False):
            np.testing.assert_array_equal(image, everything[caption])
        assert len({image.tobytes() for image in task.candidates}) == 100


def test_blurred_and_noisy_pictures_are_near_their_own_and_others_are_not(dataset):
    task = score.tasks(dataset, asked=40, among=200)["training names"]
    real = task.candidates[:40]
    spoilt = real.astype(float) + np.random.default_rng(1).normal(0, 20, real.shape)
    spoilt = (spoilt + np.roll(spoilt, 2, 1) + np.roll(spoilt, 2, 2)) / 3
    near = score.share_near(np.clip(spoilt, 0, 255).astype(np.uint8), task, features.colour_and_shape)
    other = score.share_near(np.roll(real, 1, axis=0), task, features.colour_and_shape)
    assert score.share_near(real, task, features.colour_and_shape) == 1
    assert near > 0.9 and other < 0.25


def test_a_picture_that_two_names_share_does_not_push_either_back():
    real = {"layout": np.array([[0.0], [0.0], [5.0]])}
    np.testing.assert_array_equal(
        features.ranks({"layout": np.array([[0.1], [4.0]])}, real, np.array([1, 0])), [0, 1]
    )


def test_pictures_through_the_autoencoder_are_its_own_batch_by_batch():
    one_level = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    module = build("sd-vae", block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **one_level)
    params = models.init(module, jax.random.key(0))
    images = np.random.default_rng(1).integers(0, 256, (53, 8, 8, 3), np.uint8)
    found = score.autoencoded(types.SimpleNamespace(autoencoder=Network(module, params)), images)
    latents = models.encode_latents(module, params, data.from_uint8(images[50:]))
    last = np.clip(np.asarray(models.decode_latents(module, params, latents)), -1, 1)
    assert found.shape == images.shape and found.dtype == np.uint8
    np.testing.assert_allclose(data.from_uint8(found[50:]), last, atol=1.01 / 127.5)
