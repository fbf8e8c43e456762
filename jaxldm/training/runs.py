"""The run folder: where everything of one training run lies, and whether it may be written to.

    runs/NAME/config.json       recipe, data and versions
    runs/NAME/autoencoder/      a stage, and reconstructions.png
    runs/NAME/latents.npz       what the autoencoder made of the training images
    runs/NAME/diffusion/        a stage, and samples/step-*.png
    runs/NAME/classifier/       a stage, and metrics.json

A stage has checkpoints/, log.csv, loss.png, grad_norm.png, health.txt (not the classifier) and, when it is
finished, model/ (config.json and safetensors). That is renamed into place: it is there or it is not.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxldm import __version__
from jaxldm.data import Dataset
from jaxldm.errors import CheckpointError
from jaxldm.files import storage_errors, write_atomically
from jaxldm.training.recipes import Recipe

FORMAT = 1  # of config.json
STAGES = ("autoencoder", "diffusion", "classifier")


@dataclasses.dataclass(frozen=True)
class StageFolder:
    """One stage of a run."""

    path: Path

    @property
    def model(self) -> Path:
        """The finished network: `jaxldm.checkpoints.load` reads it."""
        return self.path / "model"

    @property
    def log(self) -> Path:
        """See `jaxldm.training.read_log`."""
        return self.path / "log.csv"

    @property
    def complete(self) -> bool:
        """Whether the finished network is there."""
        return self.model.is_dir()


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The places in a run folder; making one of these touches nothing."""

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", Path(self.path))

    @property
    def config(self) -> Path:
        """See `read_config`."""
        return self.path / "config.json"

    @property
    def latents(self) -> Path:
        """The cache of `jaxldm.training.diffusion.latent_columns`."""
        return self.path / "latents.npz"

    def stage(self, name: str) -> StageFolder:
        """`name` is one of `STAGES`."""
        return StageFolder(self.path / name)


def read_config(run_dir: Path | str) -> dict[str, Any]:
    """The entries of a run's config.json: `format`, `recipe`, `data` and `versions`.

    Raises `CheckpointError` when there is none, or it is damaged or of a newer version.
    """
    path = RunFolder(Path(run_dir)).config
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{run_dir} is no run folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): start a new run in another folder") from error
    if not isinstance(entries, dict) or entries.get("format") != FORMAT or "recipe" not in entries:
        raise CheckpointError(f"{path} is no config.json of a run, of the format {FORMAT} that is read here")
    return entries


def read_recipe(run_dir: Path | str) -> Recipe:
    """The recipe that a run began with. Raises `CheckpointError`."""
    return Recipe.from_dict(read_config(run_dir)["recipe"])


def open_run(
    run_dir: Path | str, recipe: Recipe, dataset: Dataset, *, resume: bool, say: Callable[[str], None] = print
) -> RunFolder:
    """Makes a new run folder, or, with `resume`, opens the one that is there.

    Raises `CheckpointError`, and changes nothing, for: a folder that already holds a run, without `resume`; a
    run of another recipe; a folder that holds other things; with `resume`, no folder at all. Raises
    `StorageError` when it cannot be made. A folder that is empty, because the run was killed before anything
    was saved, starts at the beginning.
    """
    run = RunFolder(Path(run_dir))
    if run.config.exists():
        if not resume:
            raise CheckpointError(
                f"{run.path} already holds a run: add --resume (resume=True) to go on with it, or choose "
                "another run folder to start a new one"
            )
        _check_same_recipe(run, read_config(run.path)["recipe"], recipe)
        return run
    if resume and not run.path.exists():
        raise CheckpointError(
            f"{run.path} does not exist, so there is nothing to resume: check the path, or leave --resume "
            "out to start a new run"
        )
    with storage_errors(run.path):
        others = [entry.name for entry in run.path.iterdir()] if run.path.exists() else []
        others = sorted(name for name in others if not name.startswith(".config.json"))
        if others:
            raise CheckpointError(
                f"{run.path} holds other things ({', '.join(others[:3])}) but no config.json of a run: use "
                "another run folder"
            )
        run.path.mkdir(parents=True, exist_ok=True)
    if resume:
        say(f"nothing was saved in {run.path} yet: starting at the beginning")
    data = {
        "name": dataset.name,
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
    }
    entries = {"format": FORMAT, "recipe": recipe.to_dict(), "data": data, "versions": versions()}
    write_atomically(run.config, (json.dumps(entries, indent=2) + "\n").encode())
    return run


def versions() -> dict[str, str]:
    """What a run was made with, for whoever wants to make it again."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "jaxldm": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _check_same_recipe(run: RunFolder, saved: Any, recipe: Recipe) -> None:
    there, given = _flat(Recipe.from_dict(saved).to_dict()), _flat(recipe.to_dict())
    differences = [
        f"{name} is {there.get(name, 'absent')!r} there and {given.get(name, 'absent')!r} here"
        for name in sorted({*there, *given})
        if there.get(name) != given.get(name)
    ]
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise CheckpointError(
            f"{run.path} holds a run of another recipe: {differences[0]}{more}; resume with the recipe it "
            "began with, or choose another run folder"
        )


def _flat(entries: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
