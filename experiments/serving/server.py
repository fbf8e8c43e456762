"""A server in a process of its own, as people start it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

OPEN = ("--requests-per-second", "100000", "--burst", "100000")  # nobody is slowed down
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


class Server(NamedTuple):
    """A server that runs.

    Attributes:
        port: it listens at.
        process: of the command.
        log: the file of what it writes on stderr.
        seconds: from its start until it was ready.
    """

    port: int
    process: subprocess.Popen
    log: Path
    seconds: float

    def workers(self) -> list[int]:
        """Processes that compute."""
        return [pid for pid in children(self.process.pid) if "spawn_main" in command_line(pid)]

    def memory(self) -> int:
        """Bytes that it has in use, with its workers."""
        return sum(map(resident_bytes, [self.process.pid, *self.workers()]))


@contextlib.contextmanager
def serving(folder: Path, *options: str, cache: Path | None = None) -> Iterator[Server]:
    """`jaxldm serve` of a model, ready; ended with SIGTERM at the end, which must succeed.

    Args:
        folder: of the model.
        options: of the command.
        cache: a folder for compiled functions.
    """
    environment = os.environ | ({} if cache is None else {"JAXLDM_COMPILATION_CACHE": str(cache)})
    words = [sys.executable, "-m", "jaxldm", "serve", str(folder), "--port", "0", *options]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch) / "log", "w") as log:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = ADDRESS.search(line)
            if found is None:
                raise SystemExit(f"the server did not start: {Path(log.name).read_text()}")
            port = int(found[1])
            wait_until_ready(port)
            yield Server(port, process, Path(log.name), time.perf_counter() - start)
            process.send_signal(signal.SIGTERM)
            status = process.wait(300)
            assert status in (0, -signal.SIGTERM), f"the server ended with status {status}"
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def wait_until_ready(port: int, seconds: float = 600.0) -> None:
    """Waits for GET /ready."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.02)
    raise SystemExit("the server did not become ready")


def children(pid: int) -> list[int]:
    """The processes that a process has started (on Linux)."""
    found: Sequence[str] = []
    with contextlib.suppress(OSError):
        found = [
            word
            for thread in Path(f"/proc/{pid}/task").iterdir()
            for word in (thread / "children").read_text().split()
        ]
    return [int(word) for word in found]


def command_line(pid: int) -> str:
    """Of a process; "" of one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def resident_bytes(pid: int) -> int:
    """The memory of a process; 0 of one that is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
