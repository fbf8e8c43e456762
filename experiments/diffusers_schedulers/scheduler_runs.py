"""One run of a scheduler of diffusers and one of ours over the same analytic denoiser, start and noise."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from typing import Any
from unittest import mock

import diffusers
import jax
import numpy as np
import torch

from experiments.diffusers_schedulers.scheduler_probes import reference_class, signature
from jaxldm import diffusion as D
from jaxldm import schedulers

SHAPE = (1, 2, 2, 2)
TOKENS = 1024
# These keep alpha = 1: their x is x / alpha.
IN_SIGMA_SPACE = ("Euler", "EDM", "Heun", "KDPM2", "LMS", "DPMSolverSDE")
# Two timesteps to a step.
IN_PAIRS = ("KDPM2", "DPMSolverSDE")
# The distribution of the data: two equal peaks at +-PEAK of this deviation, in each number.
PEAK, WIDTH = 0.8, 0.5


def start() -> np.ndarray:
    """Standard normal [1, 2, 2, 2]."""
    return np.random.default_rng(5).standard_normal(SHAPE)


def image() -> np.ndarray:
    """An image to start from, [1, 2, 2, 2]."""
    return np.random.default_rng(6).choice([-PEAK, PEAK], SHAPE)


def exact_x0(x: np.ndarray, alpha: Any, sigma: Any) -> np.ndarray:
    """E[x_0 | x]: of the two peaks."""
    variance = (alpha * WIDTH) ** 2 + sigma**2
    mean = PEAK * np.tanh(alpha * PEAK * x / variance)
    return mean + alpha * WIDTH**2 / variance * (x - alpha * mean)


def network(prediction: D.Prediction, learned_variance: bool, x: np.ndarray, t: float) -> np.ndarray:
    """What an exact network answers at (x, t), float64 on the host; where it is preconditioned a stand-in."""
    path = prediction.path
    if prediction.name in ("edm", "consistency"):
        return np.sin(1.5 * x + 0.3 * t / (1 if prediction.name == "edm" else 1000)) * 0.7
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    x_0 = exact_x0(x, alpha, sigma)
    epsilon = (x - alpha * x_0) / max(sigma, 1e-9)
    answers = {"epsilon": epsilon, "sample": x_0, "v_prediction": alpha * epsilon - sigma * x_0}
    answers |= {"score": -epsilon / max(sigma, 1e-9)}
    answer = answers.get(prediction.name, epsilon - x_0)
    return np.concatenate([answer, np.cos(x)], axis=-1) if learned_variance else answer


@functools.cache
def step_noise(step: int, wide: bool = False, k: int | None = None) -> np.ndarray:
    """The noise that our run draws at a step, in float32 or (`wide`) float64: other numbers; or its k-th."""
    fold = jax.vmap(jax.random.fold_in, (0, None))
    with jax.enable_x64(wide):
        keys = fold(D.image_keys(jax.random.key(0), 1), np.uint32(step))
        keys = keys if k is None else fold(keys, np.uint32(k))
        return np.asarray(D.solvers.noise_like(keys, np.zeros(SHAPE, np.float64 if wide else np.float32)))


def brownian(key: Any, shape: tuple[int, ...], step: int, to_the_end: bool, ratio: float) -> torch.Tensor:
    """The noise of `dpmpp_sde` at a step: of its first half, or to its end, `ratio` of the levels away.

    Args:
        key, shape: of a run of one image, channels last.
    """
    fold = jax.vmap(jax.random.fold_in, (0, None))
    keys = fold(D.image_keys(key, 1), np.uint32(step))
    draw = [np.asarray(D.solvers.noise_like(fold(keys, k), np.zeros(shape, np.float32))) for k in (0, 1)]
    weight = 1 / (1 + ratio**-0.5)
    noise = weight**0.5 * draw[0] + (1 - weight) ** 0.5 * draw[1] if to_the_end else draw[0]
    return torch.from_numpy(noise.transpose(0, 3, 1, 2))


def ours(
    scheduler: schedulers.Scheduler, steps: int, dtype: Any = np.float32, strength: float | None = None
) -> tuple[np.ndarray, D.Grid]:
    """(x at the last row, the rows); step by step without a compiler, which is faster for so few numbers.

    Args:
        dtype: of the arithmetic; float64 under `jax.enable_x64`.
        strength: of image-to-image, with `image()`.
    """
    sampler, grid = scheduler.run(steps, TOKENS)
    if strength is not None:
        whole = grid
        grid = scheduler.runs.cut_by_strength(whole, steps, strength, round_up=False)
        sampler = scheduler.runs.part(sampler, whole)

    def call(x, t):
        answer = network(
            sampler.prediction, sampler.learned_variance, np.asarray(x, np.float64), float(np.ravel(t)[0])
        )
        return jax.numpy.asarray(answer, x.dtype)

    denoise, keys = sampler.denoiser(call), D.image_keys(jax.random.key(0), 1)
    first = start() * _first_level(scheduler)
    if strength is not None:
        first = grid.alpha[0] * image() + grid.sigma[0] * start()
    state = sampler.solver.init(jax.numpy.asarray(first, dtype))
    with jax.disable_jit():
        for i in range(len(grid.t) - 1):
            state, _ = D.sample_step(keys, denoise, sampler.solver, grid, state, np.int32(i))
    return np.asarray(state.x), grid


def theirs(
    name: str,
    config: dict[str, Any],
    steps: int,
    scheduler: schedulers.Scheduler,
    dtype: torch.dtype = torch.float32,
    strength: float | None = None,
) -> np.ndarray:
    """x after the last step, in the scale alpha x_0 + sigma eps of row 1 and the scale of its end.

    Args:
        name: of the class.
        config: its arguments.
        steps: as `set_timesteps` takes them.
        scheduler: ours, which says what the network predicts and on which path.
        dtype: of the arithmetic; the numbers that it makes in float32 when it is built stay those.
        strength: of image-to-image, with `image()`.
    """
    sampler = scheduler.sampler
    cls = reference_class(name)
    diffusers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = cls(**{key: value for key, value in config.items() if key in signature(name)})
        options = {}
        if config.get("use_dynamic_shifting"):
            options = {"mu": _mu(config)}
            if name.startswith("FlowMatch"):
                options["sigmas"] = np.linspace(1, 1 / steps, steps)  # as the pipelines give them
        made.set_timesteps(steps, **options)
        first = start().transpose(0, 3, 1, 2)
        if isinstance(scheduler.path, D.EDM):
            first = first * _first_level(scheduler)
        elif name.startswith(IN_SIGMA_SPACE):
            first = first * float(made.sigmas[0] ** 2 + 1) ** 0.5
        for key, value in vars(made).items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and key != "timesteps":
                setattr(made, key, value.to(dtype))
        skipped = 0
        if strength is not None:
            skipped = (steps - min(int(steps * strength), steps)) * made.order
            made.set_begin_index(skipped) if hasattr(made, "set_begin_index") else None
            pictures = [torch.from_numpy(x.transpose(0, 3, 1, 2)).to(dtype) for x in (image(), start())]
            first = made.add_noise(*pictures, made.timesteps[skipped : skipped + 1]).numpy()
        return _walk(made, torch.from_numpy(first).to(dtype), sampler, name, skipped)


def difference_in_float64(
    name: str, config: dict[str, Any], steps: int, scheduler: schedulers.Scheduler
) -> float:
    """`difference` of both in float64: what is no rounding."""
    reference_x = theirs(name, config, steps, scheduler, torch.float64)
    with jax.enable_x64(True):
        return difference(reference_x, name, steps, scheduler, np.float64)


def _mu(config: dict[str, Any]) -> float:
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    return low + (high - low) * (TOKENS - few) / (many - few)


def _walk(made: Any, x: Any, sampler: schedulers.Sampler, name: str, skipped: int = 0) -> np.ndarray:
    total = made.config.num_train_timesteps if isinstance(sampler.path, D.Flow) else 1
    times = made.timesteps[:-1] if name == "DDPMWuerstchenScheduler" else made.timesteps
    times, row = times[skipped:], 0

    def randn(*arguments, **options):
        return torch.from_numpy(step_noise(row, x.dtype == torch.float64).transpose(0, 3, 1, 2))

    if name == "ScoreSdeVeScheduler":
        return _walk_score(made, x, sampler)
    if name == "DPMSolverSDEScheduler":
        key = jax.random.key(0)
        made.noise_sampler = lambda sigma, following: brownian(
            key, SHAPE, row, i % 2 == 1, float(sigma / following)
        ).to(x.dtype)
    module: Any = sys.modules[type(made).__module__]
    draws = hasattr(module, "randn_tensor")
    with mock.patch.object(module, "randn_tensor", randn) if draws else contextlib.nullcontext():
        for i, t in enumerate(times):
            row = (i + skipped) // 2 if name.startswith(IN_PAIRS) else i + skipped
            scaled = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
            given = scaled.numpy().astype(np.float64).transpose(0, 2, 3, 1)
            answer = network(sampler.prediction, sampler.learned_variance, given, float(t) / total)
            answer = torch.from_numpy(answer.transpose(0, 3, 1, 2)).to(x.dtype)
            if name == "ScoreSdeVpScheduler":
                x = made.step_pred(answer, x, t)[0]
                continue
            if name == "UnCLIPScheduler":  # as its pipelines do
                following = times[i + 1] if i + 1 < len(times) else None
                x = made.step(answer, t, x, prev_timestep=following, return_dict=False)[0]
                continue
            t = t[None] if name == "DDPMWuerstchenScheduler" else t
            x = made.step(answer, t, x, return_dict=False)[0]
    return x.numpy().transpose(0, 2, 3, 1)


def _walk_score(made: Any, x: Any, sampler: schedulers.Sampler) -> np.ndarray:
    """As ScoreSdeVePipeline does: its picture is the mean of the last step."""
    module: Any = sys.modules[type(made).__module__]
    made.set_sigmas(len(made.timesteps))
    draws, wide, mean = made.config.correct_steps, x.dtype == torch.float64, x

    def answer():
        given = x.numpy().astype(np.float64).transpose(0, 2, 3, 1)
        output = network(sampler.prediction, False, given, float(made.sigmas[row]))
        return torch.from_numpy(output.transpose(0, 3, 1, 2)).to(x.dtype)

    for row, t in enumerate(made.timesteps):
        for k in range(draws + 1):
            noise = torch.from_numpy(step_noise(row, wide, k).transpose(0, 3, 1, 2))
            with mock.patch.object(module, "randn_tensor", lambda *args, noise=noise, **options: noise):
                if k < draws:
                    x = made.step_correct(answer(), x, return_dict=False)[0]
                else:
                    x, mean = made.step_pred(answer(), t, x, return_dict=False)
    return mean.numpy().transpose(0, 2, 3, 1)


def _first_level(scheduler: schedulers.Scheduler) -> float:
    """Of the noise that a run on this path starts from."""
    return scheduler.path.sigma_max if isinstance(scheduler.path, D.EDM) else 1.0


def difference(
    reference_x: np.ndarray,
    name: str,
    steps: int,
    scheduler: schedulers.Scheduler,
    dtype: Any = np.float32,
    strength: float | None = None,
) -> float:
    """The largest difference of both results as a part of the largest value; NaN where either has one."""
    x, grid = ours(scheduler, steps, dtype, strength)
    if name.startswith(IN_SIGMA_SPACE):
        x = x / grid.alpha[-1]
    with np.errstate(invalid="ignore"):
        return float(np.abs(x - reference_x).max() / np.abs(reference_x).max())
