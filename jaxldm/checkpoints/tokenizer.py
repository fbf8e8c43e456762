"""Tokenizers of CLIP, T5, BERT, Qwen and Mistral, from the files that are published with the weights."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxldm.arguments import a_path, checked, count, flag, optional, several, text
from jaxldm.checkpoints.tokenizer_files import A_NUMBER, Kind, backend_of, content_of, json_of
from jaxldm.entries import Bounds, read_value, read_values
from jaxldm.errors import CheckpointError, InvalidArgumentError, JaxldmError
from jaxldm.files import finish_interrupted, write_together
from jaxldm.reading import read_bytes, reading, reason, shown

MAX_LENGTH = 10**6  # of a row of tokens


class Tokens(NamedTuple):
    """Tokenized texts.

    Attributes:
        input_ids: int32 `[B, T]`, with the special tokens at both ends, padded to T.
        attention_mask: int32 `[B, T]`, 0 at padding.
        cut: for each text the words at its end that did not fit into T tokens, "" where all did.
    """

    input_ids: Int[np.ndarray, "B T"]
    attention_mask: Int[np.ndarray, "B T"]
    cut: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A published tokenizer, opened by `load_tokenizer`: texts -> `Tokens`.

    Attributes:
        max_length: the default length of a row, 77 for CLIP.
        pad_token_id: of the padding: the end of text in CLIP, "!" in OpenCLIP, a token of its own in T5.
        backend: the `tokenizers.Tokenizer` that does the work.
        files: name -> content of the files it was read from, for `save`.
        padding_side: "right", or "left" (Mistral): where a row is filled.
        processor: the class of the processor of texts and images that it is a part of (Mistral), or None.
    """

    max_length: int
    pad_token_id: int
    backend: Any
    files: Mapping[str, bytes]
    padding_side: str = "right"
    processor: str | None = None

    @checked(
        texts=several(text, "a list of strings"),
        max_length=optional(count(1, MAX_LENGTH)),
        special_tokens=flag,
    )
    def __call__(
        self, texts: Sequence[str], max_length: int | None = None, special_tokens: bool = True
    ) -> Tokens:
        """Tokenizes texts, each as a row of `max_length`.

        Args:
            special_tokens: whether those at both ends are added; False for texts that have them already.

        Raises:
            InvalidArgumentError: no texts, something other than strings, or no room for one token of a text.
        """
        if not texts:
            raise InvalidArgumentError("an empty list of texts: give at least one; '' is the empty text")
        length = self.max_length if max_length is None else max_length
        special = self.backend.num_special_tokens_to_add(False) if special_tokens else 0
        if length <= special:
            raise InvalidArgumentError(
                f"max_length={length} has no room for a text: there are {special} special tokens"
            )
        input_ids = np.full((len(texts), length), self.pad_token_id, np.int32)
        attention_mask = np.zeros_like(input_ids)
        cut, texts = [], self._with_all_tokens(texts)
        for row, encoding in enumerate(self.backend.encode_batch(texts, add_special_tokens=special_tokens)):
            ids, words = _truncate(length, encoding, texts[row])
            place = slice(length - len(ids), None) if self.padding_side == "left" else slice(len(ids))
            input_ids[row, place], attention_mask[row, place] = ids, 1
            cut.append(words)
        return Tokens(input_ids, attention_mask, tuple(cut))

    def _with_all_tokens(self, texts: Sequence[str]) -> list[str]:
        """The texts, in which an added word of several tokens stands as all of them, as in diffusers."""
        added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        texts = list(texts)
        for word in sorted(word for word in added if f"{word}_1" in added):
            count = next(n for n in itertools.count(1) if f"{word}_{n}" not in added)
            spelled = " ".join(word_of_several(word, count))
            texts = [text if f"{word}_1" in text else text.replace(word, spelled) for text in texts]
        return texts

    @checked(prompt=text)
    def ids_of(self, prompt: str) -> list[int]:
        """The tokens of a text, without the special ones at its ends, and of any number."""
        return self.backend.encode(self._with_all_tokens([prompt])[0], add_special_tokens=False).ids

    @property
    def ends(self) -> tuple[int, int]:
        """The special tokens at both ends of a text (CLIP)."""
        first, last = self.backend.encode("").ids
        return first, last

    @property
    def largest_token(self) -> int:
        """The largest number that a text can have in it."""
        return _largest_token(self.backend)

    @property
    def class_name(self) -> str:
        """The class of transformers that opens its folder: its processor's, where it is a part of one."""
        settings = json_of(self.files, "tokenizer_config.json")
        return self.processor or settings.get("tokenizer_class") or "PreTrainedTokenizerFast"

    @checked(folder=a_path)
    def save(self, folder: Path | str) -> None:
        """Writes the files that the tokenizer was read from, and tokenizer.json.

        `load_tokenizer`, transformers and readers of tokenizer.json (candle) open the folder. The files of
        an earlier tokenizer in it are replaced, all at once.

        Raises:
            StorageError: disk full, no permission, a file where the folder should be.
        """
        files = {"tokenizer.json": self.backend.to_str(pretty=True).encode()} | dict(self.files)
        write_together(folder, files, lambda name: name in (*_VOCABULARIES, *_SETTINGS))


