"""With `reference_quirks` nothing deviates: every scheduler's runs are those of diffusers, flaws included.

`python -m experiments.diffusers_schedulers.compare --quirks` tries all entries, at any numbers of steps.
"""

import diffusers
import numpy as np
import pytest

from experiments.diffusers_schedulers import scheduler_runs
from experiments.diffusers_schedulers.scheduler_probes import Probe
from experiments.diffusers_schedulers.scheduler_verdicts import AGREES, read, verdict
from jaxldm import schedulers
from jaxldm.errors import CheckpointError
from jaxldm.schedulers.read import read_betas
from jaxldm.schedulers.reference_path import alphas_cumprod_of

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
EPSILON = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
CONTINUOUS |= {"sigma_min": 0.002, "sigma_max": 120.0}
# One or more for each deviation of the page.
DEVIATING = [
    ("DDIMScheduler", {"set_alpha_to_one": False}),
    ("DDIMScheduler", {"timestep_spacing": "linspace", "thresholding": True, "sample_max_value": 1.2}),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
    ("PNDMScheduler", {"timestep_spacing": "linspace"}),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}),
    ("TCDScheduler", {}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
    ("DEISMultistepScheduler", {"use_exponential_sigmas": True}),
    ("DEISMultistepScheduler", FLOW),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "lower_order_final": False}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", FLOW | {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", ZERO_SNR),
    ("DPMSolverMultistepScheduler", EPSILON | {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", EPSILON | {"algorithm_type": "sde-dpmsolver"}),
    ("DPMSolverSinglestepScheduler", EPSILON | {"solver_order": 3, "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear", "timestep_spacing": "leading"}),
    ("EulerDiscreteScheduler", CONTINUOUS),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True, "shift": 3.0}),
    ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {"use_beta_sigmas": True}),
    ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", FLOW | {"shift_terminal": 0.1}),
    ("UniPCMultistepScheduler", FLOW | {"use_karras_sigmas": True}),
    ("KDPM2DiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("EDMDPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchLCMScheduler", {"shift": 3.0}),
    ("UniPCMultistepScheduler", FLOW | {"use_dynamic_shifting": True}),
    ("UniPCMultistepScheduler", {"sigma_min": 0.05, "sigma_max": 8.0, "use_karras_sigmas": True}),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction"}),
    ("ScoreSdeVpScheduler", {}),
    ("ScoreSdeVeScheduler", {"sampling_eps": 0.01, "correct_steps": 2}),
    ("CMStochasticIterativeScheduler", {"num_train_timesteps": 7}),
]


@pytest.mark.parametrize(("name", "config"), DEVIATING, ids=str)
def test_runs_are_those_of_diffusers(name, config):
    found = verdict(Probe(name, None, config), 7, quirks=True)
    assert found.kind == "agree", found.note or f"differs by {found.size:.1e}"


@pytest.mark.parametrize("strength", [0.9, 0.5])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("PNDMScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
        ("LMSDiscreteScheduler", {}),
        ("DPMSolverSinglestepScheduler", {}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
        ("DEISMultistepScheduler", {"solver_order": 3}),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}),
        ("HeunDiscreteScheduler", {}),
    ],
    ids=str,
)
def test_image_to_image_begins_where_diffusers_begins(name, config, strength):
    scheduler = read(Probe(name, None, config), quirks=True)
    expected = scheduler_runs.theirs(name, config, 11, scheduler, strength=strength)
    assert scheduler_runs.difference(expected, name, 11, scheduler, strength=strength) <= AGREES


def test_image_to_image_differs_without():
    """Else the switch would not be needed, and the test above would show nothing."""
    for name, config in (("PNDMScheduler", {"skip_prk_steps": True}), ("LMSDiscreteScheduler", {})):
        scheduler = read(Probe(name, None, config))
        expected = scheduler_runs.theirs(name, config, 11, scheduler, strength=0.5)
        assert scheduler_runs.difference(expected, name, 11, scheduler, strength=0.5) > AGREES


@pytest.mark.parametrize(
    "config",
    [{}, {"beta_schedule": "scaled_linear", "beta_end": 0.012}, {"beta_schedule": "squaredcos_cap_v2"}],
)
def test_betas_have_the_digits_of_float32(config):
    path = read_betas({"_class_name": "DDIMScheduler"} | config)
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    np.testing.assert_array_equal(alphas_cumprod_of(path, config), theirs)


def test_noise_begins_in_the_scale_of_diffusers():
    cases = {
        "DDIMScheduler": ({}, 1.0),
        "EulerDiscreteScheduler": ({"timestep_spacing": "leading"}, 1.0),
        "LMSDiscreteScheduler": ({}, None),
        "EDMEulerScheduler": ({}, (80.0**2 + 1) ** 0.5),
    }
    for name, (config, scale) in cases.items():
        made = schedulers.from_config({"_class_name": name} | config, reference_quirks=True)
        assert made.sampler.initial_scale == scale
        assert schedulers.from_config({"_class_name": name} | config).sampler.initial_scale is None


def test_the_first_step_of_ipndm(monkeypatch):
    """With a network whose answer at pure noise is not 0, as the exact one's is."""
    monkeypatch.setattr(scheduler_runs, "network", lambda prediction, learned, x, t: 0.7 * np.sin(x + t))
    probe, sizes = Probe("IPNDMScheduler", None, {}), []
    for quirks in (False, True):
        scheduler = read(probe, quirks=quirks)
        expected = scheduler_runs.theirs("IPNDMScheduler", {}, 5, scheduler)
        sizes.append(scheduler_runs.difference(expected, "IPNDMScheduler", 5, scheduler))
    assert sizes[0] > 0.01 and sizes[1] <= AGREES


def test_what_float32_does_not_hold_is_refused():
    config = {"_class_name": "DDIMScheduler", "beta_end": 0.3}
    assert diffusers.DDIMScheduler(beta_end=0.3).alphas_cumprod[-1] == 0
    with pytest.raises(CheckpointError, match="nothing in float32"):
        schedulers.from_config(config)
    v = schedulers.from_config(config | {"prediction_type": "v_prediction", "clip_sample": False})
    assert np.isfinite(scheduler_runs.ours(v, 4)[0]).all()


def test_what_is_not_a_number_in_diffusers_is_refused():
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True} | FLOW
    with pytest.raises(CheckpointError, match="NaN"):
        schedulers.from_config(config, reference_quirks=True)
