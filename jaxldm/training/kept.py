"""The networks of the checkpoints that a run keeps, to look at or to measure: the run is not changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from jaxldm.arguments import a_path, checked, choice, count, optional
from jaxldm.errors import CheckpointError
from jaxldm.reading import shortened
from jaxldm.training.power_ema import A_LENGTH, gamma_of, profile_weights
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
    """The network of one checkpoint, on the host.

    Raises `CheckpointError` for one that is damaged, or not there.
    """
    store, kept = _store_of(run_dir, stage)
    _check_kept(store, step, kept)
    arrays = store.read(step)
    params, averages, z = (_below(arrays, name) for name in ("params/", "ema_params/", "opt_state/z/"))
    if not params:
        raise CheckpointError(f"the checkpoint {store.folder / str(step)} has no parameters")
    if z:  # of schedule-free AdamW, see `optax.contrib.schedule_free_eval_params`
        b1 = arrays["opt_state/b1"]
        params = {path: (y - (1 - b1) * z[path]) / b1 for path, y in params.items()}
    return KeptParams(step, traverse_util.unflatten_dict(params | averages, sep="/"))


def _store_of(run_dir: Path | str, stage: str) -> tuple[TrainingStore, list[int]]:
    """The checkpoints of a stage, and the steps that are there."""
    store = TrainingStore(RunFolder(Path(run_dir)).stage(stage).path / "checkpoints")
    return store, list(store.steps())


def _check_kept(store: TrainingStore, step: int, kept: list[int]) -> None:
    if step not in kept:
        there = shortened(str(kept), 200) if kept else "none"
        raise CheckpointError(f"{store.folder} has no checkpoint of step {step}: it has {there}")


def _below(arrays: dict[str, Any], name: str) -> dict[str, Any]:
    """The arrays whose paths begin with a name, by the rest of them."""
    return {path.removeprefix(name): array for path, array in arrays.items() if path.startswith(name)}


@checked(run_dir=a_path, relative_length=A_LENGTH, step=optional(count(1)), stage=A_STAGE)
def post_hoc_ema(
    run_dir: Path | str, relative_length: float, *, step: int | None = None, stage: str = "diffusion"
) -> KeptParams:
    """The moving average of any length, from the checkpoints of a run that keeps power-function averages.

    Its recipe has `power_ema=(0.05, 0.1)`, and a `keep_checkpoints` of ten or more, with `save_every`.

    Args:
        run_dir: of the run, which is not changed.
        relative_length: the standard deviation of its weights as a share of the training, in (0, 0.288).
        step: after so many updates, one of `kept_steps`; None: the last.
        stage: of the recipe.

    Raises:
        CheckpointError: no such checkpoint, or none with such averages.
    """
    store, kept = _store_of(run_dir, stage)
    last = step if step is not None else (kept[-1] if kept else 0)
    _check_kept(store, last, kept)
    found: list[tuple[int, float, Mapping[str, Any]]] = []
    for one in (each for each in kept if each <= last):
        averages: dict[str, dict[str, Any]] = {}
        for path, array in store.read(one).items():
            if path.startswith("averages/"):
                _, length, name = path.split("/", 2)
                averages.setdefault(length, {})[name] = array
        found += [(one, gamma_of(float(length)), arrays) for length, arrays in averages.items()]
    if not found:
        raise CheckpointError(
            f"the checkpoints in {store.folder} hold no power-function averages: train with "
            "power_ema=(0.05, 0.1) in the recipe"
        )
    steps, gammas, trees = zip(*found, strict=True)
    weights = profile_weights(steps, gammas, last, gamma_of(relative_length))
    total = {
        name: sum(weight * tree[name].astype(np.float64) for weight, tree in zip(weights, trees, strict=True))
        for name in trees[0]
    }
    params = {name: np.asarray(array, trees[0][name].dtype) for name, array in total.items()}
    return KeptParams(last, traverse_util.unflatten_dict(params, sep="/"))