def word_of_several(word: str, count: int) -> list[str]:
    """The tokens of an added word, as diffusers names them.

    >>> word_of_several("<cat>", 3)
    ['<cat>', '<cat>_1', '<cat>_2']
    """
    return [word, *(f"{word}_{number}" for number in range(1, count))]


def _truncate(length: int, encoding: Any, text: str) -> tuple[list[int], str]:
    """(tokens, words cut off): the special tokens at both ends stay."""
    if len(encoding.ids) <= length:
        return encoding.ids, ""
    of_text = [index for index, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
    end = encoding.ids[of_text[-1] + 1 :]
    keep = length - len(end)
    first, word = keep, encoding.word_ids[keep]
    while first > of_text[0] and word is not None and encoding.word_ids[first - 1] == word:
        first -= 1  # a word that is cut in two is reported as a whole
    return encoding.ids[:keep] + end, text[encoding.offsets[first][0] :].strip()


_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "vocab.txt")
# Of a processor of texts and images, of which the tokenizer is a part.
_OF_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "chat_template.json")
_SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *_OF_PROCESSORS,
)
MAX_FILE_BYTES = 256 * 2**20  # of a file of a tokenizer; the largest published ones have 20 million
MAX_EXTRA_TOKENS = 10_000  # of T5, which has 100
_Token = str | Mapping[str, Any]
# What the settings that are used may be.
_TYPES: dict[str, Any] = {
    **dict.fromkeys(_SPECIAL, _Token | None),
    "added_tokens_decoder": Mapping[str, _Token],
    "additional_special_tokens": tuple[_Token, ...] | None,
    "extra_special_tokens": Mapping[str, _Token] | tuple[_Token, ...] | None,
    "model_max_length": float | None,
    "padding_side": str | None,
    "tokenizer_class": str | None,
    "extra_ids": Annotated[int | None, Bounds(0, MAX_EXTRA_TOKENS)],
    "tokenize_chinese_chars": bool | None,
    "strip_accents": bool | None,
    "do_lower_case": bool | None,
}


@checked(folder=a_path)
def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Opens the tokenizer folder of a published text encoder, written by any version of transformers.

    Reads the first of tokenizer.json, vocab.json with merges.txt (CLIP, Qwen), spiece.model (T5) and
    vocab.txt (BERT) that exists, and applies tokenizer_config.json, special_tokens_map.json and
    added_tokens.json. A chat template is kept, not applied.

    Raises:
        CheckpointError: no such folder, none of these files, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no tokenizer folder {folder}")
    finish_interrupted(folder)
    paths = [folder / name for name in (*_VOCABULARIES, *_SETTINGS)]
    files = {path.name: read_bytes(path, MAX_FILE_BYTES) for path in paths if path.exists()}
    with reading(folder):
        return _from_files(files)


