"""Trained runs as the experiments use them: the pipeline, its classifier, its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxldm import checkpoints, data, metrics, pipelines, training
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.metrics.evaluate import Classify


def load_classifier(run_dir: Path) -> Classify:
    """The classifier of a run: images -> (features, logits)."""
    folder = training.RunFolder(run_dir).stage("classifier").model
    return metrics.classifier_function(*checkpoints.load(folder))


def check_demo(run_dir: Path) -> None:
    """Raises `InvalidArgumentError` unless there is a run, with how to make it."""
    if not (run_dir / "config.json").exists():
        raise InvalidArgumentError(
            f"{run_dir} is no run: `make demo` makes runs/mini-ldm, or name another with --run-dir"
        )


def load_run(run_dir: Path, recipe: str) -> Any:
    """The pipeline of a finished run. Raises `CheckpointError`, of no run with how to make it."""
    if not run_dir.exists():
        raise CheckpointError(
            f"{run_dir} does not exist: make it with `jaxldm train {recipe} --run-dir {run_dir}`, or give "
            "another run"
        )
    return pipelines.load(run_dir)


def weights_hash(run_dir: Path) -> str:
    """The SHA-256 of the trained networks of a run."""
    run = training.RunFolder(run_dir)
    folders = [run.stage(name).model for name in training.STAGES]
    return checkpoints.hash_of_files(
        file for folder in folders for file in sorted(folder.glob("*.safetensors"))
    )


def load_dataset(run_dir: Path) -> data.Dataset:
    """The data that a run was trained on."""
    recipe = training.read_recipe(run_dir)
    return recipe.load_data()


def load_latent_model(run_dir: Path) -> Any:
    """The pipeline of a run. Raises `InvalidArgumentError` unless it has an autoencoder and classes."""
    pipe = pipelines.load(run_dir)
    if pipe.autoencoder is None or pipe.num_classes is None:
        raise InvalidArgumentError(f"{run_dir} must have an autoencoder and classes: `make demo` trains one")
    return pipe
