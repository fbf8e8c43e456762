"""Control by pictures: ControlNets and T2I-Adapters next to the denoising network.

    pipe = pipelines.load("stable-diffusion-v1-5", controlnet="control_v11p_sd15_canny")
    images = pipe(key, "a cat", control_image=edges, controlnet_conditioning_scale=0.8)

The pictures, scales, starts and ends are data: other ones compile nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Float

from jaxldm import checkpoints
from jaxldm import diffusion as D
from jaxldm.arguments import a_dtype, a_path, checked, optional
from jaxldm.checkpoints.folder import check_one_network
from jaxldm.data.pictures import is_picture
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.call import OF_CONTROL, Call
from jaxldm.pipelines.control_branch import INPUTS, SHARE, Control
from jaxldm.pipelines.control_kinds import (
    base_name,
    check_fits,
    control_parts,
    kind_of,
)
from jaxldm.pipelines.inputs import Size, as_images, check_rows, check_size, repeated
from jaxldm.pipelines.network import Network, check_finite
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.pipelines.resizing import nearest_size, resize_picture
from jaxldm.pipelines.runs import controlnet_of
from jaxldm.pipelines.weak_branch import bounds_of

GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of R, G and B, as Pillow has them
# What a call is given for control, and what stands there where it is not.
OPTIONS = {field.name: field.default for field in dataclasses.fields(Call) if field.name in OF_CONTROL}
OF_CONTROLNETS = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")


def some_controls(name: str, value: Any) -> Any:
    """Folders or networks of control networks, one or several."""
    several = value if isinstance(value, (list, tuple)) else [value]
    return [
        each if isinstance(each, Network) else a_path(name if each is value else f"{name}[{place}]", each)
        for place, each in enumerate(several)
    ]


@checked(pipe=A_PIPELINE, control=some_controls, dtype=optional(a_dtype))
def with_control(
    pipe: Pipeline,
    control: str | Path | Network | Sequence[str | Path | Network],
    *,
    dtype: str | None = None,
) -> Pipeline:
    """The model with these control networks, in place of those that it had; the one given stays as it is.

    Args:
        control: folders of ControlNets or T2I-Adapters, runs that trained one, or networks; an empty list:
            none.
        dtype: of the folders' parameters and computation, as in `load`.

    Raises:
        CheckpointError: a folder that is missing, damaged or holds no control network; a network of another
            model; weights that are NaN.
        InvalidArgumentError: a model that takes none.

    >>> from jaxldm import pipelines                                          # doctest: +SKIP
    >>> pipe = pipelines.load("stable-diffusion-v1-5")                        # doctest: +SKIP
    >>> with_edges = pipelines.with_control(pipe, "control_v11p_sd15_canny")  # doctest: +SKIP
    >>> images = with_edges(key, "a cat", control_image=edges)                # doctest: +SKIP
    """
    if control and not pipe.family.folder.control:
        raise InvalidArgumentError(f"a {pipe.family.name} takes no control networks: leave them out")
    parts = {name: part for name, part in pipe.parts.items() if name not in control_parts(pipe.parts)}
    for each in cast(Any, control):
        network = each
        if not isinstance(each, Network):
            folder = controlnet_of(each)
            check_one_network(folder, "a ControlNet or T2I-Adapter", "controlnet")
            network = Network(*checkpoints.load(folder, dtype=dtype))
        given = "a control network" if isinstance(each, Network) else str(each)
        try:
            part = kind_of(network).part
        except CheckpointError as error:
            raise CheckpointError(f"{given}: {error}") from error
        if part not in pipe.family.folder.control:
            raise InvalidArgumentError(
                f"{given} is a {kind_of(network).title}, and a {pipe.family.name} takes none: leave it out"
            )
        check_fits(given, network, pipe.denoiser)
        check_finite(given, network)
        count = sum(base_name(name) == part for name in parts)
        parts[part if count == 0 else f"{part}_{count}"] = network
    return dataclasses.replace(pipe, parts=parts)


# ---------------------------------------------------------------- what a call is given


def read_control(pipe: Pipeline, call: Call) -> Call:
    """The call with its control images as arrays in [-1, 1], for each control network [N, H, W, C] or a list.

    Those of a list may be of different sizes until `fit_control`. Where nothing else says how large the
    images are, they are as large as the first control image.

    Raises:
        InvalidArgumentError: options without a control network, or another number of pictures or values.
        DataError: pictures that are none.
    """
    networks = control_parts(pipe.parts)
    if not networks:
        for name, default in OPTIONS.items():
            if getattr(call, name) != default if name != "control_image" else call.control_image is not None:
                raise InvalidArgumentError(
                    f"{name} is for a model with a ControlNet or a T2I-Adapter, and this has none: write "
                    "pipelines.with_control(pipe, folder), or leave it out"
                )
        return call
    _check_values(call, networks)
    pictures = _read_pictures(call.control_image, networks)
    first, multiple = cast(Size, pictures[0][0].shape[:2]), pipe.latent_spec.multiple
    if call.image is None and call.resize is not None:
        nearest = nearest_size(first, multiple)
        target = call.height or nearest[0], call.width or nearest[1]
        check_size(*target, multiple)
        pictures = [_resized(each, target, call.resize) for each in pictures]
        call = dataclasses.replace(call, height=target[0], width=target[1], resize=None)
    elif all(each is None for each in (call.image, call.latents, call.height, call.width)):
        call = dataclasses.replace(call, height=first[0], width=first[1])
    return dataclasses.replace(call, control_image=pictures)


def fit_control(pipe: Pipeline, call: Call, size: Size, num_images: int) -> Call:
    """The call with its control images in the size of the images that are drawn.

    Raises:
        InvalidArgumentError: pictures of another size, or neither one for all images nor one for each.
    """
    if not control_parts(pipe.parts):
        return call
    fitted = []
    for place, each in enumerate(call.control_image):
        name = _name(place, len(call.control_image))
        check_rows(each, num_images, name)
        found = next((picture.shape[:2] for picture in each if picture.shape[:2] != size), size)
        if found != size and call.resize is None:
            raise InvalidArgumentError(
                f"{name} is {found[0]}x{found[1]} pixels (height x width), not {size[0]}x{size[1]}: resize "
                "it, or give resize='crop', 'pad' or 'stretch'"
            )
        fitted.append(np.stack(list(each)) if found == size else _resized(each, size, call.resize))
    return dataclasses.replace(call, control_image=fitted)


def _check_values(call: Call, networks: dict[str, Network]) -> None:
    """Raise `InvalidArgumentError` for scales, starts and ends that do not go with the networks."""
    if call.control_image is None:
        raise InvalidArgumentError(
            f"this model has {_counted(networks)}: give control_image=, or draw without with "
            "pipelines.with_control(pipe, [])"
        )
    kinds = [base_name(name) for name in networks]
    for name, default in OPTIONS.items():
        if name == "control_image":
            continue
        part = "adapter" if name.startswith("adapter") else "controlnet"
        value, count = getattr(call, name), kinds.count(part)
        if value != default and count == 0:
            raise InvalidArgumentError(f"{name} is not for {_counted(networks)}: leave it out")
        if isinstance(value, tuple) and len(value) != count:
            raise InvalidArgumentError(
                f"{len(value)} values of {name} for {count} networks: give one for all, or one for each"
            )
    _check_modes(call, networks)
    count = kinds.count("controlnet")
    for start, end in zip(*(_each(call, name, count) for name in OF_CONTROLNETS[1:]), strict=True):
        if start >= end:
            raise InvalidArgumentError(
                f"control_guidance_start must be below control_guidance_end, not {start:g} and {end:g}: 0 "
                "and 1 are all steps"
            )


def _check_modes(call: Call, networks: dict[str, Network]) -> None:
    """Raise `InvalidArgumentError` for a mode that a network lacks or needs, and for guess mode elsewhere."""
    modes = _each(call, "control_mode", len(networks))
    for (name, network), mode in zip(networks.items(), modes, strict=False):
        known = getattr(network.config, "num_mode", None)
        if known is None and mode is not None:
            raise InvalidArgumentError(
                f"control_mode is for unions of ControlNets, and {name} is none: leave it out"
            )
        if known is not None and (mode is None or mode >= known):
            raise InvalidArgumentError(
                f"{name} is a union of ControlNets: give control_mode, the kind of the picture, from 0 to "
                f"{known - 1}, got {mode}"
            )
        if call.guess_mode and kind_of(network).denoiser != "UNet2DConditionModel":
            raise InvalidArgumentError(
                "guess_mode is for ControlNets of Stable Diffusion and SDXL: leave it out"
            )


def _counted(networks: dict[str, Network]) -> str:
    """In words: "a ControlNet", "2 control networks"."""
    if len(networks) == 1:
        return f"a {kind_of(next(iter(networks.values()))).title}"
    return f"{len(networks)} control networks"


def _each(call: Call, name: str, count: int) -> tuple[Any, ...]:
    value = getattr(call, name)
    return value if isinstance(value, tuple) else (value,) * count


def _name(place: int, count: int) -> str:
    return "control_image" if count == 1 else f"control_image[{place}]"


def _read_pictures(given: Any, networks: dict[str, Network]) -> list[Any]:
    """Pictures for each network, [N, H, W, C] or a list, in [-1, 1], of the channels that it takes."""
    count = len(networks)
    several = list(given) if isinstance(given, (list, tuple)) and count > 1 else [given]
    if len(several) != count:
        raise InvalidArgumentError(
            f"{len(several)} control images for {count} control networks: give a list of one for each, in "
            f"the order {', '.join(networks)}"
        )
    found = []
    for place, (each, network) in enumerate(zip(several, networks.values(), strict=True)):
        channels, name = kind_of(network).channels(network.config), _name(place, count)
        if isinstance(each, (list, tuple)) and each:
            found.append([row for one in each for row in _in_channels(one, channels, name)])
        else:
            found.append(_in_channels(each, channels, name))
    return found


def _in_channels(given: Any, channels: int, name: str) -> Float[np.ndarray, "N H W C"]:
    """Pictures of so many channels: grey ones become RGB, and the other way round."""
    if not is_picture(given) and not isinstance(given, (list, tuple, str)) and np.ndim(given) == 2:
        given = np.asarray(given)[..., None]
    pictures = as_images(given, name)
    found = pictures.shape[-1]
    if (found, channels) == (1, 3):
        return np.repeat(pictures, 3, axis=-1)
    if (found, channels) == (3, 1):
        return (pictures @ GREY)[..., None]
    if found != channels:
        raise InvalidArgumentError(f"{name} has {found} channels, the network takes {channels}")
    return pictures


def _resized(pictures: Any, size: Size, how: Any) -> Float[np.ndarray, "N h w C"]:
    return np.stack([resize_picture(each, size, how) for each in pictures])


# ---------------------------------------------------------------- in the sampling loop


def controls_of(pipe: Pipeline, call: Call, grid: D.Grid) -> tuple[Control, ...]:
    """The control networks on the rows of a run."""
    networks, steps = control_parts(pipe.parts), int(D.steps_in(grid))
    kinds = [base_name(name) for name in networks]
    found, places = [], {"controlnet": 0, "adapter": 0}
    for name, part in zip(networks, kinds, strict=True):
        kind, place = kind_of(networks[name]), places[part]
        count, places[part] = kinds.count(part), place + 1
        scale = _each(call, f"{part}_conditioning_scale", count)[place]
        if part == "adapter":
            first, last = 0, int(steps * call.adapter_conditioning_factor) - 1
        else:
            start, end = (_each(call, option, count)[place] for option in OF_CONTROLNETS[1:])
            used = [i for i in range(steps) if i / steps >= start and (i + 1) / steps <= end]
            first, last = (used[0], used[-1]) if used else (0, -1)
        num = kind.num_residuals(networks[name].config)
        guessed = call.guess_mode and not getattr(networks[name].config, "global_pool_conditions", False)
        weights = np.logspace(-1, 0, num) if guessed else np.ones(num)
        scales = (scale * weights).astype(np.float32)
        network = None if kind.in_loop is None else kind.in_loop(networks[name], pipe.denoiser)
        found.append(Control(network, scales, *bounds_of(grid, first, last)))
    return tuple(found)


def control_rows(pipe: Pipeline, call: Call, num_images: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the conditions of N images have for the control networks: (cond, uncond).

    In guess mode, and with a ControlNet that pools its residuals, the unconditional branch gets none.
    """
    networks = control_parts(pipe.parts)
    if not networks:
        return {}, {}
    inputs = []
    modes = _each(call, "control_mode", len(networks))
    for network, pictures, mode in zip(networks.values(), call.control_image, modes, strict=True):
        made = kind_of(network).prepare(pipe, network, pictures)
        if mode is not None:
            made["controlnet_mode"] = np.full(len(pictures), mode, np.int32)
        inputs.append(_repeated(made, num_images))
    pooled = getattr(next(iter(networks.values())).config, "global_pool_conditions", False)
    share = np.ones(num_images, np.float32)
    cond = {INPUTS: tuple(inputs), SHARE: share}
    return cond, cond | {SHARE: 0 * share if call.guess_mode or pooled else share}


def _repeated(tree: Any, num_images: int) -> Any:
    return jax.tree.map(lambda rows: repeated(np.asarray(rows), num_images), tree)
