"""Stop-gradients, closed forms and boundaries of the losses of few steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import few_steps as few
from jaxldm.errors import InvalidArgumentError
from jaxldm.few_steps.jumps import check_batch

KEY = jax.random.key(0)
X, NOISE = jax.random.normal(KEY, (2, 8, 4, 4, 1))
T, S = jnp.linspace(0.3, 0.9, 8), jnp.linspace(0.2, 0.5, 8)
FLOW = D.flow(D.Flow())


def scaled(theta):
    return lambda x, t, *rest: theta * x + t.reshape(-1, 1, 1, 1)


def jump_of(theta):
    return few.ddim_jump(D.denoiser(scaled(theta), FLOW))


TEACHERS = {
    "progressive": lambda own, other: few.progressive_loss(
        scaled(own), jump_of(other), FLOW, X, NOISE, T, (T + S) / 2, S
    ),
    "guidance": lambda own, other: few.guidance_distillation_loss(
        scaled(own), scaled(other), FLOW, X, NOISE, T, 1 + T, T, S
    ),
    "consistency": lambda own, other: few.consistency_loss(scaled(own), scaled(other), X, T, NOISE, S),
    "shortcut": lambda own, other: few.shortcut_loss(
        scaled(own), X, NOISE, T, S, few.shortcut_target(scaled(other), X[:2], T[:2], S[:2])
    ),
    "continuous": lambda own, other: few.continuous_consistency_loss(
        scaled(own), X, T, few.trig_teacher_slope(scaled(other), X, T)
    ),
    "distribution matching": lambda own, other: few.distribution_matching_loss(
        own * X,
        few.distribution_matching_gradient(scaled(other), scaled(2 * other), own * X, FLOW.path, NOISE, T),
    ),
    "mean flow": lambda own, other: few.mean_flow_loss(
        scaled(own), X, NOISE, S, T, velocity=few.guided_velocity(scaled(other), X, T, NOISE, T, S, 1.5, 0.5)
    ),
}


@pytest.mark.parametrize("loss", TEACHERS.values(), ids=TEACHERS)
def test_no_gradient_reaches_the_teacher(loss):
    own, teacher = jax.grad(lambda own, other: loss(own, other)[0], argnums=(0, 1))(0.3, 0.7)
    assert teacher == 0
    assert own != 0


def test_a_shortcut_of_the_finest_steps_asks_for_the_velocity_which_alone_is_trained():
    asked = []

    def network(x, t, d, condition):
        asked.append(d)
        return x + d.reshape(-1, 1, 1, 1)

    d = jnp.array([1.0, 0.5, 0.25, 1 / 32, 1 / 64, 1 / 64, 0.0, 0.5])
    target = few.shortcut_target(network, X, jnp.ones(8), d, clip=None)
    for each in asked:
        np.testing.assert_array_equal(each, [0.5, 0.25, 0.125, 1 / 64, 0, 0, 0, 0.25])
    moved = X - (d / 2).reshape(-1, 1, 1, 1) * (X + asked[0].reshape(-1, 1, 1, 1))  # by its own length
    np.testing.assert_allclose(target, (X + moved) / 2 + asked[0].reshape(-1, 1, 1, 1), rtol=1e-5, atol=1e-6)
    _, steps = few.shortcut_times(KEY, 4000, 8)
    few.shortcut_target(network, X[:1], T[:1], steps.min()[None], smallest=8)
    assert asked[-1] == 0
    with pytest.raises(InvalidArgumentError, match="2, 4, 8, 16"):
        few.shortcut_target(network, X, T, d, smallest=6)


def test_derivatives_inside_targets_are_constants():
    # |u - target|^2 with a constant target: the gradient is 2 (u - target) du/dtheta, and nothing of d2u.
    def u(theta, z, r, t):
        return theta * z * (t - r).reshape(-1, 1, 1, 1)

    theta = 0.7
    found = jax.grad(
        lambda theta: few.mean_flow_loss(lambda z, r, t, c: u(theta, z, r, t), X, NOISE, S, T, power=0.0)[0]
    )(theta)
    gap = (T - S).reshape(-1, 1, 1, 1)
    z, v = (1 - T.reshape(-1, 1, 1, 1)) * X + T.reshape(-1, 1, 1, 1) * NOISE, NOISE - X
    slope = theta * (v * gap + z)
    error = theta * z * gap - (v - gap * slope)
    np.testing.assert_allclose(found, 2 * jnp.sum(error * z * gap) / 8, rtol=1e-5)


def test_the_derivative_of_improved_mean_flow_is_a_constant():
    # u + (t - r) sg(du/dt) - v, with du/dt along the network's own velocity: 2 error du/dtheta alone.
    theta, gap = 0.7, (T - S).reshape(-1, 1, 1, 1)

    def loss(theta):
        u = lambda z, r, t, condition: theta * z * (1 + (t - r).reshape(-1, 1, 1, 1))  # noqa: E731
        return few.improved_mean_flow_loss(u, X, NOISE, S, T, power=0.0)[0]

    z = (1 - T.reshape(-1, 1, 1, 1)) * X + T.reshape(-1, 1, 1, 1) * NOISE
    slope = theta * z + theta * (1 + gap) * theta * z
    error = theta * z * (1 + gap) + gap * slope - (NOISE - X)
    np.testing.assert_allclose(jax.grad(loss)(theta), 2 * jnp.sum(error * z * (1 + gap)) / 8, rtol=1e-5)


@pytest.mark.parametrize("difference", [None, 0.1])
def test_the_tangent_of_continuous_consistency_is_a_constant(difference):
    # |F - sg(F) - sg(g)|^2: the gradient is -2 g dF/dtheta, and nothing of what g is made of.
    theta = 0.3
    found = jax.grad(
        lambda theta: few.continuous_consistency_loss(scaled(theta), X, T, NOISE, difference=difference)[0]
    )(theta)
    cos, sin, F = (value.reshape(-1, 1, 1, 1) for value in (jnp.cos(T), jnp.sin(T), T))
    F = theta * X + F
    g = -(cos**2) * (F - NOISE) - cos * sin * (X + theta * NOISE + 1)
    g = g / (jnp.sqrt(jnp.mean(g**2, (1, 2, 3), keepdims=True)) + 0.1)
    np.testing.assert_allclose(found, -2 * jnp.mean(g * X), rtol=1e-4)


def in_float64(*values):
    return tuple(jnp.asarray(value, jnp.float64) for value in values)


def slope_along(network, x, t, direction, h=1e-5):
    """The slope of network(x, t) along (direction, 1)."""
    return (network(x + h * direction, t + h) - network(x - h * direction, t - h)) / (2 * h)


@pytest.mark.parametrize("loss_of", [few.mean_flow_loss, few.improved_mean_flow_loss])
def test_the_product_of_mean_flow_is_the_derivative(loss_of, x64):
    # du/dt along (v, 0, 1), or along the network's own velocity, against a difference, in float64.
    x, e, r, t = in_float64(X, NOISE, S, T)

    def u(z, r, t, condition=None):
        t, r = (value.reshape(-1, 1, 1, 1) for value in (t, r))
        return jnp.sin(z * t) + r * t**2

    z = (1 - t).reshape(-1, 1, 1, 1) * x + t.reshape(-1, 1, 1, 1) * e
    direction = e - x if loss_of is few.mean_flow_loss else u(z, t, t)
    slope = slope_along(lambda z, t: u(z, r, t), z, t, direction)
    error = u(z, r, t) - (e - x - (t - r).reshape(-1, 1, 1, 1) * slope)
    loss, _ = loss_of(u, x, e, r, t, power=0.0)
    np.testing.assert_allclose(loss, jnp.mean(jnp.sum(error**2, (1, 2, 3))), rtol=1e-8)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_product_of_continuous_consistency_is_the_derivative(normalise, x64):
    # g = -cos^2 (F - slope) - r cos sin (x + dF/dt), dF/dt along (slope, 1).
    x, slope, t = in_float64(X, NOISE, T)

    def F(x, t):
        t = t.reshape(-1, 1, 1, 1)
        return jnp.sin(x * t) + t**2

    cos, sin = (of(t).reshape(-1, 1, 1, 1) for of in (jnp.cos, jnp.sin))
    g = -(cos**2) * (F(x, t) - slope) - 0.7 * cos * sin * (x + slope_along(F, x, t, slope))
    norm = jnp.sqrt(jnp.mean(g**2, (1, 2, 3), keepdims=True))
    loss, metrics = few.continuous_consistency_loss(F, x, t, slope, warmth=0.7, normalise=normalise)
    wanted = jnp.mean((g / (norm + 0.1) if normalise else g) ** 2)
    np.testing.assert_allclose(loss, wanted, rtol=1e-8)
    np.testing.assert_allclose(metrics["tangent"], jnp.sqrt(jnp.mean(g**2)), rtol=1e-8)


def test_mean_flow_weighs_large_errors_down():
    u = lambda z, r, t, condition: 0.1 * z  # noqa: E731
    plain, parts = few.mean_flow_loss(u, X, NOISE, S, T, power=0.0)
    np.testing.assert_allclose(plain, parts["mse"])
    weighed, _ = few.mean_flow_loss(u, X, NOISE, S, T)
    assert 0.99 < weighed < 1  # |e|^2 / (|e|^2 + 0.01) of an error that is large


def test_the_edm_consistency_model_is_the_identity_at_its_clean_end():
    f = few.edm_consistency_model(lambda x, noise: 3 * x + noise.reshape(-1, 1, 1, 1), sigma_min=0.002)
    for sigma in (0.002, 0.001, 0.0):  # easy tuning draws neighbours down to the clean image
        np.testing.assert_allclose(f(X, sigma), X, rtol=1e-6)
    sigma, d = 2.0, 0.5
    noise = np.log(sigma) / 4
    c_in, c_out = 1 / np.hypot(sigma, d), d * (sigma - 0.002) / np.hypot(sigma, d)
    c_skip = d**2 / ((sigma - 0.002) ** 2 + d**2)
    np.testing.assert_allclose(f(X, sigma), c_skip * X + c_out * (3 * c_in * X + noise), rtol=1e-5)


def test_pseudo_huber():
    error = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(few.pseudo_huber(0.0)(error), [5.0, 0.0])
    np.testing.assert_allclose(few.pseudo_huber(2.0)(error), [np.sqrt(29) - 2, 0.0], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda e: few.pseudo_huber(0.0)(e).sum())(error)).all()


def test_straightness():
    t = jnp.array([1.0, 0.75, 0.25, 0.0])
    line = X[None] + t.reshape(-1, 1, 1, 1, 1) * NOISE[None]
    assert few.straightness(line, t) == pytest.approx(0, abs=1e-9)
    bent = line + (t**2).reshape(-1, 1, 1, 1, 1)  # slopes 2t at the middles less their mean 1
    expected = sum((b - a) * (a + b - 1) ** 2 for a, b in ((0, 0.25), (0.25, 0.75), (0.75, 1)))
    assert few.straightness(bent, t) == pytest.approx(expected, rel=1e-4)


def test_backward_simulation_visits_the_generators_own_states():
    path, times = D.ContinuousVP(), jnp.array([0.99, 0.7, 0.3])
    generator = lambda x, t: 0.5 * x  # noqa: E731
    run = jax.jit(lambda row: few.backward_simulation(KEY, generator, path, NOISE, times, row))
    np.testing.assert_array_equal(run(0), NOISE)
    x = NOISE
    for row in (1, 2):
        fresh = jax.random.normal(jax.random.fold_in(KEY, row - 1), x.shape)
        x = path.alpha(times[row]) * 0.5 * x + path.sigma(times[row]) * fresh
        np.testing.assert_allclose(run(row), x, rtol=1e-5, atol=1e-6)
    assert run._cache_size() == 1  # one program for every row
    through = jax.grad(lambda noise: few.backward_simulation(KEY, generator, path, noise, times, 2).sum())
    assert np.abs(through(NOISE)).max() == 0


def test_drift_pulls_to_data_and_vanishes_where_both_are_one_set():
    one, two, far = jax.random.normal(KEY, (3, 256, 2))
    together, _ = few.drift(one, two)
    pulled, _ = few.drift(one + jnp.array([[3.0, 0.0]]), far)
    assert pulled[:, 0].mean() < -1  # back to the left
    assert abs(together.mean(0)).max() < 0.3 * abs(pulled.mean(0)).max()


def test_the_force_between_draws_of_one_distribution_averages_out():
    # Its mean over draws falls as 1 / sqrt(draws); that of attraction alone stays, inwards.
    samples, data = jax.random.normal(KEY, (2, 1024, 16, 2))
    force, _ = jax.jit(jax.vmap(few.drift))(samples, data)
    outwards = jnp.sum(force * samples, axis=-1)
    draws = 4 ** np.arange(4)
    for part in np.asarray([force[..., 0], force[..., 1], outwards]).mean(-1):
        sizes = [np.sqrt(np.mean(part.reshape(-1, count).mean(1) ** 2)) for count in draws]
        assert np.polyfit(np.log(draws), np.log(sizes), 1)[0] == pytest.approx(-0.5, abs=0.12)


def test_drift_is_antisymmetric_and_does_not_know_the_origin():
    # Two points and one datum: repulsion off the other point, attraction to the datum, with equal weights.
    samples, data = jnp.array([[0.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0]])
    force, unit = few.drift(samples, data, radii=(1.0,))
    moved, same = few.drift(samples + 5, data + 5, radii=(1.0,))
    np.testing.assert_allclose(force, moved, atol=1e-4)
    assert unit == pytest.approx(float(same), rel=1e-4)
    # For sample 0 both weights are A+ A-, so it moves along (datum - other) = (1, -1).
    assert force[0, 0] == pytest.approx(-float(force[0, 1]), rel=1e-5)
    assert jnp.mean(force**2) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("loss_of", [few.mean_flow_loss, few.improved_mean_flow_loss])
def test_examples_without_an_interval_need_no_derivative(loss_of):
    """The loss and its gradient are the same, and only the others are derived."""
    r, t = few.interval_times(KEY, 8)
    r, t = r.at[6:].set(0.0), t.at[6:].set(1.0)
    derived = []

    @jax.custom_jvp
    def seen(x):
        return x

    @seen.defjvp
    def _(primals, tangents):
        derived.append(len(primals[0]))
        return primals[0], tangents[0]

    def loss(theta, still):
        def u(z, r, t, condition):
            return theta * seen(z) ** 2 + (condition * t - r)[:, None, None, None]

        return loss_of(u, X, NOISE, r, t, S, still=still, power=0.0)[0]

    for still, expected in ((0, [8]), (6, [2]), (8, [])):
        derived.clear()
        loss(0.3, still)
        assert derived == expected
    whole, parts, none = (jax.value_and_grad(loss)(0.3, still) for still in (0, 6, 8))
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
    assert none[0] != pytest.approx(float(whole[0]), rel=1e-3)  # here two have an interval

    def of_number(still):
        network = lambda z, r, t, condition: condition * z  # noqa: E731
        return loss_of(network, X, NOISE, r, t, 0.5, still=still, power=0.0)[0]

    np.testing.assert_allclose(of_number(0), of_number(6), rtol=1e-5)  # a number is that of all examples
    with pytest.raises(InvalidArgumentError, match="still must be from 0 to the 8 examples"):
        loss_of(lambda z, *rest: z, X, NOISE, r, t, still=9)


def test_the_condition_is_not_asked_for_where_it_has_no_part():
    asked = []

    def u(z, r, t, condition):
        asked.append(float(condition[0]))
        return z

    few.guided_velocity(u, X, T, NOISE, jnp.ones(8), jnp.zeros(8), 1.5)
    assert asked == [0]
    few.guided_velocity(u, X, T, NOISE, jnp.ones(8), jnp.zeros(8), 1.5, 0.5)
    assert asked == [0, 0, 1]


def test_the_gradient_of_drifting_is_its_force():
    samples, data = jax.random.normal(KEY, (2, 32, 3))
    force, unit = few.drift(samples, data)
    gradient = jax.grad(lambda samples: few.drifting_loss(samples, data)[0])(samples)
    np.testing.assert_allclose(gradient, -2 * force / unit / samples.size, rtol=1e-4, atol=1e-7)


def test_a_batch_has_one_shape_or_one_number_for_each_example():
    x = np.zeros((4, 3))
    check_batch(x=x, t=np.zeros(4), epsilon=x, weight=None, scale=np.float32(0.5))
    for wrong, words in (
        ({"t": np.zeros(3)}, r"x \[4, 3\], t \[3\]: t must be one number for each example, \[4\]"),
        ({"epsilon": np.zeros((4, 2))}, r"x \[4, 3\], epsilon \[4, 2\]: epsilon must be as x is"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            check_batch(x=x, y=x, **wrong)


VP = D.v(D.VP.named("linear", num_train_timesteps=10))
OF_TIMESTEPS = {
    "noised": lambda p, t, s: few.noised(p.path, X, NOISE, t),
    "DDIM's step": lambda p, t, s: few.ddim_jump(D.gaussian_denoiser(p.path))(X, t, s),
    "Heun's step": lambda p, t, s: few.heun_jump(D.gaussian_denoiser(p.path))(X, t, s),
    "progressive": lambda p, t, s: few.progressive_loss(
        scaled(0.5), few.ddim_jump(D.gaussian_denoiser(p.path)), p, X, NOISE, t, s + 1, s
    ),
    "guidance": lambda p, t, s: few.guidance_distillation_loss(
        scaled(0.5), scaled(0.7), p, X, NOISE, t, 1 + s, T, S
    ),
    "reflow": lambda p, t, s: few.reflow_loss(scaled(0.5), p, X, NOISE, t),
    "consistency": lambda p, t, s: few.consistency_loss(
        D.Denoiser(scaled(0.5), p.path), scaled(0.7), X, t, NOISE, s, weight=t - s
    ),
    "distribution matching": lambda p, t, s: few.distribution_matching_gradient(
        scaled(0.5), scaled(0.7), X, p.path, NOISE, t
    ),
}


@pytest.mark.parametrize("name", OF_TIMESTEPS)
def test_whole_numbers_are_timesteps_of_paths_that_have_them(name):
    t, s = jnp.arange(3, 11, dtype=jnp.int32) % 10, jnp.arange(8, dtype=jnp.int32) // 4
    t = jnp.maximum(t, 3)
    whole, floats = (OF_TIMESTEPS[name](VP, *times) for times in ((t, s), (t.astype(float), s.astype(float))))
    jax.tree.map(np.testing.assert_array_equal, whole, floats)
    with pytest.raises(InvalidArgumentError, match=r"t must be .* flow path has no timesteps, got .* int32$"):
        OF_TIMESTEPS[name](FLOW, t, s)


OF_FLOATS = {
    "mean flow": ("rt", lambda r, t: few.mean_flow_loss(scaled(0.5), X, NOISE, r, t)),
    "improved mean flow": ("rt", lambda r, t: few.improved_mean_flow_loss(scaled(0.5), X, NOISE, r, t)),
    "guided velocity": ("t", lambda t: few.guided_velocity(scaled(0.5), X, t, NOISE, T, S, 1.5)),
    "shortcut": ("td", lambda t, d: few.shortcut_loss(scaled(0.5), X, NOISE, t, d, X[:2])),
    "target of shortcut": ("td", lambda t, d: few.shortcut_target(scaled(0.5), X, t, d)),
    "continuous": ("t", lambda t: few.continuous_consistency_loss(scaled(0.5), X, t, NOISE)),
    "its function": ("t", lambda t: few.trig_consistency(scaled(0.5), X, t)),
    "its teacher": ("t", lambda t: few.trig_teacher_slope(scaled(0.5), X, t)),
    "easy times": ("t", lambda t: few.easy_times(t, 1)),
}


@pytest.mark.parametrize("name", OF_FLOATS)
def test_whole_numbers_are_no_times_of_a_loss_with_a_path_of_its_own(name):
    arguments, loss = OF_FLOATS[name]
    for place, wrong in enumerate(arguments):
        times = [T] * len(arguments)
        times[place] = jnp.ones(8, jnp.int32)
        words = rf"{wrong} must be an array of floating-point numbers \[B\], got an array \[8\] of int32$"
        with pytest.raises(InvalidArgumentError, match=words):
            loss(*times)


def test_one_line_for_what_cannot_be():
    for jump in (few.ddim_jump, few.heun_jump):
        with pytest.raises(InvalidArgumentError, match=r"D\.denoiser\(network, prediction\)"):
            jump(lambda x, t: x)
    with pytest.raises(InvalidArgumentError, match="a quarter is usual"):
        few.shortcut_loss(scaled(1.0), X, NOISE, T, S, X)
    with pytest.raises(InvalidArgumentError, match="must have the shape"):
        few.progressive_loss(lambda x, t, c: x[..., :0], jump_of(1.0), FLOW, X, NOISE, T, T, S)
    for ends in ((), (0.1,), (1.5, 0.1), (0.0, 1.0, 1.5)):
        with pytest.raises(InvalidArgumentError, match="ends must be two times, the lower first"):
            few.continuous_consistency_loss(scaled(1.0), X, T, X, difference=0.1, ends=ends)
