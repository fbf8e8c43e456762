import json
import shutil
import time

import numpy as np
import pytest
import sentencepiece
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_folders import (
    SENTENCES,
    TRICKY,
    bert_folder,
    clip_folder,
    mistral_folder,
    qwen_folder,
    t5_folder,
)

from jaxldm import checkpoints
from jaxldm.checkpoints.sentencepiece_file import read_sentencepieces
from jaxldm.errors import CheckpointError, InvalidArgumentError

KINDS = {
    "CLIP": (transformers.CLIPTokenizer, clip_folder, {}),
    "OpenCLIP, padded with !": (transformers.CLIPTokenizer, clip_folder, {"pad": "!"}),
    "OpenCLIP of XL": (transformers.CLIPTokenizer, clip_folder, {"pad": "!", "numbered": True}),
    "T5": (transformers.T5Tokenizer, t5_folder, {}),
    "BERT": (transformers.BertTokenizer, bert_folder, {}),
    "BERT with capitals and accents": (
        transformers.BertTokenizer,
        bert_folder,
        {"do_lower_case": False, "tokenize_chinese_chars": False, "strip_accents": False},
    ),
    "Qwen": (transformers.Qwen2Tokenizer, qwen_folder, {}),
    "Mistral": (transformers.PreTrainedTokenizerFast, mistral_folder, {}),
}


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory):
    """(their class, a folder in the layout of old published ones)."""
    kind, make, options = KINDS[request.param]
    folder = tmp_path_factory.mktemp("tokenizer")
    make(folder, **options)
    return kind, folder


def theirs_of(kind, folder, texts, length):
    tokenizer = kind.from_pretrained(folder)
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return encoded["input_ids"], encoded["attention_mask"]


@pytest.mark.parametrize("length", [77, 9])
@pytest.mark.parametrize("layout", ["old", "tokenizer.json"])
def test_agrees_with_transformers(published, layout, length, tmp_path):
    """From the old files, and from the single file that transformers makes of them."""
    kind, folder = published
    if layout == "tokenizer.json":
        kind.from_pretrained(folder).save_pretrained(tmp_path)
        folder = tmp_path
    tokens = checkpoints.load_tokenizer(folder)(TRICKY, max_length=length)
    input_ids, attention_mask = theirs_of(kind, folder, TRICKY, length)
    assert tokens.input_ids.dtype == tokens.attention_mask.dtype == np.int32
    for text, ours, expected in zip(TRICKY, tokens.input_ids, input_ids, strict=True):
        np.testing.assert_array_equal(ours, expected, err_msg=repr(text[:60]))
    np.testing.assert_array_equal(tokens.attention_mask, attention_mask)


@given(st.text(max_size=40))
def test_any_text_becomes_the_tokens_of_the_reference(any_folder, text):
    ours, theirs = any_folder
    for mine, reference in zip(ours, theirs, strict=True):
        expected = reference([text], padding="max_length", truncation=True, max_length=16)["input_ids"]
        np.testing.assert_array_equal(mine([text], max_length=16).input_ids, expected)


@pytest.fixture(scope="module")
def any_folder(tmp_path_factory):
    ours, theirs = [], []
    for kind, make, options in KINDS.values():
        folder = tmp_path_factory.mktemp("any")
        make(folder, **options)
        ours.append(checkpoints.load_tokenizer(folder))
        theirs.append(kind.from_pretrained(folder))
    return ours, theirs


