"""A whole server of a model, put together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from jaxldm.arguments import (
    check_fields,
    checked,
    count,
    flag,
    instance,
    optional,
    several,
    some_devices,
    text,
)
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.serving.admission import Limits
from jaxldm.serving.application import HttpLimits, application
from jaxldm.serving.embeddings import Embeddings
from jaxldm.serving.engine import SIZES, Engine
from jaxldm.serving.figures import Figures
from jaxldm.serving.jobs import MAX_STEPS, sharing
from jaxldm.serving.requests import MAX_IMAGES, offer_of
from jaxldm.serving.service import Service
from jaxldm.serving.worker import LocalWorker, Made


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


@checked(
    pipe=A_PIPELINE,
    settings=instance(Settings, "Settings(...)"),
    devices=optional(some_devices),
    token=optional(text),
)
def build(
    pipe: Pipeline,
    settings: Settings,
    *,
    devices: Sequence[Any] | None = None,
    token: str | None = None,
) -> Any:
    """The ASGI application that serves a model in this process; it computes while its lifespan lasts.

    Args:
        pipe: the model.
        settings: what it draws, and how much it lets in.
        devices: each has slots of its own; default the first.
        token: that requests must carry; None: anybody may ask.

    Raises:
        JaxldmError: a model that is not one sampling loop, or settings that are not for it.
    """
    worker = LocalWorker(functools.partial(made, pipe, settings, devices))
    return serve_by(Service([worker], settings.limits), settings, token)


def serve_by(
    service: Service, settings: Settings, token: str | None = None, *, only_local: bool = False
) -> Any:
    """The ASGI application of a service, whose first worker loads its model here.

    Args:
        service: not started.
        settings, token: as of `build`.
        only_local: as of `application`.

    Raises:
        JaxldmError: what cannot be served.
    """
    return application(
        service.load(),
        service,
        figures=Figures(service),
        token=token,
        limits=settings.http,
        log_prompts=settings.log_prompts,
        only_local=only_local,
    )
