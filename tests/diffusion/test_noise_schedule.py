"""The noise schedule as plain data: its round trip, and what diffusers makes of it."""

import dataclasses
import json

import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.diffusion import NoiseSchedule
from jaxldm.diffusion.noise_schedule import BETAS
from jaxldm.errors import CheckpointError, JaxldmError

vp = st.builds(
    NoiseSchedule,
    path=st.just("vp"),
    betas=st.sampled_from(sorted(BETAS)),
    prediction=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    num_train_timesteps=st.integers(2, 2000),
    zero_terminal_snr=st.booleans(),
).filter(lambda schedule: not (schedule.zero_terminal_snr and schedule.prediction == "epsilon"))
edm = st.builds(NoiseSchedule, path=st.just("edm"), sigma_data=st.floats(0.1, 2), sigma_max=st.floats(1, 100))
pure_noise_predictions = st.sampled_from(["flow", "v_prediction", "sample"])
flow = st.builds(
    NoiseSchedule,
    path=st.just("flow"),
    prediction=pure_noise_predictions,
    t_min=st.sampled_from([1e-3, 1e-2, 0.0007]),
    time_distribution=st.sampled_from(D.TIME_DISTRIBUTIONS),
    shift=st.floats(0.5, 6),
    dynamic_shift=st.sampled_from([None, (0.5, 1.15, 256, 4096)]),
    dynamic_shift_kind=st.sampled_from(["exponential", "linear"]),
).map(
    lambda schedule: (
        schedule
        if schedule.dynamic_shift
        else dataclasses.replace(schedule, dynamic_shift_kind="exponential")
    )
)
continuous_vp = st.builds(
    NoiseSchedule,
    path=st.just("continuous_vp"),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    beta_min=st.floats(0.01, 1),
    beta_max=st.floats(2, 30),
    t_min=st.sampled_from([1e-5, 1e-3]),
)
interpolant = st.builds(
    NoiseSchedule,
    path=st.just("interpolant"),
    prediction=pure_noise_predictions,
    interpolant=st.sampled_from(D.INTERPOLANTS),
    gamma=st.sampled_from([None, (0.001, 0.1), (0.0, 0.2)]),
)


@given(st.one_of(vp, edm, flow, continuous_vp, interpolant))
def test_round_trip_through_json_keeps_the_path(schedule):
    again = NoiseSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    t = np.linspace(schedule.make_path().t_min, schedule.make_path().t_noisy, 7)
    np.testing.assert_array_equal(again.make_path().alpha(t), schedule.make_path().alpha(t))
    np.testing.assert_array_equal(again.make_path().sigma(t), schedule.make_path().sigma(t))
    assert (again.path, again.prediction) == (schedule.path, schedule.prediction)
    assert again.to_dict() == schedule.to_dict()
    if schedule.path not in ("vp", "edm"):
        assert again == schedule
    if schedule.dynamic_shift:
        assert again.make_path(1024).default_shift == schedule.make_path(1024).default_shift


def test_betas_as_numbers():
    betas = D.linear_betas(20, 0.01, 0.2)
    schedule = NoiseSchedule(prediction="v_prediction", trained_betas=betas.tolist(), zero_terminal_snr=True)
    again = NoiseSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    expected = D.vp_path(D.rescale_zero_terminal_snr(betas)).alpha(np.arange(20))
    np.testing.assert_array_equal(schedule.make_path().alpha(np.arange(20)), expected)
    np.testing.assert_array_equal(again.make_path().alpha(np.arange(20)), expected)


def test_shift_by_resolution():
    schedule = NoiseSchedule("flow", "flow", dynamic_shift=[0.5, 1.15, 256, 4096])  # a list, as JSON has it
    assert schedule.make_path(4096).default_shift == pytest.approx(np.exp(1.15))
    assert schedule.make_path().default_shift == 1
    assert NoiseSchedule("flow", "flow", shift=3.0).make_path(4096).default_shift == 3


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine", "sigmoid_alphas", "laplace"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_diffusers_reads_the_same_alphas(betas, zero_terminal_snr):
    schedule = NoiseSchedule(betas=betas, zero_terminal_snr=zero_terminal_snr, prediction="v_prediction")
    scheduler = diffusers.DDIMScheduler.from_config(schedule.to_dict())
    alpha = schedule.make_path().alpha(np.arange(1000))
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), alpha**2, rtol=2e-4, atol=1e-7)
    assert scheduler.config.prediction_type == "v_prediction"


def test_diffusers_steps_where_our_trailing_grid_steps():
    schedule = NoiseSchedule()
    scheduler = diffusers.DDIMScheduler.from_config(schedule.to_dict())
    scheduler.set_timesteps(50)
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), D.make_grid(schedule.make_path(), 50).t[:-1])


@pytest.mark.parametrize(
    ("path", "cls"),
    [("edm", diffusers.EDMEulerScheduler), ("flow", diffusers.FlowMatchEulerDiscreteScheduler)],
)
def test_diffusers_opens_the_other_paths(path, cls):
    scheduler = cls.from_config(NoiseSchedule(path=path, prediction="flow", sigma_max=40.0).to_dict())
    assert scheduler.config["sigma_max" if path == "edm" else "shift"] == (40.0 if path == "edm" else 1.0)


def test_reads_what_diffusers_writes():
    theirs = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.001,
        beta_end=0.013,
        prediction_type="v_prediction",
        num_train_timesteps=500,
    )
    ours = NoiseSchedule.from_dict(dict(theirs.config, _class_name="DDPMScheduler"))
    assert ours == NoiseSchedule("vp", "v_prediction", "scaled_linear", 500, 0.001, 0.013)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"_class_name": "UniPCScheduler"}, "UniPCScheduler"),
        ({"beta_schedule": "sigmoidal"}, "did you mean 'sigmoid'"),
        ({"trained_betas": [0.1, 2.0]}, "every beta"),
        ({"timestep_spacing": "even"}, "linspace"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"interpolation_type": "log_linear"}, "interpolation_type"),
        (
            {"_class_name": "EulerDiscreteScheduler", "sigma_max": 700.0, "use_karras_sigmas": True},
            "sigma_max",
        ),
        ({"prediction_type": "noise"}, "v_prediction"),
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
        ({"num_train_timesteps": "many"}, "scheduler_config"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "epsilon"),
    ],
)
def test_refuses_what_it_cannot_honour(change, word):
    with pytest.raises(CheckpointError, match=word):
        NoiseSchedule.from_dict({**NoiseSchedule().to_dict(), **change})


def test_an_unknown_path_names_the_choices():
    with pytest.raises(JaxldmError, match="vp, edm, flow"):
        NoiseSchedule(path="vpp").make_path()
