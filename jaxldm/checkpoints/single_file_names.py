"""The names of tensors in original single files, beside their published names.

A table per architecture, made from its config: published module (or tensor) -> where it stands in the
original layout. Both directions read the same table; below an entry's module, names are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxldm.checkpoints.safetensors_file import Tensor
from jaxldm.errors import CheckpointError
from jaxldm.models.autoencoder_kl import AutoencoderKLConfig
from jaxldm.models.clip_text import CLIPTextConfig
from jaxldm.models.t5_encoder import T5EncoderConfig
from jaxldm.models.unet_2d_condition import UNet2DConditionConfig


class Original(NamedTuple):
    """Where a published tensor stands in an original file.

    form: "same"; "pixelwise", a linear layer that is a 1x1 convolution there; "transposed"; "swapped", the
      two halves of its rows in the other order; 0, 1, 2: the first, second, third part of the rows of a
      tensor that holds three; (k, sizes): part k of one that holds several, as many rows as `sizes` say;
      or "identity", a matrix that changes nothing, and that no file needs.
    """

    name: str
    form: str | int | tuple[int, tuple[int, ...]] = "same"


Table = Mapping[str, Original]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_table(config: UNet2DConditionConfig) -> Table:
    """U-Net: input blocks counted through all levels, what is at one place numbered 0, 1, 2."""
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "class_embedding.linear_1": "label_emb.0.0",
        "class_embedding.linear_2": "label_emb.0.2",
        "class_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    levels = len(config.block_out_channels)
    place = 1
    for level in range(levels):
        block = f"down_blocks.{level}"
        for layer in range(config.of_level("layers_per_block", level)):
            resnets[f"{block}.resnets.{layer}"] = f"input_blocks.{place}.0"
            modules[f"{block}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        modules[f"{block}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
        place += 1
    place = 0
    for i, kind in enumerate(config.up_block_types):
        block = f"up_blocks.{i}"
        for layer in range(config.of_level("layers_per_block", levels - 1 - i) + 1):
            resnets[f"{block}.resnets.{layer}"] = f"output_blocks.{place}.0"
            modules[f"{block}.attentions.{layer}"] = f"output_blocks.{place}.1"
            place += 1
        after = 2 if kind == "CrossAttnUpBlock2D" else 1
        modules[f"{block}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{after}.conv"
    for published, original in resnets.items():
        modules |= {f"{published}.{ours}": f"{original}.{theirs}" for ours, theirs in _RESNET.items()}
    return {published: Original(original) for published, original in modules.items()}


_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_table(config: AutoencoderKLConfig) -> Table:
    """Autoencoder: the decoder's levels are numbered from the image inwards, as the encoder's are."""
    levels = len(config.block_out_channels)
    modules, resnets, attentions = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}, {}, {}
    for coder in ("encoder", "decoder"):
        modules |= {f"{coder}.{name}": f"{coder}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{coder}.conv_norm_out"] = f"{coder}.norm_out"
        resnets |= {f"{coder}.mid_block.resnets.{i}": f"{coder}.mid.block_{i + 1}" for i in (0, 1)}
        attentions[f"{coder}.mid_block.attentions.0"] = f"{coder}.mid.attn_1"
    for level in range(levels):
        ways = (
            (f"encoder.down_blocks.{level}", f"encoder.down.{level}", config.layers_per_block),
            (f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}", config.layers_per_block + 1),
        )
        for published, original, layers in ways:
            modules[f"{published}.downsamplers.0.conv"] = f"{original}.downsample.conv"
            modules[f"{published}.upsamplers.0.conv"] = f"{original}.upsample.conv"
            for layer in range(layers):
                resnets[f"{published}.resnets.{layer}"] = f"{original}.block.{layer}"
                attentions[f"{published}.attentions.{layer}"] = f"{original}.attn.{layer}"
    for published, original in resnets.items():
        modules |= {published: original, f"{published}.conv_shortcut": f"{original}.nin_shortcut"}
    for published, original in attentions.items():
        modules[f"{published}.group_norm"] = f"{original}.norm"
        modules |= {f"{published}.{ours}": f"{original}.{theirs}" for ours, theirs in _ATTENTION.items()}
    table = {published: Original(original) for published, original in modules.items()}
    for published, original in attentions.items():
        for ours, theirs in _ATTENTION.items():
            table[f"{published}.{ours}.weight"] = Original(f"{original}.{theirs}.weight", "pixelwise")
    return table


def clip_table(config: CLIPTextConfig) -> Table:
    """OpenAI's CLIP stands in original files as transformers publishes it."""
    return {"text_model": Original("text_model")}


