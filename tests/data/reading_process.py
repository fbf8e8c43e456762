"""Rows that are slow, fail or die; a process that reads: python reading_process.py FOLDER PROCESS FIRST."""

import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

from jaxldm.data import Batches, Reader
from jaxldm.data.batches import ArrayRows
from jaxldm.errors import DataError

NUM_EXAMPLES, BATCH_SIZE, NUM_PROCESSES, NUM_WORKERS, NUM_STEPS = 96, 8, 2, 3, 36


class Slow(ArrayRows):
    """Rows with the number of the process that read them, so slowly that no worker reads all."""

    def take(self, rows):
        time.sleep(0.03)
        return super().take(rows) | {"worker": np.full(len(rows), os.getpid())}


class Stuck(ArrayRows):
    """Rows of which row 4 takes minutes."""

    def take(self, rows):
        time.sleep(300 * (4 in rows))
        return super().take(rows)


class Dying(ArrayRows):
    """Rows that nobody survives."""

    def take(self, rows):
        os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class DyingOnce(ArrayRows):
    """Rows of megabytes; the first that reads them dies in the middle of sending them."""

    died: Path

    def take(self, rows):
        if not self.died.exists():
            self.died.touch()
            threading.Thread(target=self._die, args=(threading.get_ident(),), daemon=True).start()
        return super().take(rows) | {"large": np.zeros([len(rows), 2**20])}

    def _die(self, reading):
        sending = sys._current_frames()[reading]
        while sending.f_code.co_name != "_send" or sending.f_locals.get("remaining", 0) < 2**20:
            sending = sys._current_frames()[reading]  # the length is sent, and not yet all that is so long
        os.kill(os.getpid(), signal.SIGKILL)


class Failing(ArrayRows):
    """Rows with an error that can be pickled for row 0, and one that cannot for others."""

    def take(self, rows):
        if 0 in rows:
            raise DataError("picture 0 is damaged")
        error = KeyError("picture 1 has no mode")
        error.lock = threading.Lock()
        raise error


def main(folder: Path, process: int, first: int) -> None:
    """Write a line for each batch: its step, the workers' process numbers and the examples."""
    batches = Batches(Slow({"row": np.arange(NUM_EXAMPLES)}), BATCH_SIZE, jax.random.key(3))
    options = {"process": process, "num_processes": NUM_PROCESSES}
    with (
        Reader(batches, num_workers=NUM_WORKERS, **options) as reader,
        (folder / f"{process}.txt").open("a") as file,
    ):
        for step in range(first, NUM_STEPS):
            batch = reader[step]
            print(step, batch["worker"][0], *batch["row"], file=file, flush=True)
            if step == 17:  # in the middle of the second epoch: wait to be killed
                print("ready", flush=True)
                sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
