"""What texts were encoded to, remembered in a bounded number of bytes."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxldm.arguments import check_fields, count


class _Entry(NamedTuple):
    value: Any
    num_bytes: int


class Embeddings:
    """Trees of arrays by key: the least recently used go first, and equal keys at one time are made once.

    Any number of threads may ask.

    Attributes:
        max_bytes: of the arrays that are kept; 0 keeps none.
        hits, misses: how often a value was there, or being made; and how often it was not.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        check_fields(self, max_bytes=count(0, 2**62))
        self.hits = self.misses = self.num_bytes = 0
        self._entries: collections.OrderedDict[Hashable, _Entry] = collections.OrderedDict()
        self._making: dict[Hashable, Future] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of the key, or what `make` returns, as arrays on the host.

        While one thread makes it, others with the same key wait for that; where it fails, all of them get
        the error, and the next to ask makes it again.
        """
        with self._lock:
            if key in self._entries:
                self.hits += 1
                self._entries.move_to_end(key)
                return self._entries[key].value
            making = self._making.get(key)
            if making is None:
                self.misses += 1
                mine = self._making[key] = Future()
            else:
                self.hits += 1
        if making is not None:
            return making.result()
        return self._make(key, make, mine)

    def _make(self, key: Hashable, make: Callable[[], Any], future: Future) -> Any:
        try:
            value = jax.tree.map(np.asarray, make())
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._keep(key, value)
        future.set_result(value)
        return value

    def _keep(self, key: Hashable, value: Any) -> None:
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(value))
        if num_bytes > self.max_bytes:
            return
        self._entries[key] = _Entry(value, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.num_bytes
