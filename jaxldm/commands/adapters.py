"""Adapters of --lora that are students of few steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxldm.errors import InvalidArgumentError


def check_adapter_guidance(files: Sequence[str], guidance_scale: float | None) -> None:
    """Refuse guidance on top of that inside of an adapter, by what its run says of how it draws.

    Args:
        files: of --lora: a file, or the folder of a run or an export that has one.
        guidance_scale: of the call; None: the default of the model, which guides.

    Raises:
        InvalidArgumentError: an adapter with guidance inside, and another scale than 1.
        CheckpointError: a model_index.json that cannot be read.
    """
    from jaxldm.checkpoints.pipeline_folder import INDEX_FILE
    from jaxldm.pipelines.few_steps import read_few_steps
    from jaxldm.reading import read_json

    for file in files:
        path = Path(file)
        index = (path if path.is_dir() else path.parent) / INDEX_FILE
        few = read_few_steps(read_json(index)) if index.is_file() else None
        if few is None or few.guidance != "inside" or few.guidance_scale[0] == 1 or guidance_scale == 1:
            continue
        raise InvalidArgumentError(
            f"guidance of scale {few.guidance_scale[0]:g} is inside the adapter of {file}, and more on top "
            f"would double it: give --guidance-scale 1, and --solver {few.solver}"
        )
