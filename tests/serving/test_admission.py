"""Admission and the fair queue, on a clock that the tests turn."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm.errors import InvalidArgumentError
from jaxldm.serving import admission
from jaxldm.serving.admission import Admission, Bucket, FairQueue, Item, Limits, take


def items(ticket, images=1, cost=10.0, seconds=1.0):
    return [Item(ticket, image, cost, seconds) for image in range(images)]


def admit(door, now, client, ticket, **more):
    of_items = {name: more.pop(name) for name in ("images", "cost", "seconds") if name in more}
    return door.admit(now, client, items(ticket, **of_items), **more)


def pop_all(queue):
    popped = []
    while (item := queue.pop()) is not None:
        popped.append(item)
    return popped


TIMES = st.lists(st.floats(0, 3, allow_subnormal=False), min_size=1, max_size=60)


@given(TIMES, st.floats(0.1, 10), st.integers(1, 6))
def test_a_client_gets_its_burst_and_then_its_rate(waits, rate, burst):
    """In no stretch of time more than burst + rate * seconds; who is refused may come when it was told."""
    bucket, now, granted = None, 0.0, []
    for wait in waits:
        now += wait
        bucket, seconds = take(bucket, now, rate, burst)
        if seconds == 0:
            granted.append(now)
        else:
            assert take(bucket, now + seconds * (1 + 1e-6), rate, burst)[1] == 0
    for first in range(len(granted)):
        for last in range(first, len(granted)):
            most = burst + rate * (granted[last] - granted[first])
            assert last - first + 1 <= most + 1e-6


def test_a_clock_that_goes_back_gives_no_tokens():
    bucket, seconds = take(Bucket(0.5, 10.0), 3.0, 1.0, 5)
    assert bucket == Bucket(0.5, 10.0) and seconds == 0.5


COSTS = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.integers(1, 200), min_size=1, max_size=20), min_size=1
)


def queue_of(costs, quantum):
    """Each client's images, of these costs."""
    queue = FairQueue(quantum)
    for client, list_of in costs.items():
        for number, cost in enumerate(list_of):
            queue.push(client, Item(client, number, cost, 1.0))
    return queue


@given(COSTS, st.integers(1, 300))
def test_all_that_waits_comes_out_once_in_each_client_s_order(costs, quantum):
    queue = queue_of(costs, quantum)
    popped = pop_all(queue)
    assert len(queue) == 0 and queue.pop() is None
    for client, list_of in costs.items():
        assert [item.image for item in popped if item.ticket == client] == list(range(len(list_of)))


@given(COSTS, st.integers(1, 300))
def test_no_client_that_waits_falls_behind(costs, quantum):
    """Shreedhar and Varghese 1996, theorem 3.2: shares differ by a quantum and the largest cost at most."""
    queue = queue_of(costs, quantum)
    left = {client: len(list_of) for client, list_of in costs.items()}
    spent, largest = collections.Counter(), max(map(max, costs.values()))
    for item in pop_all(queue):
        if min(left.values()) > 0:
            spent[item.ticket] += item.cost
            left[item.ticket] -= 1
            shares = [spent[client] for client in costs]
            if min(left.values()) > 0:
                assert max(shares) - min(shares) <= quantum + 2 * largest


