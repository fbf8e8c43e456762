"""Where the parameters of a network lie on a mesh: by rule, from their names and shapes.

A mesh has the axes `data` (examples), `fsdp` (weights, each as a part that is fetched where it is used) and
`tensor` (heads and hidden layers: each device computes its own). A rule is (pattern, `PartitionSpec`): the
pattern is one of a parameter's whole path, "transformer_blocks_0/attn/to_q/kernel", and the spec says how the
last axes of such parameters are split. The first rule whose pattern matches counts. Where it does not name
`fsdp`, that splits the largest axis that is left.

No number is computed otherwise: the compiler puts in what has to move between the devices.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxldm.arguments import a_params, checked, count, instance, optional, refuse, some_devices
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.nn.block_stack import STACK
from jaxldm.nn.initialization import drawn_in_parts

AXES = ("data", "fsdp", "tensor")
Rule: TypeAlias = tuple[str, PartitionSpec]
AnyMesh: TypeAlias = Mesh | AbstractMesh

# The second of two products, of an attention or an MLP: its input is split, as the output of the first is,
# and what the devices have of the result is added up (Shoeybi et al. 2019, Megatron-LM, section 3).
_SECOND = PartitionSpec("tensor", None)
RULES: tuple[Rule, ...] = (
    (r"(.*/)?(to_out_0|to_add_out|out_proj|o_proj|o|attn/proj|output/dense)/kernel", _SECOND),
    # FLUX and FLUX.2: of attention and MLP together.
    (r"(.*/)?single_transformer_blocks_\w+/(proj_out|attn/to_out)/kernel", _SECOND),
    (r"(.*/)?(fc2|net_2|wo|down_proj|w2|linear_2|linear_out|mlp_2)/kernel", _SECOND),
    (r"(.*/)?(channelwise_4|channelwise_linear_2|conv2)/kernel", _SECOND),
    (r".*(kernel|embedding)", PartitionSpec("tensor")),  # all others: their output
)


def a_mesh(name: str, value: Any) -> Mesh:
    """A mesh with the axes data, fsdp and tensor."""
    mesh = instance(Mesh, "a mesh such as models.make_mesh(tensor=4)")(name, value)
    if mesh.axis_names != AXES:
        raise InvalidArgumentError(
            f"{name} must have the axes {', '.join(AXES)}, got {', '.join(map(str, mesh.axis_names))}: make "
            "it with models.make_mesh(fsdp=..., tensor=...)"
        )
    return mesh


def any_mesh(name: str, value: Any) -> AnyMesh:
    """The same, or one of sizes alone."""
    if isinstance(value, AbstractMesh) and value.axis_names == AXES:
        return value
    return a_mesh(name, value)


def some_rules(name: str, value: Any) -> tuple[Rule, ...]:
    """Pairs of a pattern and a `PartitionSpec` over the axes of a mesh."""
    wanted = 'pairs such as [(".*/fc1/kernel", PartitionSpec(None, "tensor"))]'
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise refuse(name, wanted, value)
    for rule in value:
        if not isinstance(rule, Sequence) or len(rule) != 2 or not isinstance(rule[0], str):
            raise refuse(f"each of {name}", wanted, rule)
        if not isinstance(rule[1], PartitionSpec):
            raise refuse(f"the second of each of {name}", "a jax.sharding.PartitionSpec", rule[1])
        try:
            re.compile(rule[0])
        except re.error as error:
            raise InvalidArgumentError(f"{name}: {shown(rule[0])} is no pattern: {error}") from error
        unknown = [axis for axis in _axes(rule[1]) if axis not in AXES]
        if unknown or len(set(_axes(rule[1]))) < len(_axes(rule[1])):
            raise InvalidArgumentError(
                f"{name}: {shown(rule[0])} is split over {', '.join(map(str, _axes(rule[1])))}; a mesh has "
                f"the axes {', '.join(AXES)}, each of them once"
            )
    return tuple((pattern, spec) for pattern, spec in value)


def devices_or_number(name: str, value: Any) -> Any:
    """Some devices, or how many of them."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise refuse(name, "a number of devices, or some of jax.devices()", value)
    return some_devices(name, value.ravel() if isinstance(value, np.ndarray) else value)


