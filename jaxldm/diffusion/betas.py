"""Beta schedules: how fast DDPM's discrete path loses the image, as float64 arrays [T] for `VP`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxldm.arguments import array, checked, count, flag, function, number
from jaxldm.errors import InvalidArgumentError, Table, one_of, shown
from jaxldm.exact import MAX_TIMESTEPS


@checked(num_train_timesteps=count(2, MAX_TIMESTEPS), beta_start=number(), beta_end=number())
def linear_betas(
    num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float[np.ndarray, " T"]:
    """Betas that rise linearly, float64 [T] (Ho et al. 2020, section 4).

    Raises:
        InvalidArgumentError: fewer than two timesteps, or betas outside (0, 1).
    """
    return checked_betas(np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64))


@checked(num_train_timesteps=count(2, MAX_TIMESTEPS), beta_start=number(0), beta_end=number(0))
def scaled_linear_betas(
    num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Float[np.ndarray, " T"]:
    """Betas whose square roots rise linearly, float64 [T] (latent diffusion, Rombach et al. 2022)."""
    roots = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64)
    return checked_betas(roots**2)


@checked(num_train_timesteps=count(2, MAX_TIMESTEPS), beta_start=number(), beta_end=number())
def sigmoid_betas(
    num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float[np.ndarray, " T"]:
    """Betas that rise along a sigmoid, float64 [T]: GeoDiff (Xu et al. 2022), "sigmoid" in diffusers.

    Not the sigmoid schedule of Jabri et al.: there alphas_cumprod is the sigmoid, see `sigmoid_alphas_betas`.
    """
    rise = _sigmoid(np.linspace(-6, 6, num_train_timesteps, dtype=np.float64))
    return checked_betas(beta_start + (beta_end - beta_start) * rise)


@checked(
    alpha_bar=function("t -> alphas_cumprod"), num_train_timesteps=count(2, MAX_TIMESTEPS), max_beta=number()
)
def betas_from_alpha_bar(
    alpha_bar: Callable[[Float[np.ndarray, " ..."]], Float[np.ndarray, " ..."]],
    num_train_timesteps: int = 1000,
    max_beta: float = 0.999,
) -> Float[np.ndarray, " T"]:
    """beta_t = min(1 - f(t+1)/f(t), max_beta) for alphas_cumprod = f, float64 [T] (Nichol and Dhariwal 2021).

    Args:
        alpha_bar: f on [0, 1], falling from 1; NumPy in, NumPy out.
        num_train_timesteps: T.
        max_beta: keeps the last beta below 1 where f(1) = 0.

    >>> round(float(betas_from_alpha_bar(lambda t: 1 - t, 4)[1]), 4)
    0.3333
    """
    f = alpha_bar(np.arange(num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps)
    return checked_betas(np.minimum(1 - f[1:] / f[:-1], max_beta))


@checked(num_train_timesteps=count(2, MAX_TIMESTEPS), s=number(0), max_beta=number())
def cosine_betas(
    num_train_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999
) -> Float[np.ndarray, " T"]:
    """alphas_cumprod f(t) = cos^2(pi/2 (t/T + s)/(1 + s)), float64 [T] (Nichol and Dhariwal 2021, eq. 17)."""
    return betas_from_alpha_bar(
        lambda t: np.cos((t + s) / (1 + s) * np.pi / 2) ** 2, num_train_timesteps, max_beta
    )


@checked(
    num_train_timesteps=count(2, MAX_TIMESTEPS), start=number(), end=number(), tau=number(), max_beta=number()
)
def sigmoid_alphas_betas(
    num_train_timesteps: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
) -> Float[np.ndarray, " T"]:
    """alphas_cumprod falls along a sigmoid, float64 [T] (Jabri et al. 2022; code in Chen 2023, algorithm 1).

    f(t) = (S(end) - S(start + t (end - start))) / (S(end) - S(start)) with S(x) = sigmoid(x / tau). A small
    tau leaves less time to the ends; it suits large images.

    Raises:
        InvalidArgumentError: unless start < end and tau > 0.
    """
    if not (start < end and tau > 0):
        raise InvalidArgumentError(f"start < end and tau > 0 are needed, got {start}, {end} and {tau}")
    low, high = _sigmoid(start / tau), _sigmoid(end / tau)
    return betas_from_alpha_bar(
        lambda t: (high - _sigmoid((start + t * (end - start)) / tau)) / (high - low),
        num_train_timesteps,
        max_beta,
    )


@checked(num_train_timesteps=count(2, MAX_TIMESTEPS), rate=number())
def exponential_betas(num_train_timesteps: int = 1000, rate: float = 12.0) -> Float[np.ndarray, " T"]:
    """alphas_cumprod f(t) = exp(-rate t): one beta for all, float64 [T]; "exp" in diffusers."""
    return betas_from_alpha_bar(lambda t: np.exp(-rate * t), num_train_timesteps)


@checked(
    num_train_timesteps=count(2, MAX_TIMESTEPS), mu=number(), b=number(), max_beta=number(), square_root=flag
)
def laplace_betas(
    num_train_timesteps: int = 1000,
    mu: float = 0.0,
    b: float = 0.5,
    max_beta: float = 0.999,
    *,
    square_root: bool = False,
) -> Float[np.ndarray, " T"]:
    """The log-SNR of a uniform t is Laplace(mu, b): most training near mu, float64 [T] (Hang et al. 2024).

    log SNR(t) = mu - b sign(1/2 - t) log(1 - 2 |t - 1/2|), alphas_cumprod = SNR / (1 + SNR).

    Args:
        mu, b: centre and width.
        square_root: takes alpha = sqrt(SNR / (1 + SNR)) for alphas_cumprod, and 1e-6 inside the logarithm, as
            the "laplace" schedule of diffusers does: for checkpoints that were trained with it.

    Raises:
        InvalidArgumentError: b <= 0.
    """
    if not b > 0:
        raise InvalidArgumentError(f"b must be > 0, got {b}")

    def alpha_bar(t):
        floor = 1e-6 if square_root else 0.0
        with np.errstate(divide="ignore"):
            log_snr = mu - b * np.copysign(1, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + floor)
        return _sigmoid(log_snr) ** (0.5 if square_root else 1.0)

    return betas_from_alpha_bar(alpha_bar, num_train_timesteps, max_beta)


def rescale_zero_terminal_snr(betas: Float[np.ndarray, " T"] | Sequence[float]) -> Float[np.ndarray, " T"]:
    """Shifts and scales sqrt(alphas_cumprod) so that its last value is 0 and its first is kept, float64 [T].

    The last beta becomes exactly 1. Epsilon prediction leaves x_0 undefined there: train with
    `v_prediction` and sample with `trailing` spacing (Lin et al. 2023, Algorithm 1).

    >>> rescale_zero_terminal_snr(linear_betas())[-1]
    np.float64(1.0)
    """
    root = np.sqrt(np.cumprod(1 - checked_betas(betas)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root**2
    return 1 - np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def checked_betas(betas: Any) -> Float[np.ndarray, " T"]:
    """Betas as float64 [T], or `InvalidArgumentError`."""
    if isinstance(betas, str):
        raise InvalidArgumentError(
            f"betas must be numbers, got the name {shown(betas)}: write D.VP.named({shown(betas)})"
        )
    betas = array("real", "[T]", axes=(1, 64))("betas", betas).astype(np.float64)
    if betas.ndim != 1 or betas.size < 2:
        raise InvalidArgumentError(f"betas must be a list of at least 2 numbers, got shape {betas.shape}")
    if not np.all((betas > 0) & (betas[-1] <= 1)) or not np.all(betas[:-1] < 1):
        raise InvalidArgumentError("every beta must lie in (0, 1); the last may be 1 (zero terminal SNR)")
    return betas


# Name of a beta schedule -> the function, and the published beta_start and beta_end where it has them.
BETAS: dict[str, tuple[Callable[..., Float[np.ndarray, " T"]], tuple[float, float] | None]] = Table(
    "beta schedule"
)
BETAS |= {
    "linear": (linear_betas, (1e-4, 0.02)),
    "scaled_linear": (scaled_linear_betas, (0.00085, 0.012)),
    "cosine": (cosine_betas, None),
    "sigmoid": (sigmoid_betas, (1e-4, 0.02)),
    "sigmoid_alphas": (sigmoid_alphas_betas, None),
    "exponential": (exponential_betas, None),
    "laplace": (laplace_betas, None),
    "laplace_root": (functools.partial(laplace_betas, square_root=True), None),
}


class BetaSchedule(NamedTuple):
    """How betas were made, in names and numbers: see `VP.named`.

    Attributes:
        name: in `BETAS`.
        num_train_timesteps: T.
        beta_start, beta_end: None is the published number, or none where the schedule has no such option.
        zero_terminal_snr: rescaled so that the noisy end is pure noise.
    """

    name: str = "linear"
    num_train_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False

    def make(self) -> Float[np.ndarray, " T"]:
        """The betas, float64 [T]. Raises `UnknownNameError` and `InvalidArgumentError`."""
        function = BETAS[one_of("betas", self.name, BETAS)][0]
        if self.num_train_timesteps < 2:
            raise InvalidArgumentError(f"num_train_timesteps must be >= 2, got {self.num_train_timesteps}")
        betas = function(self.num_train_timesteps, **self.ends())
        return rescale_zero_terminal_snr(betas) if self.zero_terminal_snr else betas

    def ends(self) -> dict[str, float]:
        """beta_start and beta_end as numbers, the published ones where none were given."""
        published = BETAS[self.name][1]
        if published is None:
            return {}
        return {
            "beta_start": published[0] if self.beta_start is None else self.beta_start,
            "beta_end": published[1] if self.beta_end is None else self.beta_end,
        }


def _sigmoid(x: Float[np.ndarray, " *shape"] | float) -> Float[Any, " *shape"]:
    """1 / (1 + exp(-x)), in float64."""
    from scipy import special  # late: nothing else of the start of a program needs it

    return special.expit(x)
