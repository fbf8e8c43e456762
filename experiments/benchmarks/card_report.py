"""The table of `one_card.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from experiments.benchmarks.card_rows import ROWS, VARIANTS

HEAD = (
    "work",
    *(f"{name}, ms" for name in VARIANTS),
    *(f"{name} / jaxldm" for name in VARIANTS[1:]),
    "share of the peak",
    "compiling, s",
    "memory, GB",
)
CHECKS_HEAD = ("check", "error", "PyTorch's", "bound", "")
NAMES = {"jaxldm": "jaxldm", "torch": "PyTorch"}  # of the processes
TITLES = {row.name: row.title for row in ROWS}

Records = list[dict[str, Any]]


def peak(records: Records) -> float | None:
    """Operations a second of matrix products, the better of both frameworks."""
    found = [
        line["flops"] / (line["milliseconds"][1] / 1e3)
        for record in records
        if record["row"] == "peak"
        for line in record["lines"]
    ]
    return max(found, default=None)


def reason(record: dict[str, Any]) -> str | None:
    """Why there is no figure, or not every one."""
    return record.get("not_started") or record.get("error")


def works(records: Records) -> list[tuple[str, str | None]]:
    """(row, what of it) of each line of the table; (row, None) where nothing of a row is known."""
    found: dict[tuple[str, str | None], None] = {}
    for record in records:
        if record["row"] == "correctness" and not reason(record):
            continue
        timed = [line["what"] for line in record["lines"] if "milliseconds" in line]
        found |= {(record["row"], what): None for what in timed}
        known = any(row == record["row"] for row, _ in found)
        found |= {} if known else {(record["row"], None): None}
    named = {row for row, what in found if what is not None}
    return [(row, what) for row, what in found if what is not None or row not in named]


def cells(records: Records, row: str, what: str | None) -> list[str]:
    """One line of the table."""
    by_variant = {record["variant"]: record for record in records if record["row"] == row}
    lines = {
        variant: line
        for variant, record in by_variant.items()
        for line in record["lines"]
        if line["what"] == what and "milliseconds" in line
    }

    def time_of(variant: str) -> str:
        if variant in lines:
            first, median, last = map(figure, lines[variant]["milliseconds"])
            return median if first == last else f"{median} ({first} to {last})"
        record = by_variant.get(variant)
        return "" if record is None else "not started" if "not_started" in record else "failed"

    def ratio(variant: str) -> str:
        if variant not in lines or "jaxldm" not in lines:
            return ""
        return f"{lines[variant]['milliseconds'][1] / lines['jaxldm']['milliseconds'][1]:.2f}"

    def each(value: Any, form: str) -> str:
        found = [value(lines[name]) if name in lines else None for name in VARIANTS]
        known = any(number is not None for number in found)
        return ", ".join("-" if number is None else format(number, form) for number in found) if known else ""

    fastest = peak(records)

    # One number of operations for all: that of jaxldm's program where it was run.
    flops = next((line["flops"] for line in lines.values()), None)

    def share(line: dict[str, Any]) -> float | None:
        if fastest is None or flops is None:
            return None
        return flops / (line["milliseconds"][1] / 1e3) / fastest

    def gigabytes(line: dict[str, Any]) -> float | None:
        return None if line["memory_bytes"] is None else line["memory_bytes"] / 1e9

    title = TITLES[row] if what is None else f"{TITLES[row]}: {what}"
    return [
        title,
        *(time_of(variant) for variant in VARIANTS),
        *(ratio(variant) for variant in VARIANTS[1:]),
        each(share, ".1%"),
        each(lambda line: line["compile_seconds"], ".1f"),
        each(gigabytes, ".2f"),
    ]


def figure(number: float) -> str:
    """Four digits; without a power of ten, which nobody reads as minutes."""
    return f"{number:.4g}" if number < 1e4 else f"{number:.0f}"


def check_cells(records: Records) -> list[list[str]]:
    """The lines of the table of errors."""
    sides: dict[str, dict[str, Any]] = {}
    for record in records:
        for line in record["lines"] if record["row"] == "correctness" else ():
            sides.setdefault(line["what"], {})[record["variant"]] = line["result"]
    found = []
    for what, results in sides.items():
        errors = [f"{results[name]['error']:.1e}" if name in results else "" for name in VARIANTS[:2]]
        bound = next(iter(results.values()))["bound"]
        verdict = "" if "jaxldm" not in results else "ok" if within(results["jaxldm"]) else "WRONG"
        found.append([what, *errors, f"{bound:.0e}", verdict])
    return found


def within(result: dict[str, Any]) -> bool:
    """Whether an error is allowed."""
    return result["error"] <= result["bound"]


def failed(records: Records) -> bool:
    """Whether a row failed, or one of jaxldm's results is wrong."""
    wrong = any(line[-1] == "WRONG" for line in check_cells(records))
    return wrong or any("error" in record for record in records)


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    head = list(head)
    rows = ["| " + " | ".join(line) + " |" for line in [head, *lines]]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])


def report(setting: dict[str, Any], records: Records) -> str:
    """The whole page."""
    parts = [f"```\n{json.dumps(setting, indent=1)}\n```"]
    if setting["small_sizes"]:
        parts.append("SMALL SIZES on a processor: they show that everything runs, not how fast.")
    missing = [(NAMES[side], setting[side]["error"]) for side in NAMES if "error" in setting.get(side, {})]
    parts += [f"{name} was not run: {why}" for name, why in missing]
    checks = check_cells(records)
    if checks:
        wrong = sum(line[-1] == "WRONG" for line in checks)
        parts.append(f"Errors against float64 on the host: {wrong} of {len(checks)} above their bound.")
        parts.append(table(CHECKS_HEAD, checks))
    fastest = peak(records)
    if fastest is not None:
        parts.append(f"Matrix peak of this run, dense {setting['dtype']}: {fastest / 1e12:.4g} TFLOP/s.")
    lines = [cells(records, row, what) for row, what in works(records)]
    parts.append(table(HEAD, lines))
    reasons = [
        f"- {TITLES[record['row']]} ({record['row']}), {record['variant']}: {reason(record)}"
        for record in records
        if reason(record)
    ]
    parts += ["\n".join(reasons)] if reasons else []
    warned = [
        f"- {record['row']}, {record['variant']}: {line}"
        for record in records
        for line in record.get("warnings", ())
    ]
    parts += ["\n".join(["Warnings of jaxldm:", "", *warned])] if warned else []
    took = [
        f"{record['row']} {record['variant']} {record['seconds']:.0f} ({record['expected_seconds']:.0f})"
        for record in records
        if "seconds" in record
    ]
    parts.append("Seconds of each (expected): " + ", ".join(took) + ".")
    return "\n\n".join(parts) + "\n"
