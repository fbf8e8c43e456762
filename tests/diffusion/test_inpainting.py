import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler
from diffusers.schedulers import scheduling_repaint

from jaxldm import diffusion as D
from jaxldm.diffusion.inpainting import _KNOWN_NOISE
from jaxldm.diffusion.solvers.restart import restart
from jaxldm.errors import InvalidArgumentError

VP, EDM, FLOW = D.VP(D.linear_betas()), D.EDM(), D.Flow()
KEY = jax.random.key(4)
SHAPE = (3, 4, 4, 1)
IMAGE = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
HALF = np.broadcast_to((np.arange(4) < 2).astype(np.float32)[:, None, None], (4, 4, 1)).copy()
MAX_STEPS = 40


def network(x, t):
    return jnp.sin(2 * x + 0.3 * jnp.roll(x, 1, axis=1)) + 0.001 * t.reshape(-1, 1, 1, 1)


DENOISERS = {path: D.denoiser(network, D.v(path)) for path in (VP, EDM, FLOW)}


@functools.cache
def runner(name, path):
    """A compiled run(grid, x, image, mask)."""

    def run(grid, x, image, mask):
        return D.sample(KEY, DENOISERS[path], D.inpaint(D.solvers.make(name), image, mask), grid, x)

    return jax.jit(run)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("path", [VP, EDM, FLOW], ids=["vp", "edm", "flow"])
def test_all_known_is_the_image_and_nothing_known_plain_sampling(name, path):
    if name != "ddpm" and path is not VP:
        pytest.skip("one path will do for the others")
    grid = D.make_grid(path, 6)
    x = D.initial_noise(KEY, SHAPE, grid)
    run = runner(name, path)
    for walk in (grid, D.resampling_grid(grid, 2, 3)):
        known = run(D.pad(walk, MAX_STEPS), x, IMAGE, np.ones(SHAPE, np.float32))
        np.testing.assert_array_equal(known, IMAGE)
    plain = jax.jit(lambda grid: D.sample(KEY, DENOISERS[path], D.solvers.make(name), grid, x))
    drawn = run(D.pad(grid, MAX_STEPS), x, IMAGE, np.zeros(SHAPE, np.float32))
    np.testing.assert_array_equal(drawn, plain(D.pad(grid, MAX_STEPS)))


def test_half_an_image():
    # From pure noise to the clean row, with a jump back up to pure noise.
    grid = D.resampling_grid(D.make_grid(FLOW, 8), 3, 2)
    x = D.initial_noise(KEY, SHAPE, grid)
    one = runner("ddpm", FLOW)(D.pad(grid, MAX_STEPS), x, IMAGE, np.broadcast_to(HALF, SHAPE))
    np.testing.assert_array_equal(one[:, :2], IMAGE[:, :2])
    assert np.isfinite(one).all() and np.abs(one[:, 2:] - IMAGE[:, 2:]).min() > 1e-6
    # Another known half changes the drawn one: the network looks at it.
    other = runner("ddpm", FLOW)(D.pad(grid, MAX_STEPS), x, -IMAGE, np.broadcast_to(HALF, SHAPE))
    assert np.abs(one[:, 2:] - other[:, 2:]).max() > 1e-2


RHO, KNOWN = 0.9, 1.5
COVARIANCE = np.array([[1, RHO], [RHO, 1]])


def exact_moments(grid):
    """Mean and standard deviation of the drawn one of two Gaussian pixels: every move is linear in them."""
    mean, variance = np.zeros(2), grid.sigma[0] ** 2 * np.eye(2)
    rows = list(zip(grid.alpha.astype(float), grid.sigma.astype(float), strict=True))
    for (a, s), (a_next, s_next) in itertools.pairwise(rows):
        if s_next > s:
            ratio = a_next / a
            mean, variance = ratio * mean, ratio**2 * variance + (s_next**2 - (ratio * s) ** 2) * np.eye(2)
            continue
        to_x0 = a * COVARIANCE @ np.linalg.inv(a**2 * COVARIANCE + s**2 * np.eye(2))
        q = (
            s_next * a / (s * a_next)
        )  # DDPM: a_next x_0 + q s_next eps, and the rest of s_next as fresh noise
        move = a_next * to_x0 + q * s_next * (np.eye(2) - a * to_x0) / s
        mean, variance = move @ mean, move @ variance @ move.T + (1 - q**2) * s_next**2 * np.eye(2)
        mean[0], variance = a_next * KNOWN, np.diag([s_next**2, variance[1, 1]])
    return mean[1], variance[1, 1] ** 0.5


