"""Mutated files: whatever is in a file, a reader gives its content or one line, in little time and memory.

Question: does whatever is in a file end in its content or in one line for people?
Command:  python -m experiments.faults.mutations --count 100000
Needs:    the `test-core` extra; minutes are in README.md.

A fault is an error that is not the library's own, a message of several lines or of more than 400 characters
besides the path, more than 5 seconds of processor time, or more than 1 GiB of further memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from experiments.faults.mutators import in_place_of, mutate
from experiments.faults.readers import Reader, readers, write_files
from experiments.faults.result import Result
from jaxldm.errors import JaxldmError

SECONDS = 5.0  # of processor time for a file
BYTES = 2**30  # of memory for a file
LONGEST = 400  # characters of a message, its path left out
OTHER_THINGS = 0.02  # of the cases: a pipe, a folder, a device in place of the file


class TooSlow(BaseException):
    """More than `SECONDS` of processor time; no reader may take it for an error in the file."""


def run(count: int, seed: int = 0) -> Result:
    """Reads `count` mutated files; the same `seed` makes the same files."""
    start = time.monotonic()
    everything = readers()
    names, weights = list(everything), [reader.weight for reader in everything.values()]
    rng = random.Random(seed)
    faults: list[str] = []
    with _folder() as folder, _limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, name in enumerate(rng.choices(names, weights, k=count)):
            fault = case(folder, name, everything[name], seed, number)
            if fault is not None:
                faults.append(fault)
    return Result("mutated files", count, faults, time.monotonic() - start)


def case(folder: Path, name: str, reader: Reader, seed: int, number: int) -> str | None:
    """Mutates one file of a reader and reads it. Returns the fault, None without one."""
    own = folder / name.replace(" ", "-")
    if not own.exists():
        write_files(own, reader.files)
    rng = random.Random(f"{seed}:{number}")
    target = rng.choice(list(reader.files))
    path = own / target
    if rng.random() < OTHER_THINGS:
        done = in_place_of(rng, path)
    else:
        done, content = mutate(rng, target, reader.files[target])
        path.write_bytes(content)
    try:
        fault = read(reader, own)
    finally:
        # A reader may repair or remove files: all are as they were for the next case.
        shutil.rmtree(own)
        write_files(own, reader.files)
    return fault and f"{name}, {done} of {target} (seed {seed}, case {number}): {fault}"


def read(reader: Reader, folder: Path) -> str | None:
    """Calls a reader. Returns what is wrong with how it took the files, None for content or one line."""
    peak, before = _peak(), time.process_time()
    fault = None
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        reader.call(folder)
    except JaxldmError as error:
        text = str(error).replace(str(folder), "")
        if "\n" in text or len(text) > LONGEST:
            fault = f"a message of {len(text)} characters, {text.count(chr(10))} line breaks: {text[:300]}"
        elif "more memory than there is" in text:
            fault = f"memory: {text}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 (every other one is what is looked for)
        fault = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    seconds, more = time.process_time() - before, _peak() - peak
    if fault is None and seconds > SECONDS:
        fault = f"{seconds:.1f} s of processor time"
    if fault is None and more > BYTES:
        fault = f"{more / 2**30:.1f} GiB of memory"
    return fault


def _peak() -> int:
    """The largest memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder in memory where the system has one: files are written and read thousands of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Stops a case that takes too long, and makes one that takes far too much memory fail."""

    def stop(*_: object) -> None:
        raise TooSlow(f"more than {SECONDS} s of processor time")

    handler = signal.signal(signal.SIGVTALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 6 * BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, handler)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = run(options.count, options.seed)
    for fault in result.faults:
        print(fault)
    print(f"{result.count} {result.name}: {len(result.faults)} faults, {result.seconds:.0f} s")


if __name__ == "__main__":
    main()
