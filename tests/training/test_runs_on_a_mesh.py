"""Whole runs on data 2 x fsdp 2 x tensor 2: no array of a state or of a loaded model is whole on a device."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest
from finetuned import FEW, write_model, write_pictures
from jax.sharding import PartitionSpec

from jaxldm import checkpoints, models, pipelines, training
from jaxldm import diffusion as D
from jaxldm.training.mesh import state_shardings

pytestmark = pytest.mark.usefixtures("compile_once", "shapes_once")


def mesh_of_eight():
    return training.make_mesh(8, fsdp=2, tensor=2)


@pytest.fixture
def seen(monkeypatch):
    """What `fit` is given and how often a tree is gathered on the host, of each run."""
    found = {"whole": [], "gathered": 0}
    train = importlib.import_module("jaxldm.training.train")
    fit, on_host = train.fit, train.on_host

    def noted(state, *options, mesh, **others):
        placed = jax.tree.map(lambda leaf, where: leaf.sharding == where, state, state_shardings(mesh, state))
        wrong = jax.tree_util.tree_leaves_with_path(placed)
        if mesh.size > 1:
            found["whole"] += [jax.tree_util.keystr(path) for path, right in wrong if not right]
        return fit(state, *options, mesh=mesh, **others)

    def counted(tree):
        found["gathered"] += 1
        return on_host(tree)

    monkeypatch.setattr(train, "fit", noted)
    monkeypatch.setattr(train, "on_host", counted)
    return found


def losses(run, stage):
    return training.read_log(run.stage(stage).log)["loss"]


def test_a_run_of_two_stages_begins_in_shards_and_previews_from_them(tmp_path, seen):
    smoke = training.RECIPES["smoke"]
    stage = {"epochs": 1, "batch_size": 16, "sample_every": 1}
    encoder = {"block_out_channels": (4, 4, 4), "latent_channels": 2, "norm_num_groups": 2}
    network = {"hidden_size": 8, "depth": 1, "num_heads": 2, "patch_size": 7}
    recipe = dataclasses.replace(
        smoke,
        name="two-stages",
        max_train_images=64,
        autoencoder=dataclasses.replace(smoke.autoencoder, overrides=encoder, **stage),
        diffusion=dataclasses.replace(
            smoke.diffusion, preset="tiny-dit", overrides=network, sample_steps=2, **stage
        ),
        classifier=None,
    )
    options = {"log": lambda line: None, "bar": False}
    split = training.train(recipe, tmp_path / "split", mesh=mesh_of_eight(), **options)
    assert seen == {"whole": [], "gathered": 2}  # the two finished networks
    one = training.train(recipe, tmp_path / "one", devices=1, **options)
    for name in ("autoencoder", "diffusion"):
        np.testing.assert_allclose(losses(split, name), losses(one, name), rtol=2e-5)
    for name in ("autoencoder/reconstructions.png", "diffusion/samples/step-000004.png"):
        assert (split.path / name).exists() and (one.path / name).exists()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


METHODS = {"lora": {"rank": 4, "targets": ["*"]}, "full": {}, "freeze": {"freeze": ["conv_in/*"]}}


@pytest.mark.parametrize("method", METHODS)
def test_a_fine_tuning_loads_its_model_in_shards(tmp_path, seen, monkeypatch, source, pictures, method):
    loaded, load = [], pipelines.load

    def noted(*given, **named):
        loaded.append(load(*given, **named))
        return loaded[-1]

    monkeypatch.setattr(pipelines, "load", noted)
    few = {**FEW, "batch_size": 4, "sample_every": 2, "sample_steps": 1, **METHODS[method]}
    recipe = training.finetune_recipe(source, pictures, method, **few)
    run = {
        name: training.train(recipe, tmp_path / name, mesh=mesh, log=lambda line: None, bar=False)
        for name, mesh in (("split", mesh_of_eight()), ("one", training.make_mesh(1)))
    }
    assert seen["whole"] == [] and loaded[0].mesh == mesh_of_eight() and loaded[1].mesh is None
    place = models.sharding_of(mesh_of_eight())
    kernel = loaded[0].denoiser.params["conv_in"]["kernel"]
    assert kernel.sharding == place(("conv_in", "kernel"), kernel.shape)
    split, one = (losses(each, "finetune") for each in run.values())
    np.testing.assert_allclose(split[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(split, one, rtol=2e-3)  # Adam's first steps make much of small gradients
    assert list((run["split"].path / "finetune" / "samples").glob("*.png"))


def test_a_student_and_its_critic_begin_as_a_teacher_in_shards(tmp_path, seen, monkeypatch):
    sizes = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 7}
    module = models.build("tiny-dit", **sizes, sample_size=28, in_channels=1, num_classes=10)
    network = pipelines.Network(module, models.init(module, jax.random.key(0)))
    pipelines.save(pipelines.class_to_image(network, D.v(D.VP.named("cosine"))), tmp_path / "teacher")
    loaded, load = [], checkpoints.load

    def noted(*given, sharding=None, **named):
        found = load(*given, sharding=sharding, **named)
        if sharding is not None:
            loaded.append(found[1]["blocks_0"]["mlp"]["fc1"]["kernel"].sharding.spec)
        return found

    monkeypatch.setattr(checkpoints, "load", noted)
    options = {"dataset": "mnist5k", "epochs": 2, "batch_size": 32, "num_steps": 2, "save_every": 1}
    recipe = training.distill_recipe(tmp_path / "teacher", "dmd", **options)
    recipe = dataclasses.replace(
        recipe,
        max_train_images=64,
        diffusion=dataclasses.replace(recipe.diffusion, sample_every=1),
    )
    options = {"log": lambda line: None, "bar": False}
    split = training.train(recipe, tmp_path / "split", mesh=mesh_of_eight(), **options)
    assert loaded == [PartitionSpec("fsdp", "tensor")] * 2 and seen == {"whole": [], "gathered": 1}
    one = training.train(recipe, tmp_path / "one", devices=1, **options)
    assert len(loaded) == 2
    split, one = (losses(run, "diffusion") for run in (split, one))
    np.testing.assert_allclose(split[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(split, one, rtol=2e-3)
