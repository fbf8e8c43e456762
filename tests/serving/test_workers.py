"""Workers that are killed, crash, hang or do not start: what was accepted is drawn, and by whom."""

import collections
import itertools
import os
import queue
import random
import signal
import threading
import time

import jax
import pytest
import worker_makers
from hypothesis import given, settings
from hypothesis import strategies as st
from served import wait_until

from jaxldm import serving
from jaxldm.errors import InvalidArgumentError
from jaxldm.serving import stations
from jaxldm.serving.messages import (
    About,
    Beat,
    Begin,
    Cancel,
    Died,
    KindFacts,
    Loaded,
    Prepare,
    Prepared,
    Ready,
)
from jaxldm.serving.orders import Failed, Order, Picture
from jaxldm.serving.pictures import picture_bytes
from jaxldm.serving.processes import WorkerProcess
from jaxldm.serving.service import MAX_KILLS, MAX_PREPARING, Service

SLOTS = 2
BEAT = Beat((KindFacts(SLOTS, 1, 1e-4),), slots=SLOTS)
LIMITS = serving.Limits(burst=1000, requests_per_second=1000, max_queue=1000)


class World:
    """What all fake workers of a test share.

    Attributes:
        crashes: seeds of images that end a worker in their first step.
        hangs: seeds of images in whose first step a worker stays for ever.
        alive: the workers that run.
        deaths: how many ended.
        starts: whether a worker comes up at all.
    """

    def __init__(self, crashes=(), hangs=(), starts=True):
        self.crashes, self.hangs, self.starts = set(crashes), set(hangs), starts
        self.alive, self.deaths, self.drawn = [], 0, collections.Counter()


class FakeWorker:
    """A worker without an engine: an image takes two steps of a millisecond."""

    restartable = True

    def __init__(self, world):
        self.world, self.commands = world, queue.SimpleQueue()
        self.killed = None

    def again(self):
        return FakeWorker(self.world)

    def load(self):
        return Loaded(None, (SLOTS,))

    def start(self, tell):
        self.tell = tell
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, command):
        self.commands.put(command)

    def kill(self, reason, by_itself=True):
        self.killed = Died(reason, by_itself)

    def join(self, timeout=None):
        self.killed = self.killed or Died("the end")

    def _run(self):
        self.world.alive.append(self)
        died = self._work() if self.world.starts else Died("no memory")
        self.world.alive.remove(self)
        self.world.deaths += 1
        self.tell(died)

    def _work(self):
        self.tell(Ready(BEAT))
        tasks, begun = {}, []
        for step in itertools.count(1):
            time.sleep(0.001)
            while not self.commands.empty():
                command = self.commands.get()
                if isinstance(command, Prepare):
                    tasks[command.task.id] = command.task
                    self.tell(Prepared(command.task.id, 0))
                elif isinstance(command, Begin):
                    begun.append((step, command))
                elif isinstance(command, Cancel):
                    begun = [one for one in begun if one[1].order_id != command.order_id]
            seeds = {tasks[command.order_id].seed for _, command in begun}
            while seeds & self.world.hangs and self.killed is None:
                time.sleep(0.001)
            if self.killed is not None:
                return self.killed
            if seeds & self.world.crashes:
                return Died("a crash")
            for first, command in list(begun):
                if step > first:
                    begun.remove((first, command))
                    seed = tasks[command.order_id].seed
                    self.world.drawn[seed, command.image] += 1
                    picture = Picture(command.image, b"%d" % seed, SLOTS)
                    self.tell(About(command.order_id, picture))
            self.tell(BEAT._replace(steps=step))


class Client:
    """Sends orders and keeps what becomes of them."""

    def __init__(self, service):
        self.service, self.pictures, self.failures = service, collections.defaultdict(list), {}

    def send(self, seed, num_images=1, **options):
        def listen(event):
            if isinstance(event, Picture):
                self.pictures[seed].append(event)
            elif isinstance(event, Failed):
                self.failures[seed] = event

        facts = {"prompts": (), "options": {}, "num_steps": 2, "guided": False}
        order = Order(
            f"order-{seed}", "me", seed=seed, num_images=num_images, listener=listen, **facts | options
        )
        return self.service.submit(order)

    def wait(self):
        wait_until(lambda: self.service.open_orders == 0)


