"""From texts or labels to images: `generate`, which every family's call goes through, and its stages.

encode -> grid -> initial latents -> denoise -> decode

A stage is a field of the family (`family.Family`), and the functions here are what most families have in
it. A family that differs calls them with something changed, or has a function of its own.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxldm import diffusion as D
from jaxldm import models, schedulers
from jaxldm.arguments import a_key, checked
from jaxldm.errors import InvalidArgumentError
from jaxldm.exact import LARGEST_FLOAT32
from jaxldm.pipelines.caching import check_cache
from jaxldm.pipelines.call import SHARED, Call, ImageKeys, Request, image_keys
from jaxldm.pipelines.control import control_rows, controls_of, fit_control, read_control
from jaxldm.pipelines.embeds import check_encodes, read_embeds, read_texts, with_embeds
from jaxldm.pipelines.image_prompts import read_pictures, with_pictures
from jaxldm.pipelines.images import as_output_type
from jaxldm.pipelines.inputs import InitialLatents, Inputs, Size, initial_latents, read_inputs, repeated
from jaxldm.pipelines.latents import (
    Progress,
    computing_mesh,
    decode_images,
    denoise,
    num_batches_at_once,
)
from jaxldm.pipelines.network import check_weights, merging_tokens
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline, read_call
from jaxldm.pipelines.prompts import as_texts, for_each
from jaxldm.pipelines.sampling_run import Compiled, PerCall, PerImage
from jaxldm.pipelines.scheduler_files import check_time
from jaxldm.pipelines.weak_branch import weak_of
from jaxldm.schedulers import PLAIN, GridRule, Sampler, Scheduler
from jaxldm.schedulers.grids import times_of_numbers
from jaxldm.schedulers.quirks import SCALED, Quirks

# Grids are padded to a multiple of this many steps: numbers of steps up to it share one compiled function.
STEPS_AT_ONCE = 64


@checked(pipe=A_PIPELINE, key=a_key)
def generate(
    pipe: Pipeline,
    key: Key[Array, " ..."],
    prompt: str | Sequence[Any] | Int[Array, " N"] | None = None,
    negative_prompt: str | Sequence[Any] | Int[Array, " ..."] | None = None,
    **options: Any,
) -> Any:
    """Draw images, float32 [N, H, W, 3] in [-1, 1]: those of the first prompt, of the second, ...

    Image k depends on (key, k), its prompt and the options alone: not on the number of images. Another seed,
    guidance scale, prompt, callback or number of steps (within the same 64) compiles nothing new; the first
    guidance scale of 1 does, because it calls the network on half as much.

    Args:
        key: image k draws its random numbers from fold_in(key, k); or N keys, one for each image.
        prompt: one text, or P of them; None with `prompt_embeds`.
        negative_prompt: what to steer away from: one text for all, or P of them. None: no text.
        options: the attributes of `Call`, and those of the family's `encode`.

    Raises:
        UnknownNameError, InvalidArgumentError, DataError: always before the network is compiled.
    """
    family, call, spec = pipe.family, read_call(pipe, options), pipe.latent_spec
    if call.token_merging is not None:
        pipe = pipe.replace(denoiser=merging_tokens(pipe.denoiser, call.token_merging))
    embeds = read_embeds(pipe, call, prompt, negative_prompt)
    pictures = read_pictures(pipe, call)
    prompts, negatives = read_texts(pipe, embeds, prompt, negative_prompt)
    num_images = call.num_images_per_prompt * len(prompts)
    call = read_control(pipe, call)
    inputs = family.read_inputs(pipe, call, num_images)
    call = fit_control(pipe, call, inputs.size, num_images)
    guidance_input, guidance_scale = read_guidance(pipe, call, negatives)
    check_encodes(pipe, call, embeds, negatives, guidance_scale != 1)
    schedule = family.grid(pipe, call, inputs.size)
    if call.cache is not None:
        check_cache(pipe.denoiser, call.cache, *schedule)
    keys = image_keys(key, num_images)

    cond, uncond = family.encode(pipe, Request(prompts, negatives, keys, inputs.size), **call.own)
    cond, uncond = with_embeds(cond, uncond, embeds, guidance_scale != 1)
    cond, uncond = with_pictures(pipe, pictures, cond, uncond)
    if guidance_input is not None:
        scales = family.guidance_condition(pipe, guidance_input, len(prompts))
        cond, uncond = cond | scales, uncond | scales
    start = family.initial_latents(pipe, call, inputs, num_images)
    condition = rows(num_images, cond, None if guidance_scale == 1 else uncond)
    shape = spec.shape(inputs.size)
    latents, previews = family.denoise(pipe, call, schedule, guidance_scale, keys, condition, start, shape)
    if call.output == "images":
        kept = kept_part(pipe, inputs, num_images)
        latents, previews = decode_all(pipe, call, latents, previews, kept)
    return (latents, previews) if call.previews else latents


def read_prompts(prompt: Any, negative_prompt: Any) -> tuple[list[str], list[str] | None]:
    """P prompts, and P negatives or None."""
    prompts = as_texts(prompt)
    return prompts, for_each(negative_prompt, prompts, "negative_prompt")


def read_call_inputs(pipe: Pipeline, call: Call, num_images: int) -> Inputs:
    """The images, masks and latents of a call, checked; see `read_inputs`."""
    names = ("height", "width", "image", "mask_image", "latents", "resize")
    return read_inputs(pipe.latent_spec, num_images, **{name: getattr(call, name) for name in names})


def encode_inputs(pipe: Pipeline, call: Call, inputs: Inputs, num_images: int) -> InitialLatents:
    """Where the images of a call start; see `initial_latents`."""
    return initial_latents(pipe.latent_spec, pipe.autoencoder, inputs, num_images, call.strength)


# ---------------------------------------------------------------- guidance


def read_guidance(pipe: Pipeline, call: Call, negatives: Any) -> tuple[float | None, float]:
    """(the scale that the network takes as an input, or None; the scale of classifier-free guidance)."""
    family = pipe.family
    family.check_guidance(pipe, call)
    scale = pipe.defaults.guidance_scale if call.guidance_scale is None else call.guidance_scale
    true_scale = pipe.defaults.true_cfg_scale if call.true_cfg_scale is None else call.true_cfg_scale
    for name, value in (("guidance_scale", scale), ("true_cfg_scale", true_scale)):
        if not 0 <= value <= LARGEST_FLOAT32:
            raise InvalidArgumentError(
                f"{name} must be a finite number of 0 or more, not {value}: 1 is the model as trained, "
                f"{getattr(pipe.defaults, name):g} is a good start"
            )
    distilled = family.is_guidance_distilled(pipe)
    if pipe.reference_quirks:
        scale, true_scale = _as_diffusers_guides(pipe, scale, true_scale, negatives)
    few = pipe.few_steps
    if few is not None:
        few.check_scale(scale, call.true_cfg_scale)
        if few.guidance != "outside":
            scale, true_scale = 1.0 if few.guidance == "inside" else scale, 1.0
            if call.guidance_rescale not in (None, pipe.defaults.guidance_rescale):
                _ignored("guidance_rescale", f"guidance is inside {few.this}")
            if negatives is not None:
                _ignored(_negative(pipe), f"guidance is inside {few.this}")
                negatives = None
    if not (distilled or family.true_cfg):
        if true_scale != 1:
            raise InvalidArgumentError(
                "true_cfg_scale is for networks that take guidance_scale as an input: give guidance_scale "
                "alone"
            )
        if negatives is not None and call.guidance_scale == 1:
            _ignored(_negative(pipe), "guidance_scale is 1")
        return None, float(scale)
    if negatives is not None and true_scale == 1:
        _ignored(_negative(pipe), "give true_cfg_scale=2 or so")
    return float(scale) if distilled else None, float(true_scale)


def _negative(pipe: Pipeline) -> str:
    return f"the negative {'prompt' if pipe.num_classes is None else 'class'}"


def _ignored(what: str, why: str) -> None:
    """Warn whoever made the call."""
    warnings.warn(f"{what} is ignored: {why}", stacklevel=5)


def _as_diffusers_guides(
    pipe: Pipeline, scale: float, true_scale: float, negatives: Any
) -> tuple[float, float]:
    """(scale, true scale): below 1 nothing is guided there, nor by a true scale without a negative prompt."""
    knows_less = "LDMTextToImagePipeline" in pipe.family.folder.class_names
    if not (pipe.family.is_guidance_distilled(pipe) or knows_less):
        scale = max(scale, 1.0)
    return scale, 1.0 if negatives is None else max(true_scale, 1.0)


def has_guidance_embedding(pipe: Pipeline) -> bool:
    """Whether the U-Net takes the guidance scale, as latent consistency models do."""
    return getattr(pipe.denoiser.config, "time_cond_proj_dim", None) is not None


def guidance_embedding(pipe: Pipeline, scale: float, count: int) -> dict[str, Any]:
    """The scale as such a U-Net takes it: arrays [count, ...] by argument name (Luo et al. 2023)."""
    w = jnp.full(count, scale - 1, jnp.float32)
    return {
        "timestep_cond": np.asarray(models.guidance_embedding(w, pipe.denoiser.config.time_cond_proj_dim))
    }


# ---------------------------------------------------------------- grid


def read_scheduler(pipe: Pipeline, call: Call) -> Scheduler:
    """Path, prediction, solver and grid of the folder's scheduler and the call's solver.

    Raises:
        UnknownNameError: no such solver.
        InvalidArgumentError: an option that it does not have; with `reference_quirks` a scheduler of which
            diffusers draws noise.
    """
    solver = pipe.defaults.solver if call.solver is None else call.solver
    if call.variance is not None and call.solver not in ("ddpm", None):
        raise InvalidArgumentError('variance is an option of solver="ddpm"')
    if call.variance == "learned" and not pipe.has_learned_variance:
        raise InvalidArgumentError('this network has no learned variance: leave variance="learned" out')
    options = {"eta": call.eta, "reference_quirks": pipe.reference_quirks}
    if call.variance is None:
        stops_early = call.denoising_end < 1
        scheduler = schedulers.from_config(pipe.scheduler, solver, stops_early=stops_early, **options)
        is_dit = type(pipe.denoiser.module).__name__ == "DiTTransformer2DModel"
        if is_dit:
            _check_unscaled(scheduler)
        gives_eta = not is_dit  # 0 to TCD, all pipelines but that
        if pipe.reference_quirks and gives_eta and scheduler.solver == D.solvers.tcd():
            sampler = scheduler.sampler._replace(solver=D.solvers.tcd(gamma=0.0))
            return dataclasses.replace(scheduler, sampler=sampler)
        return scheduler
    scheduler = schedulers.from_config(pipe.scheduler, "ddpm", **options)
    own = D.solvers.ddpm(variance=call.variance)
    sampler = scheduler.sampler._replace(solver=own, learned_variance=call.variance == "learned")
    return dataclasses.replace(scheduler, sampler=sampler)


def _check_unscaled(scheduler: Scheduler) -> None:
    """Raises `InvalidArgumentError` for what `DiTPipeline` of diffusers draws no picture with."""
    quirks = scheduler.quirks
    if isinstance(quirks, Quirks) and quirks.scheduler.startswith(SCALED):
        raise InvalidArgumentError(
            f"DiTPipeline of diffusers draws noise by {quirks.scheduler}, as it takes its steps from the "
            "scaled input of the network: leave reference_quirks out, or choose solver='ddim'"
        )


def grid(
    pipe: Pipeline, call: Call, size: Size, scheduler: Scheduler | None = None
) -> tuple[Sampler, D.Grid]:
    """Solver and denoiser, and the rows of the run, padded.

    Args:
        size: (height, width), which some schedulers shift with.
        scheduler: from `read_scheduler`, changed.

    Raises:
        InvalidArgumentError: steps, strength or parts out of range, or that leave no step.
        UnknownNameError: no such spacing or sigmas.
    """
    scheduler = read_scheduler(pipe, call) if scheduler is None else scheduler
    check_time(pipe.denoiser.module, pipe.scheduler, scheduler.path)
    path, rule = scheduler.path_for(pipe.num_image_tokens(size)), scheduler.grid
    sampler, runs = scheduler.sampler, scheduler.runs
    shift = runs.shift_of_levels(path) if call.timesteps is None else None
    rows = _written_rows(path, call, rule, shift)
    named = call.spacing is not None or call.sigmas is not None
    distilled = rows is None and (call.spacing if named else rule.spacing) == "lcm"
    distilled &= not (pipe.reference_quirks and _cuts_whole_runs(pipe))
    steps = call.num_inference_steps
    if steps is None:
        distilled_elsewhere = rule.spacing == "lcm" and pipe.few_steps is None
        steps = 4 if distilled_elsewhere else pipe.defaults.num_inference_steps
    if pipe.few_steps is not None:
        pipe.few_steps.check_steps(steps if rows is None else len(rows.t) - 1)
    if distilled and call.strength is not None:
        # The timesteps of the distillation below the strength, and not a part of those of a whole run.
        original = (GridRule() if named else rule).original_steps
        total = cast(int, path.num_train_timesteps)
        rows = D.at_times(path, D.lcm_timesteps(steps, total, original, call.strength))
    making = PLAIN if named or rows is not None else runs
    if rows is None:
        rule = rule.respaced(call.spacing, cast(Any, call.sigmas)) if named else rule
        sampler, rows = making.run(sampler, rule, path, steps)
    whole = rows
    if call.strength is not None and not distilled:
        rows = making.cut_by_strength(whole, steps, call.strength, round_up=pipe.defaults.round_up)
    rows = _part(rows, path, call.denoising_start, call.denoising_end)
    length = len(rows.t) - 1
    if length < len(whole.t) - 1:
        sampler = runs.part(sampler, whole)
    return sampler, D.pad(rows, -(-length // STEPS_AT_ONCE) * STEPS_AT_ONCE)


def _cuts_whole_runs(pipe: Pipeline) -> bool:
    """Whether the image-to-image pipeline of diffusers knows nothing of LCM's timesteps below a strength."""
    of_lcm = "LatentConsistencyModelImg2ImgPipeline" in pipe.family.folder.class_names
    return not (of_lcm and pipe.is_guidance_distilled)


