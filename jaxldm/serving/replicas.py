"""One engine many times, on any number of machines: replicas, and one worker in front of them all.

A `Replica` is what a machine runs: a worker process and the service that watches over it. `Replicas` is a
worker as the service of the door knows them: admission, turns, deadlines and streams stay there, and each
image is drawn by some replica. Where a replica is lost, another draws the image: it is the same.

What carries calls from one to the other is handed in (`ray_serve`), and nothing here knows of it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple, cast

from jaxldm.serving.admission import Limits
from jaxldm.serving.mailbox import Mailbox
from jaxldm.serving.messages import (
    About,
    Beat,
    Begin,
    Cancel,
    Command,
    Loaded,
    Prepare,
    Prepared,
    Ready,
    Report,
)
from jaxldm.serving.orders import Failed, Order, Picture, Progress, Task
from jaxldm.serving.processes import WorkerProcess
from jaxldm.serving.service import MAX_KILLS, Service

LOG = logging.getLogger("jaxldm.serving")
BEAT_SECONDS = 0.5  # between two questions to all replicas
AHEAD = 2  # images that a replica is given, for each of its slots
END_SECONDS = 5.0  # for the loop to end
READY_SECONDS = 0.05  # between two looks at a worker that is not ready
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0  # seconds until an image of a lost replica is drawn again
# The door has admitted what a replica gets.
MOST = 2**31 - 1
OPEN = Limits(max_queue=MOST, max_queue_seconds=1e9, requests_per_second=1e9, burst=MOST)


class ReplicaBroken(RuntimeError):
    """A replica whose worker does not come up again; another may be well."""


class ReplicaBeat(NamedTuple):
    """How a replica is.

    Attributes:
        replica: a name of its own.
        beat: of its worker; of none while that is not ready.
    """

    replica: str
    beat: Beat | None


class Replica:
    """What one machine runs: a worker in a process of its own, started again where it dies.

    Args:
        make: as of `WorkerProcess`.
    """

    def __init__(self, make: Callable[[], Any]):
        self._name = secrets.token_hex(4)
        self._service = Service([WorkerProcess(make)], OPEN)
        self._offer = self._service.load()
        self._service.start()
        while not self._service.ready:
            self.check_health()
            time.sleep(READY_SECONDS)

    def check_health(self) -> None:
        """Raises `ReplicaBroken` where only another replica helps."""
        if self._service.broken is not None:
            raise ReplicaBroken(self._service.broken)

    async def loaded(self) -> Loaded:
        """What it draws."""
        return Loaded(self._offer, self._service.sizes)

    async def beat(self) -> ReplicaBeat:
        """How it is."""
        return ReplicaBeat(self._name, self._service.stations[0].beat if self._service.ready else None)

    async def check(self, task: Task) -> int | Failed:
        """The kind of an order's images, a number of the worker's, or what is wrong with the order."""
        async with self._submitted(task, set()) as (order, mailbox):
            failure = mailbox if isinstance(mailbox, Failed) else await mailbox.accepted()
            return failure or order.kind or 0

    async def draw(self, task: Task, image: int) -> AsyncIterator[Progress | Picture | Failed]:
        """One image of an order: what becomes of it, up to its picture or a failure."""
        async with self._submitted(task, {image}) as (_, mailbox):
            if isinstance(mailbox, Failed):
                yield mailbox
                return
            async for event in mailbox.events():
                if isinstance(event, (Progress, Picture, Failed)):
                    yield event

    @contextlib.asynccontextmanager
    async def _submitted(self, task: Task, images: set[int]) -> AsyncIterator[tuple[Order, Mailbox | Failed]]:
        """An order of some images of a task, accepted here; it ends with the block."""
        mailbox = Mailbox(len(images))
        facts: dict[str, Any] = task._asdict() | {"id": secrets.token_hex(8)}
        order = Order(**facts, listener=mailbox.put)
        order.left = images
        while (refusal := self._service.submit(order)) is not None and refusal.type == "not_ready":
            await asyncio.sleep(READY_SECONDS)  # the worker is being started again
        if refusal is not None and refusal.type == "server_error":
            raise ReplicaBroken(refusal.message)
        try:
            yield order, mailbox if refusal is None else Failed(refusal.type, refusal.message)
        finally:
            self._service.cancel(order.id)  # without effect on one that is done

    def __del__(self):
        if hasattr(self, "_service"):
            self._service.close(0)


class Calls(NamedTuple):
    """How replicas are called.

    Attributes:
        loaded: of any of them, as soon as one runs.
        check: likewise, of one that has little to do.
        draw: likewise; closing the stream ends the image.
        beats: of all that run; those that do not answer are left out.
        is_lost: whether an error says that the replica is gone, and not that the call was wrong.
    """

    loaded: Callable[[], Awaitable[Loaded]]
    check: Callable[[Task], Awaitable[int | Failed]]
    draw: Callable[[Task, int], AsyncIterator[Progress | Picture | Failed]]
    beats: Callable[[], Awaitable[Sequence[ReplicaBeat]]]
    is_lost: Callable[[Exception], bool]


class Replicas:
    """All replicas as one worker of a `Service`, with the slots of all of them.

    Args:
        calls: to them.
    """

    restartable = False  # whoever runs the replicas starts them again

    def __init__(self, calls: Calls):
        self._calls = calls
        self._tell: Callable[[Report], None] = lambda report: None
        self._tasks: dict[str, Task] = {}
        self._work: dict[str, set[asyncio.Task]] = collections.defaultdict(set)
        self._begun = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="jaxldm-replicas", daemon=True)
        self._thread.start()

    def load(self) -> Loaded:
        """Waits for the first replica, and returns what it draws."""
        return asyncio.run_coroutine_threadsafe(_awaited(self._calls.loaded()), self._loop).result()

    def start(self, tell: Callable[[Report], None]) -> None:
        """Passes the reports to `tell` from now on."""
        self._tell = tell
        self._loop.call_soon_threadsafe(self._do, "", self._beats())

    def send(self, command: Command) -> None:
        """Hands in a command; any thread may, and none waits."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._obey, command)

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end after `Stop`."""
        self._thread.join(END_SECONDS if timeout is None else max(timeout, END_SECONDS))

    # ---------------------------------------------------------------- in the loop

    def _obey(self, command: Command) -> None:
        if isinstance(command, Prepare):
            self._tasks[command.task.id] = command.task
            self._do(command.task.id, self._check(command.task))
        elif isinstance(command, Begin):
            self._begun += 1
            if command.order_id in self._tasks:
                self._do(command.order_id, self._draw(self._tasks[command.order_id], command.image))
        elif isinstance(command, Cancel):
            self._tasks.pop(command.order_id, None)
            for work in self._work.pop(command.order_id, ()):
                work.cancel()
        else:
            self._loop.create_task(self._end())

    async def _end(self) -> None:
        works = [work for several in self._work.values() for work in several]
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        self._loop.stop()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _do(self, order_id: str, work: Any) -> None:
        task = self._loop.create_task(work)
        self._work[order_id].add(task)
        task.add_done_callback(lambda task: self._work.get(order_id, set()).discard(task))

    async def _check(self, task: Task) -> None:
        kind = await self._again(task, lambda: _awaited(self._calls.check(task)))
        if isinstance(kind, Failed):
            self._tell(About(task.id, kind))
        elif kind is not None:
            self._tell(Prepared(task.id, kind))

    async def _draw(self, task: Task, image: int) -> None:
        async def draw() -> bool:
            async with contextlib.aclosing(cast(Any, self._calls.draw(task, image))) as events:
                async for event in events:
                    self._tell(About(task.id, event))
                    if isinstance(event, (Picture, Failed)):
                        return True
            raise ReplicaBroken("it ended before the picture was done")

        await self._again(task, draw)

    async def _again(self, task: Task, call: Callable[[], Awaitable[Any]]) -> Any:
        """What a call to a replica returns, asked of others while replicas are lost; None after a failure."""
        delay = FIRST_DELAY
        for attempt in range(MAX_KILLS + 1):
            try:
                return await call()
            except Exception as error:  # passed on to the client, whatever it is
                failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if not (isinstance(error, ReplicaBroken) or self._calls.is_lost(error)):
                    LOG.error("a request failed", exc_info=error)
                    break
                LOG.warning(json.dumps({"replica lost": failure, "attempt": attempt + 1}))
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)
        self._tell(About(task.id, Failed("server_error", failure)))
        return None

    async def _beats(self) -> None:
        steps: dict[str, int] = {}
        beats: dict[str, Beat] = {}
        taken, ready = 0, False
        while True:
            begun = self._begun
            try:
                beats = {name: beat for name, beat in await self._calls.beats() if beat is not None}
            except Exception as error:  # noqa: BLE001 (one is being lost: the others go on as they were)
                LOG.warning(json.dumps({"no beat": f"{type(error).__name__}: {error}"[:200]}))
            now = {name: beat.steps for name, beat in beats.items()}
            taken += sum(max(number - steps.get(name, 0), 0) for name, number in now.items())
            steps |= now
            beat = together([*beats.values()])._replace(begun=begun, steps=taken)
            if beats and not ready:
                ready = True
                self._tell(Ready(beat))
            elif ready:
                self._tell(beat)
            await asyncio.sleep(BEAT_SECONDS)


def together(beats: Sequence[Beat]) -> Beat:
    """The beat of several replicas of one model, as of one worker with the slots of all.

    Of each kind it claims `AHEAD` times the slots: what waits at replicas is seen there by who starts more of
    them. It waits by turns of the clients, too.

    >>> from jaxldm.serving.messages import KindFacts
    >>> one = Beat((KindFacts(4, 1, 0.2),), seconds_left=3.0, busy=1, slots=4, longest=0.5)
    >>> both = together([one, one._replace(seconds_left=5.0, longest=0.7)])
    >>> both.kinds, both.seconds_left, both.busy, both.slots, both.longest
    ((KindFacts(slots=16, evaluations=1, seconds=0.1),), 4.0, 2, 8, 0.7)
    """
    if not beats:
        return Beat(())
    number = len(beats)
    kinds = tuple(
        of_one[0]._replace(
            slots=AHEAD * sum(kind.slots for kind in of_one),
            seconds=sum(kind.seconds for kind in of_one) / number**2,  # so many are drawn at once
        )
        for of_one in zip(*(beat.kinds for beat in beats), strict=True)
    )
    return Beat(
        kinds,
        seconds_left=sum(beat.seconds_left for beat in beats) / number,
        busy=sum(beat.busy for beat in beats),
        slots=sum(beat.slots for beat in beats),
        longest=max(beat.longest for beat in beats),
        cache_hits=sum(beat.cache_hits for beat in beats),
        cache_bytes=sum(beat.cache_bytes for beat in beats),
    )


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work
