"""What becomes of an entry: it agrees, is refused, deviates for a stated reason, or is silently different."""

from __future__ import annotations

from typing import NamedTuple

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


def read(probe: Probe) -> schedulers.Scheduler | Verdict:
    """Ours, or that it is refused."""
    try:
        return schedulers.from_config({"_class_name": probe.scheduler} | probe.config)
    except JaxldmError as error:
        named = any(entry in str(error) for entry in probe.config)
        return Verdict("refused" if named else "silent", str(error))


def verdict(probe: Probe, steps: int) -> Verdict:
    """Of one run."""
    scheduler = read(probe)
    if isinstance(scheduler, Verdict):
        return scheduler
    try:
        reference_x = scheduler_runs.theirs(probe.scheduler, probe.config, steps, scheduler)
    except Exception as error:  # noqa: BLE001 - whatever the reference raises
        return Verdict("reference", repr(error))
    try:
        size = scheduler_runs.difference(reference_x, probe.scheduler, steps, scheduler)
    except JaxldmError as error:
        return Verdict("refused", str(error))
    if size <= AGREES:
        return Verdict("agree")
    deviation = deviation_of(probe)
    if deviation is None:
        return Verdict("silent", f"differs by {size:.1e}", size)
    return Verdict("deviating", deviation.title, size)