def _written_rows(path: D.Path, call: Call, rule: GridRule, shift: float | None) -> D.Grid | None:
    """The rows of a call that wrote down their timesteps or noise levels; None of one that did not.

    Timesteps of a consistency model are the numbers of its levels, as in diffusers.
    """
    if call.timesteps is None and isinstance(call.sigmas, str | None):
        return None
    written = "sigmas" if call.timesteps is None else "timesteps"
    for name in ("spacing", "sigmas"):
        if name != written and getattr(call, name) is not None:
            raise InvalidArgumentError(
                f"{written}=[...] cannot be combined with {name}: leave one of them out"
            )
    name, make = ("sigmas", D.at_sigmas) if call.timesteps is None else ("timesteps", D.at_times)
    given = getattr(call, name)
    values, steps = np.asarray(given, np.float64).reshape(-1), call.num_inference_steps
    if name == "sigmas" and len(values) > 1 and values[-1] == 0:
        values = values[:-1]  # diffusers wants the end in the list, too
    if steps not in (None, len(values)):
        raise InvalidArgumentError(
            f"num_inference_steps={steps}, but {len(values)} values were given as {name}: leave it out"
        )
    if name == "timesteps" and rule.spacing == "consistency":
        values = times_of_numbers(path, values, rule.original_steps, rule.rho)
    return make(path, values, final=rule.final, shift=shift)


