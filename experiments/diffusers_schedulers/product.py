"""Every scheduler that is read in every kind of pipeline, next to diffusers.

Question: does a pipeline with any scheduler draw what that of diffusers draws, is it refused in one line, or
          is the difference a stated one?
Command:  python -m experiments.diffusers_schedulers.product [--pipelines XL] [--schedulers Euler]
Needs:    the extra "test"; ten minutes.

Prints for each pipeline how many of its schedulers agree, are refused, deviate as `deviations.toml` says, or
differ in silence (by name), without `reference_quirks` and with it. Exits with 1 if any differs in silence.
"""

from __future__ import annotations

import argparse
import collections
import sys
from typing import Any

import numpy as np


def verdict(kind: Any, scheduler: str, *, quirks: bool, **changes: Any) -> Any:
    """Of one run; see `scheduler_verdicts.Verdict`.

    Args:
        kind: of `pipeline_runs.KINDS`.
        scheduler: a class of diffusers.
        quirks: as diffusers draws.
        changes: entries of the scheduler.
    """
    from experiments.diffusers_schedulers import pipeline_runs
    from experiments.diffusers_schedulers.scheduler_deviations import DEVIATIONS, deviation_of
    from experiments.diffusers_schedulers.scheduler_probes import Probe
    from experiments.diffusers_schedulers.scheduler_verdicts import AGREES, Verdict
    from jaxldm.errors import JaxldmError
    from jaxldm.schedulers.quirks import SCALED

    try:
        config = pipeline_runs.config_of(kind, scheduler, **changes)
        expected = pipeline_runs.theirs(kind, config)
    except Exception as error:  # noqa: BLE001 - whatever the reference raises
        return Verdict("reference", repr(error))
    if not np.isfinite(expected).all():
        return Verdict("reference", "it draws NaN")
    try:
        drawn = pipeline_runs.ours(kind, config, quirks=quirks)
    except JaxldmError as error:
        return Verdict("refused", str(error))
    size = float(np.abs(drawn - expected).max() / np.abs(expected).max())
    if size <= AGREES:
        return Verdict("agree")
    deviation = None if quirks else deviation_of(Probe(scheduler, None, config))
    if scheduler == "IPNDMScheduler" and not quirks:
        deviation = next(one for one in DEVIATIONS if one.title.startswith("IPNDM"))
    if not quirks and kind.name == "DiTPipeline" and scheduler.startswith(SCALED):
        deviation = next(one for one in DEVIATIONS if one.title.startswith("DiTPipeline"))
    in_parts = ("PNDMScheduler", "LMSDiscreteScheduler", "DPMSolverSinglestepScheduler")
    in_parts += ("LCMScheduler", "TCDScheduler")
    if not quirks and kind.starts_from_image and scheduler in in_parts:
        deviation = next(one for one in DEVIATIONS if one.title.startswith("Image-to-image"))
    if deviation is not None:
        return Verdict("deviating", deviation.title, size)
    return Verdict("silent", f"differs by {size:.1e}", size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipelines", nargs="*", default=[])
    parser.add_argument("--schedulers", nargs="*", default=[])
    parser.add_argument("--refused", action="store_true", help="print why, too")
    parser.add_argument("--write", action="store_true", help="write into results/pipelines.json")
    options = parser.parse_args()

    from experiments.diffusers_schedulers import results
    from experiments.diffusers_schedulers.pipeline_runs import KINDS
    from jaxldm.schedulers import SCHEDULERS

    silent, written = 0, {}
    for kind in KINDS:
        if options.pipelines and not any(name in kind.name for name in options.pipelines):
            continue
        for quirks in (False, True):
            counts: dict[str, int] = collections.Counter()
            for scheduler in SCHEDULERS:
                if options.schedulers and not any(name in scheduler for name in options.schedulers):
                    continue
                found = verdict(kind, scheduler, quirks=quirks)
                counts[found.kind] += 1
                if found.kind == "silent" or (options.refused and found.kind in ("refused", "reference")):
                    print(f"  {scheduler}: {found.kind}: {found.note}"[:200], flush=True)
            print(f"{kind.name}, reference_quirks={quirks}: {dict(counts)}", flush=True)
            silent += counts["silent"]
            written.setdefault(kind.name, {})[results.of(quirks)] = dict(counts)
    if options.write:
        results.write("pipelines", written)
    sys.exit(1 if silent else 0)


if __name__ == "__main__":
    main()
