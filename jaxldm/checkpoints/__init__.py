"""Weights on disk: safetensors folders for the world, Orbax for a training run
(`checkpoints.training_store`).
"""

from jaxldm.checkpoints.folder import load, read_config, save
from jaxldm.checkpoints.names import from_state_dict, to_state_dict

__all__ = ["from_state_dict", "load", "read_config", "save", "to_state_dict"]
