"""Adaptive projected guidance, APG (Sadat, Hilliges and Weber 2024): strong guidance, no over-exposure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real, ScalarLike

from jaxldm.arguments import array, check_shapes, checked, optional
from jaxldm.diffusion.compiling import traced
from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.guidance import BRANCHES, Branches, GuidanceScale, check_scale, mix_branches, scale_at
from jaxldm.diffusion.paths import per_image
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver, divide
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import InvalidArgumentError


@checked(
    conditional=array("floating", axes=(1, 64)),
    difference=array("floating", axes=(1, 64)),
    guidance_scale=array(),
    eta=array(axes=0),
    norm_threshold=optional(array(axes=0)),
)
def project_guidance(
    conditional: Float[Array, "B ..."],
    difference: Float[Array, "B ..."],
    guidance_scale: ScalarLike | Real[Array, " B"],
    eta: ScalarLike = 0.0,
    norm_threshold: ScalarLike | None = None,
) -> Float[Array, "B ..."]:
    """x_0(c) + (w - 1) (d_orthogonal + eta d_parallel) (Sadat et al. 2024, Algorithm 1).

    d, the difference of the branches, is first shortened to norm_threshold where it is longer; then it is
    split into its parts along x_0(c) and across it, per image over all other axes. The part along x_0(c) is
    what makes colours saturate. With eta = 1 and no threshold this is classifier-free guidance.

    Args:
        conditional: x_0(c), [B, H, W, C].
        difference: d, x_0(c) - x_0(null), with or without momentum.
        guidance_scale: w, a number or one per image [B].
        eta: how much of the parallel part is kept; 0 in the paper.
        norm_threshold: r >= 0; None: d is never shortened.
    """
    check_shapes(conditional=conditional, difference=difference)
    axes = tuple(range(1, conditional.ndim))

    def product(a, b):
        return jnp.sum(a * b, axes, keepdims=True)

    if norm_threshold is not None:
        square = product(difference, difference)
        long = square > norm_threshold**2
        difference = difference * jnp.where(long, norm_threshold / jnp.sqrt(jnp.where(long, square, 1)), 1)
    along = divide(product(difference, conditional), product(conditional, conditional), 0.0) * conditional
    return conditional + (per_image(guidance_scale, conditional) - 1) * (difference - (1 - eta) * along)


@dataclasses.dataclass(frozen=True, eq=False)
class ProjectedDenoiser(Denoiser):
    """A denoiser under projected guidance with momentum: it needs a solver that remembers, `with_momentum`.

    Attributes:
        remembering: (x, t [B], average) -> (x_0, new average), all but t [B, H, W, C].
    """

    remembering: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None


@checked(branches=BRANCHES, eta=array(axes=0), momentum=optional(array(axes=0)))
def adaptive_projected_guidance(
    branches: Branches,
    guidance_scale: GuidanceScale,
    *,
    eta: ScalarLike = 0.0,
    norm_threshold: ScalarLike | None = None,
    momentum: Float[Any, ""] | float | None = None,
) -> Denoiser:
    """`denoise(x, t)` by `project_guidance` of two denoisers, called in one batch of 2B.

    Args:
        branches: of denoisers, for guidance is projected in x_0: `condition_branches(network, condition,
            null_condition).map(lambda predict: D.denoiser(predict, prediction))`.
        guidance_scale: w as for `classifier_free_guidance`; where every w is 1 the conditional branch alone
            is computed (with momentum, always both).
        eta: see `project_guidance`.
        norm_threshold: r, likewise; 2.5 to 15 in the paper, where x_0 has unit scale.
        momentum: beta of d_average = d + beta d_average_before, from step to step; the paper's are negative,
            -0.5 or -0.75. It is memory, so the solver has to keep it: `with_momentum(solver)`.

    Raises:
        InvalidArgumentError: branches of bare networks, a scale that `guide_branches` refuses, a threshold
            that is negative or not finite, or a momentum outside (-1, 1).

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> path = D.Flow()
    >>> network = lambda x, t, labels: x * labels[:, None, None, None]
    >>> branches = D.condition_branches(network, jnp.array([1.0, 2.0]), 0.0)
    >>> denoisers = branches.map(lambda predict: D.denoiser(predict, D.flow(path)))
    >>> denoise = D.adaptive_projected_guidance(denoisers, 5.0, norm_threshold=2.5, momentum=-0.5)
    >>> solver = D.with_momentum(D.solvers.ddim())
    >>> D.sample(jax.random.key(0), denoise, solver, D.make_grid(path, 4), jnp.ones((2, 4, 4, 1))).shape
    (2, 4, 4, 1)
    """
    path = getattr(branches.cond, "path", None)
    if path is None:
        raise InvalidArgumentError(
            "projected guidance is projected in x_0: make denoisers of the branches with "
            "branches.map(lambda predict: D.denoiser(predict, prediction))"
        )
    if norm_threshold is not None:
        check_scale("norm_threshold", norm_threshold, np.inf)
    if not (momentum is None or traced(momentum) or -1 < momentum < 1):
        raise InvalidArgumentError(f"momentum must lie between -1 and 1 (-0.5 in the paper), not {momentum}")
    if not callable(guidance_scale):
        guidance_scale = check_scale("guidance_scale", guidance_scale, np.inf)

    def mix(x, uncond, cond, w):
        return project_guidance(cond, cond - uncond, w, eta, norm_threshold)

    if momentum is None:
        return Denoiser(mix_branches(branches, guidance_scale, mix), path)

    def remembering(x, t, average):
        uncond, cond = branches.call(x, t)
        average = cond - uncond + momentum * average
        w = scale_at(guidance_scale, t)
        return project_guidance(cond, average, w, eta, norm_threshold), average

    def forgetful(x, t):
        raise InvalidArgumentError(
            "guidance with momentum remembers the steps before: sample with D.with_momentum(solver)"
        )

    return ProjectedDenoiser(forgetful, path, remembering=remembering)


class MomentumState(NamedTuple):
    """x, the solver's own state, and the running average of the difference between the branches."""

    x: Float[Array, "B ..."]
    inner: Any
    average: Float[Array, "B ..."]


@checked(solver=A_SOLVER)
@equal_by_call
def with_momentum(solver: Solver) -> Solver:
    """A solver that also keeps the memory of `adaptive_projected_guidance(..., momentum=)`.

    The average moves once a step, by the difference at the step's first row; every evaluation within the step
    adds its own difference to the average before it.
    """

    def guided(state, denoise, x, t):
        if getattr(denoise, "remembering", None) is None:
            raise InvalidArgumentError(
                "with_momentum(solver) needs adaptive_projected_guidance(..., momentum=...)"
            )
        return denoise.remembering(x, jnp.broadcast_to(t, x.shape[:1]), state.average)

    def step(state, denoise, grid, i, keys):
        # The solver calls the network with the same x and t again: XLA computes it once.
        _, average = guided(state, denoise, state.x, grid.t[i])
        steady = Denoiser(lambda x, t: guided(state, denoise, x, t)[0], denoise.path)
        inner, x_0 = solver.step(state.inner._replace(x=state.x), steady, grid, i, keys)
        return MomentumState(inner.x, inner, average), x_0

    return Solver(lambda x: MomentumState(x, solver.init(x), jnp.zeros_like(x)), step)
