"""`jaxldm train`: a model from a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional

from jaxldm.commands import hints
from jaxldm.commands.finetune import hint_of
from jaxldm.commands.hosts import SeveralHosts
from jaxldm.commands.options import batch_size, devices_or_mesh, shown
from jaxldm.commands.recipe_file import is_recipe_file, read_recipe_file
from jaxldm.errors import InvalidArgumentError, UnknownNameError, one_of
from jaxldm.files import expanded
from jaxldm.reading import some_of

if TYPE_CHECKING:
    from jaxldm.training import Recipe

_RECIPE = "the recipe's"


@dataclass(frozen=True)
class Train(SeveralHosts):
    """Train a model from a recipe: autoencoder, denoising network or masked image model, and a classifier.

    For example:
      jaxldm train mini-ldm --run-dir runs/mini-ldm
      jaxldm train mini-ldm --run-dir runs/mini-ldm --resume        (after an interruption)
      jaxldm train my_recipe.py --run-dir runs/mine        (a recipe of your own)
      jaxldm train finetune --help        (a finished model on your own pictures)
      jaxldm train controlnet --help      (a ControlNet for a finished model)

    Complete stages are not trained again. `jaxldm info` lists the recipes; `jaxldm info RECIPE` says what one
    asks, how long it takes and what to expect. A recipe of your own is a Python file with a value RECIPE
    and a docstring that says the same, for example my_recipe.py:
      '''Question: does the demo draw as well from another seed?
      Command: jaxldm train my_recipe.py --run-dir runs/mine
      Hardware: two CPU cores
      Minutes: as many as mini-ldm
      Expected figures: those of mini-ldm, to one or two in a hundred digits'''
      import dataclasses
      from jaxldm import training
      RECIPE = dataclasses.replace(training.RECIPES["mini-ldm"], name="mine", seed=1)

    The run keeps the recipe: --resume, sample and info do not need the file.
    """

    recipe: Annotated[Positional[str], shown("RECIPE")]
    """Name of the recipe, for example mini-ldm or tiny-dit, or a Python file with one of your own."""

    run_dir: Annotated[str | None, shown("FOLDER", "runs/RECIPE")] = None
    """Folder for the checkpoints, logs, plots, samples and the trained models."""

    resume: bool = False
    """Continue from the last checkpoint in the run folder."""

    epochs: Annotated[int | None, shown("INT", _RECIPE)] = None
    """Epochs of the denoising network, or of the masked image model, over the training images."""

    autoencoder_epochs: Annotated[int | None, shown("INT", _RECIPE)] = None
    """Epochs of the autoencoder over the training images."""

    classifier_epochs: Annotated[int | None, shown("INT", _RECIPE)] = None
    """Epochs of the classifier, with which `jaxldm eval` measures, over the training images."""

    batch_size: Annotated[int | Literal["auto"] | None, shown("INT|auto", _RECIPE)] = None
    """Images per step of the denoising network, or of the masked image model; auto: as many as fit into
    memory.
    """

    learning_rate: Annotated[float | None, shown("FLOAT", _RECIPE)] = None
    """Its highest learning rate, after the warm-up."""

    optimizer: Annotated[str | None, shown("NAME", _RECIPE)] = None
    """Optimizer of the denoising network, or of the masked image model: adamw, lion, muon,
    schedule_free_adamw (with its own moving average), or prodigy (at --learning-rate 1 unless given).
    """

    dtype: Annotated[str | None, shown("NAME", _RECIPE)] = None
    """float32 or bfloat16, in which the denoising network, or the masked image model, is computed; its
    parameters are float32.
    """

    accumulate: Annotated[int | None, shown("INT", _RECIPE)] = None
    """Compute each of its batches in so many parts, one after another, with the memory of one."""

    save_every: Annotated[int | None, shown("INT", _RECIPE)] = None
    """Epochs between checkpoints of the denoising network."""

    keep_checkpoints: Annotated[int | None, shown("INT", _RECIPE)] = None
    """Number of its newest checkpoints that stay, for example for `jaxldm inspect`."""

    preset: Annotated[str | None, shown("NAME", _RECIPE)] = None
    """Another network in its place, by its preset name."""

    dataset: Annotated[str | None, shown("NAME|FOLDER", _RECIPE)] = None
    """Another data set: a TFDS name, or a folder of your own pictures (class folders, captions, .parquet or
    .tar files).
    """

    image_size: Annotated[int | None, shown("PIXELS", "the recipe's, or that of the images")] = None
    """Side to which the central square of each image is scaled."""

    seed: Annotated[int | None, shown("INT", _RECIPE)] = None
    """Seed of all random numbers, from 0 to 4294967295."""

    devices: Annotated[int | None, shown("INT", "as many as divide every batch")] = None
    """Number of devices over which each batch is split."""

    mesh: Annotated[str | None, shown("AXIS=INT,...", "all devices along data")] = None
    """Split the batch over data and fsdp, the state over fsdp and tensor, as in data=2,fsdp=4."""

    workers: int = 0
    """Processes that read and decode pictures that do not fit into memory; 0: a thread."""

    quiet: bool = False
    """Print only errors, and no progress bar."""

    def run(self) -> None:
        """Trains the stages that are not complete yet."""
        self.join_hosts()
        from jaxldm import training

        name = Path(self.recipe).stem if is_recipe_file(self.recipe) else self.recipe
        run_dir = Path(self.run_dir or f"runs/{name}")
        recipe, where = self.agreed(
            lambda: (self.make_recipe(run_dir), devices_or_mesh(self.devices, self.mesh))
        )
        options: dict[str, Any] = where | {"resume": self.resume, "workers": self.workers}
        options["dataset"] = self.dataset
        if self.batch_size is not None:
            options["keep_batch_size"] = (recipe.generator,)
        if self.quiet:
            training.train(recipe, run_dir, **options, log=lambda line: None, bar=False)
            return
        run = training.train(recipe, run_dir, **options)
        if not self.speaks():
            return
        if recipe.generator == "autoencoder":
            print(f"finished: the autoencoder is {run.path / 'vae'}")
            return
        print(f"finished: everything is in {run.path}; try")
        if recipe.finetune is not None:
            print(f"  {hint_of(run, recipe)}")
            return
        print(f"  {hints.sample_run(run.path)}")
        if recipe.classifier is not None:
            print(f"  {hints.command('eval', run.path)}")

    def make_recipe(self, run_dir: Path) -> Recipe:
        """The recipe of that name or file, or with --resume that of the run, with the changes of the options.

        Raises `UnknownNameError` and `InvalidArgumentError`.
        """
        from jaxldm import data, training

        of_run = training.recipe_to_resume(run_dir) if self.resume else None
        recipe = named_recipe(self.recipe, of_run, self._say)
        generator = {
            "epochs": self.epochs,
            "batch_size": batch_size(self.batch_size),
            "learning_rate": self.learning_rate,
            "optimizer": self.optimizer,
            "dtype": self.dtype,
            "accumulate": self.accumulate,
            "save_every": self.save_every,
            "keep_checkpoints": self.keep_checkpoints,
        }
        if self.preset is not None:
            # The recipe's overrides are for its own network.
            presets = generator_presets(recipe.generator)
            generator |= {"preset": one_of("preset", self.preset, presets), "overrides": {}}
        changes: dict[str, Any] = {"seed": self.seed, "image_size": self.image_size}
        changes["data"] = None if self.dataset is None else data.source_name(self.dataset)
        own = getattr(recipe, recipe.generator)
        if self.optimizer == "prodigy" and self.learning_rate is None and own.optimizer != "prodigy":
            generator["learning_rate"] = 1.0  # a factor of the rate that it finds
            self._say("prodigy finds the rate itself: --learning-rate is 1, of which it is a factor")
        if self.optimizer == "schedule_free_adamw":  # in place of the recipe's average it has its own
            own = dataclasses.replace(own, optimizer=self.optimizer, ema_decay=None)
        changes[recipe.generator] = given(own, **generator)
        for stage in ("autoencoder", "classifier"):
            epochs = getattr(self, f"{stage}_epochs")
            if epochs is None:
                continue
            if getattr(recipe, stage) is None:
                raise InvalidArgumentError(f"recipe {self.recipe} has no {stage}: leave --{stage}-epochs out")
            changes[stage] = given(changes.get(stage, getattr(recipe, stage)), epochs=epochs)
        return given(recipe, **changes)

    def _say(self, line: str) -> None:
        if not self.quiet and self.speaks():
            print(line)


def named_recipe(
    name: str, of_run: Recipe | None = None, say: Callable[[str], None] = lambda line: None
) -> Recipe:
    """The recipe of a name or of a file.

    Args:
        name: as typed.
        of_run: that of a run to go on with: it is returned where it has the same name, or the file is gone.
        say: takes a line where the file says other things than the run began with.

    Raises:
        UnknownNameError, InvalidArgumentError: there is none.
    """
    from jaxldm import training
    from jaxldm.training.few_steps.methods import TAUGHT
    from jaxldm.training.runs import recipe_differences

    if is_recipe_file(name):
        if of_run is not None and not expanded(name).exists():
            return of_run
        recipe = read_recipe_file(name).recipe
        if of_run is None or of_run.name != recipe.name:
            return recipe
        changed = recipe_differences(of_run, recipe, f"in {name}")
        if changed:
            say(f"the run keeps the recipe it began with: {some_of(changed)}")
        return of_run
    method = name.removeprefix("mini-")
    if method in TAUGHT:
        raise InvalidArgumentError(
            f"{method} is a method of distillation, which needs a teacher: jaxldm distill RUN --method "
            f"{method}"
        )
    if of_run is not None and of_run.name == name:
        return of_run
    if name not in training.RECIPES:
        raise UnknownNameError("recipe", name, training.RECIPES, "a Python file such as my_recipe.py")
    return training.RECIPES[name]


def given(recipe: Any, **changes: Any) -> Any:
    """The recipe with the fields of `changes` that are not None."""
    return dataclasses.replace(
        recipe, **{name: value for name, value in changes.items() if value is not None}
    )


def generator_presets(stage: str) -> list[str]:
    """Presets of denoising networks, of masked image models, or of autoencoders.

    Not of dynamic networks, which need a recipe of their own.
    """
    from jaxldm import models, pipelines
    from jaxldm.models.registry import DYNAMIC

    autoencoders = (models.ConvAutoencoderConfig, models.AutoencoderKLConfig, models.VQModelConfig)

    def fits(config: Any) -> bool:
        if stage == "autoencoder":
            return isinstance(config, autoencoders)
        if stage == "masked_tokens":
            return isinstance(config, models.MaskGITTransformerConfig)
        return pipelines.is_denoiser(config) and models.class_name(config) not in DYNAMIC

    return [name for name, config in models.PRESETS.items() if fits(config)]
