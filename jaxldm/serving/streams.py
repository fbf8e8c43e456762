"""Answers as server-sent events: ours, and those that OpenAI's clients expect."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from jaxldm.serving.orders import Accepted, Event, Failed, Picture, Progress, Waiting
from jaxldm.serving.pictures import picture_bytes

PREVIEW_FORMAT = "png"


class EventStream(StreamingResponse):
    """Server-sent events."""

    def __init__(self, events: AsyncIterator[bytes], headers: dict[str, str]):
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._then: list[Callable[[], Any]] = []

    def then(self, call: Callable[[], Any]) -> EventStream:
        """Has something called when the last event was sent, or the reader is gone."""
        self._then.append(call)
        return self

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for call in self._then:
                call()


class OurEvents:
    """The events accepted, queue, progress, image, done and error."""

    def first(self, facts: dict[str, Any]) -> bytes:
        """Of an order that was accepted."""
        return _event("accepted", facts)

    def last(self, facts: dict[str, Any]) -> bytes:
        """Of an order that is done."""
        return _event("done", facts)

    def of(self, event: Event) -> bytes:
        """Of anything between."""
        if isinstance(event, Picture):
            facts = {"image": event.image, "slots": event.slots, "b64": _base64(event.content)}
            return _event("image", facts)
        if isinstance(event, Waiting):
            return _event("queue", {"ahead": event.ahead, "seconds": round(event.seconds, 1)})
        assert isinstance(event, Progress)
        facts: dict[str, Any] = {"image": event.image, "step": event.done, "steps": event.total}
        if event.preview is not None:
            facts["preview"] = _small(event.preview, PREVIEW_FORMAT)
        return _event("progress", facts)


class OpenAIEvents:
    """The events image_generation.partial_image and image_generation.completed, one for each image.

    Args:
        size: of the images, as WIDTHxHEIGHT.
        format: of the images, and of those on the way.
    """

    def __init__(self, size: str, format: str):
        self._format = format
        self._facts = {"size": size, "output_format": format, "background": "opaque", "quality": "auto"}
        self._partial: dict[int, int] = {}  # how many there were, by image

    def first(self, facts: dict[str, Any]) -> bytes:
        """Nothing but a comment: there is no such event."""
        return b": accepted\n\n"

    def last(self, facts: dict[str, Any]) -> bytes:
        """Likewise."""
        return b": done\n\n"

    def of(self, event: Event) -> bytes:
        """Of a picture, done or on its way; nothing of others."""
        if isinstance(event, Picture):
            tokens = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
            usage = tokens | {"input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
            return self._event("completed", event.image, _base64(event.content), usage=usage)
        if not isinstance(event, Progress) or event.preview is None:
            return b""
        number = self._partial.get(event.image, 0)
        self._partial[event.image] = number + 1
        small = _small(event.preview, self._format)
        return self._event("partial_image", event.image, small, partial_image_index=number)

    def _event(self, name: str, image: int, content: str, **more: Any) -> bytes:
        kind = f"image_generation.{name}"
        facts = {"type": kind, "b64_json": content, "created_at": int(time.time()), "image": image}
        return _event(kind, facts | self._facts | more)


async def stream(
    names: OurEvents | OpenAIEvents,
    events: AsyncIterator[Event],
    first: dict[str, Any],
    failed: Callable[[Failed], dict[str, Any]],
    done: Callable[[int | None], dict[str, Any]],
    ping_seconds: float,
) -> AsyncIterator[bytes]:
    """What is sent of the events of an order.

    Args:
        names: how events are called.
        events: up to the last picture or a failure.
        first: said at the start.
        failed: what is said of a failure.
        done: what is said at the end, of the K of the last picture.
        ping_seconds: between two comments while nothing happens.
    """
    yield names.first(first)
    slots = None
    async for event in _with_pings(events, ping_seconds):
        if event is None:
            yield b": ping\n\n"
        elif isinstance(event, Failed):
            yield _event("error", failed(event))
            return
        elif not isinstance(event, Accepted):
            slots = event.slots if isinstance(event, Picture) else slots
            part = await run_in_threadpool(names.of, event)
            if part:
                yield part
    yield names.last(done(slots))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _small(preview: np.ndarray, format: str) -> str:
    return _base64(picture_bytes(np.asarray(preview), format))


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


async def _with_pings(events: AsyncIterator[Event], seconds: float) -> AsyncIterator[Event | None]:
    """The events, and None whenever none came for so long."""
    following: Any = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events, None))
            done, _ = await asyncio.wait([following], timeout=seconds)
            if not done:
                yield None
                continue
            event, following = following.result(), None
            if event is None:
                return
            yield event
    finally:
        if following is not None:
            following.cancel()
