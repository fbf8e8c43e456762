"""What a call shows to its IP-Adapters: pictures, or their embeddings, and the tokens made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxldm import models
from jaxldm.data.images import to_uint8
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.call import IMAGE_PROMPTS, Call
from jaxldm.pipelines.inputs import rgb_pixels
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.reading import shown


class ImageAdapter(NamedTuple):
    """What makes tokens of pictures.

    Attributes:
        encoder: CLIP's image tower; None: embeddings must be given in place of pictures.
        projection: embeddings, or states of patches -> tokens.
        takes_patches: which of the two.
    """

    encoder: Network | None
    projection: Network
    takes_patches: bool

    @property
    def axes(self) -> int:
        """Of the embeddings of several pictures: [n, D], or [n, T, D]."""
        return 3 if self.takes_patches else 2

    @property
    def width(self) -> int:
        """D, of what the projection takes."""
        return cast(Any, self.projection.module).in_features


# ---------------------------------------------------------------- what a call is given


class Pictures(NamedTuple):
    """What a call shows to its adapters, checked.

    Attributes:
        images: of each adapter, 8-bit pictures of any size; None where embeddings are given.
        embeds: of each adapter, [2, n, ...] of the negatives and the pictures, or [1, n, ...] of these alone.
        scales: of each adapter.
    """

    images: list[list[np.ndarray]] | None
    embeds: list[np.ndarray] | None
    scales: list[float]


def read_pictures(pipe: Pipeline, call: Call) -> Pictures | None:
    """The pictures of a call, or their embeddings; None of a call without.

    Raises:
        InvalidArgumentError: another number of them than adapters, both, a missing encoder, embeddings of
            another shape, NaN.
        DataError: what is no picture.
    """
    image, embeds, scale = (getattr(call, name) for name in IMAGE_PROMPTS)
    adapters = pipe.image_adapters
    if image is None and embeds is None:
        if scale is not None:
            raise InvalidArgumentError("ip_adapter_scale is of ip_adapter_image: give one, or leave it out")
        return None
    if image is not None and embeds is not None:
        raise InvalidArgumentError("ip_adapter_image and ip_adapter_image_embeds: give one of them")
    scales = scale if isinstance(scale, tuple) else (1.0 if scale is None else scale,) * len(adapters)
    _check_count("ip_adapter_scale", scales, adapters)
    if image is not None:
        return Pictures(read_images(adapters, image), None, list(scales))
    _check_count("ip_adapter_image_embeds", embeds, adapters)
    read = [_read_embeds(adapter, each) for adapter, each in zip(adapters, cast(Any, embeds), strict=True)]
    return Pictures(None, read, list(scales))


def _check_count(name: str, given: Any, adapters: Sequence[ImageAdapter]) -> None:
    if not isinstance(given, (list, tuple)) or len(given) != len(adapters):
        number = len(given) if isinstance(given, (list, tuple)) else shown(given)
        of = "the one IP-Adapter" if len(adapters) == 1 else f"each of {len(adapters)} IP-Adapters"
        raise InvalidArgumentError(f"{name} must be a list, one for {of}, got {number}")


def read_images(adapters: Sequence[ImageAdapter], image: Any) -> list[list[np.ndarray]]:
    """The pictures of each adapter as 8-bit pixels."""
    images = image if isinstance(image, (list, tuple)) else [image]
    _check_count("ip_adapter_image", images, adapters)
    if any(adapter.encoder is None for adapter in adapters):
        raise InvalidArgumentError(
            "ip_adapter_image needs the image encoder: write with_ip_adapter(pipe, path, image_encoder), or "
            "give ip_adapter_image_embeds"
        )

    def pixels(several: Any) -> list[np.ndarray]:
        each = several if isinstance(several, (list, tuple)) else [several]
        return [picture for one in each for picture in to_uint8(rgb_pixels(one))]

    return [pixels(several) for several in images]


def _read_embeds(adapter: ImageAdapter, embeds: Any) -> np.ndarray:
    """[2 or 1, n, ...] as the adapter takes them, float32."""
    array = np.asarray(embeds, np.float32)
    wanted = f"[2, n, {'T, ' * adapter.takes_patches}{adapter.width}]"
    fits = array.ndim == adapter.axes + 1 and array.shape[-1] == adapter.width and 0 not in array.shape
    if not fits or len(array) not in (1, 2):
        raise InvalidArgumentError(
            f"ip_adapter_image_embeds must hold {wanted}, of the negatives and of n pictures, got "
            f"{list(array.shape)}"
        )
    if not np.isfinite(array).all():
        raise InvalidArgumentError("ip_adapter_image_embeds hold NaN or infinity")
    if len(array) == 1 and adapter.takes_patches and adapter.encoder is None:
        raise InvalidArgumentError(
            f"ip_adapter_image_embeds must hold {wanted} without an image encoder: give the negatives, too"
        )
    return array


# ---------------------------------------------------------------- from pictures to tokens


def with_pictures(
    pipe: Pipeline, pictures: Pictures | None, cond: dict[str, Any], uncond: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The conditions of a call with the tokens of its pictures, the same for all P prompts."""
    if pictures is None:
        return cond, uncond
    count, tokens = len(cond["encoder_hidden_states"]), []
    for k, adapter in enumerate(pipe.image_adapters):
        if pictures.embeds is None:
            embeds = embeds_of(adapter, cast(Any, pictures.images)[k])
        else:
            embeds = _with_negatives(adapter, pictures.embeds[k])
        tokens.append(_tokens(adapter, embeds))
    scales = np.tile(np.asarray(pictures.scales, np.float32), (count, 1))

    def prompts(branch: int) -> dict[str, Any]:
        each: Any = (np.broadcast_to(found[branch], (count, *found.shape[1:])) for found in tokens)
        return {"image_prompts": models.ImagePrompts(tuple(each), cast(Any, scales))}

    return cond | prompts(1), uncond | prompts(0)


