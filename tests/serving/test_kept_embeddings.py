"""What texts were encoded to: bounded in bytes, and made once."""

import threading

import numpy as np
import pytest

from jaxldm.errors import InvalidArgumentError
from jaxldm.serving import Embeddings

KILOBYTE = np.zeros(256, np.float32)


def test_the_least_recently_used_goes_first_and_the_bytes_are_bounded():
    cache, made = Embeddings(3 * 1024), []

    def get(key, value=KILOBYTE):
        cache.get(key, lambda: made.append(key) or {"states": value})

    for key in ("a", "b", "c", "a", "d"):
        get(key)
    assert made == ["a", "b", "c", "d"] and cache.num_bytes == 3 * 1024
    get("a")
    get("b")
    assert made == ["a", "b", "c", "d", "b"]
    get("large", np.zeros(10**4, np.float32))  # more than all of it: not kept, and nothing is lost for it
    get("a")
    assert made[-1] == "large" and cache.num_bytes == 3 * 1024
    assert (cache.hits, cache.misses) == (3, 6)


def ask_at_once(count, ask, inside, go_on):
    """`ask` in so many threads, of which the first is inside while the others begin."""
    threads = [threading.Thread(target=ask) for _ in range(count)]
    threads[0].start()
    assert inside.wait(10)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(10)


def test_equal_keys_at_one_time_are_made_once():
    cache, made, inside, go_on = Embeddings(10**6), [], threading.Event(), threading.Event()

    def make():
        made.append(threading.get_ident())
        inside.set()
        assert go_on.wait(10)
        return {"states": KILOBYTE}

    results = []
    ask_at_once(8, lambda: results.append(cache.get("k", make)), inside, go_on)
    assert len(made) == 1 and len(results) == 8
    assert all(result is results[0] for result in results)


def test_a_failure_reaches_all_who_wait_and_is_not_remembered():
    cache, inside, go_on, errors = Embeddings(10**6), threading.Event(), threading.Event(), []

    def fail():
        inside.set()
        assert go_on.wait(10)
        raise InvalidArgumentError("prompt is bad")

    def ask():
        try:
            cache.get("k", fail)
        except InvalidArgumentError as error:
            errors.append(str(error))

    ask_at_once(3, ask, inside, go_on)
    assert errors == ["prompt is bad"] * 3
    assert cache.get("k", lambda: KILOBYTE) is not None


def test_the_bound_is_checked():
    with pytest.raises(InvalidArgumentError, match="max_bytes"):
        Embeddings(-1)
