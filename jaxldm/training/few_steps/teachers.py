"""Teachers: which folders are one, and what a student's run has of them."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
from jaxtyping import PRNGKeyArray

from jaxldm import checkpoints, data, models, pipelines
from jaxldm.arguments import a_path, checked, count, instance, number, optional, refuse, text
from jaxldm.checkpoints.names import Placement
from jaxldm.checkpoints.pipeline_folder import INDEX_FILE
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError, one_of, shown
from jaxldm.exact import LARGEST_UINT32
from jaxldm.files import folder_written_whole, storage_errors
from jaxldm.models.quantization import refuse_quantized
from jaxldm.pipelines.folders import draws_classes, family_of
from jaxldm.pipelines.network import check_finite
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.reading import read_json, reading
from jaxldm.training.few_steps.methods import taught
from jaxldm.training.few_steps.recipe import FewStepsRecipe
from jaxldm.training.finetune_recipe import LoraRecipe
from jaxldm.training.recipes import AutoencoderRecipe, DiffusionRecipe, Recipe
from jaxldm.training.runs import RunFolder, read_config, read_recipe
from jaxldm.training.state import Params

# Fields of a network's config in which a student's may differ from its teacher's.
OWN_FIELDS = ("scalar_inputs", "time_cond_proj_dim", "dtype", "remat", "scan", "route", "tap", "learn_sigma")
COPIED_STAGES = ("autoencoder", "classifier")
SCALE_WIDTH = 256  # of the guidance embedding of latent consistency models


def read_teacher(folder: str | Path) -> Pipeline:
    """The model in a folder, if it can be a teacher.

    Raises:
        CheckpointError: no model, an unfinished one, or one of another kind.
    """
    folder = Path(folder)
    pipelines.kind_of(folder)
    pipe = pipelines.load(folder)
    refuse_quantized(pipe.denoiser.params, "a distillation")
    check_finite(str(folder / pipe.denoiser_name), pipe.denoiser)
    if "mask_token" in pipe.family.methods:
        raise CheckpointError(
            f"{folder} is a masked image model, which has no noise and no trajectories: take a denoising "
            "network, such as the run of mini-ldm"
        )
    _check_draws_in_many_steps(folder, pipe)
    if pipe.has_learned_variance:
        raise CheckpointError(
            f"{folder} draws its variance, too (twice as many channels), which no student learns: take a "
            "teacher with learn_sigma=False"
        )
    of_texts = not draws_classes(pipe.family)
    if of_texts and (pipe.is_guidance_distilled or not _is_run_of_stages(folder)):
        raise CheckpointError(
            f"{folder} draws from texts and is no run of this library, so that nobody knows its captions: "
            "give the run folder of a recipe of captions, or a model of classes"
        )
    if not of_texts and pipe.num_classes is None:
        raise CheckpointError(f"{folder} has no classes: teachers are models of classes or of captions")
    if not of_texts and not pipe.has_null_class:
        raise CheckpointError(
            f"{folder} is a consistency model, which has no trajectories, and no null class to be guided by: "
            "take a diffusion model of the same classes"
        )
    return pipe


def _check_draws_in_many_steps(folder: Path, pipe: Pipeline) -> None:
    """Refuse a model that draws in few steps. Raises `CheckpointError`."""
    own = pipe.few_steps
    if own is None:
        return
    if own.is_taught:
        raise CheckpointError(
            f"{folder} is itself a student, by {own.method}, which has no trajectories: take the model that "
            "it was distilled from"
        )
    raise CheckpointError(
        f"{folder} was trained by {own.method} to draw in few steps itself, and is no teacher: take a "
        "diffusion model, such as the run of mini-ldm"
    )


def _a_scale_or_two(name: str, value: Any) -> Any:
    """One guidance scale, or (lowest, highest)."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise refuse(name, "one scale, or (lowest, highest)", value)
        return tuple(number(0)(name, each) for each in value)
    return number(0)(name, value)


