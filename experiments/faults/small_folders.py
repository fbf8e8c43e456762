"""Folders of models so small that they load at once, with weights of zeros: nothing is to be drawn."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxldm import checkpoints, models, pipelines, training
from jaxldm import diffusion as D
from jaxldm.pipelines import Network
from jaxldm.training.runs import FORMAT, RunFolder, save_classifier, save_denoiser

LETTERS = "abcdefghijklmnopqrstuvwxyz,!"


@functools.cache
def zeros(module: Any) -> Network:
    """A network with zeros in every tensor."""
    return Network(module, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), models.shapes(module)))


def class_pipeline() -> pipelines.Pipeline:
    """A DiT of three classes that draws 8x8x1 pixels."""
    small = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    module = models.build("tiny-dit", sample_size=8, in_channels=1, **small)
    return pipelines.class_to_image(zeros(module), D.epsilon(D.VP.named("linear")))


def write_run(folder: Path) -> Path:
    """A finished run, with a classifier, of the recipe smoke-dit."""
    pipe = class_pipeline()
    folder.mkdir(parents=True)
    recipe = training.RECIPES["smoke-dit"].to_dict()
    data = {"name": "mnist5k", "image_shape": [8, 8, 1], "class_names": ["0", "1", "2"]}
    entries = {"format": FORMAT, "recipe": recipe, "data": data, "versions": {}}
    (folder / "config.json").write_text(json.dumps(entries))
    classifier = models.build("digit-classifier", block_out_channels=(4, 4, 4), num_features=4, num_classes=3)
    save_classifier(RunFolder(folder), classifier, zeros(classifier).params)
    save_denoiser(RunFolder(folder), pipe.denoiser.module, pipe.denoiser.params, pipe.parts["scheduler"])
    return folder


def write_export(folder: Path) -> Path:
    """The same model, exported."""
    pipelines.save(class_pipeline(), folder)
    return folder


def write_texts(folder: Path) -> Path:
    """A model of the family Stable Diffusion that draws 16x16 pixels."""
    tokenizer, count = _tokenizer(folder.with_name(folder.name + "-tokenizer"))
    one = {"layers_per_block": 1, "norm_num_groups": 4, "block_out_channels": (8,)}
    parts = {
        "unet": models.UNet2DConditionConfig(
            sample_size=8,
            cross_attention_dim=16,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",),
            **one,
        ),
        "vae": models.AutoencoderKLConfig(
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **(one | {"block_out_channels": (4, 8)}),
        ),
        "text_encoder": models.CLIPTextConfig(
            vocab_size=count, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
    }
    networks = {name: zeros(models.from_config(config)) for name, config in parts.items()}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = betas | {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
    family = pipelines.PIPELINES["StableDiffusionPipeline"]
    pipelines.save(
        pipelines.Pipeline(family, networks | {"tokenizer": tokenizer, "scheduler": scheduler}), folder
    )
    return folder


def _tokenizer(folder: Path) -> tuple[Any, int]:
    """A CLIP tokenizer of letters."""
    folder.mkdir(parents=True)
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": words[-1]}
    entries = special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))
    return checkpoints.load_tokenizer(folder), len(words)
