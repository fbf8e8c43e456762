"""Predictions: what a network's output means, and nowhere else.

Every prediction is one combination of the clean image and the noise, output = a x_0 + b eps. With x_t =
alpha x_0 + sigma eps, n = sqrt(alpha^2 + sigma^2) (1 on the variance-preserving path), d = sigma_data:

| maker      | name           | a                         | b                     |
|------------|----------------|---------------------------|-----------------------|
| `epsilon`  | "epsilon"      | 0                         | 1                     |
| `x0`       | "sample"       | 1                         | 0                     |
| `v`        | "v_prediction" | -sigma / n                | alpha / n             |
| `flow`     | "flow"         | -1                        | 1                     |
| `velocity` | "velocity"     | d alpha / dt              | d sigma / dt          |
| `edm`      | "edm"          | t / (d sqrt(t^2 + d^2))   | -d / sqrt(t^2 + d^2)  |

The rest follows: x_0 = (b x_t - sigma output) / (alpha b - sigma a), and |d x_0 / d output| = |sigma / (alpha
b - sigma a)|.

`v` is Salimans and Ho 2022 (appendix D); dividing by n makes it theirs on every path: the v of the
variance-preserving point on the same ray. `flow` is the velocity of the straight path (Liu et al. 2022),
`velocity` that of any continuous path (Ma et al. 2024, SiT), and `edm` is the F of Karras et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from jaxldm.arguments import array, check_broadcast, checked, function, instance, number, text
from jaxldm.diffusion.paths import A_PATH, EDM, Path, per_image
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import InvalidArgumentError, Table, one_of


class Prediction(NamedTuple):
    """What a network's output means on a path; equal calls of a maker give equal, hashable values.

    Arrays may be NumPy or JAX; t is a number or one per image [B].

    Attributes:
        name: in `PREDICTIONS`, for files and messages.
        path: where the network was trained.
        precondition: (x_t [B, H, W, C], t [B]) -> (the network's input, the network's t).
        to_x0: (output, x_t, t) -> x_0, each image [B, H, W, C].
        target: (x_0, epsilon, t) -> the output that is wanted, [B, H, W, C].
        gain: t -> |d x_0 / d output|, of t's shape: how far x_0 moves when the output is off by one. Its
            square carries weights on the error of x_0 over to the error of the output; it is 1 / SNR for
            epsilon and 1 / (SNR + 1) for v, with SNR = alpha^2 / sigma^2.
        sigma_data: of "edm", the standard deviation of the data.
    """

    name: str
    path: Path
    precondition: Callable[[Any, Any], tuple[Any, Any]]
    to_x0: Callable[[Any, Any, Any], Any]
    target: Callable[[Any, Any, Any], Any]
    gain: Callable[[Any], Any]
    sigma_data: float | None = None


A_PREDICTION = instance(Prediction, "a prediction such as D.epsilon(path), D.prediction('epsilon', path)")


@checked(path=A_PATH)
@equal_by_call
def epsilon(path: Path) -> Prediction:
    """The output is the noise eps (Ho et al. 2020): x_0 = (x_t - sigma output) / alpha.

    Raises:
        InvalidArgumentError: a path with zero terminal SNR, where x_0 would be divided by alpha = 0, or by an
            alpha whose square float32 does not hold.
    """
    if path.zero_terminal_snr:
        raise InvalidArgumentError(
            f"epsilon prediction leaves x_0 undefined at the noisy end of this {path.name} path, where "
            "alpha = 0 (zero terminal SNR): use v_prediction, flow or sample (D.v, D.flow, D.x0)"
        )
    if path.num_train_timesteps is not None and path.alpha(path.t_noisy) ** 2 < np.finfo(np.float32).tiny:
        raise InvalidArgumentError(
            f"epsilon prediction leaves x_0 undefined at the noisy end of this {path.name} path, where "
            f"alpha^2 = {path.alpha(path.t_noisy) ** 2:.1e} is nothing in float32: use betas that grow less, "
            "or v_prediction, flow or sample (D.v, D.flow, D.x0)"
        )
    return linear_prediction("epsilon", path, lambda t: LEVEL_COEFFICIENTS["epsilon"](None, None))


@checked(path=A_PATH)
@equal_by_call
def x0(path: Path) -> Prediction:
    """The output is the clean image x_0 itself: "sample" in diffusers."""
    prediction = linear_prediction("sample", path, lambda t: LEVEL_COEFFICIENTS["sample"](None, None))
    # The general formula would divide sigma by sigma, which is 0 / 0 at the clean row.
    return prediction._replace(to_x0=lambda output, x_t, t: output, gain=lambda t: path.alpha(t) * 0 + 1)


@checked(path=A_PATH)
@equal_by_call
def v(path: Path) -> Prediction:
    """The output is (alpha eps - sigma x_0) / n (Salimans and Ho 2022); finite at pure noise."""
    return linear_prediction(
        "v_prediction",
        path,
        lambda t: LEVEL_COEFFICIENTS["v_prediction"](path.alpha(t), path.sigma(t)),
    )


@checked(path=A_PATH)
@equal_by_call
def flow(path: Path) -> Prediction:
    """The output is eps - x_0, the velocity of the straight path (Liu et al. 2022); on any path."""
    return linear_prediction("flow", path, lambda t: LEVEL_COEFFICIENTS["flow"](None, None))


@checked(path=A_PATH)
@equal_by_call
def velocity(path: Path) -> Prediction:
    """The output is dx_t/dt = alpha' x_0 + sigma' eps, towards noise (Ma et al. 2024, SiT).

    On the straight path that is `flow`, on GVP pi/2 times `v`; gamma of an interpolant is included (sigma
    sigma' = beta beta' + gamma gamma').

    Raises:
        InvalidArgumentError: a discrete path, which has no velocity, or one whose noise level does not change
            at its noisy end (`Cosine`).

    >>> from jaxldm import diffusion as D
    >>> prediction = D.velocity(D.Interpolant("linear"))
    >>> float(prediction.target(0.25, 1.0, 0.5))  # eps - x_0
    0.75
    """
    if path.num_train_timesteps is not None:
        raise InvalidArgumentError(
            f"this {path.name} path is discrete and has no velocity: use v_prediction (D.v)"
        )
    (alpha_rate, sigma_rate), t = path.derivatives(path.t_noisy), path.t_noisy
    if path.alpha(t) * sigma_rate - path.sigma(t) * alpha_rate == 0:
        raise InvalidArgumentError(
            f"this {path.name} path stands still at its noisy end, where a velocity of 0 leaves x_0 "
            "undefined: use v_prediction (D.v)"
        )

    def finite(t):
        # At the clean row of some paths sigma rises with an infinite slope, for which differentiation gives
        # 0. Any slope but 0 leads to the limit: x_0 = x_t / alpha, whatever the output.
        alpha_rate, sigma_rate = path.derivatives(t)
        xp = jnp if isinstance(t, jax.Array) else np
        return alpha_rate, xp.where((path.sigma(t) == 0) & (sigma_rate == 0), 1.0, sigma_rate)

    target = linear_prediction("velocity", path, path.derivatives).target
    return linear_prediction("velocity", path, finite)._replace(target=target)


@checked(path=A_PATH, sigma_data=number())
@equal_by_call
def edm(path: Path, sigma_data: float = 0.5) -> Prediction:
    """The output is F of EDM's preconditioning (Karras et al. 2022, table 1); d = sigma_data.

        x_0 = c_skip x_t + c_out F(c_in x_t, c_noise),
        c_skip = d^2/(t^2 + d^2), c_out = t d/sqrt(t^2 + d^2), c_in = 1/sqrt(t^2 + d^2), c_noise = ln(t)/4:

    the network's input and output have unit variance at every noise level. c_noise is kept finite at t = 0.

    Args:
        path: an `EDM` path.
        sigma_data: the standard deviation of the data.

    Raises:
        InvalidArgumentError: another path, or sigma_data <= 0.
    """
    if not isinstance(path, EDM) or sigma_data <= 0:
        raise InvalidArgumentError(
            f"EDM's preconditioning needs an EDM path and sigma_data > 0, got a {path.name} path and "
            f"sigma_data={sigma_data}"
        )

    def root(t):
        return (t**2 + sigma_data**2) ** 0.5

    def precondition(x_t, t):
        t = jnp.asarray(t)
        noise = jnp.log(jnp.maximum(t, jnp.finfo(t.dtype).tiny)) / 4
        return x_t / per_image(root(t), x_t), noise

    prediction = linear_prediction("edm", path, lambda t: (t / (sigma_data * root(t)), -sigma_data / root(t)))
    return prediction._replace(precondition=precondition, sigma_data=float(sigma_data))


# Name, for files and the command line -> maker.
PREDICTIONS: dict[str, Callable[..., Prediction]] = Table("prediction")
PREDICTIONS |= {
    "epsilon": epsilon,
    "sample": x0,
    "v_prediction": v,
    "flow": flow,
    "velocity": velocity,
    "edm": edm,
}


@checked(path=A_PATH)
def prediction(name: str, path: Path, **options: Any) -> Prediction:
    """The prediction of that name on a path; the only option is `sigma_data` of "edm".

    Raises:
        UnknownNameError: a name that is not in `PREDICTIONS`.
        InvalidArgumentError: a path that the prediction is undefined on, or another option.
    """
    maker = PREDICTIONS[one_of("prediction", name, PREDICTIONS)]
    unknown = set(options) - ({"sigma_data"} if name == "edm" else set())
    if unknown:
        raise InvalidArgumentError(f"prediction {name!r} has no option {sorted(unknown)[0]!r}")
    return maker(path, **options)


@checked(prediction=A_PREDICTION, x_0=array("real"), x_t=array("real"), t=array("real"))
def from_x0(
    prediction: Prediction, x_0: Float[Any, "B ..."], x_t: Float[Any, "B ..."], t: Real[Any, " ..."] | float
) -> Float[Any, "B ..."]:
    """The output [B, H, W, C] that stands for x_0 at x_t: the inverse of `prediction.to_x0`.

    At sigma = 0 the noise in x_t is undefined; it is taken to be zero there, so that the result is finite.
    """
    check_broadcast(x_0=x_0, x_t=x_t)
    path = prediction.path
    return prediction.target(x_0, implied_noise(x_0, x_t, path.alpha(t), path.sigma(t)), t)


@checked(
    x_0=array("floating", "[B, ...]"),
    x_t=array("floating", "[B, ...]"),
    alpha=array("real"),
    sigma=array("real"),
)
def implied_noise(
    x_0: Float[Any, "B ..."],
    x_t: Float[Any, "B ..."],
    alpha: Float[Any, ""] | Float[Any, " B"] | float,
    sigma: Float[Any, ""] | Float[Any, " B"] | float,
) -> Float[Any, "B ..."]:
    """eps = (x_t - alpha x_0) / sigma [B, H, W, C]: the noise in x_t if x_0 is the clean image.

    At sigma = 0, where x_t holds none, it is x_t - alpha x_0, which is then 0.

    Args:
        x_0, x_t: [B, H, W, C].
        alpha, sigma: numbers, or one per image [B].
    """
    check_broadcast(x_0=x_0, x_t=x_t)
    alpha, sigma = per_image(alpha, x_t), per_image(sigma, x_t)
    divisor = jnp.where(sigma == 0, 1, sigma) if isinstance(sigma, jax.Array) else sigma + (sigma == 0)
    return (x_t - alpha * x_0) / divisor


# Of the predictions that depend on the noise level alone: (alpha, sigma) -> (a, b).
LEVEL_COEFFICIENTS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "epsilon": lambda alpha, sigma: (0, 1),
    "sample": lambda alpha, sigma: (1, 0),
    "v_prediction": lambda alpha, sigma: (
        -sigma / (alpha**2 + sigma**2) ** 0.5,
        alpha / (alpha**2 + sigma**2) ** 0.5,
    ),
    "flow": lambda alpha, sigma: (-1, 1),
}


@checked(name=text, path=A_PATH, coefficients=function("t -> (a, b)"))
def linear_prediction(name: str, path: Path, coefficients: Callable[[Any], tuple[Any, Any]]) -> Prediction:
    """A prediction of your own: output = a x_0 + b eps, with `coefficients`: t -> (a, b).

    a and b are numbers or of t's shape, and alpha b - sigma a must not be 0 at any t.
    """

    def to_x0(output, x_t, t):
        a, b = coefficients(t)
        alpha, sigma = path.alpha(t), path.sigma(t)
        whole = alpha * b - sigma * a
        return per_image(b / whole, x_t) * x_t - per_image(sigma / whole, x_t) * output

    def target(x_0, epsilon, t):
        a, b = coefficients(t)
        return per_image(a, x_0) * x_0 + per_image(b, x_0) * epsilon

    def gain(t) -> Float[Array, " B"]:
        a, b = coefficients(t)
        alpha, sigma = path.alpha(t), path.sigma(t)
        return abs(sigma / (alpha * b - sigma * a))

    return Prediction(name, path, lambda x_t, t: (x_t, t), to_x0, target, gain)
