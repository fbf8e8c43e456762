"""PixArt-Sigma and PixArt-Alpha (Chen et al. 2024, arXiv:2403.04692; 2023, arXiv:2310.00426).

    pipe = pipelines.load("PixArt-Sigma-XL-2-1024-MS", dtype="bfloat16")
    height, width = pipe.nearest_size(1080, 1920)   # (768, 1344), which the model was trained on
    images = pipe(key, "a small cactus with a happy face", height=height, width=width)

A transformer on latents that looks at the states of T5; the variance that it learned is not used. Pictures
are drawn at exactly the height and width of the call, multiples of 16. The pipeline of diffusers draws at
the nearest size of the training and then scales and cuts the picture; here that size is `nearest_size`, and
the caller's choice.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.call import Defaults, Request
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.family import (
    Family,
    Folder,
    check_text_width,
    default_latent_spec,
    states_width,
)
from jaxldm.pipelines.inputs import LatentSpec, Size
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.prompts import encode_texts

# (height, width) of the pictures that the published models were trained on, in 1/32 of the model's side.
TRAINED_SIZES: tuple[Size, ...] = (
    *((16, 64), (16, 58), (18, 56), (18, 54), (18, 52), (20, 50), (20, 48), (22, 46), (22, 44), (22, 42)),
    *((24, 42), (24, 40), (26, 38), (26, 36), (28, 36), (28, 34), (30, 34), (30, 32), (32, 32), (32, 30)),
    *((34, 30), (34, 28), (36, 28), (36, 26), (38, 26), (40, 24), (42, 24), (44, 22), (46, 22), (48, 20)),
    *((50, 20), (54, 18), (64, 16)),
)
# Those that the model for 2048x2048 pixels has besides.
MORE_TRAINED_SIZES = ((16, 62), (16, 60), (52, 18), (56, 18), (58, 16), (60, 16), (62, 16))
TOKENS = {"PixArtSigma": 300, "PixArtAlpha": 120}


def encode(
    pipe: Pipeline, request: Request, *, max_sequence_length: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """T5's states and their mask; where there is no negative prompt, those of the empty text.

    The model was trained on texts in small letters, so they are made small. URLs, HTML and the like, which
    diffusers takes out where two more packages are installed, stay.

    Args:
        max_sequence_length: tokens of a text; default 300 for PixArt-Sigma, 120 for PixArt-Alpha, or fewer
            where the tokenizer has fewer.

    Raises:
        InvalidArgumentError: no room for a token.
    """
    most = TOKENS[pipe.family.name]
    length = min(most, pipe.tokenizer.max_length) if max_sequence_length is None else max_sequence_length
    if length < 2:
        raise InvalidArgumentError(
            f"max_sequence_length must be 2 or more, not {length}: {most} is the model's own"
        )

    def states(texts: list[str]) -> dict[str, Any]:
        texts = [text.lower().strip() for text in texts]
        encoded = encode_texts(pipe.text_encoder, pipe.tokenizer, texts, max_length=length, mask=True)
        condition = {"encoder_hidden_states": encoded.hidden, "encoder_attention_mask": encoded.mask}
        if pipe.transformer.config.has_additional_conditions:  # PixArt-Alpha's network for 1024x1024 pixels
            resolution = np.tile(np.asarray(request.size, np.float32), (len(texts), 1))
            condition["resolution"] = resolution
            condition["aspect_ratio"] = resolution[:, :1] / resolution[:, 1:]
        return condition

    return request.both(states)


def text_widths(pipe: Pipeline) -> TextWidths:
    """T5's states and their mask."""
    return TextWidths(pipe.transformer.config.text_width, masked=True)


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """The transformer packs 2x2 latents into a token."""
    return default_latent_spec(pipe, patch=pipe.transformer.config.patch_size)


def nearest_size(pipe: Pipeline, height: int, width: int) -> Size:
    """(height, width) of the training pictures whose ratio is nearest to the one given.

    Raises:
        InvalidArgumentError: a height or a width of 0 or less.
    """
    if height <= 0 or width <= 0:
        raise InvalidArgumentError(f"height and width must be above 0, not {height} and {width}")
    side = pipe.default_size[0]
    sizes = TRAINED_SIZES if side < 2048 else (*TRAINED_SIZES, *MORE_TRAINED_SIZES)
    nearest = min(sizes, key=lambda pair: abs(pair[0] / pair[1] - height / width))
    return nearest[0] * side // 32, nearest[1] * side // 32


def defaults(pipe: Pipeline) -> Defaults:
    """As published."""
    return Defaults(guidance_scale=4.5, num_inference_steps=20)


def check(pipe: Pipeline) -> None:
    """The texts' states and the latents must be as wide as the transformer takes them.

    Raises:
        CheckpointError: parts of different models.
    """
    config, channels = pipe.transformer.config, pipe.vae.config.latent_channels
    check_text_width(pipe, states_width(pipe.text_encoder), config.text_width)
    out = config.out_channels or config.in_channels
    if config.in_channels != channels or out not in (channels, 2 * channels):
        raise CheckpointError(
            f"its autoencoder has {channels} latent channels, its transformer takes "
            f"{config.in_channels} and draws {out}"
        )


_family = functools.partial(
    Family,
    defaults=defaults,
    encode=encode,
    latent_spec=latent_spec,
    methods={"nearest_size": nearest_size},
    text_widths=text_widths,
)
# The autoencoder is SDXL's in PixArt-Sigma and that of SD 1.5 in PixArt-Alpha; the text encoder is T5-XXL's.
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
PIXART_SIGMA = _family(name="PixArtSigma", folder=Folder(("PixArtSigmaPipeline",), _PARTS, check=check))
PIXART_ALPHA = _family(name="PixArtAlpha", folder=Folder(("PixArtAlphaPipeline",), _PARTS, check=check))
