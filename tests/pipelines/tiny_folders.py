"""Run folders without a training: the layout that `jaxldm.training` leaves, around random models."""

import json

from jaxldm import checkpoints
from jaxldm.training import RECIPES


def save_network(folder, network):
    checkpoints.save(folder, network.module, network.params)


def write_run(folder, pipe, *, finished=True):
    """A run folder of the smoke recipe with `pipe` in it; not `finished`, its last stage has no model yet."""
    recipe = RECIPES["smoke" if pipe.autoencoder is not None else "smoke-dit"].to_dict()
    folder.mkdir(parents=True)
    data = {"name": "mnist5k", "image_shape": list(pipe.image_shape()), "class_names": ["0", "1", "2"]}
    entries = {"format": 1, "recipe": recipe, "data": data, "versions": {"jaxldm": "0.1.0"}}
    (folder / "config.json").write_text(json.dumps(entries))
    if pipe.autoencoder is not None:
        save_network(folder / "autoencoder" / "model", pipe.autoencoder)
    if finished:
        save_network(folder / "diffusion" / "model", pipe.denoiser)
    return folder
