"""TAESD's original files, the encoder and the decoder apart: `taesd_encoder.pth`, `taesd_decoder.pth`, ...

Each is the state dict of one `nn.Sequential`, in which the decoder's first module clamps the latents and has
no parameters; diffusers keeps that one out of the sequence. Pixels of the original networks are in [0, 1],
those of `AutoencoderTiny` in [-1, 1].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxldm import models
from jaxldm.arguments import a_dtype, a_params, a_path, checked, optional
from jaxldm.checkpoints.folder import a_model, check_stored
from jaxldm.checkpoints.names import from_state_dict, published
from jaxldm.checkpoints.original.layout import Place, Shapes, Table, from_original, place_of, to_original
from jaxldm.checkpoints.safetensors_file import Tensor, open_safetensors, safetensors_chunks
from jaxldm.checkpoints.torch_file import PICKLES, read_torch_file
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.files import write_atomically
from jaxldm.models.quantization import refuse_quantized
from jaxldm.reading import reading

_CLAMPS = {"encoder": 0, "decoder": 1}  # modules in front that diffusers does not count


@checked(encoder=a_path, decoder=a_path, dtype=optional(a_dtype))
def load_taesd_files(
    encoder: Path | str, decoder: Path | str, *, dtype: str | None = None
) -> tuple[nn.Module, dict]:
    """(module, parameters) of an `AutoencoderTiny`, of its two original files.

    Args:
        encoder, decoder: .pth or .safetensors files of TAESD, TAESDXL, TAESD3 or TAEF1. Pickles are read
            without running anything in them.
        dtype: "float32", "bfloat16" or "float16", for parameters and computation; None is float32 for both.

    Raises:
        CheckpointError: no such file; the other file of the two; tensors that are missing, left over or of
            other shapes.
        UnknownNameError: another dtype.

    >>> from jaxldm import checkpoints                                                       # doctest: +SKIP
    >>> taesd = checkpoints.load_taesd_files("taesd_encoder.pth", "taesd_decoder.pth")       # doctest: +SKIP
    >>> checkpoints.save("taesd", *taesd)                                                    # doctest: +SKIP
    """
    state: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for side, path in (("encoder", Path(encoder)), ("decoder", Path(decoder))):
        tensors: Mapping[str, Tensor] = (
            read_torch_file(path) if path.suffix in PICKLES else open_safetensors(path).tensors
        )
        with reading(path):
            fields |= _fields(side, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        state |= {f"{side}.{name}": tensor for name, tensor in tensors.items()}
    with reading(decoder):
        try:
            config = models.AutoencoderTinyConfig(**fields, dtype=dtype or "float32")
        except InvalidArgumentError as error:
            raise CheckpointError(f"the files have shapes of no AutoencoderTiny: {error}") from error
        check_stored(config, state)
        module: Any = models.from_config(config)
        template = models.shapes(module)
        wanted, table = published(template), _table(config)
        left = sorted(state.keys() - {place_of(name, table).name for name in wanted})
        if left:
            raise CheckpointError(f"the weights do not fit the model: left over: {', '.join(left[:8])}")
        return module, from_state_dict(from_original(state, wanted, table), template, dtype=dtype)


@checked(encoder=a_path, decoder=a_path, module=a_model, params=a_params)
def save_taesd_files(encoder: Path | str, decoder: Path | str, module: Any, params: dict) -> None:
    """Writes an `AutoencoderTiny` as two original .safetensors files, the inverse of `load_taesd_files`.

    Raises:
        InvalidArgumentError: another network, a quantised one, or one that these files cannot describe: with
            an activation other than "relu", or latents that are scaled or shifted.
        StorageError: disk full, no permission, ...
    """
    config = module.config
    if not isinstance(config, models.AutoencoderTinyConfig):
        raise InvalidArgumentError(f"TAESD's files hold an AutoencoderTiny, not {models.class_name(config)}")
    plain = {"act_fn": "relu", "scaling_factor": 1.0, "shift_factor": 0.0}
    for field, value in plain.items():
        if getattr(config, field) != value:
            raise InvalidArgumentError(
                f"TAESD's files hold no config: they are of {field} {value}, not {getattr(config, field)}; "
                "save a folder with checkpoints.save"
            )
    refuse_quantized(params, "an original file")
    tensors = to_original(published(params), _table(config))
    for side, path in (("encoder", encoder), ("decoder", decoder)):
        own = {
            name.removeprefix(f"{side}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{side}.")
        }
        write_atomically(Path(path), safetensors_chunks(own, {"format": "pt"}))


def _fields(side: str, shapes: Shapes) -> dict[str, Any]:
    """What the shapes of one file tell of the config.

    Raises:
        CheckpointError: not that file.
    """
    numbers = [name.split(".")[0] for name in shapes]
    convs = sorted(int(n) for n in {*numbers} if n.isdecimal() and f"{n}.weight" in shapes)
    blocks = [int(n) for n in {*numbers} if n.isdecimal() and f"{n}.conv.0.weight" in shapes]
    if len(convs) < 2 or convs[0] != _CLAMPS[side]:
        raise CheckpointError(
            f"this is no {side} of TAESD, whose first tensor is {_CLAMPS[side]}.weight and which ends with a "
            f"convolution: it has {', '.join(sorted(shapes)[:3]) or 'no tensors'}"
        )
    counts = tuple(sum(start < n < end for n in blocks) for start, end in itertools.pairwise(convs))
    width, inputs = shapes[f"{convs[0]}.weight"][:2]
    outputs = shapes[f"{convs[-1]}.weight"][0]
    if side == "encoder":
        ends = {"in_channels": inputs, "latent_channels": outputs}
    else:
        ends = {"out_channels": outputs}
    return {f"num_{side}_blocks": counts, f"{side}_block_out_channels": (width,) * len(counts), **ends}


def _table(config: models.AutoencoderTinyConfig) -> Table:
    """Published module -> its place, as "encoder." or "decoder." and the name in that file."""
    levels = len(config.num_encoder_blocks)
    table: Table = {}
    modules = {"encoder": levels + 1, "decoder": 2 * levels + 1}  # convolutions, activations, doublings
    for side, others in modules.items():
        for place in range(sum(getattr(config, f"num_{side}_blocks")) + others):
            table[f"{side}.layers.{place}"] = Place(f"{side}.{place + _CLAMPS[side]}")
    return table
