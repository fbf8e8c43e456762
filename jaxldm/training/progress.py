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

from jaxldm.training.log import SPEEDS, CsvLog

# So many steps may be under way before the numbers of the oldest are waited for: the device always has its
# next step, and the clock of the log is at most this far ahead.
STEPS_IN_FLIGHT = 2
MOST_SKIPPED = 10  # updates in a row; then the run stops
_SPAN = 1.0  # seconds, at least, that the speeds of a row of the log are of


def rate_in_words(rate: float) -> str:
    """A rate per second, without an exponent.

    >>> rate_in_words(1163.4), rate_in_words(1.428)
    ('1163', '1.43')
    """
    return f"{rate:{'.0f' if rate >= 100 else '.3g'}}"


def share_of_peak(share: float) -> str:
    """A share of the matrix peak; small networks have less than a hundredth.

    >>> share_of_peak(0.174), share_of_peak(0.004)
    ('17%', 'under 1%')
    """
    return "under 1%" if share < 0.01 else f"{share:.0%}"


def _is_done(metrics: Mapping[str, Any]) -> bool:
    return all(value.is_ready() for value in metrics.values())


class Progress:
    """Take the metrics of each step as they leave the device and report them; the device never waits.

    `push` is given metrics that are still being computed; their numbers are fetched when they are there, or
    `STEPS_IN_FLIGHT` later steps have been started. `drain` fetches all of them. The last of `MOST_SKIPPED`
    updates in a row that the train step skipped is kept in `diverged` as (step, metrics), and nothing after
    it is logged. Of a train step that skips nothing (its metrics have no `skipped`) that is the first loss or
    gradient norm that is not finite.

    All speeds count from the end of the first update, in whose time the step is compiled.

    Attributes:
        at_peak: seconds of a step at the peak of the devices (`seconds_at_peak`), where they are known.
    """

    at_peak: float | None = None

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
        self._pending: deque[tuple[int, Mapping[str, Any], float, int]] = deque()
        self._epoch_rows: list[list[float]] = []  # loss, gradient norm and learning rate of its updates
        self._epoch_skipped = 0
        # Seconds of waiting so far, and before those of the epoch that have speeds
        self._waited, self._waited_before, self._epoch_examples = 0.0, 0.0, 0
        self.skipped_in_a_row = 0  # the newest of the updates whose numbers are known
        self.newest_skipped: tuple[int, dict[str, np.ndarray]] | None = None
        self._started, self._flushed = time.perf_counter() - seconds, time.perf_counter()
        self._epoch_started = self._timed_from = time.perf_counter()
        self._epoch_timed = 0  # its updates since `_timed_from`: all but the first of this process
        # (when it was done, waiting so far, examples) of the last updates, behind the moment before them
        self._recent: deque[tuple[float, float, int]] = deque()
        self._recent_examples = 0
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

    def push(
        self,
        step: int,
        metrics: Mapping[str, Float[jax.Array, " ..."]],
        *,
        waiting: float = 0.0,
        examples: int = 0,
    ) -> None:
        """Take the metrics of update number `step` (counted from 1).

        `waiting` is how many seconds the devices, with nothing else to do (`idle`), waited for its batch of
        `examples`.
        """
        for value in metrics.values():
            value.copy_to_host_async()
        self._waited += waiting
        self._pending.append((step, metrics, waiting, examples))
        early = jax.process_count() == 1  # several must see a divergence at the same update
        while self._pending and (
            len(self._pending) > STEPS_IN_FLIGHT or (early and _is_done(self._pending[0][1]))
        ):
            self._take()

    def idle(self) -> bool:
        """Whether no step is under way: the devices wait for the next one."""
        return not self._pending or _is_done(self._pending[-1][1])

    def drain(self) -> None:
        """Wait for all the steps under way and write their rows to disk."""
        while self._pending:
            self._take()
        self._rows.flush(durable=True)

    def write_to(self, path: Path) -> None:
        """Write the rows from now on, and those not written yet, to another file."""
        self._rows.move_to(path)

    def close(self) -> None:
        """Take the bar off the screen."""
        self._bar.close()

    def _take(self) -> None:
        step, on_device, waiting, examples = self._pending.popleft()
        metrics = {name: np.asarray(value) for name, value in jax.device_get(on_device).items()}
        if self.diverged is not None:
            return
        now = time.perf_counter()
        epoch = (step - 1) // self._steps_per_epoch + 1
        is_first = not self._recent
        clocks = self._first_clocks(now, waiting) if is_first else self._clocks(now, waiting, examples)
        self._rows.append(
            epoch, step, now - self._started, {**metrics, **clocks, "examples": np.float32(examples)}
        )
        if not is_first:
            self._epoch_timed += 1
            self._epoch_examples += examples
        skipped = self._is_skipped(step, metrics)
        if self.diverged is not None:
            return
        shown = [float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")]
        self._epoch_skipped += skipped
        if not skipped and math.isfinite(shown[0]):  # NaN too where it was another player's turn
            self._epoch_rows.append(shown)
            self._bar.set_postfix_str(f"loss {shown[0]:.4g}", refresh=False)
        self._bar.update()
        if step % self._steps_per_epoch == 0:
            self._end_epoch(epoch, now)
        if now - self._flushed > 1.0:
            self._rows.flush()
            self._flushed = now

    def _first_clocks(self, now: float, waiting: float) -> dict[str, np.float32]:
        """Those of the first update, without speeds: most of its time was compilation."""
        self._timed_from, self._waited_before = now, self._waited
        self._recent.append((now, self._waited, 0))
        unknown = {name: np.float32(np.nan) for name in SPEEDS}
        return {"waiting": np.float32(waiting), **unknown}

    def _clocks(self, now: float, waiting: float, examples: int) -> dict[str, np.float32]:
        """How an update spent its time; speeds are of the last `_SPAN` or longer: numbers come in at once.

        The share of waiting is of all that was waited in that time, also for updates that end later: their
        batches are waited for before.
        """
        self._recent.append((now, self._waited, examples))
        self._recent_examples += examples
        while len(self._recent) > 2 and now - self._recent[1][0] >= _SPAN:
            self._recent.popleft()
            self._recent_examples -= self._recent[0][2]
        seconds = max(now - self._recent[0][0], 1e-9)
        share = min((self._waited - self._recent[0][1]) / seconds, 1.0)
        return {
            "waiting": np.float32(waiting),
            "waiting_share": np.float32(share),
            "of_peak": self._of_peak(len(self._recent) - 1, seconds),
            "examples_per_second": np.float32(self._recent_examples / seconds),
        }

    def _is_skipped(self, step: int, metrics: Mapping[str, np.ndarray]) -> bool:
        """Whether an update changed nothing; one line tells of the first of several."""
        values = [float(metrics[name]) for name in ("loss", "grad_norm")]
        if "skipped" not in metrics:
            if not all(map(math.isfinite, values)):
                self.diverged = step, dict(metrics)
            return False
        if not metrics["skipped"]:
            self.skipped_in_a_row = 0
            return False
        self.skipped_in_a_row += 1
        self.newest_skipped = step, dict(metrics)
        if self.skipped_in_a_row == 1:
            self._log(
                f"{self.name}: the loss was {values[0]:.4g} and the gradient norm {values[1]:.4g} at step "
                f"{step}: this update is skipped"
            )
        if self.skipped_in_a_row == MOST_SKIPPED:
            self.diverged = step, dict(metrics)
        return True

    def _of_peak(self, steps: int, seconds: float) -> np.float32:
        """The matrix products of so many steps in these seconds, as a share of what the devices can do."""
        known = math.nan if self.at_peak is None else self.at_peak
        return np.float32(known * steps / max(seconds, 1e-9))

    def _speed(self, now: float) -> str:
        """Seconds of the epoch; examples in a second, the share of waiting, and that of the matrix peak."""
        compiling = max(self._timed_from - self._epoch_started, 0.0)
        whole = f"{now - self._epoch_started:.1f} s"
        whole += f" ({compiling:.1f} s with compiling)" if compiling else ""
        if not self._epoch_timed:
            return whole
        seconds = max(now - max(self._timed_from, self._epoch_started), 1e-9)
        # All that was waited in these seconds, also for updates that end later
        waiting = min((self._waited - self._waited_before) / seconds, 1.0)
        of_peak = float(self._of_peak(self._epoch_timed, seconds))
        peak = "" if np.isnan(of_peak) else f", {share_of_peak(of_peak)} of the matrix peak"
        rate = rate_in_words(self._epoch_examples / seconds)
        return f"{whole}  {rate} examples/s, {waiting:.0%} waiting{peak}"

    def _end_epoch(self, epoch: int, now: float) -> None:
        rows = np.array(self._epoch_rows or [[math.nan] * 3])
        loss, grad_norm, _ = rows.mean(axis=0)
        skipped = f"  {self._epoch_skipped} skipped" if self._epoch_skipped else ""
        self._log(
            f"{self.name}: epoch {epoch}/{self._num_epochs}  loss {loss:.4f}  grad norm {grad_norm:.3g}  "
            f"learning rate {rows[-1, 2]:.2e}  {self._speed(now)}{skipped}"
        )
        self._epoch_rows.clear()
        self._epoch_timed = self._epoch_skipped = 0
        self._waited_before, self._epoch_examples = self._waited, 0
        self._epoch_started = now
