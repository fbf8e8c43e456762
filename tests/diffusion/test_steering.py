"""Feynman-Kac steering: on Gaussian data with a linear reward the tilted law is Gaussian, and known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from affine_runs import moments_of
from compilations import compilations
from solver_kinds import DISTILLED, NOISY

from jaxldm import diffusion as D
from jaxldm.diffusion.search import steering
from jaxldm.errors import InvalidArgumentError, JaxldmError
from jaxldm.nn.reuse import Session

PATH, KEY, STEPS = D.Flow(), jax.random.key(5), 10
GRID, SOLVER = D.make_grid(PATH, STEPS), D.solvers.ddpm()
MEAN, STD = np.array([0.5, -0.3, 0.0]), np.array([0.4, 0.6, 1.1])
DENOISE = D.gaussian_denoiser(PATH, MEAN, STD)
PARTICLES, REWARDS, REPEATS = 256, 20, 48


def drawn(weights):
    """(u -> counts of each particle) by systematic resampling."""

    def counts(key):
        index = D.search.systematic_resampling(key, jnp.log(weights))
        return jnp.bincount(index, length=len(weights))

    return counts


def test_systematic_resampling():
    """Each count is N w rounded up or down, and N w on average."""
    rng, keys = np.random.default_rng(0), jax.random.split(KEY, 4000)
    weights = jnp.asarray([*rng.dirichlet(np.full(9, 0.5), 3), np.eye(9)[4], np.full(9, 1 / 9)], jnp.float32)
    counts = np.asarray(jax.jit(jax.vmap(lambda w: jax.vmap(drawn(w))(keys)))(weights), np.float64)
    wanted = 9 * np.asarray(weights, np.float64)[:, None]
    assert (counts.sum(2) == 9).all() and (np.abs(counts - wanted) < 1 + 1e-5).all()
    share = wanted - np.floor(wanted)
    np.testing.assert_array_less(
        np.abs(counts.mean(1) - wanted[:, 0]), 3.5 * np.sqrt(share * (1 - share) / 4000)[:, 0] + 1e-6
    )


def test_effective_sample_size():
    size = D.search.effective_sample_size
    assert float(size(jnp.full(8, -300.0))) == pytest.approx(8, rel=1e-4)
    assert float(size(jnp.array([0.0, -jnp.inf, -200.0]))) == pytest.approx(1)
    assert float(size(jnp.log(jnp.array([0.5, 0.25, 0.25])))) == pytest.approx(1 / (0.25 + 2 / 16))


@pytest.fixture(scope="module")
def tilted():
    """potential -> (weighted mean of x - mu, weighted covariance about mu), [rewards, repeats, ...]."""
    a = np.random.default_rng(1).normal(size=(REWARDS, 3))
    mean, variance = moments_of(SOLVER, DENOISE, MEAN, STD, STEPS)(GRID)
    directions = jnp.asarray(np.repeat(a, REPEATS, 0), jnp.float32)

    def draw(potential):
        # A sum of rewards goes too far, and then all weight is on the few that come back.
        most = {"difference": 1.2, "max": 0.8, "sum": 0.3}[potential]
        scale = np.random.default_rng(2).uniform(0.25, 1, REWARDS) * most
        target = mean + scale[:, None] * a * variance
        x_T = D.search.candidate_noise(KEY, (REWARDS * REPEATS, 3), GRID, PARTICLES)
        found = D.search.steer(
            KEY,
            DENOISE,
            SOLVER,
            GRID,
            x_T,
            lambda x: jnp.sum(x * directions, axis=1),
            reward_scale=np.repeat(scale, REPEATS),
            potential=potential,
            steer_at=D.search.steering_steps(GRID, 0.0, 1.0, every=3),
            threshold=0.9,
        )
        assert (found.resamplings > 0).mean() > 0.3  # or else this is importance sampling
        weights, x = np.exp(np.asarray(found.log_weights, np.float64)), np.asarray(found.candidates)
        off = x - np.repeat(target, REPEATS, 0)
        first = np.einsum("nb,nbi->bi", weights, off).reshape(REWARDS, REPEATS, 3)
        second = np.einsum("nb,nbi,nbj->bij", weights, off, off).reshape(REWARDS, REPEATS, 3, 3)
        return a, first, second - np.diag(variance)

    return draw


def errors(values):
    """Of the mean over the repeats, in standard errors, for each reward."""
    return values.mean(1) / (values.std(1, ddof=1) / REPEATS**0.5)


@pytest.mark.parametrize("potential", D.search.POTENTIALS)
def test_steering_hits_the_tilted_gaussian(tilted, potential):
    """Mean mu + lambda S a, covariance S, for 20 random rewards a: within three standard errors."""
    a, first, second = tilted(potential)
    along = errors(np.einsum("rki,ri->rk", first, a))
    spread = errors(np.einsum("rkij,ri,rj->rk", second, a, a))
    assert np.abs(along).max() < 3 and np.abs(spread).max() < 3, (along, spread)
    every = np.concatenate([errors(first).ravel(), errors(second).ravel()])
    assert np.sqrt(np.mean(every**2)) < 1.25 and np.abs(every).max() < 4.5


def reward(images):
    return images.sum((1, 2, 3))


SHAPE, MANY = (2, 2, 2, 1), 8
PIXELS = D.gaussian_denoiser(PATH, 0.3, 0.8)


def steer(key=KEY, grid=GRID, solver=SOLVER, score=reward, **options):
    x_T = D.search.candidate_noise(key, SHAPE, grid, MANY)
    return D.search.steer(key, PIXELS, solver, grid, x_T, score, **options)


@pytest.fixture(scope="module")
def plain():
    x_T = D.search.candidate_noise(KEY, SHAPE, GRID, MANY)
    return D.search.best_of_n(KEY, PIXELS, SOLVER, GRID, x_T, reward)


@pytest.mark.parametrize("potential", D.search.POTENTIALS)
def test_without_resampling_it_is_importance_sampling(plain, potential):
    found = steer(potential=potential, reward_scale=2.0, threshold=0.0)
    np.testing.assert_allclose(found.candidates, plain.candidates, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.x_0, plain.x_0, rtol=1e-5, atol=1e-6)
    expected = jax.nn.log_softmax(2 * plain.scores, axis=0)
    np.testing.assert_allclose(found.log_weights, expected, rtol=1e-3, atol=1e-3)
    assert not found.resamplings.any()


def test_resampled_particles_have_ancestors_and_part_again():
    last = np.arange(STEPS) == STEPS - 1  # no noise follows: duplicates are seen
    found = steer(reward_scale=20.0, threshold=1.0, steer_at=last)
    assert (found.resamplings == 1).all()
    x = np.asarray(found.candidates)
    assert all(len(np.unique(x[:, b].reshape(MANY, -1), axis=0)) < MANY for b in range(2))
    found = steer(reward_scale=20.0, threshold=1.0, steer_at=np.arange(STEPS) == 5)
    x = np.asarray(found.candidates)
    assert all(len(np.unique(x[:, b].reshape(MANY, -1), axis=0)) == MANY for b in range(2))


def test_scales_are_of_each_image():
    found = steer(reward_scale=jnp.array([0.0, 5.0]), threshold=0.9)
    assert found.resamplings[0] == 0 and found.resamplings[1] > 0
    np.testing.assert_allclose(found.log_weights[:, 0], -np.log(MANY), rtol=1e-4)


def test_solvers_that_remember_and_padding():
    """The history of a solver is resampled with its particle; padded steps change nothing."""
    solver = D.solvers.dpmpp_2m_sde()
    whole = steer(solver=solver, reward_scale=3.0, steer_at=np.arange(STEPS) % 2 == 0)
    padded = steer(
        solver=solver,
        grid=D.pad(GRID, STEPS + 3),
        reward_scale=3.0,
        steer_at=np.arange(STEPS + 3) % 2 == 0,
    )
    assert whole.resamplings.any()
    np.testing.assert_allclose(padded.candidates, whole.candidates, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(padded.log_weights, whole.log_weights, rtol=1e-3, atol=1e-3)


COMPUTED = []


def reusing(cache, memory, i, x, t, condition):
    """A network whose residual is another one for each image and branch, and may be reused."""
    session = Session(cache, memory, jnp.asarray(i, jnp.int32))

    def add(x):
        jax.debug.callback(lambda: COMPUTED.append(None))
        return x + 0.3 * jnp.sin(3 * x + condition[:, None, None, None])

    x, session = session.run("blocks", add, x, True)
    return x, session.left()


def guided(network):
    return D.denoiser(D.classifier_free_guidance(network, jnp.ones(2), 4.0, 2.0), D.v(PATH))


def test_what_a_cache_remembers_is_resampled_with_its_particle():
    """Under guidance the memory has two rows for an image: after two steps all particles are the best one."""
    denoise = D.cached_denoiser(reusing, guided, D.caching.at_steps([True, True, False, False, True]))
    solver, grid = D.cached(SOLVER, denoise), D.make_grid(PATH, 5)
    x_T, keys = D.search.candidate_noise(KEY, SHAPE, grid, 3), D.search.candidate_keys(KEY, 3, 2)
    options = {"reward_scale": 1e4, "threshold": 1.0, "steer_at": np.arange(5) == 1}
    COMPUTED.clear()
    found = jax.block_until_ready(D.search.steer(KEY, denoise, solver, grid, x_T, reward, **options))
    jax.effects_barrier()
    assert (found.resamplings == 1).all()
    assert len(COMPUTED) in (3, 3 * len(x_T))  # once a step, or for each particle: those that compute alone
    step = jax.jit(lambda keys, state, i: D.sample_step(keys, denoise, solver, grid, state, i))

    def advance(states, first, last):
        for i in range(first, last):
            pairs = [step(keys[n], state, jnp.int32(i)) for n, state in enumerate(states)]
            states = [state for state, _ in pairs]
        return states, jnp.stack([reward(x_0) for _, x_0 in pairs])

    states, rewards = advance([solver.init(x) for x in x_T], 0, 2)
    best = np.argmax(np.asarray(rewards), axis=0)
    assert len(set(best)) == 2  # another particle for each image

    def chosen(*leaves):
        rows = [leaves[best[row % 2]][row] for row in range(len(leaves[0]))] if leaves[0].ndim else leaves[0]
        return jnp.asarray(rows)

    states, _ = advance([jax.tree.map(chosen, *states)] * 3, 2, 5)
    np.testing.assert_allclose(found.candidates, [state.x for state in states], rtol=1e-4, atol=1e-5)


def test_rewards_that_are_not_finite():
    found = steer(score=lambda x: jnp.where(reward(x) < 1, jnp.nan, -jnp.inf), reward_scale=1.0)
    assert np.isfinite(found.log_weights).all()
    np.testing.assert_allclose(jnp.exp(found.log_weights).sum(0), 1, rtol=1e-4)


def test_steering_steps():
    steps = D.search.steering_steps
    assert steps(GRID).tolist() == [False] * 2 + [True] * 6 + [False] * 2
    assert steps(GRID, 0.0, 1.0, every=4).nonzero()[0].tolist() == [0, 4, 8]
    padded = steps(D.pad(GRID, 15))
    assert padded.nonzero()[0].tolist() == [2, 3, 4, 5, 6, 7]
    traced = jax.jit(lambda n: steps(D.pad(GRID, 15)._replace(num_steps=n)))(jnp.int32(10))
    np.testing.assert_array_equal(traced, padded)


def test_other_numbers_compile_nothing():
    def run(seed, grid, **options):
        return steer(jax.random.key(seed), D.pad(grid, STEPS), **options)

    first = run(0, GRID, reward_scale=np.array([1.0, 1.0], np.float32), threshold=0.5)
    # Everything that is not the program: the noise of the new grid, and so on.
    D.search.candidate_noise(jax.random.key(1), SHAPE, D.pad(D.make_grid(PATH, 7), STEPS), MANY)
    for options in (
        {"reward_scale": 4.0},
        {"threshold": 0.9},
        {"reward_scale": np.array([0.5, 2.0], np.float32), "threshold": 0.3},
        {"steer_at": np.arange(STEPS) % 3 == 0},
    ):
        assert compilations(lambda o=options: run(1, D.make_grid(PATH, 7), **o)) == 0, options
    assert not np.allclose(first.x_0, run(1, GRID).x_0)


def test_only_solvers_that_draw_noise_steer():
    x, keys = jnp.zeros((1, 2, 2, 1)), D.image_keys(KEY, 1)
    grid = D.Grid(*map(jnp.asarray, GRID[:3]))
    for name in D.solvers.SOLVERS:
        arguments = (D.solvers.make(name), PIXELS, grid, keys, x)
        if name in NOISY | DISTILLED | {"restart"}:  # restart draws noise where a grid rises
            steering._check_draws_noise(*arguments)
        else:
            with pytest.raises(InvalidArgumentError, match="solver must draw noise"):
                steering._check_draws_noise(*arguments)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"solver": D.solvers.ddim()}, r"write D.solvers.ddpm\(\)"),
        ({"potential": "mean"}, "unknown potential 'mean'"),
        ({"reward_scale": -1.0}, "reward_scale must be a finite number from 0 to 1e\\+30, got -1"),
        ({"reward_scale": np.ones(3)}, "reward_scale"),
        ({"threshold": 1.5}, "threshold must be a finite number from 0 to 1, got 1.5"),
        ({"steer_at": np.ones(3, bool)}, "one for each of 10 steps"),
        ({"steer_at": np.ones(STEPS)}, "truth values"),
        ({"score": lambda x: x}, "reward must return one floating-point number for each image"),
        ({"score": lambda x: reward(x) * jnp.nan}, "reward gave NaN for every candidate of image 0"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_refusals(options, words):
    with pytest.raises(JaxldmError, match=words):
        steer(**options)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: D.search.steering_steps(GRID, 0.8, 0.2),
            "choose none of 10 steps: first must be below last",
        ),
        (lambda: D.search.steering_steps(GRID, every=100), "every=100 choose none"),
        (lambda: D.search.systematic_resampling(KEY, jnp.array([0.0, jnp.nan])), "neither NaN nor inf"),
        (lambda: D.search.effective_sample_size(jnp.full(2, -jnp.inf)), "one of them above 0"),
    ],
)
def test_nothing_to_steer_or_to_draw_from(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()
