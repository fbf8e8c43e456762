"""Students without a teacher on a plane: each with the map that its loss teaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.few_steps.plane import SAMPLES, Data, distribution_error, noise_at
from experiments.few_steps.small_networks import Training, init_network, network
from experiments.few_steps.with_teachers import BATCH, DISTRIBUTION, Method, draws, every, judge
from jaxldm import diffusion as D
from jaxldm import few_steps as few


def _edm_student(params):
    # In the angle atan(sigma) all noisy levels lie close together, as the functions of them do.
    return few.edm_consistency_model(lambda x, noise: network(params, x, jnp.arctan(jnp.exp(4 * noise))), 1.0)


def _edm_method(data: Data, stages: list[Any], how: Training) -> Method:
    path = D.EDM()
    noise = noise_at(path)
    run = lambda params, x: _edm_student(params)(x, every(path.t_noisy, x))  # noqa: E731
    return Method(
        lambda key: init_network(key, 1), stages, judge(run, noise, data.solve(path, noise)), how=how
    )


# Where a target is noisy and the network's own: what is wrong at one level is carried on to all noisier ones,
# and a high rate feeds it.
GENTLE = Training(updates=28000, rate=2e-3, ema=0.999, averaged=True)
AS_PUBLISHED = GENTLE._replace(updates=20000, rate=1e-3)


def _even_weight(t, s):
    """(1 + t^2) / (t (t - s)): every level moves the network's own output alike.

    That output has the factor t / sqrt(1 + t^2) in f, and with even logarithms of t a gap is met as often as
    1 / t says. Published is 1 / (t - s), which is slow at the noisy end, where one step is judged.
    """
    return (1 + t**2) / (t * (t - s))


def improved_consistency_training(data: Data, published: bool = False) -> Method:
    """iCT: 10 to 1280 intervals, drawn alike, with `_even_weight`.

    As published: drawn by a log-normal, of weight 1 / (t - s), nearly |difference| for its square.
    """
    distance = few.pseudo_huber(0.00054 * 2**0.5) if published else few.squares_of

    def stage(levels):
        sigmas = few.karras_levels(levels)
        probabilities = few.interval_probabilities(sigmas) if published else None

        def loss(params, average, start, key, progress):
            x_0, epsilon, key = draws(data, key)
            t, s = few.draw_neighbours(key, sigmas, BATCH, probabilities)
            x_t, x_s = (few.noised(D.EDM(), x_0, epsilon, u) for u in (t, s))
            f, weight = _edm_student(params), 1 / (t - s) if published else _even_weight(t, s)
            return few.consistency_loss(f, f, x_t, t, x_s, s, distance=distance, weight=weight)[0]

        return loss

    levels = sorted({few.num_levels(step, 64) for step in range(64)})
    return _edm_method(data, [stage(number) for number in levels], AS_PUBLISHED if published else GENTLE)


def easy_consistency_tuning(data: Data, published: bool = False) -> Method:
    """ECT: from denoising to ever nearer pairs, with `_even_weight`; as published with other times.

    A gap of t / 4^k biases the map by as much, so that five stages end near t / 1000. The published distance
    is nearly |difference|. In many dimensions the noise of a target has nearly one length, so that its mean
    is learned; on a plane it is the point of least distance, a median.
    """
    distance = few.pseudo_huber(0.0) if published else few.squares_of
    low, high = jnp.log(0.002), jnp.log(80.0)

    def times(key):
        if published:
            return jnp.exp(-1.1 + 2.0 * jax.random.normal(key, (BATCH,)))
        return jnp.exp(low + (high - low) * jax.random.uniform(key, (BATCH,)))

    def stage(number):
        def loss(params, average, start, key, progress):
            x_0, epsilon, key = draws(data, key)
            t = times(key)
            s = few.easy_times(t, number, q=2.0 if published else 4.0)
            x_t, x_s = (few.noised(D.EDM(), x_0, epsilon, u) for u in (t, s))
            f, weight = _edm_student(params), 1 / (t - s) if published else _even_weight(t, s)
            return few.consistency_loss(f, f, x_t, t, x_s, s, distance=distance, weight=weight)[0]

        return loss

    stages = [stage(k) for k in range(8 if published else 5)]
    return _edm_method(data, stages, AS_PUBLISHED if published else GENTLE)


def continuous_consistency(data: Data, taught: bool, published: bool = False) -> Method:
    """sCM on TrigFlow, by the exact denoiser's slope or by that of each example.

    As published the tangent is divided by its length. Of an example's slope the tangent is noise for the most
    part, and what is 0 on average is then its direction: on a plane another map. Published times, too, seldom
    come near pi / 2, where one step begins.
    """
    path = few.TrigFlow(sigma_data=1.0)
    denoise = data.denoiser(path)

    def student(params):
        return lambda x, t: network(params, x, t)

    def loss(params, average, start, key, progress):
        x_0, z, key = draws(data, key)
        times = {} if taught or published else {"mean": 0.0, "std": 2.0}
        t = few.trig_times(key, BATCH, sigma_data=1.0, **times)
        x_t = few.noised(path, x_0, z, t)
        if taught:
            slope = few.trig_teacher_slope(denoise, x_t, t)
        else:
            slope = jnp.cos(t)[:, None] * z - jnp.sin(t)[:, None] * x_0
        return few.continuous_consistency_loss(
            student(params),
            x_t,
            t,
            slope,
            warmth=jnp.minimum(1.0, 4 * progress),
            normalise=taught or published,
        )[0]

    noise = noise_at(path)
    run = lambda params, x: few.trig_consistency(student(params), x, every(path.t_noisy, x))  # noqa: E731
    alone = AS_PUBLISHED if published else GENTLE._replace(updates=34000)
    how = Training(updates=16000) if taught else alone
    return Method(
        lambda key: init_network(key, 1), [loss], judge(run, noise, data.solve(path, noise)), how=how
    )


def shortcut(data: Data) -> Method:
    """One step of length 1, learned from steps of half the length, down to the velocity.

    Half of a batch learns from half steps, where the paper has a quarter: seven lengths share it.
    """
    path = D.Flow()

    def student(params):
        return lambda x, t, d, condition=None: network(params, x, t, d)

    def loss(params, average, start, key, progress):
        x_0, epsilon, key = draws(data, key)
        step_key, time_key = jax.random.split(key)
        first = BATCH // 2
        t, d = few.shortcut_times(step_key, BATCH)
        t = jnp.where(jnp.arange(BATCH) < first, t, jax.random.uniform(time_key, (BATCH,)))
        x_t = few.noised(path, x_0, epsilon, t)
        target = few.shortcut_target(student(average), x_t[:first], t[:first], d[:first], clip=None)
        return few.shortcut_loss(student(params), x_0, epsilon, t, d, target)[0]

    noise = noise_at(path)
    run = lambda params, x: x - student(params)(x, every(1.0, x), every(1.0, x))  # noqa: E731
    how = Training(updates=40000, ema=0.99)
    return Method(
        lambda key: init_network(key, 2), [loss], judge(run, noise, data.solve(path, noise)), how=how
    )


def mean_flow(data: Data, loss_of: Callable[..., Any] = few.mean_flow_loss, power: float = 0.0) -> Method:
    """The average velocity over the whole interval; `loss_of` is the plain or the improved loss.

    The published power of the weights 1 / (|error|^2 + c)^power is 1. In many dimensions |error|^2 is nearly
    the same for all examples; on a plane it is not, and what is learned is nearer to a mode than to the mean.
    A quarter has r = t, and of the others many r and t are close to 0 and 1, where one step is judged.
    """
    path, still = D.Flow(), BATCH // 4

    def student(params):
        return lambda z, r, t, condition=None: network(params, z, t, t - r)

    def loss(params, average, start, key, progress):
        x_0, epsilon, key = draws(data, key)
        r, t = few.interval_times(key, BATCH, still / BATCH, 0.0, 4.0)
        return loss_of(student(params), x_0, epsilon, r, t, power=power, still=still)[0]

    noise = noise_at(path)
    run = lambda params, x: x - student(params)(x, every(0.0, x), every(1.0, x))  # noqa: E731
    how = Training(updates=32000, ema=0.999, averaged=True)
    return Method(
        lambda key: init_network(key, 2), [loss], judge(run, noise, data.solve(path, noise)), how=how
    )


def drifting(data: Data) -> Method:
    """A generator that is pushed towards data; the distance is that of distributions."""

    def loss(params, average, start, key, progress):
        data_key, noise_key = jax.random.split(key)
        samples = network(params, jax.random.normal(noise_key, (BATCH, 2)))
        return few.drifting_loss(samples, data.draw(data_key, BATCH))[0]

    @jax.jit
    def draw(params):
        return network(params, jax.random.normal(jax.random.key(4), (SAMPLES, 2)))

    return Method(
        lambda key: init_network(key, 0),
        [loss],
        lambda params: distribution_error(draw(params), data),
        DISTRIBUTION,
        Training(ema=0.999, averaged=True),
    )
