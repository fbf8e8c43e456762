"""What worker processes of tests are made by: functions of a module, which another process can import."""

import os
import time

import tiny_models

from jaxldm import serving
from jaxldm.errors import InvalidArgumentError
from jaxldm.serving.requests import offer_of
from jaxldm.serving.worker import Made

K, SCALE = 2, 2.0


class SlowEngine(serving.Engine):
    """An engine that takes its time, so that there is something to interrupt."""

    def step(self, wanted=frozenset()):
        time.sleep(0.02)
        return super().step(wanted)


def tiny():
    """A model that compiles in a second, guided only."""
    pipe = tiny_models.pixel_pipeline()
    engine = SlowEngine(pipe, sizes=(K,))
    engine.allow([0], guidance_scale=SCALE)
    return Made(engine, offer_of(pipe, "tiny"))


def tiny_and_noted(folder):
    """The same; a file in that folder is named after the process that has started this one."""
    (folder / str(os.getppid())).touch()
    return tiny()


def nothing():
    """What cannot be loaded."""
    raise InvalidArgumentError("there is no such model")
