"""A model as a folder: config.json and safetensors, in the layout of diffusers and transformers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxldm import models
from jaxldm.arguments import a_dtype, a_module, a_params, a_path, checked, count, instance, optional, text
from jaxldm.checkpoints.names import (
    Placement,
    a_placement,
    from_state_dict,
    published,
    published_whole,
)
from jaxldm.checkpoints.nf4 import keep_codes, split_nf4
from jaxldm.checkpoints.safetensors_file import StoredTensor, Tensor
from jaxldm.checkpoints.weight_files import (
    MAX_SHARD_SIZE,
    find_weights,
    is_plain_weights,
    open_found,
    open_weights,
    weight_contents,
)
from jaxldm.entries import build
from jaxldm.errors import CheckpointError, InvalidArgumentError, shown
from jaxldm.exact import LARGEST_INT64
from jaxldm.files import finish_interrupted, write_together
from jaxldm.models.config import ModelConfig, check_size
from jaxldm.reading import named, read_json, reading

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # of a model in the layout of diffusers
QUANTIZATION, METHOD = "quantization_config", "quant_method"  # in config.json, as other programs have them
WITHOUT_WEIGHTS = (2000, 2**23)  # tensors and numbers that a config alone may claim, for `check_size`
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def a_model(name: str, value: Any) -> Any:
    """A module with a config, so that it can be written."""
    module = a_module(name, value)
    instance(ModelConfig, "of a module with a config, such as models.build('tiny-dit')")(
        f"{name}.config", getattr(module, "config", None)
    )
    return module


@checked(folder=a_path, module=a_model, params=a_params, max_shard_size=count(1, LARGEST_INT64))
def save(
    folder: Path | str, module: nn.Module, params: dict, *, max_shard_size: int = MAX_SHARD_SIZE
) -> None:
    """Writes a model's config and weights for `load`, and for diffusers or transformers where they have it.

    Quantised parameters are for `load` alone: config.json says how, as `quantization_config`.

    Bit for bit, one tensor at a time. All files take the place of an earlier model's at once, so that a
    failure, or a kill at any moment, leaves the whole of that or the whole of this one. Other files in the
    folder stay.

    Args:
        folder: a new folder, or that of an earlier model.
        module: the network.
        params: the nested dictionary inside `{"params": ...}`, of any dtype.
        max_shard_size: bytes; larger models are written as several files and an index.

    Raises:
        StorageError: disk full, no permission, a file where the folder should be.
    """
    config = models.config_to_dict(module.config)
    stem = _STEMS[module.config.library]
    how = models.how_quantized(params)
    _check_own(params)
    tensors: dict[str, Tensor] = dict(published(params))
    if how is None:
        tensors |= _constants(module)  # which other programs want to read
    else:
        config[QUANTIZATION] = {METHOD: "jaxldm", **dataclasses.asdict(how)}
    contents = weight_contents(stem, tensors, max_shard_size)
    contents[CONFIG_FILE] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    write_together(folder, contents, lambda name: name == CONFIG_FILE or is_plain_weights(stem, name))


@checked(folder=a_path, dtype=optional(a_dtype), sharding=optional(a_placement), variant=optional(text))
def load(
    folder: Path | str,
    *,
    dtype: str | None = None,
    sharding: Placement = None,
    variant: str | None = None,
) -> tuple[nn.Module, dict]:
    """Opens a model folder that `save`, diffusers or transformers wrote: (module, its parameters).

    Tensors are read from disk two at a time, each put on its device before the next is read: the host needs
    memory for the largest of them (twice where the dtype changes), not for the model.

    Args:
        folder: of the model.
        dtype: "float32", "bfloat16" or "float16", for the parameters and for the computation. None: float32
            parameters (of a quantised model as they are stored), and the computation of the config. Codes
            and scales of a quantised model stay what they are.
        sharding: a device or a `jax.sharding.Sharding` for every parameter, or a function (path, shape) ->
            sharding, with paths like ("down_blocks_0", ..., "kernel"). Each device gets only its part.
        variant: for example "fp16", for `*.fp16.safetensors`; None: the plain files, or the only variant.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing, damaged, left over or of another shape,
            the weights are a pickle file, or the config has something that is not supported. The message
            names it.
        UnknownNameError: another dtype.
        InvalidArgumentError: a parameter cannot be split by its `sharding`.
    """
    folder = Path(folder)
    return load_as(read_config(folder), folder, dtype=dtype, sharding=sharding, variant=variant)


def load_as(
    entries: Mapping,
    folder: Path,
    *,
    dtype: str | None = None,
    sharding: Placement = None,
    variant: str | None = None,
) -> tuple[nn.Module, dict]:
    """`load` with these entries instead of those of the folder's config.json."""
    with reading(folder):
        how, entries = _quantization(entries)
        config = models.config_from_dict(entries)
    if how is not None and callable(sharding):
        raise InvalidArgumentError(
            f"{folder} is quantised, and such a network is not split over devices: leave mesh out, or load "
            "the model that it was made of"
        )
    config = config if dtype is None else dataclasses.replace(config, dtype=dtype)
    finish_interrupted(folder)
    weights, stored = open_weights(folder, _STEMS[config.library], variant)
    with reading(weights):
        check_stored(config, stored)
        module = models.from_config(config)
        state, packed = split_nf4(_without_untrained(stored, module))
        shapes = models.shapes(module) if how is None else _template(module, how, state)
        if not callable(sharding):  # codes are not split over devices
            shapes, state = keep_codes(module, shapes, state, packed)
    try:
        return module, from_state_dict(state, shapes, dtype=dtype, sharding=sharding)
    except CheckpointError as error:
        raise CheckpointError(named(weights, str(error))) from error


