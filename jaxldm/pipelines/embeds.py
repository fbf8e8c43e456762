"""Texts that a caller encoded: states in place of prompts, as `encode` of a family would return them.

    cond, uncond = pipe.encode_prompts(["a cat"], ["blurry"])
    states = {"prompt_embeds": cond["encoder_hidden_states"]}
    states["negative_prompt_embeds"] = uncond["encoder_hidden_states"]
    images = pipe(key, **states)

A family says in `Family.text_widths` how wide its states are; one that does not takes texts alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxldm.arguments import Check
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.call import EMBEDS, Call

# The arguments of networks that states, masks and pooled states of texts are; those of pooled ones differ.
HIDDEN, MASK, POOLED = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    ("text_embeds", "pooled_projections", "pooled_text_emb"),
)

# Options of `encode` that change nothing where no text is encoded, and the texts of further encoders.
# `max_sequence_length` is not among them: a bound that holds for what was encoded with it, too.
OF_ENCODING = ("clip_skip", "prompt_syntax")
_FURTHER_TEXTS = ("prompt_2", "prompt_3")


class NoText(str):
    """The empty text that stands for states which the caller gave: nothing is to be encoded for it."""

    __slots__ = ()


class TextWidths(NamedTuple):
    """How wide the states are that a network takes of a text.

    Attributes:
        hidden: D of `prompt_embeds` [P, T, D].
        pooled: E of `pooled_prompt_embeds` [P, E]; None: the network takes none.
        masked: it takes a mask of the tokens, too, [P, T].
    """

    hidden: int
    pooled: int | None = None
    masked: bool = False


class Embeds(NamedTuple):
    """The states of one branch, by the network's arguments."""

    values: dict[str, np.ndarray]

    @property
    def count(self) -> int:
        """P, of how many texts they are."""
        return len(self.values[HIDDEN])


def array_and_no_condition(check: Check, arguments: tuple[str, ...]) -> Check:
    """What the check allows; of what `encode_prompts` returns, its message says which entry to give.

    Args:
        check: of the array.
        arguments: how networks call it.
    """

    def one_entry(name: str, value: Any) -> Any:
        both = isinstance(value, tuple) and len(value) == 2 and all(isinstance(one, Mapping) for one in value)
        if not (both or isinstance(value, Mapping)):
            return check(name, value)
        negative = name.startswith("negative_")
        condition = value[negative] if both else value
        argument = next((one for one in arguments if one in condition), arguments[0])
        given = "what encode_prompts returns" if both else "a dict"
        raise InvalidArgumentError(
            f'{name} must be one array, got {given}: write {name}={"un" * negative}cond["{argument}"] of '
            "cond, uncond = pipe.encode_prompts(...)"
        )

    return one_entry


def read_embeds(
    pipe: Any, call: Call, prompt: Any, negative_prompt: Any
) -> tuple[Embeds | None, Embeds | None]:
    """(of the prompts, of the negatives), or None for texts.

    Raises:
        InvalidArgumentError: a family that takes none, states of another shape, NaN, states next to texts, or
            some of them without the others.
    """
    given = [name for name in EMBEDS if getattr(call, name) is not None]
    if not given:
        return None, None
    if pipe.family.text_widths is None:
        raise InvalidArgumentError(f"{given[0]} is not for {pipe.family.name}: give prompt")
    widths = pipe.family.text_widths(pipe)
    cond, uncond = (_of_branch(call, prefix, widths) for prefix in ("", "negative_"))
    for embeds, text, prefix in ((cond, prompt, ""), (uncond, negative_prompt, "negative_")):
        if embeds is not None and text is not None:
            raise InvalidArgumentError(f"{prefix}prompt and {prefix}prompt_embeds: give one of them")
        for name in _FURTHER_TEXTS:
            if embeds is not None and call.own.get(prefix + name) is not None:
                raise InvalidArgumentError(
                    f"{prefix}{name} and {prefix}prompt_embeds: give one of them; embeds are of all texts"
                )
    return cond, uncond


def check_encodes(
    pipe: Any, call: Call, given: tuple[Embeds | None, Embeds | None], negatives: Any, guided: bool
) -> None:
    """Raise `InvalidArgumentError` for an option of encoding texts in a call that encodes none.

    Args:
        pipe: the model.
        call: its options.
        given: from `read_embeds`.
        negatives: the negative texts of the caller, or None.
        guided: whether the unconditional branch is used.
    """
    zeros = negatives is None and pipe.options.get("force_zeros_for_empty_prompt", False)
    zeros &= call.own.get("negative_prompt_2") is None
    if given[0] is None or (guided and given[1] is None and not zeros):
        return
    parameters = inspect.signature(pipe.family.encode).parameters
    for name in OF_ENCODING:
        if name in call.own and call.own[name] != parameters[name].default:
            raise InvalidArgumentError(
                f"{name}={call.own[name]!r} is of texts, and this call has prompt_embeds in place of all of "
                f"them: leave it out, or write it in pipe.encode_prompts(..., {name}={call.own[name]!r})"
            )


