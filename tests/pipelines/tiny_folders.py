"""Run folders without a training: the layout that `jaxldm.training` leaves, around random models."""

import json

from jaxldm.training import RECIPES
from jaxldm.training.runs import FORMAT, MASKGIT_CLASS, RunFolder, save_autoencoder, save_denoiser


def write_run(folder, pipe, *, finished=True):
    """A run folder of the smoke recipe with `pipe` in it; not `finished`, its last stage has no model yet."""
    recipe = RECIPES["smoke" if pipe.autoencoder is not None else "smoke-dit"].to_dict()
    folder.mkdir(parents=True)
    data = {"name": "mnist5k", "image_shape": list(pipe.image_shape()), "class_names": ["0", "1", "2"]}
    entries = {"format": FORMAT, "recipe": recipe, "data": data, "versions": {"jaxldm": "0.2.0"}}
    (folder / "config.json").write_text(json.dumps(entries))
    if pipe.autoencoder is not None:
        save_autoencoder(RunFolder(folder), pipe.autoencoder.module, pipe.autoencoder.params)
    if finished:
        denoiser = pipe.denoiser
        save_denoiser(RunFolder(folder), denoiser.module, denoiser.params, pipe.parts["scheduler"])
    return folder


def write_masked_run(folder, pipe):
    """A finished run folder of the recipe smoke-masked around a pipeline of masked tokens."""
    folder.mkdir(parents=True)
    data = {
        "name": "mnist5k",
        "image_shape": list(pipe.image_shape()),
        "class_names": [str(label) for label in range(pipe.num_classes)],
    }
    recipe = RECIPES["smoke-masked"].to_dict()
    entries = {"format": FORMAT, "recipe": recipe, "data": data, "versions": {"jaxldm": "0.2.0"}}
    (folder / "config.json").write_text(json.dumps(entries))
    network = pipe.transformer
    save_denoiser(
        RunFolder(folder), network.module, network.params, pipe.parts["scheduler"], class_name=MASKGIT_CLASS
    )
    return folder
