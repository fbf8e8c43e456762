"""What a service tells its workers, and what they report: data that can be sent to another process."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxldm.serving.orders import Failed, Picture, Progress, Task

# ---------------------------------------------------------------- to a worker


class Prepare(NamedTuple):
    """Check an order and encode its texts."""

    task: Task


class Begin(NamedTuple):
    """Draw an image of an order that was prepared, as soon as a slot is free.

    Attributes:
        order_id: of its order.
        image: its number in the order.
        waiting: how many images of its kind wait, this one included.
    """

    order_id: str
    image: int
    waiting: int


class Cancel(NamedTuple):
    """Forget an order: its images leave their slots before the next step."""

    order_id: str


class Stop(NamedTuple):
    """End."""


Command = Prepare | Begin | Cancel | Stop

# ---------------------------------------------------------------- from a worker


class Loaded(NamedTuple):
    """The model is in memory.

    Attributes:
        offer: what it draws.
        sizes: K of its tables of slots.
    """

    offer: Any
    sizes: tuple[int, ...]


class Refused(NamedTuple):
    """The model cannot be served."""

    message: str


class KindFacts(NamedTuple):
    """Of images that share slots.

    Attributes:
        slots: how many there are.
        evaluations: rows of the network's batch that a step of an image takes: 2 under guidance.
        seconds: of the engine's time that a step of an image takes when all slots are full.
    """

    slots: int
    evaluations: int
    seconds: float


class Beat(NamedTuple):
    """A worker is alive, and this far: sent at least once a second, unless a step takes longer.

    Attributes:
        kinds: of the images that it draws, by number.
        begun: how many `Begin` it has read.
        seconds_left: estimated, until the images that it was asked to begin are done.
        busy: slots with an image.
        slots: all slots.
        steps: that were taken in all.
        longest: seconds that a step of the slowest table takes.
        cache_hits, cache_bytes: of encoded texts.
    """

    kinds: tuple[KindFacts, ...]
    begun: int = 0
    seconds_left: float = 0.0
    busy: int = 0
    slots: int = 0
    steps: int = 0
    longest: float = 0.0
    cache_hits: int = 0
    cache_bytes: int = 0


class Ready(NamedTuple):
    """All is compiled."""

    beat: Beat


class Prepared(NamedTuple):
    """An order was checked; `kind` is the number of its images' kind."""

    order_id: str
    kind: int


class About(NamedTuple):
    """Something happened to an order."""

    order_id: str
    event: Progress | Picture | Failed


class Died(NamedTuple):
    """The worker is gone.

    Attributes:
        message: why, as far as it is known.
        by_itself: whether it crashed, hung or ran out of memory, and was not ended by somebody else.
    """

    message: str
    by_itself: bool = True


Report = Loaded | Refused | Ready | Beat | Prepared | About | Died
