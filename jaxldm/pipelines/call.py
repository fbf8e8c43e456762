"""What a call of a pipeline is made of: its options, and what a family's `encode` is given."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Array, Key, Real, UInt32

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.pipelines.inputs import Size

KEYS_AT_ONCE = 64  # keys are made for a multiple of this many images, so that their number compiles nothing


class Defaults(NamedTuple):
    """What a call takes for options that it leaves out.

    Attributes:
        guidance_scale, num_inference_steps, strength, guidance_rescale, true_cfg_scale: as in `Call`.
        round_up: a part of a step that `strength` leaves is taken, and not left out.
        solver: None is the one that the folder's scheduler names.
    """

    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    strength: float = 0.8
    round_up: bool = False
    solver: str | None = None
    guidance_rescale: float = 0.0
    true_cfg_scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The options of a call that all families share; each is a keyword of `pipe(key, prompt, ...)`.

    Attributes:
        num_images_per_prompt: N / P, of N images and P prompts.
        num_inference_steps: default the family's own, or 4 for the solvers of distilled models (lcm, tcd).
        guidance_scale: 1 is the model as trained, without a negative prompt; None is the family's default. A
            network that was distilled with guidance (LCM, FLUX.1-dev) takes the scale as an input instead.
        guidance_rescale: phi of Lin et al. 2023, section 3.4, in [0, 1]; default the family's own, mostly 0.
        true_cfg_scale: classifier-free guidance, on top, of a network that takes its scale as an input, and
            that of Qwen-Image; default the family's own, mostly 1.
        weak_guidance: on top of the others, away from the network made weak: `pipelines.SkipLayers` (SD 3) or
            `pipelines.PerturbedAttention` (U-Nets of Stable Diffusion).
        height, width: in pixels, divisible by what one token or latent covers (8 or 16); default the size of
            `image`, or the one that the model was trained on.
        solver: a name in `D.solvers.SOLVERS`, "package.module:function", a `D.Solver`, or None for the
            scheduler that the folder names.
        eta: for the solvers that have this option.
        variance: of solver "ddpm": "small", "large" or "learned", for networks with a learned variance.
        cache: steps that reuse the blocks of an earlier one: a `D.Cache`, or what `D.caching.read` reads, as
            "fora:3" or "first-block:0.1". One that looks at the blocks decides for a batch of images at once.
        token_merging: share of the tokens, up to 0.75, that are merged with others like them within
            attention: a number, or a `models.TokenMerging`. Of DiT, SiT and the U-Nets of Stable Diffusion.
        spacing, sigmas: in place of the folder's own: a name of `D.SPACINGS` or "package.module:function", or
            the noise levels, one for each step.
        timesteps: the rows themselves, noisiest first, in place of a spacing.
        image: start from this image: 8-bit pixels or floats in [-1, 1], [H, W, 3] or [N, H, W, 3], PIL
            images, or `pipelines.Latents(array)` of [N, h, w, c].
        strength: in (0, 1]; the last steps x strength steps are taken, from the noised image: rounded down,
            or up where the family's published pipelines do (SD3, FLUX). Default the family's own, or 1 with a
            mask, which starts from pure noise.
        mask_image: white (1) where `image` is drawn again, black (0) where it stays. A network trained for it
            (9 channels) takes the mask; with any other the known part is put back after each step.
        resize: "crop", "pad" or "stretch" makes `image` and `mask_image` fit `height` and `width`, or else
            the nearest multiples that the model draws; None: they must fit.
        control_image: for a model with ControlNets or T2I-Adapters (`pipelines.with_control`): a picture for
            all images or one for each, as `image` is given; of several networks a list of these, in their
            order.
        controlnet_conditioning_scale: how much of a ControlNet's residuals is added; of several one number
            for all, or one for each.
        control_guidance_start, control_guidance_end: the part of the steps in which a ControlNet is used, in
            [0, 1]; of several likewise.
        control_mode: of a union of ControlNets (FLUX) the number of the kind of the picture; of several
            networks a list, with None for those that are no unions.
        guess_mode: ControlNets act in the conditional branch alone, more weakly in the outer levels, so that
            the content of the picture is followed without a prompt (Zhang et al. 2023). For SD and SDXL.
        adapter_conditioning_scale: as that of ControlNets, of T2I-Adapters.
        adapter_conditioning_factor: the part of the steps, from the first on, in which adapters are used.
        latents: [N, h, w, c], x at the first row of the grid, as it is: noise of your own, or what another
            model left.
        denoising_start, denoising_end: use this part of the grid alone. The base model of SDXL ends at 0.8
            with `output="latents"`, and its refiner starts at 0.8 with `latents=` these.
        prompt_embeds, pooled_prompt_embeds, prompt_attention_mask: states [P, T, D], pooled states [P, E] and
            a mask [P, T] in place of prompts; those that the family takes: entries of what `encode_prompts`
            returns, such as cond["encoder_hidden_states"]. With `negative_` in front in place of negative
            prompts.
        ip_adapter_image: pictures as prompts, of a model from `with_ip_adapter`: one, or a list of one for
            each adapter, which may be a list of several pictures. For all prompts.
        ip_adapter_image_embeds: in their place, of each adapter [2, n, D] (plus: [2, n, T, D]) of negatives
            and n pictures, as `encode_image_prompts` returns them, or [1, n, D] of the pictures alone.
        ip_adapter_scale: how much they count next to the text, 1 by default: a number, or one for each
            adapter.
        output: "images", or "latents" as they are behind the last step, [N, h, w, c].
        output_type: images as "pil" (a list of PIL images) or "np" (in [0, 1]); None: arrays in [-1, 1].
        previews: K > 0 returns (images, previews [N, K, H, W, 3]): x_0 as it was seen on the way.
        tiling: decode large images in squares, in less memory.
        batch_size: images that a device computes at once. An image does not depend on the other images of its
            batch, but larger batches may be rounded differently; they are faster on a large device.
        devices: default the first device, or those of the mesh that the model was loaded on; the weights are
            copied to each.
        in_flight: images under way before the first is waited for, at least a batch.
        on_step: called as on_step(step, latents) after each step of each batch on each device.
        on_x0: called as on_x0(step, t, latents, x_0) likewise: t is where the step began, in the path's own
            units, and x_0 what the model saw there.
        progress: called as progress(steps done, steps in all) after each step of each batch; no latents leave
            the device for it.
        compile_only: take no step; see `Pipeline.warm_up`.
        own: the options of the family, for its `encode`.
    """

    num_images_per_prompt: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    true_cfg_scale: float | None = None
    weak_guidance: Any = None
    height: int | None = None
    width: int | None = None
    solver: str | D.Solver | None = None
    eta: float | None = None
    variance: str | None = None
    cache: Any = None
    token_merging: Any = None
    spacing: str | None = None
    sigmas: str | Sequence[float] | Real[Array, " steps"] | None = None
    timesteps: Sequence[float] | Real[Array, " steps"] | None = None
    image: Any = None
    strength: float | None = None
    mask_image: Any = None
    resize: str | None = None
    prompt_embeds: Real[Array, "_ _ _"] | None = None
    pooled_prompt_embeds: Real[Array, "_ _"] | None = None
    prompt_attention_mask: Real[Array, "_ _"] | None = None
    negative_prompt_embeds: Real[Array, "_ _ _"] | None = None
    negative_pooled_prompt_embeds: Real[Array, "_ _"] | None = None
    negative_prompt_attention_mask: Real[Array, "_ _"] | None = None
    control_image: Any = None
    controlnet_conditioning_scale: float | Sequence[float] = 1.0
    control_guidance_start: float | Sequence[float] = 0.0
    control_guidance_end: float | Sequence[float] = 1.0
    control_mode: int | Sequence[int | None] | None = None
    guess_mode: bool = False
    adapter_conditioning_scale: float | Sequence[float] = 1.0
    adapter_conditioning_factor: float = 1.0
    ip_adapter_image: Any = None
    ip_adapter_image_embeds: Any = None
    ip_adapter_scale: Any = None
    latents: Any = None
    denoising_start: float = 0.0
    denoising_end: float = 1.0
    output: str = "images"
    output_type: str | None = None
    previews: int = 0
    tiling: models.Tiling | None = None
    batch_size: int = 1
    devices: Sequence[Any] | None = None
    in_flight: int | None = None
    on_step: Callable[[Any, Any], None] | None = None
    on_x0: Callable[[Any, Any, Any, Any], None] | None = None
    progress: Callable[[Any, Any], None] | None = None
    compile_only: bool = False
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class ImageKeys(NamedTuple):
    """The keys of N images on the host: their numbers [N, 2], and which random numbers they are for."""

    data: UInt32[np.ndarray, "N 2"]
    impl: Any

    def wrapped(self) -> Key[Array, " N"]:
        """As JAX has them."""
        return jax.random.wrap_key_data(cast(Any, self.data), impl=self.impl)