@pytest.fixture
def started():
    """A function that starts a service of fake workers."""
    services = []

    def start(world, workers=1, **options):
        service = Service([FakeWorker(world) for _ in range(workers)], LIMITS, **options)
        services.append(service)
        service.start()
        if world.starts:
            wait_until(lambda: service.ready)
        return Client(service)

    yield start
    for service in services:
        service.close(0)


class Silent(FakeWorker):
    """A worker that does nothing by itself, and keeps what it was told."""

    def start(self, tell):
        self.tell, self.told = tell, []
        tell(Ready(BEAT))

    def send(self, command):
        self.told.append(command)


def test_a_client_with_many_orders_has_a_few_prepared_before_another_s_first():
    worker = Silent(World())
    service = Service([worker], LIMITS)
    service.start()
    wait_until(lambda: service.ready)
    facts = {"prompts": (), "options": {}, "num_images": 1, "num_steps": 2, "guided": False}
    for client, number in [*(("many", n) for n in range(20)), ("one", 0)]:
        order = Order(f"{client}-{number}", client, seed=number, listener=lambda event: None, **facts)
        assert service.submit(order) is None

    def prepared():
        return [command.task.id for command in worker.told if isinstance(command, Prepare)]

    assert prepared() == [f"many-{number}" for number in range(MAX_PREPARING)]
    worker.tell(Prepared("many-0", 0))
    wait_until(lambda: len(prepared()) > MAX_PREPARING)
    assert prepared()[-1] == "one-0"
    service.close(0)


def test_an_image_is_promised_no_sooner_than_its_own_steps_take():
    worker = Silent(World())
    service = Service([worker], serving.Limits(burst=10, max_queue_seconds=10.0))
    service.start()
    wait_until(lambda: service.ready)
    worker.tell(BEAT._replace(longest=0.1))
    facts = {"prompts": (), "options": {}, "num_images": 1, "guided": False, "listener": lambda event: None}
    refusal = service.submit(Order("long", "me", seed=0, num_steps=101, **facts))
    assert refusal is not None and refusal.type == "queue_too_long" and "about 10 s" in refusal.message
    assert service.submit(Order("short", "me", seed=0, num_steps=99, **facts)) is None
    service.close(0)


@pytest.mark.parametrize("workers", [1, 2])
def test_who_ends_two_workers_is_failed_and_remembered_and_nobody_else(started, workers, monkeypatch):
    monkeypatch.setattr(stations, "FIRST_DELAY", 0.001)
    world = World(crashes={13})
    client = started(world, workers)
    for seed in range(10, 20):
        assert client.send(seed, num_images=1 + seed % 3) is None
    client.wait()
    assert set(client.failures) == {13} and client.failures[13].type == "fatal_request"
    assert "a crash" in client.failures[13].message
    for seed in {*range(10, 20)} - {13}:
        images = [picture.image for picture in client.pictures[seed]]
        assert sorted(images) == list(range(1 + seed % 3))  # each once
        assert {picture.content for picture in client.pictures[seed]} == {b"%d" % seed}
    assert world.deaths == 2 == client.service.counters["restarts"]
    wait_until(lambda: client.service.ready)
    refusal = client.send(13, num_images=2)
    assert refusal is not None and refusal.type == "fatal_request"
    assert client.send(20) is None
    client.wait()
    assert world.deaths == 2 and len(client.pictures[20]) == 1


@settings(max_examples=8)
@given(st.sets(st.integers(0, 11), max_size=3), st.integers(1, 3), st.integers(0, 99))
def test_whatever_dies_nothing_is_lost_and_nobody_is_failed_for_another(crashes, workers, chance):
    """Some requests crash workers, and others are killed from outside at random."""
    world, rng = World(crashes), random.Random(chance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stations, "FIRST_DELAY", 0.001)
        patch.setattr(stations, "LONGEST_DELAY", 0.002)
        service = Service([FakeWorker(world) for _ in range(workers)], LIMITS)
        service.start()
        wait_until(lambda: service.ready)
        client = Client(service)
        for seed in range(12):
            wait_until(lambda: service.ready)
            assert client.send(seed, num_images=1 + seed % 2) is None
        for _ in range(MAX_KILLS - 1):
            time.sleep(0.001 * rng.random())
            for worker in world.alive[:1]:
                worker.kill("from outside", by_itself=False)
        client.wait()
        service.close(0)
    assert set(client.failures) == crashes
    for seed in {*range(12)} - crashes:
        assert sorted(picture.image for picture in client.pictures[seed]) == list(range(1 + seed % 2))


