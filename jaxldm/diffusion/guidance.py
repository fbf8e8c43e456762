"""Guidance: functions from networks to `predict(x, t)`.

Two outputs are mixed, of the unconditional and of the conditional branch: `Branches`. No condition and a
condition (classifier-free guidance), or a weak network and a good one (autoguidance), are branches;
`guide_branches` and `adaptive_projected_guidance` mix any of them. The scale is a number, one per image, or a
function of t, as `guidance_schedule` and related functions make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real, ScalarLike

from jaxldm.arguments import (
    a_condition,
    array,
    check_broadcast,
    check_shapes,
    checked,
    count,
    function,
    instance,
    optional,
    several,
)
from jaxldm.diffusion.checks import check_condition
from jaxldm.diffusion.compiling import traced
from jaxldm.diffusion.paths import per_image
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.functions import returned

# w: a number, one per image, or a function of t [B] that gives either.
GuidanceScale = ScalarLike | Real[Array, " B"] | Callable[[Any], Any]


@checked(unconditional=array(), conditional=array(), guidance_scale=array())
def guide(
    unconditional: Float[Any, "B ..."],
    conditional: Float[Any, "B ..."],
    guidance_scale: ScalarLike | Real[Array, " B"],
) -> Float[Any, "B ..."]:
    """(1 - w) unconditional + w conditional (Ho and Salimans 2022; their w is guidance_scale - 1).

    Because eps, score, v, flow and x_0 are affine in one another at a fixed (x, t), mixing any of them so is
    the same guidance: in the score it is the gradient of log p(x)^(1 - w) p(x | c)^w. Exact at w = 0 and w =
    1.

    Args:
        unconditional: [B, H, W, C].
        conditional: [B, H, W, C].
        guidance_scale: w, a number or one per image [B].
    """
    check_broadcast(unconditional=unconditional, conditional=conditional)
    w = per_image(guidance_scale, conditional)
    return (1 - w) * unconditional + w * conditional


@checked(outputs=several(array("floating", axes=(1, 64))), guidance_scales=several(array()))
def guide_chain(
    outputs: Sequence[Float[Any, "B ..."]], guidance_scales: Sequence[ScalarLike | Real[Array, " B"]]
) -> Float[Any, "B ..."]:
    """outputs[0] + sum over k of w_k (outputs[k] - outputs[k - 1]): conditions that are added one by one.

    `guide` has two outputs and one scale. InstructPix2Pix has three, of nothing, of the picture, and of the
    picture and the text (Brooks et al. 2023, equation 3). Where all scales are equal, those in between do not
    count.

    Args:
        outputs: K + 1 of [B, H, W, C], each under one condition more than the one before it.
        guidance_scales: w_1 to w_K, each a number or one per image [B].

    Raises:
        InvalidArgumentError: another number of scales than of outputs but one.

    >>> import jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> nothing, picture, both = (jnp.full((1, 1), value) for value in (0.0, 1.0, 3.0))
    >>> float(D.guide_chain((nothing, picture, both), (1.5, 7.0))[0, 0])
    15.5
    """
    if len(outputs) != len(guidance_scales) + 1:
        raise InvalidArgumentError(
            f"guidance_scales must be one fewer than outputs, got {len(guidance_scales)} for {len(outputs)}"
        )
    check_shapes(**{f"outputs[{k}]": output for k, output in enumerate(outputs)})
    guided = outputs[0]
    for before, output, w in zip(outputs, outputs[1:], guidance_scales, strict=False):
        guided = guided + per_image(w, output) * (output - before)
    return guided


@checked(guided=array("floating", axes=(1, 64)), conditional=array("floating", axes=(1, 64)), rescale=array())
def rescale_guidance(
    guided: Float[Array, "B ..."],
    conditional: Float[Array, "B ..."],
    rescale: ScalarLike | Real[Array, " B"],
) -> Float[Array, "B ..."]:
    """phi guided std(conditional)/std(guided) + (1 - phi) guided: against over-exposed pictures.

    Standard deviations are taken per image over all other axes (Lin et al. 2023, equations 15 and 16; phi
    about 0.7). An image whose guided output is constant is left as it is.

    Args:
        rescale: phi in [0, 1], a number or one per image [B].
    """
    check_shapes(guided=guided, conditional=conditional)
    axes = tuple(range(1, guided.ndim))
    std = jnp.std(conditional, axes, keepdims=True), jnp.std(guided, axes, keepdims=True)
    flat = std[1] == 0
    factor = jnp.where(flat, 1, std[0] / jnp.where(flat, 1, std[1]))
    phi = per_image(rescale, guided)
    return phi * (factor * guided) + (1 - phi) * guided


class Branches(NamedTuple):
    """The unconditional and the conditional branch: guidance moves from the first to the second.

    Attributes:
        both: (x [2B, ...], t [2B]) -> [2B, ...]; the first half is the unconditional branch.
        cond: (x [B, ...], t [B]) -> [B, ...]; the conditional branch by itself.
    """

    both: Callable[[Any, Any], Any]
    cond: Callable[[Any, Any], Any]

    def map(self, wrap: Callable[[Any], Any]) -> Branches:
        """Both wrapped: networks become denoisers by `lambda network: D.denoiser(network, prediction)`."""
        return Branches(wrap(self.both), wrap(self.cond))

    def call(
        self, x: Float[Array, "B ..."], t: ScalarLike | Real[Array, " B"]
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
        """(uncond, cond), each [B, ...], from one batch of 2B."""
        t = jnp.broadcast_to(t, x.shape[:1])
        doubled = jnp.concatenate([x, x])
        outputs = returned("the network", self.both(doubled, jnp.concatenate([t, t])))
        if np.shape(outputs)[:1] != doubled.shape[:1]:
            raise InvalidArgumentError(
                f"the network must answer for each of the {len(doubled)} images that it is given, got shape "
                f"{list(np.shape(outputs))}"
            )
        uncond, cond = jnp.split(outputs.astype(x.dtype), 2)
        return uncond, cond


BRANCHES = instance(Branches, "branches from D.condition_branches or D.network_branches")


@checked(network=function("(x, t, condition) -> output"), condition=a_condition)
def condition_branches(
    network: Callable[[Any, Any, Any], Any], condition: Any, null_condition: Any
) -> Branches:
    """One network with the null condition (or a negative one) and the condition (Ho and Salimans 2022).

    Args:
        network: (x [N, H, W, C], t [N], condition [N, ...]) -> output [N, H, W, C], N being 2B or B.
        condition: an array [B, ...] or a tree of them (labels, text states, ...).
        null_condition: of the unconditional branch, broadcast to the condition: the null class, or a negative
            prompt. A negative condition is nothing more than this branch replaced.

    Raises:
        InvalidArgumentError: the two conditions differ in form.
    """
    condition = jax.tree.map(jnp.asarray, condition)
    null_condition = broadcast_null(null_condition, condition)
    both = jax.tree.map(lambda *branches: jnp.concatenate(branches), null_condition, condition)

    def call_both(x, t):
        check_condition(condition, x[: len(x) // 2])
        return network(x, t, both)

    def call_cond(x, t):
        check_condition(condition, x)
        return network(x, t, condition)

    return Branches(call_both, call_cond)


@checked(network=function("(x, t) -> output"), weak=function("(x, t) -> output"))
def network_branches(network: Callable[[Any, Any], Any], weak: Callable[[Any, Any], Any]) -> Branches:
    """A weak network as the unconditional branch, and a good one (autoguidance, Karras et al. 2024).

    Args:
        network: (x [B, H, W, C], t [B]) -> output [B, H, W, C].
        weak: the same of a smaller or less trained network, with the same condition and the same prediction.
    """

    def both(x, t):
        half = x.shape[0] // 2
        outputs = weak(x[:half], t[:half]), network(x[half:], t[half:])
        return jnp.concatenate([returned("each network", output) for output in outputs])

    return Branches(both, network)


@checked(branches=BRANCHES, guided_channels=optional(count(1)))
def guide_branches(
    branches: Branches,
    guidance_scale: GuidanceScale,
    rescale: ScalarLike | Real[Array, " B"] = 0.0,
    guided_channels: int | None = None,
) -> Callable[[Any, Any], Any]:
    """`predict(x, t)` that mixes any two branches by `guide`; where every scale is 1, only one is computed.

    Channels beyond x's own (a learned variance) are not guided: they stay those of the conditional branch.

    Args:
        branches: from `condition_branches`, `network_branches` or your own.
        guidance_scale: w, a number or one per image [B], or a function of t [B] that gives either; may be
            traced.
        rescale: phi of `rescale_guidance`.
        guided_channels: how many of x's channels are guided, from the first on; None: all. The samplers that
            the authors of DiT and SiT published guide three of the four latent channels.

    Raises:
        InvalidArgumentError: w or phi is NaN, infinite or negative, or phi is above 1.
    """
    rescale = check_scale("guidance rescale", rescale, 1.0)

    def mix(x, uncond, cond, w):
        channels = x.shape[-1] if guided_channels is None else guided_channels
        guided_part = cond[..., :channels]
        mixed = guide(uncond[..., :channels], guided_part, w)
        if not (isinstance(rescale, float) and rescale == 0):
            mixed = rescale_guidance(mixed, guided_part, jnp.asarray(rescale, x.dtype))
        return jnp.concatenate([mixed, cond[..., channels:]], axis=-1)

    return mix_branches(branches, guidance_scale, mix)


def mix_branches(
    branches: Branches, guidance_scale: GuidanceScale, mix: Callable[[Any, Any, Any, Any], Any]
) -> Callable[[Any, Any], Any]:
    """`predict(x, t)` = mix(x, uncond, cond, w), or the conditional branch alone where every w is 1."""
    if not callable(guidance_scale):
        guidance_scale = check_scale("guidance_scale", guidance_scale, np.inf)

    def unguided(x, t, w):
        return returned("the network", branches.cond(x, t)).astype(x.dtype)

    def guided(x, t, w):
        return mix(x, *branches.call(x, t), w)

    def predict(x, t):
        w = scale_at(guidance_scale, t).astype(x.dtype)
        if isinstance(guidance_scale, float):
            return unguided(x, t, w) if guidance_scale == 1 else guided(x, t, w)
        return jax.lax.cond(jnp.all(w == 1), unguided, guided, x, t, w)

    return predict


@checked(network=function("(x, t, condition) -> output"), guided_channels=optional(count(1)))
def classifier_free_guidance(
    network: Callable[[Any, Any, Any], Any],
    condition: Any,
    null_condition: Any,
    guidance_scale: GuidanceScale,
    rescale: ScalarLike | Real[Array, " B"] = 0.0,
    guided_channels: int | None = None,
) -> Callable[[Any, Any], Any]:
    """`predict(x, t)` that calls the network once, for both branches in one batch of 2B, and guides.

    Where every scale is 1 only the conditional branch is computed, with a traced scale too. So outside a
    `guidance_interval` a step costs half.

    Args:
        network: (x [N, H, W, C], t [N], condition [N, ...]) -> output [N, H, W, C], N being 2B or B.
        condition: an array [B, ...] or a tree of them (labels, text states, ...).
        null_condition: of the unconditional branch, broadcast to the condition: the null class, or a negative
            prompt. A negative condition is nothing more than this branch replaced.
        guidance_scale: w, a number or one per image [B], or a function of t [B] that gives either, from
            `guidance_schedule`, `guidance_interval`, `cfg_plus_plus`; may be traced. 0 is unconditional, 1
            conditional.
        rescale: phi of `rescale_guidance`.
        guided_channels: of x, from the first on; None: all. See `guide_branches`.

    Raises:
        InvalidArgumentError: w or phi is NaN, infinite or negative, or phi is above 1; the two conditions
            differ in form.

    >>> import jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> network = lambda x, t, labels: x * labels[:, None, None, None]
    >>> predict = D.classifier_free_guidance(network, jnp.ones(2), 0.0, guidance_scale=3.0)
    >>> float(predict(jnp.ones((2, 4, 4, 1)), jnp.zeros(2))[0, 0, 0, 0])
    3.0
    """
    branches = condition_branches(network, condition, null_condition)
    return guide_branches(branches, guidance_scale, rescale, guided_channels)


@checked(network=function("(x, t) -> output"), weak=function("(x, t) -> output"))
def autoguidance(
    network: Callable[[Any, Any], Any],
    weak: Callable[[Any, Any], Any],
    guidance_scale: GuidanceScale,
    rescale: ScalarLike | Real[Array, " B"] = 0.0,
) -> Callable[[Any, Any], Any]:
    """`predict(x, t)` = (1 - w) weak + w network: away from a network's own errors (Karras et al. 2024).

    Args:
        network: (x [B, H, W, C], t [B]) -> output [B, H, W, C]; may itself be guided.
        weak: a smaller or less trained network with the same condition and prediction.
        guidance_scale: w, as for `classifier_free_guidance`; 1 is the network itself, 0 the weak one.
        rescale: phi of `rescale_guidance`.

    Raises:
        InvalidArgumentError: w or phi is NaN, infinite or negative, or phi is above 1.
    """
    return guide_branches(network_branches(network, weak), guidance_scale, rescale)


def broadcast_null(null_condition: Any, condition: Any) -> Any:
    """The null condition as a tree with the condition's shapes and types.

    Raises:
        InvalidArgumentError: the two differ in form, or a shape does not broadcast.
    """
    check_same_form(null_condition, condition)

    def one(null, kept):
        try:
            return jnp.broadcast_to(jnp.asarray(null, kept.dtype), kept.shape)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidArgumentError(
                f"null_condition must broadcast to the condition's {list(kept.shape)} of {kept.dtype}, got "
                f"{shown(null)}"
            ) from error

    return jax.tree.map(one, null_condition, condition)


def check_same_form(null_condition: Any, condition: Any) -> None:
    """Raises `InvalidArgumentError` unless a null condition is a tree as the condition is."""
    if null_condition is None and condition is not None:
        raise InvalidArgumentError(
            "null_condition must be what stands for no condition, such as the null class, got None"
        )
    if jax.tree.structure(null_condition) != jax.tree.structure(condition):
        raise InvalidArgumentError(
            f"condition is {shown(jax.tree.structure(condition))}, but null_condition is "
            f"{shown(jax.tree.structure(null_condition))}: give both the same form"
        )


def check_scale(name: str, value: Any, highest: float) -> Any:
    """A float, or the array given; refuses what is not finite, negative or too high. Tracers pass.

    Raises:
        InvalidArgumentError: a number outside [0, highest].
    """
    given = array("real")(name, value)
    if traced(given):
        return given
    numbers = np.asarray(given, np.float64)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all() and (numbers <= highest).all()):
        bounds = "of at least 0" if math.isinf(highest) else f"from 0 to {highest:g}"
        raise InvalidArgumentError(f"{name} must be a finite number {bounds}, got {shown(value)}")
    return float(numbers) if numbers.ndim == 0 else jnp.asarray(given)


def scale_at(guidance_scale: GuidanceScale, t: Float[Array, " B"]) -> Float[Array, ""] | Float[Array, " B"]:
    """w at t, of t's type: a number or one per image [B], given as such or as a function of t."""
    return jnp.asarray(guidance_scale(t) if callable(guidance_scale) else guidance_scale, t.dtype)
