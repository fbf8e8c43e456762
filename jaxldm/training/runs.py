"""The run folder: where everything of one training run lies, and whether it may be written to.

    runs/NAME/config.json                        recipe, data and versions; .config.json is a copy,
                                                 here and in the folder of each stage
    runs/NAME/.lock                              while a process trains: only one can
    runs/NAME/vae/                               the finished autoencoder (none for a model of pixels)
    runs/NAME/unet/ or transformer/              the finished denoising network
    runs/NAME/text_encoder/, tokenizer/          of a model of captions, a pipeline of the network's family;
                                                 some have text_encoder_2/, tokenizer_2/ besides
    runs/NAME/scheduler/scheduler_config.json    its path and prediction
    runs/NAME/report.html                        curves, pictures and settings, see `jaxldm.training.report`
    runs/NAME/model_index.json                   names these; written last
    runs/NAME/pytorch_lora_weights.safetensors   in place of all these: the adapter of a fine-tuning,
    runs/NAME/learned_embeds.safetensors         or the new word of a textual inversion
    runs/NAME/classifier/model/                  the finished classifier
    runs/NAME/captions/                          what the text encoder made of the captions, in shards
    runs/NAME/latents/                           what the autoencoder made of the training images, in shards
    runs/NAME/STAGE/                             how a stage was trained

So a run is a pipeline folder (`LatentDiffusionPipeline`, as `pipelines.save` writes it) as soon as its
model_index.json is there: vae, unet or transformer, and scheduler are read as in any other one, without
config.json. model_index.json has `_class_name`, `_jaxldm_version` and an entry [library, class] for each of
them. Networks are config.json and safetensors.

So is the run of a masked image model, as a `MaskGITPipeline` of transformer and scheduler.

A stage is "autoencoder", "diffusion", "masked_tokens", "finetune" or "classifier". Its folder has
checkpoints/, log.csv, events.out.tfevents.* (the same for TensorBoard), loss.png, grad_norm.png, health.txt
(not the classifier, nor a fine-tuning), and reconstructions.png, samples/step-*.png or metrics.json.
Finished networks are renamed into place: each is whole or absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxldm import __version__, checkpoints, models
from jaxldm.arguments import a_path, checked
from jaxldm.checkpoints.embedding_file import EMBEDDING_FILE
from jaxldm.checkpoints.lora import FILE_NAMES
from jaxldm.checkpoints.pipeline_folder import save_component
from jaxldm.data import Dataset
from jaxldm.data.load import described_source
from jaxldm.errors import CheckpointError, DataError
from jaxldm.files import LOCK_FILE, storage_errors, write_atomically
from jaxldm.pipelines import folders as pipeline_folders
from jaxldm.pipelines.few_steps import ENTRY as FEW_STEPS
from jaxldm.pipelines.few_steps import FewSteps
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.runs import CONTROL_FOLDER
from jaxldm.reading import MAX_JSON_BYTES, read_bytes, reading, shown
from jaxldm.training.longer import hint_to_train_longer
from jaxldm.training.recipes import Recipe
from jaxldm.training.same_files import check_same_files
from jaxldm.training.sealed import sealed, unsealed
from jaxldm.training.state import Params
from jaxldm.training.store import TrainingStore

FORMAT = 2  # of config.json
STAGES = ("autoencoder", "diffusion", "masked_tokens", "finetune", "classifier")
PIPELINE_CLASS, MASKGIT_CLASS = "LatentDiffusionPipeline", "MaskGITPipeline"
LORA_FILE = FILE_NAMES[0]  # the name that diffusers looks for
CONTROL_SAMPLES = "control-images"  # in the folder of the stage: some that a ControlNet was trained on
COPY = ".config.json"  # of config.json
_TEACHER = "diffusion.few_steps.teacher"  # of a recipe's flat entries
INDEX_FILE, SCHEDULER_FILE = "model_index.json", "scheduler/scheduler_config.json"


@dataclasses.dataclass(frozen=True)
class StageFolder:
    """One stage of a run.

    Attributes:
        path: how it was trained.
        model: the finished network: `jaxldm.checkpoints.load` reads it.
        mark: exists when the stage is complete.
    """

    path: Path
    model: Path
    mark: Path

    @property
    def log(self) -> Path:
        """See `jaxldm.training.read_log`."""
        return self.path / "log.csv"

    @property
    def complete(self) -> bool:
        """Whether the finished network is in place."""
        return self.mark.exists()


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The places in a run folder; making one of these touches nothing."""

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", Path(a_path("path", self.path)))

    @property
    def config(self) -> Path:
        """See `read_config`."""
        return self.path / "config.json"

    @property
    def config_copy(self) -> Path:
        """The same once more, for when that is lost or damaged."""
        return self.path / COPY

    @property
    def config_copies(self) -> list[Path]:
        """That, and the one in the folder of each stage that was begun."""
        stages = [self.path / name for name in STAGES]
        return [self.config_copy, *(folder / COPY for folder in stages if folder.is_dir())]

    @property
    def index(self) -> Path:
        """Names the components of the finished pipeline."""
        return self.path / INDEX_FILE

    @property
    def has_model(self) -> bool:
        """Whether the finished model can be drawn from."""
        return self.index.exists()

    @property
    def latents(self) -> Path:
        """The cache of `jaxldm.training.diffusion.latent_columns`."""
        return self.path / "latents"

    @property
    def captions(self) -> Path:
        """The cache of `jaxldm.training.text.encode_captions`."""
        return self.path / "captions"

    def stage(self, name: str) -> StageFolder:
        """`name` is one of `STAGES`."""
        path = self.path / name
        if name == "masked_tokens":
            return StageFolder(path, self.path / "transformer", self.index)
        if name == "finetune":
            files = [self.path / name for name in (LORA_FILE, EMBEDDING_FILE, CONTROL_FOLDER)]
            mark = next((file for file in files if file.exists()), self.index)
            return StageFolder(path, self.path, mark)
        if name == "diffusion":
            transformer = self.path / "transformer"
            return StageFolder(path, transformer if transformer.is_dir() else self.path / "unet", self.index)
        model = self.path / "vae" if name == "autoencoder" else path / "model"
        return StageFolder(path, model, model)


