"""The HTTP application, in this process: answers, refusals, streams, cancellation, bounds."""

import asyncio
import contextlib
import functools
import json
import threading

import numpy as np
import pytest
from served import MAX_STEPS, K, drawn_alone, pixels, service_of, wait_until, warm_engine
from starlette.testclient import TestClient

from jaxldm import serving
from jaxldm.serving.application import HttpLimits, application
from jaxldm.serving.figures import Figures
from jaxldm.serving.pictures import is_previewed


@pytest.fixture(scope="module")
def spare(pipe, offer):
    """Of servers of one test each."""
    return warm_engine(pipe, offer)


@contextlib.contextmanager
def serve(offer, engine, *, limits=None, http=None, token=None, log_prompts=False):
    engine.gate.set()
    service = service_of(engine, limits or serving.Limits(burst=1000, requests_per_second=1000))
    options = {"limits": http, "token": token, "log_prompts": log_prompts}
    app = application(offer, service, figures=Figures(service), **options)
    with TestClient(app) as client:
        wait_until(lambda: service.ready)
        client.service = service
        yield client
        engine.gate.set()


@pytest.fixture(scope="module")
def client(offer, engine):
    with serve(offer, engine) as client:
        yield client


def events_of(text):
    """[(event, data)] of a stream."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    lines = (block.split("\n") for block in blocks)
    return [(one.removeprefix("event: "), json.loads(two.removeprefix("data: "))) for one, two in lines]


def test_the_images_are_those_of_the_pipeline(client, pipe):
    body = {"class_labels": [2, 0, 1], "seed": 7, "num_inference_steps": 3, "guidance_scale": 2.5}
    answer = client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    facts = answer.json()
    assert facts["seed"] == 7 and facts["slots"] == K and facts["num_inference_steps"] == 3
    alone = drawn_alone(pipe, 7, [2, 0, 1], num_inference_steps=3, guidance_scale=2.5)
    np.testing.assert_array_equal(np.stack([pixels(text) for text in facts["images"]]), alone)


def test_a_request_as_openai_s_clients_send_it(client, pipe):
    body = {"model": "digits", "prompt": "1", "n": 2, "size": "8x8", "response_format": "b64_json", "seed": 3}
    answer = client.post("/v1/images/generations", json=body | {"num_inference_steps": 2, "user": "me"})
    assert answer.status_code == 200, answer.text
    facts = answer.json()
    assert facts["output_format"] == "png" and isinstance(facts["created"], int)
    alone = drawn_alone(pipe, 3, [1], num_images=2, num_inference_steps=2)
    np.testing.assert_array_equal(np.stack([pixels(one["b64_json"]) for one in facts["data"]]), alone)
    assert client.get("/v1/models").json()["data"][0]["id"] == "digits"


def test_openai_s_own_client_gets_images_and_errors(client, pipe):
    import openai

    theirs = openai.OpenAI(base_url="http://testserver/v1", api_key="x", http_client=client, max_retries=0)
    more = {"seed": 3, "num_inference_steps": 2}
    answer = theirs.images.generate(prompt="1", model="digits", n=2, size="8x8", extra_body=more)
    alone = drawn_alone(pipe, 3, [1], num_images=2, num_inference_steps=2)
    np.testing.assert_array_equal(np.stack([pixels(one.b64_json) for one in answer.data]), alone)
    assert [model.id for model in theirs.models.list().data] == ["digits"]
    with pytest.raises(
        openai.BadRequestError, match="n must be a whole number from 1 to 10, got 11"
    ) as error:
        theirs.images.generate(prompt="1", n=11)
    assert error.value.body["param"] == "n"
    with pytest.raises(openai.NotFoundError, match="there is no model 'x' here"):
        theirs.images.generate(prompt="1", model="x")


def test_openai_s_own_client_streams_images_and_previews(client, pipe):
    import openai

    theirs = openai.OpenAI(base_url="http://testserver/v1", api_key="x", http_client=client, max_retries=0)
    more = {"seed": 4, "num_inference_steps": 6}
    options = {"stream": True, "partial_images": 2, "size": "8x8", "extra_body": more}
    events = list(theirs.images.generate(prompt="1", model="digits", **options))
    assert {event.type for event in events[:-1]} <= {"image_generation.partial_image"}
    for number, event in enumerate(events[:-1]):
        assert event.partial_image_index == number and pixels(event.b64_json).shape == (4, 4)
    last = events[-1]
    assert last.type == "image_generation.completed" and last.size == "8x8" and last.output_format == "png"
    alone = drawn_alone(pipe, 4, [1], num_inference_steps=6)[0]
    np.testing.assert_array_equal(pixels(last.b64_json), alone)
    with pytest.raises(openai.BadRequestError, match="partial_images must be a whole number") as error:
        theirs.images.generate(prompt="1", stream=True, partial_images=99)
    assert error.value.body["param"] == "partial_images"


def test_openai_s_own_client_is_told_of_a_failure_in_a_stream_and_cancels(client, engine):
    import openai

    theirs = openai.OpenAI(base_url="http://testserver/v1", api_key="x", http_client=client, max_retries=0)
    engine.gate.clear()
    threading.Timer(0.3, engine.gate.set).start()
    more = {"num_inference_steps": 2, "timeout": 0.1}
    with pytest.raises(openai.APIError, match=r"not done within timeout=0\.1 s"):
        list(theirs.images.generate(prompt="1", stream=True, extra_body=more))
    wait_until(lambda: engine.busy == 0)
    more = {"prompt": "1", "num_inference_steps": MAX_STEPS, "stream": True}
    engine.gate.clear()
    cancelled = client.service.counters["cancelled"]
    gone = functools.partial(wait_until, lambda: engine.busy == 1)
    asgi(client.app, [json.dumps(more).encode()], gone=gone, path="/v1/images/generations")
    engine.gate.set()
    wait_until(lambda: engine.busy == 0)
    assert client.service.counters["cancelled"] == cancelled + 1


def test_requests_at_one_time_get_their_own_images(client, pipe):
    calls = [{"class_labels": n % 3, "seed": n, "num_inference_steps": 2 + n % 4} for n in range(8)]
    answers = {}

    def ask(n):
        answers[n] = client.post("/generate", json=calls[n]).json()

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for n, call in enumerate(calls):
        alone = drawn_alone(pipe, n, [n % 3], num_inference_steps=call["num_inference_steps"])[0]
        np.testing.assert_array_equal(pixels(answers[n]["images"][0]), alone)
    assert len({answer["id"] for answer in answers.values()}) == len(calls)


def test_a_stream_says_how_far_each_image_is(client, pipe):
    body = {"class_labels": [1], "seed": 4, "num_inference_steps": 6, "stream": True, "previews": 2}
    answer = client.post("/generate", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    names = [name for name, _ in events if name not in ("progress", "queue")]
    assert names == ["accepted", "image", "done"]
    assert events[0][1]["seed"] == 4 and events[0][1]["id"] == answer.headers["x-request-id"]
    steps = [data["step"] for name, data in events if name == "progress"]
    assert steps == sorted(steps) and set(steps) <= set(range(1, 6))
    image = next(data for name, data in events if name == "image")
    alone = drawn_alone(pipe, 4, [1], num_inference_steps=6)[0]
    np.testing.assert_array_equal(pixels(image["b64"]), alone)
    previews = [data for name, data in events if name == "progress" and "preview" in data]
    assert len(previews) <= 2
    for data in previews:  # of steps 2 and 4; a reader who is slow has the last of them with a later step
        assert data["step"] >= 2 and pixels(data["preview"]).shape == (4, 4)


@pytest.mark.parametrize(("total", "previews"), [(10, 2), (50, 12), (3, 5), (1, 4), (7, 0)])
def test_there_are_as_many_previews_as_were_asked_for(total, previews):
    places = [done for done in range(1, total + 1) if is_previewed(done, total, previews)]
    assert len(places) == min(previews, total - 1) and total not in places


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"type", "message", "param", "allowed"} and "\n" not in error["message"]
    return error


def test_refusals_are_json_that_says_what_to_send(client):
    wrong = {"class_labels": 1, "num_images": 99}
    error = error_of(client.post("/generate", json=wrong), 400)
    assert error["param"] == "num_images" and error["allowed"]["maximum"] == 10
    error = error_of(client.post("/generate", json={"class_labels": ["seven"]}), 400)  # found by the pipeline
    assert error["param"] == "class_labels" and "give 'seven' as a number" in error["message"]
    error_of(client.post("/generate", content=b"{", headers={"Content-Type": "application/json"}), 400)
    error_of(client.post("/generate", content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    large = b" " * (2**20 + 1)
    error_of(client.post("/generate", content=large, headers={"Content-Type": "application/json"}), 413)
    assert "/openapi.json" in error_of(client.get("/nothing"), 404)["message"]
    assert "'/x'" in error_of(client.get("/x", headers={"Host": "["}), 404)["message"]
    error_of(client.get("/models/", follow_redirects=False), 404)  # not sent to where its Host says
    assert "takes POST, got GET" in error_of(client.get("/generate"), 405)["message"]
    assert client.get("/generate").headers["allow"] == "POST"
    assert "base_url with /v1" in error_of(client.post("/images/generations"), 404)["message"]
    error_of(client.delete("/requests/x"), 404)
    error = error_of(client.post("/v1/images/generations", json={"prompt": "1", "model": "x"}), 404)
    assert error["type"] == "model_not_found" and error["allowed"] == ["digits"]
    for prompt, message in (("", "prompt must be 1 to 10 labels"), ("a cat", "give 'a cat' as a number")):
        for stream in (False, True):
            body = {"prompt": prompt, "stream": stream}
            error = error_of(client.post("/v1/images/generations", json=body), 400)
            assert error["param"] == "prompt" and message in error["message"]


def test_what_watches_over_a_server_finds_its_answers(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"ready": True}
    model = client.get("/models").json()["models"][0]
    assert model["id"] == "digits" and model["num_classes"] == 3 and model["slots"] == [K]
    document = client.get("/openapi.json").json()
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["class_labels"] and body["properties"]["num_images"]["maximum"] == 10
    text = client.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["jaxldm_ready"]) == 1 and float(figures["jaxldm_slots"]) == 2 * K
    assert float(figures["jaxldm_images_total"]) >= 1
    assert float(figures['jaxldm_requests_total{code="200",path="/generate"}']) >= 1
    assert "seven" not in text


def test_delete_ends_a_request_before_its_next_step(client, engine):
    engine.gate.clear()
    answers = []
    body = {"class_labels": 1, "num_inference_steps": MAX_STEPS}
    thread = threading.Thread(target=lambda: answers.append(client.post("/generate", json=body)))
    thread.start()
    wait_until(lambda: engine.busy == 1)
    (order_id,) = client.service._orders
    assert client.delete(f"/requests/{order_id}").json() == {"id": order_id, "cancelled": True}
    steps = client.service.counters["steps"]
    engine.gate.set()
    thread.join(10)
    assert error_of(answers[0], 409)["type"] == "cancelled"
    wait_until(lambda: engine.busy == 0)
    assert client.service.counters["steps"] - steps <= 2
    error_of(client.delete(f"/requests/{order_id}"), 404)


def test_too_many_requests_are_told_when_to_come_again(offer, spare):
    with serve(offer, spare, limits=serving.Limits(requests_per_second=0.5, burst=1)) as client:
        assert client.post("/generate", json={"class_labels": 1, "num_inference_steps": 1}).status_code == 200
        answer = client.post("/generate", json={"class_labels": 1, "num_inference_steps": 1})
        assert error_of(answer, 429)["type"] == "rate_limit_exceeded"
        assert 1 <= int(answer.headers["retry-after"]) <= 2
        assert 'jaxldm_refused_total{type="rate_limit_exceeded"} 1.0' in client.get("/metrics").text


def test_a_full_queue_refuses_and_what_was_accepted_is_drawn(offer, spare):
    with serve(offer, spare, limits=serving.Limits(max_queue=1, burst=100)) as client:
        spare.gate.clear()
        answers, threads = [], []

        def ask(seed):
            body = {"class_labels": 1, "num_images": K, "num_inference_steps": 2, "seed": seed}
            answers.append(client.post("/generate", json=body))

        for seed in range(2):  # one has all slots, the other waits for it to end
            threads.append(threading.Thread(target=ask, args=(seed,)))
            threads[-1].start()
            wait_until(lambda: spare.busy >= 1)
            wait_until(lambda seed=seed: client.service.waiting == seed)
        ask(2)
        assert error_of(answers.pop(), 429)["type"] == "queue_full"
        spare.gate.set()
        for thread in threads:
            thread.join(10)
        assert [answer.status_code for answer in answers] == [200, 200]


def test_a_timeout_that_cannot_be_kept_is_refused_or_ends_the_request(offer, spare):
    with serve(offer, spare) as client:
        body = {"class_labels": 1, "num_inference_steps": MAX_STEPS, "num_images": 10, "timeout": 1e-4}
        assert error_of(client.post("/generate", json=body), 429)["type"] == "deadline_too_short"
        spare.gate.clear()
        threading.Timer(0.3, spare.gate.set).start()
        body = {"class_labels": 1, "num_inference_steps": 2, "timeout": 0.2}
        assert error_of(client.post("/generate", json=body), 504)["type"] == "deadline_exceeded"
        wait_until(lambda: spare.busy == 0)


def test_only_those_with_the_token_are_served(offer, spare):
    with serve(offer, spare, token="secret") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            error_of(client.get("/models", headers=headers), 401)
        assert client.get("/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_server_without_a_token_answers_to_localhost_alone(offer, spare):
    app = application(offer, service_of(spare), only_local=True)
    client = TestClient(app)
    for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "127.1.2.3"):
        assert client.get("/models", headers={"Host": host}).status_code == 200
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:8000",
        "",
        "localhost@evil",
    ):
        error = error_of(client.get("/models", headers={"Host": host}), 421)
        assert error["param"] == "Host" and "start it with a token" in error["message"]


def test_a_server_that_is_stopped_finishes_what_it_accepted(offer, spare):
    with serve(offer, spare) as client:
        spare.gate.clear()
        answers = []
        body = {"class_labels": 1, "num_inference_steps": 3, "seed": 1}
        thread = threading.Thread(target=lambda: answers.append(client.post("/generate", json=body)))
        thread.start()
        wait_until(lambda: spare.busy == 1)
        client.service.drain()
        error = error_of(client.post("/generate", json=body), 503)
        assert error["type"] == "shutting_down" and client.get("/ready").status_code == 503
        spare.gate.set()
        thread.join(10)
        assert answers[0].status_code == 200


def test_an_engine_that_breaks_fails_its_requests_and_says_so(offer, spare, monkeypatch):
    with serve(offer, spare) as client:

        def fail(wanted=frozenset()):
            raise ValueError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(spare, "step", fail)
            answer = client.post("/generate", json={"class_labels": 1})
            assert "a bug" in error_of(answer, 500)["message"]
        assert client.get("/health").status_code == 500 and client.get("/ready").status_code == 503
        assert error_of(client.post("/generate", json={"class_labels": 1}), 503)["type"] == "server_error"
    for table in spare.tables:
        table.clear()


def asgi(app, chunks, *, gone=None, path="/generate"):
    """One POST by hand: the body in chunks (None is a chunk that never comes); the status, or None."""

    async def talk():
        left, sent = list(chunks), []
        forever = asyncio.Event()

        async def receive():
            if not left:
                await (forever.wait() if gone is None else asyncio.to_thread(gone))
                return {"type": "http.disconnect"}
            chunk = left.pop(0)
            if chunk is None:
                await forever.wait()
            return {"type": "http.request", "body": chunk, "more_body": bool(left)}

        async def collect(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "headers": headers,
        }
        scope |= {"query_string": b"", "client": ("127.0.0.1", 1), "server": ("x", 80), "scheme": "http"}
        scope |= {"http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": ""}
        with contextlib.suppress(OSError):
            await asyncio.wait_for(app(scope, receive, collect), 10)
        return next((message["status"] for message in sent if "status" in message), None)

    return asyncio.run(talk())


def test_a_closed_connection_cancels_its_request(client, engine):
    engine.gate.clear()
    body = json.dumps({"class_labels": [1], "num_inference_steps": MAX_STEPS}).encode()
    cancelled = client.service.counters["cancelled"]
    asgi(client.app, [body], gone=lambda: wait_until(lambda: engine.busy == 1))
    engine.gate.set()
    wait_until(lambda: engine.busy == 0)
    assert client.service.counters["cancelled"] == cancelled + 1


def test_a_stream_whose_reader_is_gone_is_cancelled(client, engine):
    engine.gate.clear()
    body = json.dumps({"class_labels": [1], "num_inference_steps": MAX_STEPS, "stream": True}).encode()
    cancelled = client.service.counters["cancelled"]
    status = asgi(client.app, [body], gone=lambda: wait_until(lambda: engine.busy == 1))
    assert status in (200, None)
    engine.gate.set()
    wait_until(lambda: engine.busy == 0)
    assert client.service.counters["cancelled"] == cancelled + 1


def test_a_slow_sender_is_not_waited_for(offer, spare):
    with serve(offer, spare, http=HttpLimits(body_seconds=0.05)) as client:
        assert asgi(client.app, [b'{"class', None]) == 408


def test_a_stream_in_which_nothing_happens_has_pings(offer, spare):
    with serve(offer, spare, http=HttpLimits(ping_seconds=0.02)) as client:
        spare.gate.clear()
        threading.Timer(0.2, spare.gate.set).start()
        body = {"class_labels": [1], "num_inference_steps": 2, "stream": True}
        text = client.post("/generate", json=body).text
        assert ": ping\n\n" in text and events_of(text)[-1][0] == "done"


@pytest.fixture
def logged(caplog):
    """What was logged of requests, as JSON."""
    caplog.set_level("INFO", "jaxldm.serving")
    return lambda: [json.loads(record.message) for record in caplog.records if "path" in record.message]


def test_each_request_is_a_line_of_the_log_when_it_is_done_without_what_it_asked_for(client, logged):
    body = {"class_labels": [1, 2], "num_inference_steps": 3, "seed": 5}
    answer = client.post("/generate", json=body).json()
    client.post("/generate", json=body | {"stream": True})
    client.post("/generate", json=body | {"seed": -1})
    client.post("/generate", json=body | {"stream": True, "class_labels": ["seven"]})
    client.get("/models")
    one, stream, wrong, unknown, models = logged()
    facts = {"path": "/generate", "images": 2, "steps": 3, "seed": 5, "status": 200}
    assert one.pop("seconds") > 0 and one == facts | {"id": answer["id"]}
    assert stream.pop("seconds") > 0 and stream.pop("id") and stream == facts
    assert wrong["status"] == 400 and wrong["ended"] == "invalid_request_error" and "id" not in wrong
    assert unknown["ended"] == "invalid_request_error"
    assert models["path"] == "/models" and set(models) == {"path", "status", "seconds"}


def test_the_log_says_how_a_request_ended_and_what_it_asked_for_where_it_is_told_to(offer, spare, logged):
    with serve(offer, spare, log_prompts=True) as client:
        spare.gate.clear()
        threading.Timer(0.3, spare.gate.set).start()
        body = {"class_labels": [1], "num_inference_steps": 2, "timeout": 0.2, "stream": True}
        client.post("/generate", json=body)
        wait_until(lambda: spare.busy == 0)
        body = {"class_labels": [1], "num_inference_steps": MAX_STEPS, "stream": True}
        asgi(client.app, [json.dumps(body).encode()], gone=lambda: wait_until(lambda: spare.busy == 1))
    late, gone = logged()
    assert late["ended"] == "deadline_exceeded" and gone["ended"] == "cancelled"
    assert gone["prompts"] == late["prompts"] == [[1]]
