"""The commands of `jaxldm`, one file each: a frozen dataclass whose fields are the options and whose `run`
does it.
"""

from __future__ import annotations

import importlib

# name -> what `jaxldm --help` says of it. The modules are imported only when their command is typed.
COMMANDS = {
    "train": "Train a model from a recipe, or go on with a training that was interrupted.",
    "sample": "Draw images with a trained model: a grid, one PNG per image and an .npz.",
    "eval": "Measure a trained model: class accuracy, Frechet distance, diversity, memorisation.",
    "export": "Write a trained model as safetensors and JSON, in a layout that other programs read.",
    "info": "Say what a run, an exported folder or a preset is; alone, list all there is.",
}


def load_command(name: str) -> type:
    """The dataclass of the command `name`, a key of `COMMANDS`."""
    module = importlib.import_module(f"jaxldm.commands.{name}")
    return getattr(module, name.capitalize())
