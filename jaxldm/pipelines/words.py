"""New words of a text-to-image model: rows of its text encoder's table that a file brings.

Textual inversion: Gal et al. 2022, arXiv:2208.01618.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from jaxldm import checkpoints, models
from jaxldm.arguments import a_path, checked, optional
from jaxldm.checkpoints.embedding_file import VECTORS, a_word
from jaxldm.errors import CheckpointError
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline

_ENCODERS = {
    "StableDiffusion": ("text_encoder",),
    "StableDiffusionXL": ("text_encoder", "text_encoder_2"),
    "InstructPix2Pix": ("text_encoder",),
    "StableDiffusionUpscale": ("text_encoder",),
    "InstructPix2PixXL": ("text_encoder", "text_encoder_2"),
}
_TABLES = ("token_embedding", "word_embeddings")  # of CLIP, of BERT


def table_of(params: Mapping[str, Any]) -> tuple[str, ...]:
    """The path of the table of tokens in the parameters of a text encoder. Raises `CheckpointError`."""
    for path in traverse_util.flatten_dict(cast(Any, params)):
        if path[-2:-1] and path[-2] in _TABLES:
            return path
    raise CheckpointError("its text encoder has no table of tokens that words can be added to")


def with_rows(
    params: Mapping[str, Any], first: int, rows: Float[Array, "n d"] | Float[np.ndarray, "n d"]
) -> dict[str, Any]:
    """The parameters of a text encoder with these rows in its table, from row `first` on; pure."""
    flat, path = cast(Any, traverse_util.flatten_dict(cast(Any, params))), table_of(params)
    table = flat[path]
    rows = jnp.asarray(rows, table.dtype)
    flat[path] = jnp.concatenate([table[:first], rows, table[first + len(rows) :]])
    return traverse_util.unflatten_dict(flat)


def check_takes_words(pipe: Pipeline) -> None:
    """Raise `CheckpointError` for a model of another kind than Stable Diffusion's."""
    if pipe.family.name != "StableDiffusion":
        raise CheckpointError(
            f"words can be added to models of the family StableDiffusion, this is of {pipe.family.name}"
        )


@checked(pipe=A_PIPELINE, word=a_word, vectors=VECTORS, vectors_2=optional(VECTORS))
def with_word(
    pipe: Pipeline,
    word: str,
    vectors: Float[np.ndarray, "n d"],
    vectors_2: Float[np.ndarray, "n e"] | None = None,
) -> Pipeline:
    """The model with a new word, which its text encoders have these embeddings of.

    Args:
        pipe: stays as it is.
        word: as it then stands in prompts, such as "<cat-toy>".
        vectors: one or several, each of which takes the place of a token.
        vectors_2: for the second text encoder of SDXL. Without them `vectors` are for the encoder of their
            width alone, and the other one reads the word as letters.

    Raises:
        CheckpointError: a model of another family, or embeddings of another width.
        InvalidArgumentError: the word is a token already.
    """
    if pipe.family.name not in _ENCODERS:
        check_takes_words(pipe)
    encoders = [name for name in _ENCODERS[pipe.family.name] if pipe.parts.get(name) is not None]
    widths = {name: pipe.parts[name].config.hidden_size for name in encoders}
    given = {"text_encoder": vectors, "text_encoder_2": vectors_2}
    if vectors_2 is None:
        given = {name: vectors for name in encoders if widths[name] == vectors.shape[1]}
    elif "text_encoder" not in encoders:
        given.pop("text_encoder")  # the refiner has the second alone
    if not given or any(each.shape[1] != widths.get(name) for name, each in given.items()):
        shapes = [each.shape[1] for each in (vectors, vectors_2) if each is not None]
        raise CheckpointError(
            f"the embeddings of {word} are {' and '.join(map(str, shapes))} wide, the text encoder's are "
            f"{' and '.join(map(str, widths.values()))}: of another model; give some made for this one"
        )
    changes: dict[str, Any] = {}
    for name, rows in given.items():
        changes |= _with_word(pipe, name, word, rows)
    return pipe.replace(**changes)


def _with_word(pipe: Pipeline, name: str, word: str, vectors: Float[np.ndarray, "n d"]) -> dict[str, Any]:
    """One text encoder and its tokenizer, with the word, by their names."""
    encoder, of_tokenizer = pipe.parts[name], name.replace("text_encoder", "tokenizer")
    tokenizer, first = checkpoints.with_word(pipe.parts[of_tokenizer], word, len(vectors))
    rows = max(encoder.config.vocab_size, first + len(vectors))
    module = models.from_config(dataclasses.replace(encoder.config, vocab_size=rows))
    params = with_rows(encoder.params, first, vectors)
    return {name: Network(module, params), of_tokenizer: tokenizer}


@checked(pipe=A_PIPELINE, path=a_path, word=optional(a_word))
def with_embedding(pipe: Pipeline, path: str | Path, word: str | None = None) -> Pipeline:
    """The model with the word of a file of textual inversion, see `checkpoints.load_embedding`.

    Args:
        pipe: of Stable Diffusion 1, 2 or XL; stays as it is.
        path: a file of diffusers' or A1111's kind.
        word: in place of the one that the file, or its name, says.

    Raises:
        CheckpointError, InvalidArgumentError: as `with_word`; no such file, or one of something else.

    >>> from jaxldm import pipelines                                                      # doctest: +SKIP
    >>> pipe = pipelines.load("stable-diffusion-v1-5")                                    # doctest: +SKIP
    >>> pipe = pipelines.with_embedding(pipe, "runs/my-cat")                              # doctest: +SKIP
    >>> images = pipe(jax.random.key(0), "<my-cat> in the snow")                          # doctest: +SKIP
    """
    return with_word(pipe, *checkpoints.load_embedding(path, word))
