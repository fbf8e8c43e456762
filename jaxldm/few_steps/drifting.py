"""Drifting: samples are pushed towards data and away from each other, without an ODE (Deng et al. 2026)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.arguments import array, check_dims, checked, number, several
from jaxldm.few_steps.jumps import stopped

A_SET = array("floating", "[N, D]", axes=2, filled=True)
_LEAST = 1e-6  # of the product of two softmaxes: the farthest data still attract


@checked(samples=A_SET, data=A_SET, radii=several(number(above=0)))
def drift(
    samples: Float[Array, "N D"], data: Float[Array, "M D"], radii: Sequence[float] = (0.02, 0.05, 0.2)
) -> tuple[Float[Array, "N D"], Float[Array, ""]]:
    """The force on each sample, and the unit of length: attraction to data less repulsion from samples.

    With the mean distance as the unit, the affinity of sample i and point j is exp(-d_ij / R), normalised by
    the geometric mean of its softmaxes over the points and over the samples. With A+ those of the data and
    A- those of the other samples, the force is

        sum_j (A+_ij sum_k A-_ik) y_j - sum_j (A-_ij sum_k A+_ik) x_j,

    which is antisymmetric in data and samples but for the normalisations: the softmax over the samples is of
    N for a point of the data and of N - 1 for another sample, and the mean square below is of the samples.
    Where both are drawn from one distribution, it is therefore 0 on average for N to infinity, and nearly 0
    for few points. The force of each R has unit mean square, and they are added up.

    Args:
        samples: [N, D], features of what the generator drew: the paper's are of a network that was trained
            on images, the recipe `mini-drifting` takes the latents themselves.
        data: [M, D], the same features of data of the same condition.
        radii: R, in mean distances.

    Returns:
        (force [N, D] in units of length, the unit).

    Source: Deng et al. 2026 (Generative modeling via drifting), section 3 and Algorithm 1.
    """
    check_dims(samples=(samples, "N D"), data=(data, "M D"))
    points = jnp.concatenate([samples, data])
    squares = jnp.sum((samples[:, None] - points[None]) ** 2, axis=-1)
    distance = jnp.sqrt(jnp.maximum(squares, 1e-8))
    unit = jnp.maximum(jnp.mean(distance), 1e-3)
    length = unit / jnp.sqrt(samples.shape[1])  # of one feature
    other = 1 - jnp.eye(len(samples), len(points))  # a sample does not repel itself
    apart = jnp.where(other > 0, distance / unit, jnp.inf)
    force = jnp.zeros_like(samples)
    for radius in radii:
        rows, columns = (jax.nn.softmax(-apart / radius, axis=axis) for axis in (1, 0))
        affinity = other * jnp.sqrt(jnp.maximum(rows * columns, _LEAST))
        repels, attracts = affinity[:, : len(samples)], affinity[:, len(samples) :]
        pull = attracts * jnp.sum(repels, axis=1, keepdims=True)
        push = repels * jnp.sum(attracts, axis=1, keepdims=True)
        one = (pull @ data - push @ samples) / length  # both have the same sum: no matter where the origin is
        force = force + one / jnp.sqrt(jnp.maximum(jnp.mean(one**2), 1e-8))
    return force, length


@checked(samples=A_SET, data=A_SET, radii=several(number(above=0)))
def drifting_loss(
    samples: Float[Array, "N D"], data: Float[Array, "M D"], radii: Sequence[float] = (0.02, 0.05, 0.2)
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of |x - sg(x + force)|^2 of a feature, in units of length: one step along the force.

    Its value is that of the force, which never falls to 0 as each has unit mean square; what falls is how
    much of it is common to neighbouring samples.

    Args:
        samples: [N, D], of one condition: the generator's, through which the gradient flows.
        data: [M, D]; radii: see `drift`.

    Returns:
        (loss, {"unit": the length of a feature, a constant}).
    """
    force, length = drift(stopped(samples), stopped(data), radii)
    scaled = samples / stopped(length)
    goal = stopped(scaled + force)
    return jnp.mean((scaled - goal) ** 2), {"unit": length}
