"""The kinds of control networks: what each fits to, takes of a picture, and gives.

A new one adds an entry to `KINDS`, under the class of its config.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Float

from jaxldm import models
from jaxldm.errors import CheckpointError
from jaxldm.pipelines.latents import encode_images
from jaxldm.pipelines.network import Network

Pictures = Float[np.ndarray, "N H W C"]
PARTS = ("controlnet", "adapter")  # each may come several times: controlnet, controlnet_1, ...


class Kind(NamedTuple):
    """A kind of control networks.

    Attributes:
        part: what its folder is called in a pipeline, one of `PARTS`.
        title: in messages.
        denoiser: the class of the denoising networks that it fits.
        mismatch: (its config, that of the denoising network) -> what differs, in words, or None.
        channels: (config) -> channels of its pictures.
        prepare: (pipe, network, pictures in [-1, 1]) -> what it takes of the pictures, by argument name:
            arrays with a row for each, made once, before the loop.
        num_residuals: (config) -> how many arrays it gives.
        in_loop: (it, the denoising network) -> the network that is called in every step; None: none is, and
            what was prepared is the residuals.
    """

    part: str
    title: str
    denoiser: str
    mismatch: Callable[[Any, Any], str | None]
    channels: Callable[[Any], int]
    prepare: Callable[[Any, Network, Pictures], dict[str, Any]]
    num_residuals: Callable[[Any], int]
    in_loop: Callable[[Network, Network], Network] | None = lambda network, denoiser: network


def base_name(part: str) -> str:
    """controlnet_1 -> controlnet; other names as they are."""
    name = re.sub(r"_\d+$", "", part)
    return name if name in PARTS else part


def control_parts(parts: Mapping[str, Any]) -> dict[str, Network]:
    """The control networks of a pipeline, ControlNets first, each kind in the order of their numbers."""

    def place(name: str) -> tuple[int, int]:
        number = name.removeprefix(base_name(name)).removeprefix("_")
        return PARTS.index(base_name(name)), int(number or 0)

    names = [name for name in parts if base_name(name) in PARTS and parts[name] is not None]
    return {name: parts[name] for name in sorted(names, key=place)}


def kind_of(network: Network) -> Kind:
    """Raises `CheckpointError` for a network that is no control network."""
    name = models.class_name(network.config)
    if name not in KINDS:
        raise CheckpointError(f"{name} is no control network; these are: {', '.join(KINDS)}")
    return KINDS[name]


def check_control(parts: Mapping[str, Any], denoiser: Network) -> None:
    """Raise `CheckpointError` where a control network is of another model than the denoising network."""
    for name, network in control_parts(parts).items():
        check_fits(f"its {name}", network, denoiser)


def check_fits(name: str, network: Network, denoiser: Network) -> None:
    """Raise `CheckpointError` for a control network of another model than the denoising network.

    Args:
        name: of the control network, for the message: its folder, where that is known.
    """
    kind, found = kind_of(network), models.class_name(denoiser.config)
    fix = f"give a {kind.title} made for this model"
    if found != kind.denoiser:
        raise CheckpointError(f"{name} is for a {kind.denoiser}, and the model has a {found}: {fix}")
    wrong = kind.mismatch(network.config, denoiser.config)
    if wrong is not None:
        raise CheckpointError(f"{name} is a {kind.title} of another model: {wrong}: {fix}")


def differing(names: Mapping[str, tuple[Any, Any]]) -> str | None:
    """The first of the names whose two values differ, in words."""
    for name, (own, other) in names.items():
        if own != other:
            return f"it has {name} {_plain(own)}, the denoising network {_plain(other)}"
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ---------------------------------------------------------------- ControlNet of Stable Diffusion


def controlnet_mismatch(own: Any, unet: Any) -> str | None:
    """What a ControlNet shares with its U-Net; 9 channels are those of inpainting."""
    levels, layers = len(unet.block_out_channels), unet.layers_per_block
    each = (own.layers_per_block,) * levels if isinstance(layers, tuple) else own.layers_per_block
    return differing(
        {
            "in_channels": (own.in_channels, unet.in_channels if unet.in_channels < 9 else unet.out_channels),
            "block_out_channels": (own.block_out_channels, unet.block_out_channels),
            "layers_per_block": (each, layers),
            "text states of width": (own.text_dim, unet.text_dim),
            "addition_embed_type": (own.addition_embed_type, unet.addition_embed_type),
            "projection_class_embeddings_input_dim": (
                own.projection_class_embeddings_input_dim,
                unet.projection_class_embeddings_input_dim,
            ),
        }
    )


def as_pixels(pipe: Any, network: Network, pictures: Pictures) -> dict[str, Any]:
    """The pictures in [0, 1]."""
    return {"control_image": ((pictures + 1) / 2).astype(np.float32)}


# ---------------------------------------------------------------- T2I-Adapter


def adapter_mismatch(own: Any, unet: Any) -> str | None:
    """The features must be as wide as the levels of the U-Net that they are added to."""
    widths, levels = own.widths, unet.block_out_channels
    wanted = (*levels, levels[-1])[: len(widths)] if len(widths) <= len(levels) + 1 else levels
    return differing({"channels": (widths, wanted)})


@jax.jit
def _features(network: Network, pictures: Any) -> Any:
    return cast(Any, network.module).apply({"params": network.params}, pictures)


def adapter_features(pipe: Any, network: Network, pictures: Pictures) -> dict[str, Any]:
    """The features of each picture, one picture at a time."""
    pixels = as_pixels(pipe, network, pictures)["control_image"]
    made = [_features(network, pixels[k : k + 1]) for k in range(len(pixels))]
    return jax.tree.map(lambda *rows: np.concatenate([np.asarray(row) for row in rows]), *made)


# ---------------------------------------------------------------- transformers


def sd3_mismatch(own: Any, transformer: Any) -> str | None:
    """What a ControlNet shares with its transformer; more channels of the picture are a mask."""
    names = ["in_channels", "hidden_size", "pooled_projection_dim", "patch_size"]
    names += ["joint_attention_dim"] * (own.joint_attention_dim is not None)
    names += ["pos_embed_max_size"] * (not own.use_pos_embed)
    wrong = differing({name: (getattr(own, name), getattr(transformer, name)) for name in names})
    if wrong is None and own.extra_conditioning_channels:
        return f"it takes {own.extra_conditioning_channels} more channels of the picture, which none has here"
    return wrong


def with_first_layer(network: Network, transformer: Network) -> Network:
    """The network, with the transformer's first layer where it has none."""
    if network.config.use_pos_embed:
        return network
    params = {**network.params, "pos_embed": transformer.params["pos_embed"]}
    return Network(network.module.clone(borrows=True), params)


