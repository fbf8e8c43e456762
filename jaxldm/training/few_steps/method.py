"""What a method of few steps is, and what its loss is made from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm import diffusion as D
from jaxldm import few_steps
from jaxldm.arguments import Check, count, number
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.conditions import Condition
from jaxldm.training.optimizer import Optimizer
from jaxldm.training.state import Params, TrainState
from jaxldm.training.step import LossFunction, Player

TEACHER, TABLE = "teacher", "table"  # in `state.frozen`
# What a number of a method may be. Means and widths of the logarithm of times are in float32's range of exp.
A_MEAN, A_WIDTH, A_DISTANCE = number(-20, 20), number(above=0, high=20), number(0)
A_COUNT = count(1)
LEAST_SIGNAL = 1e-3  # alpha at the noisy end, below which epsilon leaves x_0 undefined


class Setting(NamedTuple):
    """What the loss of a method is made from.

    A teacher is held in the student's own network, in which it computes what it did before: what the network
    takes besides adds nothing at first.

    Attributes:
        network: (params, x, t, condition) -> output: `models.network(module)`.
        prediction: what its output means.
        on: what it is conditioned on.
        num_steps: of the finished student; None where the method does not ask.
        guidance_scale: (lowest, highest) of the teacher.
        scale_input: guidance scales [B] -> the further arguments of the network that say them; none where the
            two are one.
        numbers: the method's own, by name.
        updates: of the whole training.
        condition_dropout: share of conditions dropped, by methods that leave guidance outside.
        optimizer_of: (every, share) -> the optimizer of a network that moves in every so-manieth update, at a
            share of the recipe's learning rate, which rises and falls in the whole training all the same.
        ema_decay: of the recipe, for methods of several players.
        critic: (params, x, t, condition, began) -> output of a critic of several steps, which takes the time
            at which the step began that drew what it sees; None: the critic is a network as the student's.
        whole_batch: the batch lies on one device, so that parts of it may be computed one by one.
    """

    network: Callable[..., Any]
    prediction: D.Prediction
    on: Condition
    num_steps: int | None
    guidance_scale: tuple[float, float]
    scale_input: Callable[[Any], Mapping[str, Any]]
    numbers: Mapping[str, Any]
    updates: int
    condition_dropout: float
    optimizer_of: Callable[[int, float], Optimizer]
    ema_decay: float | None
    critic: Callable[..., Any] | None = None
    whole_batch: bool = True

    @property
    def optimizer(self) -> Optimizer:
        """That of the recipe."""
        return self.optimizer_of(1, 1.0)

    @property
    def path(self) -> D.Path:
        """Of teacher and student."""
        return self.prediction.path

    def examples(self, batch: Mapping[str, Any], key: PRNGKeyArray) -> Float[Array, "B ..."]:
        """x_0 of a batch: its latents, drawn from their posterior where the batch has its width."""
        x_0 = batch["mean"]
        return x_0 + batch["std"] * jax.random.normal(key, x_0.shape) if "std" in batch else x_0

    def scales(self, batch: Mapping[str, Any], key: PRNGKeyArray) -> Any:
        """The guidance scale: the one number, or one drawn for each example [B]."""
        low, high = self.guidance_scale
        return low if low == high else few_steps.draw_scales(key, len(batch["mean"]), low, high)

    def condition(self, batch: Mapping[str, Any], scale: Any) -> Any:
        """The condition of a batch, with its guidance scale where the network takes it."""
        condition = self.on.of(batch)
        further = {} if np.ndim(scale) == 0 else self.scale_input(scale)
        return {**named(condition), **further} if further else condition

    def student(self, params: Params, condition: Any) -> D.Denoiser:
        """(x_t, t) -> x_0 of the network with these parameters."""
        network = functools.partial(self.network, params)
        return D.denoiser(lambda x, t: network(x, t, condition), self.prediction)

    def teacher(self, params: Params, condition: Any, scale: Any) -> D.Denoiser:
        """(x_t, t) -> x_0 of the frozen network, guided by the scale."""
        null = self.on.nulls()
        if isinstance(condition, Mapping):
            null = {**condition, **named(null)}
        network = functools.partial(self.network, params)
        if np.ndim(scale) == 0:
            predict = D.classifier_free_guidance(network, condition, null, scale)
        else:  # they are never all 1, which would have to be looked at
            branches = D.condition_branches(network, condition, null)
            predict = lambda x, t: D.guide(*branches.call(x, t), scale)  # noqa: E731
        return D.denoiser(predict, self.prediction)


def named(condition: Any) -> Mapping[str, Any]:
    """A condition by the names of the network's arguments."""
    return condition if isinstance(condition, Mapping) else {"labels": condition}


def nothing_to_check(prediction: D.Prediction, num_steps: int | None, numbers: Mapping[str, Any]) -> None:
    """For methods that take every teacher."""


def one_round(num_steps: int | None, numbers: Mapping[str, Any]) -> int:
    """For methods that are trained in one go."""
    return 1


