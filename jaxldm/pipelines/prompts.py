"""Texts -> what a text encoder makes of them, one text at a time."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxldm.arguments import checked, count, flag, function, optional, refuse, several
from jaxldm.arguments import text as a_text
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.models.text_encoder import check_token_ids
from jaxldm.pipelines.network import A_NETWORK, Network

_WEIGHT = re.compile(r"(?<!\\)\([^()]*:\s*[+-]?\d*\.?\d+\s*\)")  # (cat:1.3), as other programs read it


class Encoded(NamedTuple):
    """What a text encoder makes of P texts, on the host.

    Attributes:
        hidden: [P, T, D], a state for each token.
        pooled: [P, E], one for the whole text: `text_embeds` of an encoder with a projection. None: there is
            none (T5).
        mask: [P, T], 1 for the tokens of the text, 0 for what fills its row; None unless it was requested.
    """

    hidden: Float[np.ndarray, "P T D"]
    pooled: Float[np.ndarray, "P E"] | None
    mask: Int[np.ndarray, "P T"] | None = None


def as_texts(prompt: str | Sequence[str] | None, name: str = "prompt") -> list[str]:
    """One text or several as a list.

    Raises:
        InvalidArgumentError: no text at all, or something that is no text.

    >>> as_texts("a cat")
    ['a cat']
    """
    if prompt is None:
        raise refuse(name, "a text or a list of texts", None, f"{name}='a cat'")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(texts, (bytes, dict)) or not hasattr(texts, "__iter__"):
        raise InvalidArgumentError(f"{name} must be a text or a list of texts, got {shown(prompt)}")
    texts = list(texts)
    if not texts:
        raise InvalidArgumentError(f"{name} is an empty list: give one text or more, as in {name}=['a cat']")
    for text in texts:
        if not isinstance(text, str):
            raise InvalidArgumentError(f"{name} must hold texts, got {shown(text)}")
    return texts


def for_each(texts: str | Sequence[str] | None, prompts: Sequence[str], name: str) -> list[str] | None:
    """A second kind of text, one for each prompt: one text serves all of them, and None stays None.

    Raises:
        InvalidArgumentError: another number of texts than of prompts.
    """
    if texts is None:
        return None
    texts = as_texts(texts, name)
    if len(texts) == 1:
        return texts * len(prompts)
    if len(texts) != len(prompts):
        raise InvalidArgumentError(
            f"{len(texts)} texts in {name}, but {len(prompts)} prompts: give one for all, or one for each"
        )
    return texts


def check_sequence_length(max_sequence_length: int, most: int = 512) -> None:
    """Raises `InvalidArgumentError` unless a text gets from 1 to `most` tokens."""
    if not 1 <= max_sequence_length <= most:
        raise InvalidArgumentError(
            f"max_sequence_length must lie between 1 and {most}, not {max_sequence_length}"
        )


def a_template(name: str, value: Any) -> str:
    """A text with one {} in it."""
    if not isinstance(value, str) or value.count("{}") != 1:
        raise refuse(name, "a text with one {} in it, where each text goes", value)
    return value


@checked(
    encoder=A_NETWORK,
    tokenizer=function("(texts, max_length)"),
    texts=several(a_text, "a list of texts"),
    skip=count(0),
    final_norm=flag,
    warn=flag,
    max_length=optional(count(1)),
    mask=flag,
    template=a_template,
    layers=optional(several(count(0), "a list of numbers of layers")),
    special_tokens=flag,
)
def encode_texts(
    encoder: Network,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    skip: int = 0,
    final_norm: bool = True,
    warn: bool = True,
    max_length: int | None = None,
    mask: bool = False,
    template: str = "{}",
    layers: Sequence[int] | None = None,
    special_tokens: bool = True,
) -> Encoded:
    """The states of each text, and the state of the whole.

    Every different text is encoded once, alone, so that it is the same to the last bit in every batch.

    Args:
        encoder: a text model: CLIP, T5 and the like.
        tokenizer: from `checkpoints.load_tokenizer`.
        texts: P of them.
        skip: leave out this many of the last layers; 1 are the penultimate states.
        final_norm: whether the encoder's last normalisation comes behind them (not in SDXL and others).
        warn: warn (`UserWarning`) of words behind the last place, which the encoder does not see.
        max_length: tokens of a text, those that fill its row among them; None: the tokenizer's own, or as
            many as the encoder has places for.
        mask: the encoder does not look at what fills a row, and the result has the mask.
        template: what is encoded of a text, which stands in it as {}.
        layers: in place of `skip` and `final_norm`: the states behind each of these layers, joined for each
            token, as the encoder gives them; 0 are the embeddings.
        special_tokens: False for a template that has those at both ends of a text itself.

    Raises:
        InvalidArgumentError: as many layers to skip as there are, layers that there are not, a normalisation
            that cannot be applied to other layers than the last, or a tokenizer with tokens that the encoder
            does not know.
    """
    joined_layers = None if layers is None else tuple(layers)
    length = tokenizer.max_length if max_length is None else max_length
    length = min(length, getattr(encoder.config, "max_position_embeddings", length))
    more = {} if special_tokens else {"special_tokens": False}
    tokens = tokenizer([template.replace("{}", text) for text in texts], max_length=length, **more)
    check_token_ids(encoder.config, tokens.input_ids)
    behind = template.split("{}")[1].strip()
    known: dict[str, Encoded] = {}
    for k, (text, ids, cut) in enumerate(zip(texts, np.asarray(tokens.input_ids), tokens.cut, strict=True)):
        if text in known:
            continue
        if warn and _WEIGHT.search(text):
            warnings.warn(
                f"the prompt {_shortened(text)!r} has a weight such as (cat:1.3), which is read as plain "
                "text: prompt_syntax='weights' reads it, in Stable Diffusion 1, 2 and XL",
                stacklevel=2,
            )
        cut = "" if behind.endswith(cut) else cut.removesuffix(behind).strip()
        if warn and cut:
            warnings.warn(
                f"the prompt {_shortened(text)!r} is longer than the {len(ids)} tokens of the text encoder: "
                f"it does not see {cut!r}",
                stacklevel=2,
            )
        own = np.asarray(tokens.attention_mask)[k : k + 1] if mask else None
        encoded = encode_ids(encoder, ids[None], own, skip, final_norm, joined_layers)
        known[text] = jax.tree.map(np.asarray, encoded)
    return jax.tree.map(lambda *rows: np.concatenate(rows), *(known[text] for text in texts))


@functools.partial(jax.jit, static_argnames=("skip", "final_norm", "layers"))
def encode_ids(
    encoder: Network,
    input_ids: Any,
    mask: Any,
    skip: int,
    final_norm: bool,
    layers: tuple[int, ...] | None = None,
) -> Encoded:
    encoding = encoder(input_ids) if mask is None else encoder(input_ids, mask)
    if layers is None:
        hidden = _states(encoder, encoding, skip, final_norm)
    else:
        hidden = _joined(encoding.hidden_states, layers)
    pooled = encoding.pooled if encoding.text_embeds is None else encoding.text_embeds
    return Encoded(hidden.astype(jnp.float32), None if pooled is None else pooled.astype(jnp.float32), mask)


def _joined(states: Sequence[Any], layers: tuple[int, ...]) -> Any:
    """The states behind several layers next to each other, [P, T, layers x D]."""
    for layer in layers:
        if not 0 <= layer < len(states):
            raise InvalidArgumentError(
                f"the text encoder has no layer {layer}: give numbers from 0 to {len(states) - 1} in layers"
            )
    return jnp.concatenate([states[layer].astype(jnp.float32) for layer in layers], axis=-1)


def _states(encoder: Network, encoding: Any, skip: int, final_norm: bool) -> Any:
    """The states behind all layers but the last `skip`, normalised or not."""
    layers = len(encoding.hidden_states) - 1
    if not 0 <= skip < layers:
        raise InvalidArgumentError(
            f"{skip} layers of the text encoder cannot be skipped: it has {layers}, give 0 to {layers - 1}"
        )
    if final_norm and skip == 0:
        return encoding.last_hidden_state
    hidden = encoding.hidden_states[-1 - skip]
    if not final_norm:
        return hidden
    if not hasattr(type(encoder.module), "final_layer_norm"):
        raise InvalidArgumentError(
            f"a {type(encoder.module).__name__} has no final_layer_norm for other layers than the last: give "
            "skip=0 or final_norm=False"
        )
    return encoder.module.apply({"params": encoder.params}, hidden, method="final_layer_norm")


def _shortened(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[:most] + "..."
