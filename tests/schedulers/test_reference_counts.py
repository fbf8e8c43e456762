"""Counts of `experiments.diffusers_schedulers`: those of its files are those of runs and of the page."""

import collections
import pathlib

import pytest

from experiments.diffusers_schedulers import results
from experiments.diffusers_schedulers.compare import count
from experiments.diffusers_schedulers.pipeline_runs import KINDS
from experiments.diffusers_schedulers.product import verdict
from experiments.diffusers_schedulers.scheduler_probes import probes
from jaxldm.schedulers.table import SCHEDULERS

OF_SCHEDULERS, OF_PIPELINES = results.read("schedulers"), results.read("pipelines")
BOTH = [results.of(switch) for switch in (False, True)]


def test_every_run_is_counted_and_none_differs_in_silence():
    tried = collections.Counter(probe.scheduler for probe in probes())
    assert OF_SCHEDULERS.keys() == tried.keys()
    assert OF_PIPELINES.keys() == {kind.name for kind in KINDS}
    for numbers, found in (
        (tried, OF_SCHEDULERS),
        (dict.fromkeys(OF_PIPELINES, len(SCHEDULERS)), OF_PIPELINES),
    ):
        for name, counts in found.items():
            for key in BOTH:
                one = results.total([counts[key]])
                assert sum(one[kind] for kind in results.KINDS) == numbers[name] and one["silent"] == 0
    assert results.total(counts[BOTH[1]] for counts in OF_SCHEDULERS.values())["deviating"] == 0
    left = [name for name, counts in OF_PIPELINES.items() if counts[BOTH[1]].get("deviating")]
    assert not left  # as the page says


def test_the_page_has_the_sums():
    page = pathlib.Path("docs/where-jaxldm-differs.md").read_text(encoding="utf-8")
    plain, quirky = (results.total(counts[key] for counts in OF_SCHEDULERS.values()) for key in BOTH)
    for text in (
        f"{len(OF_SCHEDULERS)} schedulers of diffusers",
        f"Of all runs {plain['agree']} agree to",
        f"{plain['refused']} are refused",
        f"and {plain['deviating']} deviate",
        f"of the same runs {quirky['agree']} agree then ({quirky['rounding']} of them",
    ):
        assert text in page


@pytest.mark.parametrize("name", ["LCMScheduler", "UnCLIPScheduler", "IPNDMScheduler"])
def test_runs_of_a_scheduler_are_counted_so(name):
    for key, switch in zip(BOTH, (False, True), strict=True):
        for scheduler, counts in count([4], [name], quirks=switch)[0].items():
            assert results.total([counts]) == results.total([OF_SCHEDULERS[scheduler][key]])


def test_runs_of_a_pipeline_are_counted_so():
    kind = next(kind for kind in KINDS if kind.name == "Flux2KleinPipeline")
    for key, switch in zip(BOTH, (False, True), strict=True):
        counts = collections.Counter(verdict(kind, name, quirks=switch).kind for name in SCHEDULERS)
        assert results.total([counts]) == results.total([OF_PIPELINES[kind.name][key]])
