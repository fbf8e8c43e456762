"""Files of textual inversion: the embeddings of a new word, and tokenizers that know it.

| tensors in the file | written by |
|---|---|
| one, named as its word: `<cat-toy>` `[n, d]` or `[d]` | diffusers |
| `emb_params` `[n, d]`; the word is the name of the file | A1111's programs |

A word of several embeddings is spelled as diffusers spells it: `<cat-toy> <cat-toy>_1 <cat-toy>_2`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxldm.arguments import a_path, array, checked, instance, refuse
from jaxldm.arguments import count as whole_number
from jaxldm.checkpoints.safetensors_file import open_safetensors, safetensors_chunks
from jaxldm.checkpoints.tokenizer import Tokenizer, word_of_several
from jaxldm.errors import CheckpointError, InvalidArgumentError, shown
from jaxldm.files import write_atomically
from jaxldm.reading import some_of

EMBEDDING_FILE = "learned_embeds.safetensors"  # the name that diffusers looks for
VECTORS = array("floating", "[n, d]", axes=2, filled=True)


class WordEmbedding(NamedTuple):
    """A word and its embeddings, one for each of the tokens that it becomes."""

    word: str
    vectors: Float[np.ndarray, "n d"]


def a_word(name: str, value: Any) -> str:
    """One word, such as "<cat-toy>"."""
    if not isinstance(value, str) or not value or value.split() != [value]:
        raise refuse(name, 'one word without spaces such as "<cat-toy>"', value)
    return value


@checked(path=a_path, word=a_word, vectors=VECTORS)
def save_embedding(path: Path | str, word: str, vectors: Float[np.ndarray, "n d"]) -> None:
    """Write the embeddings of a word as diffusers' `load_textual_inversion` reads them.

    Raises:
        InvalidArgumentError: another suffix than .safetensors.
        StorageError: it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InvalidArgumentError(f"path must end in .safetensors, got {path.name}")
    write_atomically(path, safetensors_chunks({word: np.asarray(vectors, np.float32)}))


@checked(path=a_path)
def load_embedding(path: Path | str) -> WordEmbedding:
    """The word and its embeddings of a file, or of the folder that holds `learned_embeds.safetensors`.

    Raises:
        CheckpointError: no such file, a pickle file, a damaged one, or one of something else.
    """
    path = Path(path)
    path = path / EMBEDDING_FILE if path.is_dir() else path
    tensors = open_safetensors(path).tensors
    (word, tensor), *others = tensors.items() or [("", None)]
    if others or tensor is None or len(tensor.shape) not in (1, 2) or 0 in tensor.shape:
        there = some_of([f"{name} {list(each.shape)}" for name, each in tensors.items()]) or "nothing"
        raise CheckpointError(
            f"{path} is no file of one word, with a tensor [n, d] or [d] named as it: it holds {there}"
        )
    vectors = np.atleast_2d(np.asarray(tensor)).astype(np.float32)
    return WordEmbedding(path.stem if word == "emb_params" else word, vectors)


@checked(
    tokenizer=instance(Tokenizer, "a tokenizer from checkpoints.load_tokenizer"),
    word=a_word,
    count=whole_number(1, 64),
)
def with_word(tokenizer: Tokenizer, word: str, count: int = 1) -> tuple[Tokenizer, int]:
    """(the tokenizer with a new word, the number of its first token); the others follow it.

    Args:
        tokenizer: stays as it is.
        word: becomes `count` tokens in every text.
        count: of them.

    Raises:
        InvalidArgumentError: the word is a token of the tokenizer already.
    """
    import tokenizers

    words = word_of_several(word, count)
    known = [each for each in words if tokenizer.backend.token_to_id(each) is not None]
    if known:
        raise InvalidArgumentError(
            f"{shown(known[0])} is a token of this tokenizer already: choose another word, such as "
            f"<my-{word.strip('<>')}>"
        )
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    first = tokenizer.largest_token + 1
    backend.add_tokens([tokenizers.AddedToken(each, special=False, normalized=True) for each in words])
    numbers = {each: backend.token_to_id(each) for each in words}
    if list(numbers.values()) != list(range(first, first + count)):
        raise CheckpointError(f"the tokens of this tokenizer have gaps: {shown(word)} cannot be added")
    files = dict(tokenizer.files)
    added = json.loads(files.get("added_tokens.json", b"{}")) | numbers
    files["added_tokens.json"] = json.dumps(added, indent=2).encode()
    files["tokenizer.json"] = backend.to_str(pretty=True).encode()
    return dataclasses.replace(tokenizer, backend=backend, files=files), first


def texts_with(word: str, templates: Sequence[str]) -> list[str]:
    """The templates with the word in them, which each has as {}."""
    return [template.replace("{}", word) for template in templates]
