"""The listener: requests that come too slowly or are no HTTP, too many connections, the end by a signal."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request

import pytest
import tiny_models
import uvicorn

from jaxldm import pipelines
from jaxldm.serving import front

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
CHUNKS = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"


async def app(scope, receive, send):
    """Answers GET, and POST without reading its body; /late waits until the body is there."""
    if scope["path"] == "/late":
        while (await receive()).get("more_body"):
            pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def talk(client, app=app, most=None):
    """Runs the coroutine function `client(port)` next to a server."""

    async def both():
        bounded = front.Bounded(app)
        config = uvicorn.Config(
            bounded,
            http=front.Connection,
            ws="none",
            log_config=None,
            lifespan="off",
            h11_max_incomplete_event_size=front.LARGEST_HEAD,
        )
        state = uvicorn.server.ServerState()
        config.load()
        bounded.connections = state.connections
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: front.Connection(config, state, {}), "127.0.0.1", 0)
        try:
            result = await asyncio.wait_for(client(server.sockets[0].getsockname()[1]), 60)
            for _ in range(100):
                if not state.connections:
                    break
                await asyncio.sleep(0.01)
            assert not state.connections
            return result
        finally:
            server.close()

    return asyncio.run(both())


async def exchange(port, *parts, pause=0.0):
    """Sends parts and returns all that came back, and the seconds until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start = time.monotonic()
    for part in parts:
        writer.write(part)
        await asyncio.sleep(pause)
    received = await reader.read()
    writer.close()
    return received, time.monotonic() - start


def refusal(received):
    """(status, error) of an answer."""
    head, _, content = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)["error"]


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(front, "HEAD_SECONDS", 0.15)


def test_a_head_that_does_not_come_is_refused_however_its_bytes_drop_in(hasty):
    status, error = refusal(talk(lambda port: exchange(port, *[b"G"] * 3, pause=0.02))[0])
    assert status == 408 and "0.15 s" in error["message"]
    assert talk(lambda port: exchange(port))[0] == b""  # of who says nothing


def test_a_body_that_is_waited_for_may_come_later_and_one_that_is_not_does_not_hold_the_connection(hasty):
    body = b"x" * 100
    late = HEAD.replace(b"/ ", b"/late ") + b"Connection: close\r\n\r\n"
    received, _ = talk(lambda port: exchange(port, late, body[:50], body[50:], pause=0.25))
    assert received.startswith(b"HTTP/1.1 200")
    received, seconds = talk(lambda port: exchange(port, HEAD + b"\r\n", *[b"x"] * 3, pause=0.03))
    assert received.startswith(b"HTTP/1.1 200") and received.endswith(b"ok") and seconds < 2


