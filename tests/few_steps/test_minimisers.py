"""At the map that is known exactly, each loss is at its floor and its gradient is 0."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import (
    DIRECTIONS,
    EDM,
    FLOW,
    MEAN,
    STD,
    every,
    moved,
    parts,
    reflected,
    solution,
    spread,
    uncorrelated,
    unexplained,
    velocity,
)

from jaxldm import diffusion as D
from jaxldm import few_steps as few

COUNT = 64


def loss_and_gradient(loss):
    """Of loss(theta) at theta = 0; and with theta a little off, the loss is higher."""
    theta = jnp.zeros(DIRECTIONS)
    value, gradient = jax.value_and_grad(loss)(theta)
    for direction in jnp.eye(DIRECTIONS):
        assert loss(1e-2 * direction) > value
    return float(value), np.asarray(gradient)


def assert_at_floor(loss, floor=0.0):
    value, gradient = loss_and_gradient(loss)
    assert value == pytest.approx(floor, abs=1e-9)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def exact_jump(path):
    return lambda x, t, s: solution(path, x, t, s)


@pytest.mark.parametrize("kind", [D.v, D.x0])
def test_progressive(kind, x64):
    path = D.ContinuousVP()
    prediction = kind(path)
    times = D.make_grid(path, 8).t
    t, middle, s = few.draw_double_steps(jax.random.key(0), times, COUNT)
    t, middle, s = (value.astype(jnp.float64) for value in (t, middle, s))
    x_0, epsilon = uncorrelated(COUNT)
    after = {float(a): b for a, b in zip(t, s, strict=True)}
    assert all(after[float(a)] == b for a, b in zip(t, s, strict=True))  # s is a function of t

    def exact(x_t, t):
        x_s = solution(path, x_t, t, s)  # the batch's own s
        (a, b), (c, d) = ((path.alpha(u)[:, None], path.sigma(u)[:, None]) for u in (t, s))
        x_0 = (x_s - d / b * x_t) / (c - d / b * a)
        return D.from_x0(prediction, x_0, x_t, t)

    network = moved(exact)

    def loss(theta):
        student = lambda x, t, condition: network(theta, x, t)  # noqa: E731
        return few.progressive_loss(student, exact_jump(path), prediction, x_0, epsilon, t, middle, s)[0]

    assert_at_floor(loss)


def test_a_student_of_ddim_takes_two_steps_in_one(x64):
    # With DDIM's own jumps for a teacher, the student's one DDIM step ends where the teacher's two end.
    path, (x_0, epsilon) = D.ContinuousVP(), uncorrelated(COUNT)
    denoise = D.gaussian_denoiser(path, MEAN, STD)
    prediction, jump = D.v(path), few.ddim_jump(denoise)
    t, middle, s = (every(COUNT, value) for value in (0.8, 0.6, 0.4))
    seen = []

    def student(x, t, condition):
        seen.append(x)
        return jnp.zeros_like(x)

    target = jax.grad(
        lambda shift: few.progressive_loss(
            lambda x, t, c: student(x, t, c) + shift, jump, prediction, x_0, epsilon, t, middle, s
        )[0]
    )(jnp.zeros((COUNT, 2)))
    output = -target * COUNT * 2 / 2  # d mean |shift - target|^2 / d shift at shift = 0
    one = few.ddim_jump(D.Denoiser(lambda x, t: prediction.to_x0(output, x, t), path))(seen[0], t, s)
    np.testing.assert_allclose(one, jump(jump(seen[0], t, middle), middle, s), atol=1e-12)


def test_guidance(x64):
    x_0, epsilon = uncorrelated(COUNT)
    t, scale = every(COUNT, 0.3), few.draw_scales(jax.random.key(0), COUNT, 1.0, 8.0).astype(jnp.float64)
    teacher = lambda x, t, condition: velocity(x, t) + condition[:, None]  # noqa: E731
    c, null = jnp.linspace(-1, 1, COUNT), jnp.zeros(COUNT)
    network = moved(lambda x, t: velocity(x, t) + (scale * c)[:, None])  # (1 - w) (v + 0) + w (v + c)

    def loss(theta):
        student = lambda x, t, condition, w: network(theta, x, t)  # noqa: E731
        flow = D.flow(FLOW)
        return few.guidance_distillation_loss(student, teacher, flow, x_0, epsilon, t, scale, c, null)[0]

    assert_at_floor(loss)


def consistency_loss_of(jump, t, s, **options):
    x_0, epsilon = uncorrelated(COUNT)
    x_t = few.noised(EDM, x_0, epsilon, t)
    network = moved(lambda x, t: solution(EDM, x, t, EDM.sigma_min))
    x_s = few.noised(EDM, x_0, epsilon, s) if jump is None else jump(x_t, t, s)

    def loss(theta):
        f = lambda x, t: network(theta, x, t)  # noqa: E731
        still = lambda x, t: network(jnp.zeros(DIRECTIONS), x, t)  # noqa: E731
        return few.consistency_loss(f, still, x_t, t, x_s, s, **options)[0]

    return loss


@pytest.mark.parametrize("distance", [few.squares_of, few.pseudo_huber(0.03)])
def test_consistency_distillation(distance, x64):
    t, s = few.draw_neighbours(jax.random.key(1), few.karras_levels(18), COUNT)
    t, s = t.astype(jnp.float64), s.astype(jnp.float64)
    assert_at_floor(consistency_loss_of(exact_jump(EDM), t, s, distance=distance, weight=1 / (t - s)))


@pytest.mark.parametrize(("jump", "order"), [(few.ddim_jump, 2), (few.heun_jump, 3)])
def test_the_error_of_a_teachers_step_is_all_that_is_left(jump, order, x64):
    teacher = jump(D.gaussian_denoiser(EDM, MEAN, STD))
    gaps = np.array([0.2, 0.1, 0.05])
    losses = [
        float(consistency_loss_of(teacher, every(COUNT, 1.0), every(COUNT, 1.0 - gap))(jnp.zeros(DIRECTIONS)))
        for gap in gaps
    ]
    assert np.polyfit(np.log(gaps), np.log(losses), 1)[0] == pytest.approx(2 * order, abs=0.3)


@pytest.mark.parametrize(("jump", "order"), [(few.ddim_jump, 2), (few.heun_jump, 3)])
def test_a_teachers_step_on_a_path_that_ends_in_pure_noise(jump, order, x64):
    step = jump(D.gaussian_denoiser(FLOW, MEAN, STD))
    x = uncorrelated(COUNT)[1]
    gaps, t = np.array([0.08, 0.04, 0.02]), every(COUNT, 0.6)
    errors = [np.abs(step(x, t, t - gap) - solution(FLOW, x, t, t - gap)).max() for gap in gaps]
    assert np.polyfit(np.log(gaps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.2)
    # From the end itself and to the clean one each is DDIM's: from noise towards the mean of the data.
    end, s = every(COUNT, 1.0), every(COUNT, 0.9)
    np.testing.assert_allclose(step(x, end, s), 0.1 * MEAN + 0.9 * np.asarray(x), rtol=1e-6)
    clean = D.gaussian_denoiser(FLOW, MEAN, STD)(x, t)
    np.testing.assert_allclose(step(x, t, every(COUNT, 0.0)), clean, rtol=1e-6)


def test_consistency_training_is_biased_by_the_square_of_the_gap(x64):
    # E[x_0 + s eps | x_t] is Euler's step, so the gradient at the true function falls as (t - s)^2.
    gaps = np.array([0.2, 0.1, 0.05])
    sizes = []
    for gap in gaps:
        loss = consistency_loss_of(None, every(COUNT, 1.0), every(COUNT, 1.0 - gap))
        sizes.append(np.abs(jax.grad(loss)(jnp.zeros(DIRECTIONS))).max())
    assert np.polyfit(np.log(gaps), np.log(sizes), 1)[0] == pytest.approx(2, abs=0.15)


def times_of_training(method):
    """From noise to the clean end, each the partner of the one before it."""
    if method == "ict":
        return few.karras_levels(few.num_levels(0, 100))[::-1]
    times = [20.0]
    while times[-1] > 0:
        times += np.asarray(few.easy_times(jnp.asarray(times[-1:]), stage=1)).tolist()
    return np.array(times)


@pytest.mark.parametrize("distance", [few.squares_of, few.pseudo_huber(0.00054 * np.sqrt(2))])
@pytest.mark.parametrize("method", ["ect", "ict"])
def test_consistency_training_learns_euler_steps_of_the_exact_denoiser(method, distance, x64):
    # f_t is the mean of f_s(x_0 + s eps) given x_t, which is f_s after Euler's step as f_s is linear.
    times = times_of_training(method)
    assert len(times) > 4 and times[-1] < 1.001 * EDM.sigma_min
    euler = few.ddim_jump(D.gaussian_denoiser(EDM, MEAN, STD))

    def exact(x, t):
        below = times[np.argmin(np.abs(times - float(t[0]))) :]
        for pair in itertools.pairwise(below):
            x = euler(x, *(every(len(x), time) for time in pair))
        return x

    network = moved(exact)
    for pair in itertools.pairwise(times):
        x_0, epsilon = reflected(EDM, *uncorrelated(COUNT), every(COUNT, pair[0]))
        t, s = (every(2 * COUNT, time) for time in pair)
        x_t, x_s = (few.noised(EDM, x_0, epsilon, time) for time in (t, s))

        def loss(theta, pairs=(x_t, t, x_s, s)):
            f = functools.partial(network, theta)
            return few.consistency_loss(f, f, *pairs, distance=distance)[0]

        np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(DIRECTIONS)), 0, atol=1e-9)


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("warmth", [0.0, 0.4, 1.0])
def test_continuous_consistency(taught, warmth, x64):
    path = few.TrigFlow(sigma_data=1.0)
    x_0, z = uncorrelated(COUNT)
    t = every(COUNT, 0.9)
    x_t = jnp.cos(0.9) * x_0 + jnp.sin(0.9) * z

    def exact(x, t):  # cos(t) x - sin(t) F = f
        f = solution(path, x, t, jnp.zeros_like(t))
        return (jnp.cos(t)[:, None] * x - f) / jnp.sin(t)[:, None]

    np.testing.assert_allclose(few.trig_consistency(exact, x_t, t), solution(path, x_t, t, 0 * t))
    denoise = D.gaussian_denoiser(path, MEAN, STD)
    slope = few.trig_teacher_slope(denoise, x_t, t) if taught else jnp.cos(0.9) * z - jnp.sin(0.9) * x_0
    network = moved(exact)

    def loss(theta, normalise=False):
        own = lambda x, t: network(theta, x, t)  # noqa: E731
        return few.continuous_consistency_loss(own, x_t, t, slope, warmth=warmth, normalise=normalise)[0]

    gradient = jax.grad(loss)(jnp.zeros(DIRECTIONS))
    if warmth == 1:
        np.testing.assert_allclose(gradient, 0, atol=1e-9)
        # What one draw's slope has besides the mean's moves f by df/dx_t = std / spread.
        left = 0.0 if taught else np.mean((np.cos(0.9) * unexplained(path, 0.9)) ** 2)
        assert loss(jnp.zeros(DIRECTIONS)) == pytest.approx(left, rel=1e-9, abs=1e-20)
        if taught:
            assert loss(jnp.zeros(DIRECTIONS), True) == pytest.approx(0, abs=1e-20)
    else:  # in the warm-up another function is learned: the network's own velocity
        assert np.abs(gradient).max() > 1e-2


def test_continuous_consistency_warms_up_from_the_velocity(x64):
    path, t = few.TrigFlow(sigma_data=1.0), every(COUNT, 0.9)
    x_0, z = uncorrelated(COUNT)
    x_t = jnp.cos(0.9) * x_0 + jnp.sin(0.9) * z
    denoise = D.gaussian_denoiser(path, MEAN, STD)
    network = moved(lambda x, t: few.trig_teacher_slope(denoise, x, t))

    def loss(theta):
        own = lambda x, t: network(theta, x, t)  # noqa: E731
        slope = jnp.cos(0.9) * z - jnp.sin(0.9) * x_0
        return few.continuous_consistency_loss(own, x_t, t, slope, warmth=0.0, normalise=False)[0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(DIRECTIONS)), 0, atol=1e-9)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_normalised_tangent_is_no_mean_where_slopes_of_examples_are_skewed(normalise, x64):
    """Of three slopes at one point, 0 on average, the best F is that average unless g is normalised."""
    x_t, t, slope = jnp.zeros((3, 1)), every(3, 0.4), jnp.array([[-1.0], [-1.0], [2.0]])

    def loss(theta):
        own = lambda x, t: theta + 0 * x  # noqa: E731
        return few.continuous_consistency_loss(own, x_t, t, slope, warmth=0.0, normalise=normalise)[0]

    gradient = float(jax.grad(loss)(0.0))
    g = np.cos(0.4) ** 2 * np.array([-1, -1, 2.0])
    wanted = -2 * np.mean(g / (np.abs(g) + 0.1)) if normalise else 0.0
    assert gradient == pytest.approx(wanted, abs=1e-9) and (abs(wanted) > 0.5) == normalise


def test_a_slope_over_an_interval_is_blind_to_what_changes_from_one_timestep_to_the_next(x64):
    path, t = few.TrigFlow(sigma_data=1.0), jnp.linspace(0.1, 1.5, COUNT)
    x_t = few.noised(path, *uncorrelated(COUNT), t)
    slope = few.trig_teacher_slope(D.gaussian_denoiser(path, MEAN, STD), x_t, t)
    asked = []

    def exact(x, t):
        f = solution(path, x, t, jnp.zeros_like(t))
        return (jnp.cos(t)[:, None] * x - f) / jnp.sin(t)[:, None]

    def rough(x, t):
        asked.append(t)
        return exact(x, t) + 0.01 * jnp.sin(1000 * t)[:, None]

    def tangent(network, **options):
        found = few.continuous_consistency_loss(network, x_t, t, slope, normalise=False, **options)
        return found[1]["tangent"]

    ends = 0.05, 1.55
    assert tangent(exact) < 1e-9 and tangent(exact, difference=0.01, ends=ends) < 1e-3
    assert tangent(rough) > 1
    asked.clear()
    assert tangent(rough, difference=0.1, ends=ends) < 0.1
    assert min(map(jnp.min, asked)) >= ends[0] and max(map(jnp.max, asked)) <= ends[1]


def test_reflow(x64):
    _, noise = uncorrelated(COUNT)
    samples = solution(FLOW, noise, every(COUNT, 1.0), every(COUNT, 0.0))
    t = few.u_shaped_times(jax.random.key(0), COUNT).astype(jnp.float64)

    def exact(x, t):  # x_t = (1 - t) (m + s eps) + t eps, which gives eps
        t = t[:, None]
        epsilon = (x - (1 - t) * MEAN[None]) / ((1 - t) * STD[None] + t)
        return epsilon - (MEAN[None] + STD[None] * epsilon)

    network = moved(exact)

    def loss(theta):
        student = lambda x, t, condition: network(theta, x, t)  # noqa: E731
        return few.reflow_loss(student, D.flow(FLOW), samples, noise, t)[0]

    assert_at_floor(loss)


def exact_shortcut(x, t, d):
    still = d == 0
    step = jnp.where(still, 1.0, d)[:, None]
    whole = (x - solution(FLOW, x, t, t - jnp.where(still, 0.0, d))) / step
    return jnp.where(still[:, None], velocity(x, t), whole)


@pytest.mark.parametrize("d", [1.0, 0.5, 0.25])
def test_shortcut(d, x64):
    x_0, epsilon = uncorrelated(COUNT)
    x_0, epsilon = jnp.concatenate([x_0[:16], x_0]), jnp.concatenate([epsilon[:16], epsilon])
    t, d = every(COUNT + 16, 1.0), every(COUNT + 16, d)
    t = t.at[16:].set(0.6)
    x_t = few.noised(FLOW, x_0, epsilon, t)
    still = lambda x, t, d, condition: exact_shortcut(x, t, d)  # noqa: E731
    target = few.shortcut_target(still, x_t[:16], t[:16], d[:16], clip=None)
    np.testing.assert_allclose(target, exact_shortcut(x_t[:16], t[:16], d[:16]), atol=1e-12)
    network = moved(exact_shortcut)

    def loss(theta):
        own = lambda x, t, d, condition: network(theta, x, t, d)  # noqa: E731
        return few.shortcut_loss(own, x_0, epsilon, t, d, target)[0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(DIRECTIONS)), 0, atol=1e-9)
    floor = COUNT / (COUNT + 16) * np.mean(unexplained(FLOW, 0.6))  # of the others' velocities
    assert loss(jnp.zeros(DIRECTIONS)) == pytest.approx(floor, rel=1e-9)


def exact_mean_velocity(x, r, t):
    same = t == r
    whole = jnp.where(same, 1.0, t - r)[:, None]
    mean = (x - solution(FLOW, x, t, r)) / whole
    return jnp.where(same[:, None], velocity(x, t), mean)


@pytest.mark.parametrize("loss_of", [few.mean_flow_loss, few.improved_mean_flow_loss])
@pytest.mark.parametrize(("r", "t"), [(0.0, 1.0), (0.2, 0.7), (0.65, 0.7)])
def test_mean_flow(loss_of, r, t, x64):
    floor = unexplained(FLOW, t)
    if loss_of is few.mean_flow_loss:  # whose derivative is along one draw's v: (v - E v) dz_r/dz_t is left
        floor = floor * (spread(FLOW, r) / spread(FLOW, t)) ** 2
    x_0, epsilon = uncorrelated(COUNT)
    r, t = every(COUNT, r), every(COUNT, t)
    network = moved(exact_mean_velocity)

    def loss(theta):
        u = lambda x, r, t, condition: network(theta, x, r, t)  # noqa: E731
        return loss_of(u, x_0, epsilon, r, t, power=0.0)[0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(DIRECTIONS)), 0, atol=1e-9)
    assert loss(jnp.zeros(DIRECTIONS)) == pytest.approx(np.sum(floor), rel=1e-9)


def test_mean_flow_with_the_exact_velocity_is_exact(x64):
    # Given E[v | z] in place of one example's v, nothing is left of the loss.
    x_0, epsilon = uncorrelated(COUNT)
    r, t = every(COUNT, 0.1), every(COUNT, 0.9)
    z = few.noised(FLOW, x_0, epsilon, t)
    u = lambda x, r, t, condition: exact_mean_velocity(x, r, t)  # noqa: E731
    for loss_of in (few.mean_flow_loss, few.improved_mean_flow_loss):
        loss, _ = loss_of(u, x_0, epsilon, r, t, velocity=velocity(z, t))
        assert loss == pytest.approx(0, abs=1e-20)


def test_the_guided_target_of_mean_flow_has_the_scale_it_says(x64):
    # At its own fixed point, v~ = w c + (1 - w) null with w = omega / (1 - kappa).
    z = jnp.asarray(uncorrelated(COUNT)[0])
    t, omega, kappa = every(COUNT, 0.5), 1.5, 0.5
    free, bound, scale = velocity(z, t), velocity(z, t) + 1.0, omega / (1 - kappa)
    guided = (1 - scale) * free + scale * bound
    u = lambda z, r, t, condition: jnp.where(condition[:, None] == 1, guided, free)  # noqa: E731
    found = few.guided_velocity(u, z, t, bound, every(COUNT, 1), every(COUNT, 0), omega, kappa)
    np.testing.assert_allclose(found, guided, atol=1e-12)


def test_distribution_matching(x64):
    images, epsilon = uncorrelated(COUNT)
    path, t = D.ContinuousVP(), every(COUNT, 0.5)
    real = D.gaussian_denoiser(path, MEAN, STD)
    same = few.distribution_matching_gradient(real, real, images, path, epsilon, t)
    assert np.abs(same).max() == 0
    shift = np.array([0.3, 0.1])
    fake = D.gaussian_denoiser(path, MEAN + shift, STD)
    gradient = few.distribution_matching_gradient(real, fake, images, path, epsilon, t)
    alpha, sigma = path.alpha(0.5), path.sigma(0.5)
    x_t = few.noised(path, images, epsilon, t)
    apart = np.abs(images - parts(path, x_t, t)[0]).mean(1, keepdims=True)
    # E[x_0 | x_t] moves with the mean of the data by sigma^2 / (alpha^2 std^2 + sigma^2).
    np.testing.assert_allclose(gradient, sigma**2 / (alpha**2 * STD**2 + sigma**2) * shift / apart, rtol=1e-9)
    given = jax.grad(lambda images: few.distribution_matching_loss(images, gradient)[0])(images)
    np.testing.assert_allclose(given, gradient / COUNT, rtol=1e-12)
