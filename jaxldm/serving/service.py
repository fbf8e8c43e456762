"""Orders, and the workers that draw them: accept, dispatch, cancel, supervise, drain.

Callers hand in orders and get a refusal or nothing, at once. One thread gives orders to workers whenever they
have room, looks after deadlines, and starts workers again that died. What a dead worker had is drawn by
another, with the same key: the image is the same.

Who ends a worker is found out as in a trial: all that it was busy with is drawn again, each alone. What ends
a worker while it is alone there is the cause, is failed, and is refused from then on.
"""

from __future__ import annotations

import collections
import json
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from jaxldm.serving.admission import Admission, Item, Limits, Refusal
from jaxldm.serving.messages import About, Beat, Died, Prepared, Ready, Refused, Report
from jaxldm.serving.orders import Accepted, Failed, Order, Progress, Waiting
from jaxldm.serving.stations import Station

LOG = logging.getLogger("jaxldm.serving")
PLACES_SECONDS = 0.5  # between two looks at the places in the queue
IDLE_SECONDS = 0.25  # how long the thread sleeps at most: deadlines are looked at then
SILENCE_SECONDS = 30.0  # without a beat, a worker hangs
MARGIN = 1.15  # of what is promised over what the last steps took: the next ones may be slower
MAX_PREPARING = 4  # orders that a worker is given to prepare at once
MAX_KILLS = 8  # from outside, of workers that are at one order, before it is suspected after all
MAX_CRASHES = 2  # of workers that are at one order
END_SECONDS = 5.0  # for the thread to end
MAX_FATAL = 1024  # orders that are remembered to end workers


