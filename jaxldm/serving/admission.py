"""Who may wait, how long, and who is next: data with the time handed in, no clock and no thread.

A request is refused at once where it would wait too long, rather than accepted and dropped later. What has
been accepted is served by deficit round robin: every client's turn comes, whatever others have queued.
"""

from __future__ import annotations

import collections
import dataclasses
import ipaddress
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

from jaxldm.arguments import check_fields, count, number

MANY_CLIENTS = 4096  # buckets beyond which those that are full again are forgotten
MAX_NAME = 64  # characters of a client's name
MOST_CLIENTS = 2**16  # and beyond which those that were used last are kept


@dataclasses.dataclass(frozen=True)
class Limits:
    """What admission promises and asks for.

    Attributes:
        max_queue: requests that wait.
        max_queue_seconds: the longest estimated time from acceptance to the last step.
        requests_per_second: of one client, on average; a bucket of tokens.
        burst: requests of one client at once.
        quantum: rows of the network's batch that a client is given in each round.
    """

    max_queue: int = 64
    max_queue_seconds: float = 120.0
    requests_per_second: float = 10.0
    burst: int = 5
    quantum: int = 50

    def __post_init__(self):
        check_fields(
            self,
            max_queue=count(1),
            max_queue_seconds=number(above=0),
            requests_per_second=number(above=0),
            burst=count(1),
            quantum=count(1),
        )


