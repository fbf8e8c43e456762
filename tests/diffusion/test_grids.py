import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_grids import rule_grid

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError, UnknownNameError

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # the clean and the noisy end included

VP, EDM, FLOW = D.VP(D.linear_betas()), D.EDM(), D.Flow()
ZERO_SNR = D.VP(D.rescale_zero_terminal_snr(D.linear_betas()))
STEPS = (1, 2, 3, 5, 7, 10, 20, 50, 300, 1000)


@pytest.mark.parametrize(
    "spacing, offset", [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
)
def test_timesteps_of_ddim(spacing, offset):
    reference = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    for steps in STEPS[:-1] if offset else STEPS:
        reference.set_timesteps(steps)
        grid = rule_grid(VP, steps, spacing=spacing, steps_offset=offset)
        np.testing.assert_array_equal(grid.t[:-1], reference.timesteps.numpy())
        assert (grid.t[-1], grid.alpha[-1], grid.sigma[-1]) == (VP.t_clean, 1, 0)
        np.testing.assert_allclose(
            grid.alpha[:-1] ** 2, reference.alphas_cumprod[reference.timesteps], rtol=2e-4
        )


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_of_dpm_solver(spacing):
    reference = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing)
    for steps in STEPS[:-1]:
        reference.set_timesteps(steps)
        grid = rule_grid(VP, steps, spacing=spacing if spacing == "trailing" else f"{spacing}_open")
        np.testing.assert_array_equal(grid.t[:-1], reference.timesteps.numpy())


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sigmas", [None, "karras", "exponential"])
def test_sigmas_of_euler(spacing, sigmas):
    reference = diffusers.EulerDiscreteScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        timestep_spacing=spacing,
        use_karras_sigmas=sigmas == "karras",
        use_exponential_sigmas=sigmas == "exponential",
    )
    reference.alphas_cumprod = np.cumprod(
        1 - D.linear_betas()
    )  # in float32 its smallest sigma is off by 3e-4
    for steps in STEPS[1:-1]:
        reference.set_timesteps(steps)
        ours = "linspace_fractional" if spacing == "linspace" else spacing
        grid = rule_grid(VP, steps, spacing=ours, levels=sigmas)
        np.testing.assert_allclose(grid.sigma / grid.alpha, reference.sigmas, rtol=2e-6)
        np.testing.assert_allclose(grid.t[:-1], reference.timesteps, atol=0.06)


@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
def test_sigmas_of_edm(sigmas):
    reference = diffusers.EDMEulerScheduler(sigma_schedule=sigmas)
    for steps in STEPS[1:]:
        reference.set_timesteps(steps)
        grid = D.make_grid(EDM, steps, spacing=sigmas)
        np.testing.assert_allclose(grid.sigma, reference.sigmas, rtol=1e-5)
        np.testing.assert_array_equal(grid.t, grid.sigma)
        np.testing.assert_array_equal(grid.alpha, 1)


def test_karras_is_the_default_on_an_edm_path_alone():
    np.testing.assert_array_equal(D.make_grid(EDM, 18).t, D.make_grid(EDM, 18, spacing="karras").t)
    np.testing.assert_array_equal(D.make_grid(VP, 18).t, D.make_grid(VP, 18, spacing="trailing").t)
    np.testing.assert_allclose(np.diff(D.make_grid(EDM, 8, spacing="trailing").t), -10, rtol=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_flow_shift(shift):
    t = np.linspace(1, 0, 11)
    np.testing.assert_allclose(
        D.make_grid(FLOW, 10, shift=shift).t, shift * t / (1 + (shift - 1) * t), rtol=1e-6
    )
    # On the variance-preserving path the same shift multiplies sigma / alpha.
    plain, shifted = D.make_grid(ZERO_SNR, 10), D.make_grid(ZERO_SNR, 10, shift=shift)
    ratios = [grid.sigma[1:] / grid.alpha[1:] for grid in (plain, shifted)]
    np.testing.assert_allclose(ratios[1], shift * ratios[0], rtol=1e-5)
    assert shifted.alpha[0] == 0


@pytest.mark.parametrize("path", [VP, EDM, FLOW])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spacing": "linspace"},
        {"spacing": "trailing"},
        {"spacing": "leading"},
        {"spacing": "linspace_open"},
        {"levels": "karras"},
        {"levels": "beta"},
    ],
    ids=str,
)
def test_sigma_min_ending_wastes_no_step(path, options):
    grid = rule_grid(path, 12, final="sigma_min", **options)
    assert len(grid.t) == 13
    assert grid.t[-1] == np.float32(path.t_min) and grid.sigma[-1] == np.float32(path.sigma(path.t_min)) > 0
    assert (np.diff(grid.sigma / np.maximum(grid.alpha, 1e-30)) < 0).all()


