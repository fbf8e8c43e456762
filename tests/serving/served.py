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


def warm_engine(offer):
    engine = GatedEngine(offer.pipe, sizes=(K,))
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


def drawn_alone(offer, seed, labels, **options):
    images = serving.as_served(offer.pipe, K)(jax.random.key(seed), labels, **options)
    return to_uint8(images)[..., 0]
