"""Where to cut a grid: the pipelines' own counting, and parts that join exactly."""

import math
import re
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import (
    StableDiffusion3Img2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from hypothesis import given
from hypothesis import strategies as st
from rule_grids import rule_grid

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError
from jaxldm.exact import as_typed

VP, FLOW = D.VP(D.scaled_linear_betas()), D.Flow()


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.58, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("steps", [20, 33, 50])
def test_strength_keeps_what_the_pipelines_keep(strength, steps):
    reference = diffusers.DDIMScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    reference.set_timesteps(steps)
    pipeline = SimpleNamespace(scheduler=reference)
    # They count in binary floats, int(50 * 0.58) = 28: a strength next to it gives them the right count.
    near = (
        strength
        if steps * strength >= math.floor(steps * as_typed(strength))
        else math.nextafter(strength, 1)
    )
    theirs, _ = StableDiffusionXLImg2ImgPipeline.get_timesteps(pipeline, steps, near, "cpu")
    ours = D.cut_by_strength(D.make_grid(VP, steps), strength)
    np.testing.assert_array_equal(ours.t[:-1], theirs.numpy())
    assert ours.start == steps - len(theirs)

    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    near = (
        strength if steps * strength <= math.ceil(steps * as_typed(strength)) else math.nextafter(strength, 0)
    )
    theirs, _ = StableDiffusion3Img2ImgPipeline.get_timesteps(
        SimpleNamespace(scheduler=flow), steps, near, "cpu"
    )
    ours = D.cut_by_strength(D.make_grid(FLOW, steps), strength, round_up=True)
    np.testing.assert_allclose(ours.t[:-1], theirs / 1000, rtol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8, 0.95])
def test_the_refiner_starts_where_the_pipeline_starts_it(fraction, spacing):
    for steps in (10, 33, 50):
        reference = diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", timestep_spacing=spacing, steps_offset=1
        )
        reference.set_timesteps(steps)
        theirs, _ = StableDiffusionXLImg2ImgPipeline.get_timesteps(
            SimpleNamespace(scheduler=reference), steps, 0.3, "cpu", denoising_start=fraction
        )
        grid = rule_grid(VP, steps, spacing=spacing, steps_offset=1)
        if len(theirs) in (0, steps):
            with pytest.raises(InvalidArgumentError, match="no step"):
                D.split_at_fraction(grid, VP, fraction)
            continue
        base, refiner = D.split_at_fraction(grid, VP, fraction)
        np.testing.assert_array_equal(refiner.t[:-1], theirs.numpy())
        np.testing.assert_array_equal(base.t[:-1], reference.timesteps.numpy()[: steps - len(theirs)])


@given(steps=st.integers(2, 60), fraction=st.floats(0.02, 0.98), snr=st.floats(1e-3, 1e3))
def test_the_parts_are_the_whole(steps, fraction, snr):
    grid = D.make_grid(FLOW, steps)
    for split in (lambda: D.split_at_fraction(grid, FLOW, fraction), lambda: D.split_at_snr(grid, snr)):
        try:
            first, second = split()
        except InvalidArgumentError:  # no row lies on one of the two sides
            continue
        assert second.start == len(first.t) - 1
        for whole, a, b in zip(grid[:3], first[:3], second[:3], strict=True):
            np.testing.assert_array_equal(np.concatenate([a, b[1:]]), whole)


@given(snr=st.floats(1e-3, 1e3))
def test_the_noisy_part_ends_where_the_snr_is_reached(snr):
    grid = D.make_grid(VP, 50)
    try:
        noisy, clean = D.split_at_snr(grid, snr)
    except InvalidArgumentError:
        return
    with np.errstate(divide="ignore"):
        snrs = [(part.alpha.astype(np.float64) / part.sigma) ** 2 for part in (noisy, clean)]
    assert (snrs[0][:-1] < snr).all() and snrs[0][-1] >= snr and (snrs[1] >= snr).all()


def test_split_at_fraction_counts_time_on_continuous_paths():
    base, refiner = D.split_at_fraction(D.make_grid(FLOW, 10), FLOW, 0.75)
    assert (len(base.t) - 1, refiner.t[0]) == (8, np.float32(0.2))  # steps that start at t >= 0.25
    base, refiner = D.split_at_fraction(D.make_grid(FLOW, 8), FLOW, 0.75)
    assert base.t[-1] == refiner.t[0] == np.float32(0.125)


def test_walking_both_parts_is_walking_the_whole():
    """With noise in every step, and two parts of one padded shape, so that one compilation serves all."""
    grid, key = D.make_grid(VP, 10), jax.random.key(3)
    x_T = D.initial_noise(key, (2, 3), grid)
    denoise, solver = D.gaussian_denoiser(VP, 0.3, 0.5), D.solvers.ddim(eta=1.0)
    run = jax.jit(lambda grid, x: D.sample(key, denoise, solver, grid, x))
    whole = run(D.pad(grid, 10), x_T)
    for first, second in (D.split_at_fraction(grid, VP, 0.7), D.split_at_snr(grid, 0.5)):
        halfway = run(D.pad(first, 10), x_T)
        assert jnp.abs(halfway - whole).max() > 1e-2
        np.testing.assert_array_equal(run(D.pad(second, 10), halfway), whole)


def test_the_least_strength_of_the_message_is_taken():
    """Also where 1 / N is no short decimal: 0.333 leaves none of 3 steps."""
    for steps in (*range(2, 130), 333, 997, 1000):
        grid = D.make_grid(FLOW, steps)
        with pytest.raises(InvalidArgumentError) as error:
            D.cut_by_strength(grid, 0.99 / steps)
        least = re.search(r"strength of (\S+) or more$", str(error.value))[1]
        assert len(D.cut_by_strength(grid, float(least)).t) == 2 and float(least) < 1.1 / steps


def test_a_strength_that_leaves_no_step_of_a_distillation():
    with pytest.raises(InvalidArgumentError, match=r"none of 3 original_inference_steps: .* 0\.334 or more"):
        D.lcm_timesteps(1, 1000, 3, 0.333)
    assert len(D.lcm_timesteps(1, 1000, 3, 0.334)) == 1


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: D.cut_by_strength(D.make_grid(VP, 10), 0.0), "strength must be a number in"),
        (lambda: D.cut_by_strength(D.make_grid(VP, 10), 1.1), "strength must be a number in"),
        (lambda: D.cut_by_strength(D.make_grid(VP, 10), np.nan), "strength must be a number in"),
        (lambda: D.cut_by_strength(D.make_grid(VP, 10), 0.09), "strength of 0.1 or more"),
        (lambda: D.cut_by_strength(D.make_grid(VP, 1), 0.9), "take more steps, or a strength of 1$"),
        (lambda: D.cut_by_strength(D.pad(D.make_grid(VP, 10), 20), 0.5), "before padding"),
        (lambda: D.split_at_snr(D.make_grid(VP, 10), 0.0), "positive"),
        (lambda: D.split_at_snr(D.make_grid(VP, 10), 1e9), "no step to the second"),
        (lambda: D.split_at_snr(D.make_grid(VP, 10), 1e-9), "no step to the first"),
        (lambda: D.split_at_fraction(D.make_grid(VP, 10), VP, 1.0), "must be a number in"),
        (lambda: D.split_at_fraction(D.pad(D.make_grid(VP, 10), 20), VP, 0.5), "before padding"),
    ],
)
def test_impossible_cuts_are_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()
