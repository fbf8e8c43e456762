"""Shards: the rows that were computed, in any order; computed again after a kill, damage or another key."""

import errno
import os
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.faults.kill_points import Killed, kill_points
from jaxldm.data import Batches, sharded
from jaxldm.data.shards import rows_per_shard
from jaxldm.errors import DataError, InvalidArgumentError, StorageError

ROWS = 23


def rows_of(start, stop, offset=0.0):
    numbers = np.arange(start, stop)
    return {
        "mean": (
            np.arange(6, dtype=np.float32).reshape(1, 2, 3) + 10 * numbers[:, None, None] + offset
        ).astype(np.float32),
        "half": np.stack([numbers, -numbers], 1).astype(np.float16),
        "label": numbers.astype(np.int32),
    }


class Encoder:
    """Remembers what it was asked for."""

    def __init__(self, offset=0.0, fails_at=None):
        self.asked, self.offset, self.fails_at = [], offset, fails_at

    def __call__(self, start, stop):
        if start == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append((start, stop))
        return rows_of(start, stop, self.offset)


def check(rows, offset=0.0):
    found, expected = rows.take(np.arange(ROWS)), rows_of(0, ROWS, offset)
    assert list(found) == list(expected) and len(rows) == ROWS
    for name, column in expected.items():
        assert found[name].dtype == column.dtype and found[name].flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(found[name], column)


@given(st.lists(st.integers(0, ROWS - 1)), st.integers(1, 30))
def test_any_rows_in_any_order_are_those_computed(tmp_path_factory, taken, size):
    folder = tmp_path_factory.mktemp("shards")
    encoder = Encoder()
    rows = sharded(folder, "key", ROWS, encoder, size)
    assert encoder.asked == [(start, min(start + size, ROWS)) for start in range(0, ROWS, size)]
    for name, column in rows.take(np.array(taken, int)).items():
        np.testing.assert_array_equal(column, rows_of(0, ROWS)[name][np.array(taken, int)])


def test_the_second_time_nothing_is_computed_and_a_batch_reads_its_rows_only(tmp_path):
    first, encoder = sharded(tmp_path / "latents", "key", ROWS, Encoder(), 5), Encoder()
    check(sharded(tmp_path / "latents", "key", ROWS, encoder, 5))
    assert encoder.asked == []
    assert first.only("label").take(np.array([22, 0])) == {"label": pytest.approx([22, 0])}
    check(pickle.loads(pickle.dumps(first)))  # for processes that read
    assert len(pickle.dumps(first)) < 2000
    batch = Batches(first, 4, jax.random.key(0))[3]
    np.testing.assert_array_equal(batch["mean"], rows_of(0, ROWS)["mean"][batch["label"]])


def test_a_computation_that_was_killed_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sharded(tmp_path, "key", ROWS, Encoder(fails_at=15), 5)
    encoder = Encoder()
    check(sharded(tmp_path, "key", ROWS, encoder, 5))
    assert encoder.asked == [(15, 20), (20, 23)]


def test_killed_at_any_operation_on_files_the_next_call_has_all_rows(tmp_path):
    with kill_points(tmp_path / "whole", at=None) as counter:
        sharded(tmp_path / "whole", "old", ROWS, Encoder(offset=1), 9)
        sharded(tmp_path / "whole", "key", ROWS, Encoder(), 9)
    assert len(counter.done) > 20
    for at in range(len(counter.done)):
        folder = tmp_path / str(at)
        with pytest.raises(Killed), kill_points(folder, at=at):
            sharded(folder, "old", ROWS, Encoder(offset=1), 9)
            sharded(folder, "key", ROWS, Encoder(), 9)
        check(sharded(folder, "key", ROWS, Encoder(), 9))


@pytest.mark.parametrize("spoil", ["cut", "flip", "empty", "folder", "fewer"])
def test_a_damaged_shard_is_computed_again_and_only_that(tmp_path, spoil):
    rows = sharded(tmp_path, "key", ROWS, Encoder(), 5)
    path = rows.paths[1]
    content = bytearray(Path(path).read_bytes())
    place = content.index(rows_of(5, 6)["mean"].tobytes())
    content[place + 3] ^= 4
    spoilt = {"cut": content[:-9], "flip": content, "empty": b"", "fewer": Path(rows.paths[-1]).read_bytes()}
    os.remove(path)
    if spoil == "folder":
        os.mkdir(path)
        with pytest.raises(StorageError):
            sharded(tmp_path, "key", ROWS, Encoder(), 5)
        return
    Path(path).write_bytes(spoilt[spoil])
    encoder = Encoder()
    check(sharded(tmp_path, "key", ROWS, encoder, 5))
    assert encoder.asked == [(5, 10)]


def test_another_key_makes_others_and_removes_the_old_when_it_is_done(tmp_path):
    (tmp_path / "notes").mkdir()
    sharded(tmp_path, "old", ROWS, Encoder(), 5)
    with pytest.raises(KeyboardInterrupt):
        sharded(tmp_path, "new", ROWS, Encoder(fails_at=20), 5)
    assert len(list(tmp_path.iterdir())) == 3
    check(sharded(tmp_path, "new", ROWS, Encoder(offset=1), 7), 1.0)
    assert len(list(tmp_path.iterdir())) == 2 and (tmp_path / "notes").is_dir()


def test_a_full_disk_is_an_error_of_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        sharded(tmp_path, "key", ROWS, Encoder(), 5)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_shards_that_vanish_and_what_is_none_are_refused(tmp_path):
    rows = sharded(tmp_path, "key", ROWS, Encoder(), 5)
    os.remove(rows.paths[2])
    with pytest.raises(DataError, match=r"00002\.npy"):
        rows.take(np.arange(ROWS))
    for wrong in (lambda start, stop: [1], lambda start, stop: {"mean": np.zeros(3)}, lambda *_: {}):
        with pytest.raises(InvalidArgumentError, match="compute must return"):
            sharded(tmp_path / "other", "key", ROWS, wrong, 5)


def test_a_shard_has_about_64_mib():
    assert rows_per_shard(mean=np.zeros((8, 8, 4), np.float32), std=np.zeros((8, 8, 4), np.float32)) == 2**15
    assert rows_per_shard(huge=np.zeros((4096, 4096, 8), np.float16)) == 1
