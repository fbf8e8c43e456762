"""Batches read ahead: the same ones, each example once an epoch over processes and workers, after kills."""

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.parametrize("options", [{"ahead": 0}, {}, {"ahead": 5}, {"num_threads": 3}, {"num_workers": 2}])
def test_any_steps_in_any_order_are_those_of_the_batches(options):
    batches = batches_of()
    with Reader(batches, **options) as reader:
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


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 2), ({"ahead": 0}, 1), ({"ahead": 4}, 5), ({"num_threads": 3}, 4)]
)
def test_so_many_batches_are_read_ahead(options, expected):
    taken = []

    class Counted(ArrayRows):
        def take(self, rows):
            taken.append(rows)
            return super().take(rows)

    with Reader(batches_of(Counted(COLUMNS)), **options) as reader:
        reader[0]
        deadline = time.monotonic() + 5
        while len(taken) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(taken) == expected


def test_threads_read_at_the_same_time():
    three = threading.Barrier(3, timeout=20)

    class Together(ArrayRows):
        def take(self, rows):
            three.wait()
            return super().take(rows)

    batches = batches_of(Together(COLUMNS))
    with Reader(batches, num_threads=3) as reader:
        for step in range(4):
            np.testing.assert_array_equal(reader[step]["row"], COLUMNS["row"][batches.row_numbers(step)])
        three.abort()


def test_after_an_error_the_steps_are_still_those_of_the_batches():
    broken = [True]

    class Broken(ArrayRows):
        def take(self, rows):
            if 0 in rows and broken[0]:
                raise DataError("picture 0 is damaged")
            return super().take(rows)

    batches = Batches(Broken(COLUMNS), 4, jax.random.key(0), shuffle=False)
    with Reader(batches, ahead=3) as reader:
        with pytest.raises(DataError, match="picture 0"):
            reader[0]
        assert reader[1]["row"].tolist() == [4, 5, 6, 7]
        broken[0] = False
        assert [reader[step]["row"][0] for step in (0, 1, 2)] == [0, 4, 0]


def test_a_negative_step_is_refused():
    with pytest.raises(InvalidArgumentError, match="step"):
        Reader(batches_of())[-1]


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
    of_each = [{worker for worker, _ in lines(tmp_path, number).values()} for number in range(2)]
    workers = of_each[0] | of_each[1]
    assert [len(of_one) for of_one in of_each] == [own.NUM_WORKERS] * 2
    assert len(workers) == 2 * own.NUM_WORKERS and not workers & {process.pid for process in processes}
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


def test_a_worker_that_is_killed_is_replaced():
    """The batches stay what they are, and those of other workers are not read again."""
    batches = batches_of(own.Slow(COLUMNS))
    with Reader(batches, num_workers=1, ahead=0) as reader:
        worker = int(reader[0]["worker"][0])
        os.kill(worker, signal.SIGKILL)
        again = reader[1]
        assert int(again["worker"][0]) != worker
        np.testing.assert_array_equal(again["row"], batches[1]["row"])


def test_a_worker_that_is_killed_while_it_sends_is_replaced(tmp_path):
    """Of a message that was begun, the rest never comes: nothing may wait for it."""
    batches = batches_of(own.DyingOnce(COLUMNS, tmp_path / "died"))
    reader = Reader(batches, num_workers=1)
    first = ThreadPoolExecutor(1).submit(reader.__getitem__, 0).result(60)
    assert (tmp_path / "died").exists()
    np.testing.assert_array_equal(first["row"], COLUMNS["row"][batches.row_numbers(0)])
    reader.close()


def test_data_that_no_worker_survives_is_an_error():
    with (
        Reader(batches_of(own.Dying(COLUMNS)), num_workers=2) as reader,
        pytest.raises(
            DataError, match=r"ended 4 times(, the last with code -9)?: there may be too little memory"
        ),
    ):
        reader[0]


def test_errors_in_a_worker_are_raised_here_with_where_they_came_from():
    batches = Batches(own.Failing(COLUMNS), 4, jax.random.key(0), shuffle=False)
    with Reader(batches, num_workers=1) as reader:
        with pytest.raises(DataError, match="picture 0 is damaged") as plain:
            reader[0]
        with pytest.raises(DataError, match="KeyError: 'picture 1 has no mode'") as unpicklable:
            reader[1]
        for error in (plain, unpicklable):
            assert "in take" in error.value.__notes__[0]


def test_ctrl_c_is_left_to_the_training_and_close_ends_the_workers_at_once():
    batches = batches_of(own.Slow(COLUMNS))
    with Reader(batches, num_workers=1, ahead=0) as reader:
        worker = int(reader[0]["worker"][0])
        os.kill(worker, signal.SIGINT)
        assert int(reader[1]["worker"][0]) == worker
        reader.close()
        assert gone(worker) and int(reader[2]["worker"][0]) != worker
    started, threads = time.monotonic(), set(threading.enumerate())
    with Reader(
        Batches(own.Stuck(COLUMNS), 4, jax.random.key(0), shuffle=False), num_workers=2, ahead=6
    ) as reader:
        assert reader[0]["row"].tolist() == [0, 1, 2, 3]  # and a worker is at the next one
    while set(threading.enumerate()) - threads and time.monotonic() - started < 30:
        time.sleep(0.05)
    assert not set(threading.enumerate()) - threads and time.monotonic() - started < 30
