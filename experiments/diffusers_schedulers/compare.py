"""Every entry of every scheduler whose file is read, next to diffusers.

Question: is each used as diffusers uses it, refused by name, or a stated difference?
Command:  python -m experiments.diffusers_schedulers.compare [--steps 4] [--schedulers DDIM]
          python -m experiments.diffusers_schedulers.compare --quirks
          python -m experiments.diffusers_schedulers.compare --page docs/where-jaxldm-differs.md
Needs:    the extra "test"; a minute, or four for the page.

Prints how many runs agree, are refused, or deviate as `deviations.toml` says; the others by name. --page also
writes `results/schedulers.json`, which tests compare with runs. With --quirks it draws as diffusers does
(`reference_quirks=True`), and exits with 1 if any run deviates.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import sys

import numpy as np


def page(counts: dict[str, int], quirky: dict[str, int], largest: dict[str, float], steps: list[int]) -> str:
    """The page of the documentation; its counts of pipelines are those that `product --write` left."""
    from experiments.diffusers_schedulers import results
    from experiments.diffusers_schedulers.scheduler_deviations import DEVIATIONS, PAGE, foot
    from experiments.diffusers_schedulers.scheduler_probes import probes
    from experiments.diffusers_schedulers.scheduler_verdicts import AGREES

    schedulers = len({probe.scheduler for probe in probes()})
    head = PAGE["head"].format(
        schedulers=schedulers,
        steps=", ".join(map(str, steps[:-1])) + f" and {steps[-1]}" if len(steps) > 1 else steps[0],
        agrees=AGREES,
        rounding=quirky["rounding"],
        quirky_deviating=quirky["silent"],
        **{name: counts[name] for name in ("agree", "refused", "reference", "deviating")},
        **{f"quirky_{name}": quirky[name] for name in ("agree", "refused", "reference")},
    )
    rows = []
    for deviation in DEVIATIONS:
        size = largest[deviation.title] if deviation.measured is None else deviation.measured()
        shown = "NaN" if size != size else f"{size:.1%}"
        rows.append(f"| {deviation.title} | {deviation.reason} | {shown} | `{deviation.test}` |\n")
    return head + "".join(rows) + foot(results.table(results.read("pipelines")))


def count(
    steps: list[int], names: list[str], *, quirks: bool = False
) -> tuple[dict[str, dict[str, int]], dict[str, float]]:
    """(scheduler -> how many runs of each kind, the largest difference of each deviation).

    Prints what has no reason.
    """
    from experiments.diffusers_schedulers.scheduler_probes import probes
    from experiments.diffusers_schedulers.scheduler_verdicts import verdict

    counts: dict[str, dict[str, int]] = {}
    largest: dict[str, float] = collections.defaultdict(float)
    for probe in probes():
        if names and not any(name in probe.scheduler for name in names):
            continue
        for number in steps:
            found = verdict(probe, number, quirks=quirks)
            own = counts.setdefault(probe.scheduler, collections.Counter())
            own[found.kind] += 1
            if found.note == "rounding":
                own["rounding"] += 1
            if found.kind == "silent":
                print(f"{probe}, {number} steps: {found.note}")
            if found.kind == "deviating":
                largest[found.note] = float(np.maximum(largest[found.note], found.size))  # NaN stays
    return counts, largest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[4])
    parser.add_argument("--schedulers", nargs="*", default=[])
    parser.add_argument("--quirks", action="store_true")
    parser.add_argument("--page", type=pathlib.Path)
    options = parser.parse_args()

    from experiments.diffusers_schedulers import results

    found, largest = count(options.steps, options.schedulers, quirks=options.quirks)
    counts = results.total(found.values())
    print(counts)
    if options.quirks:
        sys.exit(1 if counts["silent"] else 0)
    for title, size in largest.items():
        print(f"{size:.2e}  {title}")
    if options.page:
        with_quirks, _ = count(options.steps, options.schedulers, quirks=True)
        quirky = results.total(with_quirks.values())
        print("reference_quirks:", quirky)
        keys = results.of(False), results.of(True)
        both = {name: dict(zip(keys, (found[name], with_quirks[name]), strict=True)) for name in found}
        results.write("schedulers", both)
        options.page.write_text(page(counts, quirky, largest, options.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
