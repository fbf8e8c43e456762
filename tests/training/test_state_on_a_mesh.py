"""A transformer trained on data 2 x fsdp 2 x tensor 2: the losses of one device, and less on each."""

import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxldm import models, training
from jaxldm.errors import InvalidArgumentError
from jaxldm.training import mesh as mesh_module
from jaxldm.training.beginning import begin_on, creation
from jaxldm.training.mesh import bytes_per_device, numbers_per_device, place_state, state_shardings
from jaxldm.training.stages import check_state_fits
from jaxldm.training.state import create_train_state
from jaxldm.training.step import make_train_step

ADAM = training.optimizer(1e-2, 2, 8, weight_decay=1e-2)
SPLIT = dict(fsdp=2, tensor=2)


@functools.cache
def network():
    return models.build("tiny-dit", hidden_size=16, depth=1, num_heads=2, patch_size=7, learn_sigma=False)


def loss(params, state, batch, key):
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    output = models.network(network())(params, x, batch["t"], batch["label"])
    error = output - batch["x"] + 0.1 * state.frozen["blocks_0"]["mlp"]["fc1"]["kernel"][0, 0]
    return jnp.mean(error**2), {}


STEP = make_train_step(loss, ADAM, 0.9)


@functools.cache
def params():
    return models.init(network(), jax.random.key(0))


def begin():
    return create_train_state(jax.random.key(1), params(), ADAM, frozen=params())


class Pictures:
    """Two batches of eight."""

    def __len__(self):
        return 2

    def __getitem__(self, step):
        numbers = np.random.default_rng(step)
        return {
            "x": numbers.normal(size=(8, 28, 28, 1)).astype(np.float32),
            "t": numbers.uniform(size=8).astype(np.float32),
            "label": numbers.integers(0, 10, 8).astype(np.int32),
        }


def fit(folder, mesh, state=None, **options):
    plan, options = training.Plan(6, save_every=2), {"log": lambda line: None, **options}
    return training.fit(
        begin() if state is None else state, STEP, Pictures(), plan, folder, mesh=mesh, bar=False, **options
    )


def losses(folder):
    return training.read_log(folder / "log.csv")["loss"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, compile_once):
    """{name: (mesh, folder, state)} of a run of six updates on one device, and on eight."""
    found = {}
    for name, mesh in (("one", training.make_mesh(1)), ("eight", training.make_mesh(8, **SPLIT))):
        folder = tmp_path_factory.mktemp(name)
        found[name] = mesh, folder, fit(folder, mesh)
    return found


def test_every_array_of_the_state_lies_where_its_parameter_lies():
    mesh = training.make_mesh(8, **SPLIT)
    state = state_shardings(mesh, begin())
    expected = {
        ("attn", "qkv", "kernel"): P("fsdp", "tensor"),
        ("attn", "proj", "kernel"): P("tensor", "fsdp"),
        ("mlp", "fc1", "kernel"): P("fsdp", "tensor"),
        ("mlp", "fc2", "kernel"): P("tensor", "fsdp"),
        ("mlp", "fc2", "bias"): P(),
    }
    for tree in (state.params, state.opt_state.mu, state.opt_state.nu, state.ema_params, state.frozen):
        for (layer, name, kind), spec in expected.items():
            assert tree["blocks_0"][layer][name][kind].spec == spec, (layer, name, kind)
    assert state.key.spec == state.step.spec == state.opt_state.count.spec == P()


