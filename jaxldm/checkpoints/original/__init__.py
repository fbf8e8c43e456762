"""Files in the layout of the code that a model was trained with, one module per family."""

from jaxldm.checkpoints.original.dit import (
    dit_from_diffusers,
    dit_to_diffusers,
    load_dit_file,
    save_dit_file,
)
from jaxldm.checkpoints.original.single_file import load_single_file, save_single_file
from jaxldm.checkpoints.original.taesd import load_taesd_files, save_taesd_files

__all__ = [
    "dit_from_diffusers",
    "dit_to_diffusers",
    "load_dit_file",
    "load_single_file",
    "load_taesd_files",
    "save_dit_file",
    "save_single_file",
    "save_taesd_files",
]
