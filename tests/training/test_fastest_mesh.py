"""On which devices of a processor a network trains where nobody has chosen, and what an update holds."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from two_stages import two_stages

from jaxldm import models, training
from jaxldm.training.mesh import fastest_mesh, state_shardings
from jaxldm.training.step import compile_train_step

QUIET = {"log": lambda line: None, "bar": False}


def shapes_of(stage, recipe="mini-ldm"):
    train = importlib.import_module("jaxldm.training.train")
    module = train.task_of(training.RECIPES[recipe], stage).build(training.RECIPES[recipe], (28, 28, 1), 10)
    return models.shapes(module)


@pytest.mark.parametrize(
    ("recipe", "stage", "devices"),
    [
        ("mini-ldm", "autoencoder", 8),
        ("mini-ldm", "diffusion", 8),
        ("mini-ldm", "classifier", 8),
        ("mini-ldm-dit", "diffusion", 1),
        ("tiny-dit", "diffusion", 1),
        ("masked-digits", "masked_tokens", 8),
    ],
)
def test_transformers_train_on_one_device_of_a_processor_and_convolutions_on_all(recipe, stage, devices):
    mesh = training.make_mesh(8)
    found = fastest_mesh(mesh, shapes_of(stage, recipe))
    assert found.size == devices and (devices == 1 or found is mesh)


def test_a_mesh_that_splits_the_state_stays_as_it_is():
    mesh = training.make_mesh(8, fsdp=2, tensor=2)
    assert fastest_mesh(mesh, shapes_of("diffusion", "tiny-dit")) is mesh


def test_an_adapter_trains_where_the_network_under_it_does():
    adapter, mesh = {"down": np.zeros((64, 4)), "up": np.zeros((4, 64))}, training.make_mesh(8)
    assert fastest_mesh(mesh, adapter).size == 1
    assert fastest_mesh(mesh, adapter, shapes_of("diffusion")) is mesh


class Ones:
    def __len__(self):
        return 1

    def __getitem__(self, step):
        return {"x": np.ones((8, 4), np.float32)}


def update_of(params):
    loss = lambda params, state, batch, key: (sum(jnp.sum(p**2) for p in jax.tree.leaves(params)), {})  # noqa: E731
    adam = training.optimizer(1e-3, 0, 100)
    return training.make_train_step(loss, adam, 0.9), training.create_train_state(
        jax.random.key(0), params, adam
    )


@pytest.mark.parametrize(("shape", "devices"), [((8, 8), 1), ((3, 3, 8, 8), 8)])
def test_fit_without_a_mesh_takes_the_fastest(tmp_path, shape, devices):
    step, state = update_of({"kernel": jnp.ones(shape)})
    state = training.fit(state, step, Ones(), training.Plan(2), tmp_path, **QUIET)
    assert len(state.params["kernel"].sharding.device_set) == devices


@pytest.mark.usefixtures("compile_once", "shapes_once")
def test_a_run_trains_each_stage_on_the_devices_that_it_is_fastest_on(tmp_path, monkeypatch):
    train, sizes = importlib.import_module("jaxldm.training.train"), {}
    fit = train.fit

    def noted(*given, mesh, name, **named):
        sizes[name] = mesh.size
        return fit(*given, mesh=mesh, name=name, **named)

    monkeypatch.setattr(train, "fit", noted)
    network = {"hidden_size": 64, "depth": 1, "num_heads": 2, "patch_size": 1}
    recipe = two_stages()
    recipe = dataclasses.replace(recipe, diffusion=dataclasses.replace(recipe.diffusion, overrides=network))
    training.train(recipe, tmp_path / "free", **QUIET)
    assert sizes == {"autoencoder": 8, "diffusion": 1}
    training.train(recipe, tmp_path / "chosen", devices=2, **QUIET)
    assert sizes == {"autoencoder": 2, "diffusion": 2}


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="XLA of earlier releases holds all squares, then sums them"
)
def test_an_update_holds_no_second_state():
    """Chosen elementwise, the old and the new state were in memory together: 8 bytes a parameter."""
    mesh = training.make_mesh(1)
    step, state = update_of({name: jnp.ones((256, 256)) for name in "abcdefgh"})
    state = jax.device_put(state, state_shardings(mesh, state))
    plan = compile_train_step(step, mesh).lower(state, Ones()[0]).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 5 * models.param_count(state.params)