def save_autoencoder(run: RunFolder, module: nn.Module, params: Params) -> None:
    """Write the finished autoencoder: afterwards, and only then, that stage is complete."""
    checkpoints.save(run.stage("autoencoder").model, module, params)


def save_classifier(run: RunFolder, module: nn.Module, params: Params) -> None:
    """Write the finished classifier: afterwards, and only then, that stage is complete."""
    checkpoints.save(run.stage("classifier").model, module, params)


def save_denoiser(
    run: RunFolder,
    module: nn.Module,
    params: Params,
    scheduler: Mapping[str, Any],
    text: Any = None,
    class_name: str = PIPELINE_CLASS,
    few_steps: FewSteps | None = None,
) -> None:
    """Write the finished denoising network, and what makes the run a pipeline folder.

    Args:
        run: its autoencoder, if it has one, is finished.
        module: the network.
        params: its parameters.
        scheduler: the entries of scheduler_config.json, `_class_name` among them.
        text: the pipeline of a text-to-image model (`jaxldm.training.text.text_pipeline`).
        class_name: of the pipeline, for model_index.json, of a model without one.
        few_steps: of a student, how it draws.
    """
    name = "unet" if models.class_name(module.config).startswith("UNet") else "transformer"
    checkpoints.save(run.path / name, module, params)
    kind = class_name if text is None else text.family.folder.class_names[0]
    index: dict[str, Any] = {"_class_name": kind, "_jaxldm_version": __version__}
    vae = run.stage("autoencoder")
    if vae.complete:
        index["vae"] = _library_and_class(models.config_from_dict(checkpoints.read_config(vae.model)))
    index[name] = _library_and_class(module.config)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if few_steps is not None:
        index[FEW_STEPS] = few_steps.to_dict()
    if text is not None:
        index |= _save_text_parts(run, text)
    with storage_errors(run.path):
        (run.path / SCHEDULER_FILE).parent.mkdir(exist_ok=True)
    write_atomically(run.path / SCHEDULER_FILE, _as_json(dict(scheduler)))
    write_atomically(run.index, _as_json(index))


def save_pipeline(run: RunFolder, pipe: Any) -> None:
    """Write a whole model into a run folder; model_index.json last: it is complete then, and only then."""
    layout = pipe.family.folder
    index: dict[str, Any] = {"_class_name": layout.class_name(pipe), "_jaxldm_version": __version__}
    index |= dict(layout.constants) | layout.write_options(pipe)
    for name, part in pipe.parts.items():
        if part is not None or not pipeline_folders.draws_classes(pipe.family):
            component = (part.module, part.params) if isinstance(part, Network) else part
            index[name] = save_component(run.path / name, component)
    write_atomically(run.index, _as_json(index))


