"""A Gaussian mixture in NumPy, and its probability-flow ODE by SciPy: the judge of the solvers' order."""

import numpy as np
from scipy.integrate import solve_ivp

WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([[-1.0, 0.5], [1.0, 1.0]])
STDS = np.array([0.3, 0.4])


def mixture_x0(x, alpha, sigma, weights, means, stds):
    """E[x_0 | x_t], x [B, D], means [K, D], stds [K]."""
    variance = alpha**2 * stds**2 + sigma**2
    distance = ((x[:, None] - alpha * means) ** 2).sum(-1)
    logits = np.log(weights) - distance / (2 * variance) - x.shape[1] / 2 * np.log(variance)
    posterior = np.exp(logits - logits.max(1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    answers = (sigma**2 * means + alpha * (stds**2)[:, None] * x[:, None]) / variance[:, None]
    return (posterior[..., None] * answers).sum(1)


def solve_exactly(x, grid, weights, means, stds):
    """x at the grid's last row, by dz/da = v in the angle a = atan(sigma / alpha), z = x / norm.

    Unlike sigma / alpha the angle is finite at pure noise, and it is no variable that a solver uses.
    """
    norms, angles = np.hypot(grid.alpha, grid.sigma), np.arctan2(grid.sigma, grid.alpha)

    def v(angle, z):
        z = z.reshape(x.shape)
        x_0 = mixture_x0(z, np.cos(angle), np.sin(angle), weights, means, stds)
        epsilon = (z - np.cos(angle) * x_0) / np.sin(angle)
        return (np.cos(angle) * epsilon - np.sin(angle) * x_0).ravel()

    solution = solve_ivp(
        v, (angles[0], angles[-1]), np.ravel(x) / norms[0], method="DOP853", rtol=1e-11, atol=1e-12
    )
    return solution.y[:, -1].reshape(x.shape) * norms[-1]
