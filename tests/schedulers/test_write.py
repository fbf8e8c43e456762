"""Path, prediction and grid into scheduler_config.json and back, and what diffusers makes of the file."""

import dataclasses
import importlib.metadata
import json

import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm import schedulers
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError
from jaxldm.schedulers import DynamicShift, GridRule
from jaxldm.schedulers.continuous_paths import consistency, score
from jaxldm.schedulers.read import interval_of_noise
from jaxldm.schedulers.table import OF_EPSILON

SD = D.epsilon(D.VP.named("scaled_linear", beta_start=0.00085, beta_end=0.012))
PURE_NOISE = ["flow", "v_prediction", "sample"]


@dataclasses.dataclass(frozen=True)
class Quadratic(D.Path):
    """A path of one's own."""

    t_min: float = 1e-3

    def coefficients(self, xp, t):
        return 1 - t**2, t

    def time_of(self, xp, ratio):
        ratio = xp.minimum(ratio, 1e12)
        return 2 * ratio / (1 + xp.sqrt(1 + 4 * ratio**2))


def predictions(paths, names):
    return st.builds(D.prediction, st.sampled_from(names), paths)


vp = st.builds(
    D.VP.named,
    st.sampled_from(sorted(D.BETAS)),
    st.integers(2, 2000),
    zero_terminal_snr=st.booleans(),
)
continuous_vp = st.builds(
    D.ContinuousVP,
    beta_min=st.floats(0.01, 1),
    beta_max=st.floats(2, 30),
    t_min=st.sampled_from([1e-5, 1e-3]),
)
interpolant = st.builds(
    D.Interpolant, st.sampled_from(D.INTERPOLANTS), gamma=st.sampled_from([None, (0.001, 0.1), (0.0, 0.2)])
)
edm = st.builds(D.EDM, sigma_max=st.floats(1, 100))
flow = st.builds(D.Flow, shift=st.floats(0.5, 6), t_min=st.sampled_from([1e-3, 1e-2, 0.0007]))
every_prediction = st.one_of(
    predictions(vp, ["sample", "v_prediction", "flow"]),
    st.builds(D.edm, edm, st.floats(0.1, 2)),
    predictions(edm, ["epsilon", "sample", "velocity"]),
    predictions(flow, [*PURE_NOISE, "velocity"]),
    predictions(continuous_vp, ["epsilon", "v_prediction", "velocity"]),
    predictions(interpolant, [*PURE_NOISE, "velocity"]),
    predictions(st.builds(D.Cosine, scaler=st.floats(0.5, 2)), ["epsilon", "v_prediction"]),
    predictions(st.builds(Quadratic, st.floats(1e-4, 1e-2)), [*PURE_NOISE, "velocity"]),
)


def through_json(*arguments, **options):
    return json.loads(json.dumps(schedulers.to_config(*arguments, **options)))


@given(every_prediction)
def test_round_trip_through_json_keeps_path_and_prediction(prediction):
    config = through_json(prediction)
    again = schedulers.from_config(config)
    assert again.prediction == prediction
    assert schedulers.to_config(again.prediction, again.grid) == config


@given(shift=st.sampled_from([None, DynamicShift(), DynamicShift(0.3, 0.9, 128, 9000, "linear")]), path=flow)
def test_dynamic_shift_is_read_again(shift, path):
    again = schedulers.from_config(through_json(D.flow(path), dynamic_shift=shift))
    assert again.dynamic_shift == shift and again.path == path
    if shift is not None:
        assert again.path_for(1024).shift == D.resolution_shift(1024, **shift._asdict())


def test_betas_as_numbers():
    betas = D.linear_betas(20, 0.01, 0.2)
    for path in (D.VP(betas), D.VP(D.rescale_zero_terminal_snr(betas))):
        assert schedulers.from_config(through_json(D.v(path))).path == path
    raw = {"_class_name": "DDIMScheduler", "trained_betas": betas.tolist(), "rescale_betas_zero_snr": True}
    read = schedulers.from_config(raw | {"prediction_type": "v_prediction"})
    assert read.path == D.VP(D.rescale_zero_terminal_snr(betas))


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine", "sigmoid_alphas", "laplace", None])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_diffusers_reads_the_same_alphas(betas, zero_terminal_snr):
    path = D.VP.named(betas or "scaled_linear", zero_terminal_snr=zero_terminal_snr)
    path = path if betas else D.VP(path.betas)  # numbers without a name
    scheduler = diffusers.DDIMScheduler.from_config(schedulers.to_config(D.v(path)))
    alpha = path.alpha(np.arange(1000))
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), alpha**2, rtol=2e-4, atol=1e-7)
    assert scheduler.config.prediction_type == "v_prediction"


