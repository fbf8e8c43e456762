"""A denoising network with a control network in front of it: what is trained, and how one begins."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.arguments import a_module, a_params, checked, instance, one_key
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.controlnet import ControlNetConfig, ControlNetModel
from jaxldm.models.denoising_network import applied, network
from jaxldm.models.unet_2d_condition import UNet2DConditionModel
from jaxldm.nn.initialization import init_params

# Of the U-Net's entries, what a ControlNet copies.
COPIED = ("conv_in", "time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj", "mid_block")


def residuals_of(
    control: nn.Module, params: Any, x: Any, t: Any, arguments: Mapping[str, Any], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """What a control network adds, by the arguments of the denoising network that take it.

    Args:
        control: takes x, t, those of `arguments` that it knows, and `inputs`.
        params: its parameters.
        x, t: as of `network`.
        arguments: of the denoising network.
        inputs: its own: "control_image" and what else its kind takes.
    """
    known = inspect.signature(control.__call__).parameters
    own = {name: value for name, value in arguments.items() if name in known}
    return applied(control)(params, x, t, {**own, **inputs})


@checked(module=a_module, params=a_params, control=a_module)
def controlled_network(
    module: nn.Module, params: Any, control: nn.Module
) -> Callable[..., Float[Array, "B H W C"]]:
    """A denoising network as a function of the parameters of its ControlNet, to train these alone.

    It is `(control_params, x, t, condition) -> output` as of `network(module)`, with "control_image" as one
    more entry of the condition, and goes where any network does: `D.diffusion_loss`, `D.denoiser`.

    Args:
        module: the denoising network, which takes residuals.
        params: its parameters, which stay.
        control: the ControlNet.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> unet, control = models.build("sd15-unet"), models.build("sd15-controlnet")
    >>> x, t, image = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros((1, 256, 256, 3))
    >>> condition = {"encoder_hidden_states": jnp.zeros((1, 77, 768)), "control_image": image}
    >>> def output(params, control_params):
    ...     return models.controlled_network(unet, params, control)(control_params, x, t, condition)
    >>> jax.eval_shape(output, models.shapes(unet), models.shapes(control)).shape
    (1, 32, 32, 4)
    """
    denoise = network(module)

    def call(
        control_params: Any,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        condition: Mapping[str, Any],
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B H W C"]:
        given = dict(condition)
        if "control_image" not in given:
            raise InvalidArgumentError("the condition lacks control_image, the picture of the ControlNet")
        inputs = {"control_image": given.pop("control_image")}
        added = residuals_of(control, control_params, x, t, given, inputs)
        return denoise(params, x, t, {**given, **added}, dropout_key=dropout_key)

    return call


@checked(
    unet=instance(UNet2DConditionModel, "a U-Net of Stable Diffusion, models.UNet2DConditionModel"),
    params=a_params,
    key=one_key,
)
def controlnet_from_unet(
    unet: UNet2DConditionModel, params: Mapping[str, Any], key: PRNGKeyArray, **options: Any
) -> tuple[ControlNetModel, dict]:
    """A ControlNet that begins as the U-Net that it is for: (module, parameters).

    Its down blocks, middle and embeddings are copies; its outputs are zero, so that it changes nothing yet
    (Zhang et al. 2023, section 3.1).

    Args:
        unet: of Stable Diffusion 1, 2 or XL.
        params: its parameters.
        key: draws the layers that see the picture.
        options: fields of `ControlNetConfig` that a U-Net lacks: conditioning_channels,
            conditioning_embedding_out_channels.

    Raises:
        InvalidArgumentError: a U-Net with what a ControlNet cannot have.
    """
    fields = {field.name for field in dataclasses.fields(ControlNetConfig)}
    shared = {name: value for name, value in vars(unet.config).items() if name in fields}
    module = ControlNetModel(ControlNetConfig(**shared | options))
    fresh = init_params(module, key, *module.example_inputs())
    flat = cast(dict[Any, Any], traverse_util.flatten_dict(fresh))
    given = cast(dict[Any, Any], traverse_util.flatten_dict(params))
    for path, own in flat.items():
        if path[0] not in COPIED and not path[0].startswith("down_blocks_"):
            continue
        if getattr(given.get(path), "shape", None) != own.shape:
            raise InvalidArgumentError(
                f"params are not those of the U-Net: they lack {'/'.join(path)} {own.shape}"
            )
        flat[path] = jnp.array(given[path], copy=True)
    return module, traverse_util.unflatten_dict(flat)
