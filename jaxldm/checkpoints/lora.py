"""LoRA files: small matrices that change the weights of a published model. Hu et al. 2021, arXiv:2106.09685.

W' = W + scale * (alpha / r) * up @ down, with `down` of r rows and `up` of r columns. The files come from two
families of programs, which name the same module differently:

| written by | the U-Net's module `down_blocks.0.attentions.1...attn1.to_q` is |
|---|---|
| kohya's scripts | `lora_unet_down_blocks_0_attentions_1_..._to_q.lora_down.weight`, `.lora_up`, `.alpha` |
| the same for XL | `lora_unet_input_blocks_4_1_..._to_q.lora_down.weight`: the names of the original files |
| diffusers, PEFT | `unet.down_blocks.0.attentions.1...attn1.to_q.lora_A.weight`, `.lora_B.weight` |
| older diffusers | `unet....attn1.to_q.lora.down.weight`, `....attn1.processor.to_q_lora.down.weight` |

So the names in the file are not parsed: every module of the model is spelled in every way and looked up.

Every layer has its own alpha, as in kohya's scripts. diffusers 0.42 replaces those of attention layers, where
they differ within a file, by the most common one, so that its fused weights differ.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from jaxldm.arguments import a_path, checked, instance, number
from jaxldm.checkpoints.names import (
    COMPONENTS,
    ENCODER_PREFIXES,
    PublishedTensor,
    placed,
    published,
)
from jaxldm.checkpoints.original.layout import place_of
from jaxldm.checkpoints.original.stable_diffusion import unet_table
from jaxldm.checkpoints.safetensors_file import StoredTensor, Tensor, open_safetensors
from jaxldm.entries import read_values
from jaxldm.errors import CheckpointError, one_of
from jaxldm.models.unet_2d_condition import UNet2DConditionConfig
from jaxldm.reading import parse_json, read_json, reading, shown, some_of

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers, of PEFT
# What kohya's names begin with, for each component.
_KOHYA = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_", "lora_transformer_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
COMPONENT_NAMES = tuple(_KOHYA)
_DENOISERS = ("unet", "transformer")
_TENSOR = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.lora_(?P<peft>[AB])(?:\.[\w-]+)?\.weight"  # with the name of the adapter in between, or without
    r"|(?P<old>_lora)?\.(?:lora_linear_layer\.|lora\.|lora_)?(?P<part>down|up|mid)\.weight"
    r"|(?P<alpha>\.alpha))"
)
_OLD_PROJECTIONS = {
    "to_q_lora": ("to_q", "q_proj"),
    "to_k_lora": ("to_k", "k_proj"),
    "to_v_lora": ("to_v", "v_proj"),
    "to_out_lora": ("to_out.0", "out_proj"),
}


class LoraLayer(NamedTuple):
    """The change of one module's weight: `up @ down`, times `multiplier`.

    Attributes:
        down: `[r, in]`, or `[r, in, h, w]` for a convolution.
        up: `[out, r]` or `[out, r, 1, 1]`.
        mid: None, or `[r, r, h, w]` between a `down` and an `up` of 1x1.
        multiplier: alpha / r.
        tensors: the names of its tensors in the file.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None
    multiplier: float
    tensors: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the change: `[out, in]` or `[out, in, h, w]`."""
        spatial = self.down if self.mid is None else self.mid
        return (self.up.shape[0], self.down.shape[1], *spatial.shape[2:])

    def change(self) -> np.ndarray:
        """The change: multiplier * up @ mid @ down, float32, of shape `shape`."""
        up, down = (np.asarray(part).astype(np.float32) for part in (self.up, self.down))
        up, down = up.reshape(up.shape[:2]), down if self.mid is None else down.reshape(down.shape[:2])
        if self.mid is None:
            change = up @ down.reshape(len(down), -1)
        else:
            mid = np.asarray(self.mid).astype(np.float32)
            change = np.einsum("oa,abhw,bi->oihw", up, mid, down, optimize=True)
        return self.multiplier * change.reshape(self.shape)


class Lora(NamedTuple):
    """A LoRA file, opened.

    Attributes:
        path: of the file.
        layers: module, as the file spells it -> its layer, not read yet.
    """

    path: Path
    layers: Mapping[str, LoraLayer]

    def of(self, *components: str) -> Lora:
        """The layers of these components ("unet", "text_encoder", ...)."""
        layers = {name: layer for name, layer in self.layers.items() if _component(name) in components}
        return self._replace(layers=layers)


@checked(path=a_path)
def load_lora(path: Path | str) -> Lora:
    """Opens a LoRA file in the format of kohya's scripts or of diffusers, or the folder that holds one.

    Raises:
        CheckpointError: no such file, a pickle file, a damaged one, one without LoRA layers; tensors that do
            not belong to a plain LoRA (DoRA, LoHa, LoKr) or have no counterpart: they are named.

    >>> from jaxldm import checkpoints                                                   # doctest: +SKIP
    >>> lora = checkpoints.load_lora("pixel-art.safetensors")                            # doctest: +SKIP
    >>> components = checkpoints.merge_lora(checkpoints.load_components(folder), lora)   # doctest: +SKIP
    """
    path = _file(Path(path))
    tensors, metadata = open_safetensors(path)
    with reading(path):
        return _read_layers(path, tensors, metadata)


def _read_layers(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> Lora:
    """The layers of a file, by the names of its tensors."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        role = match and ({"A": "down", "B": "up"}.get(match["peft"]) or match["part"] or "alpha")
        module = _module(match["module"] + (match["old"] or "")) if match else ""
        if not role or role in modules.setdefault(module, {}):
            unknown.append(f"{name} {tensor.shape}")
        else:
            modules[module][role] = tensor
    modules = {module: parts for module, parts in modules.items() if parts}
    unknown += [
        f"{tensor.name} {tensor.shape}, without its counterpart"
        for parts in modules.values()
        if not {"down", "up"} <= parts.keys()
        for tensor in parts.values()
    ]
    if unknown:
        raise CheckpointError(
            f"{path} holds tensors that are not of a plain LoRA (matrices down and up, one number alpha): "
            + some_of(unknown, length=4000)
        )
    if not modules:
        raise CheckpointError(f"{path} holds no LoRA layers")
    settings = _settings(path, metadata)
    return Lora(path, {module: _layer(path, module, parts, settings) for module, parts in modules.items()})