@checked(
    teacher=a_path,
    method=text,
    num_steps=optional(count(1)),
    guidance_scale=optional(_a_scale_or_two),
    numbers=optional(instance(Mapping, "a dictionary such as {'start_steps': 32}")),
    dataset=optional(a_path),
    seed=optional(count(0, LARGEST_UINT32)),
    lora=optional(instance(LoraRecipe, "a training.LoraRecipe such as LoraRecipe(rank=8)")),
)
def distill_recipe(
    teacher: str | Path,
    method: str,
    *,
    num_steps: int | None = None,
    guidance_scale: float | tuple[float, float] | None = None,
    numbers: Mapping[str, float] | None = None,
    dataset: str | Path | None = None,
    seed: int | None = None,
    lora: LoraRecipe | None = None,
    **changes: Any,
) -> Recipe:
    """The recipe of a student: its teacher's, with the method's numbers in place of those of its training.

    Args:
        teacher: the run folder of a finished model of classes or captions; or an exported one of classes.
        method: a name of `METHODS`.
        num_steps: of the student, for the methods that are trained for one number.
        guidance_scale: of the teacher, which comes inside: one, or (lowest, highest), which the student takes
            as an input. None: the default of the teacher, or of the method.
        numbers: of the method, by name.
        dataset: in place of the teacher's, as in `train`; an exported folder needs it.
        seed: None: that of the teacher's recipe.
        lora: an adapter is trained in place of the whole network; its file is for whoever has the teacher.
        changes: fields of the stage's `DiffusionRecipe`, such as epochs=4.

    Returns:
        What `train` takes: `training.train(training.distill_recipe("runs/mini-ldm", "lcm"), "runs/lcm")`.

    Raises:
        CheckpointError: the folder is no teacher.
        UnknownNameError, InvalidArgumentError: a method, a number of steps, scales or numbers that cannot be.
    """
    known = taught(method)
    scales = (guidance_scale,) * 2 if isinstance(guidance_scale, (int, float)) else guidance_scale
    given: dict[str, Any] = {"num_steps": num_steps, "guidance_scale": scales}
    for name in changes:
        one_of("field of the recipe", name, [field.name for field in dataclasses.fields(DiffusionRecipe)])
    given |= {"method": method, "teacher": os.path.abspath(teacher), "numbers": numbers or {}, "lora": lora}
    FewStepsRecipe(**given)  # before a large folder
    pipe = read_teacher(teacher)
    if known.guidance == "inside" and scales is None and known.scales is None:
        given["guidance_scale"] = (pipe.default_guidance_scale,) * 2
    few = FewStepsRecipe(**given)
    known.check(pipe.prediction, few.num_steps, few.numbers)
    of_teacher = _recipe_of(pipe, Path(teacher), dataset)
    own = cast(DiffusionRecipe, of_teacher.diffusion)
    plain = {"weight": None, "time": None, "learn_log_variance": False, "route": None, "alignment": None}
    plain["dynamic"] = None
    overrides = {name: value for name, value in own.overrides.items() if name not in ("route", "tap")}
    student = dataclasses.replace(
        own,
        few_steps=few,
        overrides={**overrides, **(_scale_fields(pipe) if few.takes_scale else {})},
        **{"learning_rate": own.learning_rate / 4, "power_ema": (), **plain, **known.training, **changes},
    )
    return dataclasses.replace(
        of_teacher,
        name=f"{of_teacher.name}-{method}",
        diffusion=student,
        seed=of_teacher.seed if seed is None else seed,
    )


def _is_run_of_stages(folder: Path) -> bool:
    """Whether a folder is the run of a recipe with a denoising network of its own; a fine-tuning has none."""
    return RunFolder(folder).config.exists() and read_recipe(folder).diffusion is not None


def _scale_fields(pipe: Pipeline) -> dict[str, Any]:
    """The fields of a network's config with which it takes the guidance scale. Raises `CheckpointError`."""
    config = pipe.denoiser.config
    for name, value in (("scalar_inputs", ("guidance_scale",)), ("time_cond_proj_dim", SCALE_WIDTH)):
        if hasattr(config, name):
            return {name: value}
    raise CheckpointError(
        f"a {models.class_name(config)} cannot take the guidance scale as an input: give one scale, as in "
        "--guidance-scale 3"
    )


