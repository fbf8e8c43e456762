"""A denoiser that sees a draft and what was wrong with it, its loss, and the loop over rounds.

After Reflect-DiT (Li et al. 2025), in miniature. There tokens of past images and of feedback on them go
through a small transformer, and what comes out follows the tokens of the prompt into the cross-attention.
Here the tokens of an image are patches of its latents and not those of a vision encoder, there is one past
image and not up to three, and the feedback comes from the rules of `jaxldm.metrics.shapes` and not from a
language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxldm import diffusion as D

PATCH = 2
# How often in training both parts of the context are there, none, the feedback alone, the draft alone.
SHARES = {"both": 0.5, "none": 0.3, "feedback": 0.1, "draft": 0.1}
CAPTION_DROPOUT = 0.1
# How often draft and feedback are there without a caption. Where it is there it says all that they do, and a
# network that always has it never looks at them.
WITHOUT_CAPTION = 0.3


class Seen(NamedTuple):
    """What a picture is drawn from.

    Attributes:
        caption: its number in the table of captions.
        draft: latents of an earlier picture.
        findings: numbers in the table of findings.
        has_draft, has_feedback: whether these two are there; a first picture has neither.
    """

    caption: Int[Any, " B"]
    draft: Float[Any, "B h w c"]
    findings: Int[Any, "B most"]
    has_draft: Bool[Any, " B"]
    has_feedback: Bool[Any, " B"]


class Context(nn.Module):
    """Tokens of a draft and of the sentences about it, through two blocks of a transformer.

    The network knows states of the text encoder already: to those of the sentences the blocks add something.

    Attributes:
        outer: width of the text states, and of what comes out.
        width: of the blocks.
        depth: blocks.
    """

    outer: int
    width: int = 128
    depth: int = 2

    @nn.compact
    def __call__(
        self,
        draft: Float[Array, "B h w c"],
        sentences: Float[Array, "B most tokens outer"],
        has_draft: Bool[Array, " B"],
        has_feedback: Bool[Array, " B"],
    ) -> Float[Array, "B context outer"]:
        batch, height, width, channels = draft.shape
        patches = draft.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, PATCH * PATCH * channels)
        words = sentences.reshape(batch, -1, self.outer)
        parts = []
        for name, tokens, there in (("draft", patches, has_draft), ("feedback", words, has_feedback)):
            own = nn.Dense(self.width, name=f"{name}_in")(tokens)
            absent = self.param(f"no_{name}", nn.initializers.normal(0.02), (self.width,))
            places = self.param(f"{name}_places", nn.initializers.normal(0.02), (own.shape[1], self.width))
            own = jnp.where(there[:, None, None], own, absent[None, None])
            parts.append(own + places[None])
        x = jnp.concatenate(parts, axis=1)
        for k in range(self.depth):
            h = nn.LayerNorm(name=f"norm1_{k}")(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4, name=f"attention_{k}")(h, h)
            h = nn.gelu(nn.Dense(2 * self.width, name=f"mlp_in_{k}")(nn.LayerNorm(name=f"norm2_{k}")(x)))
            x = x + nn.Dense(self.width, name=f"mlp_out_{k}")(h)
        out = nn.Dense(self.outer, name="out")(nn.LayerNorm(name="norm_out")(x))
        known = jnp.where(has_feedback[:, None, None], words, 0)
        return out + jnp.concatenate([jnp.zeros_like(out[:, : -words.shape[1]]), known], axis=1)


def conditions(
    context: Context, params: Any, tables: Mapping[str, Any], seen: Seen
) -> Float[Array, "B T outer"]:
    """The states of the caption, and after them the context.

    Args:
        context: with `params` as its parameters.
        params: of it.
        tables: "captions" [K, tokens, outer], of which the first is the empty one, and "findings"
            [F, tokens, outer].
        seen: numbers in these, and drafts.
    """
    sentences = tables["findings"][seen.findings]
    own = context.apply({"params": params}, seen.draft, sentences, seen.has_draft, seen.has_feedback)
    return jnp.concatenate([tables["captions"][seen.caption], own], axis=1)


def without_anything(seen: Seen) -> Seen:
    """The null condition of guidance: no caption, no draft and no feedback."""
    never = jnp.zeros_like(seen.has_draft)
    return Seen(jnp.zeros_like(seen.caption), seen.draft, seen.findings, never, never)


def make_loss(network: Callable[..., Any], context: Context, prediction: D.Prediction) -> Callable[..., Any]:
    """`loss(params, state, batch, key)` for `training.make_train_step`; the tables are `state.frozen`.

    Args:
        network: (params, x, t, states) -> output.
        context: of the draft and the feedback.
        prediction: of the network.

    `params` has "network" and "context"; a batch "caption", "draft", "findings" and "target", the latents of
    a picture that is right.
    """

    def loss(params, state, batch, key):
        keys = jax.random.split(key, 4)
        size = batch["target"].shape[:1]
        kind = jax.random.categorical(keys[0], jnp.log(jnp.array(list(SHARES.values()))), shape=size)
        has_draft, has_feedback = (
            (kind == 0) | (kind == list(SHARES).index(name)) for name in ("draft", "feedback")
        )
        unnamed = jax.random.bernoulli(keys[3], WITHOUT_CAPTION, size) & has_draft & has_feedback
        caption = jnp.where(unnamed, 0, batch["caption"])
        seen = Seen(caption, batch["draft"], batch["findings"], has_draft, has_feedback)
        dropped = jax.random.bernoulli(keys[1], CAPTION_DROPOUT, size)
        seen = Seen(
            *(jnp.where(_like(dropped, b), a, b) for a, b in zip(without_anything(seen), seen, strict=True))
        )
        states = conditions(context, params["context"], state.frozen, seen)
        call = lambda x, t, states: network(params["network"], x, t, states)  # noqa: E731
        return D.diffusion_loss(keys[2], call, prediction, batch["target"], states)

    return loss


def _like(flags: Any, array: Any) -> Any:
    return flags.reshape(-1, *[1] * (array.ndim - 1))


class Rounds(NamedTuple):
    """What some rounds of drawing gave.

    Attributes:
        best: latents of the best picture of each prompt.
        scores: [rounds, N] of the best so far.
        drawn: [rounds, N], the score of the picture drawn in this round, -1 where none was.
    """

    best: Float[np.ndarray, "N h w c"]
    scores: Int[np.ndarray, "rounds N"]
    drawn: Int[np.ndarray, "rounds N"]


def reflect(
    draw: Callable[[int, np.ndarray, np.ndarray | None, np.ndarray | None], np.ndarray],
    judge: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    num_prompts: int,
    num_rounds: int,
    enough: int,
) -> Rounds:
    """Draws, reads what is wrong, and draws again what was not good enough; the best of each prompt is kept.

    Args:
        draw: (round, prompts [M], drafts [M, ...], findings [M, most]) -> latents [M, ...]. Drafts and
            findings are None in round 0; then they are of the best picture so far, the latest of equals.
        judge: (latents [M, ...], prompts [M]) -> (scores [M], findings [M, most]).
        num_prompts: N.
        num_rounds: 1 is drawing alone.
        enough: the score of a picture that is not drawn again.
    """
    rows = np.arange(num_prompts)
    best = draw(0, rows, None, None)
    score, findings = judge(best, rows)
    best, score, findings = np.array(best), np.array(score), np.array(findings)
    scores, drawn = [score.copy()], [score.copy()]
    for number in range(1, num_rounds):
        own = np.full(num_prompts, -1, score.dtype)
        rows = np.flatnonzero(score < enough)
        if len(rows):
            latents = draw(number, rows, best[rows], findings[rows])
            own[rows], wrong = judge(latents, rows)
            better = own[rows] >= score[rows]
            kept = rows[better]
            best[kept], score[kept], findings[kept] = latents[better], own[kept], wrong[better]
        scores.append(score.copy())
        drawn.append(own)
    return Rounds(best, np.stack(scores), np.stack(drawn))
