"""Training in aspect-ratio buckets: each size is compiled once; latents are of each picture's own size."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from jaxldm import checkpoints, data, models, training
from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError
from jaxldm.training import diffusion
from jaxldm.training.autoencoder import build_autoencoder
from jaxldm.training.mesh import make_mesh
from jaxldm.training.runs import RunFolder
from jaxldm.training.stages import Context, of_one_shape
from jaxldm.training.train import batches_of

BUCKETS = data.Buckets(12, 2, max_aspect=2.25)
SMOKE = training.RECIPES["smoke-dit"]
RECIPE = dataclasses.replace(
    SMOKE,
    classifier=None,
    max_train_images=None,
    buckets=BUCKETS,
    diffusion=dataclasses.replace(
        SMOKE.diffusion,
        epochs=3,
        batch_size=8,
        overrides={"hidden_size": 8, "depth": 1, "num_heads": 2, "patch_size": 2},
    ),
)
SIZES = ((30, 30), (20, 44), (44, 20), (31, 24))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four ratios of sides in two classes, and one too small for its bucket."""
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(50):
        path = folder / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((*SIZES[n % 4], 3), 5 * n, np.uint8)).save(path)
    Image.fromarray(np.zeros((9, 16, 3), np.uint8)).save(folder / "a" / "flat.png")
    return folder


def test_a_folder_in_buckets_keeps_the_ratios_of_training_pictures(pictures):
    dataset = data.load(str(pictures), buckets=BUCKETS)
    assert BUCKETS.sizes == ((18, 8), (12, 12), (8, 18)) and dataset.image_shape == (12, 12, 3)
    assert [entry.name for entry in dataset.skipped] == ["a/flat.png"]
    assert "16x9 pixels are fewer than 18x8" in dataset.skipped[0].reason
    rows = dataset.rows("train")
    for bucket, size in enumerate(BUCKETS.sizes):
        members = np.flatnonzero(rows.bucket_of == bucket)
        assert rows.take(members)["image"].shape == (len(members), *size, 3) and len(members) > 3
    assert dataset.arrays("test")[0].shape == (5, 12, 12, 3)


def test_each_size_is_compiled_once_and_no_other(pictures, tmp_path, monkeypatch):
    shapes = []

    def loss(key, network, prediction, x_0, *args, **options):
        shapes.append(x_0.shape)
        return DIFFUSION_LOSS(key, network, prediction, x_0, *args, **options)

    DIFFUSION_LOSS = D.diffusion_loss
    monkeypatch.setattr(D, "diffusion_loss", loss)
    run = training.train(RECIPE, tmp_path / "run", dataset=pictures, log=lambda line: None)
    assert sorted(shapes) == sorted((8, *size, 3) for size in BUCKETS.sizes)
    assert np.isfinite(training.read_log(run.stage("diffusion").log)["loss"]).all()
    assert run.has_model


def test_latents_are_those_of_each_picture_in_its_own_size(pictures, tmp_path):
    smoke = training.RECIPES["smoke-32"]
    overrides = {**smoke.autoencoder.overrides, "block_out_channels": (4, 4, 4), "norm_num_groups": 2}
    recipe = dataclasses.replace(
        smoke,
        pad_to=None,
        max_train_images=None,
        classifier=None,
        buckets=data.Buckets(48, 4, 1.8),
        data=str(pictures),
        autoencoder=dataclasses.replace(smoke.autoencoder, overrides=overrides),
    )
    folder = tmp_path / "large"
    for n in range(20):
        (folder / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        size = ((60, 60), (40, 70))[n % 4 // 2]
        Image.fromarray(np.full((*size, 3), 9 * n, np.uint8)).save(folder / "ab"[n % 2] / f"{n}.png")
    dataset = data.load(str(folder), buckets=recipe.buckets)
    run = RunFolder(tmp_path / "run")
    module = build_autoencoder(recipe, dataset.image_shape)
    params = models.init(module, jax.random.key(0))
    checkpoints.save(run.stage("autoencoder").model, module, params)
    context = Context(recipe, dataset, run, make_mesh(1), log=lambda line: None)
    rows, latents = dataset.rows("train"), diffusion.latent_columns(context)
    assert len(latents) == len(rows) == 16
    batches, in_memory = batches_of(latents, 4, jax.random.key(0))
    assert batches.num_buckets == 2 and not in_memory
    for step in range(4):
        own, batch = batches.row_numbers(step), batches[step]
        expected = models.encode_latents(module, params, rows.take(own)["image"])
        np.testing.assert_allclose(batch["mean"], expected, atol=1e-4)
        np.testing.assert_array_equal(batch["label"], rows.labels[own])
    assert sorted(path.name for path in run.latents.iterdir()) == ["48x48", "36x64"][::-1]
    assert len({image.shape for image in of_one_shape(rows).take(np.arange(3))["image"]}) == 1


def test_what_does_not_fit_buckets_is_refused_before_anything_is_written(pictures, tmp_path):
    odd = dataclasses.replace(RECIPE, buckets=data.Buckets(12, 1, 4.0))
    with pytest.raises(InvalidArgumentError, match="cannot work on images of"):
        training.train(odd, tmp_path / "run", dataset=pictures)
    with pytest.raises(InvalidArgumentError, match="give classifier=None"):
        dataclasses.replace(RECIPE, classifier=training.ClassifierRecipe())
    with pytest.raises(InvalidArgumentError, match="leave image_size and pad_to out"):
        training.train(dataclasses.replace(RECIPE, image_size=16), tmp_path / "run", dataset=pictures)
    with pytest.raises(InvalidArgumentError, match="is a TFDS name"):
        training.train(RECIPE, tmp_path / "run", dataset="mnist5k")
    assert not (tmp_path / "run").exists()
