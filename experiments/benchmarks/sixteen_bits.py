"""Is a network in 16 bits as near to the exact result as the reference's?

Question: for every family, what is the error of jaxldm in bfloat16 and float16, next to that of diffusers or
          transformers with the same weights, inputs and dtype?
Command:  python -m experiments.benchmarks.sixteen_bits          (--quick: one seed, bfloat16)
Needs:    the `test` extra; no accelerator. Minutes and figures: README.md in this folder.

Small random networks (`sixteen_bits_cases.py`). Weights and inputs are numbers of the 16-bit dtype, so that
the exact result is that of the reference in float64 on the same numbers (float32 where it cannot be computed
in float64); an error is the root mean square of all differences, over all seeds, over that of the exact
result.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.timing import machine
from experiments.figures import UNFINISHED, quick_options, read_result, save_results
from jaxldm.commands.terminal import run_script

DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class SixteenBits:
    """Measure the errors of all families in 16 bits, and write the table."""

    quick: bool = False
    """One seed, bfloat16: only to see that everything runs."""
    cases: tuple[str, ...] | None = None
    """Names in sixteen_bits_cases.py; None: all. The others keep their rows where those are of the same
    versions and seeds."""
    seeds: int = 4
    """Networks of other random numbers."""
    output_dir: Path = Path("runs/benchmarks")
    """Where sixteen_bits.md and sixteen_bits.json go."""


class Errors(NamedTuple):
    """Root mean square of the differences to the exact result, over that of the exact result."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """Ours over theirs: 1 is as good as the reference."""
        return self.ours / self.theirs


def main(options: SixteenBits) -> None:
    """Measures, prints and writes the table, row by row."""
    import diffusers
    import torch

    from experiments.benchmarks.sixteen_bits_cases import CASES
    from experiments.benchmarks.sixteen_bits_errors import measure

    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    options = quick_options(options, seeds=1)
    dtypes, seeds = DTYPES[:1] if options.quick else DTYPES, options.seeds
    facts = machine("sixteen_bits", versions) | {"seeds": seeds}
    folder, planned = options.output_dir, tuple(options.cases or CASES)
    known = earlier(folder, facts, dtypes) | earlier(folder / UNFINISHED, facts, dtypes)
    for number, name in enumerate(planned, 1):
        known[name] = {dtype: measure(name, dtype, range(seeds)) for dtype in dtypes}
        print(line(name, known[name]), flush=True)
        rows = {case: known[case] for case in CASES if case in known}
        save_results(folder, contents(rows, facts), complete=number == len(planned))
    print(f"\nwritten to {folder}/sixteen_bits.md and sixteen_bits.json")


def earlier(folder: Path, facts: dict[str, Any], dtypes: tuple[str, ...]) -> dict[str, dict[str, Errors]]:
    """The rows that are in the folder already, if they are of the same versions, seeds and dtypes."""
    text = read_result(folder / "sixteen_bits.json")
    if text is None:
        return {}
    found = json.loads(text)
    if any(found["machine"].get(key) != facts[key] for key in ("versions", "seeds")):
        return {}
    rows = {
        name: {dtype: Errors(**errors) for dtype, errors in row.items()}
        for name, row in found["errors"].items()
    }
    return {name: row for name, row in rows.items() if tuple(row) == dtypes}


def line(name: str, errors: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [
        f"{1e3 * each:.3f}" if n < 2 else f"{each:.2f}"
        for one in errors.values()
        for n, each in enumerate((one.ours, one.theirs, one.ratio))
    ]
    return f"| {name} | {' | '.join(cells)} |"


def contents(rows: dict[str, dict[str, Any]], facts: dict[str, Any]) -> dict[str, str]:
    """The table and its figures, by the names of their files."""
    dtypes = next(iter(rows.values()))
    heads = [f"{dtype}: {what}" for dtype in dtypes for what in ("jaxldm", "reference", "ratio")]
    text = [
        "Relative errors, times 1000 (see sixteen_bits.py).\n",
        f"| network | {' | '.join(heads)} |",
        f"|{'---|' * (1 + len(heads))}",
        *(line(name, errors) for name, errors in rows.items()),
        "\n" + ", ".join(f"{key} {value}" for key, value in facts.items()),
    ]
    figures = {name: {k: v._asdict() for k, v in errors.items()} for name, errors in rows.items()}
    content = json.dumps({"machine": facts, "errors": figures}, indent=1) + "\n"
    return {"sixteen_bits.md": "\n".join(text) + "\n", "sixteen_bits.json": content}


if __name__ == "__main__":
    run_script(main, SixteenBits)
