"""What a server draws and lets in, and what its workers work with: nothing here speaks HTTP."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxldm.arguments import (
    check_fields,
    checked,
    count,
    flag,
    instance,
    number,
    optional,
    several,
    some_devices,
    text,
)
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.serving.admission import Limits
from jaxldm.serving.embeddings import Embeddings
from jaxldm.serving.engine import SIZES, Engine
from jaxldm.serving.jobs import MAX_STEPS, sharing
from jaxldm.serving.requests import MAX_IMAGES, offer_of
from jaxldm.serving.worker import Made


@dataclasses.dataclass(frozen=True)
class HttpLimits:
    """Bounds of the HTTP side.

    Attributes:
        max_body_bytes: of a request.
        body_seconds: in which it must have arrived.
        ping_seconds: between two comments of a stream in which nothing happens.
    """

    max_body_bytes: int = 2**20
    body_seconds: float = 10.0
    ping_seconds: float = 15.0

    def __post_init__(self):
        check_fields(
            self,
            max_body_bytes=count(1),
            body_seconds=number(above=0),
            ping_seconds=number(above=0),
        )


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server draws, and how much it lets in.

    Attributes:
        name: of the model, in answers.
        slots: the K that are compiled.
        solvers: that requests may name, the default first; () is the model's own.
        sizes: (height, width) that requests may name, likewise.
        max_steps: of one image.
        max_images: of one request.
        embeddings_bytes: memory for what prompts were encoded to.
        limits: of the queue.
        http: of bodies and streams.
        log_prompts: whether the log says what was asked for.
    """

    name: str = "jaxldm"
    slots: tuple[int, ...] = SIZES
    solvers: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    max_steps: int = 250
    max_images: int = MAX_IMAGES
    embeddings_bytes: int = 256 * 2**20
    limits: Limits = dataclasses.field(default_factory=Limits)
    http: HttpLimits = dataclasses.field(default_factory=HttpLimits)
    log_prompts: bool = False

    def __post_init__(self):
        check_fields(
            self,
            name=text,
            slots=several(count(1, 1024)),
            solvers=several(text),
            max_steps=count(1, MAX_STEPS),
            max_images=count(1, 1000),
            embeddings_bytes=count(0, 2**62),
            limits=instance(Limits, "serving.Limits(...)"),
            http=instance(HttpLimits, "HttpLimits(...)"),
            log_prompts=flag,
        )


@checked(
    pipe=A_PIPELINE,
    settings=instance(Settings, "Settings(...)"),
    devices=optional(some_devices),
)
def made(pipe: Pipeline, settings: Settings, devices: Sequence[Any] | None = None) -> Made:
    """What a worker of a model works with, not compiled.

    Args:
        pipe: the model.
        settings: what it draws.
        devices: each has slots of its own; default the first.

    Raises:
        JaxldmError: a model that is not one sampling loop, or settings that are not for it.
    """
    limits = settings.max_steps, settings.max_images
    offer = offer_of(pipe, settings.name, settings.solvers, settings.sizes, *limits)
    embeddings = Embeddings(settings.embeddings_bytes)
    engine = Engine(pipe, sizes=settings.slots, devices=devices, encode=sharing(pipe, embeddings))
    offer.allow(engine)
    return Made(engine, offer, embeddings)
