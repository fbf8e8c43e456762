"""What a stage is (`Task`, `Job`), and what the stages share: network, optimizer, plan, keys, pictures."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, PRNGKeyArray

from jaxldm import models
from jaxldm.data import ArrayRows, Dataset, Rows
from jaxldm.data.batches import RowsAt, RowsView
from jaxldm.data.buckets import buckets_of
from jaxldm.data.folders import FolderRows
from jaxldm.errors import DivergenceError, InvalidArgumentError
from jaxldm.exact import LARGEST_INT32, round_product
from jaxldm.files import write_atomically
from jaxldm.memory import check_fits
from jaxldm.metrics.health import Finding, check_blank, check_skipped, failed, report
from jaxldm.metrics.pictures import labelled_grid, save_png
from jaxldm.training.fitting_batches import training_images
from jaxldm.training.log import read_log
from jaxldm.training.loop import Plan
from jaxldm.training.mesh import check_batch_size, numbers_per_device
from jaxldm.training.optimizer import Optimizer, optimizer
from jaxldm.training.recipes import Recipe, StageRecipe
from jaxldm.training.runs import RunFolder, StageFolder
from jaxldm.training.stage_recipe import UpdatesRecipe
from jaxldm.training.state import Params, TrainState
from jaxldm.training.step import LossFunction, Player

LOOK = "smoke"  # how the names of recipes begin that only show that everything runs
MAX_STEPS = LARGEST_INT32  # they are counted in int32
MAX_BYTES_AS_ARRAYS = 2**30  # of the training images; more are read from disk by batch
MAX_BYTES_OF_SOME, FEWEST_OF_SOME = 2**28, 32  # of held-out images in memory, as float32; and their number
MOST_CLASSES = 10  # in a picture of samples


class Keys(NamedTuple):
    """One key per purpose; the same for the same seed and stage, whatever was trained before."""

    init: PRNGKeyArray
    order: PRNGKeyArray
    train: PRNGKeyArray
    sample: PRNGKeyArray


def stage_keys(seed: int, stage: str) -> Keys:
    """The keys of a stage: split once per purpose from fold_in(key(seed), hash of the stage's name)."""
    return Keys(*jax.random.split(jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode())), 4))


