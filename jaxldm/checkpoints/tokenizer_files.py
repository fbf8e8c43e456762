"""The files of a published tokenizer -> the `tokenizers.Tokenizer` that they describe, by its kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from jaxldm.checkpoints.sentencepiece_file import read_sentencepieces
from jaxldm.entries import Bounds, read_value
from jaxldm.errors import CheckpointError
from jaxldm.reading import parse_json, shown

A_NUMBER = Annotated[int, Bounds(0, 2**31 - 2)]  # of a token


@dataclasses.dataclass(frozen=True)
class Kind:
    """The defaults of transformers for a kind of tokenizer.

    Attributes:
        tokenizer_class: its name.
        max_length: of a row.
        special_tokens: their texts.
        fills_left: whether rows may be filled on the left, as language models have it that look at the mask.
    """

    tokenizer_class: str
    max_length: int
    special_tokens: Mapping[str, str]
    fills_left: bool = False


_END = "<|endoftext|>"
_BYTES = "BPE of bytes"  # of Qwen; the model in its tokenizer.json is called BPE, as CLIP's is
_MISTRAL = "BPE of Mistral"  # likewise of bytes
KINDS = {
    "BPE": Kind(
        "CLIPTokenizer",
        77,
        {"bos_token": "<|startoftext|>", "eos_token": _END, "unk_token": _END, "pad_token": _END},
    ),
    _BYTES: Kind("Qwen2Tokenizer", 32768, {"eos_token": _END, "unk_token": _END, "pad_token": _END}),
    _MISTRAL: Kind(
        "PreTrainedTokenizerFast",
        131072,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        fills_left=True,
    ),
    "Unigram": Kind("T5Tokenizer", 512, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "WordPiece": Kind(
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
# How Qwen splits a text into words before it merges bytes: a space belongs to the word after it.
_WORDS_WITH_SPACES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def json_of(files: Mapping[str, bytes], name: str) -> dict:
    """The entries of a file; none where there is no such file."""
    return parse_json(files.get(name, b"{}"), name)


def content_of(token: str | Mapping[str, Any]) -> str:
    """The text of a token: a string, or an object that also describes how it is matched."""
    return token if isinstance(token, str) else read_value(token.get("content"), str, "content of a token")


def backend_of(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> tuple[Any, Kind]:
    """The `tokenizers.Tokenizer` of these files, before the settings are applied, and its kind."""
    import tokenizers

    if "tokenizer.json" in files:
        _check_fast(json_of(files, "tokenizer.json"))
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        kind = type(backend.model).__name__
        if kind not in KINDS:
            raise CheckpointError(f"tokenizer.json has a model of kind {kind}; known: {', '.join(KINDS)}")
        if kind == "BPE" and not backend.model.end_of_word_suffix:
            kind = _MISTRAL if backend.token_to_id("[INST]") is not None else _BYTES
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
        content_of(settings.get(key) or KINDS["BPE"].special_tokens[key])
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
    return read_value(json_of(files, "vocab.json"), dict[str, A_NUMBER], "vocab.json"), pairs


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
    eos = content_of(settings.get("eos_token") or KINDS["Unigram"].special_tokens["eos_token"])
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
        content_of(settings.get(key) or KINDS["WordPiece"].special_tokens[key])
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