@checked(devices=optional(devices_or_number), fsdp=count(1), tensor=count(1))
def make_mesh(devices: Sequence[Any] | int | None = None, *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over `devices` (None: all of them; a number: the first so many), the rest of them along `data`.

    Raises:
        InvalidArgumentError: there are not so many devices, or `fsdp * tensor` does not divide them.
    """
    if devices is None:
        devices = jax.devices()
    elif isinstance(devices, int):
        if not 1 <= devices <= jax.device_count():
            raise InvalidArgumentError(
                f"devices must lie in [1, {jax.device_count()}] on this machine, got {devices}"
            )
        devices = jax.devices()[:devices]
    if len(devices) % (fsdp * tensor):
        raise InvalidArgumentError(
            f"fsdp * tensor must divide the {len(devices)} devices, got fsdp={fsdp} and tensor={tensor}"
        )
    return Mesh(np.asarray(devices).reshape(-1, fsdp, tensor), AXES)


@checked(mesh=any_mesh, rules=some_rules)
def sharding_of(mesh: AnyMesh, rules: Sequence[Rule] = RULES) -> Callable[..., NamedSharding]:
    """The rules as a function (path, shape) -> sharding, as `checkpoints.load(sharding=...)` takes it.

    >>> from jaxldm import models
    >>> mesh = jax.sharding.AbstractMesh((1, 2, 4), models.sharding.AXES)
    >>> place = models.sharding_of(mesh)
    >>> tuple(place(("blocks_0", "attn", "to_q", "kernel"), (64, 128)).spec)
    ('fsdp', 'tensor')
    >>> tuple(place(("blocks_0", "attn", "to_out_0", "kernel"), (128, 64)).spec)
    ('tensor', 'fsdp')
    """

    def place(path: Sequence[str], shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(mesh, split(mesh, path, shape, rules)[1])

    return place


def drawn_on(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Within it `models.init` draws each device's part of each parameter there, and no array whole."""
    return drawn_in_parts(sharding_of(mesh))


@checked(mesh=any_mesh, params=a_params, rules=some_rules)
def shardings(mesh: AnyMesh, params: Mapping[str, Any], rules: Sequence[Rule] = RULES) -> dict[str, Any]:
    """The sharding of each parameter of a network, or of its shapes: a tree of the same structure."""
    place, flat = sharding_of(mesh, rules), _flat(params)
    return traverse_util.unflatten_dict({path: place(path, leaf.shape) for path, leaf in flat.items()})


def split(
    mesh: AnyMesh, path: Sequence[str], shape: Sequence[int], rules: Sequence[Rule]
) -> tuple[str | None, PartitionSpec]:
    """(the pattern that counts, or None; the spec) of a parameter.

    Numbers and vectors are whole, and so is an axis that cannot be split evenly. The axis that counts the
    blocks of a scan is never split: each step of the scan takes one whole.

    Raises:
        InvalidArgumentError: a rule that splits more axes than the parameter has.
    """
    name, first = "/".join(path), any(map(STACK.fullmatch, path))
    own = len(shape) - first
    pattern, spec = next((rule for rule in rules if re.fullmatch(rule[0], name)), (None, PartitionSpec()))
    if len(spec) > own > 1:
        raise InvalidArgumentError(
            f"the rule {shown(pattern)} splits {len(spec)} axes, and {name} has {own}, {list(shape)}"
        )
    if own < 2:
        return pattern, PartitionSpec()
    entries: list[Any] = [None] * (len(shape) - len(spec)) + list(spec)
    for axis, entry in enumerate(entries):
        if entry is not None and shape[axis] % math.prod(mesh.shape[name] for name in _names(entry)):
            entries[axis] = None
    if "fsdp" not in _axes(spec):
        entries[first:] = with_fsdp(entries[first:], shape[first:], mesh.shape["fsdp"])
    return pattern, plain(mesh, entries)


def with_fsdp(entries: Sequence[Any], shape: Sequence[int], parts: int) -> list[Any]:
    """The entries of a spec with `fsdp` on the largest axis that is left and can be split evenly.

    Source: Rajbhandari et al. 2020 (ZeRO, stage 3).
    """
    entries = list(entries)
    even = [axis for axis, name in enumerate(entries) if name is None and shape[axis] % parts == 0]
    if parts > 1 and even:
        entries[max(even, key=lambda axis: shape[axis])] = "fsdp"
    return entries


def plain(mesh: AnyMesh, entries: Sequence[Any]) -> PartitionSpec:
    """The spec as JAX writes that of an output: equal ones compile once."""
    entries = [None if entry is None or not _over(mesh, entry) else entry for entry in entries]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def check_splits(mesh: AnyMesh, networks: Mapping[str, Any], rules: Sequence[Rule] = ()) -> None:
    """Raise `InvalidArgumentError` for a mesh that splits none of the networks, or rules that match nothing.

    Args:
        networks: parameters, or their shapes, by names of networks.
        rules: before the usual ones.
    """
    flat = {
        (network, *path): tuple(leaf.shape)
        for network, params in networks.items()
        for path, leaf in _flat(params).items()
    }
    check_rules(rules, ["/".join(path[1:]) for path in flat])
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        raise InvalidArgumentError(
            f"a mesh with data={mesh.shape['data']} alone splits no weights: give fsdp or tensor, or leave "
            "the mesh out and name devices, which get a copy each"
        )
    specs = [split(mesh, path[1:], shape, (*rules, *RULES))[1] for path, shape in flat.items()]
    for axis in ("fsdp", "tensor"):
        if mesh.shape[axis] > 1 and not any(axis in _axes(spec) for spec in specs):
            raise InvalidArgumentError(
                f"{axis}={mesh.shape[axis]} divides no axis of any of the {len(specs)} parameters, so it "
                f"would split nothing: choose another {axis}"
            )


def check_rules(rules: Sequence[Rule], names: Sequence[str]) -> None:
    """Raise `InvalidArgumentError` for a pattern that matches none of the paths of parameters."""
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, name) for name in names):
            example = next((name for name in names if name.endswith("kernel")), names[0])
            raise InvalidArgumentError(
                f"no parameter's path matches {shown(pattern)}: a pattern is that of a whole path, such as "
                f"{example}"
            )


