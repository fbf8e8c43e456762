"""The same on a mixture of three Gaussians, whose trajectories are curved: solved in float64.

Losses whose targets have no noise are 0 at the exact map, and so is their gradient, example by example.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import DIRECTIONS, every, moved

from jaxldm import diffusion as D
from jaxldm import few_steps as few
from jaxldm.diffusion.paths import per_image

COUNT, STEPS = 32, 48
WEIGHTS, STDS = np.array([0.3, 0.4, 0.3]), np.array([0.5, 0.4, 0.5])
MEANS = np.array([[-1.0, -0.4], [0.2, 0.9], [1.0, -0.7]])
FLOW, EDM, VP = D.Flow(), D.EDM(sigma_min=0.1), D.ContinuousVP()
CIRCLE = D.Interpolant("gvp")  # alpha = cos a, sigma = sin a


def denoiser(path, weights=WEIGHTS, means=MEANS):
    return D.gaussian_mixture_denoiser(path, weights, means, STDS)


@functools.partial(jax.jit, static_argnums=0)
def solution(path, x, t, s):
    """Where the ODE takes x from t to s: Runge and Kutta's method in the angle, where it is never stiff."""
    t, s = (jnp.broadcast_to(u, x.shape[:1]) for u in (t, s))
    at, to = ((path.alpha(u), path.sigma(u)) for u in (t, s))
    begin, end = (jnp.arctan2(sigma, alpha) for alpha, sigma in (at, to))
    h, of_circle = (end - begin) / STEPS, denoiser(CIRCLE)

    def slope(angle, z):
        cos, sin = (per_image(f(angle), z) for f in (jnp.cos, jnp.sin))
        return (cos * z - of_circle(z, angle * 2 / np.pi)) / sin

    def step(carry, _):
        angle, z = carry
        wide = per_image(h, z)
        k1 = slope(angle, z)
        k2 = slope(angle + h / 2, z + wide / 2 * k1)
        k3 = slope(angle + h / 2, z + wide / 2 * k2)
        k4 = slope(angle + h, z + wide * k3)
        return (angle + h, z + wide / 6 * (k1 + 2 * k2 + 2 * k3 + k4)), None

    (_, z), _ = jax.lax.scan(step, (begin, x / per_image(jnp.hypot(*at), x)), None, length=STEPS)
    return z * per_image(jnp.hypot(*to), z)


def velocity(x, t):
    x_0 = denoiser(FLOW)(x, t)
    return D.flow(FLOW).target(x_0, D.implied_noise(x_0, x, FLOW.alpha(t), FLOW.sigma(t)), t)


def draws(seed=0):
    rng = np.random.default_rng(seed)
    which = rng.integers(0, 3, COUNT)
    x_0 = MEANS[which] + STDS[which, None] * rng.normal(size=(COUNT, 2))
    return jnp.asarray(x_0), jnp.asarray(rng.normal(size=(COUNT, 2)))


def assert_at_floor(loss):
    theta = jnp.zeros(DIRECTIONS)
    value, gradient = jax.jit(jax.value_and_grad(loss))(theta)
    assert value < 1e-10
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    assert min(jax.jit(jax.vmap(loss))(1e-2 * jnp.eye(DIRECTIONS))) > 1e3 * value + 1e-9


def test_the_solution_is_that_of_the_ode(x64):
    x, t = draws()[1], every(COUNT, 0.9)
    there = solution(FLOW, x, t, every(COUNT, 0.2))
    np.testing.assert_allclose(solution(FLOW, there, every(COUNT, 0.2), t), x, atol=1e-6)
    _, slope = jax.jvp(lambda s: solution(FLOW, x, t, s), (every(COUNT, 0.2),), (every(COUNT, 1.0),))
    np.testing.assert_allclose(slope, velocity(there, every(COUNT, 0.2)), atol=1e-6)


def test_progressive(x64):
    prediction, (x_0, epsilon) = D.v(VP), draws()
    t, middle, s = (every(COUNT, value) for value in (0.9, 0.6, 0.3))

    def exact(x_t, t):
        x_s = solution(VP, x_t, t, s)
        (a, b), (c, d) = ((per_image(VP.alpha(u), x_t), per_image(VP.sigma(u), x_t)) for u in (t, s))
        return D.from_x0(prediction, (x_s - d / b * x_t) / (c - d / b * a), x_t, t)

    network, jump = moved(exact), functools.partial(solution, VP)
    assert_at_floor(
        lambda theta: few.progressive_loss(
            lambda x, t, condition: network(theta, x, t), jump, prediction, x_0, epsilon, t, middle, s
        )[0]
    )


def test_consistency_distillation(x64):
    x_0, epsilon = draws()
    t, s = every(COUNT, 2.0), every(COUNT, 0.9)
    x_t = few.noised(EDM, x_0, epsilon, t)
    network = moved(lambda x, t: solution(EDM, x, t, every(COUNT, EDM.sigma_min)))
    still = lambda x, t: network(jnp.zeros(DIRECTIONS), x, t)  # noqa: E731
    x_s = solution(EDM, x_t, t, s)
    assert_at_floor(
        lambda theta: few.consistency_loss(lambda x, t: network(theta, x, t), still, x_t, t, x_s, s)[0]
    )


def test_continuous_consistency(x64):
    path, t, end = few.TrigFlow(sigma_data=1.0), every(COUNT, 1.1), every(COUNT, 0.1)
    x_t = few.noised(path, *draws(), t)

    def velocity_of(x, t):  # cos(t) x - sin(t) F = f, which is the same along a trajectory
        f = solution(path, x, t, end)
        return (per_image(jnp.cos(t), x) * x - f) / per_image(jnp.sin(t), x)

    slope, network = few.trig_teacher_slope(denoiser(path), x_t, t), moved(velocity_of)
    assert_at_floor(
        lambda theta: few.continuous_consistency_loss(
            lambda x, t: network(theta, x, t), x_t, t, slope, normalise=False
        )[0]
    )


