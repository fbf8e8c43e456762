"""Schedulers in whole pipelines next to diffusers: a few of `experiments.diffusers_schedulers.product`."""

import pytest

from experiments.diffusers_schedulers.pipeline_runs import KINDS
from experiments.diffusers_schedulers.product import verdict

OF = {kind.name: kind for kind in KINDS}


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "without"),
    [
        ("StableDiffusionPipeline", "TCDScheduler", "deviating"),
        ("StableDiffusionPipeline", "SASolverScheduler", "agree"),
        ("StableDiffusionImg2ImgPipeline", "PNDMScheduler", "deviating"),
        ("StableDiffusionImg2ImgPipeline", "EulerAncestralDiscreteScheduler", "agree"),
        ("DiTPipeline", "DPMSolverMultistepScheduler", "agree"),
        ("DiTPipeline", "TCDScheduler", "deviating"),
    ],
)
def test_nothing_differs_in_silence(pipeline, scheduler, without):
    found = [verdict(OF[pipeline], scheduler, quirks=quirks) for quirks in (False, True)]
    assert [one.kind for one in found] == [without, "agree"], found


def test_what_the_pipeline_of_dit_makes_noise_of():
    found = verdict(OF["DiTPipeline"], "EulerDiscreteScheduler", quirks=False)
    assert found.kind == "deviating" and found.size > 0.1
    refused = verdict(OF["DiTPipeline"], "EulerDiscreteScheduler", quirks=True)
    assert refused.kind == "refused" and "leave reference_quirks out" in refused.note


def test_what_diffusers_refuses_is_none_of_ours():
    assert verdict(OF["StableDiffusionPipeline"], "UnCLIPScheduler", quirks=False).kind == "reference"


def test_a_path_that_the_network_does_not_know_is_refused():
    for scheduler, words in (("DDIMScheduler", "use_flow_sigmas"), ("IPNDMScheduler", "solver='ipndm'")):
        found = verdict(OF["StableDiffusion3Pipeline"], scheduler, quirks=False)
        assert found.kind == "refused" and words in found.note
