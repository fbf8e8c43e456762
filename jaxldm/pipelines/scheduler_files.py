"""Scheduler files of a folder, looked at before its weights are read: what no call could use is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import flax.linen as nn

from jaxldm import checkpoints, models, schedulers
from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, InvalidArgumentError, JaxldmError
from jaxldm.reading import reading
from jaxldm.schedulers import Scheduler

# Published networks that number their timesteps, also where a file has use_flow_sigmas.
_OF_TIMESTEPS = ("UNet2DConditionModel", "PixArtTransformer2DModel")
# Solvers to name instead of one that is refused: of any model, and not of distilled ones alone.
_INSTEAD = [
    solver for solver, name in schedulers.SCHEDULER_OF.items() if schedulers.SCHEDULERS[name].rows != "lcm"
]


def check_schedulers(
    folder: Path, family: Any, named: Mapping[str, tuple[str, str]], *, reference_quirks: bool = False
) -> dict[str, str]:
    """Look at the scheduler files of a folder whose family reads them with `schedulers.from_config`.

    Args:
        folder: of a pipeline.
        family: a `Family`.
        named: the components, from `checkpoints.read_model_index`.
        reference_quirks: as in `load`.

    Returns:
        part -> why the solver that its file names is refused, where a call that names another one draws.

    Raises:
        CheckpointError: a file that no call could use, or a scheduler that counts time as the network does
            not.
    """
    refused: dict[str, str] = {}
    if "mask_token" in family.methods:
        return refused  # `check_mask_token` reads the file
    for name in (*family.folder.parts, *family.folder.optional):
        if name not in named or not name.endswith("scheduler"):
            continue
        config = cast(Mapping[str, Any], checkpoints.load_components(folder, only=[name])[name])
        with reading(folder / name):
            _check_path_known(config)
            scheduler, why = _read(config, reference_quirks=reference_quirks)
        if why is not None:
            refused[name] = why
        denoiser = next((part for part in family.denoisers if part in named), None)
        if name == "scheduler" and denoiser is not None:
            try:
                check_time(checkpoints.module_in(folder / denoiser), config, scheduler.path)
            except InvalidArgumentError as error:
                raise CheckpointError(f"{folder / name}: {error}") from error
    return refused


def _read(config: Any, *, reference_quirks: bool) -> tuple[Scheduler, str | None]:
    """(the scheduler, None); or with another solver where its own is refused (that scheduler, why)."""
    try:
        return schedulers.from_config(config, reference_quirks=reference_quirks), None
    except JaxldmError as error:
        for solver in _INSTEAD:
            with contextlib.suppress(JaxldmError):  # the next one may do; if none does, the first error is it
                other = schedulers.from_config(config, solver, reference_quirks=reference_quirks)
                return other, str(error)
        raise CheckpointError(str(error)) from error


def _check_path_known(config: Any) -> None:
    """Refuse a path of one's own whose module is not imported, before it looks like a damaged folder."""
    path = config.get("path") if isinstance(config, Mapping) else None
    if isinstance(path, Mapping) and ":" in str(path.get("type")):
        D.path_from_dict(path)


def check_time(module: nn.Module, config: Mapping[str, Any], path: D.Path) -> None:
    """Refuse a scheduler that counts time as the network does not.

    Args:
        module: the denoising network.
        config: the scheduler's file.
        path: that it describes.

    Raises:
        InvalidArgumentError: with what to take instead.
    """
    network, counts = type(module).__name__, models.convention(module)
    if counts.continuous and path.t_noisy > 1:
        raise InvalidArgumentError(
            f"{network} was trained with t from 0 to 1, and the scheduler is of a {path.name} path up to "
            f"{path.t_noisy:g}: take one of flow matching, or use_flow_sigmas"
        )
    if counts.continuous and config.get("_class_name") == "IPNDMScheduler":
        raise InvalidArgumentError(
            f"IPNDMScheduler is of the path alpha = cos(pi t / 2), and {network} was trained on another: "
            "take one of flow matching, with solver='ipndm' for its steps"
        )
    if network in _OF_TIMESTEPS and config.get("use_flow_sigmas"):
        raise InvalidArgumentError(
            f"the scheduler has use_flow_sigmas, but {network} was trained with timesteps: leave it out"
        )
