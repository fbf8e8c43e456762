"""DiT and SiT in their original layout: plain files, and conversion from and to the layout of diffusers.

The authors publish pickled state dicts; this module reads them as safetensors. A file holds no config: widths
and depths follow from its shapes. DiT and SiT have the same tensors, so the caller names the architecture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from jaxldm import models
from jaxldm.arguments import a_dtype, a_params, a_path, checked, choice, instance, optional
from jaxldm.arguments import count as a_count
from jaxldm.checkpoints.folder import a_model, check_stored
from jaxldm.checkpoints.names import Placement, a_placement, from_state_dict, published, to_state_dict
from jaxldm.checkpoints.original.layout import (
    Place,
    Shapes,
    Table,
    count,
    from_original,
    places,
    rows,
    to_original,
)
from jaxldm.checkpoints.safetensors_file import Tensor, open_safetensors, safetensors_chunks
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.files import write_atomically
from jaxldm.models.quantization import refuse_quantized
from jaxldm.reading import named, reading

ARCHITECTURES = {"DiT": models.DiTConfig, "SiT": models.SiTConfig}
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published widths, S to XL
_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
}


@checked(
    path=a_path,
    architecture=choice("architecture", ARCHITECTURES),
    num_heads=optional(a_count(1)),
    dtype=optional(a_dtype),
    sharding=optional(a_placement),
)
def load_dit_file(
    path: Path | str,
    architecture: str = "DiT",
    *,
    num_heads: int | None = None,
    dtype: str | None = None,
    sharding: Placement = None,
) -> tuple[nn.Module, dict]:
    """(module, parameters) of an original DiT or SiT: its plain state dict as a .safetensors file.

    Args:
        path: a .safetensors file.
        architecture: "DiT" or "SiT".
        num_heads: needed for widths other than the published ones.
        dtype: "float32", "bfloat16" or "float16", for parameters and computation; None is float32 for both.
        sharding: as in `load`.

    Raises:
        CheckpointError: no such file, a pickle file, or tensors that are missing, left over or of other
            shapes.
        InvalidArgumentError: an unpublished width without `num_heads`.
        UnknownNameError: another architecture or dtype.

    >>> from jaxldm import checkpoints                                                       # doctest: +SKIP
    >>> module, params = checkpoints.load_dit_file("SiT-XL-2-256.safetensors", "SiT")        # doctest: +SKIP
    """
    path = Path(path)
    kind = ARCHITECTURES[architecture]
    stored: Mapping[str, Tensor] = open_safetensors(path).tensors
    with reading(path):
        try:
            config = dit_config(
                {name: tuple(tensor.shape) for name, tensor in stored.items()}, kind, num_heads
            )
        except KeyError as error:
            raise CheckpointError(
                f"{path} is not an original file of DiT or SiT: it has no tensor {error.args[0]}"
            ) from error
        config = dataclasses.replace(config, dtype=dtype or "float32")
        check_stored(config, stored)
        module: Any = models.from_config(config)
        _check_positions(stored.get("pos_embed"), module)
        shapes = models.shapes(module)
    state = {name: tensor for name, tensor in stored.items() if name != "pos_embed"}
    try:
        return module, from_state_dict(state, shapes, dtype=dtype, sharding=sharding)
    except CheckpointError as error:
        raise CheckpointError(named(path, str(error))) from error


@checked(path=a_path, module=a_model, params=a_params)
def save_dit_file(path: Path | str, module: Any, params: dict) -> None:
    """Writes a DiT or SiT as the authors' code loads it (`safetensors.torch.load_file`), bit for bit.

    Raises:
        InvalidArgumentError: a network of another architecture, or a quantised one.
        StorageError: disk full, no permission, ...
    """
    if type(module.config) not in ARCHITECTURES.values():
        raise InvalidArgumentError(
            f"{models.class_name(module.config)} is not in the original layout: convert a "
            "DiTTransformer2DModel with checkpoints.dit_from_diffusers first"
        )
    refuse_quantized(params, "an original file")
    tensors = published(params) | dict(module.constant_tensors())
    write_atomically(path, safetensors_chunks(tensors))


def dit_config(
    shapes: Shapes, kind: type[models.DiTConfig] = models.DiTConfig, num_heads: int | None = None
) -> models.DiTConfig:
    """The config for tensors of these shapes, by original name.

    Raises:
        KeyError: a tensor is missing; names it.
        InvalidArgumentError: an unpublished width without `num_heads`, or shapes of no model.
    """
    hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
    tokens, outputs = shapes["pos_embed"][1], shapes["final_layer.linear.weight"][0]
    side = math.isqrt(tokens)
    if num_heads is None and hidden not in HEADS:
        known = ", ".join(map(str, HEADS))
        raise InvalidArgumentError(
            f"the file does not hold the number of heads, which is known only for the widths {known} and not "
            f"for {hidden}: give num_heads=..."
        )
    classes = shapes.get("y_embedder.embedding_table.weight")
    return kind(
        sample_size=side * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=count(shapes, r"blocks\.(\d+)\."),
        num_heads=num_heads or HEADS[hidden],
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / hidden,
        num_classes=None if classes is None else classes[0] - 1,
        learn_sigma=outputs == 2 * channels * patch**2,
        frequency_embedding_size=shapes["t_embedder.mlp.0.weight"][1],
        scan=True,
    )


@checked(
    module=instance(models.DiTTransformer2DModel, "a models.DiTTransformer2DModel"),
    params=a_params,
    freq_shift=a_count(0, 1),
)
def dit_from_diffusers(
    module: models.DiTTransformer2DModel, params: Mapping, *, freq_shift: int = 0
) -> tuple[models.DiT, dict]:
    """Converts a `DiTTransformer2DModel` to the original layout.

    diffusers repeats the embedders in each block, the original has them once. `norm_eps` of the config is
    used in both norms of a block; diffusers uses it in one, and 1e-6 in the other.

    Args:
        module: the model in the layout of diffusers.
        params: its parameters.
        freq_shift: 0: the frequencies of the timestep embedding that the original, and so the published
            weights, were trained with. 1: those of diffusers, for the same outputs as diffusers.

    Raises:
        CheckpointError: embedders that differ from block to block.
        InvalidArgumentError: attention without biases, another activation, or an odd number of outputs, which
            the original does not have.
    """
    config = module.config
    outputs = config.out_channels or config.in_channels
    fits = config.attention_bias and config.activation_fn == "gelu-approximate"
    if not fits or outputs not in (config.in_channels, 2 * config.in_channels):
        raise InvalidArgumentError(
            "the original DiT has biases in its attention, the tanh form of GELU and once or twice as many "
            f"outputs as inputs; this one has attention_bias={config.attention_bias}, activation_fn="
            f"{config.activation_fn!r}, {outputs} outputs and {config.in_channels} inputs"
        )
    original = models.DiT(
        models.DiTConfig(
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            hidden_size=config.hidden_size,
            depth=config.num_layers,
            num_heads=config.num_attention_heads,
            num_classes=config.num_classes,
            learn_sigma=outputs != config.in_channels,
            freq_shift=freq_shift,
            norm_eps=config.norm_eps,
            dtype=config.dtype,
            scan=config.scan,
            remat=config.remat,
        )
    )
    state = to_state_dict(params)
    _check_embedders(state, config.num_layers)
    return original, _as_params(to_original(state, _table(config.num_layers)), original, params)


@checked(module=instance(models.DiT, "a models.DiT"), params=a_params)
def dit_to_diffusers(module: models.DiT, params: Mapping) -> tuple[models.DiTTransformer2DModel, dict]:
    """Converts a `DiT` to the layout of diffusers: the inverse of `dit_from_diffusers`.

    diffusers then uses its own frequencies in the timestep embedding, see `DiTTransformer2DModel`.

    Raises:
        InvalidArgumentError: a model without classes, for rectangles, with learned positions or widths of the
            MLP or the sinusoids that diffusers does not have.
    """
    config: Any = module.config
    fits = (
        type(config) is models.DiTConfig
        and config.num_classes is not None
        and isinstance(config.sample_size, int)
        and config.position_embedding == "sincos"
        and not config.scalar_inputs
        and (config.mlp_ratio, config.frequency_embedding_size, config.dropout) == (4.0, 256, 0.0)
    )
    if not fits:
        raise InvalidArgumentError(
            "diffusers has DiTs with classes only, for squares, with sin-cos positions, mlp_ratio 4, "
            f"frequency_embedding_size 256, without dropout and scalar inputs; this one is {config}"
        )
    theirs = models.DiTTransformer2DModel(
        models.DiTTransformer2DConfig(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=config.sample_size,  # pyright: ignore[reportArgumentType]
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes,  # pyright: ignore[reportArgumentType]
            norm_eps=config.norm_eps,
            dtype=config.dtype,
            scan=config.scan,
            remat=config.remat,
        )
    )
    names = published(models.shapes(theirs))
    state = from_original(to_state_dict(params), names, _table(config.depth))
    return theirs, _as_params(state, theirs, params)


def _table(layers: int) -> Table:
    """Names of diffusers -> original names; the embedders of all blocks share one place."""
    modules = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    parts: dict[str, Place] = {}
    for layer in range(layers):
        ours, theirs = f"transformer_blocks.{layer}", f"blocks.{layer}"
        modules |= {f"{ours}.norm1.emb.{name}": place for name, place in _EMBEDDERS.items()}
        modules |= {
            f"{ours}.norm1.emb.class_embedder": "y_embedder",
            f"{ours}.norm1.linear": f"{theirs}.adaLN_modulation.1",
            f"{ours}.attn1.to_out.0": f"{theirs}.attn.proj",
            f"{ours}.ff.net.0.proj": f"{theirs}.mlp.fc1",
            f"{ours}.ff.net.2": f"{theirs}.mlp.fc2",
        }
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            for leaf in ("weight", "bias"):
                parts[f"{ours}.attn1.{name}.{leaf}"] = Place(f"{theirs}.attn.qkv.{leaf}", rows(part))
    return places(modules) | parts


def _check_embedders(state: Mapping[str, np.ndarray], layers: int) -> None:
    first = "transformer_blocks.0.norm1.emb."
    for name in [name for name in state if name.startswith(first)]:
        for layer in range(1, layers):
            other = name.replace(".0.", f".{layer}.", 1)
            if state[name].tobytes() != state[other].tobytes():
                raise CheckpointError(
                    f"{other} differs from {name}: the original DiT has one embedder for all blocks, so this "
                    "model, trained with one for each, has no such layout"
                )


def _check_positions(positions: Tensor | None, module: models.DiT) -> None:
    table = module.constant_tensors()["pos_embed"]
    fits = positions is not None and tuple(positions.shape) == table.shape
    if not fits or not np.abs(np.asarray(positions, np.float32) - table).max() <= 1e-2:
        raise CheckpointError(
            "pos_embed is not the sin-cos table of DiT: learned positions are not supported"
        )


def _as_params(state: Mapping[str, Tensor], module: nn.Module, like: Mapping) -> dict:
    """The parameters of a module from published tensors, in the dtype of other parameters."""
    dtype = {str(leaf.dtype) for leaf in _leaves(like)}
    return from_state_dict(state, models.shapes(module), dtype=dtype.pop() if len(dtype) == 1 else None)


def _leaves(params: Mapping) -> list:
    return [tensor.value for tensor in published(params).values()]
