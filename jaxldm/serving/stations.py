"""The place of a worker in a service: what it has to do, how it is, and when it is started again."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

from jaxldm.serving.messages import Beat, Begin, Cancel, Died, Prepare, Ready, Stop
from jaxldm.serving.orders import Order

FIRST_DELAY, LONGEST_DELAY = 0.1, 30.0  # seconds until a dead worker is started again, doubled each time
MAX_STARTS = 6  # that fail in a row, before a worker is given up


class Station:
    """A worker and its successors.

    Attributes:
        number: of the station.
        worker: the present one, see `LocalWorker` and `WorkerProcess`.
        ready: whether all is compiled.
        alone: the order for which the worker does nothing else.
        reserved: whether nothing new begins, as an order is to be alone.
        due: when the worker is to be started; None: it was, or never will be.
        heard: when it last reported something.
        restarts: how often a worker died here.
        trouble: what it said before it died.
        beat: its last report of how it is.
    """

    def __init__(self, number: int, worker: Any):
        self.number, self.worker = number, worker
        self.ready = self.reserved = False
        self.alone: Order | None = None
        self.due: float | None = float("-inf")
        self.heard = 0.0
        self.restarts = self._failed_starts = self._deaths = 0
        self.trouble: str | None = None
        self.beat = Beat(())
        self._out: collections.Counter[int] = collections.Counter()
        self._num_begun = 0
        self._unread: collections.deque[tuple[int, float]] = collections.deque()

    # ---------------------------------------------------------------- orders

    @property
    def takes_orders(self) -> bool:
        """Whether orders may be sent to it."""
        return self.ready and self.alone is None and not self.reserved

    def has_room(self, kind: int) -> bool:
        """Whether an image may begin, or almost: a few are sent ahead, so that no slot waits for the next."""
        slots = self.beat.kinds[kind].slots
        return self.takes_orders and self._out[kind] < slots + slots // 4

    def estimate(self, order: Order) -> float:
        """Seconds of the engine's time that an image takes, of the slowest kind that it may be."""
        evaluations = 2 if order.guided else 1
        alike = [kind.seconds for kind in self.beat.kinds if kind.evaluations == evaluations]
        return order.num_steps * max(alike or [kind.seconds for kind in self.beat.kinds], default=0.0)

    @property
    def seconds_left(self) -> float:
        """Estimated, until the images that the worker was asked to begin are done."""
        return self.beat.seconds_left + sum(seconds for _, seconds in self._unread)

    def prepare(self, order: Order) -> None:
        """Has an order checked."""
        self.worker.send(Prepare(order.task()))

    def begin(self, order: Order, image: int, waiting: int, seconds: float) -> None:
        """Has an image drawn."""
        order.out.add(image)
        self._out[order.kind or 0] += 1
        self._num_begun += 1
        self._unread.append((self._num_begun, seconds))
        self.worker.send(Begin(order.id, image, waiting))

    def is_done(self, order: Order, image: int) -> None:
        """An image was drawn."""
        order.out.discard(image)
        self._out[order.kind or 0] -= 1

    def forget(self, order: Order) -> None:
        """An order is done, or nobody wants it any more."""
        self._out[order.kind or 0] -= len(order.out)
        order.out.clear()
        self.worker.send(Cancel(order.id))

    # ---------------------------------------------------------------- life and death

    def is_due(self, now: float) -> bool:
        """Whether the worker is to be started now."""
        return self.due is not None and now >= self.due

    def start(self, on_report: Callable[[Station, Any, Any], None]) -> None:
        """Starts the worker."""
        self.due = None
        self.worker.start(functools.partial(on_report, self, self.worker))

    def silent_for(self, now: float, seconds: float) -> bool:
        """Whether the worker said nothing for so long, or for 20 steps."""
        silence = now - self.heard
        return self.ready and self.worker.restartable and silence > max(seconds, 20 * self.beat.longest)

    def on_ready(self, report: Ready) -> None:
        """All is compiled."""
        self.beat, self.ready, self.trouble, self._failed_starts = report.beat, True, None, 0

    def on_beat(self, beat: Beat) -> int:
        """Remembers how the worker is; returns how many steps it has taken since."""
        steps = beat.steps - self.beat.steps
        self.beat, self.ready = beat, beat.slots > 0  # replicas have none while none of them runs
        while self._unread and self._unread[0][0] <= beat.begun:
            self._unread.popleft()
        if beat.steps:
            self._deaths = 0
        return steps

    def on_death(self, died: Died, now: float) -> str:
        """The worker is gone: its successor is due after a while. Returns what was the matter."""
        message = self.trouble or died.message
        self._failed_starts += died.by_itself and not self.ready  # what is killed from outside did not fail
        self.ready, self.alone, self.trouble = False, None, None
        self._out.clear()
        self._unread.clear()
        self._num_begun, self.beat = 0, self.beat._replace(begun=0, seconds_left=0.0, busy=0, steps=0)
        if self.worker.restartable and self._failed_starts < MAX_STARTS:
            self.due = now + min(FIRST_DELAY * 2**self._deaths, LONGEST_DELAY)
            self._deaths += 1
            self.restarts += 1
            self.worker = self.worker.again()
        return message

    def stop(self) -> None:
        """Has the worker end."""
        self.worker.send(Stop())

    def join(self, timeout: float | None) -> None:
        """Waits until it has."""
        self.worker.join(timeout)
