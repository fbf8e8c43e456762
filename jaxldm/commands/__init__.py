"""The commands of `jaxldm`, one file each: a frozen dataclass of the options with a method `run`."""

from __future__ import annotations

import contextvars
import importlib

# name -> its line in `jaxldm --help`. A module is imported when its command is used.
COMMANDS = {
    "train": "Train a model from a recipe, or resume an interrupted training.",
    "distill": "Train a student that draws in few steps, from a trained model.",
    "sample": "Sample images from a model: a grid, one PNG per image and an .npz.",
    "eval": "Evaluate a trained model: class accuracy, Frechet distance, diversity, memorisation.",
    "serve": "Serve a model over HTTP: many requests share the steps of the network.",
    "inspect": "Show a model from the inside: attention, latents, checkpoints, as one HTML page.",
    "export": "Write a trained model as safetensors and JSON, in the layout of diffusers.",
    "quantize": "Write a model with its network in fewer bits: int8, fp8 or int4.",
    "prune": "Write a DiT with fewer attention heads and narrower MLPs, to be trained a little further.",
    "info": "Describe a run, an exported folder or a preset; without argument, list all names.",
}

# A word behind a command that makes it another one: jaxldm train finetune.
SUBCOMMANDS = {"train": ("finetune", "controlnet")}

# Modules that `--import` names in front of the command: suggested commands need them, too.
IMPORTED: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("imported", default=())


def load_command(name: str) -> type:
    """The dataclass of the command `name`: a key of `COMMANDS`, or one of `SUBCOMMANDS`."""
    module = importlib.import_module(f"jaxldm.commands.{name}")
    return getattr(module, name.capitalize())
