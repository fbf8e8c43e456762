"""Whole runs on data 2 x fsdp 2 x tensor 2: no array of a state or of a loaded model is whole on a device."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest
from finetuned import FEW, write_model, write_pictures
from jax.sharding import PartitionSpec
from two_stages import two_stages

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


@pytest.fixture
def note_loads(monkeypatch):
    """`note_loads(module)`: a list of (what it returned, its `sharding`) of each later `module.load`."""

    def note(module):
        loads, load = [], module.load

        def noted(*given, **named):
            loads.append((load(*given, **named), named.get("sharding")))
            return loads[-1][0]

        monkeypatch.setattr(module, "load", noted)
        return loads

    return note


def train(recipe, folder, **where):
    return training.train(recipe, folder, **where, log=lambda line: None, bar=False)


def losses(run, stage):
    return training.read_log(run.stage(stage).log)["loss"]


def test_a_run_of_two_stages_begins_in_shards_and_previews_from_them(tmp_path, seen):
    recipe = two_stages(sample_every=1)
    split = train(recipe, tmp_path / "split", mesh=mesh_of_eight())
    assert seen == {"whole": [], "gathered": 2}  # the two finished networks
    one = train(recipe, tmp_path / "one", devices=1)
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
def test_a_fine_tuning_loads_its_model_in_shards(tmp_path, seen, note_loads, source, pictures, method):
    loads = note_loads(pipelines)
    few = {**FEW, "batch_size": 4, "sample_every": 2, "sample_steps": 1, **METHODS[method]}
    recipe = training.finetune_recipe(source, pictures, method, **few)
    run = {
        name: train(recipe, tmp_path / name, mesh=mesh)
        for name, mesh in (("split", mesh_of_eight()), ("one", training.make_mesh(1)))
    }
    (in_shards, _), (whole, _) = loads
    assert seen["whole"] == [] and in_shards.mesh == mesh_of_eight() and whole.mesh is None
    place = models.sharding_of(mesh_of_eight())
    kernel = in_shards.denoiser.params["conv_in"]["kernel"]
    assert kernel.sharding == place(("conv_in", "kernel"), kernel.shape)
    split, one = (losses(each, "finetune") for each in run.values())
    np.testing.assert_allclose(split[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(split, one, rtol=2e-3)  # Adam's first steps make much of small gradients
    assert list((run["split"].path / "finetune" / "samples").glob("*.png"))


def test_a_student_and_its_critic_begin_as_a_teacher_in_shards(tmp_path, seen, note_loads):
    sizes = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 7}
    module = models.build("tiny-dit", **sizes, sample_size=28, in_channels=1, num_classes=10)
    network = pipelines.Network(module, models.init(module, jax.random.key(0)))
    pipelines.save(pipelines.class_to_image(network, D.v(D.VP.named("cosine"))), tmp_path / "teacher")
    loads = note_loads(checkpoints)
    options = {"dataset": "mnist5k", "epochs": 2, "batch_size": 32, "num_steps": 2, "save_every": 1}
    recipe = training.distill_recipe(tmp_path / "teacher", "dmd", **options)
    recipe = dataclasses.replace(
        recipe,
        max_train_images=64,
        diffusion=dataclasses.replace(recipe.diffusion, sample_every=1),
    )
    split = train(recipe, tmp_path / "split", mesh=mesh_of_eight())
    in_shards = [
        params["blocks_0"]["mlp"]["fc1"]["kernel"].sharding.spec
        for (_, params), sharding in loads
        if sharding is not None
    ]
    assert in_shards == [PartitionSpec("fsdp", "tensor")] * 2 and seen == {"whole": [], "gathered": 1}
    loads.clear()
    one = train(recipe, tmp_path / "one", devices=1)
    assert all(sharding is None for _, sharding in loads)
    split, one = (losses(run, "diffusion") for run in (split, one))
    np.testing.assert_allclose(split[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(split, one, rtol=2e-3)