def _recipe_of(pipe: Pipeline, folder: Path, dataset: str | Path | None) -> Recipe:
    """The recipe of a run; of an exported model one that has its networks."""
    changed: dict[str, Any] = {} if dataset is None else {"data": data.source_name(dataset)}
    if _is_run_of_stages(folder):
        return dataclasses.replace(read_recipe(folder), **changed)
    if dataset is None:
        raise InvalidArgumentError(
            f"{folder} is an exported model, which does not say what it was trained on: give the images, as "
            "in --dataset mnist5k, or its run folder"
        )
    vae, size = pipe.autoencoder, pipe.image_shape()[0]
    preset, overrides = _described(pipe.denoiser.config)
    autoencoder = None
    if vae is not None:
        name, fields = _described(vae.config)
        autoencoder = AutoencoderRecipe(preset=name, overrides=fields)
    denoiser = DiffusionRecipe(
        preset=preset, overrides=overrides, prediction=pipe.prediction, ema_decay=0.998
    )
    return Recipe(
        name=folder.name or "exported",
        image_size=size,
        autoencoder=autoencoder,
        diffusion=denoiser,
        **changed,
    )


def _described(config: Any) -> tuple[str, dict[str, Any]]:
    """(a preset, the fields in which the config differs from it)."""
    preset = next(name for name, other in models.PRESETS.items() if type(other) is type(config))
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return preset, {
        name: value for name, value in fields.items() if value != getattr(models.PRESETS[preset], name)
    }


def check_student(few: FewStepsRecipe, module: nn.Module) -> None:
    """Refuse a student whose network is another than its teacher's, by their configs."""
    of_teacher = checkpoints.module_in(denoiser_folder(cast(str, few.teacher)))
    configs = [dataclasses.asdict(cast(Any, network).config) for network in (of_teacher, module)]
    plain = [{name: c[name] for name in c if name not in OWN_FIELDS} for c in configs]
    kinds = [type(cast(Any, network).config).__name__ for network in (of_teacher, module)]
    if plain[0] != plain[1] or kinds[0] != kinds[1]:
        odd = next((name for name in plain[0] if plain[0][name] != plain[1].get(name)), None)
        what = "its class differs"
        if odd is not None:
            what = f"its {odd} is {shown(plain[1].get(odd))}, not {shown(plain[0][odd])}: give the data set "
            what += "and the overrides of its teacher"
        raise InvalidArgumentError(
            f"a student begins as its teacher, and its network is another than that of {few.teacher}: {what}"
        )


def check_classes(teacher: str | Path, dataset: data.Dataset) -> None:
    """Refuse images of other classes than those that a teacher draws.

    Raises:
        DataError: another number of them, or other names where the teacher has names.
    """
    number = cast(Any, checkpoints.module_in(denoiser_folder(teacher))).config.num_classes
    if number != dataset.num_classes:
        raise DataError(
            f"{teacher} draws {number} classes, and {dataset.name} has {dataset.num_classes}: give the data "
            "set that it was trained on, or one with a class folder for each"
        )
    names = _class_names(Path(teacher))
    if names is not None and names != dataset.class_names:
        label = next(label for label in range(number) if names[label] != dataset.class_names[label])
        raise DataError(
            f"class {label} of {teacher} is {shown(names[label])}, and of {dataset.name} "
            f"{shown(dataset.class_names[label])}: a student draws what its teacher does, give a data set of "
            "the same classes"
        )