def openclip_table(config: CLIPTextConfig) -> Table:
    """OpenCLIP: queries, keys and values in one tensor; the projection multiplies from the right."""
    table = {
        "text_model.embeddings.token_embedding": Original("token_embedding"),
        "text_model.embeddings.position_embedding.weight": Original("positional_embedding"),
        "text_model.final_layer_norm": Original("ln_final"),
        "text_projection.weight": Original("text_projection", "transposed"),
    }
    for layer in range(config.num_hidden_layers):
        published, original = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        table |= {
            f"{published}.layer_norm1": Original(f"{original}.ln_1"),
            f"{published}.layer_norm2": Original(f"{original}.ln_2"),
            f"{published}.mlp.fc1": Original(f"{original}.mlp.c_fc"),
            f"{published}.mlp.fc2": Original(f"{original}.mlp.c_proj"),
            f"{published}.self_attn.out_proj": Original(f"{original}.attn.out_proj"),
        }
        for part, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            for leaf in ("weight", "bias"):
                place = Original(f"{original}.attn.in_proj_{leaf}", part)
                table[f"{published}.self_attn.{projection}.{leaf}"] = place
    return table


def t5_table(config: T5EncoderConfig) -> Table:
    """T5 stands in original files as transformers publishes it."""
    return {"shared": Original("shared"), "encoder": Original("encoder")}


def place_of(name: str, table: Table) -> Original:
    """Where the published tensor `name` stands: its own entry, or that of the innermost module with one.

    Raises:
      CheckpointError: neither; the original layout has no such tensor.
    """
    parts = name.split(".")
    if name in table:
        return table[name]
    for length in range(len(parts) - 1, 0, -1):
        module = table.get(".".join(parts[:length]))
        if module is not None:
            return Original(".".join([module.name, *parts[length:]]), module.form)
    raise CheckpointError(f"the original layout has no place for {name}")


@dataclasses.dataclass(frozen=True)
class Changed:
    """Tensors of one layout as a tensor of the other, read when it is used: `np.asarray(it)`."""

    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]
    change: Callable[..., np.ndarray]

    @property
    def dtype(self) -> np.dtype:
        """That of the parts."""
        return np.dtype(self.parts[0].dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.change(*map(np.asarray, self.parts)), dtype, copy=copy)


def from_original(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], table: Table
) -> dict[str, Tensor]:
    """Those of the published tensors named and shaped like `wanted` that are there, not read yet."""
    places = {name: place_of(name, table) for name in wanted}
    found = {
        name: _published(tensors[place.name], place.form)
        for name, place in places.items()
        if place.name in tensors
    }
    neutral = [name for name, place in places.items() if place.form == "identity"]
    return found | {name: np.eye(*wanted[name].shape, dtype=np.float32) for name in neutral}


def to_original(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The inverse of `from_original`: every published tensor under its original name and in that form.

    Raises:
      CheckpointError: a tensor that has no place there, or that the original model does not have.
    """
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        place = place_of(name, table)
        shape = tuple(tensor.shape)
        if isinstance(place.form, int | tuple):
            parts.setdefault(place.name, {})[_of_rows(place.form)[0]] = tensor
        elif place.form == "pixelwise":
            tensors[place.name] = Changed((tensor,), (*shape, 1, 1), lambda array: array[:, :, None, None])
        elif place.form == "transposed":
            tensors[place.name] = Changed((tensor,), shape[::-1], np.transpose)
        elif place.form == "swapped":
            tensors[place.name] = Changed((tensor,), shape, _swapped)
        elif place.form == "identity":
            if not np.array_equal(np.asarray(tensor), np.eye(*shape)):
                raise CheckpointError(f"the original layout has no place for {name}, which is no identity")
        else:
            tensors[place.name] = tensor
    for name, by_part in parts.items():
        in_order = tuple(by_part[part] for part in sorted(by_part))
        shape = (sum(tensor.shape[0] for tensor in in_order), *in_order[0].shape[1:])
        tensors[name] = Changed(in_order, shape, lambda *arrays: np.concatenate(arrays))
    return tensors


def _of_rows(form: int | tuple[int, tuple[int, ...]]) -> tuple[int, tuple[int, ...]]:
    return (form, (1, 1, 1)) if isinstance(form, int) else form


def _swapped(array: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(array, 2)[::-1])


def _published(tensor: Tensor, form: str | int | tuple[int, tuple[int, ...]]) -> Tensor:
    """In the published form; where its shape does not allow that, as it is: the error shows the shape."""
    shape = tuple(tensor.shape)
    if form == "transposed":
        return Changed((tensor,), shape[::-1], np.transpose)
    if form == "pixelwise" and set(shape[2:]) == {1}:
        return Changed((tensor,), shape[:2], lambda array: array.reshape(shape[:2]))
    if form == "swapped" and shape and shape[0] % 2 == 0:
        return Changed((tensor,), shape, _swapped)
    if isinstance(form, int | tuple) and shape:
        part, sizes = _of_rows(form)
        unit, rest = divmod(shape[0], sum(sizes))
        first, last = unit * sum(sizes[:part]), unit * sum(sizes[: part + 1])
        if rest == 0:
            return Changed((tensor,), (last - first, *shape[1:]), lambda array: array[first:last])
    return tensor
