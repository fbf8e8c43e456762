"""Models on disk -> pipelines: run folders, exported folders, and folders of text-to-image models.

An exported folder (`LatentDiffusion`) is laid out as diffusers lays out a pipeline:

    model_index.json                    which components there are
    vae/                                config.json, diffusion_pytorch_model.safetensors (absent for a model
    of pixels) unet/ or transformer/               the same
    scheduler/scheduler_config.json     the noise schedule and what the network predicts
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxldm import __version__, checkpoints, models
from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, InvalidArgumentError, StorageError
from jaxldm.files import folder_written_whole
from jaxldm.pipelines.class_folders import (
    DIT_CLASS,
    is_dit_pipeline,
    load_dit,
    read_options,
    save_dit,
    written_options,
)
from jaxldm.pipelines.latent_diffusion import LatentDiffusion
from jaxldm.pipelines.text_folders import PIPELINES, load_text_to_image, save_text_to_image
from jaxldm.pipelines.text_pipeline import TextPipeline

PIPELINE_CLASS = "LatentDiffusionPipeline"
INDEX, CONFIG = "model_index.json", "config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
DENOISERS = ("unet", "transformer")
# The last three are of diffusers, two of them without classes.
EXPORTS = (PIPELINE_CLASS, DIT_CLASS, "DDPMPipeline", "DDIMPipeline")
AUTOENCODERS = ("ConvAutoencoder", "AutoencoderKL")
# Networks that `LatentDiffusion` draws with; the last is not trained here.
TRAINED = ("UNet2DModel", "DiT", "SiT")
CLASS_CONDITIONAL = (*TRAINED, "DiTTransformer2DModel")
# Architectures that diffusers has under the same name, with the same weights.
_IN_DIFFUSERS = ("AutoencoderKL", "UNet2DModel", "DiTTransformer2DModel")


def load(
    folder: str | Path, *, dtype: str | None = None, variant: str | None = None
) -> LatentDiffusion | TextPipeline:
    """The model in a run folder (from training), an exported one, or a text-to-image folder of diffusers.

    Args:
      folder: model_index.json, where there is one, says which pipeline it is: `PIPELINES`, or our own.
      dtype: "float32", "bfloat16" or "float16", for parameters and computation of a text-to-image model;
        None is float32 for both.
      variant: "fp16" for the weight files of that variant, of a text-to-image model.

    Raises:
      CheckpointError: the folder is missing, is of a class that is not known here, holds no finished model
        yet, is damaged, or is put together from parts of different models.
      UnknownNameError, InvalidArgumentError: a dtype that does not exist, or that is not for this folder.

    >>> from jaxldm import pipelines                                          # doctest: +SKIP
    >>> pipe = pipelines.load("stable-diffusion-v1-5", dtype="bfloat16")      # doctest: +SKIP
    >>> images = pipe(jax.random.key(0), prompt=["a cat"], solver="dpmpp_2m") # doctest: +SKIP
    """
    folder = Path(folder)
    kind = kind_of(folder)
    if kind == "text-to-image":
        return load_text_to_image(folder, _read_json(folder / INDEX), dtype, variant)
    if kind == "export" and _read_json(folder / INDEX).get("_class_name") == DIT_CLASS:
        pipe = load_dit(folder, dtype, variant)
        _check_parts_fit(pipe, folder)
        return pipe
    if dtype is not None or variant is not None:
        raise InvalidArgumentError(
            f"dtype and variant are for folders of diffusers: {folder} is another, leave them out"
        )
    return _load_run(folder) if kind == "run" else _load_export(folder)


def kind_of(folder: str | Path) -> str:
    """ "run", "export" or "text-to-image". Raises `CheckpointError`, with the cure, for everything else."""
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(
            f"{folder} does not exist: check the path, or train a model with "
            f"`jaxldm train mini-ldm --run-dir {folder}`"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file: give the run folder, or the folder made by `jaxldm export`; an original "
            "file of DiT or SiT opens with pipelines.load_original"
        )
    if (folder / INDEX).exists():
        name = _read_json(folder / INDEX).get("_class_name", PIPELINE_CLASS)
        if name not in (*EXPORTS, *PIPELINES):
            known = ", ".join((*EXPORTS, *PIPELINES))
            raise CheckpointError(f"{folder} is a pipeline of an unknown class, {name!r}; known: {known}")
        return "text-to-image" if name in PIPELINES else "export"
    if (folder / CONFIG).exists():
        return "run"
    raise CheckpointError(
        f"{folder} is neither a run folder (no {CONFIG}) nor an exported folder (no {INDEX})"
    )


def save(pipe: LatentDiffusion | TextPipeline, folder: str | Path) -> None:
    """Writes an exported folder: all of it or nothing. An earlier export in `folder` is replaced.

    A text-to-image model becomes a folder that diffusers opens.

    Raises:
      StorageError: `folder` holds anything else, is a file, or cannot be written.

    >>> from jaxldm import pipelines                               # doctest: +SKIP
    >>> pipelines.save(pipe, "exported/mini-ldm")                  # doctest: +SKIP
    >>> pipe = pipelines.load("exported/mini-ldm")                 # doctest: +SKIP
    """
    folder = Path(os.path.abspath(folder))
    if isinstance(pipe, TextPipeline):
        save_text_to_image(pipe, folder)
        return
    if is_dit_pipeline(pipe):
        save_dit(pipe, folder)
        return
    check_export_folder(folder)
    index: dict[str, Any] = {"_class_name": PIPELINE_CLASS, "_jaxldm_version": __version__}
    with folder_written_whole(folder) as partial:
        for name, module, params in components(pipe):
            index[name] = _library_and_class(models.class_name(module.config))
            checkpoints.save(partial / name, module, params)
        index |= written_options(pipe)
        scheduler = pipe.schedule.to_dict()
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        (partial / SCHEDULER_CONFIG).parent.mkdir()
        _write_json(partial / SCHEDULER_CONFIG, scheduler)
        _write_json(partial / INDEX, index)


def check_export_folder(folder: str | Path) -> None:
    """Raises `StorageError` unless `folder` is new, empty, or an export that may be replaced."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file: choose another folder to export to")
    ours = {INDEX, "vae", "scheduler", *DENOISERS}
    there = set(os.listdir(folder)) if folder.exists() else set()
    if there and (
        INDEX not in there or there - ours or _read_json(folder / INDEX).get("_class_name") != PIPELINE_CLASS
    ):
        raise StorageError(
            f"{folder} already holds other files ({', '.join(sorted(there - ours or there)[:3])}): choose "
            "a new or empty folder to export to"
        )


