"""Students of a teacher on a plane, which is the exact denoiser: each with the map that its loss teaches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.few_steps.plane import (
    POINTS,
    SAMPLES,
    Data,
    distribution_error,
    map_error,
    noise_at,
)
from experiments.few_steps.small_networks import Loss, Params, Training, init_network, network
from jaxldm import diffusion as D
from jaxldm import few_steps as few
from jaxldm.diffusion.paths import per_image

BATCH = 512
MAP, DISTRIBUTION = "map", "distribution"


class Method(NamedTuple):
    """A student and how it is judged.

    Attributes:
        init: key -> its parameters.
        stages: its losses, one after the other.
        error: parameters -> the error, a part of the data's spread.
        judged: by what: `MAP` or `DISTRIBUTION`.
        how: of its training.
    """

    init: Callable[[Any], Params]
    stages: list[Loss]
    error: Callable[[Params], float]
    judged: str = MAP
    how: Training = Training()


def draws(data: Data, key: Any, batch: int = BATCH) -> tuple[Any, Any, Any]:
    """(x_0, eps, a key for times)."""
    data_key, noise_key, time_key = jax.random.split(key, 3)
    return data.draw(data_key, batch), jax.random.normal(noise_key, (batch, 2)), time_key


def every(t: Any, x: Any) -> Any:
    """One time for each point."""
    return jnp.full(len(x), t, jnp.float32)


def judge(run: Callable[[Params, Any], Any], noise: Any, exact: Any) -> Callable[[Params], float]:
    """parameters -> the error of the map run(params, noise)."""
    run = jax.jit(run)
    return lambda params: map_error(run(params, jnp.asarray(noise)), exact)


def chain(jump: few.jumps.Jump, times: Any) -> Callable[[Any], Any]:
    """x -> the end of a teacher's jumps through these times."""

    def run(x):
        for t, s in itertools.pairwise(times):
            x = jump(x, every(t, x), every(s, x))
        return x

    return run


def progressive(data: Data, steps: int = 32) -> Method:
    """From DDIM's `steps` to one, halved again and again; against the `steps` of the exact denoiser."""
    path = D.ContinuousVP()
    prediction, teacher = D.v(path), few.ddim_jump(data.denoiser(path))
    grids = [np.asarray(D.make_grid(path, steps).t)]
    while len(grids[-1]) > 2:
        grids.append(few.halve(grids[-1]))

    def student(params):
        return lambda x, t, condition=None: network(params, x, t)

    def stage(times, jump_of):
        def loss(params, average, start, key, progress):
            x_0, epsilon, key = draws(data, key)
            double = few.draw_double_steps(key, times, len(x_0))
            jump = jump_of(start)
            return few.progressive_loss(student(params), jump, prediction, x_0, epsilon, *double)[0]

        return loss

    def own(params):
        return few.ddim_jump(D.denoiser(student(params), prediction))

    stages = [stage(grids[0], lambda start: teacher), *(stage(times, own) for times in grids[1:-1])]
    noise = noise_at(path)
    exact = jax.jit(chain(teacher, grids[0]))(noise)
    run = lambda params, x: chain(own(params), grids[-1])(x)  # noqa: E731
    how = Training(updates=16000)
    return Method(lambda key: init_network(key, 1), stages, judge(run, noise, exact), how=how)


CLASSES = np.array([[-0.8, 0.2], [0.9, -0.3]])
CLASS_STD, HIGHEST = 0.5, 5.0


def _class_means(labels):
    return jnp.asarray(CLASSES, jnp.float32)[labels]


def _guided(path: D.Path, labels: Any, scale: Any) -> D.Denoiser:
    """The exact denoiser of two classes with guidance, of labels and scales [B]."""
    every_class = D.gaussian_mixture_denoiser(path, [0.5, 0.5], CLASSES, [CLASS_STD] * 2)

    def denoise(x, t):
        alpha, sigma = (per_image(of(t), x) for of in (path.alpha, path.sigma))
        own = (sigma**2 * _class_means(labels) + alpha * CLASS_STD**2 * x) / (
            alpha**2 * CLASS_STD**2 + sigma**2
        )
        return D.guide(every_class(x, t), own, scale)

    return D.Denoiser(denoise, path)


