"""The largest batch that fits: the search, the bytes of a compiled step, and a run that asks for it."""

import dataclasses
import sys
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import toy

from jaxldm import host, training
from jaxldm.commands.options import batch_size as size_of_option
from jaxldm.commands.train import Train
from jaxldm.commands.words import check_words
from jaxldm.errors import InvalidArgumentError
from jaxldm.training import batch_size
from jaxldm.training.mesh import batch_sharding, make_mesh
from jaxldm.training.step import compile_train_step

train = sys.modules["jaxldm.training.train"]  # the module, not the function

SMOKE = training.RECIPES["smoke-dit"]
SMALL = {"hidden_size": 8, "depth": 1, "num_heads": 2, "patch_size": 7}
RECIPE = dataclasses.replace(
    SMOKE,
    classifier=None,
    diffusion=dataclasses.replace(SMOKE.diffusion, batch_size=0, overrides=SMALL, epochs=1, sample_every=0),
)


@given(st.integers(1, 300), st.integers(1, 24), st.integers(0, 3000))
def test_the_search_finds_a_multiple_within_an_eighth_of_the_largest(limit, unit, most):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= limit

    largest = min(limit, most) // unit * unit
    if not largest:
        with pytest.raises(InvalidArgumentError, match=f"not even a batch of {unit} fits"):
            batch_size.largest_batch(fits, unit, most)
        return
    found = batch_size.largest_batch(fits, unit, most)
    assert found % unit == 0 and found <= largest and largest - found < max(unit, found / 8 + unit)
    assert len(asked) == len(set(asked)) <= 16


def test_bytes_are_those_of_the_compiled_program_and_nothing_runs(optimized):
    mesh, (state, step) = make_mesh(1), toy(width=32)
    state = jax.eval_shape(lambda: state)
    sizes = {}
    for size in (64, 640):
        batch = {name: jax.ShapeDtypeStruct((size, width), "float32") for name, width in (("x", 6), ("y", 1))}
        sizes[size] = batch_size.bytes_of_step(step, state, batch, mesh)
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh)), batch
        )
        plan = compile_train_step(step, mesh).lower(state, placed).compile().memory_analysis()
        program = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
        assert plan.alias_size_in_bytes > 4 * 6 * 32 * 4  # the state is donated
        copied = batch_size.size_of(batch_size._without_keys(state))
        assert sizes[size] == program - plan.alias_size_in_bytes + copied
    assert sizes[640] - sizes[64] >= 4 * (640 - 64) * (6 + 1 + 32)


def test_a_run_finds_its_batch_size_once_and_goes_on_with_it(tmp_path, monkeypatch):
    """A thousand bytes an example, and 70 % of 70 kB: 49 examples, of which 48 is near enough."""
    shapes, said, trained = [], [], []

    def bytes_of_step(step, state, batch, mesh):
        if not shapes:
            assert jax.eval_shape(step, state, batch)[1]["loss"].shape == ()
        shapes.append({name: column.shape[1:] for name, column in batch.items()})
        return 1000 * len(batch["mean"])

    monkeypatch.setattr(batch_size, "bytes_of_step", bytes_of_step)
    monkeypatch.setattr(host, "memory_bytes", lambda device=None: 70_000)
    monkeypatch.setattr(train, "check_state_fits", lambda *plan: None)
    monkeypatch.setattr(train, "run_job", lambda *job: trained.append(job))
    run = training.train(RECIPE, tmp_path / "run", devices=1, log=said.append, bar=False)
    assert all(shape == {"mean": (28, 28, 1), "label": ()} for shape in shapes)
    assert any("fits into 70% of 70 kB" in line for line in said)
    assert any("batch size 48: an update needs 48 kB of memory" in line for line in said)
    (context, _, job), expected = trained[0], RECIPE.diffusion.epochs * RECIPE.max_train_images // 48
    assert train.training_of(context, "diffusion", job, len(job.data)).plan.num_steps == expected > 1
    monkeypatch.setattr(host, "memory_bytes", lambda device=None: 700_000)
    training.train(RECIPE, run.path, devices=1, resume=True, log=said.append, bar=False)
    assert [job[0].recipe.diffusion.batch_size for job in trained] == [48, 48]


def test_the_option():
    check_words(["smoke", "--batch-size", "auto"], Train, "train")
    assert Train("smoke", batch_size="auto").make_recipe(Path("none")).diffusion.batch_size == 0
    assert size_of_option(8) == 8 and size_of_option(None) is None
    with pytest.raises(InvalidArgumentError, match="--batch-size must be a whole number or auto, got 'many'"):
        check_words(["smoke", "--batch-size", "many"], Train, "train")
    with pytest.raises(InvalidArgumentError, match="--batch-size must be >= 1 or auto, got 0"):
        Train("smoke", batch_size=0).make_recipe(Path("none"))
