"""Tokenizers of CLIP, T5, BERT and Qwen, from the files that are published with the weights."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxldm.arguments import a_path, checked, count, optional, several, text
from jaxldm.checkpoints.sentencepiece_file import read_sentencepieces
from jaxldm.entries import Bounds, read_value, read_values
from jaxldm.errors import CheckpointError, InvalidArgumentError, JaxldmError
from jaxldm.files import finish_interrupted, write_together
from jaxldm.reading import parse_json, read_bytes, reading, reason, shown

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
    """

    max_length: int
    pad_token_id: int
    backend: Any
    files: Mapping[str, bytes]

    @checked(texts=several(text, "a list of strings"), max_length=optional(count(1, MAX_LENGTH)))
    def __call__(self, texts: Sequence[str], max_length: int | None = None) -> Tokens:
        """Tokenizes texts, each as a row of `max_length`.

        Raises:
            InvalidArgumentError: no texts, something other than strings, or no room for one token of a text.
        """
        if not texts:
            raise InvalidArgumentError("an empty list of texts: give at least one; '' is the empty text")
        length = self.max_length if max_length is None else max_length
        special = self.backend.num_special_tokens_to_add(False)
        if length <= special:
            raise InvalidArgumentError(
                f"max_length={length} has no room for a text: there are {special} special tokens"
            )
        input_ids = np.full((len(texts), length), self.pad_token_id, np.int32)
        attention_mask = np.zeros_like(input_ids)
        cut, texts = [], self._with_all_tokens(texts)
        for row, encoding in enumerate(self.backend.encode_batch(texts)):
            ids, words = _truncate(length, encoding, texts[row])
            input_ids[row, : len(ids)], attention_mask[row, : len(ids)] = ids, 1
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


@dataclasses.dataclass(frozen=True)
class _Kind:
    """The defaults of transformers for a kind of tokenizer."""

    tokenizer_class: str
    max_length: int
    special_tokens: Mapping[str, str]


_END = "<|endoftext|>"
_BYTES = "BPE of bytes"  # of Qwen; the model in its tokenizer.json is called BPE, as CLIP's is
KINDS = {
    "BPE": _Kind(
        "CLIPTokenizer",
        77,
        {"bos_token": "<|startoftext|>", "eos_token": _END, "unk_token": _END, "pad_token": _END},
    ),
    _BYTES: _Kind("Qwen2Tokenizer", 32768, {"eos_token": _END, "unk_token": _END, "pad_token": _END}),
    "Unigram": _Kind("T5Tokenizer", 512, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "WordPiece": _Kind(
        "BertTokenizer",
        512,
        {
            "unk_token": "[UNK]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
        },
    ),
}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "vocab.txt")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# How Qwen splits a text into words before it merges bytes: a space belongs to the word after it.
_WORDS_WITH_SPACES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


