"""Every entry of every scheduler whose file is read, next to diffusers.

Question: is each used as diffusers uses it, refused by name, or a stated difference?
Command:  python -m experiments.diffusers_schedulers.compare [--steps 4] [--schedulers DDIM]
          python -m experiments.diffusers_schedulers.compare --page docs/where-jaxldm-differs.md
Needs:    the extra "test"; a minute.

Prints how many runs agree, are refused, or deviate as `deviations.toml` says; the others by name.
"""

from __future__ import annotations

import argparse
import collections
import pathlib

import numpy as np


def page(counts: dict[str, int], largest: dict[str, float], steps: list[int]) -> str:
    """The page of the documentation."""
    from experiments.diffusers_schedulers.scheduler_deviations import DEVIATIONS, PAGE
    from experiments.diffusers_schedulers.scheduler_probes import probes
    from experiments.diffusers_schedulers.scheduler_verdicts import AGREES

    schedulers = len({probe.scheduler for probe in probes()})
    head = PAGE["head"].format(
        schedulers=schedulers,
        steps=", ".join(map(str, steps[:-1])) + f" and {steps[-1]}" if len(steps) > 1 else steps[0],
        agrees=AGREES,
        **{name: counts[name] for name in ("agree", "refused", "reference", "deviating")},
    )
    rows = []
    for deviation in DEVIATIONS:
        size = largest[deviation.title]
        shown = "NaN" if size != size else f"{size:.1%}"
        rows.append(f"| {deviation.title} | {deviation.reason} | {shown} | `{deviation.test}` |\n")
    return head + "".join(rows) + PAGE["foot"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[4])
    parser.add_argument("--schedulers", nargs="*", default=[])
    parser.add_argument("--page", type=pathlib.Path)
    options = parser.parse_args()
    from experiments.diffusers_schedulers.scheduler_probes import probes
    from experiments.diffusers_schedulers.scheduler_verdicts import verdict

    counts: dict[str, int] = collections.Counter()
    largest: dict[str, float] = collections.defaultdict(float)
    for probe in probes():
        if options.schedulers and not any(name in probe.scheduler for name in options.schedulers):
            continue
        for steps in options.steps:
            found = verdict(probe, steps)
            counts[found.kind] += 1
            if found.kind == "silent":
                print(f"{probe}, {steps} steps: {found.note}")
            if found.kind == "deviating":
                largest[found.note] = float(np.maximum(largest[found.note], found.size))  # NaN stays
    print(dict(counts))
    for title, size in largest.items():
        print(f"{size:.2e}  {title}")
    if options.page:
        options.page.write_text(page(counts, largest, options.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
