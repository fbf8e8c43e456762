"""A whole server of a model, put together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jaxldm.arguments import checked, instance, optional, some_devices, text
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.serving.application import application
from jaxldm.serving.figures import Figures
from jaxldm.serving.service import Service
from jaxldm.serving.settings import Settings, made
from jaxldm.serving.worker import LocalWorker


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
