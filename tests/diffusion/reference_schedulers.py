"""Drives the schedulers of `diffusers` with a stand-in network, to compare our solvers with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm

from jaxldm import diffusion as D

STEPS = (1, 2, 5, 10, 50)
MAX_STEPS = max(STEPS)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SEED = 3
torch.set_num_threads(1)  # the arrays are tiny
SHAPE = (2, 4, 4, 2)
LINEAR_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
FINAL_SIGMAS = {"clean": "zero", "sigma_min": "sigma_min"}
# What our `spacing` is called by the schedulers that add a row behind N + 1, and by k-diffusion's family.
OPEN_SPACINGS = {"linspace": "linspace_open", "leading": "leading_open", "trailing": "trailing"}
FRACTIONAL_SPACINGS = {"linspace": "linspace_fractional", "leading": "leading", "trailing": "trailing"}


def rounded_on_rows(t, grid):
    """t rounded where it belongs to a row of the grid, and as it is between two."""
    on_a_row = jnp.min(jnp.abs(t[None, :] - grid.t[:, None]), axis=0) < 1e-3
    return jnp.where(on_a_row, jnp.round(t), t)


# What the network is told as its time: some schedulers show it another than their sigmas stand for.
LABELS = {
    "exact": lambda t, grid: t,
    "rounded": lambda t, grid: jnp.round(t),
    "cut": lambda t, grid: jnp.floor(t),
    "rounded_on_rows": rounded_on_rows,
}


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
    """A compiled `run(prediction, grid, x, label)`, for every prediction, label and grid up to MAX_STEPS."""
    labels = list(LABELS)

    @jax.jit
    def run(index, grid, x, label):
        def network(x, t):
            shown = [lambda t, of=of: of(t, grid) for of in LABELS.values()]
            return network_of(x, jax.lax.switch(label, shown, t))

        denoisers = [D.denoiser(network, D.prediction(prediction, path)) for prediction in predictions]

        def function(x, t):
            return jax.lax.switch(index, denoisers, x, t)

        return D.sample(jax.random.key(SEED), D.Denoiser(function, path), solver, grid, x)

    return lambda prediction, grid, x, label="exact": np.asarray(
        run(predictions.index(prediction), D.pad(grid, MAX_STEPS), x, labels.index(label))
    )


def compare(run, prediction, grid, scheduler, case, label="exact", **step_options):
    """Ours and theirs from the same noise, both in the scale alpha x_0 + sigma eps."""
    theirs = run_reference(scheduler, torch.from_numpy(start_noise()), **step_options)
    assert_close(run(prediction, grid, start_noise(), label), theirs, case)


def compare_in_float64(run, prediction, grid, scheduler, case, label="exact"):
    """The same with the reference in float64, for formulas that lose too much in float32."""
    scheduler.sigmas = scheduler.sigmas.double()
    theirs = run_reference(scheduler, torch.from_numpy(start_noise()).double())
    assert_close(run(prediction, grid, start_noise(), label), theirs, case)


def compare_in_sigma_space(
    run, prediction, grid, scheduler, case, label="exact", tolerance=1e-4, **step_options
):
    """The same for schedulers that keep alpha = 1: their x is x / alpha."""
    start = start_noise() / grid.alpha[0]
    ours = run(prediction, grid, start * grid.alpha[0], label) / grid.alpha[-1]
    assert_close(ours, run_reference(scheduler, torch.from_numpy(start), **step_options), case, tolerance)


class NearZeroTerminalSNR(D.VP):
    """The path of the rescaled betas with the reference's alphas_cumprod = 2^-24 in the place of 0.

    The reference needs it to keep its logarithms finite. From a true zero ours stays finite without it
    (test_sampling.py).
    """

    def coefficients(self, xp, t):
        alpha, sigma = super().coefficients(xp, t)
        last = t == self.t_noisy
        return xp.where(last, 2.0**-12, alpha), xp.where(last, (1 - 2.0**-24) ** 0.5, sigma)


def near_zero_terminal_snr():
    return NearZeroTerminalSNR(D.rescale_zero_terminal_snr(D.linear_betas()))


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
    config = scheduler.config
    power = {"linear": 1, "scaled_linear": 2}[config.beta_schedule]
    ends = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
    betas = np.linspace(*ends, config.num_train_timesteps) ** power
    exact = torch.from_numpy(np.cumprod(1 - betas))
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=1e-5, atol=0)
    scheduler.alphas_cumprod = exact
    return scheduler


def feed_noise(monkeypatch, module, noises):
    """Makes the schedulers of a module draw the given noises: they have no argument for them."""
    queue = list(noises)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: queue.pop(0))


def feed_ddpm_noise(monkeypatch, noises):
    feed_noise(monkeypatch, scheduling_ddpm, noises)


def assert_close(ours, reference, case, tolerance=1e-4):
    """Largest difference, as a part of the largest value."""
    assert np.isfinite(reference).all()
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    assert error <= tolerance, f"{case}: differs by {error:.2e} of the largest value"