def _save_text_parts(run: RunFolder, pipe: Any) -> dict[str, Any]:
    """Write the text encoders and tokenizers of a pipeline; return the entries of model_index.json."""
    layout, index = pipe.family.folder, {}
    for name, part in pipe.parts.items():
        if name.startswith("text_encoder") and part is not None:
            checkpoints.save(run.path / name, part.module, part.params)
            index[name] = ["transformers", models.class_name(part.config)]
        elif name.startswith("tokenizer") and part is not None:
            part.save(run.path / name)
            settings = json.loads(part.files["tokenizer_config.json"])
            index[name] = ["transformers", settings.get("tokenizer_class", "PreTrainedTokenizerFast")]
        elif name in layout.optional:
            index[name] = [None, None]
    if "requires_safety_checker" in layout.constants:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    return index | dict(layout.constants) | layout.write_options(pipe)


def _library_and_class(config: Any) -> list[str]:
    return ["diffusers" if config.published else "jaxldm", models.class_name(config)]


def _as_json(entries: Mapping[str, Any]) -> bytes:
    return (json.dumps(entries, indent=2) + "\n").encode()


@checked(run_dir=a_path)
def read_config(run_dir: Path | str) -> dict[str, Any]:
    """The entries of a run's config.json: `format`, `recipe`, `data` and `versions`.

    Where it is missing or damaged, those of its copy. Raises `CheckpointError` when that is so, too, or when
    it is of another version.
    """
    run = RunFolder(Path(run_dir))
    try:
        return _read_sealed(run.config)
    except _OtherFormatError:
        raise
    except CheckpointError as error:
        copied = _read_copy(run)
        if copied is None:
            raise error from None
        return copied


def _read_copy(run: RunFolder) -> dict[str, Any] | None:
    """What the first whole copy of config.json holds."""
    for path in run.config_copies:
        with contextlib.suppress(CheckpointError):  # the next one may be whole
            return _read_sealed(path)
    return None


class _OtherFormatError(CheckpointError):
    """A config.json that is whole, and of another version."""


def _read_sealed(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path.parent} is no run folder: it has no config.json")
    entries = unsealed(read_bytes(path, MAX_JSON_BYTES), path, ("format", "recipe", "data", "versions"))
    if "recipe" not in entries:
        raise CheckpointError(f"{path} is no config.json of a run: it names no recipe")
    if entries.get("format") != FORMAT:
        raise _OtherFormatError(
            f"{path} is of format {shown(entries.get('format'))}, this version reads {FORMAT}: use the "
            "version that began the run, or start a new one"
        )
    with reading(path):
        Recipe.from_dict(entries["recipe"])
    return entries


@checked(run_dir=a_path)
def read_recipe(run_dir: Path | str) -> Recipe:
    """The recipe that a run began with. Raises `CheckpointError`."""
    entries = read_config(run_dir)["recipe"]
    with reading(RunFolder(Path(run_dir)).config):
        return Recipe.from_dict(entries)


@checked(run_dir=a_path)
def read_data(run_dir: Path | str) -> Dataset:
    """The data that a run was trained on. Raises as `data.load` does, and `DataError` for changed data."""
    entries, dataset = read_config(run_dir)["data"], read_recipe(run_dir).load_data()
    for name, words in (("image_shape", "images of the shape"), ("class_names", "the classes")):
        before, now = entries.get(name), list(getattr(dataset, name))
        if before is not None and before != now:
            raise DataError(
                f"{dataset.name} has {words} {shown(now)}, and {run_dir} was trained with {shown(before)}: "
                "the data has changed since, put it back as it was"
            )
    return dataset


@checked(run_dir=a_path)
def recipe_to_resume(run_dir: Path | str) -> Recipe | None:
    """The recipe of a run to go on with, None where its folder does not tell (`open_run` then says why)."""
    try:
        return read_recipe(run_dir)
    except CheckpointError:
        return None


def check_run_folder(run_dir: Path | str, recipe: Recipe, *, resume: bool) -> bool:
    """Whether there is a run in a folder that may be trained in; before any data is loaded for it.

    Raises what `open_run` raises. Nothing is changed.
    """
    run = RunFolder(Path(run_dir))
    known = any(path.exists() for path in (run.config, *run.config_copies))
    if known or any(TrainingStore(run.stage(name).path / "checkpoints").has_whole() for name in STAGES):
        if resume:
            entries = _config_or_none(run)
            if entries is not None:
                _check_same_recipe(run, entries["recipe"], recipe)
                check_same_files(run.path, entries.get("data", {}).get("files"), recipe.data)
            return True
        raise CheckpointError(
            f"{run.path} already holds a run: add --resume (resume=True) to go on with it, or choose "
            "another run folder to start a new one"
        )
    if resume and not run.path.exists():
        raise CheckpointError(
            f"{run.path} does not exist, so there is nothing to resume: check the path, or leave --resume "
            "out to start a new run"
        )
    with storage_errors(run.path):
        others = [entry.name for entry in run.path.iterdir()] if run.path.exists() else []
    others = sorted(name for name in others if not name.startswith((".config.json", LOCK_FILE)))
    if others:
        raise CheckpointError(
            f"{run.path} holds other things ({', '.join(others[:3])}) but no config.json of a run: use "
            "another run folder"
        )
    return False


