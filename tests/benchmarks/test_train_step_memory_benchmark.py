"""The benchmark of a training step's memory: what is planned, and its table."""

import jax
import pytest
from small_networks import build

from experiments.benchmarks import train_step_memory
from jaxldm import models


def test_the_planned_state_is_whole_and_the_table_compares_with_the_step_that_keeps_all():
    module = models.build("dit-s-8", depth=1, hidden_size=16, num_heads=2, num_classes=4, sample_size=8)
    found = train_step_memory.planned(module, "blocks", 2)
    params = sum(leaf.size for leaf in jax.tree.leaves(models.shapes(module)))
    assert found["state"] > 4 * 4 * params  # weights, two moments, average
    kept = {"batch_size": 2, "policy": "off", "state": found["state"], "temporary": 4 * found["temporary"]}
    rows = [kept, {"batch_size": 2, "policy": "blocks", **found}]
    last = train_step_memory.table(rows).splitlines()[-1].split(" | ")
    assert last[:2] == ["| 2", "blocks"] and last[-1] == "25% |"
    assert train_step_memory.TrainStepMemory().preset in models.PRESETS


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_networks_of_texts_are_planned_as_well(name):
    """With all that they are called with; computing the blocks again needs less."""
    module, *_ = build(name)
    kept, again = (train_step_memory.planned(module, policy, 2) for policy in ("off", "blocks"))
    assert kept["state"] == again["state"] and again["temporary"] < kept["temporary"]
