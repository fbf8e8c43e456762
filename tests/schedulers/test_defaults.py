"""Where scheduler_config.json is silent, the scheduler does what the class of that name does in diffusers."""

import inspect

import pytest

from experiments.diffusers_schedulers.scheduler_probes import reference_class
from jaxldm import schedulers
from jaxldm.errors import CheckpointError
from jaxldm.schedulers.entries import TYPES
from jaxldm.schedulers.table import ALIASES, SCHEDULERS


def defaults_of(name):
    parameters = inspect.signature(reference_class(name).__init__).parameters
    values = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_silent_file_means_what_it_means_in_diffusers(name):
    theirs = defaults_of(name)
    assert theirs.keys() <= TYPES.keys()
    silent = schedulers.from_config({"_class_name": name})
    assert silent == schedulers.from_config({"_class_name": name, **theirs})
    for key, value in theirs.items():  # each alone, where the others are silent
        assert schedulers.from_config({"_class_name": name, key: value}) == silent, key


@pytest.mark.parametrize("alias", ALIASES)
def test_another_name_means_the_same(alias):
    theirs, config = defaults_of(alias), {"clip_sample_range": 0.5, "steps_offset": 1}
    assert theirs == defaults_of(ALIASES[alias])
    named = [schedulers.from_config({"_class_name": name} | config) for name in (alias, ALIASES[alias])]
    assert named[0] == named[1]
    assert schedulers.default_solver({"_class_name": alias}) == ALIASES[alias][:4].lower()


def test_x_0_is_clipped_by_default_only_by_the_scheduler_that_the_file_names():
    ddim, ddpm = ({"_class_name": f"{name}Scheduler"} for name in ("DDIM", "DDPM"))
    assert schedulers.from_config(ddim).sampler.threshold == (-1.0, 1.0)
    assert schedulers.from_config(ddim | {"clip_sample": False}).sampler.threshold is None
    assert schedulers.from_config(ddpm, "ddim").sampler.threshold is None
    assert schedulers.from_config({"_class_name": "PNDMScheduler"}, "ddim").sampler.threshold is None


WRONG = [
    (
        {"num_train_timesteps": 10**10},
        "num_train_timesteps must be a whole number from 1 to 100000",
    ),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps must be a whole number"),
    ({"num_train_timesteps": 0}, "num_train_timesteps must be"),
    ({"beta_start": "small"}, "beta_start must be a number from 0 to 1, not 'small'"),
    ({"beta_end": 2}, "beta_end must be a number from 0 to 1"),
    ({"beta_schedule": ["linear"]}, "beta_schedule must be a string"),
    ({"trained_betas": [0.1, None]}, r"trained_betas\[1\] must be a number"),
    ({"clip_sample": "no"}, "clip_sample must be true or false or null"),
    ({"beta_strat": 0.1}, "unknown key 'beta_strat'; did you mean 'beta_start'"),
    ({"_class_name": ["DDIMScheduler"]}, "_class_name must be a string"),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": [2]}, "solver_order must be a whole"),
    ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": {"a": 1}}, "must be a list"),
    ({"_class_name": "PathScheduler", "path": []}, "path must be an object"),
    ({"_class_name": "PathScheduler", "prediction": "v"}, "KeyError: 'path'"),
    (
        {"_class_name": "PathScheduler", "prediction": "v", "path": {"num_train_timesteps": 10**10}},
        "num_train_timesteps must be a whole number from 2 to",
    ),
    (
        {"_class_name": "PathScheduler", "prediction": "v", "path": {"type": "flow", "shift": "3"}},
        "flow path: shift must be a number",
    ),
    (
        {"_class_name": "PathScheduler", "prediction": "v", "path": {"type": "vp", "betas": [0.1, "x"]}},
        r"betas\[1\] must be a number",
    ),
    (
        {"_class_name": "PathScheduler", "prediction": "v_prediction", "path": {}, "grid": {"rho": "7"}},
        "grid: rho must be a number",
    ),
    (
        {
            "_class_name": "PathScheduler",
            "prediction": "v_prediction",
            "path": {},
            "grid": {"spacing": "this:s"},
        },
        "unknown spacing 'this:s'",
    ),
    ({"_class_name": "ScoreSdeVpScheduler", "_spacing": "antigravity:fly"}, "unknown spacing"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_types_and_ranges_are_refused_with_their_name(changes, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        schedulers.from_config({"_class_name": "DDIMScheduler"} | changes)
    assert "scheduler_config.json" in str(caught.value) and len(str(caught.value)) < 400


def test_entries_of_newer_versions_are_left_alone():
    config = {"_class_name": "DDIMScheduler", "_diffusers_version": "9.0", "a_new_option": {"x": [1]}}
    assert schedulers.from_config(config) == schedulers.from_config({"_class_name": "DDIMScheduler"})