class Request(NamedTuple):
    """What `encode` is given: P prompts (texts, or labels), P negatives or None, N keys, (height, width)."""

    prompts: Sequence[Any]
    negatives: Sequence[Any] | None
    keys: ImageKeys | None
    size: Size

    def both(self, condition: Callable[[Any], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(cond, uncond): `condition` of the prompts, and of the negatives or the empty text."""
        return condition(self.prompts), condition(self.negatives or [""] * len(self.prompts))


EMBEDS = (
    *("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
    *("negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_prompt_attention_mask"),
)
# Of models with control networks.
OF_CONTROL = (
    "control_image",
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "control_mode"),
    *("guess_mode", "adapter_conditioning_scale", "adapter_conditioning_factor"),
)
IMAGE_PROMPTS = ("ip_adapter_image", "ip_adapter_image_embeds", "ip_adapter_scale")
SHARED = {field.name for field in dataclasses.fields(Call)} - {"own"}


def image_keys(key: Key[Array, " ..."], num_images: int) -> ImageKeys:
    """The key of each image, as `D.image_keys`; another number of images compiles nothing."""
    padded = num_images if np.ndim(key) else -(-num_images // KEYS_AT_ONCE) * KEYS_AT_ONCE
    keys = D.image_keys(key, padded)
    return ImageKeys(np.asarray(jax.random.key_data(keys))[:num_images], jax.random.key_impl(keys))


def call_options(function: Callable[..., Any], encode: Callable[..., Any]) -> list[str]:
    """The names of the options that a family's call takes.

    Args:
        function: its call; one that ends in `**options` hands these on to `generate`.
        encode: its `encode`, of which the keywords are options, too.
    """

    parameters = inspect.signature(function).parameters.values()
    first = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "pipe"]
    names = dict.fromkeys([*first, *keywords_of(function)])
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names |= dict.fromkeys([*(field.name for field in dataclasses.fields(Call)), *keywords_of(encode)])
    return [name for name in names if name != "own"]


def keywords_of(function: Callable[..., Any]) -> list[str]:
    """The names that a function takes as keywords alone, and those of a `**name: Unpack[ATypedDict]`."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for rest in parameters:
        if rest.kind is rest.VAR_KEYWORD and "Unpack" in str(rest.annotation):
            names += typing.get_type_hints(*typing.get_args(typing.get_type_hints(function)[rest.name]))
    return names
