"""The benchmark of the start of `jaxldm sample` marks what it says, once each, and its table has medians."""

import time

import pytest

from experiments.benchmarks import startup, startup_side


def test_the_marks_of_a_command_come_in_order(tmp_path):
    startup.make_folder(tmp_path / "model", quick=True)
    words = ["sample", str(tmp_path / "model"), "--output-dir", str(tmp_path / "out"), "--quiet"]
    words += ["--num-inference-steps", "3", "--class-labels", "1"]
    marks = startup_side.main(time.time(), words, own_process=False)
    assert list(marks) == list(startup.COLUMNS)
    assert 0 < marks["command"] < marks["ready"] < marks["first_step"] < marks["end"]
    assert (tmp_path / "out" / "grid.png").exists()


def test_a_command_that_fails_ends_with_its_code(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        startup_side.main(time.time(), ["sample", str(tmp_path / "absent")], own_process=False)
    assert error.value.code == 2 and "absent" in capsys.readouterr().err


def test_a_line_has_medians():
    rounds = [dict.fromkeys(startup.COLUMNS, value) for value in (1.0, 9.0, 2.0)]
    assert startup.as_line("warm cache", rounds) == "| warm cache | 2.00 | 2.00 | 2.00 | 2.00 |"
