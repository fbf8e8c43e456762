"""A server that is sent pictures to start from, and its worker; what is drawn is in `test_slots`."""

import base64
import dataclasses
import io
import threading

import jax
import numpy as np
import pytest
import tiny_models
from PIL import Image
from served import wait_until
from starlette.testclient import TestClient

from jaxldm import serving
from jaxldm.serving import application as http
from jaxldm.serving import pictures, worker
from jaxldm.serving.engine import Drawn
from jaxldm.serving.messages import Cancel, Prepare, Prepared, Stop
from jaxldm.serving.orders import Task
from jaxldm.serving.requests import offer_of
from jaxldm.serving.service import Service
from jaxldm.serving.worker import LocalWorker, Made, Worker

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)


def in_png():
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    return stream.getvalue()


def coded(content):
    return base64.b64encode(content).decode()


PNG = in_png()
BODY = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 1, "seed": 3}


class Pretending(serving.Engine):
    """An engine of a small model of classes, which draws them whatever the text and the picture are."""

    def prepare(self, key, *prompts, num_inference_steps=None, num_images_per_prompt=1, **options):
        self.pictures = [*getattr(self, "pictures", ()), options.get("image")]
        labels = [0] * num_images_per_prompt
        return super().prepare(key, labels, num_inference_steps=num_inference_steps, guidance_scale=1)


@pytest.fixture(scope="module")
def engine():
    engine = Pretending(tiny_models.pixel_pipeline(), sizes=(2,))
    engine.allow([0], guidance_scale=1)
    engine.warm_up()
    engine.warm_up = lambda: None  # once for all tests
    return engine


@pytest.fixture(scope="module")
def client(engine):
    offer = offer_of(engine.pipe, "cats")
    offer = dataclasses.replace(offer, draws_texts=True, takes_images=True, num_classes=None)
    service = Service([LocalWorker(lambda: Made(engine))], serving.Limits(burst=1000))
    service.load()
    with TestClient(http.application(offer, service)) as client:
        wait_until(lambda: service.ready)
        client.service = service
        yield client


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
def test_the_picture_of_a_request_reaches_the_engine(client, engine, path, caplog):
    caplog.set_level("INFO", "jaxldm.serving")
    body = BODY | {"image": "data:image/png;base64," + coded(PNG), "strength": 0.5}
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(np.asarray(engine.pictures[-1]), PIXELS)
    assert answer.json()["num_inference_steps"] == 4  # as in the call that draws it alone
    assert '"steps": 2' in caplog.text  # and what it took
    assert coded(PNG)[:20] not in caplog.text


