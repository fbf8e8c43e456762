"""A module and its parameters as one value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import models
from jaxldm.arguments import a_module, instance, number
from jaxldm.checkpoints.names import published
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.functions import signature_error
from jaxldm.models.inputs import fitting

OF_APPLY = ("rngs", "mutable", "method", "capture_intermediates")  # of apply itself


@flax.struct.dataclass
class Network:
    """A module with its parameters: a function of arrays, and a pytree that jit takes as an argument.

    Example: `unet = Network(*checkpoints.load(folder))`, then `unet(x, t, encoder_hidden_states)`. Other
    parameters of the same shapes compile nothing new.
    """

    module: nn.Module = flax.struct.field(pytree_node=False)
    params: Any

    @property
    def config(self) -> Any:
        """The module's config."""
        return self.module.config

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        """`module.apply` with these parameters."""
        module: Any = a_module("the module of a Network(module, params)", self.module)
        try:
            with fitting(module):
                return module.apply({"params": self.params}, *inputs, **more)
        except TypeError as error:
            own = {name: value for name, value in more.items() if name not in OF_APPLY}
            wrong = None if "method" in more else signature_error(module.__call__, inputs, own)
            if wrong is None:
                raise
            raise wrong from error


def as_merging(name: str, value: Any) -> models.TokenMerging | None:
    """A ratio, or a `models.TokenMerging`; None for a ratio of 0, with which nothing is merged."""
    known = isinstance(value, models.TokenMerging)
    ratio = number(0, models.TokenMerging.most)
    options = value if known else models.TokenMerging(ratio(name, value))
    return options if options.ratio > 0 else None


def merging_tokens(network: Network, options: models.TokenMerging | None) -> Network:
    """The network with tokens merged in its blocks, of the same parameters; None changes nothing.

    Raises:
        InvalidArgumentError: a network that cannot, or options of another kind of network.
    """
    if options is None:
        return network
    module, kind = network.module, type(network.module).__name__
    # By the config: a network that is made of one of these has blocks that know nothing of it.
    if type(network.config) not in (models.DiTConfig, models.SiTConfig, models.UNet2DConditionConfig):
        raise InvalidArgumentError(
            "token_merging is for DiT, SiT and the U-Nets of Stable Diffusion, not for a "
            f"{kind}: leave it out"
        )
    levels = getattr(network.config, "down_block_types", None)
    if levels is None and options.cross_attention:
        raise InvalidArgumentError(
            f"cross_attention of token_merging is of U-Nets, and a {kind} has none: leave it out"
        )
    if levels is not None and not any(level.startswith("CrossAttn") for level in levels):
        raise InvalidArgumentError(
            "this U-Net has no transformer whose tokens could be merged: leave token_merging out"
        )
    return Network(module.clone(token_merging=options), network.params)


def check_finite(name: str, network: Network) -> None:
    """Raise `CheckpointError` for parameters that are NaN or infinite; not of arrays on other hosts."""
    for tensor, value in published(network.params).items():
        is_here = getattr(value.value, "is_fully_addressable", True)
        if is_here and jnp.issubdtype(value.dtype, jnp.inexact) and not np.isfinite(np.asarray(value)).all():
            raise CheckpointError(f"{name} holds NaN or infinity, in {tensor}: copy it again")


def check_weights(networks: Mapping[str, Network], drawn: Any) -> None:
    """Where what was drawn is not finite, look for the cause in the parameters, which are the first suspect.

    Args:
        networks: those of the model, by name.
        drawn: a pytree of arrays; only NumPy's floating-point arrays are looked at.

    Raises:
        CheckpointError: parameters that are NaN or infinite.
    """
    arrays = (leaf for leaf in jax.tree.leaves(drawn) if isinstance(leaf, np.ndarray))
    if all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f"):
        return
    for name, network in networks.items():
        if isinstance(network.params, Mapping):
            check_finite(name, network)


A_NETWORK = instance(Network, "a network such as pipelines.Network(module, params)")