A_LORA = instance(Lora, "a LoRA from checkpoints.load_lora(path)")


def a_scale(name: str, value: Any) -> Any:
    """One number, or one for each component by its name."""
    if isinstance(value, Mapping):
        return {key: number()(f"{name}[{shown(key)}]", each) for key, each in value.items()}
    return number()(name, value)


@checked(components=COMPONENTS, lora=A_LORA, scale=a_scale)
def merge_lora(
    components: Mapping[str, Any], lora: Lora, scale: float | Mapping[str, float] = 1.0
) -> dict[str, Any]:
    """Adds a LoRA to the weights: W + scale * (alpha / r) * up @ down in place of W.

    One weight at a time, in float32; each keeps its dtype and its devices.

    Args:
        components: of `load_components`: name -> (module, params); entries that are no networks pass through.
        lora: of `load_lora`.
        scale: one number for all components, or one for each; components that it does not name are unchanged.

    Returns:
        The components with the changed weights.

    Raises:
        CheckpointError: layers that match no module of the components, or have another shape than its weight:
            all are named, and nothing is merged.
        UnknownNameError: `scale` names a component that is not given.
    """
    networks = {name: part for name, part in components.items() if _is_network(part)}
    if isinstance(scale, Mapping):
        scales = {
            one_of("component of scale", name, networks): float(number) for name, number in scale.items()
        }
    else:
        scales = dict.fromkeys(networks, float(scale))
    places = _places(networks)
    _check(lora, places)
    layers: dict[tuple[str, tuple[str, ...]], list[tuple[PublishedTensor, LoraLayer]]] = {}
    for module, layer in lora.layers.items():
        component, tensor = places[module]
        if component in scales:
            layers.setdefault((component, tensor.path), []).append((tensor, layer))
    changed: dict[str, dict] = {name: {} for name in networks}
    for (component, path), of_one_parameter in layers.items():
        changed[component][path] = _with_changes(of_one_parameter, scales[component])
    merged = dict(components)
    for name, (module, params) in networks.items():
        flat = traverse_util.flatten_dict(params) | changed[name]
        merged[name] = (module, traverse_util.unflatten_dict(flat))
    return merged


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    named = [path / name for name in FILE_NAMES if (path / name).is_file()]
    found = named[:1] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "no .safetensors file"
        raise CheckpointError(f"{path} holds {names}: give the path of the LoRA file")
    return found[0]


