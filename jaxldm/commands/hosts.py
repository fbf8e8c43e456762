"""Commands that several processes run together, each on a host of its own: how they meet and part."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from jaxldm.commands.options import shown
from jaxldm.errors import InvalidArgumentError
from jaxldm.reading import shown as shown_value

Made = TypeVar("Made")
JOIN_SECONDS = 300  # that processes wait for one another at the start
LEAVE_SECONDS = 10  # at most, at an end that may not be that of all
_SILENT_SECONDS = 5  # of waiting, before a line says so
_MET = threading.Event()  # all of them


@dataclass(frozen=True, kw_only=True)
class SeveralHosts:
    """Options of commands that several processes can run together, each on a host of its own."""

    coordinator: Annotated[str | None, shown("ADDRESS:PORT", "one process alone")] = None
    """Where the first of several processes listens, the same for all; each is started with the same command
    and a run folder that all see.
    """

    num_processes: Annotated[int | None, shown("INT", "one")] = None
    """How many processes train together."""

    process_id: Annotated[int | None, shown("INT", "none")] = None
    """Number of this process, from 0."""

    def join_hosts(self) -> None:
        """Waits for the other processes, whose devices then are JAX's, too; nothing for one alone.

        Raises:
            InvalidArgumentError: some of the options without the others, or processes that do not come.
        """
        coordinator, count, number = self.coordinator, self.num_processes, self.process_id
        if coordinator is None and count is None and number is None:
            return
        if coordinator is None or count is None or number is None:
            raise InvalidArgumentError(
                "--coordinator, --num-processes and --process-id go together, as in --coordinator "
                "10.0.0.1:1234 --num-processes 2 --process-id 0"
            )
        place = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
        if place is None or not 1 <= int(place[1]) <= 65535:
            raise InvalidArgumentError(
                f"--coordinator takes ADDRESS:PORT, as in 10.0.0.1:1234, got {shown_value(coordinator)}"
            )
        if not 0 <= number < count:
            raise InvalidArgumentError(
                f"--process-id must be from 0 to --num-processes - 1, got {number} of {count}"
            )
        _join(coordinator, count, number)

    def agreed(self, make: Callable[[], Made]) -> Made:
        """`make()`, if it succeeds in all processes: what one of them refuses ends all.

        Raises what it raises, and `CheckpointError` for the error of another process.
        """
        if self.coordinator is None:
            return make()
        from jaxldm.training.processes import together

        return together(make)

    def speaks(self) -> bool:
        """Whether this process prints what all have done: the first."""
        return not self.process_id


def _join(coordinator: str, count: int, number: int) -> None:
    """`jax.distributed.initialize` in a thread of its own, so that Ctrl-C need not wait for it.

    JAX aborts the process where its time is over, and crashes where it cannot listen: neither may happen.
    """
    import jax

    with contextlib.suppress(AttributeError):  # of an earlier version
        # Its handler would swallow a SIGTERM that comes before a training has one.
        jax.config.update("jax_enable_preemption_service", False)
    failed: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(coordinator, count, number, initialization_timeout=10 * JOIN_SECONDS)
            _MET.set()
        except Exception as error:  # noqa: BLE001  (raised below)
            failed.append(error)

    if number == 0:
        _check_port(int(coordinator.rsplit(":", 1)[1]))
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(_SILENT_SECONDS)
    others = " and ".join(str(other) for other in range(count) if other != number)
    if thread.is_alive():
        print(
            f"waiting at {coordinator} for process {others} (at most {JOIN_SECONDS} seconds)", file=sys.stderr
        )
        thread.join(JOIN_SECONDS - _SILENT_SECONDS)
    if failed or thread.is_alive():
        reason = " ".join(str(failed[0]).split()) if failed else f"no answer in {JOIN_SECONDS} seconds"
        raise InvalidArgumentError(
            f"process {others} did not meet process {number} at {coordinator} ({reason[:150]}): start all "
            f"{count} with the same --coordinator and --num-processes"
        )


def _check_port(port: int) -> None:
    """Raise `InvalidArgumentError` where the first process cannot listen there."""
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise InvalidArgumentError(
            f"cannot listen at port {port} of --coordinator ({os.strerror(error.errno or 0)}): choose "
            "another one, the same for all processes"
        ) from error


def are_joining() -> bool:
    """Whether this process is one of several, which may have met."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave() -> None:
    """Part from the others: an exit alone would wait minutes for those that have not come to their end."""
    import jax

    if not _MET.is_set():
        return

    def shutdown() -> None:
        with contextlib.suppress(RuntimeError):  # of one that is gone
            jax.distributed.shutdown()

    thread = threading.Thread(target=shutdown, daemon=True)
    thread.start()
    thread.join(LEAVE_SECONDS)
