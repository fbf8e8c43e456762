"""Pipelines whose weights are split over a mesh draw what they draw on one device."""

import jax
import numpy as np
import pytest
from compilations import COMPILATIONS
from jax.sharding import PartitionSpec
from tiny_models import latent_pipeline, text_parts

from jaxldm import models, pipelines
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def mesh():
    return models.make_mesh(8, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split") / "classes"
    pipelines.save(latent_pipeline(), folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split") / "texts"
    parts = text_parts(tmp_path_factory.mktemp("tokenizer") / "tokenizer")
    pipelines.save(pipelines.Pipeline(STABLE_DIFFUSION, parts), folder)
    return folder


def assert_near(drawn, expected):
    np.testing.assert_allclose(drawn, expected, atol=2e-5 * np.abs(expected).max())


def test_classes(classes, mesh):
    """Five images in batches of one on each of the four parts of the mesh, with callbacks and without."""
    split = pipelines.load(classes, mesh=mesh)
    assert split.mesh is mesh and pipelines.load(classes).mesh is None
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    labels, steps, done = [0, 1, 2, 1, 0], [], []
    expected = pipelines.load(classes)(KEY, labels, **options, devices=jax.devices()[:1])
    assert_near(split(KEY, labels, **options), expected)
    before = COMPILATIONS.count
    split(jax.random.key(4), labels, **options)
    assert COMPILATIONS.count == before
    callbacks = {"on_step": lambda i, x: steps.append((i, x.shape)), "progress": lambda *at: done.append(at)}
    assert_near(split(KEY, labels, **options, **callbacks), expected)
    assert len(done) == split.num_callbacks(5, **options) and len(steps) == len(done)
    assert sum(shape[0] for _, shape in steps) >= 3 * 5


def test_texts(texts, mesh):
    split, whole = pipelines.load(texts, mesh=mesh), pipelines.load(texts)

    def held(pipe):
        leaves = jax.tree.leaves([network.params for network in pipe.networks.values()])
        return {device for leaf in leaves for device in leaf.devices()}

    assert len(held(whole)) == 1 and held(split) == set(jax.devices())
    options = {"num_inference_steps": 2, "num_images_per_prompt": 2}
    assert_near(split(KEY, ["a cat", "dogs"], **options), whole(KEY, ["a cat", "dogs"], **options))


def test_own_rules(texts, mesh):
    pipe = pipelines.load(texts, mesh=mesh, rules=[(".*/to_q/kernel", PartitionSpec())])
    kernels = {
        path[-2].key: leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(pipe.unet.params)
        if path[-1].key == "kernel"
    }
    assert kernels["to_q"] == PartitionSpec("fsdp") and kernels["to_k"] == PartitionSpec("fsdp", "tensor")


def test_mistakes_are_found_before_anything_is_read(texts, mesh, monkeypatch):
    monkeypatch.setattr(pipelines.folders.checkpoints, "load_components", None)
    for options, words in (
        ({"mesh": mesh, "rules": [("unet/kernel", PartitionSpec())]}, "no parameter's path matches"),
        ({"rules": [(".*", PartitionSpec())]}, "give a mesh"),
        ({"mesh": models.make_mesh(8)}, "data=8 alone splits no weights"),
        ({"mesh": models.make_mesh(7, tensor=7)}, "tensor=7 divides no axis"),
        ({"mesh": jax.devices()}, "must be a mesh such as"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            pipelines.load(texts, **options)