def guidance(data: Data) -> Method:
    """Two classes: the guided output at any scale from 1 to 5, over x_t of the data at even times."""
    path = D.ContinuousVP()
    prediction = D.v(path)

    def teacher(labels):
        def output(x, t, guided):
            scale = jnp.where(guided, 1.0, 0.0)
            return D.from_x0(prediction, _guided(path, labels, scale)(x, t), x, t)

        return output

    def draw(key, count=BATCH):
        keys = jax.random.split(key, 5)
        labels = jax.random.randint(keys[0], (count,), 0, 2)
        x_0 = _class_means(labels) + CLASS_STD * jax.random.normal(keys[1], (count, 2))
        epsilon, t = jax.random.normal(keys[2], (count, 2)), jax.random.uniform(keys[3], (count,))
        t = path.t_min + (1 - path.t_min) * t
        return labels, x_0, epsilon, t, few.draw_scales(keys[4], count, 1.0, HIGHEST)

    def student(params):
        return lambda x, t, labels, scale: network(params, x, t, labels, scale / HIGHEST)

    def loss(params, average, start, key, progress):
        labels, x_0, epsilon, t, scale = draw(key)
        call = lambda x, t, guided, w: student(params)(x, t, labels, w)  # noqa: E731
        yes, no = jnp.ones(BATCH, bool), jnp.zeros(BATCH, bool)
        return few.guidance_distillation_loss(
            call, teacher(labels), prediction, x_0, epsilon, t, scale, yes, no
        )[0]

    labels, x_0, epsilon, t, scale = draw(jax.random.key(9), POINTS)
    x_t = few.noised(path, x_0, epsilon, t)
    exact = D.from_x0(prediction, _guided(path, labels, scale)(x_t, t), x_t, t)
    run = lambda params, x: student(params)(x, t, labels, scale)  # noqa: E731
    return Method(lambda key: init_network(key, 3), [loss], judge(run, x_t, exact))


def latent_consistency(data: Data) -> Method:
    """From DDIM's 50 steps with guidance to one, the scale an input; against those 50 steps."""
    path = D.VP.named("scaled_linear")
    prediction = D.v(path)
    times = np.maximum(np.arange(50, -1, -1) * 20 - 1, 0)

    def student(params, labels, scale):
        output = lambda x, t: network(params, x, t / 1000, labels, scale / HIGHEST)  # noqa: E731
        return D.consistency_function(D.denoiser(output, prediction))

    def draw(key, count=BATCH):
        label_key, scale_key, key = jax.random.split(key, 3)
        labels = jax.random.randint(label_key, (count,), 0, 2)
        return labels, few.draw_scales(scale_key, count, 1.0, HIGHEST), key

    def loss(params, average, start, key, progress):
        labels, scale, key = draw(key)
        keys = jax.random.split(key, 3)
        x_0 = _class_means(labels) + CLASS_STD * jax.random.normal(keys[0], (BATCH, 2))
        row = jax.random.randint(keys[1], (BATCH,), 0, len(times) - 1)
        t, s = (jnp.asarray(times, jnp.float32)[row + k] for k in (0, 1))
        x_t = few.noised(path, x_0, jax.random.normal(keys[2], (BATCH, 2)), t)
        x_s = few.ddim_jump(_guided(path, labels, scale))(x_t, t, s)
        f, target = student(params, labels, scale), student(average, labels, scale)
        return few.consistency_loss(f, target, x_t, t, x_s, s, distance=few.pseudo_huber(0.001))[0]

    noise = noise_at(path)
    labels, scale, _ = draw(jax.random.key(9), len(noise))
    exact = jax.jit(chain(few.ddim_jump(_guided(path, labels, scale)), times))(noise)
    run = lambda params, x: student(params, labels, scale)(x, every(times[0], x))  # noqa: E731
    how = Training(updates=10000)
    return Method(lambda key: init_network(key, 3), [loss], judge(run, noise, exact), how=how)