@pytest.mark.parametrize("loss_of", [few.mean_flow_loss, few.improved_mean_flow_loss])
def test_mean_flow(loss_of, x64):
    x_0, epsilon = draws()
    r, t = every(COUNT, 0.2), every(COUNT, 0.9)
    z = few.noised(FLOW, x_0, epsilon, t)

    def exact(x, r, t):
        same = per_image(t == r, x)
        whole = (x - solution(FLOW, x, t, r)) / jnp.where(same, 1.0, per_image(t - r, x))
        return jnp.where(same, velocity(x, t), whole)

    network, v = moved(exact), velocity(z, t)
    assert_at_floor(
        lambda theta: loss_of(
            lambda x, r, t, condition: network(theta, x, r, t), x_0, epsilon, r, t, velocity=v, power=0.0
        )[0]
    )


def test_shortcut(x64):
    first = COUNT // 4
    t = jnp.where(jnp.arange(COUNT) < first, 1.0, 0.6)
    d, x_t = every(COUNT, 0.8), few.noised(FLOW, *draws(), t)
    # Of the others E[x_0 | x_t] and E[eps | x_t], whose line has the exact velocity: no noise is left.
    x_0 = denoiser(FLOW)(x_t, t)
    epsilon = D.implied_noise(x_0, x_t, FLOW.alpha(t), FLOW.sigma(t))

    def exact(x, t, d):
        still = per_image(d == 0, x)
        mean = (x - solution(FLOW, x, t, t - d)) / jnp.where(still, 1.0, per_image(d, x))
        return jnp.where(still, velocity(x, t), mean)

    own = x_t[:first], t[:first], d[:first]
    target = few.shortcut_target(lambda x, t, d, condition: exact(x, t, d), *own, clip=None)
    np.testing.assert_allclose(target, exact(*own), atol=1e-7)
    network = moved(exact)
    assert_at_floor(
        lambda theta: few.shortcut_loss(
            lambda x, t, d, condition: network(theta, x, t, d), x_0, epsilon, t, d, target
        )[0]
    )


def test_reflow(x64):
    _, noise = draws()
    t = every(COUNT, 1.0)
    samples = solution(FLOW, noise, t, every(COUNT, 0.05))
    network = moved(lambda x, t: x - solution(FLOW, x, t, every(COUNT, 0.05)))  # at t = 1: noise to sample
    assert_at_floor(
        lambda theta: few.reflow_loss(
            lambda x, t, condition: network(theta, x, t), D.flow(FLOW), samples, noise, t
        )[0]
    )


def test_guidance(x64):
    """Each component is a class; what is learned is the guided denoiser of the mixture."""
    x_0, epsilon = draws()
    prediction, t = D.v(VP), every(COUNT, 0.5)
    scale = few.draw_scales(jax.random.key(0), COUNT, 1.0, 5.0).astype(jnp.float64)
    label, null = jnp.arange(COUNT) % 3, jnp.full(COUNT, 3)

    def x_0_of(x, t, label):
        alpha, sigma = (per_image(of(t), x) for of in (VP.alpha, VP.sigma))
        which = jnp.minimum(label, 2)
        std, mean = jnp.asarray(STDS)[which][:, None], jnp.asarray(MEANS)[which]
        own = (sigma**2 * mean + alpha * std**2 * x) / (alpha**2 * std**2 + sigma**2)
        return jnp.where(label[:, None] == 3, denoiser(VP)(x, t), own)

    teacher = lambda x, t, label: D.from_x0(prediction, x_0_of(x, t, label), x, t)  # noqa: E731

    def exact(x, t):
        guided = x_0_of(x, t, null) + scale[:, None] * (x_0_of(x, t, label) - x_0_of(x, t, null))
        return D.from_x0(prediction, guided, x, t)

    network = moved(exact)
    assert_at_floor(
        lambda theta: few.guidance_distillation_loss(
            lambda x, t, condition, w: network(theta, x, t),
            teacher,
            prediction,
            x_0,
            epsilon,
            t,
            scale,
            label,
            null,
        )[0]
    )


def test_distribution_matching(x64):
    """The gradient is the difference of two scores, which are derivatives of the densities' logarithms."""
    (images, epsilon), t = draws(), every(COUNT, 0.4)
    other = np.array([0.6, 0.2, 0.2]), MEANS + 0.3

    def log_density(x, weights, means):
        alpha, sigma = VP.alpha(0.4), VP.sigma(0.4)
        variance = alpha**2 * STDS**2 + sigma**2
        squares = jnp.sum((x[None] - alpha * means) ** 2, axis=1)
        return jax.nn.logsumexp(jnp.log(weights / variance) - squares / (2 * variance))

    real, fake = denoiser(VP), denoiser(VP, *other)
    assert np.abs(few.distribution_matching_gradient(real, real, images, VP, epsilon, t)).max() == 0
    x_t = few.noised(VP, images, epsilon, t)
    scores = [
        jax.vmap(jax.grad(lambda x, own=own: log_density(x, *own)))(x_t) for own in ((WEIGHTS, MEANS), other)
    ]
    apart = jnp.abs(images - real(x_t, t)).mean(1, keepdims=True)
    expected = VP.sigma(0.4) ** 2 / VP.alpha(0.4) * (scores[1] - scores[0]) / apart
    found = few.distribution_matching_gradient(real, fake, images, VP, epsilon, t)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)