def check_channels(teacher: str | Path, recipe: Recipe, dataset: data.Dataset) -> None:
    """Refuse images of other channels than those of a teacher's autoencoder, which its student has, too."""
    folder = RunFolder(Path(teacher)).stage("autoencoder").model
    if recipe.autoencoder is None or not folder.is_dir():
        return
    wanted, given = cast(Any, checkpoints.module_in(folder)).config.in_channels, dataset.image_shape[-1]
    if wanted != given:
        raise DataError(
            f"the autoencoder of {teacher} is for images of {wanted} channel{'s' * (wanted != 1)}, and those "
            f"of {dataset.name} have {given}: give the data set that it was trained on"
        )


def _class_names(teacher: Path) -> tuple[str, ...] | None:
    """The names of the classes that a teacher draws, None where its folder has none."""
    if _is_run_of_stages(teacher):
        names = read_config(teacher)["data"].get("class_names")
        return None if names is None else tuple(names)
    index, layout = teacher / INDEX_FILE, family_of(teacher).folder
    with reading(index):  # and no weights, which are there already
        return layout.read_options(read_json(index), layout).get("class_names")


def check_there(teacher: str | Path) -> None:
    """Refuse a student without its teacher: one that was moved, or that a relative path no longer leads to.

    Raises:
        CheckpointError: with what to type.
    """
    if Path(teacher).exists():
        return
    if not Path(teacher).is_absolute():
        raise CheckpointError(
            f"this student was begun with the teacher {teacher}, a relative path, which leads nowhere from "
            "here: cd to the folder that it was begun in, and type the same command there"
        )
    raise CheckpointError(
        f"the teacher of this student, {teacher}, is not there any more: move it back, or link its new place "
        f"to the old one, as in `{shlex.join(['ln', '-s', 'NEW', str(teacher)])}`"
    )


def denoiser_folder(teacher: str | Path) -> Path:
    """Where the denoising network of a teacher lies. Raises `CheckpointError`."""
    check_there(teacher)
    pipelines.kind_of(teacher)
    named = checkpoints.read_model_index(teacher)
    family = family_of(teacher)
    return Path(teacher) / next(name for name in family.denoisers if name in named)


def begin_as_teacher(
    few: FewStepsRecipe, module: nn.Module, key: PRNGKeyArray, place: Placement = None
) -> Params:
    """The teacher's parameters in the student's network, each of them where `place` says."""
    _, params = checkpoints.load(denoiser_folder(cast(str, few.teacher)), sharding=place)
    return models.init_from(module, key, params)


def bring_parts(run: RunFolder, recipe: Recipe, log: Callable[[str], None]) -> None:
    """What a student's run has of its teacher's; nothing in any other run. Raises `StorageError`."""
    few = None if recipe.diffusion is None else recipe.diffusion.few_steps
    if few is not None and few.teacher is not None:
        copy_parts(run, recipe, few.teacher, log)


def is_copied(run: RunFolder, recipe: Recipe, stage: str) -> bool:
    """Whether a finished stage of a run is that of its teacher: it has not been trained in this run."""
    few = None if recipe.diffusion is None else recipe.diffusion.few_steps
    taught_by = None if few is None else few.teacher
    return taught_by is not None and stage in COPIED_STAGES and not run.stage(stage).log.is_file()


def copy_parts(run: RunFolder, recipe: Recipe, teacher: str | Path, log: Callable[[str], None]) -> None:
    """The autoencoder, the classifier, latents and captions' states of another run, those that there are.

    Networks are copied whole or not at all. Raises `StorageError`.
    """
    source = RunFolder(Path(teacher))
    for stage in COPIED_STAGES:
        here, there = run.stage(stage).model, source.stage(stage).model
        if getattr(recipe, stage) is not None and there.is_dir() and not here.exists():
            log(f"{stage}: that of {teacher}")
            with folder_written_whole(here) as partial:
                shutil.copytree(there, partial, dirs_exist_ok=True)
    for here, there in ((run.latents, source.latents), (run.captions, source.captions)):
        if there.is_dir() and not here.exists():
            with storage_errors(here):
                for file in there.rglob("*.npy"):
                    _link(file, here / file.relative_to(there))


def _link(file: Path, target: Path) -> None:
    """The same file under another name, or a copy of it; a torn one is computed again by who reads it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
