"""What a client asked for, and what becomes of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


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


class Failed(NamedTuple):
    """The order ends without its images. `type` is "invalid_request", "deadline_exceeded", "cancelled",
    "fatal_request" or "server_error".
    """

    type: str
    message: str
    param: str | None = None


Event = Accepted | Waiting | Progress | Picture | Failed


class Task(NamedTuple):
    """What a worker, or a replica of several, needs to know of an order; see there."""

    id: str
    client: str
    prompts: Sequence[Any]
    options: Mapping[str, Any]
    seed: int
    num_images: int
    num_steps: int
    guided: bool
    format: str
    progress: bool
    previews: int


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
        station: whose worker draws it; None while none does.
        preparing: whether the worker is checking it and encoding its texts.
        kind: of its images, a number of the worker's; None before they are prepared.
        left: images that are not done.
        out: images that the worker has been asked to begin, and that are not done.
        accepted: whether the listener knows that it was checked.
        crashes: how many workers ended of their own while they were at it.
        kills: how many were ended from outside.
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
    station: Any = None
    preparing: bool = False
    kind: int | None = None
    left: set[int] = dataclasses.field(default_factory=set)
    out: set[int] = dataclasses.field(default_factory=set)
    accepted: bool = False
    crashes: int = 0
    kills: int = 0

    def __post_init__(self):
        self.left = set(range(self.num_images))

    @property
    def in_flight(self) -> bool:
        """Whether its worker is busy with it now, and not just keeps it."""
        return self.preparing or bool(self.out)

    def task(self) -> Task:
        """What its worker is sent."""
        facts = {name: getattr(self, name) for name in Task._fields}
        return Task(**facts | {"options": dict(self.options), "previews": self.previews * self.progress})

    def fingerprint(self) -> str:
        """Equal for orders of the same images."""
        facts = self.prompts, sorted(self.options.items()), self.seed, self.num_images
        return hashlib.sha256(repr(facts).encode()).hexdigest()
