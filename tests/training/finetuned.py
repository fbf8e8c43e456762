"""What the tests of fine-tuning share: pictures with captions, and a run of a few updates."""

import numpy as np
from PIL import Image
from tiny_models import TEXT_UNET, random_params, text_parts

from jaxldm import models, pipelines, training
from jaxldm.pipelines.families import STABLE_DIFFUSION

FEW = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2, "save_every": 1, "sample_every": 0}
FEW |= {"warmup_epochs": 0.0}


def write_model(root):
    """The folder of a random model of Stable Diffusion's kind, of pictures of 16x16."""
    parts = text_parts(root / "tokenizer")
    unet = models.from_config(models.UNet2DConditionConfig(**TEXT_UNET | {"up_block_types": ("UpBlock2D",)}))
    parts["unet"] = pipelines.Network(unet, random_params(unet))
    pipelines.save(pipelines.Pipeline(STABLE_DIFFUSION, parts), root / "sd")
    return root / "sd"


def write_pictures(folder, size=16, caption="a {} cat"):
    """Four random pictures with captions: fewer than are needed to train from the beginning."""
    folder.mkdir()
    for n in range(4):
        pixels = np.random.default_rng(n).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(caption.format(["red", "blue", "dark", "tall"][n]))
    return folder


def tuned(source, pictures, run_dir, method, **options):
    """The run of a fine-tuning of four updates."""
    recipe = training.finetune_recipe(source, pictures, method, **{**FEW, **options})
    return training.train(recipe, run_dir, devices=1, log=lambda line: None, bar=False)


def names_of(pipe):
    """The names of all tensors."""
    return {row.name for row in pipelines.compare(pipe, pipe)}


def changed(first, second):
    """The names of the tensors that differ."""
    return {row.name for row in pipelines.compare(first, second) if row.difference}