def _of_branch(call: Call, prefix: str, widths: TextWidths) -> Embeds | None:
    """The states of the prompts (prefix ""), or of the negatives."""
    names = {
        f"{prefix}prompt_embeds": (HIDDEN, widths.hidden),
        f"{prefix}pooled_prompt_embeds": ("pooled", widths.pooled),
        f"{prefix}prompt_attention_mask": (MASK, 0 if widths.masked else None),
    }
    states, *others = names
    if all(getattr(call, name) is None for name in names):
        return None
    for name in others:
        taken, there = names[name][1] is not None, getattr(call, name) is not None
        if there and not taken:
            raise InvalidArgumentError(f"{name} is nothing that this model takes: leave it out")
        if there != taken or getattr(call, states) is None:
            missing = states if there else name
            raise InvalidArgumentError(
                f"{missing} is missing: this model takes {states} and {name}, both or none"
            )
    values: dict[str, np.ndarray] = {}
    for name, (argument, width) in names.items():
        if width is None:
            continue
        axes = {HIDDEN: 3, "pooled": 2, MASK: 2}[argument]
        values[argument] = _checked(name, getattr(call, name), axes, width or None)
    _check_alike(values, names)
    if MASK in values:
        values[MASK] = (values[MASK] != 0).astype(np.int32)
    return Embeds(values)


def _checked(name: str, value: Any, axes: int, width: int | None) -> np.ndarray:
    """Finite float32 numbers of that many axes, the last one so wide."""
    array = np.asarray(value, np.float32)
    wanted = {3: f"[P, T, {width}]", 2: "[P, T]" if width is None else f"[P, {width}]"}[axes]
    if array.ndim != axes or 0 in array.shape or (width is not None and array.shape[-1] != width):
        raise InvalidArgumentError(f"{name} must be {wanted} for this model, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise InvalidArgumentError(f"{name} hold NaN or infinity")
    return array


def _check_alike(values: dict[str, np.ndarray], names: dict[str, Any]) -> None:
    """Raise `InvalidArgumentError` unless all are of as many texts, and the mask of as many tokens."""
    states = values[HIDDEN]
    for name, (argument, _) in names.items():
        if argument in values:
            shape = states.shape[: 2 if argument == MASK else 1]
            if values[argument].shape[: len(shape)] != shape:
                raise InvalidArgumentError(
                    f"{name} is {list(values[argument].shape)}, and the embeds are {list(states.shape)}: "
                    "their first axes must be equal"
                )


def read_texts(
    pipe: Any, given: tuple[Embeds | None, Embeds | None], prompt: Any, negative_prompt: Any
) -> tuple[Any, Any]:
    """The family's prompts and negatives; empty texts stand for those that the caller encoded."""
    cond, uncond = given
    prompts, negatives = pipe.family.read_prompts(
        prompt if cond is None else [NoText()] * cond.count, negative_prompt if uncond is None else NoText()
    )
    if uncond is not None and uncond.count not in (1, len(prompts)):
        raise InvalidArgumentError(
            f"negative_prompt_embeds are of {uncond.count} texts, and there are {len(prompts)} prompts: give "
            "one for all, or one for each"
        )
    return prompts, negatives


def with_embeds(
    cond: dict[str, Any], uncond: dict[str, Any], given: tuple[Embeds | None, Embeds | None], guided: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The conditions of a call with the caller's states in place of those of the empty text.

    Where the unconditional branch is zeros (SDXL without a negative prompt), it is zeros of the same shape.

    Args:
        guided: whether the unconditional branch is used.

    Raises:
        InvalidArgumentError: branches of different numbers of tokens.
    """
    if given == (None, None):
        return cond, uncond
    cond, uncond = (_replaced(*pair) for pair in zip((cond, uncond), given, strict=True))
    ours, others = cond[HIDDEN], uncond[HIDDEN]
    if guided and ours.shape[1] != others.shape[1]:
        if given[1] is None and not others.any():
            uncond = uncond | {HIDDEN: np.zeros_like(ours)}
        else:
            raise InvalidArgumentError(
                f"the prompt has {ours.shape[1]} tokens of states, the negative {others.shape[1]}: give both "
                "prompt_embeds and negative_prompt_embeds, equally long"
            )
    return cond, uncond


def _replaced(condition: dict[str, Any], embeds: Embeds | None) -> dict[str, Any]:
    if embeds is None:
        return condition
    values = dict(embeds.values)
    if "pooled" in values:
        name = next(name for name in POOLED if name in condition)
        values[name] = values.pop("pooled")
    count = len(condition[HIDDEN])
    return condition | {
        name: np.broadcast_to(value, (count, *value.shape[1:])) for name, value in values.items()
    }
