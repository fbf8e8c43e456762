"""Models on disk -> pipelines: run folders, exported folders, and the folders of diffusers.

All are laid out as diffusers lays out a pipeline; a run folder holds other things as well:

    model_index.json                    the class of the pipeline, its parts, and its options
    unet/, transformer/, vae/, ...      config.json, diffusion_pytorch_model.safetensors
    tokenizer/                          as transformers has it
    scheduler/scheduler_config.json     the noise schedule and what the network predicts
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
from jax.sharding import Mesh, NamedSharding

from jaxldm import checkpoints, models
from jaxldm import diffusion as D
from jaxldm.arguments import (
    a_dtype,
    a_module,
    a_params,
    a_path,
    checked,
    choice,
    count,
    flag,
    instance,
    optional,
    refuse,
    several,
    text,
)
from jaxldm.checkpoints.folder import check_one_network
from jaxldm.checkpoints.lora import scale_of_each, some_scales
from jaxldm.checkpoints.pipeline_folder import INDEX_FILE, is_tokenizer
from jaxldm.diffusion.predictions import A_PREDICTION
from jaxldm.entries import read_value
from jaxldm.errors import CheckpointError, InvalidArgumentError, StorageError
from jaxldm.files import finish_interrupted, is_temporary
from jaxldm.models.registry import A_MODEL_CONFIG
from jaxldm.models.sharding import RULES, Rule, a_mesh, check_splits, some_rules
from jaxldm.pipelines import families
from jaxldm.pipelines.call import call_options
from jaxldm.pipelines.control import some_controls, with_control
from jaxldm.pipelines.control_kinds import base_name
from jaxldm.pipelines.families.class_to_image import (
    CLASS_TO_IMAGE,
    EXPORT_CLASS,
    OF_LARGE_MODELS,
    TRAINED,
    class_to_image,
)
from jaxldm.pipelines.families.maskgit import MASKGIT_CLASS
from jaxldm.pipelines.family import Family, Folder
from jaxldm.pipelines.few_steps import entry_of, read_few_steps
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.pipelines.runs import RUN_CONFIG, check_data_of_run, check_finished
from jaxldm.pipelines.scheduler_files import check_schedulers
from jaxldm.reading import read_json, reading, shown

RUN_CLASSES = (EXPORT_CLASS, MASKGIT_CLASS)  # what training writes
WELL_KNOWN = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline")
# Pipelines of models that are known here, which do something else with them: how their names begin.
RELATED = {
    "QwenImage": "of Qwen-Image there are QwenImagePipeline, QwenImageImg2ImgPipeline and "
    "QwenImageInpaintPipeline, and no editing, layers or ControlNets",
    "Flux2": "of FLUX.2 there are dev and klein, Flux2Pipeline and Flux2KleinPipeline, and no inpainting nor "
    "kept keys and values of pictures",
}
# What the authors trained on: DDPM's linear betas, eps; the straight path and its velocity.
PUBLISHED = {"DiT": D.epsilon(D.VP.named("linear")), "SiT": D.flow(D.Flow())}


A_FAMILY = instance((Family, str), "a pipelines.Family, or where it is, 'package.module:FAMILY'")


def a_folder_or_parts(name: str, value: Any) -> Any:
    """The folder of a network, or (module, its parameters), or these as a `Network`."""
    if isinstance(value, Network):
        return value.module, value.params
    if not isinstance(value, tuple):
        return a_path(name, value)
    if len(value) != 2:
        raise refuse(name, "the folder of an autoencoder, or (module, parameters)", value)
    return a_module(f"{name}[0]", value[0]), a_params(f"{name}[1]", value[1])


@checked(
    folder=a_path,
    dtype=optional(a_dtype),
    variant=optional(text),
    family=optional(A_FAMILY),
    vae=optional(a_folder_or_parts),
    mesh=optional(a_mesh),
    rules=optional(some_rules),
    reference_quirks=flag,
    controlnet=optional(some_controls),
)
def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    variant: str | None = None,
    family: Family | str | None = None,
    vae: str | Path | Network | tuple[nn.Module, Any] | None = None,
    mesh: Mesh | None = None,
    rules: Sequence[Rule] | None = None,
    reference_quirks: bool = False,
    controlnet: str | Path | Network | Sequence[str | Path | Network] | None = None,
) -> Pipeline:
    """The model in a run folder (from training), an exported one, or a folder of diffusers.

    Args:
        folder: its model_index.json names the pipeline, see `PIPELINES`.
        dtype: "float32", "bfloat16" or "float16", for parameters and computation; None is that of the config.
        variant: "fp16" for the weight files of that variant.
        family: a `Family` of your own, or "package.module:FAMILY", in place of the one that the folder names.
        vae: in place of the folder's autoencoder the one in this folder, or (module, parameters): one that
            was trained further, or TAESD, which decodes in a fraction of the time.
        mesh: split the weights of every network over these devices, as `models.make_mesh(tensor=4)` makes
            them; each device reads only its parts. Calls of the pipeline then compute on the mesh.
        rules: how, before the usual ones: (pattern, `PartitionSpec`), see `jaxldm.models.sharding`.
        reference_quirks: draw what diffusers draws with the folder, also where its schedulers and pipelines
            err: to compare pictures. `docs/where-jaxldm-differs.md` lists what that changes.
        controlnet: folders of ControlNets or T2I-Adapters to draw with, as in `with_control`.

    Raises:
        CheckpointError: the folder is missing, is of a class that is not known here, holds no finished model
            yet, is damaged, is put together from parts of different models, or has a scheduler file that no
            call could use.
        UnknownNameError, InvalidArgumentError: a dtype or a family that does not exist; a mesh that splits
            nothing; a rule whose pattern matches no parameter.

    >>> from jaxldm import pipelines                                          # doctest: +SKIP
    >>> pipe = pipelines.load("stable-diffusion-v1-5", dtype="bfloat16")      # doctest: +SKIP
    >>> images = pipe(jax.random.key(0), prompt=["a cat"], solver="dpmpp_2m") # doctest: +SKIP
    """
    folder = Path(folder)
    is_run = kind_of(folder, family) == "run"
    if is_run:
        check_finished(folder)
    index, found = read_json(folder / INDEX_FILE), family_of(folder, family)
    layout, named = found.folder, checkpoints.read_model_index(folder)
    _check_named(folder, _class_name(index, folder), found, named)
    _check_vae(found, vae)
    other_vae = found.autoencoder if vae is not None else None
    only = [part for part in named if is_part(part, layout) and part != other_vae]
    sharding = None
    if mesh is not None or rules is not None:
        sharding = _placement(folder, family, mesh, rules)
    if found in families.FAMILIES:
        check_schedulers(folder, found, named, reference_quirks=reference_quirks)
    options = {"dtype": dtype, "only": only, "variant": variant, "sharding": sharding}
    loaded = checkpoints.load_components(folder, **options)
    if other_vae is not None:
        loaded[other_vae] = (
            vae
            if isinstance(vae, tuple)  # `checked` made one of a Network
            else checkpoints.load(cast(Path, vae), dtype=dtype, sharding=sharding)
        )
    parts = {part: Network(*value) if isinstance(value, tuple) else value for part, value in loaded.items()}
    with reading(folder / INDEX_FILE):
        options, few_steps = layout.read_options(index, layout), read_few_steps(index)
    try:
        with reading(folder):  # a part of another class lacks what the family looks for
            pipe = Pipeline(found, parts, options, few_steps, reference_quirks)
            pipe.check_parts()
    except CheckpointError as error:
        text = str(error).removeprefix(f"{folder}: ")
        raise CheckpointError(f"{folder} mixes two models: {text}") from error
    if is_run:
        check_data_of_run(pipe, folder)
    return pipe if controlnet is None else with_control(pipe, controlnet, dtype=dtype)


def outline(folder: str | Path, family: Family | str | None = None) -> Pipeline:
    """The model of a folder without its parameters: configs, tokenizers and the scheduler alone are read.

    Raises:
        CheckpointError: no model, a damaged one, or one put together from parts of different models.
    """
    folder = Path(folder)
    index, found = read_json(folder / INDEX_FILE), family_of(folder, family)
    layout, named = found.folder, checkpoints.read_model_index(folder)
    modules = modules_in(folder, family)
    others = [name for name in (*layout.parts, *layout.optional) if name in named and name not in modules]
    parts: dict[str, Any] = dict(checkpoints.load_components(folder, only=others))
    parts |= {name: Network(module, {}) for name, module in modules.items()}
    with reading(folder):
        pipe = Pipeline(found, parts, layout.read_options(index, layout), read_few_steps(index))
        pipe.check_parts()
    return pipe


def is_part(name: str, layout: Folder) -> bool:
    """Whether a component of a folder is a part of the models that are laid out so."""
    return base_name(name) in (*layout.parts, *layout.optional, *layout.control)


def _check_vae(family: Family, vae: Any) -> None:
    """Refuse another autoencoder for a model that has none, and a whole model in the place of one."""
    if vae is not None and family.autoencoder is None:
        raise InvalidArgumentError(f"vae is not for {family.name}, which draws pixels: leave it out")
    if isinstance(vae, (str, Path)):
        check_one_network(vae, "an autoencoder", "vae")


def _placement(
    folder: Path, family: Family | str | None, mesh: Mesh | None, rules: Sequence[Rule] | None
) -> Callable[..., NamedSharding]:
    """Where the parameters of all networks in a folder go. Checked by their shapes, before any is read."""
    if mesh is None:
        raise InvalidArgumentError(
            "rules= are for mesh=: give a mesh, as models.make_mesh(tensor=4) makes it"
        )
    shapes = {name: models.shapes(module) for name, module in modules_in(folder, family).items()}
    check_splits(mesh, shapes, rules or ())
    return models.sharding_of(mesh, (*(rules or ()), *RULES))


def _check_named(folder: Path, name: str, family: Family, named: Mapping[str, Any]) -> None:
    """Refuse a model_index.json that does not name what the family needs."""
    needed = [part for part in family.folder.parts if part not in family.denoisers]
    missing = [part for part in needed if part not in named]
    if not set(family.denoisers) & set(named):
        missing.insert(0, " or ".join(family.denoisers))
    if missing:
        several = len(family.denoisers) > 1
        needed = [" or ".join(family.denoisers), *needed] if several else family.folder.parts
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: a {name} needs {', '.join(needed)}")


def family_of(folder: str | Path, family: Family | str | None = None) -> Family:
    """The family of the model in a folder with a model_index.json, which names it; or the one given.

    Raises:
        CheckpointError: a class that is not known here. A file never imports code.
        UnknownNameError, InvalidArgumentError: as in `families.find`, for the one given.
    """
    if family is not None:
        return families.find(family)
    name, known = _class_name(read_json(Path(folder) / INDEX_FILE), Path(folder)), families.class_names()
    if name not in known:
        for start, supported in RELATED.items():
            if name.startswith(start):
                raise CheckpointError(f"{folder} is a {shown(name)}, which is not supported: {supported}")
        near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.9)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise CheckpointError(
            f"{folder} is a pipeline of an unknown class, {shown(name)}; known: {', '.join(WELL_KNOWN)} and "
            f"{len(known) - len(WELL_KNOWN)} others{hint} For one of your own give its family: family= in "
            "Python, --family package.module:FAMILY on the command line"
        )
    return families.find(name)


@checked(folder=a_path, family=optional(A_FAMILY))
def kind_of(folder: str | Path, family: Family | str | None = None) -> str:
    """ "run", "export" (of a class-to-image model) or "text-to-image".

    Args:
        family: as in `load`.

    Raises:
        CheckpointError: everything else, with what to do.
    """
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(
            f"{folder} does not exist, and nothing is downloaded: give the folder of a run (`jaxldm train` "
            "makes one) or of a downloaded model, see docs/tutorials/load-a-published-model.md"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file: give the run folder, or the folder made by `jaxldm export`; in Python "
            "pipelines.load_original opens an original file of DiT or SiT, and "
            "checkpoints.load_single_file those of other models (.safetensors, .gguf)"
        )
    finish_interrupted(folder)
    has_run_config = (folder / RUN_CONFIG).exists()
    if (folder / INDEX_FILE).exists():
        name = _class_name(read_json(folder / INDEX_FILE), folder)
        if name in RUN_CLASSES and has_run_config:
            return "run"
        return "export" if draws_classes(family_of(folder, family)) else "text-to-image"
    if has_run_config:
        return "run"
    raise CheckpointError(
        f"{folder} is neither a run folder (no {RUN_CONFIG}) nor an exported folder (no {INDEX_FILE})"
    )


def _class_name(index: Mapping[str, Any], folder: Path) -> str:
    """The class of the pipeline that the entries of a model_index.json name."""
    place = f"{folder / INDEX_FILE}: _class_name"
    return read_value(index.get("_class_name", EXPORT_CLASS), str, place)


def draws_classes(family: Family) -> bool:
    """Whether a call takes class labels, and not texts."""
    return "class_labels" in call_options(family.call, family.encode)


@checked(pipe=A_PIPELINE, folder=a_path)
def save(pipe: Pipeline, folder: str | Path) -> None:
    """Write a folder that `load` and diffusers open: all of it or nothing. An earlier export is replaced.

    Of a text encoder that sees images as well (Qwen-Image's) the part for texts is written, with a warning.

    Raises:
        StorageError: `folder` holds anything else, is a file, or cannot be written.
        InvalidArgumentError: the model has an IP-Adapter, which no folder holds.

    >>> from jaxldm import pipelines                               # doctest: +SKIP
    >>> pipelines.save(pipe, "exported/mini-ldm")                  # doctest: +SKIP
    >>> pipe = pipelines.load("exported/mini-ldm")                 # doctest: +SKIP
    """
    if pipe.image_adapters:
        raise InvalidArgumentError(
            "no folder holds an IP-Adapter: save the model without it, and add its file again after loading"
        )
    layout, folder = pipe.family.folder, Path(os.path.abspath(folder))
    name = layout.class_name(pipe)
    check_export_folder(folder, families.PIPELINES.get(name) or pipe.family)
    parts = {
        part: (value.module, value.params) if isinstance(value, Network) else value
        for part, value in pipe.parts.items()
        if value is not None or not draws_classes(pipe.family)  # diffusers wants to read [null, null]
    }
    options = dict(layout.constants) | layout.write_options(pipe)
    checkpoints.save_components(folder, name, parts, options=options | entry_of(pipe.few_steps))
    for part, network in pipe.networks.items():
        lost = getattr(network.module, "saved_without", None)
        if lost is not None:
            warnings.warn(
                f"{folder} has its {part} without {lost}: it is a {models.class_name(network.config)}, for "
                "texts alone; keep the published folder for other uses of it",
                stacklevel=3,
            )


@checked(folder=a_path, family=A_FAMILY)
def check_export_folder(folder: str | Path, family: Family = CLASS_TO_IMAGE) -> None:
    """Raise `StorageError` unless `folder` is new, empty, or one of the family that `save` wrote."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file: choose another folder to export to")
    finish_interrupted(folder)
    found = {name for name in os.listdir(folder) if not is_temporary(name)} if folder.exists() else set()
    if not found:
        return
    index = read_json(folder / INDEX_FILE) if INDEX_FILE in found else {}
    same = index.get("_class_name") in family.folder.class_names and "_jaxldm_version" in index
    others = {name for name in found - {INDEX_FILE} if not is_part(name, family.folder)}
    if not same or others:
        raise StorageError(
            f"{folder} already holds other files ({', '.join(sorted(others or found)[:3])}): choose "
            "a new or empty folder to export to"
        )


