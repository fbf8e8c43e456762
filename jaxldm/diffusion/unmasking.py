"""Unmasking of tokens: drawing images as token ids, the most certain first (MaskGIT, Chang et al. 2022).

`sample_tokens` goes from all masked to none by an `Unmasking`, which is data as a `Grid` is. What trains the
network is in `masked_tokens`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real, ScalarLike

from jaxldm.arguments import (
    a_condition,
    array,
    checked,
    count,
    flag,
    function,
    instance,
    number,
    optional,
)
from jaxldm.diffusion.checks import check_condition
from jaxldm.diffusion.compiling import compile_once, jit_disabled, traced
from jaxldm.diffusion.guidance import broadcast_null, check_scale, guide
from jaxldm.diffusion.listeners import report
from jaxldm.diffusion.masked_tokens import A_TOKEN, TOKENS, check_logits, mask_fraction, rank_of
from jaxldm.diffusion.sampling import Keys, image_keys
from jaxldm.errors import InvalidArgumentError
from jaxldm.exact import MAX_STEPS, ceil_quotient, floor_product
from jaxldm.functions import returned
from jaxldm.indices import check_indices

# Numbers that an image's key of a step folds in, one for each purpose; the key itself folds in the number of
# the step.
_TOKEN_NOISE, _CONFIDENCE_NOISE = 0, 1


class Unmasking(NamedTuple):
    """How the tokens are unmasked, step by step: data, as a `Grid` is.

    Attributes:
        fraction: [N], the part of the unknown tokens that is still masked after each step; 0 after the last.
        temperature: [N], of the noise on the confidence.
        num_steps: None, or in padded arrays the number of steps that count.
        start: the part that is masked before the first step: 1, or less where a run starts from an image.
    """

    fraction: Float[np.ndarray, " steps"]
    temperature: Float[np.ndarray, " steps"]
    num_steps: Int[Any, ""] | int | None = None
    start: Float[Any, ""] | float = np.float32(1)


AN_UNMASKING = instance(Unmasking, "an unmasking from D.make_unmasking(12)")


@checked(
    num_inference_steps=count(1, MAX_STEPS),
    max_steps=optional(count(1, MAX_STEPS)),
    strength=number(above=0, high=1),
)
def make_unmasking(
    num_inference_steps: int = 12,
    schedule: str = "cosine",
    temperature: float | Sequence[float] = (2.0, 0.0),
    max_steps: int | None = None,
    strength: float = 1.0,
) -> Unmasking:
    """N steps that leave gamma((i + 1) / N) of the tokens masked, float32, made in float64 on the host.

    Args:
        num_inference_steps: N; 8 to 12 in MaskGIT, 12 in aMUSEd.
        schedule: gamma, see `mask_fraction`.
        temperature: of the noise on the confidence, from the first step to the last in a straight line:
            (2, 0) is aMUSEd's, (4.5, 0) MaskGIT's. One number is kept throughout: 0 is greedy, and one far
            above the range of confidences gives a random order.
        max_steps: pad to this many steps, so that any N up to it runs in one compiled `sample_tokens`.
        strength: in (0, 1]; the last int(N strength) steps alone, for a start from an image.

    Raises:
        InvalidArgumentError: fewer steps than 1 or more than max_steps, a temperature that is negative or not
            finite, a strength outside (0, 1] or that leaves no step.
        UnknownNameError: another schedule.

    >>> make_unmasking(4, "linear").fraction
    array([0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    count = num_inference_steps
    ends = np.atleast_1d(array("real", "(first, last)", axes=(0, 1))("temperature", temperature))
    if ends.shape not in ((1,), (2,)) or not (np.isfinite(ends) & (ends >= 0)).all():
        raise InvalidArgumentError(
            f"temperature is one number or (first, last), each 0 or more, not {temperature}"
        )
    first = _first_step(count, strength)
    fraction = mask_fraction(schedule, np.arange(count + 1) / count).astype(np.float32)
    fraction[-1] = 0  # cos(pi / 2) is not, quite
    temperatures = np.linspace(ends[0], ends[-1], count).astype(np.float32)
    columns, start = [fraction[first + 1 :], temperatures[first:]], fraction[first]
    if max_steps is None:
        return Unmasking(*columns, start=start)
    count -= first
    if count > max_steps:
        raise InvalidArgumentError(f"{count} steps do not fit into max_steps={max_steps}")
    padded = (np.pad(column, (0, max_steps - count)) for column in columns)
    return Unmasking(*padded, num_steps=np.int32(count), start=start)


def _first_step(count: int, strength: float) -> int:
    """The number of the first of the last int(count strength) steps."""
    kept = floor_product(count, strength)
    if kept == 0:
        raise InvalidArgumentError(
            f"strength {strength} of {count} steps leaves none: take {ceil_quotient(1, strength)} or more"
        )
    return count - kept


@checked(network=function("(tokens, condition) -> logits"), condition=a_condition, cond_only_at_1=flag)
def guided_logits(
    network: Callable[[Any, Any], Any],
    condition: Any,
    null_condition: Any,
    guidance_scale: ScalarLike | Real[Array, " B"],
    *,
    cond_only_at_1: bool = True,
) -> Callable[[Any], Any]:
    """`logits(tokens)` = (1 - w) unconditional + w conditional logits, both branches in one batch of 2B.

    Where every scale is 1 the conditional branch alone is computed, unless `cond_only_at_1` is False, which
    saves compiling it where the scale is traced.

    Args:
        network: (tokens [N, ...], condition [N, ...]) -> logits [N, ..., V], N being 2B or B.
        condition: an array [B, ...] or a tree of them.
        null_condition: of the unconditional branch, broadcast to the condition; or a negative prompt.
        guidance_scale: w, a number or one per image [B]; may be traced. 10 in aMUSEd.

    Raises:
        InvalidArgumentError: w is NaN, infinite or negative; the two conditions differ in form.
    """
    guidance_scale = check_scale("guidance_scale", guidance_scale, np.inf)
    condition = jax.tree.map(jnp.asarray, condition)
    null_condition = broadcast_null(null_condition, condition)
    both = jax.tree.map(lambda *branches: jnp.concatenate(branches), null_condition, condition)

    def alone(tokens):
        check_condition(condition, tokens, x_name="tokens")
        return returned("the network", network(tokens, condition)).astype(jnp.float32)

    def guided(tokens):
        check_condition(condition, tokens, x_name="tokens")
        doubled = jnp.concatenate([tokens, tokens])
        answers = network(doubled, both)
        check_logits(answers, doubled)
        uncond, cond = jnp.split(answers.astype(jnp.float32), 2)
        return guide(uncond, cond, jnp.asarray(guidance_scale, jnp.float32))

    def logits(tokens):
        if isinstance(guidance_scale, float):
            return alone(tokens) if guidance_scale == 1 and cond_only_at_1 else guided(tokens)
        if not cond_only_at_1:
            return guided(tokens)
        return jax.lax.cond(jnp.all(guidance_scale == 1), alone, guided, tokens)

    return logits


@checked(
    logits=function("tokens -> logits"),
    tokens=TOKENS,
    unmasking=AN_UNMASKING,
    mask_token=A_TOKEN,
    total=optional(array()),
    return_trajectory=flag,
    callback=optional(function("(steps done, tokens)")),
    progress=optional(function("(steps done, steps in all)")),
)
def sample_tokens(
    key: Keys,
    logits: Callable[[Any], Any],
    tokens: Int[Array, "B ..."],
    unmasking: Unmasking,
    *,
    mask_token: int,
    total: ScalarLike | Real[Array, " B"] | None = None,
    return_trajectory: bool = False,
    callback: Callable[[Any, Any], None] | None = None,
    progress: Callable[[Any, Any], None] | None = None,
) -> Any:
    """Unmasks the tokens, most confident first, as one `jax.lax.scan` (Chang et al. 2022, section 3.3).

    In each step every unknown token is drawn from the softmax of its logits; those with the lowest confidence

        log p(drawn token) + temperature Gumbel noise

    are masked again, floor(M gamma((i + 1)/N)) of the M tokens that were unknown at the start (or of the
    `total`), at least one and at most all but one of those still unknown. The last step keeps all. Known
    tokens are never masked.

    Args:
        key: one key (image k uses fold_in(key, k)) or one per image [B].
        logits: tokens [B, ...] -> [B, ..., V], such as `guided_logits` or `lambda tokens: network(tokens,
            labels)`.
        tokens: the start, [B, N] or [B, H, W]: the mask token where nothing is known, true ids elsewhere
            (inpainting). All masked: `jnp.full((B, H, W), mask_token)`.
        unmasking: from `make_unmasking`.
        mask_token: the id that stands for "unknown". It is never drawn, even where the network has a logit
            for it.
        total: M, the number of tokens that the fractions are parts of, one or one per image [B]; None: those
            unknown at the start. All tokens of the image, where the start has lost some of them by chance.
        return_trajectory: also return the tokens after every step, [N + 1, B, ...], the start first.
        callback: called on the host after each step with (steps done, tokens).
        progress: called on the host after each step with (steps done, steps in all): no image leaves the
            device.

    Outside of jit, with a callback or progress, the loop runs on the host over one compiled step.

    Returns:
        tokens [B, ...]; with `return_trajectory` the pair (tokens, trajectory).

    Raises:
        InvalidArgumentError: tokens that are neither the mask token nor below V, or a total of another shape.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> start = jnp.full((2, 4, 4), 16)
    >>> flat = lambda tokens: jnp.zeros((*tokens.shape, 16))
    >>> tokens = D.sample_tokens(jax.random.key(0), flat, start, D.make_unmasking(12), mask_token=16)
    >>> tokens.shape, bool((tokens < 16).all())
    ((2, 4, 4), True)
    """
    tokens, vocabulary = jnp.asarray(tokens), []
    keys, total = image_keys(key, tokens.shape[0]), _unknown(tokens, mask_token, total)
    unmasking = jax.tree.map(jnp.asarray, unmasking)

    def counted(tokens):
        answer = logits(tokens)
        vocabulary[:] = np.shape(answer)[-1:]
        return answer

    def step(keys, total, unmasking, tokens, i):
        return _unmask(keys, counted, tokens, unmasking, total, mask_token, i)

    def scan(keys, total, unmasking, tokens):
        def advance(tokens, i):
            tokens = step(keys, total, unmasking, tokens, i)
            report(callback, i + 1, tokens)
            report(progress, i + 1, _steps_in(unmasking))
            return tokens

        return _scan_of(advance, tokens, unmasking, return_trajectory)

    arguments = (keys, total, unmasking)
    if traced(arguments, tokens, mask_token):
        return scan(*arguments, tokens)
    alone = callback is None and progress is None
    run = compile_once(scan if alone else step, *arguments, tokens, *([] if alone else [np.int32(0)]))
    if vocabulary:  # the network was traced, if not run
        known = {"where": "the logits of the network", "allowed": mask_token}
        check_indices("tokens", tokens, vocabulary[0], **known)
    if alone:
        return run(*arguments, tokens)
    if run is step and not jit_disabled():  # it cannot be compiled by itself
        return scan(*arguments, tokens)
    rows = _rows_on_the_host(functools.partial(run, *arguments), tokens, unmasking, callback, progress)
    return (rows[-1], jnp.stack(rows)) if return_trajectory else rows[-1]


def _unknown(tokens, mask_token, total):
    """M for each image, float32: the total, or the number of its unknown tokens."""
    if total is None:
        total = _count((tokens == mask_token).reshape(tokens.shape[0], -1))
    if np.shape(total) not in ((), tokens.shape[:1]):
        raise InvalidArgumentError(f"total must be one number, or one per image, got shape {np.shape(total)}")
    return jnp.broadcast_to(jnp.asarray(total), tokens.shape[:1]).astype(jnp.float32)


def _scan_of(advance, tokens, unmasking, return_trajectory):
    """The last tokens, or (those, the tokens at the start and after every row), without the host."""

    def body(tokens, i) -> tuple[Any, Any]:
        if unmasking.num_steps is None:
            tokens = advance(tokens, i)
        else:
            tokens = jax.lax.cond(i < unmasking.num_steps, advance, lambda tokens, i: tokens, tokens, i)
        return tokens, (tokens if return_trajectory else None)

    rows = jnp.arange(unmasking.fraction.shape[0], dtype=jnp.int32)
    last, trajectory = jax.lax.scan(body, tokens, rows)
    return (last, jnp.concatenate([tokens[None], trajectory])) if return_trajectory else last


def _rows_on_the_host(step, tokens, unmasking, callback, progress):
    """The tokens at the start and after every row, the listeners called in between."""
    rows, num_steps = [tokens], int(_steps_in(unmasking))
    for i in range(num_steps):
        rows.append(step(rows[-1], np.int32(i)))
        if callback is not None:
            callback(i + 1, rows[-1])
        if progress is not None:
            jax.block_until_ready(rows[-1])
            progress(i + 1, num_steps)
    return rows + rows[-1:] * (unmasking.fraction.shape[0] - num_steps)


def _steps_in(unmasking: Unmasking) -> Int[Any, ""] | int:
    """The number of steps that are taken: all rows, or those before the padding."""
    return unmasking.fraction.shape[0] if unmasking.num_steps is None else unmasking.num_steps


def _unmask(keys, logits, tokens, unmasking, total, mask_token, i):
    """The tokens after step i."""
    num_steps = _steps_in(unmasking)
    flat = (tokens.shape[0], -1)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i.astype(jnp.uint32))
    known = (tokens != mask_token).reshape(flat)
    drawn, log_p = _draw(step_keys, logits(tokens), tokens, mask_token)
    confidence = log_p.reshape(flat) + unmasking.temperature[i] * _gumbel(step_keys, known.shape[1:])
    masked = _whole_part(total * unmasking.fraction[i])
    masked = jnp.clip(masked, 1, jnp.maximum(_count(~known) - 1, 1))
    masked = jnp.where(i == num_steps - 1, 0, masked)
    again = (rank_of(jnp.where(known, jnp.inf, confidence)) < masked[:, None]) & ~known
    return jnp.where(again.reshape(tokens.shape), jnp.asarray(mask_token, tokens.dtype), drawn)


def _draw(keys, logits, tokens, mask_token):
    """The tokens with every unknown one drawn, and log p of each drawn one, float32."""
    check_logits(logits, tokens)
    logits = logits.astype(jnp.float32)
    if not traced(mask_token) and 0 <= mask_token < logits.shape[-1]:
        logits = logits.at[..., mask_token].set(-jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, np.uint32(_TOKEN_NOISE))
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)[..., 0]
    return jnp.where(tokens == mask_token, drawn.astype(tokens.dtype), tokens), log_p


def _gumbel(keys, shape):
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, np.uint32(_CONFIDENCE_NOISE))
    return jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32))(keys)


def _count(flags: Bool[Array, "B N"]) -> Int[Array, " B"]:
    return jnp.sum(flags, axis=1, dtype=jnp.int32)


def _whole_part(values: Float[Array, " B"]) -> Int[Array, " B"]:
    """floor, but of a product of float32 numbers: 10 times 0.7 is 7, whichever way it was rounded."""
    return jnp.floor(values * (1 + 4 * np.finfo(np.float32).eps)).astype(jnp.int32)
