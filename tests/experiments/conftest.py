"""Run folders of the smoke recipes around random networks: no training, and nothing starts at zero."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxldm import data, models, schedulers, training
from jaxldm.training.autoencoder import build_autoencoder
from jaxldm.training.classifier import build_classifier
from jaxldm.training.diffusion import build_denoiser
from jaxldm.training.masked_tokens import build_masked_model
from jaxldm.training.runs import (
    FORMAT,
    MASKGIT_CLASS,
    RunFolder,
    save_autoencoder,
    save_classifier,
    save_denoiser,
)

SHAPE, CLASSES = (28, 28, 1), 10


def random_params(module, seed):
    """Normal numbers in every tensor: zero-initialised layers would make every answer 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: (0.1 * rng.standard_normal(spec.shape)).astype(spec.dtype), models.shapes(module)
    )


def few_digits(name, load=data.load, **options):
    """The data set with an eighth of its digits."""
    dataset = load(name, **options)
    parts = {
        split: dataclasses.replace(rows, records=rows.records[::8]) for split, rows in dataset.parts.items()
    }
    return dataclasses.replace(dataset, parts=parts)


@pytest.fixture
def random_run(tmp_path, monkeypatch):
    """(name of a smoke recipe) -> a folder laid out as a finished run of it; the data set is small, too."""
    monkeypatch.setattr(data, "load", few_digits)

    def make(name):
        recipe, folder = training.RECIPES[name], tmp_path / name
        build = build_denoiser if recipe.masked_tokens is None else build_masked_model
        modules = {
            "diffusion": build(recipe, SHAPE, CLASSES),
            "classifier": build_classifier(recipe, SHAPE, CLASSES),
        }
        if recipe.autoencoder is not None:
            modules["autoencoder"] = build_autoencoder(recipe, SHAPE)
        run = RunFolder(folder)
        numbered = {
            stage: (module, random_params(module, seed))
            for seed, (stage, module) in enumerate(modules.items())
        }
        folder.mkdir()
        if "autoencoder" in numbered:
            save_autoencoder(run, *numbered["autoencoder"])
        if recipe.masked_tokens is None:
            save_denoiser(run, *numbered["diffusion"], schedulers.to_config(recipe.diffusion.prediction))
        else:
            scheduler = schedulers.masked_tokens_config(modules["diffusion"].config.mask_token)
            save_denoiser(run, *numbered["diffusion"], scheduler, class_name=MASKGIT_CLASS)
        save_classifier(run, *numbered["classifier"])
        data = {"name": "mnist5k", "image_shape": SHAPE, "class_names": [str(k) for k in range(CLASSES)]}
        config = {"format": FORMAT, "recipe": recipe.to_dict(), "data": data, "versions": {}}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
