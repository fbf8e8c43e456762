"""The thread that owns an engine, and what others ask of it: accept, cancel, drain.

Three kinds of threads meet here. Callers hand in orders and get a refusal or nothing, at once. One or two
threads encode texts before and decode images after. One thread takes the steps: between two of them it lets
images in, takes cancelled ones out, and tells the listeners what happened.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxldm.errors import InvalidArgumentError, JaxldmError
from jaxldm.serving.admission import Admission, Item, Limits, Refusal
from jaxldm.serving.engine import Drawn, Engine, Seen
from jaxldm.serving.jobs import Job
from jaxldm.serving.pictures import Preview, fit_preview, picture_bytes

LOG = logging.getLogger("jaxldm.serving")
PREPARING, FINISHING = 2, 2  # threads
PLACES_SECONDS = 0.5  # between two looks at the places in the queue
IDLE_SECONDS = 0.25  # how long the thread sleeps at most while nothing waits: deadlines are looked at then


class Progress(NamedTuple):
    """An image of an order has come that far; `preview` is a small picture in [-1, 1], or None."""

    image: int
    done: int
    total: int
    preview: np.ndarray | None = None


class Picture(NamedTuple):
    """An image of an order is done: the bytes of a file, and the K that it was drawn with."""

    image: int
    content: bytes
    slots: int


class Accepted(NamedTuple):
    """The order was checked and waits for slots."""


class Waiting(NamedTuple):
    """The place of an order in the queue.

    Attributes:
        ahead: how many others begin before it, if nobody else comes.
        seconds: estimated, until its last step.
    """

    ahead: int
    seconds: float


class Failed(NamedTuple):
    """The order ends without its images. `type` is "invalid_request", "deadline_exceeded", "cancelled" or
    "server_error".
    """

    type: str
    message: str
    param: str | None = None


Event = Accepted | Waiting | Progress | Picture | Failed


@dataclasses.dataclass(eq=False)
class Order:
    """What a client asked for, and how far it has come.

    Attributes:
        id: in answers and cancellations; chosen by the server.
        client: whose share of the slots it takes.
        prompts, options: of the pipeline's call, after the key.
        seed: of its key.
        num_images: images it draws.
        num_steps: of each.
        guided: whether a step takes two rows of the network's batch.
        listener: called with each `Event`, from any thread; must return at once.
        format: of the pictures.
        progress: whether the listener gets each step.
        previews: how many small pictures on the way of each image.
        timeout: seconds from now.
    """

    id: str
    client: str
    prompts: Sequence[Any]
    options: Mapping[str, Any]
    seed: int
    num_images: int
    num_steps: int
    guided: bool
    listener: Callable[[Event], None]
    format: str = "png"
    progress: bool = False
    previews: int = 0
    timeout: float | None = None
    job: Job | None = None
    left: int = 0

    def __post_init__(self):
        self.left = self.num_images


class Service:
    """An engine at work.

    Args:
        engine: with the calls that it allows; compiled here, in the thread.
        limits: of admission.
        clock: seconds; another one for tests.
    """

    def __init__(
        self, engine: Engine, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self.engine, self.clock = engine, clock
        self.admission = Admission(limits or Limits())
        self.counters: collections.Counter[str] = collections.Counter()
        self.broken: str | None = None
        self._lock = threading.Condition()
        self._orders: dict[Hashable, Order] = {}
        self._cancelled: list[str] = []
        self._ready = self._draining = self._stopping = False
        self._seconds_left = self._places_told = 0.0
        self._preview: Preview | None = None
        self._prepare = concurrent.futures.ThreadPoolExecutor(PREPARING, "jaxldm-prepare")
        self._finish = concurrent.futures.ThreadPoolExecutor(FINISHING, "jaxldm-finish")
        self._thread = threading.Thread(target=self._run, name="jaxldm-engine", daemon=True)

    # ---------------------------------------------------------------- what others ask

    def start(self) -> None:
        """Starts the thread, which compiles first."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether orders are accepted."""
        return self._ready and not self._draining and self.broken is None

    @property
    def waiting(self) -> int:
        """Orders that no image of has begun, or not all of them."""
        with self._lock:
            return len(self.admission.queue.tickets)

    @property
    def open_orders(self) -> int:
        """Orders that were accepted and are not done."""
        with self._lock:
            return len(self._orders)

    def submit(self, order: Order) -> Refusal | None:
        """Accepts an order, or says why not. Its listener gets what becomes of it."""
        with self._lock:
            if not self.ready:
                return Refusal(*self._not_ready())
            seconds = self.engine.estimate(order.num_steps, order.guided)
            cost = order.num_steps * (2 if order.guided else 1)
            items = [Item(order.id, image, cost, seconds, order) for image in range(order.num_images)]
            refusal = self.admission.admit(
                self.clock(), order.client, items, self._seconds_left, order.timeout
            )
            if refusal is not None:
                self.counters[f"refused_{refusal.type}"] += 1
                return refusal
            self._orders[order.id] = order
            self.counters["accepted"] += 1
        self._prepare.submit(self._prepare_order, order)
        return None

    def cancel(self, order_id: str) -> bool:
        """Ends an order before its next step; False where there is none of that id."""
        with self._lock:
            if order_id not in self._orders:
                return False
            self._cancelled.append(order_id)
            self._lock.notify_all()
            return True

    def drain(self) -> None:
        """From now on nothing is accepted; what was accepted is finished."""
        with self._lock:
            self._draining = True
            self._lock.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Drains, waits, and ends the thread; returns whether all orders were done in time."""
        self.drain()
        with self._lock:
            done = self._lock.wait_for(lambda: not self._orders or self.broken is not None, timeout)
            self._stopping = True
            self._lock.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        for pool in (self._prepare, self._finish):
            pool.shutdown(wait=False, cancel_futures=True)
        return done

    def _not_ready(self) -> tuple[str, str, float]:
        if self.broken is not None:
            return "server_error", f"the engine has stopped: {self.broken}", 30.0
        if self._draining:
            return "shutting_down", "the server is being stopped: ask another one, or later", 10.0
        return "not_ready", "the model is being compiled: ask again in a few seconds, see /ready", 5.0

    # ---------------------------------------------------------------- before and after the steps

    def _prepare_order(self, order: Order) -> None:
        """Checks the order's call and encodes its texts."""
        try:
            job = self.engine.prepare(jax.random.key(order.seed), *order.prompts, **order.options)
            if job.num_images != order.num_images:
                raise InvalidArgumentError(f"num_images must be {job.num_images}, got {order.num_images}")
        except JaxldmError as error:
            self._end(order, Failed("invalid_request", str(error)))
        except Exception as error:  # noqa: BLE001 (sent to the client, whatever it is)
            self._end(order, _fault(error))
        else:
            order.listener(Accepted())
            with self._lock:
                order.job = job
                self._tell_places([order])
                self._lock.notify_all()

    def _finish_images(self, drawn: list[tuple[Order, Drawn]]) -> None:
        """Decodes images of one table that ended together, and hands them over."""
        try:
            latents = np.stack([one.latents for _, one in drawn])
            first, pipe = drawn[0][1], self.engine.pipe
            options = {"batch_size": first.size, "devices": [first.device]}
            images = np.asarray(pipe.family.decode(pipe, latents, **options))
            if self._preview is None and np.isfinite(latents).all():
                self._preview = fit_preview(latents[0], images[0])
        except Exception as error:  # noqa: BLE001 (sent to the clients, whatever it is)
            for order, _ in drawn:
                self._end(order, _fault(error))
            return
        for (order, one), image in zip(drawn, images, strict=True):
            if not np.isfinite(one.latents).all():
                message = "the image came out as NaN or infinity: use a smaller guidance_scale"
                self._end(order, Failed("server_error", message))
                continue
            order.listener(Picture(one.image, picture_bytes(image, order.format), one.size))
            with self._lock:
                self.counters["images"] += 1
                order.left -= 1
                done = order.left == 0
            if done:
                self._end(order, None)

    def _end(self, order: Order, failure: Failed | None) -> None:
        """Forgets an order; tells its listener of a failure, once."""
        with self._lock:
            if self._orders.pop(order.id, None) is None:
                return
            self.admission.finished(order.id)
            self.counters[failure.type if failure else "completed"] += 1
            if failure is not None:
                self._cancelled.append(order.id)  # out of its slots
            self._lock.notify_all()
        if failure is not None:
            order.listener(failure)

    # ---------------------------------------------------------------- the steps

    def _run(self) -> None:
        try:
            self.engine.warm_up()
            self._ready = True
            while not self._stopping:
                self._between_steps()
                if self.engine.busy:
                    self._step()
        except Exception as error:  # noqa: BLE001 (nothing else would tell anybody)
            self._break(error)

    def _break(self, error: Exception) -> None:
        """The engine cannot go on: every order fails, and none is accepted any more."""
        LOG.error("the engine has stopped", exc_info=error)
        with self._lock:  # what is submitted from here on is refused
            self.broken = f"{type(error).__name__}: {error}"
            orders = list(self._orders.values())
        for order in orders:
            self._end(order, Failed("server_error", f"the engine has stopped: {self.broken}"))

    def _between_steps(self) -> None:
        with self._lock:
            expired = [self._orders[ticket] for ticket in self.admission.expired(self.clock())]
            cancelled, self._cancelled = self._cancelled, []
            for ticket in cancelled:
                self.engine.cancel(ticket)
        for order in expired:
            self._end(order, Failed("deadline_exceeded", f"not done within timeout={order.timeout:g} s"))
            self.engine.cancel(order.id)
        for ticket in cancelled:
            order = self._orders.get(ticket)
            if order is not None:
                self._end(order, Failed("cancelled", "the request was cancelled"))
        with self._lock:
            while (item := self.admission.next(self._fits)) is not None:
                job, kind = item.job.job, item.job.job.kind
                alike = (other.job.job for other in self.admission.queue if other.job.job is not None)
                waiting = 1 + sum(other.kind == kind for other in alike)
                self.engine.begin(job, item.image, item.ticket, waiting)
            self._seconds_left = self.engine.seconds_left()
            if self.clock() >= self._places_told + PLACES_SECONDS:
                self._places_told = self.clock()
                self._tell_places(self._orders.values())
            if not self.engine.busy and not self._cancelled and not self._stopping:
                self._lock.wait(IDLE_SECONDS)

    def _tell_places(self, orders: Iterable[Order]) -> None:
        """Tells those of the orders that wait, and want to know, how long they will."""
        wanted = [order for order in orders if order.progress]
        places = self.admission.places(self._seconds_left) if wanted else {}
        for order in wanted:
            if order.id in places:
                order.listener(Waiting(*places[order.id]))

    def _fits(self, item: Item) -> bool:
        return item.job.job is not None and self.engine.has_room(item.job.job)

    def _step(self) -> None:
        wanted = frozenset(order.id for order in list(self._orders.values()) if order.previews)
        seen, drawn, failed = self.engine.step(wanted)
        self.counters["steps"] += 1
        for one in seen:
            order = self._orders.get(one.ticket)
            if order is not None and order.progress:
                order.listener(Progress(one.image, one.done, one.total, self._picture_of(order, one)))
        together = collections.defaultdict(list)
        for one in drawn:
            order = self._orders.get(one.ticket)
            if order is not None:
                together[one.size, one.device, one.latents.shape].append((order, one))
        for images in together.values():
            self._finish.submit(self._finish_images, images)
        for ticket, error in failed.items():
            with contextlib.suppress(KeyError):
                self._end(self._orders[ticket], _fault(error))

    def _picture_of(self, order: Order, seen: Seen) -> np.ndarray | None:
        """A preview of an image, at `order.previews` places of its way."""
        every = max(seen.total // (order.previews + 1), 1) if order.previews else 0
        if seen.x_0 is None or not every or seen.done % every or not np.isfinite(seen.x_0).all():
            return None
        if self.engine.pipe.autoencoder is None:
            return np.clip(seen.x_0, -1, 1)
        return None if self._preview is None else self._preview(seen.x_0)


def _fault(error: Exception) -> Failed:
    """What went wrong in the server: its kind for the client, all of it for the log."""
    LOG.error("a request failed", exc_info=error)
    return Failed("server_error", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
