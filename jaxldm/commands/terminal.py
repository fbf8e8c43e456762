"""What the commands share of the terminal: the progress bar, the findings of the health checks, tables, the
seed.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxldm.errors import InvalidArgumentError, JaxldmError

if TYPE_CHECKING:
    from jaxldm.metrics import Finding

LARGEST_SEED = 2**32 - 1


def check_seed(seed: int) -> int:
    """Returns the seed. Raises `InvalidArgumentError` unless it is in 0 .. 2^32 - 1."""
    if not 0 <= seed <= LARGEST_SEED:
        raise InvalidArgumentError(f"seed must be a whole number from 0 to {LARGEST_SEED}, not {seed}")
    return seed


class StepBar:
    """A progress bar over sampling steps, drawn on stderr when that is a terminal.

    There is one, `STEP_BAR`, because `STEP_BAR.tick` is compiled into the sampler: a new function would be
    compiled anew. Several devices may call it at once.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._bar: Any = None
        self._next: tuple[int, str] | None = None

    @contextlib.contextmanager
    def showing(self, total: int, name: str) -> Iterator[None]:
        """The bar for `total` steps; it appears with the first of them."""
        import jax

        self._next = (total, name)
        try:
            yield
            jax.effects_barrier()  # the last calls of `tick` may still be under way
        finally:
            with self._lock:
                if self._bar is not None:
                    self._bar.close()
                self._bar, self._next = None, None

    def tick(self, step: Any, x: Any) -> None:
        """One step of one device is done."""
        with self._lock:
            if self._bar is None and self._next is not None:
                from tqdm import tqdm

                total, name = self._next
                # disable=None: no bar where stderr is a file and not a screen
                self._bar = tqdm(
                    total=total, desc=name, unit="step", dynamic_ncols=True, leave=False, disable=None
                )
            if self._bar is not None:
                self._bar.update()


STEP_BAR = StepBar()


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints what the health checks found wrong on stderr: what was seen, the likely cause, the cure."""
    from jaxldm.metrics import health

    bad = health.failed(findings)
    if bad:
        print(health.report(bad), file=sys.stderr)


def table(rows: Sequence[Sequence[Any]], indent: str = "  ") -> str:
    """Rows of cells as lines of text with aligned columns.

    >>> print(table([("a", 1), ("long", 22)], indent=""))
    a     1
    long  22
    """
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in texts)
    return "\n".join((indent + line).rstrip() for line in lines)


def run_script(main: Callable[[Any], None], options: type) -> None:
    """`main(options)` with the options as typed on the command line: what an experiment's script ends with.

    A mistake of the caller's is one line on stderr and exit code 2, as for `jaxldm` itself.
    """
    import tyro

    try:
        main(tyro.cli(options, config=(tyro.conf.FlagCreatePairsOff,)))
    except JaxldmError as error:
        print(f"{Path(sys.argv[0]).stem}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