MAX_FILE_BYTES = 256 * 2**20  # of a file of a tokenizer; the largest published ones have 20 million
MAX_EXTRA_TOKENS = 10_000  # of T5, which has 100
_Number = Annotated[int, Bounds(0, 2**31 - 2)]
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
    settings = _json(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # a newer tokenizer_config.json holds them all
        settings |= _json(files, "special_tokens_map.json")
    settings = read_values(settings, _TYPES, "tokenizer_config.json")
    added = read_value(_json(files, "added_tokens.json"), Mapping[str, _Number], "added_tokens.json")
    if (settings.get("padding_side") or "right") != "right":
        raise CheckpointError("tokenizer_config.json has padding on the left: only the right is supported")
    try:
        backend, kind = _backend(files, settings)
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
    pad = backend.token_to_id(_content(special["pad_token"] or ""))
    if pad is None:
        raise CheckpointError(f"its vocabulary has no {_content(special['pad_token'] or '')!r} to pad with")
    largest = _largest_token(backend)
    if largest > 2**31 - 2:
        raise CheckpointError(f"its vocabulary has a token of number {largest}, which is no number of int32")
    if "tokenizer_config.json" not in files:
        written = {key: _content(token) for key, token in special.items() if token}
        written |= {"model_max_length": longest, "tokenizer_class": kind.tokenizer_class}
        files = files | {"tokenizer_config.json": json.dumps(written, indent=2).encode()}
    return Tokenizer(int(longest), pad, backend, files)


def _largest_token(backend: Any) -> int:
    """Of the vocabulary, and of the tokens at both ends, whose numbers a template has for itself."""
    return max((*backend.get_vocab(True).values(), *backend.encode("").ids), default=0)


def _json(files: Mapping[str, bytes], name: str) -> dict:
    return parse_json(files.get(name, b"{}"), name)


def _backend(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> tuple[Any, _Kind]:
    """The `tokenizers.Tokenizer` of these files, before the settings are applied, and its kind."""
    import tokenizers

    if "tokenizer.json" in files:
        _check_fast(_json(files, "tokenizer.json"))
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        kind = type(backend.model).__name__
        if kind not in KINDS:
            raise CheckpointError(f"tokenizer.json has a model of kind {kind}; known: {', '.join(KINDS)}")
        if kind == "BPE" and not backend.model.end_of_word_suffix:
            kind = _BYTES
        return backend, KINDS[kind]
    if "vocab.json" in files and "merges.txt" in files:
        if str(settings.get("tokenizer_class")).startswith("Qwen2Tokenizer"):
            return _qwen(files), KINDS[_BYTES]
        return _clip(files, settings), KINDS["BPE"]
    if "spiece.model" in files:
        return _t5(files, settings), KINDS["Unigram"]
    if "vocab.txt" in files:
        return _bert(files, settings), KINDS["WordPiece"]
    raise CheckpointError(
        "no tokenizer: it takes tokenizer.json, vocab.json with merges.txt, spiece.model or vocab.txt"
    )


def _check_fast(entries: Mapping[str, Any]) -> None:
    """Refuse what `tokenizers` answers with a panic, which prints lines of its own.

    Raises:
        CheckpointError: pairs shorter than the prefix of their second half, or a template of special tokens
            that the file does not describe.
    """
    model, processor = entries.get("model"), entries.get("post_processor")
    if isinstance(model, Mapping) and model.get("continuing_subword_prefix"):
        prefix = read_value(
            model["continuing_subword_prefix"], str, "tokenizer.json: continuing_subword_prefix"
        )
        for pair in read_value(model.get("merges", []), tuple[Any, ...], "tokenizer.json: merges"):
            second = pair.split(" ")[-1] if isinstance(pair, str) else pair[-1] if pair else ""
            if not str(second).startswith(prefix):
                raise CheckpointError(f"tokenizer.json has a pair without its prefix: {shown(pair)}")
    processors = [processor]
    if isinstance(processor, Mapping) and isinstance(processor.get("processors"), list):
        processors = processor["processors"]
    for one in processors:
        if isinstance(one, Mapping) and one.get("type") == "TemplateProcessing":
            pieces = [piece for kind in ("single", "pair") for piece in one.get(kind) or ()]
            needed = {piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece}
            if needed - set(one.get("special_tokens", {})):
                raise CheckpointError(
                    "tokenizer.json has a template of special tokens that it does not describe"
                )


def _clip(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> Any:
    """Byte pairs of lower-case words, the last byte of a word marked. Radford et al. 2021, section 2.4."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary, pairs = _byte_pairs(files)
    bos, eos, unknown = (
        _content(settings.get(key) or KINDS["BPE"].special_tokens[key])
        for key in ("bos_token", "eos_token", "unk_token")
    )
    for token in (bos, eos):
        if token not in vocabulary:
            raise CheckpointError(f"vocab.json has no {token!r}")
    model = models.BPE(
        vocabulary, pairs, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix="</w>"
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        (eos, vocabulary[eos]), (bos, vocabulary[bos]), trim_offsets=False, add_prefix_space=False
    )
    return backend


def _byte_pairs(files: Mapping[str, bytes]) -> tuple[dict[str, int], list[Any]]:
    """The tokens of vocab.json, and the pairs of merges.txt in the order in which they are merged."""
    lines = files["merges.txt"].decode().splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if not all(len(pair) == 2 for pair in pairs):
        raise CheckpointError("merges.txt has a line that is not two pieces with a space between them")
    return read_value(_json(files, "vocab.json"), dict[str, _Number], "vocab.json"), pairs


def _qwen(files: Mapping[str, bytes]) -> Any:
    """Byte pairs, capitals and spaces kept, nothing added at the ends. Qwen Team 2023, section 2.2."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.BPE(*_byte_pairs(files), continuing_subword_prefix="", end_of_word_suffix=""))
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_WORDS_WITH_SPACES), behavior="isolated", invert=False)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _t5(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> Any:
    """The likeliest pieces of each word, a word beginning with "▁". Kudo 2018; Raffel et al. 2020, 2.2.1."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    found = read_sentencepieces(files["spiece.model"])
    count = settings.get("extra_ids")
    extra = [f"<extra_id_{index}>" for index in reversed(range(100 if count is None else count))]
    pieces = found.pieces + [(text, 0.0) for text in extra]
    backend = Tokenizer(models.Unigram(pieces, found.unknown))
    if found.charsmap:
        backend.normalizer = normalizers.Precompiled(found.charsmap)
    metaspace = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    backend.decoder = decoders.Metaspace(**metaspace)
    eos = _content(settings.get("eos_token") or KINDS["Unigram"].special_tokens["eos_token"])
    number = backend.token_to_id(eos)
    if number is None:
        raise CheckpointError(f"spiece.model has no {eos!r}")
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", eos], pair=["$A", eos, "$B", eos], special_tokens=[(eos, number)]
    )
    control = [found.pieces[token][0] for token in (*found.control, found.unknown)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control + extra])
    return backend


def _bert(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> Any:
    """The longest known beginning of each word, then of what is left of it ("##..."). Devlin et al. 2019."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    lines = files["vocab.txt"].decode().split("\n")
    vocabulary = {line.rstrip("\r"): index for index, line in enumerate(lines) if line}
    unknown, cls, sep = (
        _content(settings.get(key) or KINDS["WordPiece"].special_tokens[key])
        for key in ("unk_token", "cls_token", "sep_token")
    )
    for token in (unknown, cls, sep):
        if token not in vocabulary:
            raise CheckpointError(f"vocab.txt has no {token!r}")
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    return backend


def _content(token: str | Mapping[str, Any]) -> str:
    """The text of a token: a string, or an object that also describes how it is matched."""
    return token if isinstance(token, str) else read_value(token.get("content"), str, "content of a token")


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
    names = {_content(token) for token in special.values() if token}
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or ()
    extra = list(extra.values() if isinstance(extra, Mapping) else extra)
    for number in sorted(numbered):
        if _content(numbered[number]) not in known:
            is_special = _content(numbered[number]) in names
            backend.add_tokens([_added_token(numbered[number], is_special)])
    known |= {_content(token) for token in numbered.values()}
    done = []
    for token in (*special.values(), *extra):
        # One text may be given in two ways, and then the last holds: the end of text as an object that also
        # matches in capitals and, to pad with, as a mere string that does not.
        if token and _content(token) not in known and token not in done:
            done.append(token)
            backend.add_tokens([_added_token(token, special=True)])
    for number, token in numbered.items():
        if backend.token_to_id(_content(token)) != number:
            raise CheckpointError(
                f"the added token {_content(token)!r} should be number {number}, "
                f"but is {backend.token_to_id(_content(token))} with this vocabulary"
            )
