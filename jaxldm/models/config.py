"""Base of the models' configs: plain frozen data, read from and written to a config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self, cast

from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError, one_of

OWN_FIELDS = ("dtype", "remat", "scan")  # of our configs; published configs lack them


@dataclasses.dataclass(frozen=True)
class ModelConfig:
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

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of config.json, without `_class_name`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {self._written_name(name): _listed(value) for name, value in fields.items()}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; absent keys take their default.

        Raises:
            CheckpointError: a key that this architecture does not know, or a value that it does not support.
        """
        names = {cls._written_name(f.name): f.name for f in dataclasses.fields(cls)}
        given = {}
        for key, value in entries.items():
            if key in names:
                given[names[key]] = tuple(value) if isinstance(value, list) else value
            elif key in cls.fixed:
                if value != cls.fixed[key]:
                    raise CheckpointError(
                        f"config.json has {key} = {value!r}; only {cls.fixed[key]!r} is supported"
                    )
            elif key not in cls.ignored and not key.startswith("_"):
                raise CheckpointError(
                    f"config.json has an unknown key {key!r}; known: {', '.join(sorted(names))}"
                )
        try:
            return cls(**given)
        except (TypeError, InvalidArgumentError, UnknownNameError) as error:
            raise CheckpointError(f"config.json does not describe a {cls.__name__}: {error}") from error

    @classmethod
    def _written_name(cls, field: str) -> str:
        return f"_{field}" if cls.published and field in OWN_FIELDS else field


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


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
        f"{levels} block_out_channels need as many down_block_types and up_block_types",
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