def _module(name: str) -> str:
    """The name of a module without the additions of older versions."""
    name = name.removeprefix("base_model.model.").replace(".processor.", ".")
    *parents, last = name.split(".")
    if last in _OLD_PROJECTIONS:
        in_unet, in_text_encoder = _OLD_PROJECTIONS[last]
        last = in_text_encoder if "self_attn" in parents else in_unet
    return ".".join([*parents, last])


def _component(module: str) -> str:
    """The component of a module by its name in the file: the denoiser, where the name does not tell."""
    for component, prefixes in _KOHYA.items():
        if module.startswith(prefixes):
            return component
    first = module.split(".")[0]
    return first if first in _KOHYA else "unet"


_TYPES = {
    "lora_alpha": float,
    "alpha_pattern": Mapping[str, float] | None,
    "use_rslora": bool | None,
}


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings of PEFT next to the tensors: alpha, exceptions by module, and what divides it.

    In the metadata of diffusers each key has its component in front: "unet.lora_alpha".
    """
    config = path.with_name("adapter_config.json")
    if path.name == FILE_NAMES[1] and config.exists():
        place, settings = str(config), read_json(config)
    else:
        place = f"{path}: its lora_adapter_metadata"
        settings = parse_json(metadata.get("lora_adapter_metadata", "{}"), place)
    kinds = {key: _TYPES[key.split(".")[-1]] for key in settings if key.split(".")[-1] in _TYPES}
    settings = read_values(settings, kinds, place)
    for key, patterns in settings.items():
        if key.split(".")[-1] == "alpha_pattern":
            for pattern in patterns or {}:
                _check_pattern(pattern, f"{place}: {key}")
    return settings


def _check_pattern(pattern: str, place: str) -> None:
    """Refuse a regular expression: matching one of a file's own can take forever."""
    if set(pattern.removeprefix("^").removesuffix("$")) & set("^$()[]{}|+?\\"):
        raise CheckpointError(
            f"{place} has the pattern {shown(pattern)}; only names of modules are read, in which * may stand "
            "for any characters"
        )


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern, a name with perhaps some *, names the module or the end of its name after a dot."""
    whole = pattern.startswith("^")
    first, *others = pattern.removeprefix("^").removesuffix("$").split("*")
    if not others:
        return module == first or (not whole and module.endswith(f".{first}"))
    starts = [0] if whole else [0, *(place + 1 for place, letter in enumerate(module) if letter == ".")]
    starts = [start for start in starts if module.startswith(first, start)]
    if not starts:
        return False
    at = starts[0] + len(first)  # the first start leaves the most room for the rest
    for part in others[:-1]:
        at = module.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return module.endswith(others[-1]) and len(module) - len(others[-1]) >= at


def _layer(
    path: Path, module: str, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> LoraLayer:
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    rank = down.shape[0] if down.shape else 0
    fits = len(down.shape) in (2, 4) and len(up.shape) in (2, 4) and up.shape[2:] in ((), (1, 1))
    between = (rank, rank) if mid is None else mid.shape[:2]
    joined = fits and between[1] == rank and up.shape[1] == between[0] and rank > 0
    if not joined or (mid is not None and (len(mid.shape) != 4 or down.shape[2:] not in ((), (1, 1)))):
        shapes = ", ".join(f"{tensor.name} {tensor.shape}" for tensor in parts.values())
        raise CheckpointError(f"{path}: the matrices of a layer do not fit together: {shapes}")
    names = tuple(tensor.name for tensor in parts.values())
    if "alpha" in parts:
        alpha = np.asarray(parts["alpha"]).astype(np.float64)
        if alpha.size != 1:
            raise CheckpointError(f"{path}: {parts['alpha'].name} is {alpha.shape}, not one number")
        if not np.isfinite(alpha).all():
            raise CheckpointError(
                f"{path}: {parts['alpha'].name} is {alpha.reshape(())}, which is not finite"
            )
        return LoraLayer(down, up, mid, float(alpha.reshape(())) / rank, names)
    return LoraLayer(down, up, mid, _multiplier(module, rank, settings), names)


def _multiplier(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """alpha / r by the settings of PEFT, 1 without settings. rsLoRA divides by sqrt(r): arXiv:2312.03732."""
    prefix = f"{_component(module)}."
    own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    own = own or settings
    patterns = own.get("alpha_pattern") or {}
    fitting = [number for key, number in patterns.items() if matches(key, module)]
    alpha = fitting[0] if fitting else own.get("lora_alpha", rank)
    return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _is_network(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], nn.Module)


def _places(networks: Mapping[str, tuple[nn.Module, dict]]) -> dict[str, tuple[str, PublishedTensor]]:
    """Every spelling of every module with a weight matrix -> (component, the weight)."""
    places: dict[str, tuple[str, PublishedTensor]] = {}
    for component, (network, params) in networks.items():
        matrices = {
            name.removesuffix(".weight"): tensor
            for name, tensor in published(params).items()
            if tensor.path[-1] == "kernel"
        }
        bare = component in _DENOISERS or len(networks) == 1
        original = _original_names(network.config, matrices)
        for module, tensor in matrices.items():
            for spelling in _spellings(component, module, original.get(module, module), bare):
                places.setdefault(spelling, (component, tensor))
    return places


def _original_names(config: Any, modules: Iterable[str]) -> dict[str, str]:
    """The names of the modules in original files, for U-Nets with such a layout."""
    table = unet_table(config) if isinstance(config, UNet2DConditionConfig) else {}
    names = {}
    for module in modules:
        with contextlib.suppress(CheckpointError):  # a module that the original layout does not have
            names[module] = place_of(module, table).name
    return names


def _spellings(component: str, module: str, original: str, bare: bool) -> Iterator[str]:
    names = {module, *(module.removeprefix(prefix) for prefix in ENCODER_PREFIXES)}
    if not module.startswith(ENCODER_PREFIXES):
        names |= {prefix + module for prefix in ENCODER_PREFIXES}
    yield from (f"{component}.{name}" for name in names)
    if bare:
        yield from names
    for prefix in _KOHYA.get(component, ()):
        yield from (prefix + name.replace(".", "_") for name in (*names, original))


def _check(lora: Lora, places: Mapping[str, tuple[str, PublishedTensor]]) -> None:
    unmatched = [name for name in lora.layers if name not in places]
    problems = [f"no such module: {tensor}" for name in unmatched for tensor in lora.layers[name].tensors]
    for name, layer in lora.layers.items():
        if name in places and not _fits(layer.shape, places[name][1].shape):
            shapes = f"{layer.shape} in the file, {places[name][1].shape} in the model"
            problems.append(f"another shape: {name} is {shapes}")
    if problems:
        others = sorted({_component(name) for name in unmatched} - {part for part, _ in places.values()})
        hint = f"; give {', '.join(others)} among the components, or take lora.of(...)" if others else ""
        raise CheckpointError(f"{lora.path} does not fit the model: {some_of(problems, length=4000)}{hint}")


def _fits(change: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether the shapes are equal, a 1x1 convolution counting as a matrix."""
    plain = [shape[:2] if set(shape[2:]) <= {1} else shape for shape in (change, weight)]
    return plain[0] == plain[1]


def _with_changes(layers: Sequence[tuple[PublishedTensor, LoraLayer]], scale: float) -> Any:
    """The parameter that these layers change, in its dtype and on its devices."""
    first = layers[0][0]
    blocks = []
    for weight in first.all_blocks:
        values = np.asarray(weight)
        for tensor, layer in layers:
            if tensor.block == weight.block:
                change = (scale * layer.change()).reshape(weight.shape)
                values = values.astype(np.float32) + change
        blocks.append(values)
    if isinstance(first.value, jax.Array):
        return placed(blocks, first, first.dtype, first.value.sharding if first.value.committed else None)
    ours = [values.transpose(np.argsort(first.axes)).astype(first.dtype) for values in blocks]
    return ours[0] if first.block is None else np.stack(ours)
