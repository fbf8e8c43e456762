"""Writing a LoRA: one safetensors file under the names that the published programs read.

| names | a module's tensors | read by |
|---|---|---|
| "diffusers" | `unet.down_blocks.0...to_q.lora_A.weight`, `.lora_B` | diffusers, PEFT |
| the same | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` | these and ComfyUI |
| "kohya" | `lora_unet_down_blocks_0_..._to_q.lora_down.weight`, `.lora_up` | diffusers, ComfyUI |

No name of an attention layer of a U-Net is known to all three. PEFT finds a module by its path, `attn1.to_q`;
ComfyUI looks for `lora_unet_..._attn1_to_q` and for `unet....attn1.processor.to_q`, where diffusers had the
factors at first. (Of convolutions and feed-forward layers it knows diffusers' names.) So a U-Net for ComfyUI
needs kohya's names; SD 3, FLUX, FLUX.2, Qwen-Image, PixArt and Z-Image it reads whole as diffusers has them.

The scale alpha / r is in the factors, so that whoever takes alpha = r where a file names none gets the same
weights. kohya's names have an alpha, which is that scale times r.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxldm.arguments import a_params, a_path, checked, choice, number, refuse
from jaxldm.checkpoints.lora_names import COMPONENT_NAMES
from jaxldm.checkpoints.names import ENCODER_PREFIXES, published
from jaxldm.checkpoints.safetensors_file import safetensors_chunks
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.files import write_atomically
from jaxldm.models.adapters import lora_layers

NAMES = ("diffusers", "kohya")
_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
_WITHOUT_KOHYA = ("add_k_proj", "add_v_proj")  # of DeepFloyd IF: diffusers does not see where a word ends
_PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}


def some_adapters(name: str, value: Any) -> Any:
    """Trees of adapters by the names of their components."""
    if not isinstance(value, Mapping) or not value:
        raise refuse(name, "adapters by component, such as {'unet': lora}", value)
    for component, lora in value.items():
        one_of("component", component, COMPONENT_NAMES)
        lora_layers(a_params(f"{name}[{component!r}]", lora))
    return value


@checked(
    path=a_path,
    adapters=some_adapters,
    scale=number(),
    names=choice("kind of names", NAMES),
)
def save_lora(
    path: Path | str, adapters: Mapping[str, Any], scale: float = 1.0, names: str = "diffusers"
) -> None:
    """Write adapters into one file, whole or not at all; `checkpoints.load_lora` reads it back.

    Args:
        path: its name ends in .safetensors; a file that is there is replaced.
        adapters: component ("unet", "transformer", "text_encoder", ...) -> the tree of `models.init_lora`.
        scale: what `models.apply_lora` multiplies them with, alpha / r.
        names: "diffusers", or "kohya" for U-Nets and their text encoders; diffusers and PEFT read the first,
            of transformers ComfyUI too, diffusers and ComfyUI the second.

    Raises:
        InvalidArgumentError: another suffix; kohya's names for a transformer, or for DeepFloyd IF.
        UnknownNameError: a component or kind of names that does not exist.
        StorageError: it cannot be written.

    >>> from jaxldm import checkpoints                                                   # doctest: +SKIP
    >>> checkpoints.save_lora("mine.safetensors", {"unet": lora}, scale=0.5)             # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InvalidArgumentError(
            f"path must end in .safetensors, as every program looks for it; got {path.name}"
        )
    tensors: dict[str, np.ndarray] = {}
    for component, lora in adapters.items():
        if names == "kohya":
            tensors |= _kohya_tensors(component, lora, scale)
        else:
            tensors |= _diffusers_tensors(component, lora, scale)
    write_atomically(path, safetensors_chunks(tensors))


def _diffusers_tensors(component: str, lora: Mapping[str, Any], scale: float) -> dict[str, np.ndarray]:
    tensors = {}
    for name, tensor in _tensors(component, lora).items():
        folded = tensor * np.float32(scale) if name.endswith(".lora_B.weight") else tensor
        tensors[f"{component}.{name}"] = folded
    return tensors


def check_names(component: str, names: str) -> None:
    """Raise `InvalidArgumentError` for a component that has no names of that kind."""
    if names == "kohya" and component not in _KOHYA:
        raise InvalidArgumentError(
            f"kohya's names are for {', '.join(_KOHYA)}, got {component}: names='diffusers' is what ComfyUI "
            "reads of a transformer, too"
        )


def _kohya_tensors(component: str, lora: Mapping[str, Any], scale: float) -> dict[str, np.ndarray]:
    check_names(component, "kohya")
    tensors = {}
    for name, tensor in _tensors(component, lora).items():
        module, part, _ = name.rsplit(".", 2)
        if module.endswith(_WITHOUT_KOHYA):
            raise InvalidArgumentError(
                f"{module} has no name of kohya's that a program reads: give names='diffusers'"
            )
        place = _KOHYA[component] + module.replace(".", "_")
        tensors[f"{place}.{_PARTS[part]}.weight"] = tensor
        if part == "lora_A":
            tensors[f"{place}.alpha"] = np.float32(scale * tensor.shape[0])
    return tensors


def _tensors(component: str, lora: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{name in the network: factor, as published}, a stack of blocks taken apart. CLIP's have its prefix."""
    tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in published(lora).items()}
    bare = component.startswith("text_encoder") and any(
        name.startswith("encoder.layers.") for name in tensors
    )
    return {
        f"{ENCODER_PREFIXES[0]}{name}" if bare and name.startswith("encoder.") else name: tensor
        for name, tensor in tensors.items()
    }
