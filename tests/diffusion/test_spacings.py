"""The choice of times: against the schedulers of diffusers, and against the papers where those differ."""

import diffusers
import numpy as np
import pytest
from diffusers.schedulers import AysSchedules
from rule_grids import rule_grid
from scipy import special

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # the clean and the noisy end included

VP, EDM, FLOW = D.VP(D.linear_betas()), D.EDM(), D.Flow()
SD = D.VP(D.scaled_linear_betas())
GVP = D.Interpolant("gvp")
STEPS = (2, 3, 5, 7, 10, 20, 50)
# Our names of spacings, where they are others than those of levels in `jaxldm.schedulers`.
SPACINGS = {"beta": "beta_sigmas"}
LEVELS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "uniform_log_snr": "use_lu_lambdas",
}


def ratio(grid):
    return grid.sigma / grid.alpha


@pytest.mark.parametrize("final", ["clean", "sigma_min"])
@pytest.mark.parametrize("sigmas", LEVELS)
def test_sigmas_of_dpm_solver(sigmas, final):
    """These respace the whole path; the reference then rounds the t that it tells the network."""
    reference = diffusers.DPMSolverMultistepScheduler(
        **{LEVELS[sigmas]: True}, final_sigmas_type="zero" if final == "clean" else "sigma_min"
    )
    reference.alphas_cumprod = np.cumprod(1 - D.linear_betas())  # in float64
    for steps in STEPS:
        reference.set_timesteps(steps)
        grid = D.make_grid(VP, steps, spacing=SPACINGS.get(sigmas, sigmas))
        np.testing.assert_array_equal(grid.t, rule_grid(VP, steps, levels=sigmas).t)
        np.testing.assert_allclose(ratio(grid)[:-1], reference.sigmas[:-1], rtol=2e-6)
        assert np.abs(grid.t[:-1] - reference.timesteps.numpy()).max() <= 1
        if final == "sigma_min":  # the reference takes N rows to sigma_min and stays there for the last step
            assert reference.sigmas[-1] == pytest.approx(float(reference.sigmas[-2]), rel=1e-5)
            grid = D.make_grid(VP, steps, spacing=SPACINGS.get(sigmas, sigmas), final=final)
            reference.set_timesteps(steps + 1)
            np.testing.assert_allclose(ratio(grid), reference.sigmas[:-1], rtol=2e-6)
        else:
            assert grid.sigma[-1] == 0


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_beta_sigmas_of_euler(spacing):
    reference = diffusers.EulerDiscreteScheduler(timestep_spacing=spacing, use_beta_sigmas=True)
    reference.alphas_cumprod = np.cumprod(1 - D.linear_betas())
    for steps in STEPS:
        reference.set_timesteps(steps)
        ours = "linspace_fractional" if spacing == "linspace" else spacing
        grid = rule_grid(VP, steps, spacing=ours, levels="beta")
        np.testing.assert_allclose(ratio(grid), reference.sigmas, rtol=2e-6)
        np.testing.assert_allclose(grid.t[:-1], reference.timesteps, atol=0.06)


def test_beta_spacing_places_the_times():
    """Lee et al. place the times at the quantiles; diffusers places sigma there, which is another grid."""
    for path in (VP, FLOW, EDM):
        span = (0, 999) if path is VP else (0, path.t_noisy)
        t = D.make_grid(path, 20, spacing="beta").t[:-1]
        shares = special.betainc(0.6, 0.6, (t - span[0]) / (span[1] - span[0]))
        np.testing.assert_allclose(shares, 1 - np.arange(20) / 20, atol=2e-3 if path is VP else 1e-5)
        assert t[0] == path.t_noisy
    wide = np.diff(D.make_grid(FLOW, 20, spacing="beta", shape=(1.0, 1.0)).t)
    np.testing.assert_allclose(wide, -1 / 20, rtol=1e-5)  # the uniform distribution
    levels = D.make_grid(VP, 20, spacing="beta_sigmas")
    shares = special.betainc(0.6, 0.6, (levels.t[:-1] - 0) / 999)
    assert np.abs(shares - (1 - np.arange(20) / 20)).max() > 0.2


