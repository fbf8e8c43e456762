"""The types and ranges of what a call of a pipeline is given, checked before anything else.

What depends on the model, such as sizes, labels and the number of rows, is checked by the stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxldm import models
from jaxldm.arguments import (
    Check,
    a_key,
    array,
    check_all,
    choice,
    count,
    flag,
    function,
    instance,
    is_tracer,
    number,
    optional,
    pair,
    refuse,
    some_devices,
    text,
)
from jaxldm.diffusion.caching import a_cache_or_notation
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.exact import MAX_STEPS
from jaxldm.pipelines.embeds import HIDDEN, MASK, POOLED, array_and_no_condition
from jaxldm.pipelines.network import as_merging
from jaxldm.pipelines.resizing import RESIZES
from jaxldm.schedulers.read import a_solver_or_name

OUTPUT_TYPES = ("pil", "np")


def an_output_type(name: str, value: Any) -> str:
    """A name of `OUTPUT_TYPES`; latents are an `output`."""
    if isinstance(value, str) and value in ("latent", "latents"):
        raise refuse(name, f"one of {', '.join(OUTPUT_TYPES)}", value, 'output="latents"')
    return one_of(name, value, OUTPUT_TYPES)


def or_none(check: Check, default: Any) -> Check:
    """What the check allows, or None, which is the default."""
    return lambda name, value: default if value is None else check(name, value)


def a_weak_network(name: str, value: Any) -> Any:
    """Guidance away from a weak network: a value that makes one (`weak_guidance`)."""
    if not (callable(getattr(value, "weak", None)) and hasattr(value, "scale")) or isinstance(value, type):
        raise refuse(name, "pipelines.SkipLayers() or pipelines.PerturbedAttention()", value)
    return value


def a_name_or_numbers(name: str, value: Any) -> Any:
    """The name of a rule for noise levels, or the levels."""
    return value if isinstance(value, str) else array("real", "[N], or a name", axes=1)(name, value)


def one_or_each(check: Check) -> Check:
    """One value for all, or a list of one for each, which becomes a tuple."""

    def one_or_several(name: str, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return check(name, value)
        return tuple(check(f"{name}[{place}]", each) for place, each in enumerate(value))

    return one_or_several


CHECKS: Mapping[str, Check] = {
    "num_images_per_prompt": count(1),
    "num_images": optional(count(1)),
    "num_inference_steps": optional(count(1, MAX_STEPS)),
    "guidance_scale": optional(number()),
    "guidance_rescale": optional(number(0, 1)),
    "true_cfg_scale": optional(number()),
    "weak_guidance": optional(a_weak_network),
    "height": optional(count(1)),
    "width": optional(count(1)),
    "solver": optional(a_solver_or_name),
    "eta": optional(number(0)),
    "cache": optional(a_cache_or_notation),
    "token_merging": optional(as_merging),
    "variance": optional(choice("variance", ("small", "large", "learned"))),
    "spacing": optional(text),
    "sigmas": optional(a_name_or_numbers),
    "timesteps": optional(array("real", "[N]", axes=1)),
    "strength": optional(number(above=0, high=1)),
    "resize": optional(choice("resize", RESIZES)),
    **{
        f"{sign}{name}": optional(array_and_no_condition(array("real", shape, axes=axes), arguments))
        for name, shape, axes, arguments in (
            ("prompt_embeds", "[P, T, D]", 3, (HIDDEN,)),
            ("pooled_prompt_embeds", "[P, E]", 2, POOLED),
            ("prompt_attention_mask", "[P, T]", 2, (MASK,)),
        )
        for sign in ("", "negative_")
    },
    "controlnet_conditioning_scale": one_or_each(number()),
    "control_guidance_start": one_or_each(number(0, 1)),
    "control_guidance_end": one_or_each(number(0, 1)),
    "control_mode": optional(one_or_each(optional(count()))),
    "guess_mode": flag,
    "adapter_conditioning_scale": one_or_each(number()),
    "adapter_conditioning_factor": number(0, 1),
    "ip_adapter_scale": optional(one_or_each(number())),
    "denoising_start": or_none(number(0, 1), 0.0),
    "denoising_end": or_none(number(0, 1), 1.0),
    "output": text,
    "output_type": optional(an_output_type),
    "previews": count(0),
    "tiling": optional(instance(models.Tiling, "models.Tiling(...)")),
    "batch_size": count(1),
    "devices": optional(some_devices),
    "in_flight": optional(count(1)),
    "on_step": optional(function("(step, latents)")),
    "on_x0": optional(function("(step, t, latents, x_0)")),
    "progress": optional(function("(steps done, steps in all)")),
    "compile_only": flag,
    "clip_skip": or_none(count(0), 0),
    "prompt_syntax": choice("prompt_syntax", ("plain", "chunks", "weights")),
    "max_sequence_length": optional(count(1)),
    "original_size": optional(pair()),
    "target_size": optional(pair()),
    "crops_coords_top_left": or_none(pair(), (0, 0)),
    "negative_original_size": optional(pair()),
    "negative_target_size": optional(pair()),
    "negative_crops_coords_top_left": optional(pair()),
    "aesthetic_score": number(),
    "negative_aesthetic_score": number(),
    "noise_level": count(0),
    "image_guidance_scale": number(1),
}


def check_call(key: Any, prompts: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(key, options), each option as its check returns it; the ones without a check as they are.

    Raises:
        InvalidArgumentError, UnknownNameError: another type, out of range, or a call inside of jit.
    """
    leaves = jax.tree.leaves((key, prompts, dict(options)), is_leaf=is_tracer)
    if any(map(is_tracer, leaves)) or is_tracer(jnp.zeros(())):
        raise InvalidArgumentError(
            "a pipeline runs on the host and cannot be inside jit, vmap or grad: call it outside, or write "
            "D.sample(key, D.denoiser(network, pipe.prediction), ...) with a network that calls pipe.denoiser"
        )
    return a_key("key", key), check_all(CHECKS, options)