def test_resampling_brings_both_parts_to_agree():
    """Two correlated pixels, one known: the mean of the other should be rho times it."""

    def denoise(x, t):  # E[x_0 | x_t], every pixel with its neighbour
        a, s, covariance = FLOW.alpha(t), FLOW.sigma(t), jnp.asarray(COVARIANCE, x.dtype)
        return x @ jnp.linalg.solve(a**2 * covariance + s**2 * jnp.eye(2), a * covariance)

    @jax.jit
    def run(grid, x):
        solver = D.inpaint(D.solvers.ddpm(), jnp.array([KNOWN, 0.0]), jnp.array([1.0, 0.0]))
        return D.sample(KEY, denoise, solver, grid, x)[:, 1]

    grid, batch, errors = D.make_grid(FLOW, 25), 4000, []
    x = D.initial_noise(KEY, (batch, 2), grid)
    for jump_length, resamplings in ((5, 1), (5, 4), (2, 20)):
        walk = D.resampling_grid(grid, jump_length, resamplings)
        pixels = np.asarray(run(D.pad(walk, 720), x))
        mean, std = exact_moments(walk)
        assert pixels.mean() == pytest.approx(mean, abs=5 * std / batch**0.5)
        assert pixels.std() == pytest.approx(std, rel=5 / (2 * batch) ** 0.5)
        errors.append(abs(mean - RHO * KNOWN))
    # Replacement alone ignores a third of what is known; resampling finds it.
    assert errors[0] > 0.4 and errors[1] < 0.15 and errors[2] < 0.03


@pytest.mark.parametrize("steps, jump_length, resamplings", [(20, 3, 2), (20, 10, 3), (7, 1, 4), (9, 8, 2)])
def test_the_jumps_are_those_of_diffusers(steps, jump_length, resamplings):
    scheduler = RePaintScheduler(num_train_timesteps=steps)
    scheduler.set_timesteps(steps, jump_length, resamplings)
    path = D.VP(D.linear_betas(steps))
    t = D.resampling_grid(D.make_grid(path, steps), jump_length, resamplings).t.astype(int)
    # They climb one timestep after the other; ours in one, and the end is a row of its own.
    singly = [t[0]]
    for one in t[1:-1]:
        singly += list(range(singly[-1] + 1, one + 1)) if one > singly[-1] else [one]
    assert singly == scheduler.timesteps.tolist() and t[-1] == -1


def test_every_move_is_that_of_diffusers(monkeypatch):
    """The same rows, the same noise; eta = 0, because the reference uses one noise twice otherwise."""
    steps = 12
    scheduler = RePaintScheduler(num_train_timesteps=steps, eta=0.0, clip_sample=False)
    scheduler.set_timesteps(steps, 3, 2)
    path = D.VP(D.linear_betas(steps))
    labels = scheduler.timesteps.tolist()
    # Where the reference's image is: after the step at t it is at t - 1, and each move up raises that by one.
    levels, before = [labels[0]], labels[0] + 1
    for t in labels:
        levels.append(levels[-1] + (1 if t > before else -1))
        before = t
    at = np.array(levels, np.float64)
    grid = D.Grid(*(column.astype(np.float32) for column in (at, path.alpha(at), path.sigma(at))))
    keys = D.image_keys(KEY, 3)
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    denoise, mask = D.denoiser(network, D.epsilon(path)), np.broadcast_to(HALF, SHAPE)
    ours = jax.jit(lambda grid: D.sample(keys, denoise, D.inpaint(D.solvers.ddim(), IMAGE, mask), grid, x))(
        D.pad(grid, MAX_STEPS)
    )

    def noise(i, known):
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
        if known:
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(step_keys, np.uint32(_KNOWN_NOISE))
        return torch.from_numpy(np.array(D.solvers.noise_like(step_keys, jnp.zeros(SHAPE))))

    theirs, before = torch.from_numpy(x), labels[0] + 1
    ask = jax.jit(network)
    for i, t in enumerate(labels):
        up = t > before
        drawn = noise(i, known=not up)
        monkeypatch.setattr(scheduling_repaint, "randn_tensor", lambda *a, drawn=drawn, **k: drawn)
        if up:
            theirs = scheduler.undo_step(theirs, before)
        else:
            output = torch.from_numpy(np.array(ask(theirs.numpy(), jnp.full(3, t, jnp.float32))))
            theirs = scheduler.step(
                output, t, theirs, torch.from_numpy(IMAGE), torch.from_numpy(mask.copy()), return_dict=False
            )[0]
        before = t
    assert sum(np.diff(labels) > 0) > 0
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=1e-3)