def components(pipe: LatentDiffusion | TextPipeline) -> Iterator[tuple[str, Any, Any]]:
    """(name of the subfolder, module, parameters) of each network of a pipeline."""
    if isinstance(pipe, TextPipeline):
        yield from ((name, part.module, part.params) for name, part in pipe.networks.items())
        return
    if pipe.autoencoder is not None:
        yield "vae", pipe.autoencoder, pipe.autoencoder_params
    yield (
        "unet" if type(pipe.denoiser).__name__.startswith("UNet") else "transformer",
        pipe.denoiser,
        pipe.denoiser_params,
    )


class TensorComparison(NamedTuple):
    """One tensor in two places. `difference` says in words what differs; empty where all bits are equal."""

    name: str
    shape: tuple[int, ...]
    difference: str


def compare(
    first: LatentDiffusion | TextPipeline, second: LatentDiffusion | TextPipeline
) -> list[TensorComparison]:
    """Compares two pipelines tensor by tensor, under the names that the safetensors files use, bit by bit."""
    tensors = [
        {
            f"{name}/{key}": np.asarray(value)
            for name, _, params in components(pipe)
            for key, value in checkpoints.to_state_dict(params).items()
        }
        for pipe in (first, second)
    ]
    return [
        _compare_tensor(name, *(side.get(name) for side in tensors))
        for name in sorted(tensors[0] | tensors[1])
    ]