def test_diffusers_steps_where_our_trailing_grid_steps():
    prediction = D.epsilon(D.VP.named("linear"))
    scheduler = diffusers.DDIMScheduler.from_config(schedulers.to_config(prediction))
    scheduler.set_timesteps(50)
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), D.make_grid(prediction.path, 50).t[:-1])


@pytest.mark.parametrize(
    ("prediction", "cls", "entry"),
    [
        (D.edm(D.EDM(sigma_max=40.0)), diffusers.EDMEulerScheduler, ("sigma_max", 40.0)),
        (D.flow(D.Flow()), diffusers.FlowMatchEulerDiscreteScheduler, ("shift", 1.0)),
        (D.v(D.Cosine(offset=0.02)), diffusers.DDPMWuerstchenScheduler, ("s", 0.02)),
    ],
)
def test_diffusers_opens_the_other_paths(prediction, cls, entry):
    scheduler = cls.from_config(schedulers.to_config(prediction))
    assert scheduler.config[entry[0]] == entry[1]


def test_reads_what_diffusers_writes():
    theirs = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.001,
        beta_end=0.013,
        prediction_type="v_prediction",
        num_train_timesteps=500,
    )
    ours = schedulers.from_config(dict(theirs.config, _class_name="DDPMScheduler"))
    assert ours.prediction == D.v(D.VP(D.scaled_linear_betas(500, 0.001, 0.013)))
    assert ours.path.schedule == D.BetaSchedule("scaled_linear", 500, 0.001, 0.013)


@pytest.mark.parametrize(
    "options",
    [
        {"spacing": "trailing"},
        {"spacing": "leading", "steps_offset": 1},
        {"spacing": "linspace"},
        {"spacing": "trailing", "final": "sigma_min"},
        {"spacing": "linspace_fractional"},
        {"spacing": "linspace_open"},
        {"spacing": "leading_open", "steps_offset": 1, "final": "sigma_min"},
        {"levels": "karras"},
        {"levels": "uniform_log_snr"},
        {"spacing": "trailing", "levels": "beta"},
        {"spacing": "linspace_fractional", "levels": "exponential"},
        {"spacing": "lcm", "original_steps": 100},
    ],
    ids=str,
)
def test_written_grids_are_read_again(options):
    rule = GridRule(**options)
    config = through_json(SD, rule)
    assert schedulers.from_config(config).grid == rule and rule.options() == options
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(7)
    if hasattr(scheduler, "sigmas"):
        theirs = scheduler.sigmas.double().numpy()[:-1]
    else:
        abar = scheduler.alphas_cumprod.double().numpy()[scheduler.timesteps.numpy()]
        theirs = np.sqrt((1 - abar) / abar)
    grid = rule.make(SD.path, 7)
    np.testing.assert_allclose((grid.sigma / grid.alpha)[:7], theirs, rtol=5e-4)


@pytest.mark.parametrize(
    ("prediction", "rule"),
    [
        (D.edm(D.EDM()), GridRule(levels="exponential")),
        (D.edm(D.EDM()), GridRule(levels="karras", rho=5.0)),
        (D.edm(D.EDM()), GridRule(levels="karras", final="sigma_min")),
        (
            consistency(D.EDM(sigma_max=40.0), 0.6),
            GridRule(spacing="consistency", original_steps=18, rho=5.0, final="sigma_min"),
        ),
        (D.v(D.Interpolant("gvp")), GridRule(spacing="sine_squared")),
        (D.flow(D.Flow()), GridRule(spacing="linspace", levels="beta", shift_terminal=0.02)),
        (D.flow(D.Flow(shift=3.0)), GridRule(spacing="linspace", shift_t_min_twice=True)),
        (D.epsilon(D.ContinuousVP()), GridRule(spacing="linspace")),
        (D.v(D.Cosine(offset=0.02, scaler=2.0)), GridRule(spacing="stage_c", final="sigma_min")),
        (D.velocity(D.Interpolant("gvp")), GridRule(spacing="linspace", final="sigma_min")),
    ],
)
def test_grids_of_the_continuous_paths_are_read_again(prediction, rule):
    assert schedulers.from_config(through_json(prediction, rule)).grid == rule


def test_a_spacing_of_ours_is_read_without_a_look_at_what_is_installed(monkeypatch):
    """Every call of a pipeline reads its scheduler, and to look took most of the time before its steps."""
    config = through_json(D.v(D.Cosine(offset=0.02, scaler=2.0)), GridRule(spacing="stage_c"))

    def look(group):
        raise AssertionError(group)

    monkeypatch.setattr(importlib.metadata, "entry_points", look)
    assert schedulers.from_config(config).grid.spacing == "stage_c"
    with pytest.raises(CheckpointError, match=r"jaxldm\.spacings"):
        schedulers.from_config(json.loads(json.dumps(config).replace("stage_c", "stage_d")))