def test_a_worker_that_hangs_is_ended_and_the_others_are_served(started):
    world = World(hangs={5})
    client = started(world, silence=0.1)
    for seed in range(4, 8):
        assert client.send(seed) is None
    client.wait()
    assert set(client.failures) == {5} and "did not answer for 0.1 s" in client.failures[5].message
    assert world.deaths == 2


def test_what_waits_for_a_new_worker_can_be_cancelled_and_expires(started, monkeypatch):
    monkeypatch.setattr(stations, "FIRST_DELAY", 30.0)
    world = World()
    client = started(world)
    world.hangs = {1, 2, 3}
    for seed, options in ((1, {}), (2, {"timeout": 0.3})):
        assert client.send(seed, **options) is None
    world.alive[0].kill("from outside", by_itself=False)
    wait_until(lambda: not client.service.ready)
    refusal = client.send(3)
    assert refusal is not None and refusal.type == "not_ready"
    assert client.service.cancel("order-1") and not client.service.cancel("order-1")
    client.wait()
    assert {seed: failure.type for seed, failure in client.failures.items()} == {
        1: "cancelled",
        2: "deadline_exceeded",
    }


def test_a_worker_that_never_starts_is_given_up_in_words(started, monkeypatch):
    monkeypatch.setattr(stations, "FIRST_DELAY", 0.0001)
    client = started(World(starts=False))
    wait_until(lambda: client.service.broken is not None)
    assert client.service.broken == "no memory"
    refusal = client.send(1)
    assert refusal is not None and refusal.type == "server_error" and "no memory" in refusal.message


def test_the_pause_before_a_new_worker_doubles_until_one_works():
    station = stations.Station(0, FakeWorker(World()))
    delays = []
    for _ in range(10):
        station.on_ready(Ready(BEAT))
        station.on_death(Died("a crash"), now=100.0)
        delays.append(station.due - 100.0)
    assert delays == pytest.approx([min(0.1 * 2**n, 30.0) for n in range(10)])
    station.on_ready(Ready(BEAT))
    assert station.on_beat(BEAT._replace(steps=3)) == 3
    station.on_death(Died("a crash"), now=100.0)
    assert station.due == pytest.approx(100.1)


def test_a_worker_that_is_killed_while_it_starts_is_started_again_however_often():
    station = stations.Station(0, FakeWorker(World()))
    for _ in range(3 * stations.MAX_STARTS):
        station.on_death(Died("SIGKILL", by_itself=False), now=100.0)
        assert station.due is not None
        station.due = None
    for _ in range(stations.MAX_STARTS):
        station.due = None
        station.on_death(Died("no memory"), now=100.0)
    assert station.due is None


def test_a_process_that_is_killed_loses_nothing_and_the_images_are_equal():
    """The real thing: SIGKILL under three requests."""
    service = Service([WorkerProcess(worker_makers.tiny)], LIMITS)
    assert service.load().name == "tiny" and service.sizes == (worker_makers.K,)
    service.start()
    try:
        wait_until(lambda: service.ready, 60)
        client = Client(service)
        calls = {seed: [seed % 3, (seed + 1) % 3] for seed in (3, 4, 5)}
        for seed, labels in calls.items():
            options = {"num_inference_steps": 8, "guidance_scale": worker_makers.SCALE, "num_images": 2}
            facts = {"prompts": (labels,), "options": options, "num_steps": 8, "guided": True}
            assert client.send(seed, num_images=2, **facts) is None
        wait_until(lambda: client.pictures, 20)
        os.kill(service.stations[0].worker.pid, signal.SIGKILL)
        wait_until(lambda: service.open_orders == 0, 60)
    finally:
        assert service.close(10)
    assert service.counters["restarts"] == 1 and not client.failures
    alone = serving.as_served(worker_makers.tiny().engine.pipe, worker_makers.K)
    for seed, labels in calls.items():
        images = alone(
            jax.random.key(seed), labels, num_inference_steps=8, guidance_scale=worker_makers.SCALE
        )
        drawn = {picture.image: picture.content for picture in client.pictures[seed]}
        assert drawn == {number: picture_bytes(image) for number, image in enumerate(images)}


def test_a_model_that_cannot_be_loaded_is_refused_in_the_words_of_its_process():
    worker = WorkerProcess(worker_makers.nothing)
    with pytest.raises(InvalidArgumentError, match="there is no such model"):
        worker.load()
    worker.join()
