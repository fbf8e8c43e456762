"""A model as a folder that other programs open: config.json and diffusion_pytorch_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import flax.linen as nn
import numpy as np

from jaxldm import models
from jaxldm.checkpoints.names import from_state_dict, to_state_dict
from jaxldm.checkpoints.safetensors_file import read_safetensors, safetensors_bytes
from jaxldm.checkpoints.storage import storage_errors, write_together
from jaxldm.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def save(folder: Path | str, module: nn.Module, params: dict) -> None:
    """Writes a model's config and weights so that `load`, and for published architectures diffusers, open it.

    Bit for bit; both files are whole under temporary names before either takes its place, so a failure leaves
    an earlier model in that folder as it was.

    Args:
      params: the nested dictionary inside `{"params": ...}`, in whatever dtype it has.

    Raises:
      StorageError: disk full, no permission, a file where the folder should be.
    """
    folder = Path(folder)
    config = models.config_to_dict(module.config)
    content = {
        folder / WEIGHTS_FILE: safetensors_bytes(to_state_dict(params) | dict(_constants(module))),
        folder / CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_together(content)


def load(folder: Path | str) -> tuple[nn.Module, dict]:
    """Opens a model folder that `save` or diffusers wrote: (module, its float32 parameters).

    Raises:
      CheckpointError: the folder, a file or a tensor is missing, damaged, left over or of another shape, or
        the config asks for something that is not supported. The message names it.
    """
    folder = Path(folder)
    module = models.from_config(models.config_from_dict(read_config(folder)))
    state = read_safetensors(folder / WEIGHTS_FILE)
    for name, table in _constants(module).items():
        if name in state and state[name].shape != table.shape:
            shapes = f"{state[name].shape} in the file, {table.shape} in the model"
            raise CheckpointError(f"the weights do not fit the model: {name} is {shapes}")
        state.pop(name, None)
    try:
        return module, from_state_dict(state, models.shapes(module))
    except CheckpointError as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: {error}") from error


def read_config(folder: Path | str) -> dict:
    """The entries of a model folder's config.json.

    Raises:
      CheckpointError: no such folder, no config.json in it, or not JSON.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.parent.is_dir():
        raise CheckpointError(f"there is no model folder {path.parent}")
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {CONFIG_FILE}: it is not a model folder, or saving was interrupted"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return config


def _constants(module: nn.Module) -> dict[str, np.ndarray]:
    """Tensors that published checkpoints of this architecture hold although nobody trains them."""
    return dict(module.constant_tensors()) if hasattr(module, "constant_tensors") else {}
