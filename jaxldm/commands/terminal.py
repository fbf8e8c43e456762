"""Terminal output that commands share: the progress bar, findings of health checks, tables; the seed."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxldm.errors import InvalidArgumentError, JaxldmError
from jaxldm.exact import LARGEST_UINT32
from jaxldm.reading import shortened

if TYPE_CHECKING:
    from jaxldm.metrics import Finding


def check_seed(seed: int) -> int:
    """Returns the seed. Raises `InvalidArgumentError` unless it is in 0 .. 2^32 - 1."""
    if not 0 <= seed <= LARGEST_UINT32:
        raise InvalidArgumentError(f"seed must be a whole number from 0 to {LARGEST_UINT32}, got {seed}")
    return seed


@contextlib.contextmanager
def progress_bar(
    total: int | None, name: str, quiet: bool = False, unit: str = "step"
) -> Iterator[Callable[[Any, Any], None]]:
    """Yields the `progress` of a pipeline's call, which draws a bar on stderr where that is a terminal.

    Args:
        total: number of calls; None: each call says how many units of all are done.
        name: in front of the bar.
        quiet: draw nothing.
        unit: what is counted.
    """
    from tqdm import tqdm

    # disable=None: no bar where stderr is a file and not a terminal
    disable = True if quiet else None
    with tqdm(total=total, desc=name, unit=unit, dynamic_ncols=True, leave=False, disable=disable) as bar:
        if total is None:
            from jaxldm import diffusion as D

            yield D.bar_progress(bar)
            return

        def progress(done: Any, steps: Any) -> None:
            bar.update()

        yield progress


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints the failed health checks on stderr: what was seen, the likely cause and the fix."""
    from jaxldm.metrics import health

    bad = health.failed(findings)
    if bad:
        print(health.report(bad), file=sys.stderr)


def print_warnings_as_lines() -> None:
    """Makes Python's warnings one line each on stderr, and each kind of them one line in all."""
    seen = set()

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        line = " ".join(str(message).split())
        if line[:40] not in seen:
            seen.add(line[:40])
            print(f"jaxldm: warning: {shortened(line, 370)}", file=sys.stderr)

    warnings.showwarning = show


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


def _own_command() -> str | None:
    """`python -m MODULE` of the module that runs, as its help shows it; None where it was run by its path."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def run_script(main: Callable[[Any], None], options: type) -> None:
    """Runs `main(options)` with the options of the command line: the last line of an experiment's script.

    A user error is one line on stderr and exit code 2, as for `jaxldm` itself.
    """
    import tyro

    try:
        main(tyro.cli(options, prog=_own_command(), config=(tyro.conf.FlagCreatePairsOff,)))
    except JaxldmError as error:
        script = Path(sys.argv[0])
        name = script.parent.name if script.stem == "__main__" else script.stem
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
