"""What tests of a server share: an engine that waits for them, and the images that it must draw."""

import base64
import io
import threading
import time

import jax
import numpy as np
from PIL import Image

from jaxldm import serving
from jaxldm.data.images import to_uint8
from jaxldm.serving.service import Service
from jaxldm.serving.worker import LocalWorker, Made

K, MAX_STEPS = 2, 1000


class GatedEngine(serving.Engine):
    """An engine that takes a step only while its gate is open."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gate = threading.Event()
        self.gate.set()

    def step(self, wanted=frozenset()):
        assert self.gate.wait(20)
        return super().step(wanted)


def warm_engine(pipe, offer):
    engine = GatedEngine(pipe, sizes=(K,))
    offer.allow(engine)
    engine.warm_up()
    engine.warm_up = lambda: None  # once for all tests
    return engine


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def service_of(engine, limits=None):
    """A service of an engine in this process."""
    service = Service([LocalWorker(lambda: Made(engine))], limits)
    service.load()
    return service


def drawn_alone(pipe, seed, labels, **options):
    images = serving.as_served(pipe, K)(jax.random.key(seed), labels, **options)
    return to_uint8(images)[..., 0]
