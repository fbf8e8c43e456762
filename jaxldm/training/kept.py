"""The networks of the checkpoints that a run keeps, to look at or to measure: the run is not changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from flax import traverse_util

from jaxldm.arguments import a_path, checked, choice, count
from jaxldm.errors import CheckpointError
from jaxldm.training.runs import STAGES, RunFolder
from jaxldm.training.store import TrainingStore

A_STAGE = choice("stage", STAGES)


class KeptParams(NamedTuple):
    """The parameters of one checkpoint: their average where the run, or its optimizer, keeps one."""

    step: int
    params: Any


@checked(run_dir=a_path, stage=A_STAGE)
def kept_steps(run_dir: Path | str, stage: str = "diffusion") -> list[int]:
    """The steps whose checkpoints a run keeps, oldest first: see `keep_checkpoints` of a recipe."""
    return TrainingStore(RunFolder(Path(run_dir)).stage(stage).path / "checkpoints").steps()


@checked(run_dir=a_path, step=count(0), stage=A_STAGE)
def read_kept(run_dir: Path | str, step: int, stage: str = "diffusion") -> KeptParams:
    """The network of one checkpoint, on the host. Raises `CheckpointError` for one that is damaged."""
    store = TrainingStore(RunFolder(Path(run_dir)).stage(stage).path / "checkpoints")
    arrays = store.read(step)
    params, averages, z = (_below(arrays, name) for name in ("params/", "ema_params/", "opt_state/z/"))
    if not params:
        raise CheckpointError(f"the checkpoint {store.folder / str(step)} has no parameters")
    if z:  # of schedule-free AdamW, see `optax.contrib.schedule_free_eval_params`
        b1 = arrays["opt_state/b1"]
        params = {path: (y - (1 - b1) * z[path]) / b1 for path, y in params.items()}
    return KeptParams(step, traverse_util.unflatten_dict(params | averages, sep="/"))


def _below(arrays: dict[str, Any], name: str) -> dict[str, Any]:
    """The arrays whose paths begin with a name, by the rest of them."""
    return {path.removeprefix(name): array for path, array in arrays.items() if path.startswith(name)}