@pytest.mark.parametrize("solver", OF_EPSILON)
def test_what_integrates_eps_is_not_written_to_end_clean(solver):
    with pytest.raises(InvalidArgumentError, match="final='sigma_min'"):
        schedulers.to_config(SD, solver=solver)


@pytest.mark.parametrize("solver", sorted(schedulers.SCHEDULER_OF))
def test_the_scheduler_of_a_solver_is_named(solver):
    rules = {
        "lcm": GridRule(spacing="lcm"),
        "tcd": GridRule(spacing="lcm"),
        **dict.fromkeys(("deis", "sa_solver", *OF_EPSILON), GridRule(final="sigma_min")),
    }
    config = through_json(SD, rules.get(solver), solver=solver)
    options = {"skip_prk_steps": False} if solver == "pndm" else {}  # the file is silent about it
    if solver == "sa_solver":
        options["interval"] = interval_of_noise(config, SD.path)
    assert schedulers.from_config(config).solver == D.solvers.make(solver, **options)
    assert hasattr(diffusers, config["_class_name"])


@pytest.mark.parametrize(
    "prediction, options",
    [
        (SD, {"spacing": "beta"}),
        (SD, {"levels": "ays_sd15"}),
        (SD, {"levels": "karras", "spacing": "linspace_open"}),
        (SD, {"shift_terminal": 0.1}),
        (D.edm(D.EDM()), {"spacing": "trailing"}),
        (D.flow(D.Flow()), {"spacing": "linspace", "levels": "uniform_log_snr"}),
        (D.epsilon(D.ContinuousVP()), {"levels": "karras"}),
    ],
)
def test_grids_that_diffusers_does_not_have_are_refused(prediction, options):
    with pytest.raises(InvalidArgumentError, match=r"pass them to make_grid"):
        schedulers.to_config(prediction, GridRule(**options))


def test_what_a_solver_or_path_does_not_have_is_refused():
    with pytest.raises(InvalidArgumentError, match="spaces the rows"):
        schedulers.to_config(SD, GridRule(spacing="linspace_open"), solver="ddim")
    with pytest.raises(UnknownNameError, match="solver with a scheduler in diffusers"):
        schedulers.to_config(SD, solver="flow_euler")
    with pytest.raises(InvalidArgumentError, match="keep the scheduler_config"):
        schedulers.to_config(score(D.EDM()))
    with pytest.raises(InvalidArgumentError, match="needs a flow path"):
        schedulers.to_config(SD, dynamic_shift=DynamicShift())


def test_the_published_file_of_wuerstchen():
    published = {"_class_name": "DDPMWuerstchenScheduler", "s": 0.008, "scaler": 1.0}
    ours = schedulers.from_config(published | {"_diffusers_version": "0.21.0.dev0"})
    assert ours.prediction == D.epsilon(D.Cosine()) and ours.grid == GridRule(final="sigma_min")
    assert schedulers.to_config(ours.prediction, ours.grid) == published
    opened = diffusers.DDPMWuerstchenScheduler.from_config(
        schedulers.to_config(D.v(D.Cosine(offset=0.02, scaler=2.0)), GridRule(spacing="stage_c"))
    )
    assert float(opened.s) == pytest.approx(0.02) and opened.scaler == 2.0


def test_files_of_0_1_are_read():
    """What version 0.1 wrote for paths that diffusers does not have, and in its recipes."""
    entries = {"path": "interpolant", "prediction": "velocity", "interpolant": "gvp", "gamma": [0.0, 0.2]}
    expected = D.velocity(D.Interpolant("gvp", gamma=(0.0, 0.2)))
    assert schedulers.from_config({"_class_name": "NoiseSchedule"} | entries).prediction == expected
    for entries, expected in (
        ({}, D.epsilon(D.VP.named("linear"))),
        ({"betas": "cosine", "prediction": "v_prediction"}, D.v(D.VP.named("cosine"))),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}, D.epsilon(D.VP([0.1, 0.2]))),
        ({"path": "edm", "sigma_data": 0.7, "prediction": "epsilon"}, D.edm(D.EDM(), 0.7)),
        ({"path": "flow", "prediction": "flow", "shift": 3.0}, D.flow(D.Flow(shift=3.0))),
        ({"path": "cosine", "offset": 0.02}, D.epsilon(D.Cosine(offset=0.02))),
        ({"path": "continuous_vp", "beta_max": 9.0}, D.epsilon(D.ContinuousVP(beta_max=9.0))),
    ):
        assert D.prediction_of_0_1(entries) == expected
