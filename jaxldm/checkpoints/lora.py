"""LoRA files: small matrices that change the weights of a published model. Hu et al. 2021, arXiv:2106.09685.

W' = W + scale * (alpha / r) * up @ down, with `down` of r rows and `up` of r columns; `lora_layers` has the
other kinds: DoRA, LoHa, LoKr, whole differences, biases. Programs name the same module in many ways, not all
of which can be parsed: `lora_names` spells every module of the model in every way, and names are looked up.

Every layer has its own alpha, as in kohya's scripts. diffusers 0.42 replaces those of attention layers, where
they differ within a file, by the most common one, so that its fused weights differ.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from jaxldm import models
from jaxldm.arguments import a_path, checked, instance, number, several
from jaxldm.checkpoints.file_kinds import check_kind_of_file
from jaxldm.checkpoints.lora_layers import LoraLayer, Whole, change_fits, kind_of_change
from jaxldm.checkpoints.lora_names import DENOISERS, Target, component_of, targets
from jaxldm.checkpoints.names import COMPONENTS, PublishedTensor, placed
from jaxldm.checkpoints.original.layout import Form
from jaxldm.checkpoints.safetensors_file import StoredTensor, open_safetensors
from jaxldm.checkpoints.torch_file import PICKLES, read_torch_file
from jaxldm.entries import read_values
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.models.quantization import with_factors
from jaxldm.reading import parse_json, read_json, reading, shown, some_of

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers, of PEFT
_TENSOR = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.lora_(?P<peft>[AB])(?:\.[\w-]+)?\.(?P<leaf>weight|bias)"  # with the adapter's name in it, or without
    r"|(?P<old>_lora)?\.(?:lora_linear_layer\.|lora\.|lora_)?(?P<part>down|up|mid)\.weight"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.[\w-]+)?(?:\.weight)?"
    r"|\.(?P<lycoris>(?:hada|lokr)_\w+)(?:\.[\w-]+)?"
    r"|\.(?P<one>alpha|dora_scale|diff|diff_b|w_norm|b_norm|(?<=_norm\.)scale))"
)
_OLD_PROJECTIONS = {
    "to_q_lora": ("to_q", "q_proj"),
    "to_k_lora": ("to_k", "k_proj"),
    "to_v_lora": ("to_v", "v_proj"),
    "to_out_lora": ("to_out.0", "out_proj"),
}


def _role(match: re.Match[str]) -> str:
    """What a tensor is in its layer, by its name."""
    if match["peft"]:
        if match["leaf"] == "bias":
            return "bias" if match["peft"] == "B" else ""
        return {"A": "down", "B": "up"}[match["peft"]]
    return match["part"] or match["lycoris"] or match["one"] or "magnitude"


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
        wanted = {*components, *(DENOISERS if set(DENOISERS) & set(components) else ())}
        layers = {name: layer for name, layer in self.layers.items() if component_of(name) in wanted}
        return self._replace(layers=layers)


@checked(path=a_path)
def load_lora(path: Path | str) -> Lora:
    """Opens a LoRA file of any program in `lora_names`, or the folder that holds one.

    Raises:
        CheckpointError: no such file, a pickle file, a damaged one, one without LoRA layers or of another
            kind; tensors that belong to no kind of layer in `lora_layers` or have no counterpart: they are
            named.

    >>> from jaxldm import checkpoints                                                   # doctest: +SKIP
    >>> lora = checkpoints.load_lora("pixel-art.safetensors")                            # doctest: +SKIP
    >>> components = checkpoints.merge_lora(checkpoints.load_components(folder), lora)   # doctest: +SKIP
    """
    path = _file(Path(path))
    if path.suffix in PICKLES:  # of a LoRA it is refused below, and of another kind it may be read elsewhere
        check_kind_of_file(path, read_torch_file(path), "a LoRA")
    tensors, metadata = open_safetensors(path)
    check_kind_of_file(path, tensors, "a LoRA")
    with reading(path):
        return _read_layers(path, tensors, metadata)


def _read_layers(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> Lora:
    """The layers of a file, by the names of its tensors."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        role = _role(match) if match else ""
        module = _module(match["module"] + (match["old"] or "")) if match else ""
        if not role or role in modules.setdefault(module, {}):
            unknown.append(f"{name} {tensor.shape}")
        else:
            modules[module][role] = tensor
    kinds: dict[str, Any] = {}
    for module, parts in modules.items():
        try:
            kinds[module] = kind_of_change(parts) if parts else None
        except ValueError:
            unknown += [f"{part.name} {part.shape}, without its counterpart" for part in parts.values()]
    if unknown:
        raise CheckpointError(
            f"{path} holds tensors that are not of a LoRA, DoRA, LoHa or LoKr as it is known here: "
            + some_of(unknown, length=4000)
        )
    modules = {module: parts for module, parts in modules.items() if parts}
    if not modules:
        raise CheckpointError(f"{path} holds no LoRA layers")
    settings = _settings(path, metadata)
    layers = {
        module: _layer(path, module, kinds[module], parts, settings) for module, parts in modules.items()
    }
    return Lora(path, layers)


