"""Replicas behind one door, in this process and without Ray: who draws, who is asked again, who is told."""

import asyncio
import contextlib
import io
import random

import numpy as np
import pytest
from PIL import Image
from served import drawn_alone, wait_until

from jaxldm import serving
from jaxldm.serving import replicas
from jaxldm.serving.messages import Beat, KindFacts, Loaded
from jaxldm.serving.orders import Failed, Order, Picture, Progress
from jaxldm.serving.replicas import Calls, Replica, ReplicaBeat, Replicas
from jaxldm.serving.service import MAX_KILLS, Service
from jaxldm.serving.worker import LocalWorker, Made

SLOTS = 2
LIMITS = serving.Limits(burst=1000, requests_per_second=1000, max_queue=1000)


class Lost(Exception):
    """What a call to a replica that is gone ends with."""


class Cluster:
    """Replicas that draw an image in two steps of a millisecond.

    Attributes:
        alive: names of those that run, each with how many steps it has taken.
        wrong: seeds of orders that are refused; `fatal` those that are found out to end workers.
        at_once, most: images under way, and the most that ever were.
        ended: how many draws were ended from outside.
    """

    def __init__(self, *names, wrong=(), fatal=()):
        self.alive, self.wrong, self.fatal = dict.fromkeys(names, 0), set(wrong), set(fatal)
        self.at_once = self.most = self.ended = self.lost = 0
        self.gate = True

    async def loaded(self):
        return Loaded("an offer", (SLOTS,))

    async def check(self, task):
        await self._who()
        return Failed("invalid_request", "no", "seed") if task.seed in self.wrong else 0

    async def _who(self):
        while not self.alive:
            await asyncio.sleep(0.001)
        return random.choice(list(self.alive))

    async def draw(self, task, image):
        name = await self._who()
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            for step in range(2):
                await asyncio.sleep(0.001)
                while not self.gate:
                    await asyncio.sleep(0.001)
                if name not in self.alive:
                    self.lost += 1
                    raise Lost(name)
                self.alive[name] += 1
                yield Progress(image, step + 1, 2)
            if task.seed in self.fatal:
                yield Failed("fatal_request", "this request ended 2 workers")
            else:
                yield Picture(image, b"%d" % task.seed, SLOTS)
        except GeneratorExit:
            self.ended += 1
            raise
        except asyncio.CancelledError:
            self.ended += 1
            raise
        finally:
            self.at_once -= 1

    async def beats(self):
        beat = Beat((KindFacts(SLOTS, 1, 1e-4),), slots=SLOTS)
        return [ReplicaBeat(name, beat._replace(steps=steps)) for name, steps in self.alive.items()]

    def calls(self):
        return Calls(self.loaded, self.check, self.draw, self.beats, lambda error: isinstance(error, Lost))


@pytest.fixture
def started(monkeypatch):
    """A function that starts a service in front of replicas, and returns one that sends it orders."""
    monkeypatch.setattr(replicas, "BEAT_SECONDS", 0.005)
    monkeypatch.setattr(replicas, "FIRST_DELAY", 0.001)
    services = []

    def start(cluster):
        service = Service([Replicas(cluster.calls())], LIMITS)
        services.append(service)
        assert service.load() == "an offer" and service.sizes == (SLOTS,)
        service.start()
        service.told = {}

        def send(seed, num_images=1):
            told = service.told[seed] = []
            facts = {"prompts": (), "options": {}, "num_steps": 2, "guided": False, "listener": told.append}
            return service.submit(Order(f"order-{seed}", "me", seed=seed, num_images=num_images, **facts))

        service.send = send
        return service

    yield start
    for service in services:
        assert service.close(0)


def pictures(service, seed):
    return sorted(event.image for event in service.told[seed] if isinstance(event, Picture))


