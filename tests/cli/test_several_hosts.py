"""The options of commands that several processes run together; two real ones: test_two_processes.py."""

import jax
import pytest
from command_lines import complaint

from jaxldm.commands.options import SeveralHosts
from jaxldm.errors import InvalidArgumentError

HOSTS = ("--coordinator", "10.0.0.1:1234", "--num-processes", "2", "--process-id", "1")


@pytest.mark.parametrize(
    ("command", "words"),
    [("train", ("smoke",)), ("finetune", ()), ("distill", ("nowhere",))],
)
def test_the_processes_meet_before_anything_else(capsys, monkeypatch, command, words, tmp_path):
    met = []

    def initialize(*arguments):
        met.append(arguments)
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    words = ("train", command, *words) if command == "finetune" else (command, *words)
    needed = {"finetune": ("--from", tmp_path, "--data", tmp_path, "--run-dir", tmp_path / "run")}
    said = complaint(capsys, *words, *needed.get(command, ()), *HOSTS)
    assert "the 2 processes did not meet at 10.0.0.1:1234: DEADLINE_EXCEEDED" in said
    assert met == [("10.0.0.1:1234", 2, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator": None}, "go together"),
        ({"process_id": None}, "go together"),
        ({"coordinator": "10.0.0.1"}, "ADDRESS:PORT, as in 10.0.0.1:1234, got '10.0.0.1'"),
        ({"process_id": 2}, "must be from 0 to --num-processes - 1, got 2 of 2"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: pytest.fail("called"))
    whole = {"coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": 0}
    with pytest.raises(InvalidArgumentError, match=message):
        SeveralHosts(**whole | changes).join_hosts()
    SeveralHosts().join_hosts()  # one process alone
