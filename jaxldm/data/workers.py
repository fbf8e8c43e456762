"""Processes that read rows. Any of them may be killed at any moment: what it was to read is read again.

Each has a pipe of its own, of which this process holds one end alone, and shares no lock. So a worker that
dies in the middle of an answer ends its pipe, and nothing waits for it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import threading
import traceback
from typing import Any, cast

import numpy as np
from jaxtyping import Int, Shaped

from jaxldm.data.batches import Rows
from jaxldm.errors import DataError

MOST_RESTARTS = 3  # of workers in a row, before their death is taken to be the data's fault


class Workers:
    """`take` by one of `num_workers` processes, for as many threads at a time.

    They start when they are first needed.

    Args:
        rows: what they read from, picklable.
        num_workers: their number.
    """

    def __init__(self, rows: Rows, num_workers: int):
        self._rows, self._num_workers, self._closed = rows, num_workers, False
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()  # None: one that is to be started
        self._alive: set[_Worker] = set()
        for _ in range(num_workers):
            self._idle.put(None)

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        """Rows, read by the first worker that is free. Raises what reading them raises.

        Raises:
            DataError: every worker that tried died.
        """
        code = None
        for _ in range(MOST_RESTARTS + 1):
            worker, kept = self._idle.get(), None
            try:
                if worker is None and not self._closed:
                    worker = self._start()
                if worker is None or self._closed:  # looked at again: `close` kills those started before
                    raise DataError("the workers were ended while rows were to be read")
                answer, error = worker.ask(rows)
                kept = worker
            except (EOFError, OSError):  # it was killed, perhaps for its memory
                code = self._end(worker)
            except BaseException:
                self._end(worker)  # its answer may be under way
                raise
            else:
                if error is not None:
                    raise error
                return answer
            finally:
                self._idle.put(kept)
        unseen = code in (None, 255)  # by the server of forks
        known = "" if unseen else f", the last with code {code}"
        raise DataError(
            f"the processes that read a batch ended {MOST_RESTARTS + 1} times{known}: there may be too "
            "little memory for them, use fewer workers"
        )

    def close(self) -> None:
        """End them; what they are reading is not waited for."""
        self._closed = True
        for worker in tuple(self._alive):
            worker.kill()
        for worker in [self._idle.get() for _ in range(self._num_workers)]:
            self._end(worker)
            self._idle.put(None)  # threads that still wait for one find out

    def _start(self) -> _Worker:
        worker = _Worker(self._rows)
        self._alive.add(worker)
        return worker

    def _end(self, worker: _Worker | None) -> int | None:
        """The code with which it ended."""
        if worker is None:
            return None
        self._alive.discard(worker)
        return worker.end()


class _Worker:
    """A process and the pipe to it, for one thread at a time."""

    def __init__(self, rows: Rows):
        # Not forked from here: JAX has threads, and a fork of them may hang.
        context: Any = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
        if os.name != "nt":
            context.set_forkserver_preload([__name__])  # imported once for all workers
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(rows, theirs), name="jaxldm-reader", daemon=True)
        try:
            self._process.start()
        finally:
            theirs.close()  # or the pipe would not end with the process

    def ask(self, rows: Int[np.ndarray, "B"]) -> tuple[Any, Exception | None]:
        """The rows, or what reading them raises."""
        self._pipe.send(rows)
        return pickle.loads(self._pipe.recv_bytes())

    def kill(self) -> None:
        """From any thread: the one that waits for an answer gets `EOFError`."""
        if self._process.is_alive():  # or its number may be that of another one
            self._process.kill()

    def end(self) -> int | None:
        """Kill it, wait for its end and return its code."""
        self.kill()
        self._process.join()
        self._pipe.close()
        return self._process.exitcode


def _serve(rows: Rows, pipe: multiprocessing.connection.Connection) -> None:
    """In a worker: read until the pipe ends; leave Ctrl-C to the training, and end when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    training = multiprocessing.parent_process()

    def end() -> None:
        multiprocessing.connection.wait([cast(Any, training).sentinel])
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            wanted = pipe.recv()
            try:
                answer = pickle.dumps((rows.take(wanted), None), protocol=pickle.HIGHEST_PROTOCOL)
            except Exception as error:  # noqa: BLE001 (sent to the training)
                answer = pickle.dumps((None, _sendable(error)))
            pipe.send_bytes(answer)


def _sendable(error: Exception) -> Exception:
    """The error with its traceback as a note, or a `DataError` with its text where it cannot be pickled."""
    note = "in a process that reads:\n" + "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 (whatever its class does)
        error = DataError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error
