"""Mean and variance of a stochastic run on Gaussian data, without drawing samples: the judge of weak order.

The exact denoiser of Gaussian data is linear, so a whole run is x_N = a x_T + b + sum_i c_i z_i. All of it is
read off a batch of runs: image j gets another key than the rest at step j, and at that step alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import diffusion as D


def moments_of(solver, denoise, mean, std, max_steps):
    """A compiled function: grid -> (mean, variance) of x at its last row, from the exact x_T at its first.

    mean and std of the data are arrays [P], one for each of P independent numbers; denoise is linear in x.
    """
    mean, std = np.asarray(mean), np.asarray(std)
    base, slope, images = max_steps, max_steps + 1, max_steps + 2
    pair = jax.random.split(jax.random.key(5), 2)

    @jax.jit
    def run(grid):
        x = jnp.zeros((images, mean.size)).at[slope].set(1.0)
        z, other = D.solvers.noise_like(pair, x[:2])

        def body(state, i):
            keys = pair[(jnp.arange(images, dtype=jnp.int32) == i).astype(jnp.int32)]
            new, _ = solver.step(state, denoise, grid, i, keys)
            return jax.tree.map(lambda a, b: jnp.where(i < grid.num_steps, a, b), new, state), None

        x = jax.lax.scan(body, solver.init(x), jnp.arange(max_steps, dtype=jnp.int32))[0].x
        c = (x[:base] - x[base][None]) / (other - z)[None]
        return x[slope] - x[base], x[base] - jnp.sum(c, axis=0) * z, jnp.sum(c**2, axis=0)

    def moments(grid):
        a, b, noise = (np.asarray(value) for value in run(D.pad(grid, max_steps)))
        start_mean, start_variance = marginal(grid, 0, mean, std)
        return a * start_mean + b, a**2 * start_variance + noise

    return moments


def marginal(grid, row, mean, std):
    """Mean and variance of the data, noised to a row of the grid."""
    return grid.alpha[row] * mean, grid.alpha[row] ** 2 * std**2 + grid.sigma[row] ** 2


def weak_order(solver, path, grid_of, steps, mean, std):
    """(slope of log error over log steps, the errors), of the mean and the variance, whichever is worse.

    Where the mean of the data is a fixed point of the run, as on straight paths, its error is only rounding.
    """
    mean, std = np.asarray(mean), np.asarray(std)
    grids, errors = [grid_of(count) for count in steps], []
    longest = max(len(grid.t) - 1 for grid in grids)
    moments = moments_of(solver, D.gaussian_denoiser(path, mean, std), mean, std, longest)
    for grid in grids:
        exact = marginal(grid, -1, mean, std)
        errors.append(max(np.abs(ours - true).max() for ours, true in zip(moments(grid), exact, strict=True)))
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0], errors
