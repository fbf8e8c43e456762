"""Wuerstchen's path, grid and sampler against DDPMWuerstchenScheduler of diffusers."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import DEFAULT_STAGE_C_TIMESTEPS
from diffusers.schedulers import scheduling_ddpm_wuerstchen
from reference_schedulers import (
    MAX_STEPS,
    SEED,
    STEPS,
    assert_close,
    jax_network,
    start_noise,
    step_noise,
    torch_network,
)
from rule_grids import rule_grid

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

PATH = D.Cosine()
OPTIONS = {"final": "sigma_min"}  # as the published files are read


@pytest.mark.parametrize("scaler", [1.0, 0.5, 2.0])
def test_alphas_are_those_of_diffusers(scaler):
    """Between its two ends, where it cuts; ours cuts at the noisy one alone, and ends in a clean image."""
    reference = diffusers.DDPMWuerstchenScheduler(s=0.01, scaler=scaler)
    path = D.Cosine(offset=0.01, scaler=scaler)
    t = np.linspace(path.t_min, 1, 257)
    theirs = reference._alpha_cumprod(torch.from_numpy(t), torch.device("cpu")).numpy()
    np.testing.assert_allclose(path.alpha(t) ** 2, theirs, rtol=2e-5)
    np.testing.assert_allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, 1, rtol=1e-12)
    assert (path.alpha(0.0), path.sigma(0.0)) == (1, 0)
    assert path.alpha(path.t_min) ** 2 == pytest.approx(0.9999) and path.alpha(1.0) == 0.01
    level = path.sigma(t) / path.alpha(t)
    there = path.alpha(t) > 0.01
    np.testing.assert_allclose(path.time(level)[there], t[there], rtol=1e-9)
    assert path.time(0.0) == 0 and path.alpha(path.time(np.inf)) == pytest.approx(0.01)


def test_noising_is_that_of_diffusers():
    x, noise = start_noise(), start_noise(1)
    t = np.array([0.7, 0.3])
    theirs = diffusers.DDPMWuerstchenScheduler().add_noise(
        torch.from_numpy(x), torch.from_numpy(noise), torch.from_numpy(t.astype(np.float32))
    )
    alpha, sigma = (values.reshape(-1, 1, 1, 1) for values in (PATH.alpha(t), PATH.sigma(t)))
    np.testing.assert_allclose(alpha * x + sigma * noise, theirs, atol=2e-6)


def test_device_agrees_with_host_near_the_clean_end():
    t = np.append(np.geomspace(1e-6, 1, 40), 0).astype(np.float32)
    for function in (PATH.alpha, PATH.sigma):
        np.testing.assert_allclose(function(jnp.asarray(t)), function(t), rtol=1e-5)
    ratio = PATH.sigma(t) / PATH.alpha(t)
    np.testing.assert_allclose(PATH.time(jnp.asarray(ratio, jnp.float32)), PATH.time(ratio), atol=1e-6)
    slopes = jnp.stack(PATH.derivatives(jnp.asarray(t)))
    assert np.isfinite(slopes).all()
    draws = np.asarray(D.uniform()(jax.random.key(0), (2000,), PATH))
    assert PATH.t_min < draws.min() < 0.01 and 0.99 < draws.max() < 1 and abs(draws.mean() - 0.5) < 0.02


@pytest.mark.parametrize("steps", STEPS)
def test_sampling_is_that_of_diffusers(steps, monkeypatch):
    """Both fed the same noise; the last step adds none, and ends where the scheduler stops."""
    grid = rule_grid(PATH, steps, **OPTIONS)
    check(grid, np.linspace(1, 0, steps + 1), monkeypatch)


def test_stage_c_spacing_is_the_published_list(monkeypatch):
    published = np.asarray(DEFAULT_STAGE_C_TIMESTEPS)
    grid = rule_grid(PATH, 29, spacing="stage_c", **OPTIONS)
    np.testing.assert_allclose(grid.t[:-1], published[:-1], rtol=1e-6)
    check(grid, published, monkeypatch)
    for count in (1, 2, 7, 60):
        t = D.make_grid(PATH, count, spacing="stage_c").t
        assert len(t) == count + 1 and t[0] == 1 and t[-1] == 0
        assert abs((t[:-1] > 2 / 3).sum() / count - 19 / 29) < 0.5 / count + 0.01
    discrete = D.make_grid(D.VP(D.linear_betas()), 29, spacing="stage_c").t[:-1]
    np.testing.assert_allclose(discrete, published[:-1] * 999, atol=0.5)


@jax.jit
def run_ours(grid, x):
    """A network that is told 1000 t, as the reference's is."""
    denoise = D.denoiser(lambda x, t: jax_network(x, 1000 * t), D.epsilon(PATH))
    return D.sample(jax.random.key(SEED), denoise, D.solvers.ddpm(final_noise=False), grid, x)


def check(grid, times, monkeypatch):
    """The two loops, fed the same noise."""
    x, queue = start_noise(), iter(step_noise())
    monkeypatch.setattr(scheduling_ddpm_wuerstchen, "randn_tensor", lambda *args, **options: next(queue))
    reference = diffusers.DDPMWuerstchenScheduler()
    reference.set_timesteps(timesteps=list(times))
    theirs = torch.from_numpy(x)
    for t in reference.timesteps[:-1]:
        answer = torch_network(theirs, 1000 * float(t))
        theirs = reference.step(answer, t.expand(len(x)), theirs).prev_sample
    assert_close(np.asarray(run_ours(D.pad(grid, MAX_STEPS), x)), theirs.numpy(), len(times) - 1)


def test_final_noise_is_left_out_of_the_last_step_alone():
    denoise, x = D.gaussian_denoiser(PATH, 0.3, 0.5), jnp.ones((1, 2, 2, 1))

    @jax.jit
    def both(grid):
        solvers = [D.solvers.ddpm(final_noise=noisy) for noisy in (True, False)]
        runs = [
            D.sample(jax.random.key(0), denoise, solver, grid, x, return_trajectory=True)[1]
            for solver in solvers
        ]
        return runs[0] - runs[1]

    difference = both(D.pad(rule_grid(PATH, 4, **OPTIONS), 6))
    assert not difference[:4].any()
    assert 1e-4 < np.abs(difference[4:]).max() < 4 * PATH.sigma(PATH.t_min)
    assert not both(D.pad(D.make_grid(PATH, 4), 6)).any()  # the clean row takes none in either case


def test_a_scaler_of_0_is_refused():
    with pytest.raises(InvalidArgumentError, match="scaler must be a positive"):
        D.Cosine(scaler=0.0)
