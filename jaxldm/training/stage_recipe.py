"""What the recipes of all stages have: the numbers of the updates, and what their fields are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from jaxldm import diffusion as D
from jaxldm.entries import Read, check_types
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.functions import NamedFields
from jaxldm.reading import shown
from jaxldm.training.optimizer import OPTIMIZERS
from jaxldm.training.power_ema import SOME_LENGTHS

AUTO = 0  # a batch size: the largest that fits into memory


def _tupled(value: Any, place: str) -> Any:
    """The options of a file, whose lists stand for tuples."""
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"{place} must be an object, not {shown(value)}")
    return deep_tuples(value)


def deep_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: deep_tuples(entry) for key, entry in value.items()}
    return tuple(deep_tuples(entry) for entry in value) if isinstance(value, (tuple, list)) else value


Options = Annotated[Mapping[str, Any], Read(_tupled)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdatesRecipe(NamedFields):
    """The updates of a stage, whatever is trained.

    Attributes:
        epochs: how often each example is seen.
        batch_size: examples in an update; 0: as many as fit into memory (`jaxldm.training.batch_size`).
        accumulate: the batch is computed in so many parts, one after another: with the memory of a part.
        optimizer: "adamw", "lion", "muon", "schedule_free_adamw" or "prodigy".
        learning_rate, final_scale, weight_decay, max_grad_norm, b1, b2: see `jaxldm.training.optimizer`.
        warmup_epochs: of the learning rate; may be a fraction.
        ema_decay: of the moving average of the parameters, which is what the finished model then holds.
        power_ema: relative lengths of the power-function averages that each checkpoint keeps besides, such
            as (0.05, 0.1): `jaxldm.training.post_hoc_ema` makes one of any length of them.
        dtype: compute type, "float32" or "bfloat16"; parameters, loss and optimizer are float32.
        save_every: epochs between checkpoints; 0: only at the end. (On Ctrl-C there is always one.)
        sample_every: epochs between pictures of what the model makes; 0: none.
        keep_checkpoints: the newest so many stay; `jaxldm inspect` measures those of the denoising network.
    """

    epochs: int = 10
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup_epochs: float = 0.5
    final_scale: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    ema_decay: float | None = None
    power_ema: tuple[float, ...] = ()
    dtype: str = "float32"
    save_every: int = 5
    sample_every: int = 0
    keep_checkpoints: int = 2

    def __post_init__(self):
        check_types(self)
        for name in ("epochs", "accumulate", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.batch_size < 1 and self.batch_size != AUTO:
            raise InvalidArgumentError(
                f"batch_size must be >= 1, or 0 for as many as fit into memory, got {self.batch_size}"
            )
        for name in ("warmup_epochs", "save_every", "sample_every"):
            if not getattr(self, name) >= 0:
                raise InvalidArgumentError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise InvalidArgumentError(f"ema_decay must be in [0, 1), or be None, got {self.ema_decay}")
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        SOME_LENGTHS("power_ema", self.power_ema)
        if self.optimizer == "schedule_free_adamw" and self.ema_decay is not None:
            raise InvalidArgumentError(
                "schedule_free_adamw keeps its own average of the parameters: leave ema_decay out (None)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRecipe(UpdatesRecipe):
    """A stage that trains a network from the beginning.

    Attributes:
        preset: a name in `jaxldm.models.PRESETS`.
        overrides: changed fields of its config. Image size, channels and number of classes come from the
            data and need not be given.
    """

    preset: str
    overrides: Options = dataclasses.field(default_factory=dict)


def check_not_negative(recipe: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(recipe, name) < float("inf"):
            raise InvalidArgumentError(f"{name} must be >= 0, got {getattr(recipe, name)}")


# Name of a weight of the loss -> maker.
WEIGHTS: dict[str, Callable[..., Callable[[Any], Any]]] = {"min_snr": D.min_snr, "p2": D.p2}


def from_table(kind: str, table: Mapping[str, Callable[..., Any]], entry: Mapping[str, Any] | None) -> Any:
    """What a recipe's entry {"name": ..., option: ...} stands for; None stays None."""
    if entry is None:
        return None
    options = dict(entry)
    make = table[one_of(kind, options.pop("name", None), table)]
    try:
        return make(**options)
    except TypeError as error:
        raise InvalidArgumentError(f"{kind} {shown(dict(entry))}: {error}") from error