def _part(rows: D.Grid, path: D.Path, first: float, last: float) -> D.Grid:
    """The rows between two fractions of the noise."""
    if not 0 <= first < last <= 1:
        raise InvalidArgumentError(
            f"denoising_start and denoising_end must be 0 <= start < end <= 1, not {first} and {last}"
        )
    if first > 0:
        rows = D.split_at_fraction(rows, path, first)[1]
    return D.split_at_fraction(rows, path, last)[0] if last < 1 else rows


def num_callbacks(pipe: Pipeline, num_images: int, **options: Any) -> int:
    """How often a call with these options calls its `progress`: the length of a progress bar."""
    given = {name: value for name, value in options.items() if name in SHARED and value is not None}
    call = read_call(pipe, {name: value for name, value in given.items() if name not in pipe.family.unused})
    _, rows = pipe.family.grid(pipe, call, pipe.latent_spec.default_size)
    mesh = computing_mesh(pipe.denoiser.params, num_images, call.batch_size, call.devices)
    return int(D.steps_in(rows)) * -(-num_images // (call.batch_size * num_batches_at_once(mesh)))


# ---------------------------------------------------------------- denoise and decode


def rows(
    num_images: int, cond: dict[str, Any], uncond: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The conditions of P prompts (or of N images already), a row for each of N images."""

    def each(leaf: Any) -> Any:
        return leaf if len(leaf) == num_images else np.repeat(leaf, num_images // len(leaf), axis=0)

    return jax.tree.map(each, (cond, uncond))


def denoise_latents(
    pipe: Pipeline,
    call: Call,
    run: tuple[Sampler, D.Grid],
    guidance_scale: float,
    keys: ImageKeys,
    condition: tuple[dict[str, Any], dict[str, Any] | None],
    start: InitialLatents,
    latent_shape: tuple[int, int, int],
) -> tuple[Float[np.ndarray, "N h w c"], Float[np.ndarray, "N K h w c"]]:
    """Latents and previews of a call; see `latents.denoise`."""
    (cond, uncond), (sampler, grid) = condition, run
    more, negative = control_rows(pipe, call, len(keys.data))
    cond, uncond = cond | more, None if uncond is None else uncond | negative
    cond, uncond, between = with_extra_channels(cond, uncond, start)
    guided_channels = pipe.options.get("guided_channels") or latent_shape[-1]
    cache = None if call.cache is None else call.cache.padded(len(grid.t) - 1)
    weak, scales = call.weak_guidance, (np.float32(guidance_scale), np.float32(call.guidance_rescale))
    per_call = PerCall(grid, *scales, cache, controls=controls_of(pipe, call, grid))
    compiled = Compiled(sampler, pipe.family.combine, latent_shape, guided_channels, keys.impl, call.previews)
    compiled = compiled._replace(one_known_noise=pipe.reference_quirks and start.repaint is not None)
    if weak is not None:
        per_call = per_call._replace(weak=weak_of(weak, grid))
        compiled = compiled._replace(weak_module=weak.weak(pipe.denoiser))
    return denoise(
        pipe.denoiser,
        per_call,
        PerImage(keys.data, cond, uncond, start.latents, start.image, start.known, start.repaint, between),
        compiled,
        Progress(call.on_step, call.progress, call.compile_only, call.on_x0),
        batch_size=call.batch_size,
        devices=call.devices,
        in_flight=call.in_flight,
    )


def with_extra_channels(
    cond: dict[str, Any], uncond: dict[str, Any] | None, start: InitialLatents
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]:
    """(cond, uncond, the branch between them or None) with what the network takes besides x."""
    if start.reference is not None:
        reference = {"reference": start.reference}
        cond, uncond = cond | reference, None if uncond is None else uncond | reference
    if start.extra_channels is None:
        return cond, uncond, None
    extra = {"extra_channels": start.extra_channels}
    if uncond is None:
        return cond | extra, None, None
    if start.uncond_channels is None:
        return cond | extra, uncond | extra, None
    return cond | extra, uncond | {"extra_channels": start.uncond_channels}, uncond | extra


def decode(pipe: Pipeline, latents: Float[Any, "N h w c"], **options: Any) -> Float[np.ndarray, "N H W C"]:
    """Images in [-1, 1] of latents; options as in `decode_images`."""
    return decode_images(pipe.autoencoder, latents, **options)


def kept_part(pipe: Pipeline, inputs: Inputs, num_images: int) -> dict[str, Any]:
    """The image and the mask of inpainting, for an autoencoder whose decoder takes them."""
    takes = getattr(getattr(pipe.autoencoder, "config", None), "takes_mask", False)
    if not takes or inputs.mask is None or inputs.image_is_latents:
        return {}
    given = {"image": inputs.image, "mask": inputs.mask}
    return {name: repeated(cast(Any, rows), num_images) for name, rows in given.items()}


def decode_all(
    pipe: Pipeline, call: Call, latents: Any, previews: Any, kept: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """Latents and previews as images; `kept`: as of `kept_part`, for the images alone."""
    names = ("tiling", "batch_size", "devices", "in_flight")
    options = {name: getattr(call, name) for name in names if getattr(call, name) is not None}
    images = pipe.family.decode(pipe, latents, **options, **(kept or {}))
    if call.previews:
        flat = pipe.family.decode(pipe, previews.reshape(-1, *previews.shape[2:]), **options)
        previews = flat.reshape(*previews.shape[:2], *flat.shape[1:])
    if call.output_type is not None:
        check_weights(pipe.networks, (images, previews))  # pixels of 8 bits hide the cause
        images, previews = (as_output_type(part, call.output_type) for part in (images, previews))
    return images, previews
