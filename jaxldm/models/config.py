"""Base of the models' configs: plain frozen data, read from and written to a config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self, cast

from jaxldm.entries import check_types, field_types, make, read_values, unknown_key
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.exact import LARGEST_FLOAT32, LARGEST_INT32
from jaxldm.functions import NamedFields
from jaxldm.reading import shown

OWN_FIELDS = ("dtype", "remat", "scan", "scalar_inputs")  # of our configs; published configs lack them
OMITTED = ("scalar_inputs", "head_dim")  # from config.json where they are empty
# The least that a whole number in a config.json may be, where it is not 1. Numbers of tokens are 0 or more.
LOWEST = {
    "depth": 0,
    "freq_shift": 0,
    "extra_conditioning_channels": 0,
    "transformer_layers_per_block": 0,  # of a level without attention
    "reverse_transformer_layers_per_block": 0,
    "downsample_padding": 0,
    "num_layers": 0,
    "num_single_layers": 0,
    "n_refiner_layers": 0,
    "num_res_blocks": 0,
    "encoder_layers_per_block": 0,
    "decoder_layers_per_block": 0,
    "num_classes": 0,
    "dual_attention_layers": 0,
    "axes_dims_rope": 0,
    "axes_dims": 0,
    "route": 0,
    "nhead": -1,  # of a level without attention
    "bos_token_id": -1,
    "eos_token_id": -1,
    "pad_token_id": -1,
}
# The fields that say how many blocks a network has, each of which has tensors of its own.
BLOCK_COUNTS = (
    *("depth", "num_layers", "num_single_layers", "num_hidden_layers", "n_layers", "n_refiner_layers"),
    *("num_res_blocks", "layers_per_block", "transformer_layers_per_block", "blocks", "bottleneck_blocks"),
    *("levels", "num_encoder_blocks", "num_decoder_blocks", "encoder_layers"),
    *("encoder_layers_per_block", "decoder_layers_per_block", "layers_per_down_block", "layers_per_up_block"),
)
TENSORS_OF_A_BLOCK = 4  # at least
ALWAYS_ALLOWED = 2**20  # of a whole number in a config, however small the file of weights
MOST_BLOCKS = 10_000  # that a config may count, whatever the file of weights


@dataclasses.dataclass(frozen=True)
class ModelConfig(NamedFields):
    """Base of the configs: frozen dataclasses of ints, floats, strings, bools, tuples and None.

    The class attributes are for architectures whose config.json other programs read.

    Attributes:
        published: only keys of the published config; our own fields are written with a leading underscore,
            which diffusers treats as private, so that it opens the folder without a warning.
        fixed: published keys that this implementation supports with one value only.
        ignored: published keys without effect here.
        package: the library in model_index.json of a class that diffusers has within one pipeline
            ("wuerstchen"); None for its public classes.
        library: the layout of the folder: "diffusers" (`_class_name` in config.json) or "transformers"
            (`architectures`, and `model_type`).
        model_type: the architecture's name in the config.json of transformers.
    """

    published: ClassVar[bool] = False
    fixed: ClassVar[Mapping[str, Any]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()
    package: ClassVar[str | None] = None
    library: ClassVar[str] = "diffusers"
    model_type: ClassVar[str] = ""

    def __post_init__(self):
        check_types(self)
        for field in dataclasses.fields(self):
            problem = _out_of_range(field.name, getattr(self, field.name))
            if problem is not None:
                raise InvalidArgumentError(problem)
        self.check_values()

    def check_values(self) -> None:
        """Raises `InvalidArgumentError` or `UnknownNameError` for values that do not go together."""

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of config.json, without `_class_name`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            self._written_name(name): _listed(value)
            for name, value in fields.items()
            if value or name not in OMITTED
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; absent keys take their default.

        Raises:
            CheckpointError: a key that this architecture does not know, a value of another type or out of
                range, or one that it does not support.
        """
        names = {cls._written_name(f.name): f.name for f in dataclasses.fields(cast(Any, cls))}
        given = {}
        for key, value in entries.items():
            if key in names:
                given[key] = value
            elif key in cls.fixed:
                if value != cls.fixed[key]:
                    raise CheckpointError(
                        f"config.json has {key} = {shown(value)}; only {cls.fixed[key]!r} is supported"
                    )
            elif key not in cls.ignored and not key.startswith("_"):
                raise CheckpointError(unknown_key("config.json", key, names))
        kinds = {written: field_types(cls)[name] for written, name in names.items()}
        values = read_values(given, kinds, "config.json")
        for key, value in values.items():
            problem = _out_of_range(key, value)
            if problem is not None:
                raise CheckpointError(f"config.json: {problem}")
        return make(cls, {names[key]: value for key, value in values.items()}, "config.json")

    def num_blocks(self) -> int:
        """About how many blocks a network of this config has, whatever their kind; used by `check_size`."""
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        counts = {name: sum(_flat(value or 0)) for name, value in sizes.items() if name in BLOCK_COUNTS}
        inside = [
            sizes[name] for name in ("layers_per_block", "transformer_layers_per_block") if name in sizes
        ]
        of_levels = math.prod(max(_flat(value)) for value in inside)
        levels = len(sizes["block_out_channels"]) if inside else 0
        towers = [value.num_blocks() for value in sizes.values() if isinstance(value, ModelConfig)]
        return sum(counts.values()) + levels * of_levels + sum(towers)

    def table_size(self) -> int:
        """How many numbers a table of positions has that is made when the network is built."""
        return 0

    @classmethod
    def _written_name(cls, field: str) -> str:
        return f"_{field}" if cls.published and field in OWN_FIELDS else field


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _flat(value: Any) -> tuple[Any, ...]:
    """The items of a value, of those that are tuples too."""
    return tuple(item for part in value for item in _flat(part)) if isinstance(value, tuple) else (value,)


