"""A worker in a process of its own, which may crash, hang or be killed without harm to the others.

The process is spawned, not forked: JAX has threads. It lives as long as its pipe: when the server is gone, in
whatever way, so is the worker.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import logging
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxldm.errors import InvalidArgumentError, JaxldmError
from jaxldm.serving.messages import Command, Died, Loaded, Ready, Refused, Report, Stop

END_SECONDS = 5.0  # to end by itself
SWITCH_SECONDS = 0.0005  # of Python, from thread to thread
# Where Linux counts processes that were killed for want of memory: of the container, and of the machine.
OUT_OF_MEMORY = ("/sys/fs/cgroup/memory.events", "/proc/vmstat")
DEVICES = ("CUDA", "ROCM")


class WorkerProcess:
    """A worker in a process of its own; one object for one process.

    Args:
        make: loads the model into a `Made`; a function of a module, or a `functools.partial` of one.
        number: of the worker, from 0: on GPUs, each has `devices` of its own.
        devices: how many a worker uses, where there are several workers; None: all that it sees.
    """

    restartable = True

    def __init__(self, make: Callable[[], Any], number: int = 0, devices: int | None = None):
        self._make, self._number, self._devices = make, number, devices
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._process: Any = None
        self._pipe: Any = None
        self._killed_for: str | None = None
        self._threads: list[threading.Thread] = []

    def again(self) -> WorkerProcess:
        """Another one of the same kind."""
        return WorkerProcess(self._make, self._number, self._devices)

    def prestart(self) -> None:
        """Starts the process, where that was not done before."""
        if self._process is None:
            self._spawn()

    def load(self) -> Loaded:
        """Starts the process and waits until the model is in its memory.

        Raises:
            InvalidArgumentError: what cannot be served.
        """
        self.prestart()
        try:
            report = self._pipe.recv()
        except (EOFError, OSError):
            report = Refused(self._end().message)
        if isinstance(report, Loaded):
            return report
        self._end()
        raise InvalidArgumentError(report.message)

    def start(self, tell: Callable[[Report], None]) -> None:
        """Has the reports passed on from now on, in a thread; starts the process where `load` has not."""
        self.prestart()
        targets = functools.partial(self._read, tell), self._write
        name = "jaxldm-worker-pipe"
        self._threads = [threading.Thread(target=target, name=name, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def send(self, command: Command) -> None:
        """Hands in a command; never waits for the process."""
        self._commands.put(command)

    def kill(self, reason: str) -> None:
        """Ends the process at once; the reason is that of its `Died`."""
        self._killed_for = reason
        self._process.kill()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end after `Stop`; kills what does not end."""
        if self._process is None:
            return
        timeout = END_SECONDS if timeout is None else timeout
        if self._threads:
            reader = self._threads[0]  # it waits for the process: two waits at once lose its status
            reader.join(timeout)
            if reader.is_alive():
                self._process.kill()
            reader.join(END_SECONDS)
        else:  # only loaded
            self._process.kill()
            self._end()
            self._pipe.close()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return None if self._process is None else self._process.pid

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self._make, self._number, self._devices)
        self._out_of_memory = out_of_memory_kills()
        self._process = context.Process(target=work, args=arguments, name="jaxldm-worker", daemon=True)
        self._process.start()
        theirs.close()
        atexit.register(self._process.kill)  # Python would wait for it, with the pipe open

    def _read(self, tell: Callable[[Report], None]) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                tell(self._pipe.recv())
        self._commands.put(None)
        self._threads[1].join()  # its number may be that of another file as soon as the pipe is closed
        died = self._end()
        self._pipe.close()
        tell(died)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the reader finds out
            while (command := self._commands.get()) is not None:
                self._pipe.send(command)

    def _end(self) -> Died:
        """Waits for the process, whose pipe is closed, and says why it ended."""
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        atexit.unregister(self._process.kill)
        code = self._process.exitcode
        if self._killed_for is not None:
            return Died(self._killed_for)
        if code >= 0:
            return Died(f"its process ended with status {code}")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        if code == -signal.SIGKILL and out_of_memory_kills() != self._out_of_memory:
            return Died("its process ran out of memory")
        from_outside = code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
        return Died(f"its process was ended by {name}", by_itself=not from_outside)


def out_of_memory_kills() -> tuple[int, ...]:
    """How many processes were killed for want of memory, by those who count; () where nobody does."""
    counts = []
    for file in OUT_OF_MEMORY:
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", Path(file).read_text(), re.MULTILINE)
            counts += [int(found[1])] if found else []
    return tuple(counts)


# ---------------------------------------------------------------- in the process


def work(pipe: Any, make: Callable[[], Any], number: int, devices: int | None) -> None:
    """All that the process does."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # the server gets them, too, and lets us finish
        signal.signal(signal_number, signal.SIG_IGN)
    # So long the engine's thread waits, between two steps, for one that prepares a request: Python's own 5 ms
    # are longer than some steps.
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.disable()  # of what is imported and traced nearly all stays, and each look at it takes longer
    lock = threading.Lock()

    def tell(report: Report) -> None:
        with lock:
            try:
                pipe.send(report)
            except OSError:
                os._exit(0)  # the server is gone
        if isinstance(report, Ready):
            gc.freeze()  # nor is it looked at between two steps
            gc.enable()
        if isinstance(report, Died):
            os._exit(1)

    try:
        _prepare_process(number, devices)
        from jaxldm.serving.worker import Worker  # after the settings, and not in the process of the server

        made = make()
        worker = Worker(made, tell)
    except JaxldmError as error:
        tell(Refused(str(error)))
        return
    except Exception as error:
        logging.getLogger("jaxldm.serving").error("the model could not be loaded", exc_info=error)
        tell(Refused(f"the model could not be loaded: {type(error).__name__}: {error}"[:350]))
        return
    tell(Loaded(made.offer, made.engine.sizes))
    worker.start()
    while True:
        try:
            command = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # in the middle of a step, perhaps
        worker.send(command)
        if isinstance(command, Stop):
            break
    worker.join(END_SECONDS)
    sys.stderr.flush()
    os._exit(0)  # a computation that still runs would call back into an interpreter that has ended


def _prepare_process(number: int, devices: int | None) -> None:
    """JAX's settings, and the devices of this worker: `devices` GPUs from the `number` times so manyth on."""
    import jax

    from jaxldm import host

    if devices is not None:
        mine = ",".join(str(number * devices + device) for device in range(devices))
        for kind in DEVICES:
            if f"{kind}_VISIBLE_DEVICES" not in os.environ:
                jax.config.update(f"jax_{kind.lower()}_visible_devices", mine)
    host.prepare(keep_compiled=True)
    host.use_compilation_cache()