def open_run(
    run_dir: Path | str, recipe: Recipe, dataset: Dataset, *, resume: bool, log: Callable[[str], None] = print
) -> RunFolder:
    """Make a new run folder or, with `resume`, open an existing one.

    An empty folder (the run was killed before anything was saved) starts at the beginning. A config.json
    that is missing or damaged is written again, from one of its copies.

    Raises:
        CheckpointError: as `check_run_folder`; a run of another recipe. Nothing is changed then.
        StorageError: it cannot be made.
    """
    run = RunFolder(Path(run_dir))
    if check_run_folder(run.path, recipe, resume=resume):
        entries = _repaired_config(run, log)
    else:
        with storage_errors(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        if resume:
            log(f"nothing was saved in {run.path} yet: starting at the beginning")
        entries = _new_config(recipe, dataset)
    for path in (run.config, *run.config_copies):
        if not _holds(path, entries):
            write_atomically(path, sealed(entries))
    return run


def begin_stage(run: RunFolder, stage: str) -> None:
    """Make the folder of a stage, with one more copy of config.json: no other file says what it trains.

    Raises `StorageError`.
    """
    folder = run.stage(stage).path
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / COPY, run.config.read_bytes())


def _new_config(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    split = "test" if recipe.text is not None else "train" if recipe.finetune is not None else None
    captions = None if split is None else dataset.captions(split, 1)
    data = {
        "name": dataset.name,
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
        **({"files": files} if (files := described_source(recipe.data)) else {}),
        **({"license": dataset.license} if dataset.license else {}),
        **({"caption": captions[0]} if captions else {}),
    }
    return {"format": FORMAT, "recipe": recipe.to_dict(), "data": data, "versions": versions()}


def _repaired_config(run: RunFolder, log: Callable[[str], None]) -> dict[str, Any]:
    """What config.json holds, or should hold; `log` is given a line where that differs."""
    try:
        return _read_sealed(run.config)
    except _OtherFormatError:
        raise
    except CheckpointError as error:
        entries = _read_copy(run)
        if entries is None:
            raise CheckpointError(f"{error}; start a new run in another folder") from error
        what = (
            "damaged, or edited by hand (start another run to change settings)"
            if run.config.exists()
            else "missing"
        )
        log(f"{run.config} was {what}: it is written again from its copy")
        return entries


def _config_or_none(run: RunFolder) -> dict[str, Any] | None:
    """What config.json or its copy holds; None where both are damaged."""
    try:
        return read_config(run.path)
    except _OtherFormatError:
        raise
    except CheckpointError:
        return None


def _holds(path: Path, entries: dict[str, Any]) -> bool:
    try:
        return _read_sealed(path) == entries
    except CheckpointError:
        return False


def versions() -> dict[str, str]:
    """What a run was made with, for whoever wants to make it again."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "jaxldm": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _check_same_recipe(run: RunFolder, entries: Any, recipe: Recipe) -> None:
    saved = Recipe.from_dict(entries)
    if saved.name != recipe.name:
        raise CheckpointError(
            f"{run.path} holds a run of another recipe: {saved.name}, not {recipe.name}; resume with "
            "that one, or choose another run folder"
        )
    differences = recipe_differences(saved, recipe)
    if differences:
        only = len(differences) == 1 and run.has_model
        longer = hint_to_train_longer(run.path, saved, recipe) if only else ""
        fix = longer or "resume with the recipe it began with, or choose another run folder"
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise CheckpointError(f"{run.path} holds a run of another recipe: {differences[0]}{more}; {fix}")


def recipe_differences(saved: Recipe, given: Recipe, now: str = "now") -> list[str]:
    """The fields in which two recipes differ: "diffusion.epochs is 2 in it and 4 now"."""
    old, new = flat_entries(saved.to_dict()), flat_entries(given.to_dict())
    for flat in (old, new):  # a relative path, as older runs have, is that from the folder we are in
        if flat.get(_TEACHER) is not None:
            flat[_TEACHER] = os.path.realpath(flat[_TEACHER])
    return [
        f"{name} is {shown(old.get(name, 'absent'))} in it and {shown(new.get(name, 'absent'))} {now}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def flat_entries(entries: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of nested dictionaries by their paths, "diffusion.epochs"."""
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, Mapping):
            flat |= flat_entries(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