A_LORA = instance(Lora, "a LoRA from checkpoints.load_lora(path)")


def a_scale(name: str, value: Any) -> Any:
    """One number, or one for each component by its name."""
    if isinstance(value, Mapping):
        return {key: number()(f"{name}[{shown(key)}]", each) for key, each in value.items()}
    return number()(name, value)


def some_loras(name: str, value: Any) -> Any:
    """One LoRA, or several."""
    if isinstance(value, (list, tuple)) and not isinstance(value, Lora):
        return several(A_LORA, "LoRAs from checkpoints.load_lora(path)")(name, value)
    return A_LORA(name, value)


def some_scales(name: str, value: Any) -> Any:
    """The scale of one LoRA, or those of several."""
    if isinstance(value, (list, tuple)):
        return [a_scale(f"{name}[{place}]", each) for place, each in enumerate(value)]
    return a_scale(name, value)


def scale_of_each(count: int, scale: Any) -> list[Any]:
    """A scale for each of so many LoRAs; one is that of all."""
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
    if len(scales) != count:
        raise InvalidArgumentError(
            f"scale has {len(scales)} numbers for {count} LoRAs: give one for all, or one for each"
        )
    return scales


Change = tuple[PublishedTensor, Callable[[], np.ndarray]]


@checked(components=COMPONENTS, lora=some_loras, scale=some_scales)
def merge_lora(
    components: Mapping[str, Any],
    lora: Lora | Sequence[Lora],
    scale: float | Mapping[str, float] | Sequence[float | Mapping[str, float]] = 1.0,
) -> dict[str, Any]:
    """Adds LoRAs to the weights: W + scale * change in place of W, see `lora_layers`.

    Changes of several LoRAs add up, each of them that of the weights as they are given: a DoRA with other
    adapters next to it does not depend on their order. One weight at a time, in float32; each keeps its dtype
    and its devices. A quantised weight stays what it is, and the changes are added to its low-rank branch.

    Args:
        components: of `load_components`: name -> (module, params); entries that are no networks pass through.
        lora: of `load_lora`, one or several.
        scale: one number for all components, or one for each; components that it does not name are unchanged.
            Of several LoRAs one for all, or a list.

    Returns:
        The components with the changed weights.

    Raises:
        CheckpointError: layers that match no module of the components, or have another shape than its weight:
            all are named, and nothing is merged; NaN.
        UnknownNameError: `scale` names a component that is not given.
        InvalidArgumentError: another number of scales than of LoRAs.
    """
    networks = {name: part for name, part in components.items() if _is_network(part)}
    loras = [lora] if isinstance(lora, Lora) else list(lora)
    places = targets(networks)
    changes: dict[tuple[str, tuple[str, ...]], list[Change]] = {}
    for one, own in zip(loras, scale_of_each(len(loras), scale), strict=True):
        scales = _scales(own, networks)
        _check(one, places, networks)
        for module, layer in one.layers.items():
            target = places[module]
            if target.component in scales:
                for tensor, change in _changes(layer, target, scales[target.component]):
                    changes.setdefault((target.component, tensor.path), []).append((tensor, change))
    changed: dict[str, dict] = {name: {} for name in networks}
    for (component, path), of_one_parameter in changes.items():
        changed[component][path] = _with_changes(of_one_parameter)
    merged = dict(components)
    for name, (module, params) in networks.items():
        flat = traverse_util.flatten_dict(params) | changed[name]
        merged[name] = (module, traverse_util.unflatten_dict(flat))
    return merged


def _scales(scale: float | Mapping[str, float], networks: Mapping[str, Any]) -> dict[str, float]:
    """The scale of each component that is to change."""
    if not isinstance(scale, Mapping):
        return dict.fromkeys(networks, float(scale))
    return {one_of("component of scale", name, networks): float(number) for name, number in scale.items()}


