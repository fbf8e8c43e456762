"""One process of `startup.py`: runs a command of `jaxldm` and prints when its parts began.

Question: when are imports done, when is the model read, when is the first step done?
Command:  python -m experiments.benchmarks.startup_side SECONDS sample FOLDER ...     (seconds: time.time())
Needs:    nothing but jaxldm. `startup` calls it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def marked(note: Callable[[str], None]) -> Iterator[None]:
    """Makes `jaxldm sample` note when it begins, when its model is read, and each step."""
    from jaxldm.commands import sample

    bar, run = sample.progress_bar, sample.Sample.run

    @contextlib.contextmanager
    def noting(*given: Any, **options: Any) -> Iterator[Any]:
        note("ready")
        with bar(*given, **options) as progress:

            def step(done: Any, steps: Any) -> None:
                note("first_step")
                progress(done, steps)

            yield step

    def begin(command: Any) -> None:
        note("command")
        run(command)

    sample.progress_bar, sample.Sample.run = noting, begin
    try:
        yield
    finally:
        sample.progress_bar, sample.Sample.run = bar, run


def main(started: float, words: list[str], own_process: bool = True) -> dict[str, float]:
    """Seconds since `started` of each mark, the first time that it is reached."""
    from jaxldm import cli

    marks: dict[str, float] = {}
    with marked(lambda name: marks.setdefault(name, time.time() - started)):
        code = cli.main(words) if not own_process else cli.main()
    if code:
        sys.exit(code)
    return marks | {"end": time.time() - started}


if __name__ == "__main__":
    started = float(sys.argv.pop(1))
    print(json.dumps(main(started, sys.argv[1:])))