def test_data_2_fsdp_2_tensor_2_has_the_losses_of_one_device(runs):
    (_, one, expected), (_, eight, state) = runs["one"], runs["eight"]
    np.testing.assert_allclose(losses(eight), losses(one), rtol=2e-5)
    expected, found = (jax.device_get(each.params) for each in (expected, state))
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=2e-4)
    kernel = state.params["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.spec == P("fsdp", "tensor") and len(kernel.sharding.device_set) == 8


def test_bytes_of_a_device_shrink_as_the_rules_say():
    state = begin()
    counts = {
        name: models.sharding.count_by_rule(training.make_mesh(8, **layout), params())
        for name, layout in (("whole", {}), ("split", SPLIT))
    }
    trees = 5 * 4  # params, two moments, the average, what is frozen; of four bytes
    for name, layout in (("whole", {}), ("split", SPLIT)):
        mesh = training.make_mesh(8, **layout)
        held = bytes_per_device(jax.device_put(state, state_shardings(mesh, state)))
        assert held == trees * sum(rule.per_device for rule in counts[name]) + 2 * 4, name
    whole, split = (sum(rule.per_device for rule in counts[name]) for name in ("whole", "split"))
    assert split < 0.35 * whole


@pytest.mark.parametrize(("first", "second"), [("one", "eight"), ("eight", "one")])
def test_a_checkpoint_of_one_mesh_goes_on_on_another(tmp_path, runs, first, second):
    shutil.copytree(runs[first][1], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    said = []
    begun = begin()
    fit(tmp_path, runs[second][0], resume=True, log=said.append, state=begun)
    deleted = [leaf.is_deleted() for leaf in jax.tree.leaves(begun)]
    assert set(deleted) == {second == "eight"}  # its memory is free for the state of the checkpoint
    assert said[0] == "resuming from the checkpoint of step 4"
    np.testing.assert_allclose(losses(tmp_path), losses(runs["one"][1]), rtol=2e-5)


def drawn():
    """Parameters, and what is frozen, drawn anew."""
    return models.init(network(), jax.random.key(0)), models.init(network(), jax.random.key(2))


def create(key, params, frozen):
    return create_train_state(key, params, ADAM, frozen=frozen)


def test_a_state_begins_in_its_shards_with_the_numbers_of_one_device():
    mesh = training.make_mesh(8, **SPLIT)
    state = begin_on(mesh, drawn, create, jax.random.key(1))
    placed = jax.tree.map(lambda leaf, where: leaf.sharding == where, state, state_shardings(mesh, state))
    assert all(jax.tree.leaves(placed))
    shards = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params)]
    assert sum(shards) < 0.35 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    whole = begin_on(training.make_mesh(1), drawn, create, jax.random.key(1))
    data = lambda state: state.replace(key=jax.random.key_data(state.key))  # noqa: E731
    chex.assert_trees_all_close(jax.device_get(data(state)), jax.device_get(data(whole)), rtol=3e-7)


def test_no_device_holds_more_than_its_part_while_a_state_is_created():
    mesh = training.make_mesh(8, **SPLIT)
    given = place_state(mesh, (jax.random.key(1), *drawn()))
    plan = creation(mesh, create, given).lower(*given).compile().memory_analysis()
    held = bytes_per_device(begin_on(mesh, drawn, create, jax.random.key(1)))
    whole = bytes_per_device(begin())
    assert held < 0.35 * whole
    assert plan.output_size_in_bytes + plan.temp_size_in_bytes < 1.1 * held


def test_a_state_that_is_not_split_is_created_as_it_is():
    for mesh in (None, training.make_mesh(1), training.make_mesh(8)):
        state = begin_on(mesh, drawn, create, jax.random.key(1))
        assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(state))


def test_memory_is_that_of_the_shards_and_data_divides_nothing(monkeypatch):
    monkeypatch.setattr(mesh_module, "on_processor", lambda mesh: False)  # as of accelerators
    recipe = training.RECIPES["mini-ldm"].diffusion
    for layout in (SPLIT, {}, {"fsdp": 8}, {"tensor": 4}):
        mesh = training.make_mesh(8, **layout)
        numbers = numbers_per_device(mesh, models.shapes(network()))
        assert 4 * numbers == bytes_per_device(place_state(mesh, params())), layout
        trees = 4 if recipe.ema_decay else 3
        for spare, fits in ((0, True), (-1, False)):
            monkeypatch.setattr("jaxldm.host.memory_bytes", lambda *_: 4 * trees * numbers + spare)  # noqa: B023
            if fits:
                check_state_fits(recipe, network(), mesh)
                continue
            with pytest.raises(InvalidArgumentError, match="take a smaller preset"):
                check_state_fits(recipe, network(), mesh)
    assert numbers_per_device(training.make_mesh(8), params()) == models.count_params(network())


def test_the_devices_of_a_processor_share_its_memory():
    assert numbers_per_device(training.make_mesh(8, fsdp=8), params()) == models.count_params(network())