@checked(folder=a_path)
def module_in(folder: Path | str) -> nn.Module:
    """The network of a model folder by its config alone; of its weights, if there, only the names are read.

    Raises:
        CheckpointError: no config.json, or one that does not describe a network or not that of the weights.
    """
    folder = Path(folder)
    with reading(folder):
        config = models.config_from_dict(_quantization(read_config(folder))[1])
        weights = find_weights(folder, _STEMS[config.library])
        if weights is None:
            check_size(config, *WITHOUT_WEIGHTS)
        else:
            check_stored(config, open_found(weights))
        return models.from_config(config)


def check_stored(config: ModelConfig, stored: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` where a config describes far more than these tensors; see `check_size`."""
    # A byte may hold two numbers of four bits.
    numbers = [math.prod(tensor.shape) * (2 if tensor.dtype == np.uint8 else 1) for tensor in stored.values()]
    check_size(config, len(stored), sum(numbers))


def _check_own(params: Mapping) -> None:
    """Raise `InvalidArgumentError` for codes that only other programs' files have."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, models.Quantized))
    packed = (leaf for leaf in leaves if isinstance(leaf, models.Quantized))
    if any(leaf.offsets is not None or leaf.weights == "nf4" for leaf in packed):
        raise InvalidArgumentError(
            "these weights have the codes of another program's file, which are not written again: save "
            "models.dequantize(params), or what models.quantize makes of that"
        )


def _quantization(entries: Mapping) -> tuple[models.Quantization | None, dict]:
    """How the weights are quantised by us, and the other entries of config.json."""
    how = entries.get(QUANTIZATION)
    others = {name: value for name, value in entries.items() if name != QUANTIZATION}
    if isinstance(how, Mapping) and how.get(METHOD) == "bitsandbytes" and how.get("load_in_4bit"):
        return None, others  # which of its tensors are in NF4 is in the file
    if isinstance(how, Mapping) and how.get(METHOD, "jaxldm") != "jaxldm":
        raise CheckpointError(
            f"{CONFIG_FILE}: {QUANTIZATION} is of {shown(how[METHOD])}, whose weights cannot be read: give "
            "the model that it was made of, and quantise that (models.quantize)"
        )
    if not isinstance(how, Mapping) or METHOD not in how:
        return None, dict(entries)  # of another program's, which the config's own reader refuses
    fields = {name: value for name, value in how.items() if name != METHOD}
    return build(models.Quantization, fields, f"{CONFIG_FILE}: {QUANTIZATION}"), others


def _template(module: nn.Module, how: models.Quantization, state: Mapping[str, Tensor]) -> dict:
    """The quantised parameters by their shapes, the low-rank branch as wide as in the file.

    A LoRA may have been added to it.
    """

    def widened(path: tuple[str, ...], leaf: Any) -> Any:
        if not isinstance(leaf, models.Quantized):
            return leaf
        stack = leaf.scales.shape[:-2]
        names = published_whole({(*path, "down"): jax.ShapeDtypeStruct((*stack, 1), np.float32)})
        stored = next((state[name] for name in names if name in state), None)
        if stored is None or not stored.shape:
            return leaf
        shapes = {"down": (*leaf.kernel_shape[:-1], stored.shape[-1])}
        shapes["up"] = (stored.shape[-1], leaf.kernel_shape[-1])
        # Of numbers that are not floating it is refused, as any other tensor.
        dtype = stored.dtype if jnp.issubdtype(stored.dtype, jnp.floating) else np.float32
        branch = {name: jax.ShapeDtypeStruct((*stack, *own), dtype) for name, own in shapes.items()}
        return dataclasses.replace(leaf, **branch)

    flat = traverse_util.flatten_dict(models.quantized_shapes(module, how))
    return traverse_util.unflatten_dict({path: widened(path, leaf) for path, leaf in flat.items()})


@checked(folder=a_path)
def read_config(folder: Path | str) -> dict:
    """The entries of a model folder's config.json.

    Raises:
        CheckpointError: no such folder, no config.json in it, or not JSON.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.parent.is_dir():
        raise CheckpointError(f"there is no model folder {path.parent}")
    finish_interrupted(path.parent)
    entries = read_json(path) if path.exists() else {}
    if _is_whole(path.parent, entries):
        networks = sorted(each.parent.name for each in path.parent.glob(f"*/{CONFIG_FILE}"))
        one = f", or give the folder of one network of it, such as {networks[0][:60]}" if networks else ""
        raise CheckpointError(f"{path.parent} holds a whole model: open it with pipelines.load{one}")
    if not path.exists():
        raise CheckpointError(
            f"{path.parent} has no {CONFIG_FILE}: it is not a model folder, or saving was interrupted"
        )
    return entries


def _is_whole(folder: Path, entries: Mapping) -> bool:
    """Whether a folder with these entries of config.json holds a whole model, and not one network."""
    whole = (folder / "model_index.json").exists() or "recipe" in entries
    return whole and not {"_class_name", "architectures"} & set(entries)


def check_one_network(folder: Path | str, kind: str, part: str) -> None:
    """Raise `CheckpointError` for the folder of a whole model where one network of it is wanted.

    Args:
        folder: that was given.
        kind: of network, in words: "an autoencoder".
        part: what such a network is called in a whole model: "vae".
    """
    folder = Path(folder)
    path, own = folder / CONFIG_FILE, folder / part
    if _is_whole(folder, read_json(path) if path.exists() else {}):
        fix = f"give that of it, {own}" if (own / CONFIG_FILE).exists() else "give the folder of one"
        raise CheckpointError(f"{folder} holds a whole model, and {kind} is wanted: {fix}")


def _constants(module: nn.Module) -> dict[str, np.ndarray]:
    """Tensors of published checkpoints of this architecture that are not trained."""
    return dict(module.constant_tensors()) if hasattr(module, "constant_tensors") else {}


def _without_untrained(stored: Mapping[str, StoredTensor], module: nn.Module) -> dict[str, StoredTensor]:
    """The tensors that are parameters of the module, each under one name.

    Left out are its constants (`constant_tensors()`), tensors that it declares unused (`ignored_tensors`),
    and the second names of tensors with two (`tied_tensors`).
    """
    state = dict(stored)
    for name, table in _constants(module).items():
        if name in state and state[name].shape != table.shape:
            shapes = f"{state[name].shape} in the file, {table.shape} in the model"
            raise CheckpointError(f"the weights do not fit the model: {name} is {shapes}")
        state.pop(name, None)
    for name, kept in getattr(module, "tied_tensors", {}).items():
        if name not in state:
            continue
        second = state.pop(name)
        if kept in state and _bytes(second) != _bytes(state[kept]):
            raise CheckpointError(
                f"the weights do not fit the model: {name} and {kept} are one tensor in the model, and "
                "differ in the file"
            )
        state.setdefault(kept, second)
    ignored = [re.compile(pattern) for pattern in getattr(module, "ignored_tensors", ())]
    return {name: tensor for name, tensor in state.items() if not any(p.fullmatch(name) for p in ignored)}


def _bytes(tensor: StoredTensor) -> memoryview:
    """The bytes in the file, mapped into memory and not copied."""
    return np.asarray(tensor).reshape(-1).view(np.uint8).data