@dataclasses.dataclass(frozen=True)
class Context:
    """What a run gives to each of its stages."""

    recipe: Recipe
    dataset: Dataset
    run: RunFolder
    mesh: Mesh
    resume: bool = False
    log: Callable[[str], None] = print
    bar: bool | None = None
    workers: int = 0

    def train_rows(self) -> Rows:
        """The training examples, columns `image` and `label`.

        In memory, but for those that as numbers are more than a GiB: these are read batch by batch.
        """
        rows = self.dataset.rows("train")
        length = training_images(self.recipe, self.dataset)
        size = 4 * length * math.prod(self.dataset.image_shape)
        if size > MAX_BYTES_AS_ARRAYS or buckets_of(rows) is not None:
            return RowsView(rows, length, {"image": "image", "label": "label"})
        if isinstance(rows, FolderRows):
            return ArrayRows(rows.take(np.arange(length)))
        images, labels = self.train_arrays()
        return ArrayRows({"image": images, "label": labels})

    def some(self, split: str, most: int = 1000) -> tuple[Float[np.ndarray, "N H W C"], Any]:
        """(images, labels) of the first `most` examples of a split, of large images fewer."""
        rows, size = self.dataset.rows(split), 4 * math.prod(self.dataset.image_shape)
        most = min(most, max(FEWEST_OF_SOME, MAX_BYTES_OF_SOME // size))
        columns = rows.take(np.arange(min(len(rows), most)))
        return columns["image"], columns["label"]

    def train_arrays(self) -> tuple[Float[np.ndarray, "N H W C"], Int[np.ndarray, " N"]]:
        """The training images `[N, H, W, C]` in [-1, 1] and their labels `[N]`."""
        return self.dataset.arrays("train", self.recipe.max_train_images)


class Job(NamedTuple):
    """What a stage trains in a run: all that the loop has to know of it.

    Attributes:
        init: key -> the parameters to begin with; of players a dict by their names.
        loss: `loss(params, state, batch, key) -> (loss, metrics)`, or players: see `make_train_step`.
        data: columns or rows of examples.
        finish: takes the finished parameters (their moving average where there is one), on the host, and
            writes the network into the run folder; then, and only then, the stage is complete.
        preview: (parameters, step) -> None, a picture of how far it is, every `sample_every` epochs.
        frozen: what the loss finds as `state.frozen`.
        save_frozen: whether checkpoints hold that; False where `frozen` is always the same.
        freeze: patterns of parameters that stay as `init` made them (`jaxldm.training.freeze`). The loss,
            the preview and the end are given the whole network all the same.
        rounds: the learning rate rises and falls so often.
        next_round: what the state becomes between two of them.
    """

    init: Callable[[PRNGKeyArray], Params]
    loss: LossFunction | Sequence[Player]
    data: Mapping[str, Any] | Rows
    finish: Callable[[Params], None]
    preview: Callable[[Params, int], None] | None = None
    frozen: Any = None
    freeze: Sequence[str] = ()
    save_frozen: bool = True
    rounds: int = 1
    next_round: Callable[[TrainState], TrainState] | None = None


class Task(NamedTuple):
    """What one stage of a recipe trains.

    Attributes:
        build: (recipe, image shape, number of classes) -> the network. Raises `UnknownNameError` and
            `InvalidArgumentError` for whatever would fail later; computes nothing.
        prepare: (context) -> the job: reads or computes what is trained on. Trains nothing.
        check: (recipe, data, mesh), in place of the usual checks of the memory and the data; raises for
            whatever would fail later. None: the usual ones.
    """

    build: Callable[[Recipe, tuple[int, int, int], int], nn.Module]
    prepare: Callable[[Context], Job]
    check: Callable[[Recipe, Dataset, Mesh], None] | None = None


@dataclasses.dataclass(frozen=True)
class JoinedRows:
    """The columns of two kinds of rows of the same examples."""

    first: Rows
    second: Rows

    def __len__(self) -> int:
        return len(self.first)

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Any]:
        return {**self.first.take(rows), **self.second.take(rows)}


def of_one_shape(rows: Rows) -> Rows:
    """All rows, or those of the bucket that has most."""
    own = buckets_of(rows)
    return rows if own is None else RowsAt(rows, np.flatnonzero(own == np.bincount(own).argmax()))


def with_names(rows: Rows, **names: str) -> Rows:
    """Rows with their columns under other names, name="name there"; arrays stay arrays."""
    if isinstance(rows, ArrayRows):
        return ArrayRows({name: rows.columns[other] for name, other in names.items()})
    return RowsView(rows, len(rows), names)


def build_model(recipe: StageRecipe, **from_data: Any) -> nn.Module:
    """The network of a stage. `from_data` fills the fields that the config has and the recipe leaves open.

    Raises `UnknownNameError` and `InvalidArgumentError`.
    """
    known = {field.name for field in dataclasses.fields(type(models.build(recipe.preset).config))}
    open_fields = {name: value for name, value in from_data.items() if name in known}
    return models.build(recipe.preset, **{"dtype": recipe.dtype, **open_fields, **recipe.overrides})


def sample_size(shape: Sequence[int]) -> int | tuple[int, int]:
    """(H, W, C) as the `sample_size` of a config: one number for a square."""
    return shape[0] if shape[0] == shape[1] else (shape[0], shape[1])


def make_optimizer(
    recipe: UpdatesRecipe, num_examples: int, mesh: Mesh, rounds: int = 1, every: int = 1, share: float = 1
) -> tuple[Optimizer, Plan]:
    """Optimizer and plan of a stage, with epochs turned into updates. Raises `InvalidArgumentError`.

    The learning rate rises and falls once in each of the `rounds`. The optimizer is that of a network which
    moves in every so-manieth update, at a share of the recipe's rate.
    """
    check_batch_size(mesh, recipe.batch_size, recipe.accumulate)
    if recipe.batch_size > num_examples:
        raise InvalidArgumentError(
            f"batch_size {recipe.batch_size} is more than the {num_examples} training images"
        )
    steps_per_epoch = num_examples // recipe.batch_size
    total = recipe.epochs * steps_per_epoch
    if total > MAX_STEPS:
        raise InvalidArgumentError(
            f"{recipe.epochs} epochs of {steps_per_epoch} steps are more than the {MAX_STEPS} that a "
            "training can have: give fewer epochs"
        )
    if rounds > total:
        raise InvalidArgumentError(
            f"{total} updates cannot be divided into {rounds} rounds: give more epochs"
        )
    adam = optimizer(
        recipe.learning_rate * share,
        min(round_product(recipe.warmup_epochs, steps_per_epoch), total // rounds) // every,
        -(-total // every),
        recipe.weight_decay,
        recipe.max_grad_norm,
        recipe.b1,
        recipe.b2,
        final_scale=recipe.final_scale,
        name=recipe.optimizer,
        rounds=rounds,
    )
    save_every, sample_every = (
        epochs * steps_per_epoch for epochs in (recipe.save_every, recipe.sample_every)
    )
    return adam, Plan(total, save_every, sample_every, recipe.keep_checkpoints)


def check_state_fits(recipe: StageRecipe, module: nn.Module, mesh: Mesh) -> None:
    """Refuse a network whose parameters and Adam's two moments are more than the memory, in float32."""
    held = numbers_per_device(mesh, models.shapes(module))
    check_fits(
        4 * (4 if recipe.ema_decay else 3) * held,
        f"training {recipe.preset} with its {models.count_params(module):,} parameters needs",
        device=mesh.devices.flat[0],
        fix="take a smaller preset",
    )


def labels_of_samples(num_classes: int, samples_per_class: int) -> Int[np.ndarray, " N"]:
    """The labels of a picture of samples: every class (of the first ten) so many times."""
    return np.tile(np.arange(min(num_classes, MOST_CLASSES), dtype=np.int32), samples_per_class)


def save_samples(
    folder: StageFolder, images: Float[np.ndarray, "N H W C"], names: Sequence[str], step: int
) -> None:
    """Write images as a picture with a column for each name, of a class or a caption."""
    title = f"Samples after {step} steps"
    shown = np.clip(np.nan_to_num(images, nan=-1.0), -1, 1)
    grid = labelled_grid(shown, len(names), title=title, column_labels=names, scale=2)
    save_png(folder.path / "samples" / f"step-{step:06d}.png", grid)


def report_health(
    context: Context,
    folder: StageFolder,
    findings: Sequence[Finding],
    drawn: Sequence[Float[np.ndarray, "H W C"]] = (),
) -> None:
    """Log what the health checks found, of the updates and the newest samples too; write it to `health.txt`.

    Raises `DivergenceError` when no sample is finite.
    """
    findings = [*findings, *(check_blank(np.stack(drawn)) if len(drawn) else ()), *_skipped(folder)]
    text = report(findings)
    if failed(findings) and context.recipe.name.startswith(LOOK):
        text += f"\n({context.recipe.name} only shows that everything runs: it is not meant to learn)"
    context.log(text)
    write_atomically(folder.path / "health.txt", (text + "\n").encode())
    if len(drawn) and not any(np.isfinite(image).all() for image in drawn):
        raise DivergenceError(
            f"{folder.path.name}: no sample is finite, see {folder.path / 'health.txt'}: start a new run "
            "with a lower learning rate"
        )


def _skipped(folder: StageFolder) -> list[Finding]:
    """How many updates were skipped, where some were."""
    log = folder.path / "log.csv"
    skipped = read_log(log).get("skipped", np.zeros(0)) if log.is_file() else np.zeros(0)
    return check_skipped(skipped) if np.any(skipped == 1) else []
