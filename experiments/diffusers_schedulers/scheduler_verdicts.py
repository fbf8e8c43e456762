"""What becomes of an entry: it agrees, is refused, deviates for a stated reason, or is silently different."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.diffusers_schedulers import scheduler_runs
from experiments.diffusers_schedulers.scheduler_deviations import deviation_of
from experiments.diffusers_schedulers.scheduler_probes import Probe
from jaxldm import schedulers
from jaxldm.errors import JaxldmError

AGREES = 1e-3


class Verdict(NamedTuple):
    """kind: "agree", "refused", "reference" (it refuses), "deviating" (note: the title) or "silent"."""

    kind: str
    note: str = ""
    size: float = 0.0


def read(probe: Probe, *, quirks: bool = False) -> schedulers.Scheduler | Verdict:
    """Ours, or that it is refused.

    Args:
        quirks: as diffusers draws.
    """
    try:
        config = {"_class_name": probe.scheduler} | probe.config
        return schedulers.from_config(config, reference_quirks=quirks)
    except JaxldmError as error:
        named = any(entry in str(error) for entry in probe.config)
        return Verdict("refused" if named else "silent", str(error))


def verdict(probe: Probe, steps: int, *, quirks: bool = False) -> Verdict:
    """Of one run; with `quirks` none may deviate."""
    scheduler = read(probe, quirks=quirks)
    if isinstance(scheduler, Verdict):
        return scheduler
    try:
        reference_x = scheduler_runs.theirs(probe.scheduler, probe.config, steps, scheduler)
    except Exception as error:  # noqa: BLE001 - whatever the reference raises
        return Verdict("reference", repr(error))
    if quirks and not np.isfinite(reference_x).all():
        return Verdict("reference", "it draws NaN")
    try:
        size = scheduler_runs.difference(reference_x, probe.scheduler, steps, scheduler)
    except JaxldmError as error:
        return Verdict("refused", str(error))
    if size <= AGREES:
        return Verdict("agree")
    deviation = None if quirks else deviation_of(probe)
    if deviation is not None:
        return Verdict("deviating", deviation.title, size)
    if scheduler_runs.difference_in_float64(probe.scheduler, probe.config, steps, scheduler) <= AGREES:
        return Verdict("agree", "rounding", size)
    return Verdict("silent", f"differs by {size:.1e}", size)