def test_given_times_and_sigmas():
    grid = D.at_times(VP, [900, 500.5, 20])
    np.testing.assert_array_equal(grid.t, np.float32([900, 500.5, 20, -1]))
    again = D.at_sigmas(VP, VP.sigma(grid.t[:-1]) / VP.alpha(grid.t[:-1]))
    np.testing.assert_allclose(again.t, grid.t, rtol=1e-6)
    assert (
        D.at_sigmas(EDM, [10.0, 1.0], final="sigma_min").sigma.tolist() == np.float32([10, 1, 0.002]).tolist()
    )


def test_float32_unless_x64(x64):
    assert D.make_grid(VP, 5).alpha.dtype == np.float64


def test_columns_are_float32():
    assert {column.dtype for column in D.make_grid(VP, 5)[:3]} == {np.dtype(np.float32)}


@given(steps=st.integers(2, 40), data=st.data())
def test_cutting(steps, data):
    grid = D.make_grid(VP, steps)
    k = data.draw(st.integers(1, steps - 1))
    head, tail = D.cut(grid, 0, k), D.cut(grid, k)
    assert (head.start, tail.start, len(head.t), len(tail.t)) == (0, k, k + 1, steps - k + 1)
    for whole, a, b in zip(grid[:3], head[:3], tail[:3], strict=True):
        np.testing.assert_array_equal(np.concatenate([a, b[1:]]), whole)
    assert D.cut(tail, 0, 1).start == k
    backwards = D.reverse(D.reverse(grid))
    np.testing.assert_array_equal(backwards.alpha, grid.alpha)


def test_padding():
    grid = D.pad(D.make_grid(FLOW, 4), 9)
    assert grid.num_steps == 4 and grid.num_steps.dtype == np.int32 and len(grid.t) == 10
    np.testing.assert_array_equal(grid.t[:5], D.make_grid(FLOW, 4).t)
    assert (grid.t[4:] == 0).all() and D.steps_in(grid) == 4 and D.steps_in(D.make_grid(FLOW, 4)) == 4


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: D.make_grid(VP, 0), "at least 1"),
        (lambda: D.make_grid(VP, 2.5), "whole number"),
        (lambda: D.make_grid(VP, 1001), "1000 timesteps of this path"),
        (lambda: rule_grid(VP, 1000, spacing="linspace_open"), "fall strictly"),
        (lambda: D.make_grid(VP, 10, spacing="leading", offset=200), "needs more than 1000 timesteps"),
        (lambda: D.at_times(VP, [10, 20]), "fall strictly"),
        (lambda: D.at_times(VP, [20, 20]), "fall strictly"),
        (lambda: D.at_times(VP, [2000, 20]), "leaves the vp path"),
        (lambda: D.at_times(FLOW, [1.5, 0.5]), "leaves the flow path"),
        (lambda: D.at_times(VP, [np.nan, 20]), "not finite"),
        (lambda: D.at_sigmas(EDM, [np.inf, 1.0]), "noisier than this edm path, which ends at 80"),
        (lambda: D.at_sigmas(VP, [200.0, 1.0]), "noisier than this vp path, which ends at 157"),
        (lambda: D.make_grid(ZERO_SNR, 5, spacing="karras"), "trailing"),
        (lambda: D.make_grid(VP, 5, shift=3.0), r"D\.Flow\(\)"),
        (lambda: D.make_grid(FLOW, 5, shift=-1.0), "positive"),
        (lambda: D.pad(D.make_grid(VP, 20), 10), "max_steps=10"),
        (lambda: D.pad(D.pad(D.make_grid(VP, 5), 10), 20), "padded already"),
        (lambda: D.cut(D.make_grid(VP, 5), 3, 3), "rows 3 to 3"),
        (lambda: D.cut(D.make_grid(VP, 5), 0, 9), "rows 0 to 9"),
        (lambda: D.cut(D.pad(D.make_grid(VP, 5), 10), 1), "before padding"),
        (lambda: D.reverse(D.pad(D.make_grid(VP, 5), 10)), "before padding"),
    ],
)
def test_impossible_grids_are_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"spacing": "traling"}, "did you mean 'trailing'"),
        ({"levels": "karas"}, "did you mean 'karras'"),
        ({"final": "zero"}, "clean, sigma_min"),
    ],
)
def test_unknown_names(options, words):
    with pytest.raises(UnknownNameError, match=words):
        rule_grid(VP, 5, **options)
