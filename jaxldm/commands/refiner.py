"""The second model of `jaxldm sample --refiner`, which goes on with the latents of the first."""

from __future__ import annotations

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
