import itertools
import re

import numpy as np
import pytest

from jaxldm.training.log import CsvLog, read_log
from jaxldm.training.progress import STEPS_IN_FLIGHT, Progress


class OnDevice:
    """A number still being computed: asking for it is noticed."""

    def __init__(self, value, asked):
        self.value, self.asked = value, asked

    def copy_to_host_async(self):
        pass

    def is_ready(self):
        return False

    def __array__(self, *args, **kwargs):
        self.asked.append(self.value)
        return np.float32(self.value)


@pytest.fixture
def progress(tmp_path):
    return Progress(
        CsvLog(tmp_path / "log.csv"),
        name="x",
        start=0,
        num_steps=10,
        steps_per_epoch=4,
        seconds=0.0,
        log=lambda line: None,
        bar=False,
    )


def metrics(value, asked):
    return {
        "loss": OnDevice(value, asked),
        "grad_norm": OnDevice(1.0, []),
        "learning_rate": OnDevice(1.0, []),
    }


@pytest.mark.unchecked
def test_the_newest_steps_are_never_waited_for(progress, tmp_path):
    asked = []
    for step in range(1, 8):
        progress.push(step, metrics(step, asked))
        assert sorted(set(asked)) == list(range(1, step - STEPS_IN_FLIGHT + 1))
    progress.drain()
    assert sorted(set(asked)) == list(range(1, 8))
    np.testing.assert_array_equal(read_log(tmp_path / "log.csv")["loss"], np.arange(1, 8))


@pytest.mark.unchecked
def test_the_line_of_an_epoch_has_the_speed_and_the_share_of_waiting(tmp_path, monkeypatch):
    """An update of 16 examples takes 2 seconds, of which the loop waits half a second for the batch.

    The products of an update would take 0.8 s at the peak, which is known from the second epoch on.
    """
    said, now = [], [100.0]
    monkeypatch.setattr("jaxldm.training.progress.time.perf_counter", lambda: now[0])
    counts = {"start": 0, "num_steps": 8, "steps_per_epoch": 4, "seconds": 0.0}
    progress = Progress(CsvLog(tmp_path / "log.csv"), name="x", **counts, log=said.append, bar=False)
    for step in range(1, 9):
        now[0] += 50.0 if step == 1 else 2.0  # the first is compiled
        progress.at_peak = None if step < 5 else 0.8
        progress.push(step, metrics(1.0, []), waiting=0.5, examples=16)
        progress.drain()
    assert [line.split("  ")[-1] for line in said] == [
        "8 examples/s, 25% waiting",
        "8 examples/s, 25% waiting, 40% of the matrix peak",
    ]
    assert "  56.0 s (50.0 s with compiling)  " in said[0] and "  8.0 s  " in said[1]
    log = read_log(tmp_path / "log.csv")
    np.testing.assert_array_equal(log["waiting"], [0.5] * 8)
    np.testing.assert_array_equal(log["examples"], [16] * 8)
    np.testing.assert_allclose(log["examples_per_second"], [np.nan] + [8] * 7, rtol=1e-6)
    np.testing.assert_allclose(log["waiting_share"], [np.nan] + [0.25] * 7, rtol=1e-6)
    np.testing.assert_allclose(log["of_peak"], [np.nan] * 4 + [0.4] * 4, rtol=1e-6)


class OnClock(OnDevice):
    """A number that is there at a time: asking for it sooner takes until then."""

    def __init__(self, value, now, ready):
        super().__init__(value, [])
        self.now, self.ready = now, ready

    def is_ready(self):
        return self.now[0] >= self.ready

    def __array__(self, *args, **kwargs):
        self.now[0] = max(self.now[0], self.ready)
        return super().__array__(*args, **kwargs)


