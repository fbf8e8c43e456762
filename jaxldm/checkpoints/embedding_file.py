"""Files of textual inversion: the embeddings of a new word, and tokenizers that know it.

| tensors in the file | written by |
|---|---|
| one, named as its word: `<cat-toy>` `[n, d]` or `[d]` | diffusers, in .safetensors and .bin |
| `emb_params` `[n, d]`; the word is the name of the file | A1111's programs |
| `string_to_param` of `*`: `[n, d]`; the word is the name of the file | A1111's programs, in .pt |
| `clip_l` `[n, d]` and `clip_g` `[n, e]`; the word is the name of the file | others, for SDXL |

A .bin or .pt is a pickle, of which `torch_file` reads arrays and nothing else.

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

from jaxldm.arguments import a_path, array, checked, instance, optional, refuse
from jaxldm.arguments import count as whole_number
from jaxldm.checkpoints.file_kinds import check_kind_of_file
from jaxldm.checkpoints.safetensors_file import open_safetensors, safetensors_chunks
from jaxldm.checkpoints.tokenizer import Tokenizer, word_of_several
from jaxldm.checkpoints.torch_file import PICKLES, read_torch_file
from jaxldm.errors import CheckpointError, InvalidArgumentError, shown
from jaxldm.files import write_atomically
from jaxldm.reading import some_of

EMBEDDING_FILE = "learned_embeds.safetensors"  # the name that diffusers looks for
_PAIR = ("clip_l", "clip_g")
_UNNAMED = ("emb_params", "string_to_param.*")
VECTORS = array("floating", "[n, d]", axes=2, filled=True)


class WordEmbedding(NamedTuple):
    """A word and its embeddings, one for each of the tokens that it becomes.

    Attributes:
        word: as it stands in prompts.
        vectors: for the text encoder.
        vectors_2: for the second text encoder of SDXL; None of other files.
    """

    word: str
    vectors: Float[np.ndarray, "n d"]
    vectors_2: Float[np.ndarray, "n e"] | None = None


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


@checked(path=a_path, word=optional(a_word))
def load_embedding(path: Path | str, word: str | None = None) -> WordEmbedding:
    """The word and its embeddings of a file, or of the folder that holds `learned_embeds.safetensors`.

    Args:
        path: of one of the forms above.
        word: in place of the one that the file, or its name, says.

    Raises:
        CheckpointError: no such file, a damaged one, one of something else, or a pickle that would run a
            program; NaN.
    """
    path = Path(path)
    path = path / EMBEDDING_FILE if path.is_dir() else path
    tensors = read_torch_file(path) if path.suffix in PICKLES else open_safetensors(path).tensors
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith("string_to_token")}
    names = _PAIR if found.keys() == set(_PAIR) else tuple(found)
    proper = [len(tensor.shape) in (1, 2) and 0 not in tensor.shape for tensor in found.values()]
    if not all(proper) or not (len(names) == 1 or names == _PAIR):
        check_kind_of_file(path, tensors, "a file of textual inversion")
        there = some_of([f"{name} {list(each.shape)}" for name, each in tensors.items()]) or "nothing"
        raise CheckpointError(
            f"{path} is no file of one word, with a tensor [n, d] or [d] named as it: it holds {there}"
        )
    vectors = [np.atleast_2d(np.asarray(found[name])).astype(np.float32) for name in names]
    broken = [name for name, each in zip(names, vectors, strict=True) if not np.isfinite(each).all()]
    if broken:
        raise CheckpointError(f"{path} holds NaN or infinity, in {', '.join(broken)}: copy it again")
    if len({len(each) for each in vectors}) != 1:
        raise CheckpointError(f"{path}: {_PAIR[0]} and {_PAIR[1]} are of different numbers of tokens")
    own = names[0] not in (*_UNNAMED, *_PAIR)
    return WordEmbedding(word or (names[0] if own else a_word("the name of the file", path.stem)), *vectors)


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
