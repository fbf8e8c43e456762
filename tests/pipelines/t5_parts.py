"""A tiny random T5 encoder and its tokenizer, as the pipelines of diffusers have them."""

import torch
import transformers
from reference_pipelines import shaken

PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁cat", "▁the", "at", "og", ".", ",", "!"]
PIECES += [letter for letter in "abcdefghijklmnopqrstuvwxyzA"]


def t5_tokenizer(max_length=512):
    """Letters, a few words, and the special tokens of T5."""
    scores = [0.0] * 3 + [-1.0 - 0.1 * number for number in range(len(PIECES) - 3)]
    vocabulary = list(zip(PIECES, scores, strict=True))
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=max_length)


def t5_encoder(width=16, seed=8):
    """Two layers of T5 v1.1."""
    config = transformers.T5Config(
        vocab_size=len(PIECES),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    torch.manual_seed(seed)
    return shaken(transformers.T5EncoderModel(config), seed, 0.2)