def test_diffusers_adds_the_noise_of_other_timesteps(monkeypatch):
    """With fewer steps than timesteps its way back up starts too high by one step's worth of betas."""
    scheduler = RePaintScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(10)
    monkeypatch.setattr(scheduling_repaint, "randn_tensor", lambda shape, **options: torch.zeros(shape))
    low, high = 40, 50  # its image is at 40 when it undoes the step that it took at 50
    theirs = float(scheduler.undo_step(torch.ones(1), high))
    path = D.VP(D.linear_betas(100))
    at = np.array([low, high], np.float64)
    grid = D.Grid(*(column.astype(np.float32) for column in (at, path.alpha(at), path.sigma(at))))
    rise = D.sample(KEY, network, restart(s_noise=0.0), grid, jnp.ones((1, 4, 4, 1)))
    exact = path.alpha(high) / path.alpha(low)
    np.testing.assert_allclose(rise, exact, rtol=1e-5)
    assert abs(theirs - exact) > 0.005


def test_one_key_per_image_and_nothing_compiles_again():
    traces = []

    @jax.jit
    def run(keys, grid, x, image, mask):
        traces.append(1)
        return D.sample(keys, DENOISERS[VP], D.inpaint(D.solvers.ddpm(), image, mask), grid, x)

    keys, order = D.image_keys(KEY, 3), jnp.array([2, 0, 1])
    grid = D.pad(D.resampling_grid(D.make_grid(VP, 6), 2, 2), MAX_STEPS)
    x, mask = D.initial_noise(keys, SHAPE, grid), jnp.asarray(HALF)
    images = run(keys, grid, x, IMAGE, mask)
    shuffled = run(keys[order], grid, x[order], IMAGE[order], mask)
    np.testing.assert_allclose(shuffled, images[order], rtol=1e-4, atol=1e-5)
    other = D.pad(D.resampling_grid(D.make_grid(VP, 9), 4, 3), MAX_STEPS)
    assert not np.allclose(run(keys, other, x, -IMAGE, 1 - mask), images)
    assert len(traces) == 1


def test_cutting_a_run_with_jumps_changes_nothing():
    grid = D.resampling_grid(D.make_grid(VP, 6), 2, 2)
    x, mask = D.initial_noise(KEY, SHAPE, grid), np.broadcast_to(HALF, SHAPE)
    run = runner("ddpm", VP)
    whole = run(D.pad(grid, MAX_STEPS), x, IMAGE, mask)
    first = run(D.pad(D.cut(grid, 0, 5), MAX_STEPS), x, IMAGE, mask)
    np.testing.assert_array_equal(run(D.pad(D.cut(grid, 5), MAX_STEPS), first, IMAGE, mask), whole)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda grid: D.inpaint(D.solvers.ddpm(), IMAGE, 2 * HALF), "from 0"),
        (lambda grid: D.inpaint(D.solvers.ddpm(), IMAGE, np.nan * HALF), "from 0"),
        (lambda grid: D.inpaint(D.solvers.ddpm(), np.inf * IMAGE, HALF), "finite"),
        (lambda grid: runner("ddpm", VP)(grid, jnp.ones(SHAPE), IMAGE, np.ones((4, 5, 1))), "mask"),
        (lambda grid: runner("ddpm", VP)(grid, jnp.ones(SHAPE), np.ones((2, 4, 4, 1)), HALF), "image"),
        (lambda grid: D.resampling_grid(grid, 4, 2), "jump_length must be from 1 to 3"),
        (lambda grid: D.resampling_grid(grid, 2, 0), "resamplings"),
        (lambda grid: D.resampling_grid(D.pad(grid, 9), 2, 2), "before padding"),
    ],
)
def test_impossible_inpainting_is_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call(D.make_grid(VP, 4))
