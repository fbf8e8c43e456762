"""Drives the schedulers of `diffusers` with a stand-in network, to compare our solvers with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm

from jaxldm import diffusion as D

STEPS = (1, 2, 5, 10, 20, 50)
MAX_STEPS = max(STEPS)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SEED = 3
torch.set_num_threads(1)  # the arrays are tiny
SHAPE = (2, 4, 4, 2)


def network(x, t, xp):
    """A nonlinear stand-in for a network: mixes neighbours, saturates, and depends on the time."""
    mixed = 0.9 * x + 0.4 * xp.roll(x, 1, axis=1) - 0.3 * xp.roll(x, 1, axis=2)
    return xp.sin(1.5 * mixed + 0.002 * t) * 0.7 + 0.3 * xp.cos(0.005 * t) * x


def torch_network(x, t):
    """The same for torch tensors [B, H, W, C]; t is one number, in float32 as the JAX side has it."""
    return torch.from_numpy(network(x.numpy(), np.float32(t), np))


def jax_network(x, t):
    return network(x, t.reshape(-1, 1, 1, 1), jnp)


def start_noise(seed=0):
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def run_reference(scheduler, x, *, time_scale=1.0, **step_options):
    """The reference's loop as its documentation writes it; x in the scheduler's own scale."""
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        options = {name: values[i] for name, values in step_options.items()}
        x = scheduler.step(torch_network(scaled, float(t) * time_scale), t, x, return_dict=False, **options)[
            0
        ]
    return x.numpy()


def run_ours(solver, path, predictions=PREDICTIONS, network_of=jax_network):
    """A compiled `run(prediction, grid, x)`, for every prediction and every grid of up to MAX_STEPS steps."""
    denoisers = [D.denoiser(network_of, path, prediction) for prediction in predictions]

    @jax.jit
    def run(index, grid, x):
        def function(x, t):
            return jax.lax.switch(index, denoisers, x, t)

        return D.sample(jax.random.key(SEED), D.Denoiser(function, path), solver, grid, x)

    return lambda prediction, grid, x: np.asarray(
        run(predictions.index(prediction), D.pad(grid, MAX_STEPS), x)
    )


@functools.cache
def step_noise():
    """The noise that `sample` draws at each step for jax.random.key(SEED), as torch tensors."""
    keys = D.image_keys(jax.random.key(SEED), SHAPE[0])
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    draw = jax.jit(jax.vmap(lambda keys: D.solvers.noise_like(keys, jnp.zeros(SHAPE))))
    noise = draw(fold(keys, jnp.arange(MAX_STEPS)))
    return list(torch.from_numpy(np.array(noise)))


def with_float64_schedule(scheduler):
    """Gives the scheduler its own alphas_cumprod in float64, for its sigmas.

    In float32 its sqrt((1 - abar) / abar) is off by 3e-4 at t = 0, where 1 - abar is 1e-4; Heun's method with
    x_0 prediction then differs from a float64 run by 3e-4 of the largest value, and ours by 2e-6.
    """
    betas = np.linspace(
        scheduler.config.beta_start, scheduler.config.beta_end, scheduler.config.num_train_timesteps
    )
    exact = torch.from_numpy(np.cumprod(1 - betas))
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=1e-5, atol=0)
    scheduler.alphas_cumprod = exact
    return scheduler


def feed_ddpm_noise(monkeypatch, noises):
    """Makes DDPMScheduler draw the given noises: it has no argument for them."""
    queue = list(noises)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **options: queue.pop(0))


def assert_close(ours, reference, case, tolerance=1e-4):
    """Largest difference, as a part of the largest value."""
    assert np.isfinite(reference).all()
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    assert error <= tolerance, f"{case}: differs by {error:.2e} of the largest value"