def _changes(layer: LoraLayer, target: Target, scale: float) -> Iterator[Change]:
    """The published tensors that a layer changes, each with a function for what is added to it."""

    def weight() -> np.ndarray:
        (_, form), *_ = target.weight
        return np.asarray(form.from_published(*(np.asarray(tensor) for tensor, _ in target.weight)))

    def of_weight(form: Form) -> np.ndarray:
        return scale * np.asarray(form.to_published(layer.weight_change(weight)))

    def of_bias(form: Form) -> np.ndarray:
        return scale * np.asarray(form.to_published(layer.bias_change()))

    if layer.of_weight is not None:
        yield from ((tensor, functools.partial(of_weight, form)) for tensor, form in target.weight)
    if layer.bias is not None:
        yield from ((tensor, functools.partial(of_bias, form)) for tensor, form in target.bias)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if isinstance(config, Mapping) and "_class_name" in config:
        raise CheckpointError(
            f"{path} holds a network, {shown(config['_class_name'])}, and no LoRA: give the path of a LoRA "
            "file; ControlNets go to --controlnet, in Python to pipelines.with_control"
        )
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


_TYPES = {
    "lora_alpha": float,
    "alpha": float,
    "r": int,
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
    path: Path, module: str, kind: Any, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> LoraLayer:
    tensors = {tensor.name: tensor for tensor in parts.values()}
    try:
        multiplier = 1.0
        if kind is not None and kind.shape and not isinstance(kind, Whole):
            multiplier = _multiplier(module, kind.rank, _alpha(path, parts), settings)
    except ValueError as error:
        shapes = ", ".join(f"{tensor.name} {tensor.shape}" for tensor in parts.values())
        raise CheckpointError(f"{path}: the matrices of a layer do not fit together: {shapes}") from error
    bias = next((parts[name] for name in ("bias", "diff_b", "b_norm") if name in parts), None)
    magnitude = parts.get("magnitude", parts.get("dora_scale"))
    shape = cast(tuple[int, ...], () if kind is None else kind.shape)
    if magnitude is not None and (len(shape) < 2 or isinstance(kind, Whole)):
        raise CheckpointError(f"{path}: {magnitude.name} is of a layer without matrices")
    by_columns = magnitude is not None and (
        "dora_scale" in parts and magnitude.shape[:1] == (1,) and shape[0] != 1
    )
    if magnitude is not None and math.prod(magnitude.shape) != shape[1 if by_columns else 0]:
        raise CheckpointError(
            f"{path}: {magnitude.name} is {magnitude.shape}, which is no length for each of {shape[0]} rows "
            f"or {shape[1]} columns"
        )
    bias_multiplier = multiplier if "bias" in parts else 1.0
    return LoraLayer(kind, multiplier, magnitude, by_columns, bias, bias_multiplier, tensors)


def _alpha(path: Path, parts: Mapping[str, StoredTensor]) -> float | None:
    """The alpha that stands among the tensors."""
    if "alpha" not in parts:
        return None
    name, alpha = parts["alpha"].name, np.asarray(parts["alpha"]).astype(np.float64)
    if alpha.size != 1:
        raise CheckpointError(f"{path}: {name} is {alpha.shape}, not one number")
    if not np.isfinite(alpha).all():
        raise CheckpointError(f"{path}: {name} is {alpha.reshape(())}, which is not finite")
    return float(alpha.reshape(()))


def _multiplier(module: str, rank: int | None, alpha: float | None, settings: Mapping[str, Any]) -> float:
    """alpha / r: of the tensors, or by the settings of PEFT; 1 without both, or where there is no r.

    rsLoRA divides by sqrt(r): arXiv:2312.03732.
    """
    if alpha is not None:
        return 1.0 if rank is None else alpha / rank
    prefix = f"{component_of(module)}."
    own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    own = own or settings
    rank = own.get("r") if rank is None else rank
    if not rank:
        return 1.0
    patterns = own.get("alpha_pattern") or {}
    fitting = [number for key, number in patterns.items() if matches(key, module)]
    alpha = fitting[0] if fitting else own.get("lora_alpha", own.get("alpha", rank))
    return float(cast(float, alpha)) / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _is_network(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], nn.Module)


