"""The second model of `jaxldm sample --refiner`, which goes on with the latents of the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxldm.errors import InvalidArgumentError

# The families that a model takes latents over from, where it is not its own alone.
_OF_ONE_SPACE = ({"StableDiffusionXL", "InstructPix2PixXL"},)


def check_refiner(options: Any) -> None:
    """Look at the folder of --refiner, before either model is loaded.

    Raises:
        CheckpointError: there is no such model.
        InvalidArgumentError: it draws from no texts, or its latents are others than those of the first model.
    """
    from jaxldm import pipelines
    from jaxldm.pipelines.folders import family_of

    if options.refiner is None:
        return
    if pipelines.kind_of(options.refiner) != "text-to-image":
        raise InvalidArgumentError(f"--refiner {options.refiner} is not a text-to-image model")
    first, second = family_of(options.folder, options.family).name, family_of(options.refiner).name
    if first != second and not any(space.issuperset({first, second}) for space in _OF_ONE_SPACE):
        raise InvalidArgumentError(
            f"--refiner {options.refiner} is of the family {second}, and {options.folder} of {first}, whose "
            "latents are others: give a model of the same family, or draw a second time with --image"
        )


def options_of(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call, without those that only the other of an SDXL base and its refiner takes."""
    from jaxldm.pipelines.families.stable_diffusion_xl import unused_numbers

    unused = unused_numbers(pipe) if "requires_aesthetics_score" in pipe.options else ()
    return {name: value for name, value in options.items() if name not in unused}


def second_options(start: float, latents: Any, first: Mapping[str, Any]) -> dict[str, Any]:
    """Where the second model starts, and with a mask what it puts back, as the first model does.

    Args:
        start: the part of the noise that is gone.
        latents: of the first model.
        first: the options of its call.
    """
    kept = ("image", "mask_image", "resize", "height", "width") if "mask_image" in first else ()
    return {"denoising_start": start, "latents": latents} | {name: first.get(name) for name in kept}
