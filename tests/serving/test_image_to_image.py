"""A server that is sent pictures to start from, and its worker; what is drawn is in `test_slots`."""

import base64
import dataclasses
import io
import threading

import numpy as np
import pytest
import tiny_models
from PIL import Image
from served import wait_until
from starlette.testclient import TestClient

from jaxldm import serving
from jaxldm.serving import application as http
from jaxldm.serving import pictures
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
    worker = Worker(Made(engine), reports.append)
    worker.start()
    options = {"image": PNG}
    for number in range(3):  # two are decoded, and one waits for that
        worker.send(Prepare(Task(str(number), "", ("a", None), options, 1, 1, 4, False, "png", False, 0)))
    for _ in range(2):
        assert inside.acquire(timeout=10)
    cancelled = "0" if begun else "2"
    worker.send(Cancel(cancelled))
    wait_until(lambda: not worker._cancelled)
    go_on.set()
    wait_until(lambda: len([report for report in reports if isinstance(report, Prepared)]) == 2)
    worker._prepare.shutdown()
    assert worker._jobs.keys() == worker._tasks.keys() == {"0", "1", "2"} - {cancelled}
    assert len([report for report in reports if isinstance(report, Prepared)]) == 2
    assert inside.acquire(blocking=False) is begun  # what was cancelled before is not decoded at all
    worker.send(Stop())
    worker.join(10)
