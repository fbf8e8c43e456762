"""The noise schedule as plain data: its round trip, and what diffusers makes of it."""

import json

import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.diffusion import NoiseSchedule
from jaxldm.errors import CheckpointError, JaxldmError

vp = st.builds(
    NoiseSchedule,
    path=st.just("vp"),
    betas=st.sampled_from(["linear", "scaled_linear", "cosine"]),
    prediction=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    num_train_timesteps=st.integers(2, 2000),
    zero_terminal_snr=st.booleans(),
).filter(lambda schedule: not (schedule.zero_terminal_snr and schedule.prediction == "epsilon"))
edm = st.builds(NoiseSchedule, path=st.just("edm"), sigma_data=st.floats(0.1, 2), sigma_max=st.floats(1, 100))
flow = st.builds(NoiseSchedule, path=st.just("flow"), prediction=st.sampled_from(["flow", "v_prediction"]))


@given(st.one_of(vp, edm, flow))
def test_round_trip_through_json_keeps_the_path(schedule):
    again = NoiseSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    t = np.linspace(schedule.make_path().t_min, schedule.make_path().t_noisy, 7)
    np.testing.assert_array_equal(again.make_path().alpha(t), schedule.make_path().alpha(t))
    np.testing.assert_array_equal(again.make_path().sigma(t), schedule.make_path().sigma(t))
    assert (again.path, again.prediction) == (schedule.path, schedule.prediction)
    assert again.to_dict() == schedule.to_dict()


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
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
        ({"beta_schedule": "sigmoid"}, "squaredcos_cap_v2"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
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
