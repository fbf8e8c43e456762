"""Reads batches in a process of its own: python reading_process.py FOLDER PROCESS FIRST."""

import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxldm.data import Batches, Reader
from jaxldm.data.batches import ArrayRows

NUM_EXAMPLES, BATCH_SIZE, NUM_PROCESSES, NUM_WORKERS, NUM_STEPS = 96, 8, 2, 3, 36


class Slow(ArrayRows):
    """Rows with the number of the process that read them, so slowly that no worker reads all."""

    def take(self, rows):
        time.sleep(0.03)
        return super().take(rows) | {"worker": np.full(len(rows), os.getpid())}


def main(folder: Path, process: int, first: int) -> None:
    """Write a line for each batch: its step, the workers' process numbers and the examples."""
    batches = Batches(Slow({"row": np.arange(NUM_EXAMPLES)}), BATCH_SIZE, jax.random.key(3))
    options = {"process": process, "num_processes": NUM_PROCESSES}
    with (
        Reader(batches, num_workers=NUM_WORKERS, ahead=4, **options) as reader,
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
