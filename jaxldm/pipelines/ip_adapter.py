"""Pictures as prompts: IP-Adapters for Stable Diffusion 1.5 and XL (Ye et al. 2023, arXiv:2308.06721).

    pipe = pipelines.with_ip_adapter(pipe, "ip-adapter_sd15.safetensors", "image_encoder")
    images = pipe(key, "on a beach", ip_adapter_image=picture, ip_adapter_scale=0.6)

The keys and values of an adapter lie among the parameters of the U-Net, which takes the tokens of pictures
next to the states of the text. Tokens and scales are data: another picture or scale compiles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from jaxldm import checkpoints, models
from jaxldm.arguments import a_path, checked, optional
from jaxldm.checkpoints.folder import check_one_network
from jaxldm.checkpoints.ip_adapter_file import IPAdapter
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.folders import a_folder_or_parts
from jaxldm.pipelines.image_prompts import ImageAdapter, embeds_of, read_images
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline

STAGES = ("down_blocks", "up_blocks", "mid_block")  # the order in which adapters count attention layers
FAMILIES = ("StableDiffusion", "StableDiffusionXL")


@checked(pipe=A_PIPELINE, path=a_path, image_encoder=optional(a_folder_or_parts))
def with_ip_adapter(pipe: Pipeline, path: str | Path, image_encoder: Any = None) -> Pipeline:
    """The model with an IP-Adapter, plain or plus, which lets pictures be prompts; called again, with two.

    Args:
        pipe: of Stable Diffusion 1.5 or XL; stays as it is.
        path: a published file, see `checkpoints.load_ip_adapter`.
        image_encoder: the folder of the CLIP tower that the adapter was trained with, or (module,
            parameters). None: that of the adapter before, or the folder `image_encoder` next to the file; if
            there is none, calls take `ip_adapter_image_embeds`.

    Raises:
        CheckpointError: no such file or folder, an adapter of another model, another encoder's width.
        InvalidArgumentError: a model of another family.

    >>> from jaxldm import pipelines  # doctest: +SKIP
    >>> pipe = pipelines.load("stable-diffusion-v1-5", dtype="bfloat16")  # doctest: +SKIP
    >>> adapter, encoder = "ip-adapter_sd15.safetensors", "image_encoder"  # doctest: +SKIP
    >>> pipe = pipelines.with_ip_adapter(pipe, adapter, encoder)  # doctest: +SKIP
    >>> images = pipe(key, "on a beach", ip_adapter_image=picture, ip_adapter_scale=0.6)  # doctest: +SKIP
    """
    if pipe.family.name not in FAMILIES:
        raise InvalidArgumentError(
            f"IP-Adapters are for the families {' and '.join(FAMILIES)}, this model is of {pipe.family.name}"
        )
    unet, path = pipe.denoiser, Path(path)
    adapter = checkpoints.load_ip_adapter(path, dtype=unet.config.dtype)
    places = _cross_attention(unet)
    _check_fits(path, adapter, places, unet.config.cross_attention_dim)
    encoder = _encoder(pipe, path, image_encoder)
    made = ImageAdapter(encoder, Network(adapter.module, adapter.params), adapter.takes_patches)
    if encoder is not None:
        _check_encoder(path, made, encoder.config)
    flat = cast(dict[Any, Any], traverse_util.flatten_dict(unet.params))
    number, dtype = len(pipe.image_adapters), flat["conv_in", "kernel"].dtype
    for place, pair in zip(places, adapter.layers, strict=True):
        for kind, kernel in zip("kv", pair, strict=True):
            name = (*place, "processor", f"to_{kind}_ip_{number}", "kernel")
            flat[name] = jnp.asarray(kernel, dtype)
    changed = Network(unet.module, traverse_util.unflatten_dict(flat))
    return pipe.replace(denoiser=changed).with_image_adapters((*pipe.image_adapters, made))


def _cross_attention(unet: Network) -> dict[tuple[str, ...], int]:
    """The place and the width of each attention layer to the text, in the order of adapters' files."""
    shapes = cast(dict[Any, Any], traverse_util.flatten_dict(models.shapes(unet.module)))
    found = {path[:-2]: leaf.shape[-1] for path, leaf in shapes.items() if path[-3:-1] == ("attn2", "to_q")}

    def order(place: tuple[str, ...]) -> tuple[int, ...]:
        stage = next(n for n, name in enumerate(STAGES) if place[0].startswith(name))
        return (stage, *(int(name.rsplit("_", 1)[1]) for name in place[:-1] if name[-1].isdigit()))

    return {place: found[place] for place in sorted(found, key=order)}