def test_a_connection_that_is_kept_has_as_long_for_each_head(hasty):
    async def client(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(4):
            await asyncio.sleep(0.03)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")
            await asyncio.sleep(0.03)
            writer.write(b"\r\n")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.write(b"GET /")
        rest = await reader.read()
        writer.close()
        return rest

    assert refusal(talk(client))[0] == 408


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (b"\x00\x01\x02\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # without Host
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 2**17, 431),
        (CHUNKS.replace(b"/ ", b"/late ") + b"\r\nx\r\n", 400),
        (CHUNKS.replace(b"/ ", b"/late ") + b"Expect: 100-continue\r\n\r\nx\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: cat\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_what_is_no_http_is_refused_in_json(raw, wanted, caplog):
    status, error = refusal(talk(lambda port: exchange(port, raw))[0])
    assert "Traceback" not in caplog.text and "Exception" not in caplog.text
    assert status == wanted and error.keys() == {"type", "message", "param", "allowed"}


def test_a_body_that_breaks_after_the_answer_breaks_nothing(caplog):
    raw = CHUNKS + b"\r\n5\r\nabcde\r\n"
    received, _ = talk(lambda port: exchange(port, raw, b"nonsense\r\n", pause=0.1))
    assert received.startswith(b"HTTP/1.1 200")
    assert "Traceback" not in caplog.text and "Exception" not in caplog.text


def test_beyond_so_many_connections_the_answer_is_503(monkeypatch):
    monkeypatch.setattr(front, "MAX_CONNECTIONS", 2)
    get = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    async def client(port):
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await asyncio.sleep(0.05)
        refused = (await exchange(port, get))[0]
        idle[0][1].close()
        await asyncio.sleep(0.05)
        served = (await exchange(port, get))[0]
        idle[1][1].close()
        return refused, served

    refused, served = talk(client)
    assert refusal(refused)[0] == 503 and served.startswith(b"HTTP/1.1 200")


def test_who_has_sent_more_than_a_request_and_goes_away_is_missed():
    """What comes behind a request is not read before it is answered, and the end of a connection is."""
    seen = []

    async def waits(scope, receive, send):
        while (message := await receive())["type"] != "http.disconnect":
            assert message["type"] == "http.request"
        seen.append(scope["path"])

    async def client(port):
        for more in (b"", b"\r\n", b"GET /next HTTP/1.1\r\n"):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            for part in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", more, more):
                writer.write(part)
                await asyncio.sleep(0.02)
            writer.close()
            await asyncio.sleep(0.05)

    talk(client, waits)
    assert seen == ["/"] * 3


LARGE = b"x" * 2**24


async def large(scope, receive, send):
    """Answers with more than the system's buffers take."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": LARGE, "more_body": True})
    await send({"type": "http.response.body", "body": b"the end"})


def test_a_client_that_does_not_read_is_let_go_and_one_that_reads_slowly_is_not(monkeypatch):
    monkeypatch.setattr(front, "SEND_SECONDS", 0.15)
    get = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    async def read(port, pause, times):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
        writer.write(get)
        received = b""
        for _ in range(times):
            await asyncio.sleep(pause)
            received += await reader.read(2**19)
        with contextlib.suppress(ConnectionError):
            received += await reader.read()
        writer.close()
        return received

    assert len(talk(lambda port: read(port, 0.5, 1), large)) < len(LARGE)
    monkeypatch.setattr(front, "SEND_SECONDS", 0.5)
    received = talk(lambda port: read(port, 0.03, 30), large)
    assert len(received) > len(LARGE) and b"the end" in received[-100:]


def post(port, **body):
    """(status, answer) of POST /generate."""
    data = json.dumps({"class_labels": 1, "guidance_scale": 1, **body}).encode()
    return ask(port, "/generate", data, {"Content-Type": "application/json"})


def figures(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120) as response:
        return response.read().decode()


def ask(port, path, data=None, headers=types.MappingProxyType({})):
    """(status, answer) of a request."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_process_that_gets_sigterm_draws_what_it_accepted_and_refuses_others(tmp_path):
    """`jaxldm serve` itself, with a worker of its own."""
    pipelines.save(tiny_models.pixel_pipeline(), tmp_path / "model")
    words = [sys.executable, "-m", "jaxldm", "serve", str(tmp_path / "model"), "--port", "0", "--slots", "1"]
    words += ["--max-steps", "1000", "--requests-per-second", "1000", "--burst", "1000"]
    log = tmp_path / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=file, text=True) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1])
        while ask(port, "/ready")[0] == 503:
            time.sleep(0.02)
        answers = []
        body = {"num_inference_steps": 1000, "num_images": 2, "seed": 1}
        drawing = threading.Thread(target=lambda: answers.append(post(port, **body)))
        drawing.start()
        while "jaxldm_slots_busy 1" not in figures(port):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        while ask(port, "/ready")[0] == 200:
            time.sleep(0.01)
        status, refused = post(port, num_inference_steps=1)
        assert status == 503 and refused["error"]["type"] == "shutting_down"
        assert not answers
        drawing.join(120)
        assert answers[0][0] == 200 and len(answers[0][1]["images"]) == 2
        assert process.wait(60) == 0
        with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), 1):
            pass
    assert "Traceback" not in log.read_text()
