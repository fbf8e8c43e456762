"""FLUX.1 Redux: a picture as text states for FLUX.1, which draws variations of it.

    redux = pipelines.load("FLUX.1-Redux-dev")
    states = redux(key, image=photo)                       # {"prompt_embeds", "pooled_prompt_embeds"}
    images = pipelines.load("FLUX.1-dev")(key, **states)

SigLIP's states of the patches, through two layers, stand behind those of the text; without text encoders,
which the published folder lacks, behind zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from jaxldm.arguments import array
from jaxldm.errors import CheckpointError, InvalidArgumentError, shown
from jaxldm.pipelines.call import Defaults, Request
from jaxldm.pipelines.family import Family, Folder
from jaxldm.pipelines.inputs import LatentSpec, rgb_pixels
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.prompts import as_texts, encode_texts, for_each

TOKENS, POOLED = 512, 768  # of FLUX.1's texts; what stands for them without text encoders


def states_of_pictures(
    pipe: Pipeline,
    key: Key[Array, " ..."],
    prompt: str | Sequence[str] | None = None,
    *,
    image: Any = None,
    prompt_2: str | Sequence[str] | None = None,
    prompt_embeds_scale: float | Sequence[float] = 1.0,
    pooled_prompt_embeds_scale: float | Sequence[float] = 1.0,
) -> dict[str, Float[np.ndarray, "1 ..."]]:
    """States [1, T, D] and pooled states [1, E] of one picture, or the weighted sum of those of several.

    Args:
        key: as in other calls; nothing is drawn.
        prompt, prompt_2: texts whose states stand before the picture's, where the folder has text encoders.
        image: 8-bit pixels or floats in [-1, 1], [H, W, 3] or [N, H, W, 3], PIL images; of any size.
        prompt_embeds_scale, pooled_prompt_embeds_scale: the weight of each picture: one number, or N.

    Raises:
        InvalidArgumentError: no picture, a text without encoders, another number of weights than of pictures.
    """
    if image is None:
        raise InvalidArgumentError("FLUX.1 Redux makes states of a picture: give image=")
    pictures = rgb_pixels(image)
    count, has_texts = len(pictures), pipe.text_encoder is not None
    weights = [
        _weights(name, value, count)
        for name, value in (
            ("prompt_embeds_scale", prompt_embeds_scale),
            ("pooled_prompt_embeds_scale", pooled_prompt_embeds_scale),
        )
    ]
    if not has_texts and (prompt is not None or prompt_2 is not None):
        raise InvalidArgumentError("this model was loaded without text encoders: leave prompt out")
    if has_texts:
        texts = for_each("" if prompt is None else as_texts(prompt), [""] * count, "prompt") or []
        second = for_each(prompt_2, texts, "prompt_2") or texts
        pooled = np.asarray(encode_texts(pipe.text_encoder, pipe.tokenizer, texts).pooled)
        hidden = encode_texts(pipe.text_encoder_2, pipe.tokenizer_2, second, max_length=TOKENS).hidden
    else:
        hidden = np.zeros((count, TOKENS, pipe.image_embedder.config.txt_in_features), np.float32)
        pooled = np.zeros((count, POOLED), np.float32)
    pixels = pixel_values(pictures, pipe.feature_extractor)
    each = [_embed(pipe.image_encoder, pipe.image_embedder, pixels[k : k + 1]) for k in range(count)]
    hidden = np.concatenate([hidden, np.concatenate([np.asarray(one) for one in each])], axis=1)
    return {
        name: np.einsum("n,n...->...", weight, states)[None].astype(np.float32)
        for name, weight, states in zip(
            ("prompt_embeds", "pooled_prompt_embeds"), weights, (hidden, pooled), strict=True
        )
    }


def _weights(name: str, value: Any, count: int) -> Float[np.ndarray, " N"]:
    """The weight of each picture, of one number for all or one for each."""
    given = np.atleast_1d(np.asarray(array("real", axes=(0, 1))(name, value), np.float64))
    if len(given) not in (1, count) or not np.isfinite(given).all():
        raise InvalidArgumentError(
            f"{name} must be one finite number, or one for each of {count} pictures, got {shown(value)}"
        )
    return np.broadcast_to(given, (count,))


@jax.jit
def _embed(encoder: Network, embedder: Network, pixels: Float[Array, "1 H W 3"]) -> Float[Array, "1 N D"]:
    return embedder(encoder(pixels).last_hidden_state).astype(np.float32)


def pixel_values(
    pictures: Float[np.ndarray, "N H W 3"], settings: Mapping[str, Any]
) -> Float[np.ndarray, "N h w 3"]:
    """Pictures as the image encoder takes them: resized by Pillow's bicubic filter in 8 bits, normalised.

    Args:
        settings: the entries of preprocessor_config.json.
    """
    from PIL import Image

    size = settings.get("size", {"height": 384, "width": 384})
    shape = (size["width"], size["height"])
    filter_of = Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC))
    levels = np.rint((pictures + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    resized = np.stack([np.asarray(Image.fromarray(each).resize(shape, filter_of)) for each in levels])
    mean, std = (np.asarray(settings.get(f"image_{name}", [0.5] * 3), np.float32) for name in ("mean", "std"))
    return (resized.astype(np.float32) / np.float32(255) - mean) / std


def encode(pipe: Pipeline, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nothing: this stage draws no images."""
    return {}, {}


def check(pipe: Pipeline) -> None:
    """The embedder must take the encoder's states.

    Raises:
        CheckpointError: parts of different models.
    """
    given, taken = pipe.image_encoder.config.hidden_size, pipe.image_embedder.config.redux_dim
    if given != taken:
        raise CheckpointError(f"its image encoder gives states {given} wide, its embedder takes {taken}")
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    there = [name for name in texts if pipe.parts[name] is not None]
    if there and len(there) < len(texts):
        raise CheckpointError(f"of its text encoders and tokenizers it has {', '.join(there)} alone")


FLUX_REDUX = Family(
    name="FluxRedux",
    folder=Folder(
        class_names=("FluxPriorReduxPipeline",),
        parts=("image_encoder", "feature_extractor", "image_embedder"),
        optional=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        check=check,
    ),
    denoisers=("image_embedder",),
    autoencoder=None,
    encode=encode,
    defaults=lambda pipe: Defaults(guidance_scale=1.0),
    latent_spec=lambda pipe: LatentSpec((384, 384), 1, 1, 3),
    call=states_of_pictures,
    draws_images=False,
)
