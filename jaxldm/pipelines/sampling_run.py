"""One run of the sampling loop: what it is given, and its solver and denoiser made of that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.diffusion.grids import step_after
from jaxldm.pipelines.control_branch import Control, controlled
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.weak_branch import Weak, away_from_weak
from jaxldm.schedulers import Sampler


class PerCall(NamedTuple):
    """What all images of a call share. All of it is data to the compiled function.

    Attributes:
        grid: the rows of the run.
        guidance_scale, guidance_rescale: as in `Call`.
        cache: which steps reuse what the network computed before; None: none.
        weak: how the network of `Compiled.weak_module` is used; None: there is none.
        controls: the control networks.
    """

    grid: D.Grid
    guidance_scale: Float[Any, ""]
    guidance_rescale: Float[Any, ""]
    cache: D.Cache | None = None
    weak: Weak | None = None
    controls: tuple[Control, ...] = ()


class PerImage(NamedTuple):
    """What each of N images has of its own; a part that does not apply is None.

    Attributes:
        key: [N, 2], the numbers of its key.
        cond: arrays [N, ...] by the names of the network's arguments; "extra_channels" are added to x, and
            names that begin with "_" are for the guidance rule or for control networks alone.
        uncond: the same for the unconditional or negative branch; None without guidance.
        between: the same for a third branch, of the picture without the text, which the guidance rule finds
            in its condition as "_between" (InstructPix2Pix).
        latents: [N, h, w, c], x at the first row of the grid, in place of noise.
        image: [N, h, w, c], the latents of the image to start from, to be noised.
        known: [N, h, w, c], the latents that are put back after each step where `repaint` is 0.
        repaint: [N, h, w, 1].
    """

    key: UInt32[Any, "N 2"]
    cond: dict[str, Any]
    uncond: dict[str, Any] | None
    latents: Float[Any, "N h w c"] | None = None
    image: Float[Any, "N h w c"] | None = None
    known: Float[Any, "N h w c"] | None = None
    repaint: Float[Any, "N h w 1"] | None = None
    between: dict[str, Any] | None = None


class Compiled(NamedTuple):
    """What is compiled into the sampling loop, besides shapes: another value of it compiles again.

    Attributes:
        sampler: solver and denoiser.
        combine: (uncond, cond, t, condition, per_call) -> the two outputs as one, under guidance.
        latent_shape: (h, w, c).
        guided_channels: how many channels of the output are guided, from the first on.
        key_impl: which random numbers.
        previews: how often x_0 is kept on the way.
        weak_module: the network made weak, of the same parameters.
        one_known_noise: inpainting puts the known part back with the noise that the run starts from, as in
            diffusers, and not with other noise behind each step.
    """

    sampler: Sampler
    combine: Callable[..., Any]
    latent_shape: tuple[int, int, int]
    guided_channels: int
    key_impl: Any
    previews: int = 0
    weak_module: Any = None
    one_known_noise: bool = False


def classifier_free_guidance(
    uncond: Float[Array, "N h w c"],
    cond: Float[Array, "N h w c"],
    t: Float[Array, " ..."],
    condition: Mapping[str, Any],
    per_call: PerCall,
) -> Float[Array, "N h w c"]:
    """(1 - w) uncond + w cond (Ho and Salimans 2022), rescaled as in Lin et al. 2023."""
    return D.rescale_guidance(D.guide(uncond, cond, per_call.guidance_scale), cond, per_call.guidance_rescale)


def guided(
    network: Network,
    per_call: PerCall,
    per_image: PerImage,
    compiled: Compiled,
    call_network: Callable[[Any, Any, Any], Any] | None = None,
) -> Callable[[Any, Any], Float[Array, "N h w out"]]:
    """`predict(x, t)`: the network's output, under classifier-free guidance where there is an uncond.

    Of a network with learned variance the prediction alone is guided; the variance, where the solver wants
    it, is the one under the condition (Saharia et al. 2022, section 2.2, as published models do it).

    Args:
        network: the module and its parameters.
        per_call, per_image, compiled: of the run.
        call_network: (x, t, arguments) -> output, in place of the network itself.
    """
    channels, guided_channels = compiled.latent_shape[-1], compiled.guided_channels
    takes_step = "step_size" in getattr(network.config, "scalar_inputs", ())

    def call(x, t, condition, call_network=call_network):
        arguments = {name: value for name, value in condition.items() if not name.startswith("_")}
        extra = arguments.pop("extra_channels", None)
        if per_call.controls:
            arguments = controlled(per_call.controls, x, t, condition, arguments)
        x = x if extra is None else jnp.concatenate([x, extra], axis=-1)
        if takes_step:
            arguments["step_size"] = step_after(per_call.grid, t)
        if call_network is not None:
            return call_network(x, t, arguments)
        return models.network(network.module)(network.params, x, t, arguments)

    def call_weak(x, t):
        weak = functools.partial(models.network(compiled.weak_module), network.params)
        return call(x, t, per_image.cond, weak)[..., :guided_channels]

    def predict(x, t):
        if per_image.uncond is None:
            output = call(x, t, per_image.cond)
            mixed = cond = output[..., :guided_channels]
        else:
            uncond, *between, output = branches(x, t)
            cond = output[..., :guided_channels]
            condition = per_image.cond
            if between:
                condition = condition | {"_between": between[0][..., :guided_channels]}
            mixed = compiled.combine(uncond[..., :guided_channels], cond, t, condition, per_call)
        if compiled.weak_module is not None:
            mixed = away_from_weak(mixed, cond, lambda: call_weak(x, t), cast(Weak, per_call.weak), t)
        if mixed is not cond:
            output = jnp.concatenate([mixed, output[..., guided_channels:].astype(mixed.dtype)], axis=-1)
        return output if compiled.sampler.learned_variance else output[..., :channels]

    if per_image.between is not None:
        branches = _all_branches(call, (per_image.uncond, per_image.between, per_image.cond))
    elif per_image.uncond is not None:
        branches = D.condition_branches(call, per_image.cond, per_image.uncond).call
    return predict


def _all_branches(call: Callable[[Any, Any, Any], Any], conditions: Sequence[Any]) -> Callable[..., Any]:
    """(x, t) -> the output under each condition, from one batch."""
    count = len(conditions)

    def outputs(x: Any, t: Any) -> list[Any]:
        condition = jax.tree.map(lambda *each: jnp.concatenate(each), *conditions)
        t = jnp.tile(jnp.broadcast_to(t, x.shape[:1]), count)
        output = call(jnp.concatenate([x] * count), t, condition)
        return jnp.split(output.astype(x.dtype), count)

    return outputs


def denoiser_of(
    network: Network, per_call: PerCall, per_image: PerImage, compiled: Compiled
) -> Callable[..., D.Denoiser]:
    """The denoiser of the run, of whatever calls the network as `guided` does; by default itself."""
    return lambda call_network=None: compiled.sampler.denoiser(
        guided(network, per_call, per_image, compiled, call_network)
    )


def solver_and_denoiser(
    network: Network, per_call: PerCall, per_image: PerImage, compiled: Compiled
) -> tuple[D.Solver, D.Denoiser]:
    """The solver and the denoiser of the run, with the cache and the known part of an image in them."""
    build, solver = denoiser_of(network, per_call, per_image, compiled), compiled.sampler.solver
    if per_call.cache is None:
        denoiser = build()
    else:
        remembering = models.caching_network(network.module, network.params)
        denoiser = D.cached_denoiser(remembering, build, per_call.cache)
        solver = D.cached(solver, denoiser)
    if per_image.repaint is not None:
        noise = _first_noise(per_call, per_image, compiled) if compiled.one_known_noise else None
        solver = D.inpaint(solver, cast(Any, per_image.known), 1 - per_image.repaint, noise)
    return solver, denoiser


def _first_noise(per_call: PerCall, per_image: PerImage, compiled: Compiled) -> Float[Array, "N h w c"]:
    """The noise that the run starts from, of standard deviation 1."""
    grid, scale = per_call.grid, compiled.sampler.initial_scale
    if per_image.latents is not None:
        return per_image.latents / (grid.sigma[0] if scale is None else scale)
    keys = jax.random.wrap_key_data(per_image.key, impl=compiled.key_impl)
    return D.initial_noise(keys, (len(keys), *compiled.latent_shape), grid) / grid.sigma[0]
