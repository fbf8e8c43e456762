"""Every mistake in a command line is one line: a few of those in `experiments.faults`."""

import pytest

from experiments.faults import command_lines


def test_wrong_command_lines_are_refused_in_one_line():
    result = command_lines.run(40, seed=1)
    assert result.count == 40 and not result.faults, "\n".join(result.faults)


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["sample", "--help"]])
def test_a_right_command_line_counts_as_a_fault_where_it_should_be_refused(words):
    assert "exit code 0" in command_lines.fault_of(words)