def flux_mismatch(own: Any, transformer: Any) -> str | None:
    """What a ControlNet shares with its transformer."""
    names = ("in_channels", "inner_dim", "joint_attention_dim", "pooled_projection_dim")
    return differing({name: (getattr(own, name), getattr(transformer, name)) for name in names})


def as_latents(pipe: Any, network: Network, pictures: Pictures) -> dict[str, Any]:
    """The latents of the pictures."""
    return {"control_image": encode_images(pipe.vae, pictures)}


def as_sd3_latents(pipe: Any, network: Network, pictures: Pictures) -> dict[str, Any]:
    """The latents; for networks that were trained so without their shift, and a pooled text of zeros."""
    latents = encode_images(pipe.vae, pictures)
    if not network.config.force_zeros_for_pooled_projection:
        return {"control_image": latents}
    shift = (pipe.vae.config.shift_factor or 0.0) * pipe.vae.config.scaling_factor
    pooled = np.zeros((len(pictures), network.config.pooled_projection_dim), np.float32)
    return {"control_image": latents + np.float32(shift), "pooled_projections": pooled}


KINDS: dict[str, Kind] = {
    "ControlNetModel": Kind(
        part="controlnet",
        title="ControlNet",
        denoiser="UNet2DConditionModel",
        mismatch=controlnet_mismatch,
        channels=lambda config: config.conditioning_channels,
        prepare=as_pixels,
        num_residuals=lambda config: config.num_residuals,
    ),
    "T2IAdapter": Kind(
        part="adapter",
        title="T2I-Adapter",
        denoiser="UNet2DConditionModel",
        mismatch=adapter_mismatch,
        channels=lambda config: config.in_channels,
        prepare=adapter_features,
        num_residuals=lambda config: len(config.widths),
        in_loop=None,
    ),
    "SD3ControlNetModel": Kind(
        part="controlnet",
        title="ControlNet",
        denoiser="SD3Transformer2DModel",
        mismatch=sd3_mismatch,
        channels=lambda config: 3,
        prepare=as_sd3_latents,
        num_residuals=lambda config: config.num_residuals,
        in_loop=with_first_layer,
    ),
    "FluxControlNetModel": Kind(
        part="controlnet",
        title="ControlNet",
        denoiser="FluxTransformer2DModel",
        mismatch=flux_mismatch,
        channels=lambda config: 3,
        prepare=as_latents,
        num_residuals=lambda config: config.num_residuals,
    ),
}
