"""An engine: tables of slots, and which image is in which slot. Owned by one thread.

K, the number of slots of a table, is one of a few sizes. An image stays in its table: it is drawn with one K
from its first step to its last, as `pipe` draws it with that `batch_size`.
"""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxldm.arguments import checked, count, optional, several, some_devices
from jaxldm.errors import InvalidArgumentError, JaxldmError
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.serving import slots
from jaxldm.serving.jobs import AN_ENCODER, Job, Kind, prepare

SIZES = (1, 4, 16)
NEW = 0.2  # weight of the newest step in the mean of a table's seconds
WARMING = 2  # tables at once: while one is compiled, or read from the cache, the next is traced


class Place(NamedTuple):
    """An image in a slot.

    Attributes:
        ticket: whose it is: what `begin` was given.
        image: its number in the job.
        left: its steps that are still to be taken.
        total: all of its steps.
    """

    ticket: Hashable
    image: int
    left: int
    total: int


class Drawn(NamedTuple):
    """An image behind its last step.

    Attributes:
        ticket, image: as in `Place`.
        latents: [h, w, c].
        size: K of the table that it was drawn in.
        device: where.
    """

    ticket: Hashable
    image: int
    latents: Float[np.ndarray, "h w c"]
    size: int
    device: Any


class Seen(NamedTuple):
    """What one step of the engine left behind for an image that goes on.

    Attributes:
        ticket, image: as in `Place`.
        done, total: steps taken, and in all.
        x_0: [h, w, c], the clean image as the network sees it now.
    """

    ticket: Hashable
    image: int
    done: int
    total: int
    x_0: Float[np.ndarray, "h w c"] | None = None


