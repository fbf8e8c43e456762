"""The options of commands that several processes run together; two real ones: test_two_hosts.py."""

import socket
import threading

import jax
import pytest
from command_lines import complaint, run

from jaxldm import cli
from jaxldm.commands import hosts
from jaxldm.commands.hosts import SeveralHosts
from jaxldm.commands.train import Train
from jaxldm.errors import CheckpointError, InvalidArgumentError, Stopped
from jaxldm.training import interruption, mesh

HOSTS = ("--coordinator", "10.0.0.1:1234", "--num-processes", "2", "--process-id", "1")


@pytest.mark.parametrize(
    ("command", "words"),
    [("train", ("smoke",)), ("finetune", ()), ("distill", ("nowhere",))],
)
def test_the_processes_meet_before_anything_else(capsys, monkeypatch, command, words, tmp_path):
    met = []

    def initialize(*arguments, **options):
        met.append(arguments)
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    words = ("train", command, *words) if command == "finetune" else (command, *words)
    needed = {"finetune": ("--from", tmp_path, "--data", tmp_path, "--run-dir", tmp_path / "run")}
    said = complaint(capsys, *words, *needed.get(command, ()), *HOSTS)
    assert "process 0 did not meet process 1 at 10.0.0.1:1234 (DEADLINE_EXCEEDED): start all 2" in said
    assert met == [("10.0.0.1:1234", 2, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator": None}, "go together"),
        ({"process_id": None}, "go together"),
        ({"coordinator": "10.0.0.1"}, "ADDRESS:PORT, as in 10.0.0.1:1234, got '10.0.0.1'"),
        ({"coordinator": "10.0.0.1:70000"}, "ADDRESS:PORT, as in 10.0.0.1:1234, got '10.0.0.1:70000'"),
        ({"process_id": -1}, "must be from 0 to --num-processes - 1, got -1 of 2"),
        ({"num_processes": 0}, "must be from 0 to --num-processes - 1, got 0 of 0"),
        ({"process_id": 2}, "must be from 0 to --num-processes - 1, got 2 of 2"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: pytest.fail("called"))
    whole = {"coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": 0}
    with pytest.raises(InvalidArgumentError, match=message):
        SeveralHosts(**whole | changes).join_hosts()
    SeveralHosts().join_hosts()  # one process alone


def test_a_process_says_for_whom_it_waits_and_ends_when_they_do_not_come(capsys, monkeypatch):
    """JAX would end the process: its own time must be longer."""
    over = threading.Event()

    def initialize(*arguments, initialization_timeout):
        assert initialization_timeout > hosts.JOIN_SECONDS
        over.wait()

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(hosts, "_SILENT_SECONDS", 0.05)
    monkeypatch.setattr(hosts, "JOIN_SECONDS", 0.1)
    with pytest.raises(InvalidArgumentError, match=r"process 0 and 2 did not .*no answer in 0.1 sec"):
        SeveralHosts(coordinator="here:1", num_processes=3, process_id=1).join_hosts()
    over.set()
    said = capsys.readouterr().err
    assert said == "waiting at here:1 for process 0 and 2 (at most 0.1 seconds)\n"


def test_a_port_that_is_in_use_is_refused(monkeypatch):
    """JAX would crash."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: None)
    monkeypatch.setattr(hosts, "_MET", threading.Event())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        of_first, of_second = (
            SeveralHosts(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=number)
            for number in range(2)
        )
        with pytest.raises(InvalidArgumentError, match=f"cannot listen at port {port} of --coordinator"):
            of_first.join_hosts()
        of_second.join_hosts()
    of_first.join_hosts()


def test_what_one_process_refuses_ends_the_other(monkeypatch):
    """The two take part in one question: whether all have succeeded."""
    both = SeveralHosts(coordinator="here:1", num_processes=2, process_id=0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    answers = []
    monkeypatch.setattr("jaxldm.training.processes.least", lambda own: answers.append(own) or 0)
    with pytest.raises(CheckpointError, match="another of the processes"):
        both.agreed(lambda: "fine")
    with pytest.raises(ZeroDivisionError):
        both.agreed(lambda: 1 / 0)
    assert answers == [True, False]
    assert SeveralHosts().agreed(lambda: "alone") == "alone"


def test_a_lost_process_is_one_line_that_says_how_to_go_on(capsys, monkeypatch):
    monkeypatch.setattr(cli, "is_one_of_several", lambda: True)

    def fails(self):
        raise RuntimeError("FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer")

    monkeypatch.setattr(Train, "run", fails)
    assert "another of the processes" in complaint(capsys, "train", "smoke")
    monkeypatch.setattr(cli, "is_one_of_several", lambda: False)
    with pytest.raises(RuntimeError):
        cli.main(["train", "smoke"])


@pytest.mark.parametrize(("number", "said"), [(0, 0), (1, 1)])
def test_each_process_says_once_how_to_go_on(capsys, monkeypatch, number, said):
    """The first has said it in its log."""

    def stopped(self):
        raise Stopped("stopped after step 10 of 20: to go on, type the same command with --resume")

    monkeypatch.setattr(Train, "run", stopped)
    monkeypatch.setattr(cli, "is_one_of_several", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: number)
    code, _, err = run(capsys, "train", "smoke")
    assert code == 130 and err.count("--resume") == said


def test_a_signal_in_the_last_steps_is_not_forgotten(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", lambda own: own)
    request = interruption.StopRequest()
    request.signal_number = 2
    stops = [step for step in range(1, 15) if interruption.agreed_stop(request, step, last=14)]
    assert stops == [10, 14]


def test_a_mesh_without_the_devices_of_a_process_is_refused(monkeypatch):
    some = mesh.make_mesh(2)
    mesh.check_every_process(some)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(InvalidArgumentError, match="has 2 of 8 devices and none of process 1 and 2"):
        mesh.check_every_process(some)
    with pytest.raises(InvalidArgumentError, match="none of process 1 and 2"):
        mesh.local_examples(some, 16)
