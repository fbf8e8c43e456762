"""Denoisers: functions (x_t, t) -> x_0, made of a network and what its output means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real

from jaxldm.arguments import array, check_fields, checked, flag, function
from jaxldm.diffusion.paths import A_PATH, Path
from jaxldm.diffusion.predictions import A_PREDICTION, Prediction
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.functions import returned

A_BATCH = array("floating", "[B, ...]", axes=(1, 64))
SOME_TIMES = array("real", "[B], or one number", axes=(0, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """A function `denoise(x, t) -> x_0` that knows its path.

    Solvers accept any function of (x [B, ...], t scalar); those that look between the rows of a grid need the
    path.

    Attributes:
        function: (x [B, ...], t [B]) -> x_0 [B, ...].
        path: where x and t live.
        with_variance: None, or for a network with learned variance (x, t [B]) -> (x_0, v), both [B, ...], v
            in [0, 1]: how far the log-variance lies from the posterior's (0) to the forward step's (1).
        any_image: None, or for a denoiser that is mapped over images at different steps a function that says
            whether a condition holds for any of them.
        with_unchanged: None, or where x_0 is clipped or changed otherwise (x, t [B]) -> (x_0, the x_0 before
            that), both [B, ...].
    """

    function: Callable[[Any, Any], Any]
    path: Path
    with_variance: Callable[[Any, Any], tuple[Any, Any]] | None = None
    any_image: Callable[[Any], Any] | None = None
    with_unchanged: Callable[[Any, Any], tuple[Any, Any]] | None = dataclasses.field(
        default=None, kw_only=True
    )

    def __post_init__(self):
        check_fields(self, function=function("(x, t) -> x_0"), path=A_PATH)

    def __call__(
        self, x: Float[Array, "B ..."], t: Real[ArrayLike, ""] | Real[Array, " B"]
    ) -> Float[Array, "B ..."]:
        """x_0 for noisy x; t is one number or one per image [B]."""
        x, t = A_BATCH("x", x), SOME_TIMES("t", t)
        if np.ndim(t) and np.shape(t) != x.shape[:1]:
            raise InvalidArgumentError(
                f"t must be one number, or one for each of {len(x)} images, got {shown(t)}"
            )
        x_0 = returned("denoise", self.function(x, jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])))
        if x_0.shape != x.shape:
            raise InvalidArgumentError(f"denoise(x, t) must have the shape of x, {x.shape}, got {x_0.shape}")
        return x_0.astype(x.dtype)  # a network may answer in bfloat16


A_DENOISER = function("(x, t) -> x_0, such as D.denoiser(network, prediction)")


@checked(network=function("(x, t) -> output"), prediction=A_PREDICTION, learned_variance=flag)
def denoiser(
    network: Callable[[Any, Any], Any], prediction: Prediction, *, learned_variance: bool = False
) -> Denoiser:
    """`denoise(x, t) -> x_0` of a network, from what its output means.

    Args:
        network: (x [B, H, W, C], t [B]) -> output [B, H, W, C]; parameters, condition and guidance closed
            over. The output may be bfloat16: it is converted to x's type before any arithmetic.
        prediction: `epsilon(path)`, `v(path)` and so on, on the path that the network was trained on.
        learned_variance: the output is [B, H, W, 2C]: the prediction, then 2 v - 1, where v places the
            log-variance between its bounds (Nichol and Dhariwal 2021, equation 15; DiT). `ddpm("learned")`
            uses both halves, every other solver the first.

    Raises:
        InvalidArgumentError: a string or a path in place of the prediction; when called, an output of
            another shape.

    >>> from jaxldm import diffusion as D
    >>> denoise = D.denoiser(lambda x, t: x, D.flow(D.Flow()))
    """

    def call(x, t):
        output = network(*prediction.precondition(x, t))
        check_output_shape(output, x, learned_variance)
        return output.astype(x.dtype)

    def with_variance(x, t):
        output, variance = jnp.split(call(x, t), 2, axis=-1)
        return prediction.to_x0(output, x, t), (variance + 1) / 2

    if learned_variance:
        return Denoiser(lambda x, t: with_variance(x, t)[0], prediction.path, with_variance)
    return Denoiser(lambda x, t: prediction.to_x0(call(x, t), x, t), prediction.path)


def check_output_shape(output: Any, x: Any, learned_variance: bool = False) -> None:
    """Raises `InvalidArgumentError` unless a network's output goes with its input x [B, ..., C]."""
    wanted = (*x.shape[:-1], 2 * x.shape[-1]) if learned_variance else x.shape
    if np.shape(returned("the network", output)) == wanted:
        return
    hint = ""
    if not learned_variance and np.shape(output) == (*x.shape[:-1], 2 * x.shape[-1]):
        hint = ": for a network with learned variance (2C channels) use denoiser(..., learned_variance=True)"
    raise InvalidArgumentError(
        f"the network's output for x of shape {x.shape} must have the shape {wanted}, got "
        f"{np.shape(output)}{hint}"
    )