def test_t5_cuts_as_sentencepiece_itself_does(tmp_path):
    t5_folder(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    tokenizer = checkpoints.load_tokenizer(tmp_path)
    for text in [*SENTENCES, *TRICKY[:8]]:
        tokens = tokenizer([text], max_length=300)
        count = tokens.attention_mask.sum()
        assert tokens.input_ids[0, :count].tolist() == [*reference.encode(text), reference.eos_id()], text


def test_what_is_saved_is_the_same_and_transformers_opens_it(published, tmp_path, caplog, recwarn):
    kind, folder = published
    tokenizer = checkpoints.load_tokenizer(folder)
    tokenizer.save(tmp_path / "out")
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    again = checkpoints.load_tokenizer(tmp_path / "out")
    assert (again.max_length, again.pad_token_id) == (tokenizer.max_length, tokenizer.pad_token_id)
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    recwarn.clear()
    input_ids, _ = theirs_of(kind, tmp_path / "out", TRICKY, 77)
    assert [record.getMessage() for record in caplog.records] + [str(w.message) for w in recwarn] == []
    np.testing.assert_array_equal(input_ids, tokenizer(TRICKY, max_length=77).input_ids)
    np.testing.assert_array_equal(input_ids, again(TRICKY, max_length=77).input_ids)


@pytest.mark.parametrize("name", ["CLIP", "T5", "BERT", "Qwen"])
def test_a_single_file_is_enough(name, tmp_path):
    """tokenizer.json alone, as programs in Rust have it; the rest follows from its kind."""
    kind, make, options = KINDS[name]
    (tmp_path / "alone").mkdir()
    make(tmp_path, **options)
    kind.from_pretrained(tmp_path).save_pretrained(tmp_path / "whole")
    file = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())
    file["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "alone" / "tokenizer.json").write_text(json.dumps(file))
    alone, whole = checkpoints.load_tokenizer(tmp_path / "alone"), checkpoints.load_tokenizer(tmp_path)
    assert (alone.max_length, alone.pad_token_id) == (whole.max_length, whole.pad_token_id)
    np.testing.assert_array_equal(alone(TRICKY).input_ids, whole(TRICKY).input_ids)
    alone.save(tmp_path / "saved")
    input_ids, _ = theirs_of(transformers.AutoTokenizer, tmp_path / "saved", TRICKY, alone.max_length)
    np.testing.assert_array_equal(input_ids, whole(TRICKY).input_ids)


words = st.lists(st.sampled_from([*SENTENCES[0].split(), *SENTENCES[3].split(), "漢字", "😀"]), max_size=30)


@given(words, st.integers(4, 20))
def test_cut_names_the_words_that_did_not_fit(any_folder, words, length):
    text = " ".join(words)
    for tokenizer in any_folder[0]:
        tokens, free = tokenizer([text], max_length=length), tokenizer([text], max_length=400)
        count, all_of_it = tokens.attention_mask.sum(), free.attention_mask.sum()
        cut = tokens.cut[0]
        assert bool(cut) == (all_of_it > length) and free.cut == ("",)
        if cut:
            assert text.endswith(cut) and count == length
            kept = text.removesuffix(cut)
            if cut[0] != "字":  # to BERT every Chinese character is a word
                assert not (kept[-1:].isalpha() and cut[0].isalpha())  # no word is cut in two
            assert tokenizer([kept], max_length=length).cut == ("",)
            assert tokenizer([kept + cut.split()[0]], max_length=length).cut != ("",)


def test_cut_words_are_named_as_they_were_typed(any_folder):
    clip = any_folder[0][0]
    for length in (5, 7):  # one that ends with a word, one that ends inside the next
        cut = clip(["A Cat, Übergröße and Ωmega", "a cat"], max_length=length).cut
        assert cut == ("Übergröße and Ωmega", "")


def test_words_that_were_added_keep_their_numbers(tmp_path):
    """A token of textual inversion, in both ways that folders have for it."""
    clip_folder(tmp_path)
    size = len(json.loads((tmp_path / "vocab.json").read_text()))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<my-cat>": size}))
    text = ["a photo of <my-cat> on the mat"]
    tokens = checkpoints.load_tokenizer(tmp_path)(text)
    assert size in tokens.input_ids
    np.testing.assert_array_equal(
        tokens.input_ids, theirs_of(transformers.CLIPTokenizer, tmp_path, text, 77)[0]
    )
    (tmp_path / "added_tokens.json").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    token = {
        "content": "<my-cat>",
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "single_word": False,
    }
    settings["added_tokens_decoder"] = {str(size): token | {"special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    np.testing.assert_array_equal(tokens.input_ids, checkpoints.load_tokenizer(tmp_path)(text).input_ids)
    settings["added_tokens_decoder"] = {str(size + 5): token | {"special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"'<my-cat>' should be number {size + 5}, but is {size} "):
        checkpoints.load_tokenizer(tmp_path)


def test_a_text_that_has_the_special_tokens_itself_gets_no_others(tmp_path):
    """As a chat template writes them; and where rows are filled is the class's in transformers."""
    mistral_folder(tmp_path)
    tokenizer = checkpoints.load_tokenizer(tmp_path)
    texts = ["a cat", "a photo of two dogs"]
    with_start = tokenizer([f"<s>{text}" for text in texts], max_length=12, special_tokens=False)
    for own, expected in zip(with_start, tokenizer(texts, max_length=12), strict=True):
        np.testing.assert_array_equal(own, expected)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for kind, side in (("LlamaTokenizer", "left"), ("PreTrainedTokenizerFast", "right")):
        entries = settings | {"tokenizer_class": kind, "padding_side": None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))
        assert checkpoints.load_tokenizer(tmp_path).padding_side == side
    assert transformers.LlamaTokenizer.padding_side == "left"
    (tmp_path / "processor_config.json").write_text('{"processor_class": 3}')
    with pytest.raises(CheckpointError, match="processor_class must be a string"):
        checkpoints.load_tokenizer(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "PixtralProcessor"}')
    assert checkpoints.load_tokenizer(tmp_path).class_name == "PixtralProcessor"
    (tmp_path / "processor_config.json").rename(tmp_path / "preprocessor_config.json")  # of transformers 4
    for processor, name in (("PixtralProcessor", "PixtralProcessor"), (None, "PreTrainedTokenizerFast")):
        entries = settings | {"processor_class": processor}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))
        assert checkpoints.load_tokenizer(tmp_path).class_name == name
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "top"}))
    with pytest.raises(CheckpointError, match="only the right is supported, and the left"):
        checkpoints.load_tokenizer(tmp_path)


