"""Batches read ahead: the same ones, each example once an epoch over processes and workers, after kills."""

import collections
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import reading_process as own

from jaxldm.data import Batches, BucketedBatches, Reader
from jaxldm.data.batches import ArrayRows
from jaxldm.errors import DataError, InvalidArgumentError

COLUMNS = {"row": np.arange(10), "image": np.arange(40, dtype=np.float32).reshape(10, 2, 2, 1)}


def batches_of(columns=COLUMNS, batch_size=4):
    return Batches(columns, batch_size, jax.random.key(0))


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_any_steps_in_any_order_are_those_of_the_batches(ahead):
    batches = batches_of()
    with Reader(batches, ahead=ahead) as reader:
        for step in (3, 4, 5, 0, 0, 9, 2):
            for name, column in batches[step].items():
                np.testing.assert_array_equal(reader[step][name], column)
        assert [batch["row"].tolist() for batch in reader] == [batch["row"].tolist() for batch in batches]
        assert len(reader) == len(batches)


def test_processes_share_each_batch_and_see_nothing_twice():
    bucketed = BucketedBatches(ArrayRows(COLUMNS), np.zeros(10, int), 4, jax.random.key(1))
    for batches in (batches_of(), bucketed):
        readers = [Reader(batches, process=number, num_processes=2) for number in range(2)]
        for step in range(7):
            parts = [reader[step]["row"] for reader in readers]
            assert [len(part) for part in parts] == [2, 2]
            np.testing.assert_array_equal(np.concatenate(parts), batches[step]["row"])
    for process, num_processes in ((0, 3), (2, 2)):
        with pytest.raises(InvalidArgumentError, match="cannot be split"):
            Reader(batches, process=process, num_processes=num_processes)


def test_time_is_counted_only_while_it_waits():
    class Slow(ArrayRows):
        def take(self, rows):
            time.sleep(0.05)
            return super().take(rows)

    with Reader(batches_of(Slow(COLUMNS))) as reader:
        reader[0]
        first = reader.waited
        time.sleep(0.1)
        reader[1]
        assert first > 0.045 and reader.waited - first < 0.02


def test_errors_of_the_data_are_raised_where_the_batch_is_asked_for():
    class Broken(ArrayRows):
        def take(self, rows):
            raise DataError("picture 3 is damaged")

    with Reader(batches_of(Broken(COLUMNS))) as reader, pytest.raises(DataError, match="picture 3"):
        reader[0]


def start(folder, first):
    """Two processes that read from a step on."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, own.__file__, str(folder), str(process), str(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        for process in range(own.NUM_PROCESSES)
    ]


def lines(folder, process):
    found = [
        [int(word) for word in line.split()] for line in (folder / f"{process}.txt").read_text().splitlines()
    ]
    return {step: (worker, rows) for step, worker, *rows in found}


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at the workers in /proc")
def test_every_example_once_an_epoch_over_two_processes_of_three_workers_with_a_kill_between(tmp_path):
    """Both are killed in the second of three epochs; two others go on from that step."""
    processes = start(tmp_path, 0)
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    workers = {worker for number in range(2) for worker, _ in lines(tmp_path, number).values()}
    assert len(workers) >= 3 and not workers & {process.pid for process in processes}
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    deadline = time.monotonic() + 5
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, workers))  # none outlives the training that it reads for
    for process in start(tmp_path, 18):
        process.stdout.close()
        process.stdin.close()
        assert process.wait(60) == 0
    seen = collections.defaultdict(list)
    for step in range(own.NUM_STEPS):
        for number in range(2):
            seen[step * own.BATCH_SIZE // own.NUM_EXAMPLES].extend(lines(tmp_path, number)[step][1])
    assert len(seen) == 3
    for examples in seen.values():
        assert sorted(examples) == list(range(own.NUM_EXAMPLES))


def test_a_worker_that_is_killed_is_replaced(tmp_path):
    """Also while it reads; the batches stay what they are."""
    batches = batches_of(own.Slow(COLUMNS))
    with Reader(batches, num_workers=1, ahead=0) as reader:
        worker = int(reader[0]["worker"][0])
        os.kill(worker, signal.SIGKILL)
        again = reader[1]
        assert int(again["worker"][0]) != worker
        np.testing.assert_array_equal(again["row"], batches[1]["row"])
