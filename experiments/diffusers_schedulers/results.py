"""What the scripts counted, as files: `results/schedulers.json` and `results/pipelines.json`."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Iterable, Mapping

RESULTS = pathlib.Path(__file__).parent / "results"
KINDS = ("agree", "refused", "reference", "deviating", "silent")
# A name -> without and with `reference_quirks` -> how many runs of each kind.
Counts = dict[str, dict[str, dict[str, int]]]


def of(switch: bool) -> str:
    """The key of the runs with or without `reference_quirks`."""
    return "reference_quirks" if switch else "plain"


def write(name: str, counts: Counts) -> None:
    """Write `results/<name>.json`; what it holds of other names stays."""
    RESULTS.mkdir(exist_ok=True)
    kept = read(name) if (RESULTS / f"{name}.json").exists() else {}
    text = json.dumps(kept | counts, indent=1, sort_keys=True)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def read(name: str) -> Counts:
    """What `write` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of each kind; 0 for those that there are none of."""
    summed: dict[str, int] = collections.Counter()
    for one in counts:
        summed.update(one)
    return {kind: summed[kind] for kind in (*KINDS, "rounding")}


def table(counts: Counts) -> str:
    """Rows of Markdown: a pipeline, then its counts without the switch and with it."""
    lines = []
    for name, found in counts.items():
        cells = []
        for key in (of(False), of(True)):
            one = total([found[key]])
            cells += [one["agree"], one["refused"], one["reference"]]
            cells += [one["deviating"]] if key == of(False) else [one["deviating"] + one["silent"]]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |\n")
    return "".join(lines)
