"""Batches are pure in the step and visit every example once in an epoch."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm.data import ArrayRows, Batches, map_batches
from jaxldm.errors import DataError, InvalidArgumentError

NUMBER = 13


def make(batch_size, seed=0, **options):
    columns = {"image": np.arange(NUMBER * 4.0).reshape(NUMBER, 2, 2, 1), "label": np.arange(NUMBER)}
    return Batches(columns, batch_size, jax.random.key(seed), **options)


@given(batch_size=st.integers(1, NUMBER), epoch=st.integers(0, 3), seed=st.integers(0, 2**31 - 1))
def test_an_epoch_visits_no_example_twice_and_leaves_out_less_than_a_batch(batch_size, epoch, seed):
    batches = make(batch_size, seed)
    steps = range(epoch * len(batches), (epoch + 1) * len(batches))
    seen = np.concatenate([batches[step]["label"] for step in steps])
    assert len(np.unique(seen)) == len(seen) > NUMBER - batch_size


@given(steps=st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_a_batch_depends_on_the_step_alone_whatever_was_read_before(steps):
    walked = make(4)
    for step in steps:
        walked[step]
    for name, column in make(4)[steps[-1]].items():
        np.testing.assert_array_equal(walked[steps[-1]][name], column)


def test_rows_stay_together_and_epochs_and_keys_differ():
    batches = make(NUMBER)
    first, second, other = batches[0], batches[1], make(NUMBER, seed=1)[0]
    for batch in (first, second, other):
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], 4 * batch["label"])
    assert (first["label"] != second["label"]).any() and (first["label"] != other["label"]).any()


def test_without_shuffling_the_order_is_that_of_the_rows():
    assert [batch["label"].tolist() for batch in make(4, shuffle=False)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


@pytest.mark.parametrize("batch_size", [0, -1, NUMBER + 1])
def test_a_batch_size_out_of_range_is_refused(batch_size):
    with pytest.raises(InvalidArgumentError, match="between 1 and the number of examples, 13"):
        make(batch_size)


def test_a_negative_step_is_refused():
    with pytest.raises(InvalidArgumentError, match="step"):
        make(4)[-1]


@pytest.mark.parametrize("columns", [{"a": np.zeros(3), "b": np.zeros(4)}, {"a": np.zeros([0, 2])}])
def test_columns_of_different_or_no_length_are_refused(columns):
    with pytest.raises(DataError, match="one row per example"):
        ArrayRows(columns)


@given(number=st.integers(1, 9), batch_size=st.integers(1, 5))
def test_mapping_in_batches_equals_mapping_at_once_and_sees_one_shape(number, batch_size):
    rows = np.random.default_rng(number).normal(size=[number, 3])
    shapes = set()

    def function(batch):
        shapes.add(batch.shape)
        return {"double": 2 * batch, "sum": batch.sum(axis=1)}

    result = map_batches(function, rows, batch_size)
    np.testing.assert_array_equal(result["double"], 2 * rows)
    np.testing.assert_array_equal(result["sum"], rows.sum(axis=1))
    assert len(shapes) == 1


def test_mapping_over_nothing_is_refused():
    with pytest.raises(DataError, match="no rows"):
        map_batches(lambda batch: batch, np.zeros([0, 2]))