def client_of(address: str) -> str:
    """Who is behind an address, for turns and rates: in IPv6 all of a network of 64 bits, which one has.

    >>> client_of("192.0.2.7"), client_of("2001:db8::1:2:3:4"), client_of("::ffff:192.0.2.7")
    ('192.0.2.7', '2001:db8::', '192.0.2.7')
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # what a proxy says, perhaps
        return address[:MAX_NAME]
    if not isinstance(found, ipaddress.IPv6Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.IPv6Address(int(found) >> 64 << 64))


class Refusal(NamedTuple):
    """Why a request is not accepted.

    Attributes:
        type: "rate_limit_exceeded", "queue_full", "queue_too_long" or "deadline_too_short".
        message: what happened, and what to do.
        retry_after: seconds after which it is worth another try.
    """

    type: str
    message: str
    retry_after: float


class Item(NamedTuple):
    """One image that waits.

    Attributes:
        ticket: of its request.
        image: its number in the request.
        cost: what fairness counts, see `Job.cost`.
        seconds: estimated, of the engine's time.
        job: whatever belongs to it.
    """

    ticket: Hashable
    image: int
    cost: float
    seconds: float
    job: Any = None


# ---------------------------------------------------------------- a bucket of tokens


class Bucket(NamedTuple):
    """How many tokens there were at which time."""

    tokens: float
    time: float


def take(bucket: Bucket | None, now: float, rate: float, burst: float) -> tuple[Bucket, float]:
    """(the bucket, 0) after a token was taken, or (the bucket, seconds until there is one).

    Args:
        bucket: None is a full one.
        now: in seconds, of any clock; earlier than before counts as no time.
        rate: tokens a second that come back.
        burst: the most it holds.

    >>> take(None, 0.0, rate=2.0, burst=1)
    (Bucket(tokens=0.0, time=0.0), 0.0)
    >>> take(Bucket(0.0, 0.0), 0.25, rate=2.0, burst=1)
    (Bucket(tokens=0.5, time=0.25), 0.25)
    """
    bucket = Bucket(float(burst), now) if bucket is None else bucket
    now = max(now, bucket.time)
    tokens = min(float(burst), bucket.tokens + (now - bucket.time) * rate)
    if tokens >= 1:
        return Bucket(tokens - 1, now), 0.0
    return Bucket(tokens, now), (1 - tokens) / rate


# ---------------------------------------------------------------- deficit round robin


class FairQueue:
    """Images by client, served in turn by cost: deficit round robin (Shreedhar and Varghese 1996).

    In each round a client may spend `quantum` more, and spends it on its images in the order in which they
    came. Over time every client that waits gets the same share of the engine, whether its images are few and
    expensive or many and cheap. Whoever comes without having been served lately is served first, on credit,
    which its next rounds pay back (as new flows in RFC 8290): an image of a client that has only that waits
    for none of those that others have queued.
    """

    def __init__(self, quantum: float):
        self.quantum = quantum
        self._items: dict[Hashable, collections.deque[Item]] = {}  # empty for those that only owe
        self._deficits: dict[Hashable, float] = {}  # below 0: owed
        self._new: collections.deque[Hashable] = collections.deque()
        self._round: collections.deque[Hashable] = collections.deque()

    def __len__(self) -> int:
        return sum(map(len, self._items.values()))

    def __iter__(self) -> Iterator[Item]:
        return (item for items in self._items.values() for item in items)

    @property
    def tickets(self) -> set[Hashable]:
        """The requests that wait."""
        return {item.ticket for item in self}

    def push(self, client: Hashable, item: Item) -> None:
        """Adds an image behind the client's others."""
        if client not in self._items:
            self._items[client] = collections.deque()
            self._deficits[client] = 0.0
            self._new.append(client)
        self._items[client].append(item)

    def put_back(self, client: Hashable, items: list[Item]) -> None:
        """Adds images in front of the client's others."""
        for item in reversed(items):
            self.push(client, item)
            self._items[client].rotate(1)

    def pop(self, fits: Callable[[Item], bool] = lambda item: True) -> Item | None:
        """The next image, or None where none waits that fits.

        Args:
            fits: whether there is a slot for it. Clients whose first image has none keep their turn.
        """
        able = {client for client, items in self._items.items() if items and fits(items[0])}
        if not able:
            return None
        for client in self._new:
            if client in able:
                return self._serve_on_credit(client)
        self._pass_rounds(able)
        while True:
            for _ in range(len(self._round)):
                client = self._round[0]
                if client in able:
                    if self._deficits[client] >= self._items[client][0].cost:
                        return self._serve(client)
                    self._deficits[client] += self.quantum
                    if self._deficits[client] >= self._items[client][0].cost:
                        return self._serve(client)
                elif not self._items[client]:
                    self._deficits[client] += self.quantum
                    if self._deficits[client] >= 0:
                        self._forget(client)
                        continue
                self._round.rotate(-1)

    def _pass_rounds(self, able: set[Hashable]) -> None:
        """Passes as many whole rounds at once as go by without anybody having saved up enough."""
        short = (self._items[client][0].cost - self._deficits[client] for client in able)
        rounds = max(math.ceil(min(short) / self.quantum) - 1, 0)
        for client in [*self._round]:
            if client in able or not self._items[client]:
                self._deficits[client] += rounds * self.quantum
                self._leave_if_paid(client)

    def _serve(self, client: Hashable) -> Item:
        item = self._items[client].popleft()
        self._deficits[client] -= item.cost
        if not self._items[client]:
            self._leave_if_paid(client)
        elif self._deficits[client] < self._items[client][0].cost:
            self._round.rotate(-1)  # its share of this round is spent
        self._settle()
        return item

    def _serve_on_credit(self, client: Hashable) -> Item:
        item = self._items[client].popleft()
        self._deficits[client] -= item.cost
        self._new.remove(client)
        self._round.append(client)
        self._settle()
        return item

    def _leave_if_paid(self, client: Hashable) -> None:
        """Forgets a client for which nothing waits; what it owes stays until it is paid, or nobody waits."""
        if not self._items[client] and self._deficits[client] >= 0:
            self._forget(client)  # nobody saves up while nothing waits

    def _settle(self) -> None:
        """Where nobody waits nobody owes."""
        if not any(self._items.values()):
            for client in [*self._items]:
                self._forget(client)

    def _forget(self, client: Hashable) -> None:
        del self._items[client], self._deficits[client]
        (self._new if client in self._new else self._round).remove(client)

    def in_turn(self) -> Iterator[Item]:
        """All that waits, in the order in which it would begin if nobody else came."""
        copy = FairQueue(self.quantum)
        copy._items = {client: items.copy() for client, items in self._items.items()}
        copy._deficits, copy._new = self._deficits.copy(), self._new.copy()
        copy._round = self._round.copy()
        return iter(copy.pop, None)

    def remove(self, ticket: Hashable) -> int:
        """Takes a request out, and returns how many of its images waited."""
        removed = 0
        for client, items in [*self._items.items()]:
            kept = collections.deque(item for item in items if item.ticket != ticket)
            removed += len(items) - len(kept)
            self._items[client] = kept
            self._leave_if_paid(client)
        self._settle()
        return removed


# ---------------------------------------------------------------- both, and the bounds


