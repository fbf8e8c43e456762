"""What control networks add to the denoising network, inside the sampling loop. See `control`.

A control network is another function of (x_t, t, condition): its residuals are arguments of the denoising
network, by their names there. What it takes of the picture is made once, before the loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.models.control_networks import residuals_of
from jaxldm.pipelines.network import Network

# Of a condition: what each control network takes of its picture, and the share of each row in all of them.
INPUTS, SHARE = "_control_inputs", "_control_share"


class Control(NamedTuple):
    """One control network of a run; all of it is data, but for the module.

    Attributes:
        network: (x, t, condition and what it takes of the picture) -> residuals, by the argument of the
            denoising network that takes them; None: what was made of the picture is the residuals.
        scales: one for each residual, in the order of `jax.tree.leaves`.
        t_from, t_until: t of the first and behind the last step of its use.
    """

    network: Network | None
    scales: Float[Any, " residuals"]
    t_from: Float[Any, ""]
    t_until: Float[Any, ""]


def controlled(
    controls: Sequence[Control],
    x: Float[Array, "N h w c"],
    t: Float[Array, " N"],
    condition: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments of the denoising network, the residuals of all control networks summed among them.

    Args:
        controls: of the run.
        x: without the further channels that an inpainting network takes.
        condition: with `INPUTS` and `SHARE`.
        arguments: of the denoising network so far, of which a control network takes those that it knows.
    """
    total: dict[str, Any] = {}
    for control, inputs in zip(controls, condition[INPUTS], strict=True):
        for name, residual in _residuals(control, x, t, inputs, arguments, condition[SHARE]).items():
            known = total.get(name)
            total[name] = residual if known is None else jax.tree.map(jnp.add, known, residual)
    return {**arguments, **total}


def _residuals(
    control: Control, x: Any, t: Any, inputs: Any, arguments: Mapping[str, Any], share: Float[Array, " N"]
) -> dict[str, Any]:
    """Those of one network, scaled; zeros, without a call, outside of the steps of its use."""

    def call() -> Any:
        if control.network is None:
            return inputs
        return residuals_of(control.network.module, control.network.params, x, t, arguments, inputs)

    def zeros() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(call))

    t = jnp.broadcast_to(t, x.shape[:1])
    used = jnp.all((t <= control.t_from) & (t >= control.t_until))
    leaves, tree = jax.tree.flatten(jax.lax.cond(used, call, zeros))
    rows = [jnp.asarray(scale * share) for scale in control.scales]
    scaled = [
        leaf * row.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))
        for leaf, row in zip(leaves, rows, strict=True)
    ]
    return jax.tree.unflatten(tree, scaled)