def test_all_replicas_are_used_and_what_a_lost_one_had_is_drawn_by_the_others(started):
    cluster = Cluster("a", "b", "c")
    service = started(cluster)
    wait_until(lambda: service.ready and service.stations[0].beat.slots == 3 * SLOTS)
    cluster.gate = False
    for seed in range(20):
        assert service.send(seed, num_images=3) is None
    wait_until(lambda: cluster.at_once == 2 * 3 * SLOTS + 2 * 3 * SLOTS // 4)  # the rest waits at the door
    del cluster.alive["a"]
    cluster.gate = True
    wait_until(lambda: service.open_orders == 0)
    assert all(pictures(service, seed) == [0, 1, 2] for seed in range(20))
    assert cluster.lost >= 1 and service.counters["images"] == 60
    wait_until(lambda: service.stations[0].beat.slots == 2 * SLOTS)
    assert 0 < service.counters["steps"] <= 120 + 2 * cluster.lost


def test_while_no_replica_runs_orders_wait_and_others_are_told_to_come_again(started):
    cluster = Cluster("a")
    service = started(cluster)
    wait_until(lambda: service.ready)
    cluster.gate = False
    assert service.send(1) is None
    wait_until(lambda: cluster.at_once == 1)
    cluster.alive.clear()
    cluster.gate = True
    wait_until(lambda: not service.ready)
    refusal = service.send(2)
    assert refusal is not None and refusal.type == "not_ready"
    cluster.alive["b"] = 0
    wait_until(lambda: service.ready)
    wait_until(lambda: pictures(service, 1) == [0])


def test_a_cancelled_order_ends_at_its_replicas(started):
    cluster = Cluster("a")
    service = started(cluster)
    wait_until(lambda: service.ready)
    cluster.gate = False
    assert service.send(1, num_images=2) is None
    wait_until(lambda: cluster.at_once == 2)
    assert service.cancel("order-1")
    wait_until(lambda: cluster.at_once == 0)
    assert cluster.ended == 2 and service.told[1][-1].type == "cancelled"


def test_what_is_wrong_is_said_and_what_ends_workers_is_remembered(started):
    cluster = Cluster("a", wrong={1}, fatal={2})
    service = started(cluster)
    wait_until(lambda: service.ready)
    assert service.send(1) is None and service.send(2) is None and service.send(3) is None
    wait_until(lambda: service.open_orders == 0)
    assert service.told[1] == [Failed("invalid_request", "no", "seed")]
    assert service.told[2][-1].type == "fatal_request" and pictures(service, 3) == [0]
    refusal = service.send(2)
    assert refusal is not None and refusal.type == "fatal_request"


def test_an_image_whose_replicas_are_all_lost_is_given_up(started, monkeypatch):
    monkeypatch.setattr(replicas, "LONGEST_DELAY", 0.001)
    cluster = Cluster("a")
    asked = []

    async def draw(task, image):
        asked.append(image)
        raise Lost("gone")
        yield

    monkeypatch.setattr(cluster, "draw", draw)
    service = started(cluster)
    wait_until(lambda: service.ready)
    assert service.send(1) is None
    wait_until(lambda: service.open_orders == 0)
    assert len(asked) == MAX_KILLS + 1
    assert service.told[1][-1] == Failed("server_error", "Lost: gone")


@pytest.fixture
def replica(offer, engine, monkeypatch):
    """One with its worker in this process."""
    monkeypatch.setattr(replicas, "WorkerProcess", LocalWorker)
    replica = Replica(lambda: Made(engine, offer))
    yield replica
    engine.gate.set()
    replica._service.close(0)


def task_of(labels, seed, steps):
    options = {"num_inference_steps": steps, "num_images": 3}
    facts = {"num_images": 3, "num_steps": steps, "guided": True, "progress": True}
    order = Order("x", "me", prompts=(labels,), options=options, seed=seed, listener=print, **facts)
    return order.task()


def test_a_replica_draws_one_image_of_a_request_as_it_is_drawn_alone(replica, pipe, offer, engine):
    async def drawn():
        return [event async for event in replica.draw(task_of([2, 0, 1], 7, 3), 1)]

    assert asyncio.run(replica.loaded()) == Loaded(offer, engine.sizes)
    assert asyncio.run(replica.check(task_of([2, 0, 1], 7, 3))) in range(len(engine.kinds))
    failure = asyncio.run(replica.check(task_of(["seven"], 7, 3)))
    assert failure.type == "invalid_request" and "'seven'" in failure.message
    *before, picture = asyncio.run(drawn())
    assert {(event.image, event.total) for event in before} <= {(1, 3)} and picture.image == 1
    alone = drawn_alone(pipe, 7, [2, 0, 1], num_inference_steps=3)[1]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture.content))), alone)
    beat = asyncio.run(replica.beat()).beat
    assert beat is not None and len(beat.kinds) == len(engine.kinds) and beat.slots > 0


def test_a_stream_that_is_closed_frees_its_slot_at_the_replica(replica, engine):
    async def begun_and_left():
        async with contextlib.aclosing(replica.draw(task_of([1], 1, 500), 0)) as events:
            await anext(events)

    asyncio.run(begun_and_left())
    wait_until(lambda: engine.busy == 0)
    assert replica._service.open_orders == 0
