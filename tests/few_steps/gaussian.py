"""Two-dimensional Gaussian data, of which every map that the losses teach is known exactly."""

import jax.numpy as jnp
import numpy as np

from jaxldm import diffusion as D

MEAN, STD = np.array([0.7, -0.4]), np.array([0.5, 1.2])
FLOW, EDM = D.Flow(), D.EDM(sigma_min=0.002)
DIRECTIONS = 6


def uncorrelated(count=64, seed=0):
    """x_0 and eps whose sample means and covariances are exactly those of the distributions.

    An error that is linear in them, with mean 0 given x_t, then has a mean product with x_t that is 0 to
    rounding, not to 1 / sqrt(count).
    """
    draws = np.random.default_rng(seed).standard_normal((count, 4))
    draws -= draws.mean(0)
    draws = draws @ np.linalg.inv(np.linalg.cholesky(draws.T @ draws / count).T)
    return jnp.asarray(MEAN + STD * draws[:, :2]), jnp.asarray(draws[:, 2:])


def reflected(path, x_0, epsilon, t):
    """Each draw, and the one whose x_t is the same and whose errors of x_0 and eps are the opposite."""
    means = parts(path, path.alpha(t)[:, None] * x_0 + path.sigma(t)[:, None] * epsilon, t)
    pairs = zip((x_0, epsilon), means, strict=True)
    return tuple(jnp.concatenate([one, 2 * mean - one]) for one, mean in pairs)


def spread(path, t):
    """The standard deviation of x_t."""
    return np.hypot(path.alpha(t) * STD, path.sigma(t))


def unexplained(path, t):
    """Var[dx_t/dt | x_t] of a draw: (std (alpha sigma' - alpha' sigma) / spread)^2, and the bracket is 1."""
    return (STD / spread(path, t)) ** 2


def every(count, value):
    return jnp.full((count,), value)


def solution(path, x, t, s):
    per_example = (jnp.reshape(jnp.asarray(u), (-1, 1)) for u in (t, s))
    return D.gaussian_solution(path, MEAN, STD, x, *per_example)


def velocity(x, t):
    """E[eps - x_0 | x_t] on the straight path."""
    return D.flow(FLOW).target(*parts(FLOW, x, t), t)


def parts(path, x, t):
    """(E[x_0 | x_t], E[eps | x_t])."""
    x_0 = D.gaussian_denoiser(path, MEAN, STD)(x, t)
    return x_0, D.implied_noise(x_0, x, path.alpha(t), path.sigma(t))


def moved(exact):
    """(theta, x, *rest) -> exact(x, *rest) plus six directions in which a network might be wrong."""

    def network(theta, x, *times):
        late = times[0][:, None]
        for_all = (jnp.ones_like(x), x, x[:, ::-1], late * x, late * jnp.ones_like(x), late * x[:, ::-1])
        return exact(x, *times) + sum(weight * part for weight, part in zip(theta, for_all, strict=True))

    return network
