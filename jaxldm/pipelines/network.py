"""A module and its parameters as one value."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct

from jaxldm.arguments import a_module, instance
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


A_NETWORK = instance(Network, "a network such as pipelines.Network(module, params)")