class Service:
    """Workers at work.

    Args:
        workers: `LocalWorker` or `WorkerProcess`, not started.
        limits: of admission.
        clock: seconds; another one for tests.
        silence: seconds without a beat after which a worker is ended; at least 20 steps.
    """

    def __init__(
        self,
        workers: Sequence[Any],
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        silence: float = SILENCE_SECONDS,
    ):
        self.clock, self.silence = clock, silence
        self.stations = [Station(number, worker) for number, worker in enumerate(workers)]
        self.admission = Admission(limits or Limits())
        self.counters: collections.Counter[str] = collections.Counter()
        self.broken: str | None = None
        self.sizes: tuple[int, ...] = ()
        self._lock = threading.Condition()
        self._orders: dict[Hashable, Order] = {}
        self._suspects: collections.deque[Order] = collections.deque()
        self._fatal: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._draining = self._stopping = False
        self._places_told = 0.0
        self._thread = threading.Thread(target=self._run, name="jaxldm-dispatch", daemon=True)

    # ---------------------------------------------------------------- what others ask

    def load(self) -> Any:
        """Has the first worker load its model, waits for it, and returns the offer that it makes.

        Raises:
            JaxldmError: what cannot be served.
        """
        loaded = self.stations[0].worker.load()
        self.sizes = loaded.sizes
        return loaded.offer

    def start(self) -> None:
        """Starts the thread, and it the workers, which compile first."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether orders are accepted."""
        working = any(station.ready for station in self.stations)
        return working and not self._draining and self.broken is None

    @property
    def waiting(self) -> int:
        """Orders that no image of has begun, or not all of them."""
        with self._lock:
            return len(self.admission.queue.tickets | {order.id for order in self._suspects})

    @property
    def open_orders(self) -> int:
        """Orders that were accepted and are not done."""
        with self._lock:
            return len(self._orders)

    def submit(self, order: Order) -> Refusal | None:
        """Accepts an order, or says why not. Its listener gets what becomes of it."""
        with self._lock:
            refusal = self._refusal(order)
            if refusal is not None:
                self.counters[f"refused_{refusal.type}"] += 1
                return refusal
            self._orders[order.id] = order
            self.counters["accepted"] += 1
            self._bind()
            self._lock.notify_all()
            return None

    def cancel(self, order_id: str) -> bool:
        """Ends an order before its next step; False where there is none of that id."""
        with self._lock:
            order = self._orders.get(order_id)
            if order is not None:
                self._end(order, Failed("cancelled", "the request was cancelled"))
            return order is not None

    def drain(self) -> None:
        """From now on nothing is accepted; what was accepted is finished."""
        with self._lock:
            self._draining = True
            self._lock.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Drains, waits, and ends the workers; returns whether all orders were done in time."""
        self.drain()
        with self._lock:
            started = self._thread.ident is not None
            done = self._lock.wait_for(
                lambda: not self._orders or self.broken is not None or not started, timeout
            )
            self._stopping = True
            self._lock.notify_all()
        if started:
            self._thread.join(END_SECONDS)
        for station in self.stations:
            station.stop()
        for station in self.stations:
            station.join(timeout)
        return done

    # ---------------------------------------------------------------- admission

    def _refusal(self, order: Order) -> Refusal | None:
        """Why an order is not accepted; None after it was put into the queue."""
        if not self.ready:
            return Refusal(*self._not_ready())
        if self._fatal and order.fingerprint() in self._fatal:
            message = "this request has ended workers of the server before: send another, and report this one"
            return Refusal("fatal_request", message, 0.0)
        items = self._items(order, sorted(order.left))
        longest = max((station.beat.longest for station in self.stations if station.ready), default=0.0)
        own = order.num_steps * longest  # an image takes all of its steps, however few others there are
        before = self._seconds_left() + max(own - sum(item.seconds for item in items), 0.0)
        return self.admission.admit(self.clock(), order.client, items, before, order.timeout)

    def _not_ready(self) -> tuple[str, str, float]:
        if self.broken is not None:
            return "server_error", f"the engine has stopped: {self.broken}", 30.0
        if self._draining:
            return "shutting_down", "the server is being stopped: ask another one, or later", 10.0
        return "not_ready", "the model is being compiled: ask again in a few seconds, see /ready", 5.0

    def _items(self, order: Order, images: Iterable[int]) -> list[Item]:
        working = [station for station in self.stations if station.ready]
        seconds = max((station.estimate(order) for station in working), default=0.0) / max(len(working), 1)
        seconds *= MARGIN
        cost = order.num_steps * (2 if order.guided else 1)
        return [Item(order.id, image, cost, seconds, order) for image in images]

    def _seconds_left(self) -> float:
        """Until the images that workers were asked to begin are done."""
        left = [station.seconds_left for station in self.stations if station.ready]
        return MARGIN * sum(left) / max(len(left), 1)

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                for station in self.stations:
                    if station.is_due(self.clock()):
                        self._start(station)
                    elif station.silent_for(self.clock(), self.silence):
                        station.worker.kill(f"it did not answer for {self.silence:g} s")
                with self._lock:
                    self._expire()
                    self._bind()
                    self._try_suspects()
                    self._dispatch()
                    if self.clock() >= self._places_told + PLACES_SECONDS:
                        self._places_told = self.clock()
                        self._tell_places(self._orders.values())
                    if not self._stopping:
                        self._lock.wait(self._pause())
        except Exception as error:
            LOG.error("the service has stopped", exc_info=error)
            self._break(f"{type(error).__name__}: {error}")

    def _pause(self) -> float:
        """Until the thread looks again by itself."""
        moments = [*(station.due for station in self.stations), self.admission.next_deadline]
        pauses = (moment - self.clock() for moment in moments if moment is not None)
        return max(min([IDLE_SECONDS, *pauses]), 0.001)

    def _start(self, station: Station) -> None:
        try:
            station.start(self._on_report)
        except OSError as error:  # no memory, or no number for another process
            self._on_report(station, station.worker, Died(f"its process was not started: {error}"))

    def _expire(self) -> None:
        for ticket in self.admission.expired(self.clock()):
            order = self._orders[ticket]
            self._end(order, Failed("deadline_exceeded", f"not done within timeout={order.timeout:g} s"))

    def _bind(self) -> None:
        """Gives orders to the workers with the least to do, which prepare them: a few at once, by turns.

        A client with many orders must not have all of them prepared before another's first.
        """
        while True:
            preparing = collections.Counter(
                order.station for order in self._orders.values() if order.preparing
            )
            free = [
                station
                for station in self.stations
                if station.takes_orders and preparing[station] < MAX_PREPARING
            ]
            unbound = [
                order for order in self._orders.values() if order.station is None and not order.crashes
            ]
            if not (free and unbound):
                return
            has = collections.Counter(
                order.client for order in self._orders.values() if order.station is not None
            )
            order = min(unbound, key=lambda order: has[order.client])  # the first of those with the fewest
            self._prepare(order, min(free, key=self._load))

    def _load(self, station: Station) -> int:
        mine = (order for order in self._orders.values() if order.station is station)
        return sum(order.num_steps * len(order.left) for order in mine)

    def _prepare(self, order: Order, station: Station) -> None:
        order.station, order.preparing = station, True
        station.prepare(order)

    def _dispatch(self) -> None:
        """Has images begin for which there are slots."""
        while (item := self.admission.next(self._fits)) is not None:
            order = item.job
            alike = (other.job for other in self.admission.queue if other.job.station is order.station)
            waiting = 1 + sum(other.kind == order.kind for other in alike)
            order.station.begin(order, item.image, waiting, item.seconds)

    def _fits(self, item: Item) -> bool:
        order = item.job
        return order.kind is not None and order.station.has_room(order.kind)

    def _tell_places(self, orders: Iterable[Order]) -> None:
        """Tells those of the orders that wait, and want to know, how long they will."""
        wanted = [order for order in orders if order.progress]
        places = self.admission.places(self._seconds_left()) if wanted else {}
        for order in wanted:
            if order.id in places:
                order.listener(Waiting(*places[order.id]))

    # ---------------------------------------------------------------- what workers report

    def _on_report(self, station: Station, worker: Any, report: Report) -> None:
        with self._lock:
            if station.worker is not worker:
                return  # of one that was given up
            station.heard = self.clock()
            if isinstance(report, About):
                self._on_event(report)
            elif isinstance(report, Prepared):
                self._on_prepared(report)
            elif isinstance(report, Beat):
                self.counters["steps"] += station.on_beat(report)
                return
            elif isinstance(report, Ready):
                station.on_ready(report)
                LOG.info(json.dumps({"worker": station.number, "ready": True}))
            elif isinstance(report, Refused):
                station.trouble = report.message
            elif isinstance(report, Died):
                self._on_death(station, report)
            self._lock.notify_all()

    def _on_event(self, report: About) -> None:
        order, event = self._orders.get(report.order_id), report.event
        if order is None:
            return
        if isinstance(event, Failed):
            if event.type == "fatal_request":  # found out by a replica
                self._remember(order)
            self._end(order, event)
        elif isinstance(event, Progress):
            if order.progress and event.image in order.left:
                order.listener(event)
        elif event.image in order.left:
            order.station.is_done(order, event.image)
            order.left.discard(event.image)
            self.counters["images"] += 1
            order.listener(event)
            if not order.left:
                self._end(order, None)

    def _on_prepared(self, report: Prepared) -> None:
        order = self._orders.get(report.order_id)
        if order is None:
            return
        order.kind, order.preparing = report.kind, False
        if not order.accepted:
            order.accepted = True
            order.listener(Accepted())
            self._tell_places([order])
        if order.station.alone is order:
            for image in sorted(order.left):
                order.station.begin(order, image, len(order.left), 0.0)

    def _end(self, order: Order, failure: Failed | None) -> None:
        """Forgets an order; tells its listener of a failure, once."""
        if self._orders.pop(order.id, None) is None:
            return
        self.admission.finished(order.id)
        if order in self._suspects:
            self._suspects.remove(order)
        if order.station is not None:
            order.station.forget(order)
        self.counters[failure.type if failure else "completed"] += 1
        self._lock.notify_all()
        if failure is not None:
            order.listener(failure)

    def _break(self, message: str) -> None:
        """Nothing can go on: every order fails, and none is accepted any more."""
        with self._lock:
            self.broken = message
            for order in list(self._orders.values()):
                self._end(order, Failed("server_error", f"the engine has stopped: {message}"))

    # ---------------------------------------------------------------- workers that die

    def _on_death(self, station: Station, died: Died) -> None:
        """Has the orders of a dead worker drawn by another."""
        if self._stopping:
            return
        message = station.on_death(died, self.clock())
        LOG.warning(json.dumps({"worker": station.number, "died": message, "restarts": station.restarts}))
        if station.due is None:
            if all(other.due is None and not other.ready for other in self.stations):
                self._break(message)
            return
        self.counters["restarts"] += 1
        for order in [order for order in self._orders.values() if order.station is station]:
            was_at_it, begun = order.in_flight, sorted(order.out)
            order.station, order.kind, order.preparing = None, None, False
            order.out.clear()
            if was_at_it:
                self._again(order, begun, died)

    def _again(self, order: Order, begun: list[int], died: Died) -> None:
        """What becomes of an order that a worker was at when it died."""
        if died.by_itself or order.kills >= MAX_KILLS:
            order.crashes += 1
        else:
            order.kills += 1
        if not order.crashes:
            self.admission.queue.put_back(order.client, self._items(order, begun))
        elif order.crashes < MAX_CRASHES:
            self.admission.queue.remove(order.id)
            self._suspects.append(order)
        else:
            self._remember(order)
            message = f"this request ended {order.crashes} workers of the server ({died.message}): report it"
            self._end(order, Failed("fatal_request", message))

    def _remember(self, order: Order) -> None:
        """Has orders of the same images refused from now on."""
        self._fatal[order.fingerprint()] = None
        while len(self._fatal) > MAX_FATAL:
            self._fatal.popitem(last=False)

    def _try_suspects(self) -> None:
        """Gives one order that may have ended a worker to a worker that does nothing else meanwhile."""
        for station in self.stations:
            station.reserved = False
            if station.alone is not None and station.alone.id not in self._orders:
                station.alone = None
        free = [station for station in self.stations if station.ready and station.alone is None]
        if not (self._suspects and free):
            return
        busy = [order.station for order in self._orders.values() if order.in_flight]
        station = min(free, key=busy.count)
        if station in busy:
            station.reserved = True  # nothing new begins there until it is free
            return
        station.alone = self._suspects.popleft()
        self._prepare(station.alone, station)
