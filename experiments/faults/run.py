"""Every kind of fault test, one after the other, as a table.

Question: is anything lost or mixed by a kill, does anything hang or end in a traceback?
Command: python -m experiments.faults, which is `make faults`; the same is python -m experiments.faults.run
Needs: Linux, two cores, about 12 minutes; with --short about two.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from pathlib import Path

from experiments.faults.result import Result
from experiments.figures import output_folder, save_results
from jaxldm.commands.terminal import run_script
from jaxldm.errors import one_of

# Module with `run(count, seed)`: how many cases in the full run, and how many in the short form.
KINDS = {
    "kills": (200, 8),
    "mutations": (100_000, 2_000),
    "command_lines": (300, 30),
    "misuse": (250, 40),
}
MINUTES = 12.0
MAX_FAULTS = 20  # shown of each kind


@dataclasses.dataclass(frozen=True)
class Faults:
    """Looks for faults of each kind and writes a table."""

    minutes: float = MINUTES
    """About how long it may take: the numbers of cases are in proportion."""

    short: bool = False
    """Only a few of each kind."""

    only: tuple[str, ...] = tuple(KINDS)
    """Some of the kinds."""

    seed: int = 0
    """Of the choice of cases."""

    output_dir: Path = Path("runs/faults")
    """Where results.md goes; that of a short run to the folder `quick` in it."""


def main(options: Faults) -> int:
    """Runs all kinds; the number of faults."""
    for name in options.only:
        one_of("kind", name, KINDS)
    results, missing = [], []
    # In the order of the table: the kills fork, which a process that has computed with JAX must not.
    for name in (name for name in KINDS if name in options.only):
        if importlib.util.find_spec(f"experiments.faults.{name}") is None:
            missing.append(name)
            continue
        long, short = KINDS[name]
        count = short if options.short else max(1, round(long * options.minutes / MINUTES))
        result = importlib.import_module(f"experiments.faults.{name}").run(count, options.seed)
        print(
            f"{name}: {result.count} cases, {len(result.faults)} faults, {result.seconds:.0f} s", flush=True
        )
        results.append(result)
    text = table(results, missing)
    print("\n" + text)
    save_results(output_folder(options.output_dir, options.short), {"results.md": text})
    return sum(len(result.faults) for result in results)


def command(options: Faults) -> None:
    """`main`, whose exit status is 1 where there are faults."""
    raise SystemExit(min(1, main(options)))


def table(results: list[Result], missing: list[str]) -> str:
    """The results as Markdown, the faults below."""
    lines = ["| kind | cases | faults | seconds |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.count} | {len(r.faults)} | {r.seconds:.0f} |" for r in results]
    lines += [f"| {name} | not there | | |" for name in missing]
    for result in results:
        if result.faults:
            shown = result.faults[:MAX_FAULTS]
            more = (
                [f"- and {len(result.faults) - len(shown)} more"] if len(result.faults) > len(shown) else []
            )
            lines += ["", f"{result.name}:", "", *(f"- {fault}" for fault in shown), *more]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(command, Faults)
