"""DiT and SiT in their original layout: one plain file, or the layout of diffusers turned into it and back.

The authors publish pickled state dicts; as safetensors they are read here. A file holds no config: widths
and depths are read off its shapes. DiT and SiT have the same tensors, so which of them it is must be said.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import numpy as np

from jaxldm import models
from jaxldm.checkpoints.names import Placement, from_state_dict, published, to_state_dict
from jaxldm.checkpoints.safetensors_file import Tensor, open_safetensors, safetensors_chunks
from jaxldm.checkpoints.single_file_configs import Shapes, count
from jaxldm.checkpoints.single_file_names import Original, Table, from_original, to_original
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.files import storage_errors, write_together

ARCHITECTURES = {"DiT": models.DiTConfig, "SiT": models.SiTConfig}
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published widths, S to XL
_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
}


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
      architecture: "DiT" or "SiT".
      num_heads: of another width than the published ones, whose heads are known.
      dtype: "float32", "bfloat16" or "float16", for parameters and computation; None is float32 for both.
      sharding: as in `load`.

    Raises:
      CheckpointError: no such file, a pickle file, or tensors that are missing, left over or of other shapes.
      InvalidArgumentError: a width whose number of heads nobody said.
      UnknownNameError: another architecture or dtype.

    >>> from jaxldm import checkpoints                                                       # doctest: +SKIP
    >>> module, params = checkpoints.load_dit_file("SiT-XL-2-256.safetensors", "SiT")        # doctest: +SKIP
    """
    path = Path(path)
    kind = ARCHITECTURES[one_of("architecture", architecture, ARCHITECTURES)]
    if dtype is not None:
        models.compute_dtype(dtype)
    state: Mapping[str, Tensor] = open_safetensors(path).tensors
    try:
        config = dit_config({name: tuple(tensor.shape) for name, tensor in state.items()}, kind, num_heads)
    except KeyError as error:
        raise CheckpointError(
            f"{path} is no original file of DiT or SiT: it has no tensor {error.args[0]}"
        ) from error
    config = dataclasses.replace(config, dtype=dtype or "float32")
    module = models.from_config(config)
    positions = state.get("pos_embed")
    state = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
    try:
        _check_positions(positions, module)
        return module, from_state_dict(state, models.shapes(module), dtype=dtype, sharding=sharding)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def save_dit_file(path: Path | str, module: nn.Module, params: dict) -> None:
    """Writes a DiT or SiT so that the authors' code opens it (`safetensors.torch.load_file`), bit for bit.

    Raises:
      InvalidArgumentError: a network of another architecture.
      StorageError: disk full, no permission, ...
    """
    if type(module.config) not in ARCHITECTURES.values():
        raise InvalidArgumentError(
            f"{models.class_name(module.config)} is not in the original layout: turn a DiTTransformer2DModel "
            "into a DiT with checkpoints.dit_from_diffusers first"
        )
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    tensors = published(params) | dict(module.constant_tensors())
    write_together({path: safetensors_chunks(tensors)})


def dit_config(
    shapes: Shapes, kind: type[models.DiTConfig] = models.DiTConfig, num_heads: int | None = None
) -> models.DiTConfig:
    """The config that tensors of these shapes, by original name, belong to. A `KeyError` names a lacking one.

    Raises:
      InvalidArgumentError: a width whose number of heads nobody said, or shapes of no model.
    """
    hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
    tokens, outputs = shapes["pos_embed"][1], shapes["final_layer.linear.weight"][0]
    side = math.isqrt(tokens)
    if num_heads is None and hidden not in HEADS:
        known = ", ".join(map(str, HEADS))
        raise InvalidArgumentError(
            f"a file does not say its number of heads, which is known for the widths {known} alone and not "
            f"for {hidden}: say it, with num_heads="
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


def dit_from_diffusers(
    module: models.DiTTransformer2DModel, params: Mapping, *, freq_shift: int = 0
) -> tuple[models.DiT, dict]:
    """A `DiTTransformer2DModel` in the original layout: the embedders, repeated in each block there, once.

    Args:
      freq_shift: 0: the frequencies of time that the original, and so the published weights, were trained
        with. 1: those of diffusers, which is then agreed with. `norm_eps` is the config's for both norms of a
        block; diffusers heeds it for one and has 1e-6 in the other.

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


def dit_to_diffusers(module: models.DiT, params: Mapping) -> tuple[models.DiTTransformer2DModel, dict]:
    """A `DiT` in the layout of diffusers, its embedders repeated in each block: the inverse of the above.

    diffusers then answers with its own frequencies of time, see `DiTTransformer2DModel`.

    Raises:
      InvalidArgumentError: a model without classes, of rectangles, with learned positions or widths of the
        MLP or the sinusoids that diffusers does not have.
    """
    config = module.config
    fits = (
        type(config) is models.DiTConfig
        and config.num_classes is not None
        and isinstance(config.sample_size, int)
        and config.position_embedding == "sincos"
        and (config.mlp_ratio, config.frequency_embedding_size, config.dropout) == (4.0, 256, 0.0)
    )
    if not fits:
        raise InvalidArgumentError(
            "diffusers has DiTs with classes alone, for squares, with sin-cos positions, mlp_ratio 4, "
            f"frequency_embedding_size 256 and no dropout; this one is {config}"
        )
    theirs = models.DiTTransformer2DModel(
        models.DiTTransformer2DConfig(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes,
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
    """Names of diffusers -> original names; the embedders of all blocks have one place."""
    modules = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    parts: dict[str, Original] = {}
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
                parts[f"{ours}.attn1.{name}.{leaf}"] = Original(f"{theirs}.attn.qkv.{leaf}", part)
    return {name: Original(place) for name, place in modules.items()} | parts


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
    if positions is None or np.abs(np.asarray(positions, np.float32) - table).max() > 1e-2:
        raise CheckpointError(
            "pos_embed is not the sin-cos table of DiT: learned positions are not known here"
        )


def _as_params(state: Mapping[str, Tensor], module: nn.Module, like: Mapping) -> dict:
    """The parameters of a module from published tensors, in the dtype of other parameters."""
    dtype = {str(leaf.dtype) for leaf in _leaves(like)}
    return from_state_dict(state, models.shapes(module), dtype=dtype.pop() if len(dtype) == 1 else None)


def _leaves(params: Mapping) -> list:
    return [tensor.value for tensor in published(params).values()]
