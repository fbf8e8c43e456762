"""Shared by the text and image encoders: the config.json of transformers, and the output of an encoder."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxldm.errors import InvalidArgumentError
from jaxldm.indices import check_indices
from jaxldm.models.config import ModelConfig
from jaxldm.nn.transformer_encoder import PreNormEncoder


class TextEncoding(NamedTuple):
    """The output of a text encoder.

    Attributes:
        last_hidden_state: `[B, T, D]`, after the last normalisation.
        pooled: `[B, D]`, one vector per text; None for T5, which has none.
        text_embeds: `[B, P]`, the projection of `pooled` to the space that texts share with images, or None.
        hidden_states: the embeddings, then the output of every layer, each `[B, T, D]`. The penultimate layer
            of SDXL is `hidden_states[-2]`. Each encoder documents whether the last one is normalised.
    """

    last_hidden_state: Float[Array, "B T D"]
    pooled: Float[Array, "B D"] | None
    text_embeds: Float[Array, "B P"] | None
    hidden_states: tuple[Float[Array, "B T D"], ...]


# Keys of transformers' config.json that do not concern the network: how the file was written, options of
# text generation, names of classes, dropout and initial values.
GENERIC = """
_name_or_path architectures attention_dropout attention_probs_dropout_prob attn_implementation bad_words_ids
begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout cross_attention_hidden_size
decoder_start_token_id diversity_penalty do_sample dropout dropout_rate dtype early_stopping
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout_prob id2label initializer_factor
initializer_range is_encoder_decoder label2id length_penalty low_memory max_length max_new_tokens min_length
name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
output_hidden_states output_past output_scores pad_token_id prefix problem_type remove_invalid_values
repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
torchscript transformers_version typical_p use_bfloat16 use_cache
"""


@dataclasses.dataclass(frozen=True)
class TransformersConfig(ModelConfig):
    """Base of the configs of folders in the layout of transformers, with its names and defaults."""

    library: ClassVar[str] = "transformers"
    published: ClassVar[bool] = True
    fixed: ClassVar = {"is_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
    ignored: ClassVar = frozenset(GENERIC.split())


# For `ignored_tensors`: old checkpoints have the position ids 0, 1, 2, ... as a tensor.
POSITION_NUMBERS = (r".*\.position_ids",)


def pre_norm_encoder(config: Any, name: str | None = None) -> PreNormEncoder:
    """The layers of one of CLIP's towers, by its config."""
    return PreNormEncoder(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.hidden_act,
        config.layer_norm_eps,
        config.dtype,
        name=name,
    )


def token_shapes(length: int) -> tuple[jax.ShapeDtypeStruct]:
    """One text of `length` tokens, to trace an encoder."""
    return (jax.ShapeDtypeStruct((1, length), jnp.int32),)


def check_tokens(input_ids: Int[Array, "B T"], longest: int | None = None) -> None:
    """Raise `InvalidArgumentError` unless the tokens are `[B, T]` with T up to `longest`."""
    if input_ids.ndim != 2:
        raise InvalidArgumentError(f"input_ids must be [B, T], one row per text, not {input_ids.shape}")
    if longest is not None and input_ids.shape[1] > longest:
        raise InvalidArgumentError(
            f"{input_ids.shape[1]} tokens per text, but this encoder has positions for {longest}: "
            f"truncate them in the tokenizer (max_length={longest})"
        )


def check_token_ids(config: Any, input_ids: Any) -> None:
    """Raise `InvalidArgumentError` for tokens that a text encoder, of this config, has no embedding of.

    To be called with the numbers of a tokenizer, before a compiled encoder takes the nearest row for them.
    """
    rows = getattr(config, "vocab_size", None)
    if rows is not None:
        fix = "words were added to the tokenizer alone, or it is of another model"
        check_indices("token ids", input_ids, rows, where="the embeddings of the text encoder", fix=fix)


def padding_mask(attention_mask: Int[Array, "B T"] | None) -> Bool[Array, "B 1 1 T"] | None:
    """The mask for `dot_product_attention`, False at padding; None (no padding) stays None."""
    return None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
