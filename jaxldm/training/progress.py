"""What is shown of a run while it trains (bar, a line per epoch, CSV log), and the watch for NaN."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from jaxldm.training.log import CsvLog

# So many steps may be under way before the numbers of the oldest are waited for: the device always has its
# next step, and the clock of the log is at most this far ahead.
STEPS_IN_FLIGHT = 2


class Progress:
    """Take the metrics of each step as they leave the device and report them; the device never waits.

    `push` is given metrics that are still being computed; their numbers are fetched when `STEPS_IN_FLIGHT`
    later steps have been started. `drain` fetches all of them. The first loss or gradient norm that is not
    finite is kept in `diverged` as (step, metrics), and nothing after it is logged.
    """

    def __init__(
        self,
        rows: CsvLog,
        *,
        name: str,
        start: int,
        num_steps: int,
        steps_per_epoch: int,
        seconds: float,
        log: Callable[[str], None],
        bar: bool | None,
    ):
        self.diverged: tuple[int, dict[str, np.ndarray]] | None = None
        self.name = name
        self._rows, self._log = rows, log
        self._steps_per_epoch, self._num_epochs = steps_per_epoch, -(-num_steps // steps_per_epoch)
        self._pending: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._epoch_rows: list[tuple[float, float]] = []
        self._started, self._flushed = time.perf_counter() - seconds, time.perf_counter()
        self._epoch_started = time.perf_counter()
        # disable=None: no bar where the output is a file and not a screen
        self._bar = tqdm(
            total=num_steps,
            initial=start,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=None if bar is None else not bar,
        )

    def push(self, step: int, metrics: Mapping[str, Float[jax.Array, " ..."]]) -> None:
        """Take the metrics of update number `step` (counted from 1)."""
        for value in metrics.values():
            value.copy_to_host_async()
        self._pending.append((step, metrics))
        while len(self._pending) > STEPS_IN_FLIGHT:
            self._take()

    def drain(self) -> None:
        """Wait for all the steps under way and write their rows to disk."""
        while self._pending:
            self._take()
        self._rows.flush(durable=True)

    def write_to(self, path: Path) -> None:
        """Write the rows from now on, and those not written yet, to another file."""
        self._rows.path = path

    def close(self) -> None:
        """Take the bar off the screen."""
        self._bar.close()

    def _take(self) -> None:
        step, on_device = self._pending.popleft()
        metrics = {name: np.asarray(value) for name, value in jax.device_get(on_device).items()}
        if self.diverged is not None:
            return
        now = time.perf_counter()
        epoch = (step - 1) // self._steps_per_epoch + 1
        self._rows.append(epoch, step, now - self._started, metrics)
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.diverged = step, metrics
            return
        self._epoch_rows.append((loss, grad_norm))
        self._bar.update()
        self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        if step % self._steps_per_epoch == 0:
            self._end_epoch(epoch, float(metrics["learning_rate"]), now)
        if now - self._flushed > 1.0:
            self._rows.flush()
            self._flushed = now

    def _end_epoch(self, epoch: int, learning_rate: float, now: float) -> None:
        loss, grad_norm = np.mean(self._epoch_rows, axis=0)
        self._log(
            f"{self.name}: epoch {epoch}/{self._num_epochs}  loss {loss:.4f}  grad norm {grad_norm:.3g}  "
            f"learning rate {learning_rate:.2e}  {now - self._epoch_started:.1f} s"
        )
        self._epoch_rows.clear()
        self._epoch_started = now