REFUSED = {
    "cut off": ({"image": coded(PNG[:-200])}, "image", "cannot be read as a picture"),
    "strength alone": ({"strength": 0.5}, "strength", "send image, too"),
    "strength as text": ({"image": coded(PNG), "strength": "0.5"}, "strength", "got '0.5'"),
    "strength 0": ({"image": coded(PNG), "strength": 0}, "strength", "got 0"),
    "strength true": ({"image": coded(PNG), "strength": True}, "strength", "got True"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_image_can_be_drawn_from_is_refused_in_words(client, name, stream):
    more, param, message = REFUSED[name]
    answer = client.post("/generate", json=BODY | more | {"stream": stream})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error" and "0x" not in error["message"]
    assert client.service.open_orders == 0


def test_pictures_are_opened_next_to_the_event_loop_and_not_in_it(client, monkeypatch):
    threads, opened = [], pictures._size_of

    def watched(*args):
        threads.append(threading.current_thread().name)
        return opened(*args)

    monkeypatch.setattr(pictures, "_size_of", watched)
    assert client.post("/generate", json=BODY | {"image": coded(PNG)}).status_code == 200
    assert threads == ["AnyIO worker thread"]


@pytest.mark.parametrize("begun", [True, False])
def test_an_order_that_is_cancelled_while_its_picture_is_decoded_leaves_nothing(engine, monkeypatch, begun):
    inside, go_on, reports = threading.Semaphore(0), threading.Event(), []
    prepare = engine.prepare

    def slow(*args, **options):
        inside.release()
        assert go_on.wait(10)
        return prepare(*args, **options)

    monkeypatch.setattr(engine, "prepare", slow)
    at_work = Worker(Made(engine), reports.append)
    at_work.start()
    options = {"image": PNG}
    for number in range(3):  # two are decoded, and one waits for that
        at_work.send(Prepare(Task(str(number), "", ("a", None), options, 1, 1, 4, False, "png", False, 0)))
    for _ in range(2):
        assert inside.acquire(timeout=10)
    cancelled = "0" if begun else "2"
    at_work.send(Cancel(cancelled))
    wait_until(lambda: not at_work._cancelled)
    go_on.set()
    wait_until(lambda: len([report for report in reports if isinstance(report, Prepared)]) == 2)
    at_work._prepare.shutdown()
    assert at_work._jobs.keys() == at_work._tasks.keys() == {"0", "1", "2"} - {cancelled}
    assert len([report for report in reports if isinstance(report, Prepared)]) == 2
    assert inside.acquire(blocking=False) is begun  # what was cancelled before is not decoded at all
    at_work.send(Stop())
    at_work.join(10)


class Panic(BaseException):
    """As extensions in Rust raise, which is no `Exception`."""


def test_whatever_is_raised_while_an_order_is_prepared_its_client_is_told(client, engine, monkeypatch):
    def fail(*args, **options):
        raise Panic("in a tokenizer")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "prepare", fail)
        answer = client.post("/generate", json=BODY)
        assert answer.status_code == 500 and "Panic: in a tokenizer" in answer.json()["error"]["message"]
    with monkeypatch.context() as patch:
        patch.setattr(worker, "picture_bytes", fail)
        assert client.post("/generate", json=BODY).status_code == 500
    assert client.post("/generate", json=BODY).status_code == 200 and client.service.open_orders == 0


@pytest.mark.parametrize("scale, status, param", [(900, 400, "guidance_scale"), (1, 500, None)])
def test_an_image_that_overflows_is_the_fault_of_a_large_guidance_scale_if_there_is_one(
    client, engine, monkeypatch, scale, status, param
):
    step = engine.step

    def to_nan(wanted):
        seen, drawn, failed = step(wanted)
        return seen, [one._replace(latents=one.latents * np.nan) for one in drawn], failed

    monkeypatch.setattr(engine, "step", to_nan)
    answer = client.post("/generate", json=BODY | {"guidance_scale": scale})
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param
    assert error["message"].startswith("the image came out as NaN or infinity: ")


def test_parameters_that_are_not_finite_are_named_and_no_client_is_blamed(engine, monkeypatch):
    pipe, reports = engine.pipe, []
    broken = jax.tree.map(lambda leaf: np.full_like(np.asarray(leaf), np.inf), pipe.denoiser.params)
    monkeypatch.setattr(engine, "pipe", pipe.replace(denoiser=pipe.denoiser.replace(params=broken)))
    task = Task("a", "", (), {"guidance_scale": 900.0}, 1, 1, 4, True, "png", False, 0)
    latents = np.full(engine.kinds[0].compiled.latent_shape, np.nan, np.float32)
    Worker(Made(engine), reports.append)._finish_images([(task, Drawn("a", 0, latents, 2, jax.devices()[0]))])
    (failure,) = (report.event for report in reports)
    assert failure.type == "server_error" and f"{pipe.denoiser_name} holds NaN or infinity" in failure.message


def test_an_image_that_overflows_takes_none_with_it_that_ended_together(engine):
    reports = []
    at_work = Worker(Made(engine), reports.append)
    shape = engine.kinds[0].compiled.latent_shape
    tasks = [Task(name, "", (), {}, 1, 1, 4, False, "png", False, 0) for name in "abc"]
    numbers = [np.full(shape, number, np.float32) for number in (0.5, np.nan, -0.5)]
    drawn = [
        Drawn(task.id, 0, latents, 2, jax.local_devices()[0])
        for task, latents in zip(tasks, numbers, strict=True)
    ]
    at_work._finish_images([*zip(tasks, drawn, strict=True)])
    events = {report.order_id: report.event for report in reports}
    assert events["b"].type == "server_error" and "NaN" in events["b"].message
    for name, level in (("a", 191), ("c", 64)):
        assert np.all(np.abs(np.asarray(Image.open(io.BytesIO(events[name].content)), int) - level) <= 1)
