"""Small tokenizer folders in the layouts of published ones, made here: CLIP, T5, BERT, Qwen."""

import collections
import io
import itertools
import json

import sentencepiece
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

SENTENCES = [
    "a photo of a cat sitting on the mat, in the style of an old master",
    "the cat's whiskers aren't long; they've been cut and we'll see",
    "two dogs and 3 cats run in the park at night, 4k, highly detailed",
    "naïve café: crème brûlée, Übergröße, señor",
    "an astronaut riding a horse on mars, artstation, hd, dramatic lighting",
]
TRICKY = [
    "",
    " ",
    "a photo of a cat",
    "A Photo OF a CAT",
    "  many   spaces\tand\n\nlines  ",
    "the cat's dog's we're they've I'm she'll he'd don't 'quoted'",
    "café cafe\u0301 naïve ÜBERGRÖSSE ß straße İstanbul ﬁne ½ ² №",
    "1 22 333 4444 3.14 1,000,000 4k 8K 16:9",
    "emoji 😀 👩‍👩‍👧‍👦 🇫🇷 ❤️ mixed😀in",
    "漢字とかな 한국어 中文字符 ไทย עברית العربية",
    "punctuation!!! ... ??? --- ((nested [brackets] {braces})) #tag @you <b>html</b> &amp;",
    "zero\u200bwidth no\u00a0break \u3000wide soft\u00adhyphen \ufeffbom tab\u0009 nul\u0000end",
    "<|startoftext|> typed <|endoftext|> by hand <|ENDOFTEXT|>",
    "<|im_start|>user\nA cat<|im_end|>\n<|im_start|>assistant\n",
    "</s> <pad> <unk> <extra_id_0> [CLS] [SEP] [MASK] [PAD] ▁under▁score",
    "!",
    "wow! cats! dogs!",
    "supercalifragilisticexpialidocious " * 3,
    "cat " * 200,
    "x" * 500,
    "𝒎𝒂𝒕𝒉 ﷽ \U0001f600\u0301",
]


def clip_folder(folder, pad="<|endoftext|>", numbered=False, **settings):
    """vocab.json and merges.txt: all bytes, all bytes at a word's end, the commonest pairs, 574 in all.

    numbered: tokenizer_config.json also holds the special tokens by their numbers, as SDXL's does.
    """
    letters = sorted(ByteLevel.alphabet())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = _common_pairs(60)
    vocabulary += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({text: number for number, text in enumerate(vocabulary)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    tokens = {
        "bos_token": {"content": "<|startoftext|>", "normalized": True, **flags},
        "eos_token": {"content": "<|endoftext|>", "normalized": True, **flags},
        "unk_token": {"content": "<|endoftext|>", "normalized": True, **flags},
        "pad_token": pad,
    }
    stale = {"pad_token": "a"} if numbered else {}  # nobody asks this file when the tokens are numbered
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens | stale))
    marked = {k: v if isinstance(v, str) else {"__type": "AddedToken", **v} for k, v in tokens.items()}
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **marked} | settings
    if numbered:
        contents = (pad, "<|startoftext|>", "<|endoftext|>")
        settings["added_tokens_decoder"] = {
            str(vocabulary.index(text)): {"content": text, "normalized": True, "special": True, **flags}
            for text in contents
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _common_pairs(number):
    """Byte pairs as they are learned: the commonest, joined, again and again."""
    words = collections.Counter(word.lower() for text in SENTENCES for word in text.split() if word.isascii())
    parts = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    for _ in range(number):
        counts = collections.Counter()
        for word, pieces in parts.items():
            for pair in itertools.pairwise(pieces):
                counts[pair] += words[word]
        best = max(sorted(counts), key=counts.get)
        merges.append(best)
        parts = {word: _joined(pieces, best) for word, pieces in parts.items()}
    return merges


def _joined(pieces, pair):
    out, index = [], 0
    while index < len(pieces):
        if pieces[index : index + 2] == pair:
            out.append("".join(pair))
            index += 2
        else:
            out.append(pieces[index])
            index += 1
    return tuple(out)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)  # what Qwen3's own comes to for one question


def qwen_folder(folder, **settings):
    """vocab.json and merges.txt as Qwen's: all bytes, the commonest pairs, 320 in all, then added tokens."""
    merges = []
    for first, second in _common_pairs(60):
        pair = (first.removesuffix("</w>"), second.removesuffix("</w>"))
        if pair not in merges:
            merges.append(pair)
    merges.append(("Ġ", "cat"))
    letters = sorted(ByteLevel.alphabet())
    vocabulary = list(dict.fromkeys([*letters, *("".join(pair) for pair in merges)]))
    (folder / "vocab.json").write_text(json.dumps({text: number for number, text in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges) + "\n")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(len(vocabulary) + number): {"content": text, "special": text in special, **flags}
        for number, text in enumerate([*special, "<think>", "</think>"])
    }
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": special[1:],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    } | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary) + len(added)


def mistral_folder(folder, side="left"):
    """tokenizer.json as Mistral's: special tokens, all bytes, the commonest pairs; rows filled in front."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>"]
    merges = [(first, second.removesuffix("</w>")) for first, second in _common_pairs(40)]
    merges = [*dict.fromkeys(pair for pair in merges if not pair[0].endswith("</w>")), ("Ġ", "cat")]
    vocabulary = [*special, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(vocabulary))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, merges))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", numbers["<s>"])]
    )
    made.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": side}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def t5_folder(folder, **settings):
    """spiece.model, learned by sentencepiece with the options and the normalisation of T5's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        vocab_size=75,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    settings = {"model_max_length": 512, "tokenizer_class": "T5Tokenizer", "extra_ids": 100} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def bert_folder(folder, **settings):
    """vocab.txt: special tokens, letters alone and inside words, the words of the sentences."""
    words = sorted({word.strip(",.;:") for text in SENTENCES for word in text.lower().split()})
    letters = sorted({letter for text in TRICKY for letter in text.lower() if letter.isalnum()})
    marks = list("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~▁")
    inside = ["##" + letter for letter in letters] + ["##ing", "##s", "##graph"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = list(dict.fromkeys([*special, *marks, *letters, *inside, *words]))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    settings = {"model_max_length": 512, "tokenizer_class": "BertTokenizer", "do_lower_case": True} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