def _out_of_range(key: str, value: Any) -> str | None:
    """What is wrong with a number that no extent, index or float32 can be; None where it can."""
    low, high = LOWEST.get(key, 1), MOST_BLOCKS if key in BLOCK_COUNTS else LARGEST_INT32
    for number in _flat(value):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if isinstance(number, int) and not low <= number <= high:
            return f"{key} must be from {low} to {high}, not {shown(value)}"
        if abs(number) > LARGEST_FLOAT32:
            return f"{key} is no number of float32: {shown(value)}"
    return None


def check_size(config: ModelConfig, num_tensors: int, num_numbers: int) -> None:
    """Raise `CheckpointError` where building a network would take more than reading its weights does.

    Args:
        config: of a config.json, or from the shapes in a file of weights.
        num_tensors: in the file of its weights.
        num_numbers: in all of these tensors.
    """
    if config.num_blocks() * TENSORS_OF_A_BLOCK > num_tensors:
        raise CheckpointError(
            f"the config counts {config.num_blocks()} blocks, but its weights hold {num_tensors} tensors: "
            f"{_counts(config)}"
        )
    most = max(ALWAYS_ALLOWED, num_numbers)
    for name, value in _numbers(config):
        if value > most:
            raise CheckpointError(
                f"the config has {name} = {value}, but its weights hold {num_numbers} numbers"
            )
    if config.table_size() > 4 * most:
        raise CheckpointError(
            f"the config has positions of {config.table_size()} numbers, but its weights hold {num_numbers}"
        )


def _numbers(config: Any) -> Iterable[tuple[str, int]]:
    """The name and value of each whole number of a config."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value)
        for number in _flat(value):
            if isinstance(number, int):
                yield field.name, number


def _counts(config: Any) -> str:
    return ", ".join(f"{name} = {value}" for name, value in _numbers(config) if name in BLOCK_COUNTS)


def check(condition: bool, message: str) -> None:
    """Raise `InvalidArgumentError(message)` unless the condition holds."""
    if not condition:
        raise InvalidArgumentError(message)


def check_levels(config: Any, down_blocks: Iterable[str], up_blocks: Iterable[str]) -> None:
    """Check that `config` names a known down block and a known up block for each level.

    Raises:
        InvalidArgumentError: their number is not that of `block_out_channels`.
        UnknownNameError: a block type that is not in `down_blocks` or `up_blocks`.
    """
    levels = len(config.block_out_channels)
    check(
        len(config.down_block_types) == len(config.up_block_types) == levels,
        f"{levels} block_out_channels need {levels} down_block_types and {levels} up_block_types, not "
        f"{len(config.down_block_types)} and {len(config.up_block_types)}",
    )
    for kinds, known in ((config.down_block_types, down_blocks), (config.up_block_types, up_blocks)):
        for kind in kinds:
            one_of("block type", kind, known)


def check_heads(hidden_size: int, num_attention_heads: int) -> None:
    """Raise `InvalidArgumentError` unless the width can be split into that many heads."""
    check(
        hidden_size % num_attention_heads == 0,
        f"hidden_size {hidden_size} cannot be split into {num_attention_heads} heads",
    )


def check_groups(block_out_channels: tuple[int, ...], norm_num_groups: int) -> None:
    """Raise `InvalidArgumentError` unless the groups of the normalisation divide every channel count."""
    for channels in block_out_channels:
        check(
            norm_num_groups > 0 and channels % norm_num_groups == 0,
            f"{channels} channels cannot be split into {norm_num_groups} groups",
        )


def height_width(sample_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of a `sample_size`: one number for a square, a pair, or None, which means 64."""
    if sample_size is None:
        return 64, 64
    if isinstance(sample_size, int):
        return sample_size, sample_size
    return cast(tuple[int, int], tuple(sample_size))