def embeds_of(adapter: ImageAdapter, pictures: list[np.ndarray]) -> Float[np.ndarray, "2 n ..."]:
    """The embeddings of n pictures behind those of their negatives."""
    size = cast(Network, adapter.encoder).config.image_size
    pixels = np.concatenate([models.clip_pixel_values(picture[None], size) for picture in pictures])
    return _with_negatives(adapter, _encoded(adapter, pixels)[None])


def _with_negatives(
    adapter: ImageAdapter, embeds: Float[np.ndarray, "k n ..."]
) -> Float[np.ndarray, "2 n ..."]:
    """Negatives where there are none: zeros, of a plus adapter the states of a picture of zeros."""
    if len(embeds) == 2:
        return embeds
    if not adapter.takes_patches:
        return np.concatenate([np.zeros_like(embeds), embeds])
    config = cast(Network, adapter.encoder).config
    size = (1, config.image_size, config.image_size, config.num_channels)
    negative = _encoded(adapter, np.zeros(size, np.float32))
    return np.concatenate([np.broadcast_to(negative[None], embeds.shape), embeds])


def _encoded(adapter: ImageAdapter, pixels: Float[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n ..."]:
    """Embeddings, or the states of patches before the last layer, one picture at a time."""
    rows = [_encode(cast(Network, adapter.encoder), one[None], adapter.takes_patches) for one in pixels]
    return np.concatenate([np.asarray(row, np.float32) for row in rows])


def _tokens(adapter: ImageAdapter, embeds: Float[np.ndarray, "2 n ..."]) -> Float[np.ndarray, "2 T D"]:
    """The tokens of all n pictures, of the negatives and of the pictures themselves."""
    branches, count = embeds.shape[:2]
    rows = [_project(adapter.projection, row[None]) for row in embeds.reshape(-1, *embeds.shape[2:])]
    tokens = np.concatenate([np.asarray(row, np.float32) for row in rows])
    return tokens.reshape(branches, count * tokens.shape[1], tokens.shape[2])


@jax.jit
def _project(projection: Network, embeds: Float[Array, "B ..."]) -> Float[Array, "B T D"]:
    return projection(embeds)


def _encode_one(encoder: Network, pixels: Float[Array, "B H W C"], patches: bool) -> Float[Array, "B ..."]:
    encoding = encoder(pixels)
    return encoding.hidden_states[-2] if patches else encoding.image_embeds


_encode = jax.jit(_encode_one, static_argnums=2)
