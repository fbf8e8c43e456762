"""Every entry of every scheduler's signature in diffusers is used, refused by name, or a stated deviation.

`python -m experiments.diffusers_schedulers.compare` compares all of them, at any numbers of steps.
"""

import functools
import inspect
import pathlib

import diffusers
import numpy as np
import pytest

from experiments.diffusers_schedulers import results, scheduler_runs
from experiments.diffusers_schedulers.scheduler_deviations import DEVIATIONS, deviation_of, foot
from experiments.diffusers_schedulers.scheduler_probes import Probe, probes, signature
from experiments.diffusers_schedulers.scheduler_verdicts import AGREES, Verdict, read, verdict
from jaxldm import schedulers
from jaxldm.errors import CheckpointError
from jaxldm.schedulers.table import ALIASES, INVERSES, SCHEDULERS

STEPS = 4
# These make the path; test_read.py and test_write.py compare their rows.
OF_THE_PATH = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"}
PROBES = probes()


@functools.cache
def result(text):
    """x of the reference, or None where it refuses."""
    scheduler, probe = RUNS[text]
    try:
        return scheduler_runs.theirs(probe.scheduler, probe.config, STEPS, scheduler)
    except Exception:  # noqa: BLE001 - whatever it raises
        return None


RUNS = {}


def reference(probe, scheduler):
    RUNS[str(probe)] = (scheduler, probe)
    return result(str(probe))


@pytest.mark.parametrize("name", [*SCHEDULERS, *INVERSES])
def test_no_entry_is_ignored_where_the_reference_uses_it(name):
    tried = {probe.entry for probe in PROBES if probe.scheduler == name}
    assert tried >= signature(name).keys()
    for probe in PROBES:
        if probe.scheduler != name or probe.entry is None:
            continue
        scheduler = read(probe)
        if isinstance(scheduler, Verdict):
            assert scheduler.kind == "refused", f"{probe}: {scheduler.note}"
            continue
        without = Probe(name, None, {key: probe.config[key] for key in probe.config if key != probe.entry})
        plain = read(without)
        if isinstance(plain, Verdict) or scheduler != plain or deviation_of(probe) is not None:
            continue
        theirs, base = reference(probe, scheduler), reference(without, scheduler)
        if theirs is not None and base is not None:
            assert np.abs(theirs - base).max() <= AGREES * np.abs(base).max(), (
                f"{probe} is ignored in silence"
            )


@pytest.mark.parametrize("name", [*SCHEDULERS, *INVERSES])
def test_what_is_used_draws_what_the_reference_draws(name):
    seen = []
    for probe in PROBES:
        if probe.scheduler != name or probe.entry in OF_THE_PATH:
            continue
        scheduler = read(probe)
        if scheduler in seen:
            continue
        seen.append(scheduler)
        assert (found := verdict(probe, STEPS)).kind != "silent", f"{probe}: {found.note}"


def of_the_reference():
    """Every scheduler of the installed diffusers, those that need a package besides, too."""
    names = [
        name for name in dir(diffusers.schedulers) if inspect.isclass(getattr(diffusers.schedulers, name))
    ]
    return sorted({*(name for name in names if name.endswith("Scheduler")), "DPMSolverSDEScheduler"})


@pytest.mark.parametrize("name", of_the_reference())
def test_every_scheduler_of_the_reference_is_read_or_refused_by_its_name(name):
    """Those of other modalities, and those whose pipelines are not here, are refused in one line."""
    if name in (*SCHEDULERS, *ALIASES, *INVERSES):
        assert isinstance(schedulers.from_config({"_class_name": name}), schedulers.Scheduler)
        own, theirs = signature(ALIASES.get(name, name)), signature(name)
        assert own == theirs  # an alias has the entries of what it stands for
        return
    with pytest.raises(CheckpointError, match=f"_class_name '{name}'") as caught:
        schedulers.from_config({"_class_name": name})
    assert "\n" not in str(caught.value)


def test_the_page_lists_every_deviation():
    page = pathlib.Path("docs/where-jaxldm-differs.md").read_text(encoding="utf-8")
    for deviation in DEVIATIONS:
        assert f"| {deviation.title} | {deviation.reason} | " in page
        assert deviation.measured or any(deviation.covers(probe) for probe in PROBES)
        assert pathlib.Path(deviation.test).exists()
    assert page.endswith(foot(results.table(results.read("pipelines"))))