def test_a_clip_next_to_its_processor_stays_a_tokenizer(tmp_path):
    """As in the folder of a whole CLIP: a pipeline that it is saved with wants the tokenizer."""
    clip_folder(tmp_path, processor_class="CLIPProcessor")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text('{"processor_class": "CLIPProcessor"}')
    assert checkpoints.load_tokenizer(tmp_path).class_name == "CLIPTokenizer"


def test_impossible_calls_are_refused(any_folder):
    clip = any_folder[0][0]
    for wrong in ("a cat", [1, 2], [None], [["a", "b"]]):
        with pytest.raises(InvalidArgumentError, match=r"a list of strings|must be a text"):
            clip(wrong)
    with pytest.raises(InvalidArgumentError, match="empty list of texts"):
        clip([])
    with pytest.raises(InvalidArgumentError, match="max_length=2 has no room"):
        clip(["a"], max_length=2)


def damaged(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged("vocab.json", b"{"), "vocab.json cannot be read as JSON"),
        (damaged("vocab.json", b"[]"), "vocab.json does not hold a JSON object"),
        (damaged("vocab.json", b'{"a": 0}'), "vocab.json has no '<|startoftext|>'"),
        (damaged("merges.txt", b"#version: 0.2\nq zz\n"), "do not fit together"),
        (damaged("merges.txt", b"\xff\xfe"), "do not fit together"),
        (damaged("tokenizer.json", b"{}"), "do not fit together"),
        (damaged("tokenizer_config.json", b'{"padding_side": "left"}'), "padding on the left"),
        (lambda folder: (folder / "merges.txt").unlink(), "it takes tokenizer.json, vocab.json with merges"),
        (damaged("tokenizer_config.json", b'{"added_tokens_decoder": []}'), "added_tokens_decoder must be"),
        (damaged("special_tokens_map.json", b'{"eos_token": 3}'), "eos_token must be a string or an object"),
        (damaged("tokenizer_config.json", b'{"added_tokens_decoder": {"x": "a"}}'), "no number of a token"),
        (damaged("added_tokens.json", b'{"a": 99999999999}'), "added_tokens.json.a must be a whole number"),
        (damaged("vocab.json", b'{"a": "0"}'), "vocab.json.a must be a whole number"),
        (damaged("merges.txt", b"a b c"), "not two pieces with a space"),
        (shutil.rmtree, "there is no tokenizer folder"),
    ],
)
def test_damaged_folders_are_refused(damage, message, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    clip_folder(folder)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_tokenizer(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)


def test_damaged_sentencepiece_models_are_refused(tmp_path):
    t5_folder(tmp_path)
    data = (tmp_path / "spiece.model").read_bytes()
    whole = read_sentencepieces(data)
    for length in range(1, 400):  # the first pieces, then far from the end
        try:
            part = read_sentencepieces(data[:length])
        except CheckpointError:
            continue
        assert part.pieces == whole.pieces[: len(part.pieces)]  # cut off exactly behind a piece
    for content, message in (
        (b"", "without an unknown piece"),
        (b"this is no model", "not a sentencepiece model"),
        (data[:-1], "not a sentencepiece model"),
        (b"version https://git-lfs.github.com/spec/v1", "not a sentencepiece model"),
    ):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load_tokenizer(tmp_path)


def test_models_of_byte_pairs_are_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(CheckpointError, match="only unigram is supported"):
        checkpoints.load_tokenizer(tmp_path)


def test_a_small_sentencepiece_file_takes_little_time(tmp_path):
    """A number of a protocol buffer has at most 64 bits, and T5 at most so many extra tokens."""
    t5_folder(tmp_path)
    whole = (tmp_path / "spiece.model").read_bytes()
    before = time.process_time()
    for content in (b"\xff" * 10**6, whole + b"\x08" + b"\xff" * 10**6):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(CheckpointError, match="a number of more than 64 bits"):
            checkpoints.load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 1000000000}')
    with pytest.raises(CheckpointError, match="extra_ids must be a whole number or null from 0 to 10000"):
        checkpoints.load_tokenizer(tmp_path)
    assert time.process_time() - before < 1
