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
from jaxldm.arguments import a_path, checked
from jaxldm.checkpoints.embedding_file import VECTORS, a_word
from jaxldm.errors import CheckpointError
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline

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


@checked(pipe=A_PIPELINE, word=a_word, vectors=VECTORS)
def with_word(pipe: Pipeline, word: str, vectors: Float[np.ndarray, "n d"]) -> Pipeline:
    """The model with a new word, which its text encoder has these embeddings of.

    Args:
        pipe: stays as it is.
        word: as it then stands in prompts, such as "<cat-toy>".
        vectors: one or several, each of which takes the place of a token.

    Raises:
        CheckpointError: a model of another family, or embeddings of another width.
        InvalidArgumentError: the word is a token already.
    """
    check_takes_words(pipe)
    encoder = pipe.text_encoder
    if vectors.shape[1] != encoder.config.hidden_size:
        raise CheckpointError(
            f"the embeddings of {word} are {vectors.shape[1]} wide, the text encoder's are "
            f"{encoder.config.hidden_size}: they are of another model"
        )
    tokenizer, first = checkpoints.with_word(pipe.tokenizer, word, len(vectors))
    rows = max(encoder.config.vocab_size, first + len(vectors))
    module = models.from_config(dataclasses.replace(encoder.config, vocab_size=rows))
    params = with_rows(encoder.params, first, vectors)
    return pipe.replace(text_encoder=Network(module, params), tokenizer=tokenizer)


@checked(pipe=A_PIPELINE, path=a_path)
def with_embedding(pipe: Pipeline, path: str | Path) -> Pipeline:
    """The model with the word of a file of textual inversion, see `checkpoints.load_embedding`.

    Raises:
        CheckpointError, InvalidArgumentError: as `with_word`; no such file, or one of something else.

    >>> from jaxldm import pipelines                                                      # doctest: +SKIP
    >>> pipe = pipelines.load("stable-diffusion-v1-5")                                    # doctest: +SKIP
    >>> pipe = pipelines.with_embedding(pipe, "runs/my-cat")                              # doctest: +SKIP
    >>> images = pipe(jax.random.key(0), "<my-cat> in the snow")                          # doctest: +SKIP
    """
    word, vectors = checkpoints.load_embedding(path)
    return with_word(pipe, word, vectors)