class Method(NamedTuple):
    """One way to train a network that draws in few steps.

    Attributes:
        about: in a line.
        make_loss: setting -> `loss(params, state, batch, key) -> (loss, metrics)` or players, of which the
            first is the student.
        solver: with which the student draws.
        steps: how many a student has of which nobody says it; None: the number is no matter of training.
        default_steps: of drawing, where `steps` is None; None: as many as the teacher.
        guidance: "inside": of the teacher, or of the target, of one scale or of a range that the network
            takes as an input; "outside": the student is guided, or not, as any other model; "none": never.
        scales: (lowest, highest) guidance scale where nobody says it; None: the default of the teacher.
        numbers: its own numbers, by name, as they are where a recipe leaves them out,
        limits: and what each of them may be, checked when the recipe is made.
        training: fields of `DiffusionRecipe` that it changes.
        check: (prediction, num_steps, numbers), raises `InvalidArgumentError` for what cannot be.
        rounds: (num_steps, numbers) -> how often the training begins again,
        next_round: with this state.
        pairs: it is trained on pairs of noise and what the teacher draws of it, not on data.
        tables: its loss finds so many examples of each class as `state.frozen`, by the number of this name.
        taught: it begins as a teacher; False: from nothing, by `jaxldm train`.
        inputs: what its network takes besides the time, of `scalar_inputs`.
        critic: its second player learns what the student draws, step by step where there are several.
        least_batch: examples of one batch, each of which has one of the parts of the loss.
        adapts: an adapter of the teacher can be trained in place of the whole network.
    """

    about: str
    make_loss: Callable[[Setting], LossFunction | Sequence[Player]]
    solver: str = "ddim"
    steps: int | None = None
    default_steps: int | None = 4
    guidance: str = "inside"
    scales: tuple[float, float] | None = None
    numbers: Mapping[str, Any] = MappingProxyType({})
    limits: Mapping[str, Check] = MappingProxyType({})
    training: Mapping[str, Any] = MappingProxyType({})
    check: Callable[[D.Prediction, int | None, Mapping[str, Any]], None] = nothing_to_check
    rounds: Callable[[int | None, Mapping[str, Any]], int] = one_round
    next_round: Callable[[TrainState], TrainState] | None = None
    pairs: bool = False
    tables: str | None = None
    taught: bool = True
    inputs: tuple[str, ...] = ()
    critic: bool = False
    least_batch: int = 1
    adapts: bool = False


def check_says_x0(prediction: D.Prediction, *others: Any) -> None:
    """Refuse a teacher whose output leaves x_0 undefined at the noisy end, where a student begins."""
    path = prediction.path
    alpha = float(path.alpha(path.t_noisy))
    if prediction.name == "epsilon" and alpha < LEAST_SIGNAL:
        raise InvalidArgumentError(
            f"a teacher that predicts epsilon leaves the image undefined at the noisy end of its path, where "
            f"the signal is {alpha:.2g}, and a student begins there: take a teacher that predicts v"
        )


def check_consistent(prediction: D.Prediction, *others: Any) -> None:
    """Refuse a teacher whose network would not be x itself at the clean end, as a consistency function is."""
    check_says_x0(prediction)
    if prediction.name == "sample":
        raise InvalidArgumentError(
            "a network that predicts x_0 itself is no consistency function, which must be x at the clean "
            "end: take a teacher that predicts v, flow or epsilon, or the method progressive, guidance, "
            "reflow or dmd"
        )


def counts_timesteps(path: D.Path) -> bool:
    """Whether the schedulers of latent consistency models count on a path."""
    return isinstance(path, D.VP)


def check_timesteps(prediction: D.Prediction, *others: Any) -> None:
    """Refuse a path without timesteps, besides."""
    check_consistent(prediction)
    if not counts_timesteps(prediction.path):
        raise InvalidArgumentError(
            f"latent consistency counts timesteps, and the {prediction.path.name} path of this teacher has "
            "none: take the method cd, ect or scm"
        )


def check_steps_of_path(name: str, steps: int, path: D.Path) -> None:
    """Refuse more steps than a path has timesteps."""
    most = path.num_train_timesteps
    if most is not None and steps > most:
        raise InvalidArgumentError(
            f"{name} must be at most the {most} timesteps of the teacher's path, got {steps}"
        )


def averaged(state: TrainState, params: Params, name: str | None = None) -> Params:
    """The moving average of the student's parameters, or where none is kept these."""
    average = state.ema_params if name is None else (state.ema_params or {}).get(name)
    return params if average is None else average


def rows_of(path: D.Path, sigmas: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The times of a path at which sigma / alpha is this."""
    return np.asarray(path.time(cast(Any, sigmas)))


def noisiest(path: D.Path, most: float) -> float:
    """sigma / alpha at the noisy end, or `most` where that is more."""
    alpha, sigma = float(path.alpha(path.t_noisy)), float(path.sigma(path.t_noisy))
    return most if alpha == 0 else min(most, sigma / alpha)


def cleanest(path: D.Path, least: float) -> float:
    """sigma / alpha at the cleanest time that is trained, or `least` where that is less."""
    return max(least, float(path.sigma(path.t_min) / path.alpha(path.t_min)))


def root_dim(x: Float[Array, "B ..."]) -> float:
    """The square root of the numbers of an example."""
    return math.sqrt(math.prod(x.shape[1:]))