@given(st.integers(1, 500), st.integers(1, 400), st.integers(1, 20))
def test_the_jobs_of_one_client_do_not_delay_the_first_of_another(cost, quantum, served):
    queue = FairQueue(quantum)
    for number in range(500):
        queue.push("many", Item(("many", number), 0, 100, 1.0))
    for _ in range(served):
        queue.pop()
    queue.push("one", Item("one", 0, cost, 1.0))
    assert queue.pop().ticket == "one"


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 300), st.integers(1, 300))
def test_who_sends_one_after_the_other_gets_no_more_than_a_share(costs, other, quantum):
    """Its first image is on credit, and the next ones wait until that is paid."""
    queue, spent, mine = FairQueue(quantum), collections.Counter(), iter(costs)
    for number in range(20_000 // other):
        queue.push("many", Item("many", number, other, 1.0))
    queue.push("one", Item("one", 0, next(mine), 1.0))
    while queue.tickets == {"one", "many"} or spent["many"] == 0:
        item = queue.pop()
        spent[item.ticket] += item.cost
        if item.ticket == "one":  # as soon as it has an image it asks for the next
            cost = next(mine, None)
            if cost is None:
                break
            queue.push("one", Item("one", 0, cost, 1.0))
    assert spent["one"] - spent["many"] <= 2 * (quantum + max(costs) + other)


def test_who_waits_for_nothing_is_forgotten():
    queue = FairQueue(10)
    for client in "abc":
        queue.push(client, Item(client, 0, 100, 1.0))
    assert [queue.pop().ticket for _ in range(3)] == ["a", "b", "c"] and not queue._deficits
    queue.push("a", Item("a", 0, 100, 1.0))
    queue.push("b", Item("b", 0, 100, 1.0))
    queue.pop()
    assert queue.remove("b") == 1 and not queue._deficits


def test_who_has_no_slot_keeps_its_turn_and_holds_up_nobody():
    queue = FairQueue(50)
    queue.push("a", Item("a", 0, 1000, 1.0))
    queue.push("b", Item("b", 0, 10, 1.0))
    assert queue.pop(lambda item: False) is None
    assert queue.pop(lambda item: item.ticket != "a").ticket == "b"
    assert queue.pop().ticket == "a"


def test_a_request_that_is_removed_does_not_come_out():
    queue = FairQueue(10)
    for item in [*items("x", 3), *items("y", 2)]:
        queue.push("a", item)
    assert queue.remove("x") == 3 and queue.remove("x") == 0
    assert [item.ticket for item in pop_all(queue)] == ["y", "y"]


def test_the_queue_is_bounded_in_number():
    door = Admission(Limits(max_queue=2, burst=10))
    assert admit(door, 0, "a", 1) is None and admit(door, 0, "b", 2) is None
    refusal = admit(door, 0, "c", 3)
    assert refusal.type == "queue_full" and refusal.retry_after >= 1
    door.next()
    assert admit(door, 0, "c", 3) is None


def test_the_queue_is_bounded_in_seconds():
    door = Admission(Limits(max_queue_seconds=10, burst=10))
    assert admit(door, 0, "a", 1, images=4) is None
    refusal = admit(door, 0, "b", 2, images=4, seconds_before=3.0)
    assert refusal.type == "queue_too_long" and "11 s" in refusal.message and refusal.retry_after == 1
    assert admit(door, 0, "b", 3, images=3, seconds_before=3.0) is None


def test_too_many_requests_of_a_client_are_refused_and_others_are_not():
    door = Admission(Limits(requests_per_second=2, burst=2))
    answers = [admit(door, 0, "a", number) for number in range(4)]
    assert [answer and answer.type for answer in answers] == [None, None, *["rate_limit_exceeded"] * 2]
    assert answers[2].retry_after == 0.5
    assert admit(door, 0, "b", 9) is None
    assert admit(door, 0.5, "a", 10) is None


def test_a_deadline_that_cannot_be_kept_is_refused_and_one_that_passed_is_named():
    door = Admission(Limits(burst=10))
    assert admit(door, 0, "a", 1, images=5) is None
    assert admit(door, 0, "a", 2, timeout=5.0).type == "deadline_too_short"
    assert admit(door, 0, "a", 3, timeout=6.0) is None
    assert door.expired(5.9) == [] and door.expired(6.0) == [3]
    door.finished(3)
    assert door.expired(100) == [] and door.queue.tickets == {1}


def test_refused_requests_leave_nothing_behind():
    door = Admission(Limits(max_queue=1, burst=10**6))
    admit(door, 0, "a", 0)
    for number in range(1, 50):
        assert admit(door, 0, "b", number, timeout=1e9) is not None
    assert len(door.queue) == 1 and door.expired(1e12) == []


def test_clients_that_are_long_gone_are_forgotten(monkeypatch):
    monkeypatch.setattr(admission, "MANY_CLIENTS", 10)
    door = Admission(Limits(max_queue=10**6, max_queue_seconds=1e9))
    for number in range(100):
        assert admit(door, float(number), f"client {number}", number) is None
    assert len(door._buckets) <= 11


def test_clients_without_end_take_bounded_memory(monkeypatch):
    """Where tokens come back too slowly for anybody to be forgotten."""
    monkeypatch.setattr(admission, "MANY_CLIENTS", 4)
    monkeypatch.setattr(admission, "MOST_CLIENTS", 16)
    door = Admission(Limits(max_queue=10**6, max_queue_seconds=1e9, requests_per_second=1e-6, burst=1))
    for number in range(200):
        assert admit(door, float(number), f"client {number}", number) is None
        assert len(door._buckets) <= 32
    assert admit(door, 200.0, "client 199", 200).type == "rate_limit_exceeded"


@pytest.mark.parametrize("field, value", [("max_queue", 0), ("max_queue_seconds", -1), ("burst", "x")])
def test_limits_are_checked(field, value):
    with pytest.raises(InvalidArgumentError, match=field):
        Limits(**{field: value})


@given(COSTS, st.integers(1, 300))
def test_places_are_those_in_which_requests_begin(costs, quantum):
    """Each client is one request here; looking changes nothing."""
    queue = queue_of(costs, quantum)
    door = Admission(Limits(quantum=quantum))
    door.queue = queue
    foreseen, places = list(queue.in_turn()), door.places(seconds_before=2.0)
    popped = pop_all(queue)
    assert foreseen == popped
    begins = list(dict.fromkeys(item.ticket for item in popped))
    assert {ticket: place for ticket, (place, _) in places.items()} == {
        ticket: number for number, ticket in enumerate(begins)
    }
    for ticket, (_, seconds) in places.items():
        last = max(number for number, item in enumerate(popped) if item.ticket == ticket)
        assert seconds == 2.0 + last + 1


@given(COSTS, st.sampled_from("abcd"), st.integers(1, 3))
def test_what_is_put_back_comes_before_the_client_s_others(costs, client, number):
    queue = queue_of(costs, 50)
    again = items("again", number)
    queue.put_back(client, again)
    mine = [item for item in pop_all(queue) if item.ticket in (client, "again")]
    assert mine[:number] == again and len(mine) == number + len(costs.get(client, ()))


def test_the_first_deadline_is_known():
    door = Admission(Limits(burst=9))
    assert door.next_deadline is None
    assert admit(door, 1.0, "a", "x", timeout=5.0) is None and admit(door, 2.0, "a", "y", timeout=3.5) is None
    assert door.next_deadline == 5.5
    door.finished("y")
    assert door.next_deadline == 6.0
