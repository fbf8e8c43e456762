"""The harness itself, and the writers of a training."""

import os
import shutil
import signal

import numpy as np
import pytest

from experiments.faults import kills
from experiments.faults.kill_points import Killed, kill_points, killed, moments
from experiments.faults.result import Result
from experiments.faults.run import MAX_FAULTS, table
from jaxldm.files import write_atomically, write_together
from jaxldm.training import read_log
from jaxldm.training.log import CsvLog
from jaxldm.training.store import TrainingStore


def test_after_a_kill_nothing_is_cleaned_up(tmp_path):
    def write():
        (tmp_path / "a").write_text("first")
        try:
            with (tmp_path / "b").open("w") as file:
                file.write("12345678")
        except BaseException:  # noqa: BLE001
            (tmp_path / "a").unlink()
        finally:
            shutil.rmtree(tmp_path, ignore_errors=True)

    with pytest.raises(Killed), kill_points(tmp_path, at=3) as counter:
        write()
    assert counter.done == ["open", "write", "open"]
    assert (tmp_path / "a").read_text() == "first" and (tmp_path / "b").read_text() == "1234"


def test_what_lies_elsewhere_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    assert killed(tmp_path / "in", 0, lambda: write_atomically(tmp_path / "in" / "a", b"x"))
    assert not killed(tmp_path / "in", 0, lambda: write_atomically(tmp_path / "a", b"x"))
    assert sorted(os.listdir(tmp_path)) == ["a", "in"] and not os.listdir(tmp_path / "in")


def rows(log, first, last):
    for step in range(first, last + 1):
        numbers = {name: np.float32(step) for name in ("loss", "grad_norm", "learning_rate")}
        log.append(1, step, float(step), numbers)
    log.flush(durable=True)


def test_a_log_killed_at_any_moment_goes_on_without_a_gap(tmp_path):
    def write(folder):
        log = CsvLog(folder / "log.csv")
        log.keep_until(3)
        rows(log, 4, 6)

    points = moments(tmp_path, lambda: write(tmp_path))
    for at in points:
        folder = tmp_path / str(at)
        folder.mkdir()
        rows(CsvLog(folder / "log.csv"), 1, 5)
        killed(folder, at, lambda folder=folder: write(folder))
        said = []
        log = CsvLog(folder / "log.csv")
        log.keep_until(3, said.append)
        rows(log, 4, 6)
        assert read_log(folder / "log.csv")["loss"].tolist() == [1, 2, 3, 4, 5, 6] and not said
        assert os.listdir(folder) == ["log.csv"]


def test_a_checkpoint_killed_at_any_moment_is_whole_or_absent(tmp_path):
    def save(folder, step):
        with TrainingStore(folder, keep=1) as store:
            store.save(step, {"x": np.full(5, step)})

    points = moments(tmp_path / "counted", lambda: save(tmp_path / "counted", 2))
    assert len(points) > 10
    for at in points[1::2]:
        folder = tmp_path / str(at)
        save(folder, 1)
        killed(folder, at, lambda folder=folder: save(folder, 2))
        said = []
        with TrainingStore(folder) as store:
            step, state = store.restore_latest({"x": np.zeros(5, int)}, said.append)
        assert state["x"].tolist() == [step] * 5 and step in (1, 2) and not said
        save(folder, 2)
        assert os.listdir(folder) == ["2"]


class Forks:
    """Stands for `kills.child`: a kill is `Killed`; every `lucky`-th write to be killed ends first."""

    def __init__(self, lucky):
        self.lucky, self.killed, self.ended = lucky, 0, 0

    def __call__(self, place, action):
        at = (
            getattr(action, "args", (None, None))[1]
            if getattr(action, "func", None) is kills._killed
            else None
        )
        if at is not None and (self.killed + self.ended) % self.lucky == self.lucky - 1:
            self.ended += 1
            action.args[2]()
            return 0, ""
        try:
            return action() or 0, ""
        except ValueError as error:
            return 1, str(error)
        except Killed:
            self.killed += 1
            return -signal.SIGKILL, ""


def kill_writes(tmp_path, monkeypatch, write, lucky):
    forks = Forks(lucky)
    monkeypatch.setattr(kills, "child", forks)
    monkeypatch.setattr(kills, "die", None)

    def version_of(folder):
        (version,) = {int(path.read_text()) for path in folder.iterdir()}
        return version

    found = kills.kill_writers(tmp_path, "writing", 12, np.random.default_rng(0), write, version_of)
    return found, forks


def test_a_write_that_ends_before_its_kill_is_no_kill(tmp_path, monkeypatch):
    def write(folder, version):
        write_together(folder, {name: str(version).encode() for name in "ab"})

    found, forks = kill_writes(tmp_path, monkeypatch, write, lucky=3)
    assert (found, forks.killed) == ([], 12) and forks.ended >= 5


def test_writes_that_are_never_killed_are_a_fault(tmp_path, monkeypatch):
    def write(folder, version):
        write_together(folder, {"a": str(version).encode()})

    found, forks = kill_writes(tmp_path, monkeypatch, write, lucky=1)
    assert found == ["writing: more writes ended than were killed"] and forks.killed == 0


def test_a_writer_that_mixes_is_found(tmp_path, monkeypatch):
    def write(folder, version):
        for name in "ab":
            write_atomically(folder / name, str(version).encode())

    found, _ = kill_writes(tmp_path, monkeypatch, write, lucky=100)
    assert any("too many values" in fault for fault in found)


def test_the_table():
    results = [Result("kills", 200, [], 60.4), Result("misuse", 30, ["f"] * (MAX_FAULTS + 2), 1.0)]
    text = table(results, ["mutations"])
    assert "| kills | 200 | 0 | 60 |" in text and "| misuse | 30 | 22 | 1 |" in text
    assert (
        "| mutations | not there | | |" in text and text.count("- f") == MAX_FAULTS and "and 2 more" in text
    )


def test_two_runs_may_differ_in_their_clocks_alone(tmp_path):
    header = "epoch,step,loss,grad_norm,learning_rate,seconds,waiting,of_peak,kl"
    for name, clocks, loss in (
        ("a", "1.0,0.1,nan", "0.5"),
        ("b", "9.0,0.7,0.2", "0.5"),
        ("c", "1,1,1", "0.6"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(f"{header}\n1,1,{loss},1.0,0.1,{clocks},0.25\n")
        (tmp_path / name / "report.html").write_text(clocks)
    assert kills.differences(tmp_path / "a", tmp_path / "b") == []
    assert kills.differences(tmp_path / "a", tmp_path / "c") == ["log.csv differs"]
    (tmp_path / "b" / "report.html").unlink()
    assert kills.differences(tmp_path / "a", tmp_path / "b") == ["only one has report.html"]
