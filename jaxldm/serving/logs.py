"""What the server logs, one line each on stderr: JSON, and tracebacks of what broke."""

from __future__ import annotations

import logging
import sys
import traceback


class Lines(logging.Handler):
    """Writes what is logged on stderr, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one."""
        print(record.getMessage(), file=sys.stderr, flush=True)
        if record.exc_info and record.exc_info[1] is not None:
            traceback.print_exception(record.exc_info[1])


def log_lines(quiet: bool = False) -> None:
    """Has what the server logs written on stderr."""
    log = logging.getLogger("jaxldm.serving")
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.handlers = [Lines()]