class Admission:
    """The door and the queue.

    Attributes:
        limits: see `Limits`.
        queue: what was accepted and has not begun.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.queue = FairQueue(limits.quantum)
        self._buckets: dict[Hashable, Bucket] = {}
        self._many = MANY_CLIENTS
        self._deadlines: dict[Hashable, float] = {}

    @property
    def seconds(self) -> float:
        """Estimated time of the engine that all that waits will take."""
        return sum(item.seconds for item in self.queue)

    def admit(
        self,
        now: float,
        client: Hashable,
        items: list[Item],
        seconds_before: float = 0.0,
        timeout: float | None = None,
    ) -> Refusal | None:
        """Accepts a request, or says why not.

        Args:
            now: in seconds, of a clock that does not go back.
            client: whose bucket and turn it is.
            items: its images, of one ticket.
            seconds_before: what the images in slots will still take.
            timeout: seconds after which the request is worth nothing to the client.
        """
        limits, waiting = self.limits, len(self.queue.tickets)
        self._forget_full_buckets(now)
        taken = take(self._buckets.get(client), now, limits.requests_per_second, limits.burst)
        self._buckets[client] = taken[0]
        if taken[1] > 0:
            rate = f"{limits.requests_per_second:g} requests a second, {limits.burst} at once"
            return Refusal(
                "rate_limit_exceeded", f"a client may send {rate}: wait {taken[1]:.2g} s", taken[1]
            )
        if waiting >= limits.max_queue:
            message = f"{waiting} requests wait already, and no more may"
            return Refusal("queue_full", message, max(self.seconds / waiting, 1.0))
        wait = seconds_before + self.seconds + sum(item.seconds for item in items)
        if wait > limits.max_queue_seconds:
            message = (
                f"this would take about {wait:.0f} s, more than the {limits.max_queue_seconds:g} s allowed"
            )
            hint = ": ask for fewer images or steps, or later"
            return Refusal("queue_too_long", message + hint, max(wait - limits.max_queue_seconds, 1.0))
        if timeout is not None and wait > timeout:
            message = (
                f"this would take about {wait:.0f} s, more than timeout={timeout:g}: give it more, or later"
            )
            return Refusal("deadline_too_short", message, max(wait - timeout, 1.0))
        for item in items:
            self.queue.push(client, item)
        if timeout is not None:
            self._deadlines[items[0].ticket] = now + timeout
        return None

    def next(self, fits: Callable[[Item], bool] = lambda item: True) -> Item | None:
        """The image that begins next, or None."""
        return self.queue.pop(fits)

    def places(self, seconds_before: float = 0.0) -> dict[Hashable, tuple[int, float]]:
        """Of each request that waits: how many others begin before it, and seconds until its last step.

        Args:
            seconds_before: what the images in slots will still take.
        """
        ahead: dict[Hashable, int] = {}
        until: dict[Hashable, float] = {}
        seconds = seconds_before
        for item in self.queue.in_turn():
            ahead.setdefault(item.ticket, len(ahead))
            seconds += item.seconds
            until[item.ticket] = seconds
        return {ticket: (place, until[ticket]) for ticket, place in ahead.items()}

    def finished(self, ticket: Hashable) -> None:
        """Forgets a request that is done, failed or cancelled, and what of it still waits."""
        self.queue.remove(ticket)
        self._deadlines.pop(ticket, None)

    @property
    def next_deadline(self) -> float | None:
        """When the first of the requests expires that were accepted with a timeout."""
        return min(self._deadlines.values(), default=None)

    def expired(self, now: float) -> list[Hashable]:
        """Requests that were accepted with a timeout that is over."""
        return [ticket for ticket, deadline in self._deadlines.items() if now >= deadline]

    def _forget_full_buckets(self, now: float) -> None:
        if len(self._buckets) < self._many:
            return
        rate, burst = self.limits.requests_per_second, self.limits.burst
        self._buckets = {
            client: bucket
            for client, bucket in self._buckets.items()
            if bucket.tokens + (now - bucket.time) * rate < burst
        }
        if len(self._buckets) >= MOST_CLIENTS:
            latest = sorted(self._buckets.items(), key=lambda entry: entry[1].time)
            self._buckets = dict(latest[-MOST_CLIENTS // 2 :])
        self._many = max(MANY_CLIENTS, 2 * len(self._buckets))  # looked at once for each that came