def _from_files(files: dict[str, bytes]) -> Tokenizer:
    settings = json_of(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # a newer tokenizer_config.json holds them all
        settings |= json_of(files, "special_tokens_map.json")
    settings = read_values(settings, _TYPES, "tokenizer_config.json")
    added = read_value(json_of(files, "added_tokens.json"), Mapping[str, A_NUMBER], "added_tokens.json")
    try:
        backend, kind = backend_of(files, settings)
        side = _padding_side(backend, kind, settings)
        special = {key: settings.get(key) or kind.special_tokens.get(key) for key in _SPECIAL}
        _add_tokens(backend, settings, added, special)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_batch(["", "a 1"])  # what does not fit together shows now, and not at the first text
    except JaxldmError:
        raise
    except Exception as error:  # `tokenizers` has no exception of its own
        raise CheckpointError(f"the tokenizer's files do not fit together: {reason(error)}") from error
    longest = settings.get("model_max_length")
    if longest is None or not 1 <= longest <= MAX_LENGTH:  # transformers writes 1e30 for "unknown"
        longest = kind.max_length
    pad = backend.token_to_id(content_of(special["pad_token"] or ""))
    if pad is None:
        raise CheckpointError(f"its vocabulary has no {content_of(special['pad_token'] or '')!r} to pad with")
    largest = _largest_token(backend)
    if largest > 2**31 - 2:
        raise CheckpointError(f"its vocabulary has a token of number {largest}, which is no number of int32")
    if "tokenizer_config.json" not in files:
        written = {key: content_of(token) for key, token in special.items() if token}
        written |= {"model_max_length": longest, "tokenizer_class": kind.tokenizer_class}
        files = files | {"tokenizer_config.json": json.dumps(written, indent=2).encode()}
    processor = None
    if kind.fills_left and any(name in files for name in _OF_PROCESSORS):
        given = json_of(files, "processor_config.json").get("processor_class")
        processor = read_value(given or settings.get("processor_class"), str | None, "processor_class")
    return Tokenizer(int(longest), pad, backend, files, side, processor)


def _padding_side(backend: Any, kind: Kind, settings: Mapping[str, Any]) -> str:
    """Where rows are filled. transformers asks the settings, tokenizer.json, then its class.

    Raises:
        CheckpointError: a side that this kind of tokenizer cannot have here.
    """
    of_llama = str(settings.get("tokenizer_class")).startswith("LlamaTokenizer")
    by_file = (backend.padding or {}).get("direction")
    side = settings.get("padding_side") or by_file or ("left" if kind.fills_left and of_llama else "right")
    if side != "right" and not (side == "left" and kind.fills_left):
        raise CheckpointError(
            f"tokenizer_config.json has padding on the {side}: only the right is supported"
            + (", and the left" if kind.fills_left else "")
        )
    return side


def _largest_token(backend: Any) -> int:
    """Of the vocabulary, and of the tokens at both ends, whose numbers a template has for itself."""
    return max((*backend.get_vocab(True).values(), *backend.encode("").ids), default=0)


def _added_token(token: str | Mapping[str, Any], special: bool) -> Any:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=not special)
    names = ("single_word", "lstrip", "rstrip", "normalized")
    flags = {name: read_value(token[name], bool, name) for name in names if name in token}
    return AddedToken(token["content"], special=token.get("special", special), **flags)


def _add_tokens(
    backend: Any, settings: Mapping[str, Any], added: Mapping[str, int], special: Mapping
) -> None:
    """Adds what is matched in a text before it is cut into pieces: the special tokens, and words added later.

    A pad token is one of them: where it is "!", every "!" of a text becomes it, as in transformers.

    Raises:
        CheckpointError: an added token would not get the number that the files give it.
    """
    decoder = settings.get("added_tokens_decoder", {})
    wrong = next((number for number in decoder if not number.isdecimal() or len(number) > 9), None)
    if wrong is not None:
        raise CheckpointError(
            f"added_tokens_decoder has the key {shown(wrong)}, which is no number of a token"
        )
    numbered = {int(number): token for number, token in decoder.items()}
    numbered |= {number: token for token, number in added.items()}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    names = {content_of(token) for token in special.values() if token}
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or ()
    extra = list(extra.values() if isinstance(extra, Mapping) else extra)
    for number in sorted(numbered):
        if content_of(numbered[number]) not in known:
            is_special = content_of(numbered[number]) in names
            backend.add_tokens([_added_token(numbered[number], is_special)])
    known |= {content_of(token) for token in numbered.values()}
    done = []
    for token in (*special.values(), *extra):
        # One text may be given in two ways, and then the last holds: the end of text as an object that also
        # matches in capitals and, to pad with, as a mere string that does not.
        if token and content_of(token) not in known and token not in done:
            done.append(token)
            backend.add_tokens([_added_token(token, special=True)])
    for number, token in numbered.items():
        if backend.token_to_id(content_of(token)) != number:
            raise CheckpointError(
                f"the added token {content_of(token)!r} should be number {number}, "
                f"but is {backend.token_to_id(content_of(token))} with this vocabulary"
            )