class RuleCount(NamedTuple):
    """What a rule does to the parameters of a network.

    Attributes:
        pattern: None for parameters that no rule matches.
        spec: of the rule.
        arrays: parameters that it splits.
        numbers: in all of them.
        per_device: numbers that a device has of them.
    """

    pattern: str | None
    spec: PartitionSpec
    arrays: int
    numbers: int
    per_device: int


def count_by_rule(mesh: AnyMesh, params: Mapping[str, Any], rules: Sequence[Rule] = RULES) -> list[RuleCount]:
    """What each rule does to the parameters of a network, or to their shapes; the rest comes last."""
    found = {
        pattern: RuleCount(pattern, spec, 0, 0, 0) for pattern, spec in (*rules, (None, PartitionSpec()))
    }
    for path, leaf in _flat(params).items():
        pattern, spec = split(mesh, path, leaf.shape, rules)
        before, here = found[pattern], NamedSharding(mesh, spec).shard_shape(tuple(leaf.shape))
        found[pattern] = before._replace(
            arrays=before.arrays + 1,
            numbers=before.numbers + math.prod(leaf.shape),
            per_device=before.per_device + math.prod(here),
        )
    return list(found.values())


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh over which arrays of a tree are split by rule; None where each device has all of them."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
            continue
        if isinstance(sharding.mesh, Mesh) and sharding.mesh.axis_names == AXES:
            return sharding.mesh
    return None


def _flat(params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """{path: the parameter, or its shape}."""
    return cast(Any, traverse_util.flatten_dict(params))


def _names(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _axes(spec: PartitionSpec) -> list[str]:
    return [name for entry in spec if entry is not None for name in _names(entry)]


def _over(mesh: AnyMesh, entry: Any) -> int:
    """Whether an entry splits anything."""
    return math.prod(mesh.shape[name] for name in _names(entry)) > 1
