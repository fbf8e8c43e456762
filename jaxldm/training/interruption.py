"""Ctrl-C and SIGTERM as a request: the loop ends its step, saves, and says how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any


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
        """Raise what the signal stands for: `KeyboardInterrupt`, or `SystemExit(143)` for SIGTERM."""
        if self.signal_number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(message)
