"""`jaxldm serve`: what it refuses, and a server that answers over a socket."""

import base64
import functools
import json
import socket
import threading
import time
import types
import urllib.error
import urllib.request

import jax
import pytest
import tiny_models
from command_lines import complaint, run
from starlette.testclient import TestClient

from jaxldm import host, pipelines, serving
from jaxldm.commands import serve
from jaxldm.serving import front
from jaxldm.serving.pictures import picture_bytes
from jaxldm.serving.service import Service
from jaxldm.serving.worker import LocalWorker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "digits"
    pipelines.save(tiny_models.pixel_pipeline(), folder)
    return folder


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv(serve.TOKEN, raising=False)


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    """Workers live in this process, which needs no seconds to start."""
    monkeypatch.setattr(serve, "worker_of", lambda make, number, devices: LocalWorker(make))


def test_what_cannot_be_served_is_refused(capsys, folder, tmp_path):
    for words, message in (
        (["--host", "0.0.0.0"], serve.TOKEN),
        (["--port", "70000"], "from 0 to 65535, got 70000"),
        (["--port", "0", "--sizes", "8"], "--sizes takes HEIGHTxWIDTH, as in 512x768, got '8'"),
        (["--port", "0", "--sizes", "8x8"], "draws images of one size"),
        (["--port", "0", "--solvers", "ddim", "no"], "unknown solver 'no'"),
        (["--port", "0", "--slots", "0"], "slots"),
        (["--port", "0", "--workers", "0"], "workers must be"),
        (["--port", "0", "--max-queue", "0"], "max_queue"),
        (["--port", "0", "--max-steps", "1001"], "max_steps"),
    ):
        assert message in complaint(capsys, "serve", folder, *words)
    assert "nowhere" in complaint(capsys, "serve", tmp_path / "nowhere", "--port", "0")


def test_a_port_in_use_is_named(capsys, folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert "choose another --port" in complaint(capsys, "serve", folder, "--port", port)


def test_a_missing_package_is_named(capsys, folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert "pip install 'jaxldm[serve]'" in complaint(capsys, "serve", folder)


def test_the_command_serves_what_its_options_say(capsys, folder, monkeypatch):
    models = []

    def ask(server, bound):
        client = TestClient(server.config.app)  # outside of its lifespan: nothing is compiled
        assert client.get("/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        models.append(client.get("/models", headers=headers).json()["models"][0])

    monkeypatch.setenv(serve.TOKEN, "secret")
    monkeypatch.setattr(front, "run_until_interrupted", ask)
    words = ("--port", 0, "--slots", 2, 3, "--solvers", "dpmpp_2m", "ddim", "--max-images", 4)
    code, out, _ = run(capsys, "serve", folder, *words)
    assert code == 0 and "http://127.0.0.1:" in out and "/ready" in out
    assert models[0]["id"] == "digits" and models[0]["slots"] == [2, 3] and models[0]["max_images"] == 4
    assert models[0]["solvers"] == ["dpmpp_2m", "ddim"] and models[0]["class_names"] == []


def test_a_line_says_when_a_server_is_ready_and_none_where_it_ended_before(capsys):
    ended, service = threading.Event(), types.SimpleNamespace(ready=False)
    ended.set()
    serve.tell_when_ready("runs/digits", service, ended)
    assert capsys.readouterr().out == ""
    ended.clear()
    threading.Timer(0.05, setattr, (service, "ready", True)).start()
    serve.tell_when_ready("runs/digits", service, ended)
    assert capsys.readouterr().out == "runs/digits: ready after 0 s\n"


def test_the_cache_is_where_it_was_asked_and_who_has_no_token_is_local(capsys, folder, monkeypatch, tmp_path):
    monkeypatch.setenv(host.COMPILATION_CACHE, "off")  # of this process; restored
    statuses = []

    def ask(server, bound):
        statuses.append(TestClient(server.config.app).get("/models").status_code)  # of another name

    monkeypatch.setattr(front, "run_until_interrupted", ask)
    code, _, _ = run(capsys, "serve", folder, "--port", 0, "--cache-dir", tmp_path)
    assert code == 0 and statuses == [421] and host.compilation_cache_folder() == tmp_path


def test_a_server_answers_over_a_socket(folder):
    from jaxldm.serving.server import Settings, made, serve_by

    pipe = pipelines.load(folder)
    settings = Settings("digits", slots=(2,), limits=serving.Limits(burst=100))
    service = Service([LocalWorker(functools.partial(made, pipe, settings))], settings.limits)
    with serve.listening("127.0.0.1", 0) as bound:
        server = front.server_of(serve_by(service, settings), service)
        thread = threading.Thread(target=front.run_until_interrupted, args=(server, bound))
        thread.start()
        try:
            address = f"http://127.0.0.1:{bound.getsockname()[1]}"
            wait_until_ready(address)
            body = {"class_labels": 2, "seed": 9, "num_inference_steps": 3}
            status, answer = post(f"{address}/generate", body)
            image = serving.as_served(pipe, 2)(jax.random.key(9), [2], num_inference_steps=3)[0]
            assert status == 200 and base64.b64decode(answer["images"][0]) == picture_bytes(image)
            status, answer = post(f"{address}/generate", {"class_labels": 3})
            assert status == 400 and answer["error"]["param"] == "class_labels"
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


def wait_until_ready(address):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/ready") as response:
                assert json.load(response) == {"ready": True}
                return
        except urllib.error.URLError:
            time.sleep(0.02)
    raise AssertionError("the server did not become ready")


def post(address, body):
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
