"""Ctrl-C and SIGTERM as a request: the loop ends its step, saves, and says how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np

from jaxldm.errors import Stopped

AGREE_EVERY = 10  # steps; where several processes train, a signal to one of them stops all


class StopRequest:
    """In a `with` block, the first SIGINT or SIGTERM sets `signal_number`; a second SIGINT stops at once.

    Signal handlers exist in the main thread alone; in any other this does nothing.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is whole: --resume goes on from it")
        self.signal_number = number
        # Not `print`: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping: the step under way is ended and saved (Ctrl-C again to stop at once)\n")

    def stop(self, message: str) -> None:
        """Raise what the signal stands for: `Stopped`, or `SystemExit(143)` for SIGTERM."""
        if self.signal_number == signal.SIGTERM:
            if jax.process_index():  # its log is not read
                print(message, file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)
        raise Stopped(message)


def agreed_stop(request: StopRequest, step: int, last: int) -> bool:
    """Whether to stop after this step: the same answer in every process, which all have to call it.

    Several processes ask one another every `AGREE_EVERY` steps and after the `last`, as each signal reaches
    them at a time of its own.
    """
    if jax.process_count() == 1:
        return bool(request)
    if step % AGREE_EVERY and step != last:
        return False
    from jax.experimental import multihost_utils

    numbers = multihost_utils.process_allgather(np.int32(request.signal_number or 0))
    request.signal_number = int(numbers.max()) or None
    return bool(request)