def _compare_tensor(name: str, first: np.ndarray | None, second: np.ndarray | None) -> TensorComparison:
    present = first if first is not None else second
    if first is None or second is None:
        return TensorComparison(name, present.shape, f"only in the {'second' if first is None else 'first'}")
    if first.shape != second.shape or first.dtype != second.dtype:
        return TensorComparison(
            name, first.shape, f"{first.dtype}{list(first.shape)} and {second.dtype}{list(second.shape)}"
        )
    # Bytes and not numbers: -0.0 is not 0.0, and NaN is equal to itself.
    bits = [np.ascontiguousarray(side).view(np.uint8).reshape(*side.shape, -1) for side in (first, second)]
    differing = int((bits[0] != bits[1]).any(axis=-1).sum())
    return TensorComparison(
        name, first.shape, f"{differing} of {first.size} numbers differ" if differing else ""
    )


def _load_run(folder: Path) -> LatentDiffusion:
    config = _read_json(folder / CONFIG)
    try:
        recipe, data = config["recipe"], config["data"]
        schedule = D.NoiseSchedule(**recipe["diffusion"]["noise"])
        has_autoencoder = recipe["autoencoder"] is not None
        shape, num_classes = tuple(data["image_shape"]), len(data["class_names"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is no config.json of a run ({error!r})") from error
    if not (folder / "diffusion" / "model").is_dir():
        raise CheckpointError(
            f"{folder} holds no finished model yet: go on with its training, with "
            f"`jaxldm train {recipe.get('name', 'RECIPE')} --run-dir {folder} --resume`"
        )
    pipe = _load_parts(
        folder / "diffusion" / "model",
        schedule,
        folder / "autoencoder" / "model" if has_autoencoder else None,
    )
    _check_parts_fit(pipe, folder)
    if pipe.image_shape != shape or pipe.num_classes not in (None, num_classes):
        raise CheckpointError(
            f"{folder} mixes two models: its networks draw {pipe.image_shape} images of {pipe.num_classes} "
            f"classes, its {CONFIG} speaks of {shape} and {num_classes}"
        )
    return pipe


def _load_export(folder: Path) -> LatentDiffusion:
    index = _read_json(folder / INDEX)
    denoisers = [name for name in DENOISERS if name in index]
    if len(denoisers) != 1 or "scheduler" not in index:
        named = ", ".join(key for key in index if not key.startswith("_")) or "nothing"
        raise CheckpointError(
            f"{folder / INDEX} should name a scheduler and one of {', '.join(DENOISERS)}; it names {named}"
        )
    schedule = D.NoiseSchedule.from_dict(_read_json(folder / SCHEDULER_CONFIG))
    pipe = _load_parts(folder / denoisers[0], schedule, folder / "vae" if "vae" in index else None)
    _check_parts_fit(pipe, folder)
    return pipe.replace(**read_options(folder, pipe.num_classes))


def _load_parts(denoiser: Path, schedule: D.NoiseSchedule, autoencoder: Path | None) -> LatentDiffusion:
    module_and_params = (None, None) if autoencoder is None else checkpoints.load(autoencoder)
    denoiser_and_params = checkpoints.load(denoiser)
    return LatentDiffusion(*denoiser_and_params, schedule, *module_and_params)


def is_denoiser(config: Any) -> bool:
    """Whether a model's config is that of a denoising network for pixels, or for latents, and classes."""
    return models.class_name(config) in TRAINED


def _check_parts_fit(pipe: LatentDiffusion, folder: Path) -> None:
    """Refuses parts of different models in one folder."""
    kinds = [models.class_name(module.config) for _, module, _ in components(pipe)]
    if kinds[-1] not in CLASS_CONDITIONAL or (pipe.autoencoder and kinds[0] not in AUTOENCODERS):
        raise CheckpointError(
            f"{folder} holds {' and '.join(kinds)}: an autoencoder and a denoising network are needed"
        )
    if pipe.autoencoder is not None and pipe.autoencoder.config.latent_channels != pipe.latent_shape[-1]:
        raise CheckpointError(
            f"{folder} mixes two models: its autoencoder has {pipe.autoencoder.config.latent_channels} "
            f"latent channels, its denoising network works on {pipe.latent_shape[-1]}"
        )


def _library_and_class(name: str) -> list[str]:
    return ["diffusers" if name in _IN_DIFFUSERS else "jaxldm", name]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the folder is not whole; copy or export it again"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged, it is no JSON ({error}): copy or export it again"
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} should hold a JSON object, it holds a {type(entries).__name__}")
    return entries


def _write_json(path: Path, entries: dict[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
