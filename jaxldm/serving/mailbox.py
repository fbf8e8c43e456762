"""What the engine's threads tell one request in the event loop, in bounded memory."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator

from jaxldm.serving.orders import Event, Failed, Picture, Progress, Waiting


class Mailbox:
    """Events of one order, from any thread to one coroutine.

    Of progress only the latest of each image is kept, and the latest place in the queue: a client that reads
    slowly misses some, and holds nothing up.

    Args:
        num_images: pictures until the order is done.
    """

    def __init__(self, num_images: int):
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._latest: dict[int | None, Progress | Waiting] = {}  # None is the place in the queue
        self._others: collections.deque[Event] = collections.deque()
        self._left = num_images

    def put(self, event: Event) -> None:
        """From any thread; what comes after the event loop has ended is dropped."""
        try:
            self._loop.call_soon_threadsafe(self._put, event)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _put(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._latest.pop(None, None)
            unseen = self._latest.get(event.image)
            if isinstance(unseen, Progress) and event.preview is None:
                event = event._replace(preview=unseen.preview)
            self._latest[event.image] = event
        elif isinstance(event, Waiting):
            self._latest[None] = event
        else:
            self._others.append(event)
        self._arrived.set()

    async def _next(self) -> Event:
        """The next event; what came with it stays for whoever asks next."""
        while not (self._latest or self._others):
            self._arrived.clear()
            await self._arrived.wait()
        if self._latest:
            return self._latest.pop(next(iter(self._latest)))
        return self._others.popleft()

    async def events(self) -> AsyncIterator[Event]:
        """All that happens, up to the last picture or a failure."""
        while self._left > 0:
            event = await self._next()
            if isinstance(event, Failed):
                self._left = 0
            self._left -= isinstance(event, Picture)
            yield event

    async def accepted(self) -> Failed | None:
        """Waits until the order was checked; what went wrong, or None."""
        while not self._others:  # what came of progress stays for `events`
            self._arrived.clear()
            await self._arrived.wait()
        event = self._others.popleft()
        return event if isinstance(event, Failed) else None