@pytest.mark.parametrize("scheduler", [diffusers.LCMScheduler, diffusers.TCDScheduler])
@pytest.mark.parametrize("original", [50, 100])
def test_lcm_times(scheduler, original):
    reference = scheduler(original_inference_steps=original)
    for steps in (1, 2, 3, 4, 8, 30, 50):
        reference.set_timesteps(steps)
        grid = D.make_grid(SD, steps, spacing="lcm", original_steps=original)
        np.testing.assert_array_equal(grid.t[:-1], reference.timesteps.numpy())


@pytest.mark.parametrize("ours, theirs", [("ays_sd15", "StableDiffusion"), ("ays_sdxl", "StableDiffusionXL")])
def test_align_your_steps_tables(ours, theirs):
    grid = D.make_grid(SD, 10, spacing=ours)
    np.testing.assert_allclose(ratio(grid), AysSchedules[f"{theirs}Sigmas"], rtol=1e-4)
    # The published timesteps are whole numbers.
    assert np.abs(grid.t[:-1] - AysSchedules[f"{theirs}Timesteps"]).max() < 1.5


def test_align_your_steps_for_video_and_between_the_rows():
    path = D.EDM(sigma_max=700.0)
    grid = D.make_grid(path, 10, spacing="ays_svd")
    np.testing.assert_allclose(grid.sigma, AysSchedules["StableDiffusionVideoSigmas"], rtol=1e-6)
    twenty = D.make_grid(path, 20, spacing="ays_svd")
    np.testing.assert_allclose(twenty.sigma[::2], grid.sigma, rtol=1e-6)
    ends = np.append(grid.sigma[:-1], 0.002)  # log-linear: a row between two is their geometric mean
    np.testing.assert_allclose(twenty.sigma[1::2], np.sqrt(ends[:-1] * ends[1:]), rtol=1e-5)
    np.testing.assert_allclose(
        D.make_grid(path, 5, spacing="ays_svd", final="sigma_min").sigma, ends[::2], rtol=1e-5
    )


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("sigmas", [None, "karras", "exponential", "beta"])
def test_flow_match_euler(shift, sigmas):
    """The reference shifts its last t twice: once in the end of its path and once as a row."""
    reference = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=shift, **({LEVELS[sigmas]: True} if sigmas else {})
    )
    once = lambda t: shift * t / (1 + (shift - 1) * t)  # noqa: E731
    for steps in STEPS:
        reference.set_timesteps(steps)
        parity = rule_grid(
            FLOW, steps, spacing="linspace", levels=sigmas, shift=shift, shift_t_min_twice=True
        )
        np.testing.assert_allclose(parity.t, reference.sigmas, rtol=3e-6)
        np.testing.assert_allclose(parity.sigma, reference.sigmas, rtol=3e-6)
        assert reference.sigmas[-2] == pytest.approx(once(once(0.001)), rel=1e-5)
        grid = rule_grid(D.Flow(shift=shift), steps, spacing="linspace", levels=sigmas)
        assert grid.t[-2] == pytest.approx(once(0.001), rel=1e-5)
        if sigmas is None:
            np.testing.assert_allclose(grid.t[:-1], once(np.linspace(1, 0.001, steps)), rtol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_resolution_dependent_shift(kind, tokens):
    """FLUX's pipeline: N even values from 1 to 1 / N, and mu from the number of image tokens."""
    reference = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift=3.0
    )
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    for steps in STEPS:
        reference.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        grid = D.make_grid(FLOW, steps, shift=D.resolution_shift(tokens, kind=kind))
        np.testing.assert_allclose(grid.t, reference.sigmas, rtol=3e-6)


def test_shift_terminal():
    reference = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.1, use_karras_sigmas=True
    )
    plain = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    for steps in STEPS:
        values = np.linspace(1, 1 / steps, steps)
        for scheduler, sigmas in ((plain, None), (reference, "karras")):
            scheduler.set_timesteps(sigmas=values, mu=1.0)
            grid = rule_grid(FLOW, steps, spacing="trailing", levels=sigmas, shift=np.e, shift_terminal=0.1)
            np.testing.assert_allclose(grid.t, scheduler.sigmas, rtol=3e-6)
        assert grid.t[-2] == pytest.approx(0.1)


