"""Indices beyond their table are refused, wherever they come from outside."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.faults.misuse_arrays import small_clip
from experiments.faults.small_folders import zeros
from jaxldm import data, metrics, models, pipelines
from jaxldm import diffusion as D
from jaxldm.checkpoints.tokenizer import Tokens
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError
from jaxldm.indices import check_indices
from jaxldm.pipelines.tokens import as_tokens
from jaxldm.training import text
from jaxldm.training.classifier import classification_loss

KEY = jax.random.key(0)


def test_an_index_is_below_the_rows_or_the_one_that_is_allowed():
    check_indices("labels", np.zeros((0, 3), np.int32), 2)
    check_indices("tokens", [[0, 1], [7, 1]], 2, allowed=7)
    for wrong in (2, -1):
        with pytest.raises(
            InvalidArgumentError, match=rf"^labels must lie in \[0, 1\] for it, got {wrong}: x$"
        ):
            check_indices("labels", [0, wrong, 9], 2, where="it", fix="x")
    jax.jit(lambda labels: check_indices("labels", labels, 2))(jnp.array([5]))


@dataclasses.dataclass
class OneToken:
    """A tokenizer of which every text is one token."""

    token: int
    max_length: int = 4

    def __call__(self, texts, max_length):
        ids = np.full((len(texts), max_length), self.token, np.int32)
        return Tokens(ids, np.ones_like(ids), ("",) * len(texts))


TEXT_ENCODERS = {
    "CLIP": small_clip().text_config,
    "T5": models.T5EncoderConfig(vocab_size=8, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1),
    "BERT": models.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    ),
    "Qwen": models.Qwen3Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    ),
}


@pytest.mark.parametrize("family", TEXT_ENCODERS)
def test_texts_of_a_tokenizer_with_more_words_than_embeddings(family):
    encoder = pipelines.Network(models.from_config(TEXT_ENCODERS[family]), {})
    with pytest.raises(InvalidArgumentError, match=r"token ids must lie in .*got 8: words were added"):
        pipelines.encode_texts(encoder, OneToken(8), ["a cat"])


def test_prompts_of_clip_score():
    clip, images = zeros(models.from_config(small_clip())), np.zeros((1, 8, 8, 3), np.float32)
    with pytest.raises(InvalidArgumentError, match=r"token ids must lie in .*got 8"):
        metrics.clip_similarities(clip.module, clip.params, OneToken(8), images, ["a cat"])


def test_captions_to_train_with(tmp_path, monkeypatch):
    """The two folders fit together, or nothing is encoded."""
    tokenizer = dataclasses.make_dataclass("Large", ["largest_token", "files", "max_length"])
    module = models.from_config(small_clip().text_config)
    monkeypatch.setattr(text.checkpoints, "load", lambda folder: (module, {}))
    monkeypatch.setattr(
        text.checkpoints, "load_tokenizer", lambda folder: tokenizer(8, {"tokenizer_config.json": b"{}"}, 4)
    )
    with pytest.raises(CheckpointError, match="tokens up to 8, its text encoder embeddings of 8"):
        text.load_text_parts(text.TextRecipe(encoder=str(tmp_path)))


def test_tokens_of_a_codebook_and_the_mask_token():
    """A table of embeddings may have more rows than that, as aMUSEd's has, which no codebook can draw."""
    config = types.SimpleNamespace(codebook_size=4, vocab_size=8)
    pipe = types.SimpleNamespace(
        transformer=types.SimpleNamespace(config=config), scheduler={"mask_token_id": 7}
    )
    assert as_tokens(pipe, [[0, 3], [7, 1]]).shape == (1, 2, 2)
    with pytest.raises(InvalidArgumentError, match=r"latents must lie in \[0, 3\] or be 7, got 6"):
        as_tokens(pipe, [[0, 6], [7, 1]])


@pytest.mark.parametrize("token", [4, 6, -1])
@pytest.mark.parametrize("listens", [False, True])
def test_known_tokens_that_the_network_has_no_logits_of(token, listens):
    tokens = jnp.array([[5, 5, 1, token]])

    def logits(tokens, condition=None):
        return jnp.zeros((*tokens.shape, 4))

    with pytest.raises(InvalidArgumentError, match=rf"tokens must lie in \[0, 3\] or be 5.*got {token}"):
        callback = (lambda *_: None) if listens else None
        D.sample_tokens(KEY, logits, tokens, D.make_unmasking(2), mask_token=5, callback=callback)
    with pytest.raises(InvalidArgumentError, match=rf"tokens must lie in \[0, 3\] for.*got {token}"):
        D.masked_token_loss(KEY, logits, tokens[:, 2:], mask_token=5)


def test_labels_that_are_no_classes():
    images, labels = np.zeros((3, 8, 8, 1), np.float32), np.array([0, 1, 2])
    with pytest.raises(InvalidArgumentError, match=r"labels must lie in \[0, 1\]"):
        classification_loss(KEY, lambda images: images[:, 0, :2, 0], images, labels)
    rows = data.ArrayRows({"image": images, "label": labels})
    dataset = data.Dataset("mine", (8, 8, 1), ("a", "b"), {"train": rows})
    with pytest.raises(DataError, match=r"the labels of mine train must be in \[0, 1\], but"):
        dataset.arrays("train")
