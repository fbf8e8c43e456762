"""The thread that owns an engine: it takes the steps, and between two of them lets images in and out.

A worker gets commands and tells reports, both plain data (`messages`), so that it may live in the process of
the service or in one of its own. One or two threads encode texts before and decode images after the steps.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxldm.errors import CheckpointError, InvalidArgumentError, JaxldmError
from jaxldm.pipelines.network import check_finite
from jaxldm.serving.embeddings import Embeddings
from jaxldm.serving.engine import Drawn, Engine, Seen
from jaxldm.serving.jobs import Job
from jaxldm.serving.messages import (
    About,
    Beat,
    Begin,
    Cancel,
    Command,
    Died,
    KindFacts,
    Loaded,
    Prepare,
    Prepared,
    Ready,
    Report,
)
from jaxldm.serving.orders import Failed, Picture, Progress, Task
from jaxldm.serving.pictures import Preview, fit_preview, is_previewed, picture_bytes, with_picture

LOG = logging.getLogger("jaxldm.serving")
PREPARING, FINISHING = 2, 2  # threads
BEAT_SECONDS = 0.05  # between two beats while steps are taken
IDLE_SECONDS = 1.0  # and while nothing happens
NEW, MAX_SHARE = 0.1, 5.0  # of the mean of what lies between steps: weight of the newest, and its bound


class Made(NamedTuple):
    """What a worker works with.

    Attributes:
        engine: with the calls that it allows, not compiled.
        offer: what requests may ask for.
        embeddings: what texts were encoded to.
    """

    engine: Engine
    offer: Any = None
    embeddings: Embeddings | None = None


class Worker:
    """An engine at work.

    Args:
        made: the engine; it is compiled in the thread.
        tell: called with each report, from any thread of the worker's.
    """

    def __init__(self, made: Made, tell: Callable[[Report], None]):
        self.engine, self._embeddings, self._tell = made.engine, made.embeddings, tell
        self._lock = threading.Condition()
        self._tasks: dict[str, Task] = {}
        self._jobs: dict[str, Job] = {}
        self._begun: list[Begin] = []  # in the order in which they came
        self._cancelled: list[str] = []
        self._num_begun = self._steps = 0
        self._share = 1.0  # seconds from step to step, as a multiple of those of the steps alone
        self._last_beat = 0.0
        self._last_step: float | None = None
        self._stopping = False
        self._preview: Preview | None = None
        self._preview_is_of_noise = True
        self._prepare = concurrent.futures.ThreadPoolExecutor(PREPARING, "jaxldm-prepare")
        self._finish = concurrent.futures.ThreadPoolExecutor(FINISHING, "jaxldm-finish")
        self._thread = threading.Thread(target=self._run, name="jaxldm-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread, which compiles first."""
        self._thread.start()

    def send(self, command: Command) -> None:
        """Hands in a command; any thread may, and none waits."""
        with self._lock:
            if isinstance(command, Prepare):
                self._tasks[command.task.id] = command.task
                self._prepare.submit(self._prepare_task, command.task)
            elif isinstance(command, Begin):
                self._num_begun += 1
                self._begun.append(command)
            elif isinstance(command, Cancel):
                self._cancelled.append(command.order_id)
            else:
                self._stopping = True
            self._lock.notify_all()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the thread after `Stop`."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        for pool in (self._prepare, self._finish):
            pool.shutdown(wait=False, cancel_futures=True)

    # ---------------------------------------------------------------- before and after the steps

    def _prepare_task(self, task: Task) -> None:
        """Checks the call of an order and encodes its texts, unless it was cancelled meanwhile."""
        if not self._is_wanted(task):
            return
        try:
            options = with_picture(task.options)
            job = self.engine.prepare(jax.random.key(task.seed), *task.prompts, **options)
            if job.num_images != task.num_images:
                raise InvalidArgumentError(f"num_images must be {job.num_images}, got {task.num_images}")
        except JaxldmError as error:
            self._fail(task.id, Failed("invalid_request", str(error)))
        except BaseException as error:  # noqa: BLE001 (sent to the client; a panic of Rust is no Exception)
            self._fail(task.id, _fault(error))
        else:
            with self._lock:
                if task.id not in self._tasks:
                    return
                self._jobs[task.id] = job
            self._tell(Prepared(task.id, self.engine.kinds.index(job.kind)))

    def _is_wanted(self, task: Task) -> bool:
        """Whether an order was not cancelled."""
        with self._lock:
            return task.id in self._tasks and task.id not in self._cancelled

    def _finish_images(self, drawn: list[tuple[Task, Drawn]]) -> None:
        """Decodes images of one table that ended together, and hands them over.

        One that overflowed is its own order's failure, and none of those that ended with it.
        """
        finite = [(task, one) for task, one in drawn if np.isfinite(one.latents).all()]
        for task, one in drawn:
            if not np.isfinite(one.latents).all():
                self._fail(task.id, self._overflow(task))
        if not finite:
            return
        try:
            latents = np.stack([one.latents for _, one in finite])
            first, pipe = finite[0][1], self.engine.pipe
            options = {"batch_size": first.size, "devices": [first.device]}
            images = np.asarray(pipe.family.decode(pipe, latents, **options))
            if self._preview_is_of_noise and np.isfinite(images[0]).all():
                self._preview, self._preview_is_of_noise = fit_preview(latents[0], images[0]), False
        except BaseException as error:  # noqa: BLE001 (sent to the clients, likewise)
            for task, _ in finite:
                self._fail(task.id, _fault(error))
            return
        for (task, one), image in zip(finite, images, strict=True):
            self._hand_over(task, one, image)

    def _hand_over(self, task: Task, one: Drawn, image: np.ndarray) -> None:
        if not np.isfinite(image).all():
            self._fail(task.id, self._overflow(task))
            return
        try:
            content = picture_bytes(image, task.format)
        except BaseException as error:  # noqa: BLE001 (likewise)
            self._fail(task.id, _fault(error))
            return
        self._tell(About(task.id, Picture(one.image, content, one.size)))

    def _overflow(self, task: Task) -> Failed:
        """An image came out as NaN or infinity: by the weights, by the request, or by the model itself."""
        message, scale = "the image came out as NaN or infinity", task.options.get("guidance_scale")
        default = self.engine.pipe.default_guidance_scale
        if self._broken_weights is not None:
            return Failed("server_error", f"{message}: {self._broken_weights}")
        if task.guided and scale is not None and scale > default:
            hint = f"send a smaller guidance_scale than {scale:g}, as {default:g}"
            return Failed("invalid_request", f"{message}: {hint}", "guidance_scale")
        return Failed(
            "server_error", f"{message}: the model may need another --dtype, as bfloat16 or float32"
        )

    @functools.cached_property
    def _broken_weights(self) -> str | None:
        """Which parameters are not finite, looked for once."""
        try:
            for name, network in self.engine.pipe.networks.items():
                check_finite(name, network)
        except CheckpointError as error:
            return str(error)
        return None

    def _fail(self, order_id: str, failure: Failed) -> None:
        """Gives an order up."""
        self.send(Cancel(order_id))
        self._tell(About(order_id, failure))

    # ---------------------------------------------------------------- the steps

    def _run(self) -> None:
        try:
            self.engine.warm_up()
            self._warm_up_decoding()
            self._tell(Ready(self._beat()))
            while not self._stopping:
                self._between_steps()
                if self.engine.busy:
                    self._timed_step()
                else:
                    self._last_step = None
                if not self.engine.busy or time.monotonic() >= self._last_beat + BEAT_SECONDS:
                    self._last_beat = time.monotonic()
                    self._tell(self._beat())
        except BaseException as error:
            LOG.error("the engine has stopped", exc_info=error)
            self._tell(Died(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))

    def _warm_up_decoding(self) -> None:
        """Compiles the decoders of all tables; what they make of noise is a first map for previews."""
        pipe, engine = self.engine.pipe, self.engine
        for shape, size, device in {
            (table.kind.compiled.latent_shape, table.size, table.device) for table in engine.tables
        }:
            noise = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
            images = np.asarray(pipe.family.decode(pipe, noise, batch_size=size, devices=[device]))
            if self._preview is None and pipe.autoencoder is not None and np.isfinite(images).all():
                self._preview = fit_preview(noise[0], images[0])

    def _between_steps(self) -> None:
        """Takes cancelled images out and lets new ones in; waits while there are none."""
        with self._lock:
            if not (self.engine.busy or self._begun or self._cancelled or self._stopping):
                self._lock.wait(IDLE_SECONDS)
            cancelled, self._cancelled = set(self._cancelled), []
            for order_id in cancelled:
                self.engine.cancel(order_id)
                self._tasks.pop(order_id, None)
                self._jobs.pop(order_id, None)
            still, begun, self._begun = [], self._begun, []
            for one in begun:
                job = self._jobs.get(one.order_id)
                if job is None:  # it was cancelled
                    continue
                if self.engine.has_room(job):
                    self.engine.begin(job, one.image, one.order_id, one.waiting)
                else:
                    still.append(one)
            self._begun = still

    def _timed_step(self) -> None:
        """A step; what lies between two of them belongs to the time that is promised."""
        last, self._last_step = self._last_step, time.monotonic()
        if last is not None:
            alone = sum(table.seconds or 0.0 for table in self.engine.tables if table.busy)
            now = max((self._last_step - last) / alone, 1.0) if alone else 1.0
            self._share += NEW * (min(now, MAX_SHARE) - self._share)
        self._step()

    def _step(self) -> None:
        tasks = self._tasks
        wanted = frozenset(task.id for task in list(tasks.values()) if task.previews)
        seen, drawn, failed = self.engine.step(wanted)
        self._steps += 1
        for one in seen:
            task = tasks.get(str(one.ticket))
            if task is not None and task.progress:
                progress = Progress(one.image, one.done, one.total, self._picture_of(task, one))
                self._tell(About(task.id, progress))
        together = collections.defaultdict(list)
        for one in drawn:
            task = tasks.get(str(one.ticket))
            if task is not None:
                together[one.size, one.device, one.latents.shape].append((task, one))
        for images in together.values():
            self._finish.submit(self._finish_images, images)
        for ticket, error in failed.items():
            self._fail(str(ticket), _fault(error))

    def _picture_of(self, task: Task, seen: Seen) -> np.ndarray | None:
        """A preview of an image that goes on, at `task.previews` places of its way."""
        wanted = is_previewed(seen.done, seen.total, task.previews)
        if seen.x_0 is None or not wanted or not np.isfinite(seen.x_0).all():
            return None
        if self.engine.pipe.autoencoder is None:
            return np.clip(seen.x_0, -1, 1)
        return None if self._preview is None else self._preview(seen.x_0)

    def _beat(self) -> Beat:
        engine, embeddings = self.engine, self._embeddings
        kinds = tuple(
            KindFacts(engine.capacity(kind), engine.evaluations(kind), self._share * engine.seconds(kind))
            for kind in engine.kinds
        )
        with self._lock:
            waiting = [self._jobs.get(one.order_id) for one in self._begun]
            begun = self._num_begun
        left = sum(job.num_steps * engine.seconds(job.kind) for job in waiting if job is not None)
        return Beat(
            kinds,
            begun,
            self._share * (engine.seconds_left() + left),
            engine.busy,
            sum(facts.slots for facts in kinds),
            self._steps,
            self._share * max((table.seconds or 0.0 for table in engine.tables), default=0.0),
            0 if embeddings is None else embeddings.hits,
            0 if embeddings is None else embeddings.num_bytes,
        )


class LocalWorker:
    """A worker in this process: it cannot be started again, and a crash is everybody's.

    Args:
        make: loads the model, once.
    """

    restartable = False

    def __init__(self, make: Callable[[], Made]):
        self._make = make
        self._made: Made | None = None
        self._worker: Worker | None = None

    def load(self) -> Loaded:
        """Loads the model.

        Raises:
            JaxldmError: what cannot be served.
        """
        if self._made is None:
            self._made = self._make()
        return Loaded(self._made.offer, self._made.engine.sizes)

    def start(self, tell: Callable[[Report], None]) -> None:
        """Starts the thread."""
        self.load()
        assert self._made is not None
        self._worker = Worker(self._made, tell)
        self._worker.start()

    def send(self, command: Command) -> None:
        """Hands in a command."""
        if self._worker is not None:
            self._worker.send(command)

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end after `Stop`."""
        if self._worker is not None:
            self._worker.join(timeout)


def _fault(error: BaseException) -> Failed:
    """What went wrong in the server: its kind for the client, all of it for the log."""
    LOG.error("a request failed", exc_info=error)
    return Failed("server_error", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