@checked(folder=a_path, family=optional(A_FAMILY))
def modules_in(folder: str | Path, family: Family | str | None = None) -> dict[str, nn.Module]:
    """The networks that a folder of diffusers names, from their configs alone: no weights are read.

    Args:
        family: as in `load`.

    Raises:
        CheckpointError: a config is missing, damaged or of an unknown class.
    """
    folder, layout = Path(folder), family_of(folder, family).folder
    return {
        name: checkpoints.module_in(folder / name)
        for name, (_, kind) in checkpoints.read_model_index(folder).items()
        if is_part(name, layout) and not (kind.endswith("Scheduler") or is_tokenizer(name, kind))
    }


def some_paths(name: str, value: Any) -> Any:
    """One path, or several."""
    if isinstance(value, (list, tuple)):
        return [a_path(f"{name}[{place}]", each) for place, each in enumerate(value)]
    return a_path(name, value)


@checked(pipe=A_PIPELINE, path=some_paths, scale=some_scales)
def with_lora(
    pipe: Pipeline,
    path: str | Path | Sequence[str | Path],
    scale: float | Mapping[str, float] | Sequence[float | Mapping[str, float]] = 1.0,
) -> Pipeline:
    """The model with LoRA files merged into its weights; the one that was given stays as it is.

    Another file or scale compiles nothing; to swap adapters, call it again with the same `pipe`.

    Args:
        path: a file of any program, see `checkpoints.load_lora`, or several.
        scale: of all networks, or of each by name ("unet", "text_encoder", ...). Of several files one for
            all, or a list of one for each.

    Raises:
        CheckpointError: no such file, or one that does not fit the model.
        UnknownNameError: a scale for a network that the model lacks.
        InvalidArgumentError: another number of scales than of files, or a file twice.
    """
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    for place, each in enumerate(paths):
        if Path(each).resolve() in {Path(other).resolve() for other in paths[:place]}:
            raise InvalidArgumentError(
                f"the LoRA {each} is given twice: give it once, with the sum of the two scales"
            )
    scales = scale_of_each(len(paths), scale)
    parts = {name: (network.module, network.params) for name, network in pipe.networks.items()}
    merged = checkpoints.merge_lora(parts, [checkpoints.load_lora(each) for each in paths], scales)
    return pipe.replace(**{name: Network(*part) for name, part in merged.items()})