def _check_fits(path: Path, adapter: IPAdapter, places: Mapping[Any, int], width: int) -> None:
    """Raise `CheckpointError` for the adapter of another U-Net."""
    text, wanted, fix = width, list(places.values()), "give one made for this model"
    found = [key.shape[1] for key, _ in adapter.layers]
    if len(found) != len(wanted):
        raise CheckpointError(
            f"{path} is an adapter of another model: it has {len(found)} attention layers, this U-Net has "
            f"{len(wanted)}: {fix}"
        )
    given = {key.shape[0] for key, _ in adapter.layers} | {cast(Any, adapter.module).features}
    if given != {text}:
        raise CheckpointError(
            f"{path} is an adapter of another model: its tokens are {min(given - {text})} wide, this U-Net "
            f"takes {text}: {fix}"
        )
    if found != wanted:
        place = next(n for n, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
        raise CheckpointError(
            f"{path} is an adapter of another model: its attention layer {place} is {found[place]} wide, "
            f"that of this U-Net {wanted[place]}: {fix}"
        )


def _encoder(pipe: Pipeline, path: Path, given: Any) -> Network | None:
    """The image encoder, as `with_ip_adapter` says."""
    if given is None:
        if pipe.image_adapters:
            return pipe.image_adapters[-1].encoder
        given = path.parent / "image_encoder"
        if not given.is_dir():
            return None
    if isinstance(given, tuple):
        return Network(*given)
    check_one_network(given, "an image encoder", "image_encoder")
    return Network(*checkpoints.load(given, dtype=pipe.denoiser.config.dtype))


def _check_encoder(path: Path, adapter: ImageAdapter, config: Any) -> None:
    """Raise `CheckpointError` for an encoder that gives something else than the adapter takes."""
    if not isinstance(config, models.CLIPVisionConfig):
        raise CheckpointError(
            f"the image encoder is a {models.class_name(config)}: an adapter takes the folder of a "
            "CLIPVisionModelWithProjection"
        )
    width = config.hidden_size if adapter.takes_patches else config.projection_dim
    if width != adapter.width:
        raise CheckpointError(
            f"{path} takes {'patches' if adapter.takes_patches else 'embeddings'} {adapter.width} wide, this "
            f"image encoder gives {width}: give the one that the adapter was trained with"
        )


@checked(pipe=A_PIPELINE)
def encode_image_prompts(pipe: Pipeline, images: Any) -> list[Float[np.ndarray, "2 n ..."]]:
    """The embeddings of pictures, to be given again and again as `ip_adapter_image_embeds`.

    Args:
        pipe: with an IP-Adapter and its image encoder.
        images: as `ip_adapter_image` of a call.

    Returns:
        of each adapter [2, n, D], or [2, n, T, D] of a plus adapter: of the negatives, and of the n pictures.

    Raises:
        InvalidArgumentError, DataError: as a call does.
    """
    if not pipe.image_adapters:
        raise InvalidArgumentError("pipe has no IP-Adapter: write pipelines.with_ip_adapter(pipe, path)")
    found = read_images(pipe.image_adapters, images)
    return [embeds_of(adapter, each) for adapter, each in zip(pipe.image_adapters, found, strict=True)]