@pytest.mark.unchecked
def test_the_share_of_waiting_is_of_the_seconds_of_the_line(tmp_path, monkeypatch):
    """Three updates of a second in an epoch, whose first batch takes four, the others a quarter.

    The numbers of an epoch's last update come in behind the wait for the next one's batch, and at the end of
    the training at once.
    """
    lines, waits, now = [], [], [100.0]
    monkeypatch.setattr("jaxldm.training.progress.time.perf_counter", lambda: now[0])
    counts = {"start": 0, "num_steps": 12, "steps_per_epoch": 3, "seconds": 0.0}
    log = lambda line: lines.append((now[0], int(re.search(r"(\d+)% waiting", line)[1])))  # noqa: E731
    progress = Progress(CsvLog(tmp_path / "log.csv"), name="x", **counts, log=log, bar=False)
    free = now[0]  # when the device has nothing more to do
    for step in range(1, 13):
        began, idle = now[0], progress.idle()
        now[0] += 4.0 if step % 3 == 1 else 0.25
        waiting = now[0] - began if idle or progress.idle() else 0.0
        waits += [(began, now[0])] if waiting else []
        free = max(free, now[0]) + 1.0
        names = ("loss", "grad_norm", "learning_rate")
        progress.push(step, {name: OnClock(1.0, now, free) for name in names}, waiting=waiting, examples=16)
    progress.drain()
    assert len(lines) == 4
    for (start, _), (end, share) in itertools.pairwise(lines):
        waited = sum(max(min(end, last) - max(start, begin), 0.0) for begin, last in waits)
        assert share == pytest.approx(100 * waited / (end - start), abs=0.51)


@pytest.mark.unchecked
def test_another_players_turn_is_not_counted_as_a_skipped_update(tmp_path):
    """The first player moves in updates 1 and 3; of those, update 3 had no finite loss and was skipped."""
    said = []
    counts = {"start": 0, "num_steps": 4, "steps_per_epoch": 4, "seconds": 0.0}
    progress = Progress(CsvLog(tmp_path / "log.csv"), name="x", **counts, log=said.append, bar=False)
    for step, (loss, rate, skipped) in enumerate([(2.0, 0.5, 0), (np.nan, np.nan, 0)] * 2, start=1):
        row = {"loss": loss, "grad_norm": 1.0 + 0 * rate, "learning_rate": rate, "skipped": skipped}
        if step == 3:
            row |= {"loss": np.inf, "skipped": 1}
        progress.push(step, {name: OnDevice(value, []) for name, value in row.items()}, examples=16)
    progress.drain()
    assert "loss 2.0000  grad norm 1  learning rate 5.00e-01" in said[-1]
    assert said[-1].endswith("  1 skipped")


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("seconds", "speed"),
    [(0.01, "28630 examples/s"), (1.0, "286 examples/s"), (200.0, "1.43 examples/s")],
)
def test_speeds_are_plain_numbers_and_small_shares_of_the_peak_are_not_none(
    tmp_path, monkeypatch, seconds, speed
):
    said, now = [], [100.0]
    monkeypatch.setattr("jaxldm.training.progress.time.perf_counter", lambda: now[0])
    counts = {"start": 0, "num_steps": 2, "steps_per_epoch": 2, "seconds": 0.0}
    progress = Progress(CsvLog(tmp_path / "log.csv"), name="x", **counts, log=said.append, bar=False)
    progress.at_peak = 0.004 * seconds
    for step in (1, 2):
        progress.drain()
        progress.push(step, metrics(1.0, []), waiting=0.0, examples=286.3)
    now[0] += seconds
    progress.drain()
    assert said[0].split("  ")[-1] == f"{speed}, 0% waiting, under 1% of the matrix peak"


@pytest.mark.unchecked
def test_an_epoch_of_one_update_that_was_compiled_has_no_speed(tmp_path):
    said = []
    counts = {"start": 0, "num_steps": 1, "steps_per_epoch": 1, "seconds": 0.0}
    progress = Progress(CsvLog(tmp_path / "log.csv"), name="x", **counts, log=said.append, bar=False)
    progress.push(1, metrics(1.0, []), examples=16)
    progress.drain()
    assert said[0].endswith("s with compiling)")


@pytest.mark.unchecked
def test_nothing_is_logged_after_the_first_number_that_is_not_finite(progress, tmp_path):
    for step, loss in enumerate((1.0, 2.0, np.inf, 3.0, np.nan), start=1):
        progress.push(step, metrics(loss, []))
    progress.drain()
    assert progress.diverged[0] == 3
    np.testing.assert_array_equal(read_log(tmp_path / "log.csv")["step"], [1, 2, 3])
