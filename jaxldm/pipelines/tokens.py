"""Masked tokens in a pipeline: the steps, the start, and the loop from masked to known tokens.

What `latents` is for denoising networks. There is no path and no solver: `D.sample_tokens` takes the steps of
an `Unmasking`. The folder's scheduler is diffusers' AmusedScheduler, which names the mask token and the
schedule.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt32

from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, InvalidArgumentError, shown
from jaxldm.indices import check_indices
from jaxldm.pipelines.call import Call, ImageKeys
from jaxldm.pipelines.generate import STEPS_AT_ONCE
from jaxldm.pipelines.inputs import Size
from jaxldm.pipelines.latents import in_batches, over_images
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.schedulers import MASKED_TOKENS_SCHEDULER

TEMPERATURE = (2.0, 0.0)


class InitialTokens(NamedTuple):
    """Where N images start.

    Attributes:
        tokens: [N, h, w], the mask token where nothing is known.
        total: [N], the number of tokens that the steps' fractions are parts of.
        by_chance: the part of the tokens that is masked by chance before the first step is the unmasking's.
    """

    tokens: Int[np.ndarray, "N h w"]
    total: Int[np.ndarray, " N"]
    by_chance: bool = False


class PerCall(NamedTuple):
    """What all images of a call share. All of it is data to the compiled function."""

    unmasking: D.Unmasking
    masked_by_chance: Float[Any, ""]
    guidance_scale: Float[Any, ""]
    on_step: D.Listener | None = None
    progress: D.Listener | None = None


class PerImage(NamedTuple):
    """What each of N images has of its own: its key's numbers, and the rest as in `InitialTokens`."""

    key: UInt32[Any, "N 2"]
    tokens: Int[Any, "N h w"]
    total: Int[Any, " N"]
    cond: dict[str, Any]
    uncond: dict[str, Any] | None


class Compiled(NamedTuple):
    """What is compiled into the token loop, besides shapes: another value of it compiles again."""

    mask_token: int
    key_impl: Any


def unmasking(
    pipe: Pipeline, call: Call, size: Size, temperature: float | Sequence[float] = TEMPERATURE
) -> D.Unmasking:
    """The steps of a call, padded.

    Args:
        temperature: of a call that names none.
    """
    schedule = call.own.get("mask_schedule") or mask_schedule_of(pipe, call.mask_image is not None)
    steps = (
        pipe.defaults.num_inference_steps if call.num_inference_steps is None else call.num_inference_steps
    )
    padded = -(-steps // STEPS_AT_ONCE) * STEPS_AT_ONCE
    strength = 1.0 if call.strength is None else call.strength
    return D.make_unmasking(steps, schedule, call.own.get("temperature", temperature), padded, strength)


def mask_schedule_of(pipe: Pipeline, with_mask: bool = False) -> str:
    """The folder's mask schedule; the published pipeline for inpainting has its own."""
    name = pipe.scheduler.get("masking_schedule", "cosine")
    if name not in D.MASK_SCHEDULES:
        raise CheckpointError(f"scheduler_config.json has masking_schedule {shown(name)}, which is not known")
    return "linear" if with_mask else name


def as_tokens(pipe: Pipeline, tokens: Any) -> Int[np.ndarray, "N h w"]:
    """The tokens that a caller gives as latents, int32: entries of the codebook, and the mask token."""
    tokens = np.asarray(tokens)
    tokens = tokens[None] if tokens.ndim == 2 else tokens
    if tokens.ndim != 3 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
        raise InvalidArgumentError(
            f"latents are tokens here: whole numbers [N, h, w], not {tokens.dtype} {list(tokens.shape)}"
        )
    check_indices("latents", tokens, pipe.transformer.config.codebook_size, allowed=mask_token(pipe))
    return tokens.astype(np.int32)


def unmask_tokens(
    pipe: Pipeline,
    call: Call,
    unmasking: D.Unmasking,
    guidance_scale: float,
    keys: ImageKeys,
    condition: tuple[dict[str, Any], dict[str, Any] | None],
    start: InitialTokens,
    latent_shape: tuple[int, int, int],
) -> tuple[Int[np.ndarray, "N h w"], None]:
    """The tokens of a call, in batches of one fixed size, split over the devices."""
    by_chance = unmasking.start if start.by_chance else np.float32(0)
    if call.compile_only:
        unmasking = unmasking._replace(num_steps=np.int32(0))
    per_image = PerImage(keys.data, start.tokens, start.total, *condition)
    compiled = Compiled(mask_token(pipe), keys.impl)

    def run(shared: Any, batch: PerImage, mesh: Mesh) -> Any:
        return _unmask(shared, batch, compiled=compiled, mesh=mesh)

    with contextlib.ExitStack() as stack:
        listeners = [
            None if function is None else stack.enter_context(D.listening(function))
            for function in (call.on_step, call.progress)
        ]
        per_call = PerCall(unmasking, by_chance, np.float32(guidance_scale), *listeners)
        shared = (pipe.transformer, per_call)
        return in_batches(run, shared, per_image, call.batch_size, call.devices, call.in_flight), None


@functools.partial(jax.jit, static_argnames=("compiled", "mesh"))
def _unmask(shared: Any, per_image: PerImage, *, compiled: Compiled, mesh: Mesh) -> Int[Array, "N h w"]:
    def on_one_device(shared, per_image):
        return unmask(*shared, per_image=per_image, compiled=compiled)

    return over_images(on_one_device, mesh)(shared, per_image)


def unmask(
    transformer: Network, per_call: PerCall, per_image: PerImage, compiled: Compiled
) -> Int[Array, "N h w"]:
    """The tokens of N images. Pure; jit it."""
    keys = jax.random.wrap_key_data(per_image.key, impl=compiled.key_impl)

    def network(tokens, condition):
        return transformer(tokens, **condition)

    if per_image.uncond is None:
        logits = functools.partial(network, condition=per_image.cond)
    else:
        branches = (per_image.cond, per_image.uncond)
        logits = D.guided_logits(network, *branches, per_call.guidance_scale, cond_only_at_1=False)
    tokens = D.mask_by_chance(keys, per_image.tokens, per_call.masked_by_chance, compiled.mask_token)
    more = {"total": per_image.total, "callback": per_call.on_step, "progress": per_call.progress}
    return D.sample_tokens(keys, logits, tokens, per_call.unmasking, mask_token=compiled.mask_token, **more)


def mask_token(pipe: Pipeline) -> int:
    """The id that stands for "unknown"."""
    return int(pipe.scheduler["mask_token_id"])


def check_mask_token(pipe: Pipeline) -> None:
    """Raise `CheckpointError` unless the scheduler is of masked tokens, of the transformer's vocabulary."""
    kind, config = pipe.scheduler.get("_class_name"), pipe.transformer.config
    if kind != MASKED_TOKENS_SCHEDULER or "mask_token_id" not in pipe.scheduler:
        raise CheckpointError(
            f"its scheduler is a {kind}; an {MASKED_TOKENS_SCHEDULER} with a mask_token_id is needed"
        )
    mask_schedule_of(pipe)
    if not 0 <= mask_token(pipe) < config.vocab_size:
        raise CheckpointError(
            f"its scheduler's mask is token {mask_token(pipe)}, its transformer knows {config.vocab_size}"
        )
