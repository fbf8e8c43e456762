"""The options of `jaxldm sample` for ControlNets and T2I-Adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxldm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from jaxldm.commands.pictures import Start

# Options of a call, and what they are on the command line.
CONTROL_NAMES = {
    "controlnet_conditioning_scale": "control-scale",
    "adapter_conditioning_scale": "control-scale",
    "control_guidance_start": "control-start",
    "control_guidance_end": "control-end",
    "adapter_conditioning_factor": "control-end",
}


def check_has_control(given: Any) -> None:
    """Check, before anything is loaded, that control networks and pictures for them are given together.

    Args:
        given: the options of the command.

    Raises:
        InvalidArgumentError: a picture without a network, or the other way round.
    """
    from jaxldm import checkpoints
    from jaxldm.pipelines.control_kinds import PARTS, base_name
    from jaxldm.pipelines.folders import family_of

    if not family_of(given.folder, given.family).folder.control:
        return  # such options are refused as not for this family
    own = [name for name in checkpoints.read_model_index(given.folder) if base_name(name) in PARTS]
    option = "--guess-mode" if given.control_image is None else "--control-image"
    if not own and given.controlnet is None and (given.guess_mode or given.control_image is not None):
        raise InvalidArgumentError(f"{option} is of --controlnet: give --controlnet, too, or leave it out")
    if own and given.control_image is None:
        raise InvalidArgumentError(
            f"{given.folder} draws along a picture, by its {own[0]}: give one, as in --control-image FILE"
        )


def control_options(given: Any, pipe: Any, start: Start | None) -> dict[str, Any]:
    """The options of a call of a pipeline; empty where no control image is given.

    Args:
        given: the options of the command.
        pipe: with its control networks.
        start: the picture of --image, or None: control images are resized to the size that is drawn from.

    Raises:
        DataError: no such file, or not a picture.
        InvalidArgumentError: another number of values than of networks, a picture of other proportions than
            --image without --resize.
    """
    from jaxldm.commands.pictures import check_proportions, pixels_of
    from jaxldm.data.pictures import open_picture
    from jaxldm.pipelines.control_kinds import base_name, control_parts
    from jaxldm.pipelines.resizing import size_of

    guess = {"guess_mode": True} if given.guess_mode else {}
    if given.control_image is None:
        return guess
    pictures: list[Any] = [open_picture(file) for file in given.control_image]
    if given.resize is None:
        height, width = (given.height, given.width) if start is None else size_of(start.image)
        for place, file in enumerate(given.control_image):
            if start is not None:
                check_proportions(f"--control-image {file}", size_of(pictures[place]), start)
            pictures[place] = pixels_of(pictures[place], file, height, width)
    parts = [base_name(name) for name in control_parts(pipe.parts)]
    options: dict[str, Any] = {"control_image": pictures[0] if len(pictures) == 1 else pictures, **guess}
    for name, part, option in (
        ("control_scale", "controlnet", "controlnet_conditioning_scale"),
        ("control_scale", "adapter", "adapter_conditioning_scale"),
        ("control_start", "controlnet", "control_guidance_start"),
        ("control_end", "controlnet", "control_guidance_end"),
    ):
        values = getattr(given, name)
        if values is None or part not in parts:
            continue
        if len(values) not in (1, len(parts)):
            raise InvalidArgumentError(
                f"--{name.replace('_', '-')} has {len(values)} numbers for {len(parts)} control networks: "
                "give one for all, or one for each"
            )
        values = values * len(parts) if len(values) == 1 else values
        options[option] = tuple(value for value, own in zip(values, parts, strict=True) if own == part)
    if given.control_end is not None and "adapter" in parts:
        options["adapter_conditioning_factor"] = given.control_end[-1]
    return options
