"""uvicorn with what it lacks: bounds on how long requests take to arrive and answers to be read, and an end
that says so.

uvicorn waits for ever for the rest of a request's head, for the rest of a body that was answered before it
came, and for clients that do not read: a thousand such connections would be all that it lets in. And on
SIGTERM it closes its door at once; here those who come while accepted requests are finished get 503 and a
sentence that says why.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Collection
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxldm.serving.requests import BadRequest
from jaxldm.serving.service import Service

LOG = logging.getLogger("jaxldm.serving")
MAX_CONNECTIONS = 1000  # beyond them the answer is 503
HEAD_SECONDS = 10.0  # for the head of a request, and for what is left of one that was answered
SEND_SECONDS = 60.0  # for a client to read some of its answer, once the system's buffers are full
LINGER_SECONDS = 1.0  # for a refusal to be read
LARGEST_HEAD = 2**14  # bytes
END_SECONDS = 10  # for the last answers to be read, after all is drawn


class Connection(H11Protocol):
    """A connection that is closed where what must come does not come within `HEAD_SECONDS`, or where nothing
    is read for `SEND_SECONDS`.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._patience: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """It has sent something."""
        if self._refused:
            return
        super().data_received(data)
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= LARGEST_HEAD:
            self.flow.resume_reading()  # or nobody sees that who has sent more than a request goes away
        if self.conn.their_state is h11.IDLE:
            self._wait()  # for the rest of a head
        elif self.conn.our_state is not h11.DONE:
            self._wait_no_more()

    def on_response_complete(self) -> None:
        """It has its answer."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._wait()  # for the rest of a body that nobody reads
        else:
            self._wait_no_more()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._wait_no_more()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """It does not read as fast as it is answered."""
        super().pause_writing()
        if self._unread is None:
            self._look_at_unread()

    def resume_writing(self) -> None:
        """It has read most of it."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _look_at_unread(self, before: float = math.inf) -> None:
        left = self.transport.get_write_buffer_size()
        if left < before:
            self._unread = self.loop.call_later(SEND_SECONDS, self._look_at_unread, left)
        else:
            self.transport.abort()

    def _wait(self) -> None:
        """From the first time on: what comes in drops is late, too."""
        if self._patience is None and not self.transport.is_closing():
            self._patience = self.loop.call_later(HEAD_SECONDS, self._is_late)

    def _wait_no_more(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _is_late(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            message = f"the head of the request did not arrive within {HEAD_SECONDS:g} s: send it faster"
            self._refuse(BadRequest(message, status=408))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused as everything else, in JSON; called where h11 has raised."""
        raised = sys.exc_info()[1]
        error = BadRequest(f"the request is no HTTP/1.1: {raised or msg}")
        if getattr(raised, "error_status_hint", 400) == 431:
            message = f"the head of a request may have {LARGEST_HEAD} bytes: send fewer or shorter headers"
            error = BadRequest(message, status=431)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(error)
        else:  # in the middle of an answer, or behind it
            self.transport.close()

    def _refuse(self, error: BadRequest) -> None:
        """Answers in place of the application, and closes the connection.

        What still comes is dropped for a moment: closed at once, the connection would be reset, and the
        answer with it.
        """
        self._refused = True
        if self.cycle is not None:  # for the application, the client is gone
            self.cycle.disconnected, self.cycle.waiting_for_100_continue = True, False
            self.cycle.message_event.set()
        headers, content = _answer(error)
        head = h11.Response(status_code=error.status, headers=headers)
        for event in (head, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self._wait_no_more()
        self._patience = self.loop.call_later(LINGER_SECONDS, self.transport.close)


def _answer(error: BadRequest) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """(headers, body) of a refusal, behind which the connection is closed."""
    content = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
    return [(name.encode(), value.encode()) for name, value in headers.items()], content


class Bounded:
    """An application that refuses requests while there are too many connections.

    Attributes:
        connections: of the server, those without a request, too.
    """

    def __init__(self, app: Any):
        self.app = app
        self.connections: Collection[Any] = ()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or len(self.connections) <= MAX_CONNECTIONS:
            await self.app(scope, receive, send)
            return
        message = f"{MAX_CONNECTIONS} connections are open, and no more may: come again later"
        headers, content = _answer(BadRequest(message, status=503, type="too_many_connections"))
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": content})


class Server(uvicorn.Server):
    """A server that a signal has finish what it accepted, while others are refused.

    Args:
        config: of uvicorn.
        service: that draws.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self.interrupted = False
        self._signals: list[int] = []
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; Ctrl-C once more ends at once."""
        if self._signals and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        self._signals.append(sig)
        self.interrupted = signal.SIGINT in self._signals

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._signals:
            if self._until is None:
                self._until = time.monotonic() + self.service.admission.limits.max_queue_seconds
                LOG.info(json.dumps({"draining": self.service.open_orders}))
                self.service.drain()
            if not self.service.open_orders or time.monotonic() >= self._until:
                self.should_exit = True
        return await super().on_tick(counter)


def server_of(app: Any, service: Service) -> Server:
    """The server of an application and its service, not yet running."""
    bounded = Bounded(app)
    config = uvicorn.Config(
        bounded,
        http=Connection,
        ws="none",
        log_level="error",  # what clients do wrong is in their answers
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=LARGEST_HEAD,
        timeout_graceful_shutdown=END_SECONDS,
    )
    server = Server(config, service)
    bounded.connections = server.server_state.connections
    return server


def run_until_interrupted(server: Server, bound: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C; then what was accepted is finished first.

    Raises:
        KeyboardInterrupt: it was Ctrl-C.
    """
    server.run(sockets=[bound])
    if server.interrupted:
        raise KeyboardInterrupt