def consistency_distillation(data: Data) -> Method:
    """From Heun's 17 steps to one; against those 17 steps."""
    path, sigmas = D.EDM(), few.karras_levels(18)
    jump = few.heun_jump(data.denoiser(path))

    def student(params):
        return few.edm_consistency_model(lambda x, noise: network(params, x, noise), 1.0)

    def loss(params, average, start, key, progress):
        x_0, epsilon, key = draws(data, key)
        t, s = few.draw_neighbours(key, sigmas, len(x_0))
        x_t = few.noised(path, x_0, epsilon, t)
        return few.consistency_loss(student(params), student(average), x_t, t, jump(x_t, t, s), s)[0]

    noise = noise_at(path)
    exact = jax.jit(chain(jump, sigmas[::-1]))(noise)
    run = lambda params, x: student(params)(x, every(sigmas[-1], x))  # noqa: E731
    how = Training(updates=8000)
    return Method(lambda key: init_network(key, 1), [loss], judge(run, noise, exact), how=how)


def reflow(data: Data) -> Method:
    """Pairs of noise and the exact end of its ODE; the line between them in one step."""
    path = D.Flow()
    prediction = D.flow(path)
    pairs_of = 8192
    noise = np.random.default_rng(7).standard_normal((pairs_of, 2)).astype(np.float32)
    samples = jnp.asarray(data.solve(path, noise), jnp.float32)

    def student(params):
        return lambda x, t, condition=None: network(params, x, t)

    def loss(params, average, start, key, progress):
        which_key, time_key = jax.random.split(key)
        which = jax.random.randint(which_key, (BATCH,), 0, pairs_of)
        t = few.u_shaped_times(time_key, BATCH)
        return few.reflow_loss(student(params), prediction, samples[which], jnp.asarray(noise)[which], t)[0]

    new = noise_at(path)
    run = lambda params, x: D.denoiser(student(params), prediction)(x, every(1.0, x))  # noqa: E731
    return Method(lambda key: init_network(key, 1), [loss], judge(run, new, data.solve(path, new)))


def distribution_matching(data: Data, times: tuple[float, ...] = (0.999,)) -> Method:
    """A generator against a critic of its own samples; the distance is that of distributions.

    With several times the generator is trained where it comes to itself (`backward_simulation`).
    """
    path = D.ContinuousVP()
    prediction, real = D.v(path), data.denoiser(path)

    def generator(params):
        return lambda x, t: network(params["generator"], x, t)

    def critic(params, row):
        # Which step drew the samples: else their mixture alone would be matched. The teacher is not added: a
        # network of the difference alone, which is 0 at last, follows the generator too slowly.
        step = jnp.float32(row / len(times))
        return lambda x, t, condition=None: network(params["critic"], x, t, step)

    def of_step(params, key, row):
        keys = jax.random.split(jax.random.fold_in(key, row) if row else key, 6)
        noise = jax.random.normal(keys[0], (BATCH, 2))
        x = few.backward_simulation(keys[2], generator(params), path, noise, times, row)
        images = generator(params)(x, every(times[row], x))
        t = jax.random.uniform(keys[3], (BATCH,), minval=0.02, maxval=0.98)
        still = jax.lax.stop_gradient(images)
        fake = D.denoiser(critic(jax.lax.stop_gradient(params), row), prediction)
        epsilon = jax.random.normal(keys[4], (BATCH, 2))
        gradient = few.distribution_matching_gradient(real, fake, still, path, epsilon, t)
        own = few.distribution_matching_loss(images, gradient)[0]
        return own + D.diffusion_loss(keys[5], critic(params, row), prediction, still)[0]

    def loss(params, average, start, key, progress):
        # All steps in each update: one of them in turn made the two players follow it, and not the others.
        return sum(of_step(params, key, row) for row in range(len(times))) / len(times)

    @jax.jit
    def draw(params):
        key = jax.random.key(4)
        noise = jax.random.normal(jax.random.fold_in(key, 99), (SAMPLES, 2))
        x = few.backward_simulation(key, generator(params), path, noise, times, len(times) - 1)
        return generator(params)(x, every(times[-1], x))

    def init(key):
        keys = jax.random.split(key)
        return {"generator": init_network(keys[0], 1), "critic": init_network(keys[1], 2)}

    # Momentum would carry each of the two players on past where the other one is by then.
    updates = 20000 if len(times) == 1 else 10000
    how = Training(updates=updates, slower={"generator": 0.1}, ema=0.999, averaged=True, betas=(0.0, 0.99))
    return Method(init, [loss], lambda params: distribution_error(draw(params), data), DISTRIBUTION, how)