def _check(lora: Lora, places: Mapping[str, Target], networks: Mapping[str, Any]) -> None:
    """Raise `CheckpointError`, with all names, unless every layer has its place and fits there."""
    unmatched = [name for name in lora.layers if name not in places]
    problems = [f"no such module: {tensor}" for name in unmatched for tensor in lora.layers[name].tensors]
    for name, layer in lora.layers.items():
        if name not in places:
            continue
        bias = None if layer.bias is None else (math.prod(layer.bias.shape),)
        for shape, parts, leaf in (
            (layer.shape, places[name].weight, "weight"),
            (bias, places[name].bias, "bias"),
        ):
            problems += [] if shape is None else _misfits(name, shape, parts, leaf)
    if problems:
        here = {*networks, *({"unet"} if set(DENOISERS) & set(networks) else ())}
        others = sorted({component_of(name) for name in unmatched} - here)
        hint = f"; give {', '.join(others)} among the components, or take lora.of(...)" if others else ""
        if len(unmatched) == len(lora.layers):
            hint = "; it is of another model, as none of its layers is here: give one made for this one"
            hint += f", or {', '.join(others)} among the components" if others else ""
        raise CheckpointError(f"{lora.path} does not fit the model: {some_of(problems, length=4000)}{hint}")


def _misfits(
    name: str, shape: tuple[int, ...], parts: Sequence[tuple[PublishedTensor, Form]], leaf: str
) -> Iterator[str]:
    """What is wrong with a change of that shape for these tensors."""
    if not parts:
        yield f"no such {leaf}: {name}"
    stub = np.broadcast_to(np.float32(0), shape)
    for tensor, form in parts:
        part = tuple(form.to_published(stub).shape)
        if not change_fits(part, tuple(tensor.shape)):
            yield f"another shape: {name} is {part} in the file, {tuple(tensor.shape)} in the model"


def _with_changes(changes: Sequence[Change]) -> Any:
    """The parameter with these changes added, in its dtype and on its devices."""
    first = changes[0][0]
    if isinstance(first.value, models.Quantized):
        return _with_branch(first.value, changes)
    blocks = []
    for weight in first.all_blocks:
        values = np.asarray(weight)
        own = [change for tensor, change in changes if tensor.block == weight.block]
        if own:
            values = values.astype(np.float32) + sum(change().reshape(weight.shape) for change in own)
        blocks.append(values)
    if isinstance(first.value, jax.Array):
        return placed(blocks, first, first.dtype, first.value.sharding if first.value.committed else None)
    ours = [values.transpose(np.argsort(first.axes)).astype(first.dtype) for values in blocks]
    return ours[0] if first.block is None else np.stack(ours)


def _with_branch(kernel: models.Quantized, changes: Sequence[Change]) -> models.Quantized:
    """A quantised kernel with these changes in its branch, as factors in float32; 0 in other blocks."""
    first, *window = changes[0][0], *kernel.kernel_shape[:-2]
    inputs, out = kernel.kernel_shape[-2:]
    pairs = []
    for weight in first.all_blocks:
        own = [
            change().reshape(out, inputs, *window)
            for tensor, change in changes
            if tensor.block == weight.block
        ]
        # As our kernels have it, [*window, in, out], in one matrix.
        whole = np.moveaxis(sum(own, np.zeros((out, inputs, *window), np.float32)), (0, 1), (-1, -2))
        pairs.append(factors_of(whole.reshape(-1, out).astype(np.float32)))
    rank = max(up.shape[0] for _, up in pairs)
    padded = [
        (np.pad(down, ((0, 0), (0, rank - down.shape[1]))), np.pad(up, ((0, rank - up.shape[0]), (0, 0))))
        for down, up in pairs
    ]
    stack = () if first.block is None else (len(pairs),)
    down, up = (np.stack(each) for each in zip(*padded, strict=True))
    down = down.reshape(*stack, *kernel.kernel_shape[:-1], rank)
    return with_factors(kernel, jax.numpy.asarray(down), jax.numpy.asarray(up.reshape(*stack, rank, out)))


def factors_of(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q and R with Q R = matrix to five digits, of about the matrix's own rank.

    Q spans the image of a few random vectors (Halko et al. 2011, algorithm 4.1): of a LoRA's change, whose
    rank is small, that is all of it.
    """
    rows, columns = matrix.shape
    draws, rank, size = np.random.default_rng(0), 8, np.linalg.norm(matrix)
    while rank < min(rows, columns):
        image = matrix @ draws.normal(size=(columns, rank)).astype(np.float32)
        basis = np.linalg.qr(image)[0]
        rest = basis.T @ matrix
        if np.linalg.norm(matrix - basis @ rest) <= 1e-5 * size:
            return basis, rest
        rank *= 2
    return (
        (matrix, np.eye(columns, dtype=np.float32))
        if columns <= rows
        else (np.eye(rows, dtype=np.float32), matrix)
    )