@checked(
    path=a_path,
    architecture=choice("architecture", PUBLISHED),
    vae=a_folder_or_parts,
    prediction=optional(A_PREDICTION),
    class_names=several(text),
    num_heads=optional(count(1)),
    dtype=optional(a_dtype),
)
def load_original(
    path: str | Path,
    architecture: str = "DiT",
    *,
    vae: str | Path | tuple[nn.Module, Any],
    prediction: D.Prediction | None = None,
    class_names: Sequence[str] = (),
    num_heads: int | None = None,
    dtype: str | None = None,
) -> Pipeline:
    """A pipeline around an original file of DiT or SiT, which holds the network alone.

    `save` writes it as a folder that `load` opens.

    Args:
        path: the state dict as a .safetensors file.
        architecture: "DiT" or "SiT"; the file does not tell.
        vae: the folder of the autoencoder (sd-vae-ft-ema, or -mse), or (module, parameters).
        prediction: None is what the authors trained with: eps on DDPM's linear betas for DiT, for SiT the
            flow on the straight path. SiT on another: `D.velocity(D.Interpolant("gvp"))`.
        class_names: one for each label.
        num_heads, dtype: as in `checkpoints.load_dit_file`.

    Raises:
        CheckpointError: a file that is missing, damaged or of another architecture, or that does not go with
            the autoencoder.
        UnknownNameError, InvalidArgumentError: as in `checkpoints.load_dit_file`.

    >>> from jaxldm import pipelines                                                     # doctest: +SKIP
    >>> file, vae = "SiT-XL-2-256.safetensors", "sd-vae-ft-ema"                          # doctest: +SKIP
    >>> pipe = pipelines.load_original(file, "SiT", vae=vae)                             # doctest: +SKIP
    >>> images = pipe(jax.random.key(0), [207, 360], solver="flow_heun")                 # doctest: +SKIP
    """
    _check_vae(CLASS_TO_IMAGE, vae)
    network = Network(*checkpoints.load_dit_file(path, architecture, num_heads=num_heads, dtype=dtype))
    decoder = Network(*(vae if isinstance(vae, tuple) else checkpoints.load(vae, dtype=dtype)))
    prediction = PUBLISHED[architecture] if prediction is None else prediction
    if architecture == "SiT" and prediction.path.num_train_timesteps is not None:
        raise InvalidArgumentError(
            "SiT's t runs from 0 to 1: give it a continuous path, D.flow(D.Flow()) or "
            "D.velocity(D.Interpolant(...))"
        )
    return class_to_image(network, prediction, decoder, class_names=tuple(class_names), **OF_LARGE_MODELS)


@checked(config=A_MODEL_CONFIG)
def is_denoiser(config: Any) -> bool:
    """Whether a model's config is that of a denoising network for pixels, or for latents, and classes."""
    return models.class_name(config) in TRAINED