def test_a_path_brings_its_own_shift():
    path = D.Flow(shift=3.0)
    np.testing.assert_array_equal(D.make_grid(path, 9).t, D.make_grid(FLOW, 9, shift=3.0).t)
    np.testing.assert_array_equal(D.make_grid(path, 9, shift=1.0).t, D.make_grid(FLOW, 9).t)
    # Rows that are written down mean what they say, unless a shift is asked for.
    np.testing.assert_allclose(D.at_times(path, [1.0, 0.5]).t, [1, 0.5, 0])
    np.testing.assert_allclose(D.at_times(path, [1.0, 0.5], shift=3.0).t, [1, 0.75, 0])


@pytest.mark.parametrize("path", [FLOW, GVP, D.Interpolant("linear", gamma=(0.001, 0.1))])
@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
def test_levels_of_paths_that_end_in_pure_noise(path, sigmas):
    """sigma / alpha is infinite there: sigma / (alpha + sigma) is respaced, as if on the flow path."""
    grid = D.make_grid(path, 8, spacing=SPACINGS.get(sigmas, sigmas))
    assert (grid.alpha[0], grid.t[0]) == (0, 1)
    first, last = 1, path.sigma(path.t_min) / (path.alpha(path.t_min) + path.sigma(path.t_min))
    level = (grid.sigma / (grid.alpha + grid.sigma))[:-1].astype(np.float64)
    ramp = np.linspace(0, 1, 8)
    shares = {
        "karras": lambda: (level ** (1 / 7) - first) / (last ** (1 / 7) - first),
        "exponential": lambda: np.log(level) / np.log(last),
        "beta": lambda: 1 - special.betainc(0.6, 0.6, (level - last) / (first - last)),
    }[sigmas]()
    np.testing.assert_allclose(shares, ramp, atol=2e-5 if sigmas != "beta" else 2e-4)


def test_given_levels():
    np.testing.assert_allclose(D.at_sigmas(FLOW, [1.0, 0.75, 0.2]).t, [1, 0.75, 0.2, 0], rtol=1e-6)
    np.testing.assert_allclose(ratio(D.at_sigmas(SD, [14.0, 1.0])), [14, 1, 0], rtol=1e-5)
    zero_snr = D.VP(D.rescale_zero_terminal_snr(D.linear_betas()))
    np.testing.assert_allclose(D.at_sigmas(zero_snr, [np.inf, 3.0]).alpha[0], 0)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: rule_grid(VP, 10, levels="ays_sd15", spacing="trailing"), "cannot be combined"),
        (lambda: D.make_grid(FLOW, 10, spacing="ays_sd15", shift=3.0), "no option 'shift'; it has: path"),
        (lambda: D.make_grid(VP, 10, sigmas="karras"), "write spacing='karras'"),
        (lambda: D.make_grid(VP, 2, sigmas=[3.0, 1.0]), r"write D\.at_sigmas"),
        (lambda: D.make_grid(VP, 2, timesteps=[30, 10]), r"write D\.at_times"),
        (lambda: D.leading(FLOW, 5, offset=1), "offset=1 counts timesteps"),
        (lambda: D.make_grid(EDM, 10, spacing="ays_svd"), "700, but this edm path ends at 80"),
        (lambda: D.at_sigmas(FLOW, [1.5, 0.5]), "noisier than this flow path, which ends at 1"),
        (lambda: D.make_grid(FLOW, 5, spacing="lcm"), "use 'trailing'"),
        (lambda: D.make_grid(VP, 60, spacing="lcm"), "ask for 1 to 50 steps"),
        (lambda: D.make_grid(VP, 5, spacing="lcm", original_steps=2000), "1 to 1000, not 2000"),
        (lambda: D.make_grid(VP, 5, spacing="beta", shape=(0.0, 1.0)), "shape must be two positive"),
        (lambda: D.make_grid(VP, 900, spacing="beta"), "Fewer steps"),
        (lambda: D.make_grid(VP, 5, shift_terminal=0.1), r"D\.Flow\(\)"),
        (lambda: D.make_grid(FLOW, 5, shift_terminal=1.0), r"\(0, 1\)"),
        (lambda: D.make_grid(FLOW, 1, shift_terminal=0.1), "two steps or more"),
        (lambda: rule_grid(VP, 5, shift_t_min_twice=True, shift=2.0), r"D\.Flow\(\)"),
        (lambda: D.make_grid(FLOW, 5, shift=np.nan), "positive"),
    ],
)
def test_impossible_combinations_are_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()