class Table:
    """K slots of one kind on one device.

    Attributes:
        places: of each slot, the image in it or None.
        seconds: mean of the last steps; None before the first.
    """

    def __init__(self, kind: Kind, example: slots.Rows, size: int, device: Any):
        self.kind, self.size, self.device = kind, size, device
        self._example = example
        self.places: list[Place | None] = [None] * size
        self.seconds: float | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets all images, as after a step that failed."""
        self.places = [None] * self.size
        empty = slots.empty(self.size, self._example, self.kind.compiled)
        self._slots = jax.device_put(empty, self.device)
        self._pictures: Any = None

    @property
    def busy(self) -> int:
        """How many slots have an image."""
        return sum(place is not None for place in self.places)

    def begin(self, job: Job, image: int, ticket: Hashable) -> None:
        """Puts an image into a free slot."""
        slot = self.places.index(None)
        row = jax.tree.map(lambda leaf: leaf[image], job.rows)
        start = None if job.start is None else job.start[image]
        self._slots = slots.join(self._slots, np.int32(slot), row, start, compiled=self.kind.compiled)
        self.places[slot] = Place(ticket, image, job.num_steps, job.num_steps)

    def cancel(self, ticket: Hashable) -> int:
        """Frees the slots of a ticket. What is in them goes on unseen until another image comes."""
        found = [k for k, place in enumerate(self.places) if place is not None and place.ticket == ticket]
        for slot in found:
            self.places[slot] = None
        return len(found)

    def advance(self, network: Network) -> None:
        """Starts one step of all images; does not wait for it."""
        self._started = time.perf_counter()
        self._slots, self._pictures = slots.advance(network, self._slots, compiled=self.kind.compiled)

    def finish_step(self, wanted: frozenset[Hashable] = frozenset()) -> tuple[list[Seen], list[Drawn]]:
        """Waits for the step, and returns what each image has come to.

        Args:
            wanted: tickets of which x_0 is to be brought to the host.
        """
        x, x_0 = (_on_host(pictures) for pictures in jax.block_until_ready(self._pictures))
        seconds = time.perf_counter() - self._started
        self.seconds = seconds if self.seconds is None else NEW * seconds + (1 - NEW) * self.seconds
        seen, drawn = [], []
        for slot, place in enumerate(self.places):
            if place is None:
                continue
            ticket, image, left, total = place
            if left > 1:
                self.places[slot] = place._replace(left=left - 1)
                picture = x_0()[slot] if ticket in wanted else None
                seen.append(Seen(ticket, image, total - left + 1, total, picture))
            else:
                self.places[slot] = None
                drawn.append(Drawn(ticket, image, x()[slot], self.size, self.device))
        return seen, drawn


class Engine:
    """Draws the images of jobs in slots that they share.

    Before `warm_up` say with `allow` which calls will come: what jobs may have in common is compiled there,
    and jobs of other kinds are refused.

    Args:
        pipe: the model.
        sizes: the K of the tables, compiled for each kind.
        devices: each has tables of its own; default the first device alone.
        encode: in place of the family's: see `sharing`.

    >>> import jax
    >>> from jaxldm import pipelines, serving                                            # doctest: +SKIP
    >>> engine = serving.Engine(pipelines.load("runs/mini-ldm"), sizes=(16,))            # doctest: +SKIP
    >>> engine.allow([0])                                                                # doctest: +SKIP
    >>> engine.warm_up()                                                                 # doctest: +SKIP
    """

    @checked(
        pipe=A_PIPELINE,
        sizes=several(count(1, 1024)),
        devices=optional(some_devices),
        encode=AN_ENCODER,
    )
    def __init__(
        self,
        pipe: Pipeline,
        *,
        sizes: Sequence[int] = SIZES,
        devices: Sequence[Any] | None = None,
        encode: Any = None,
    ):
        if not sizes:
            raise InvalidArgumentError("sizes is empty: give numbers of slots, as in sizes=(1, 4, 16)")
        if pipe.mesh is not None:
            raise InvalidArgumentError("slots need whole devices: load the model without mesh=")
        self.pipe, self.sizes = pipe, tuple(sorted(set(sizes)))
        self.devices = tuple(jax.local_devices()[:1] if devices is None else devices)
        self._encode = encode
        self._examples: dict[Kind, Job] = {}
        self._from_images: dict[Kind, Job] = {}  # examples, too
        self._tables: dict[Kind, list[Table]] = {}
        self._networks: dict[Any, Network] = {}

    def prepare(self, key: Any, *prompts: Any, **options: Any) -> Job:
        """The job of the call pipe(key, *prompts, **options); any thread may ask.

        Raises:
            InvalidArgumentError, UnknownNameError, DataError: as the call itself; a kind that is not allowed.
        """
        job = prepare(self.pipe, key, *prompts, encode=self._encode, **options)
        if job.kind not in self._examples:
            raise InvalidArgumentError(f"no slots are compiled for this call: {self._difference(job.kind)}")
        return job

    def allow(self, *prompts: Any, **options: Any) -> None:
        """Jobs of calls like this one will be taken; see `pipe.warm_up` for what may differ."""
        job = prepare(self.pipe, jax.random.key(0), *prompts, encode=self._encode, **options)
        self._examples.setdefault(job.kind, job)
        if job.start is not None:
            self._from_images.setdefault(job.kind, job)

    def warm_up(self) -> None:
        """Compiles all tables, takes a step in each and measures it."""
        for device in self.devices:
            self._networks[device] = jax.device_put(self.pipe.denoiser, device)
        tables = [
            Table(kind, job.rows, size, device)
            for kind, job in self._examples.items()
            for size in self.sizes
            for device in self.devices
        ]
        with concurrent.futures.ThreadPoolExecutor(WARMING, "jaxldm-warm-up") as pool:
            for _ in pool.map(self._one_step, tables):
                pass  # and raises what was raised there
        for table in tables:  # measured when nothing else is computed
            table.seconds = None
            self._one_step(table)
        self._tables = {kind: [one for one in tables if one.kind == kind] for kind in self._examples}

    def _one_step(self, table: Table) -> None:
        """A step of an example in a table; the first one compiles."""
        for examples in (self._from_images, self._examples):
            if table.kind in examples:
                table.cancel(None)
                table.begin(examples[table.kind], 0, None)
        table.advance(self._networks[table.device])
        table.finish_step()
        table.cancel(None)

    @property
    def ready(self) -> bool:
        """Whether everything that is allowed has been compiled."""
        return bool(self._tables) and set(self._tables) == set(self._examples)

    @property
    def tables(self) -> Iterator[Table]:
        """All tables."""
        return (table for tables in self._tables.values() for table in tables)

    @property
    def busy(self) -> int:
        """Images in slots."""
        return sum(table.busy for table in self.tables)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is allowed; the order is that of `allow`."""
        return tuple(self._examples)

    def capacity(self, kind: Kind) -> int:
        """How many images of a kind are drawn at once."""
        return sum(table.size for table in self._tables.get(kind, ()))

    def evaluations(self, kind: Kind) -> int:
        """Rows of the network's batch that a step of an image of a kind takes."""
        return self._examples[kind].evaluations

    def seconds(self, kind: Kind) -> float:
        """What a step of one image of a kind takes of the engine's time when its slots are full."""
        tables = self._tables.get(kind, ())
        shares = (table.seconds / table.size for table in tables if table.seconds is not None)
        return min(shares, default=0.0) / len(self.devices)

    def seconds_left(self) -> float:
        """What the images in slots will still take of the engine's time, likewise."""
        left = 0.0
        for kind, tables in self._tables.items():
            steps = sum(place.left for table in tables for place in table.places if place is not None)
            left += steps * self.seconds(kind)
        return left

    def has_room(self, job: Job) -> bool:
        """Whether an image of the job can begin now."""
        return any(table.busy < table.size for table in self._tables[job.kind])

    def begin(self, job: Job, image: int, ticket: Hashable, waiting: int = 1) -> int:
        """Puts an image of a job into a slot, and returns K of its table.

        Args:
            image: its number, below `job.num_images`.
            ticket: whatever the caller calls the job by.
            waiting: how many images of this kind wait, this one included; a table of about that size is
                opened where all that are in use are full.
        """
        tables = self._tables[job.kind]
        chosen = choose([(table.size, table.busy) for table in tables], waiting)
        if chosen is None:
            raise InvalidArgumentError("all slots have images: take steps until one is done")
        tables[chosen].begin(job, image, ticket)
        return tables[chosen].size

    def cancel(self, ticket: Hashable) -> int:
        """Frees the slots of a ticket, and returns how many they were."""
        return sum(table.cancel(ticket) for table in self.tables)

    def step(
        self, wanted: frozenset[Hashable] = frozenset()
    ) -> tuple[list[Seen], list[Drawn], dict[Hashable, Exception]]:
        """One step of every table that has images: (those that go on, those that are done, failures).

        Args:
            wanted: tickets of which x_0 is to be seen.
        """
        in_use = [table for table in self.tables if table.busy]
        failed: dict[Hashable, Exception] = {}
        seen: list[Seen] = []
        drawn: list[Drawn] = []
        started = []
        for table in in_use:  # all devices compute while the first is waited for
            try:
                table.advance(self._networks[table.device])
                started.append(table)
            except (RuntimeError, JaxldmError) as error:
                failed |= self._fail(table, error)
        for table in started:
            try:
                more = table.finish_step(wanted)
            except RuntimeError as error:
                failed |= self._fail(table, error)
            else:
                seen += more[0]
                drawn += more[1]
        return seen, drawn, failed

    def _fail(self, table: Table, error: Exception) -> dict[Hashable, Exception]:
        """Empties a table whose step failed, as when memory runs out: its arrays are gone."""
        failed = {place.ticket: error for place in table.places if place is not None}
        table.clear()
        return failed

    def _difference(self, kind: Kind) -> str:
        """In words, how a kind differs from those that are allowed."""

        def facts(kind: Kind) -> dict[str, str]:
            height, width, _ = kind.compiled.latent_shape
            return {
                "num_inference_steps": str(kind.compiled.sampler.num_steps or "any"),  # one with quirks
                "solver": repr(kind.compiled.sampler.solver.step).removesuffix(".step")[:60],
                "latents": f"{height}x{width}",
                "conditions": " ".join(f"{dtype}{list(shape)}" for shape, dtype in kind.shapes),
            }

        mine = facts(kind)
        others = [facts(other) for other in self._examples]
        for name, value in mine.items():
            choices = dict.fromkeys(other[name] for other in others)
            if value not in choices:
                return f"{name} {value}, allowed: {', '.join(choices)}"
        return "allow a call like it before warm_up"


def _on_host(array: Any) -> Callable[[], np.ndarray]:
    """The array on the host, when it is asked for; indexing it on the device would compile for each index."""
    return functools.cache(lambda: np.asarray(array))


def choose(tables: Sequence[tuple[int, int]], waiting: int) -> int | None:
    """Which table an image goes to, of tables (K, images in it): its place, or None where all are full.

    Tables in use are filled up first, the largest before the others. Where they are full, the smallest
    unused table that holds all that wait is opened, or else the largest unused one.

    >>> choose([(1, 0), (4, 0), (16, 0)], 3), choose([(1, 0), (4, 2), (16, 0)], 9), choose([(1, 1)], 1)
    (1, 1, None)
    """
    in_use = [(size, -k) for k, (size, busy) in enumerate(tables) if 0 < busy < size]
    if in_use:
        return -max(in_use)[1]
    unused = [(size, k) for k, (size, busy) in enumerate(tables) if not busy]
    if not unused:
        return None
    enough = [table for table in unused if table[0] >= waiting]
    return min(enough)[1] if enough else -max((size, -k) for size, k in unused)[1]
