"""Class-to-image models on disk: the DiT folders of diffusers, and original files of DiT and SiT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
from flax.core import FrozenDict

from jaxldm import checkpoints, models
from jaxldm import diffusion as D
from jaxldm.checkpoints.pipeline_folder import INDEX_FILE
from jaxldm.checkpoints.weight_files import read_json
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.latent_diffusion import LatentDiffusion

DIT_CLASS = "DiTPipeline"
PARTS = ("transformer", "vae", "scheduler")
# What the authors trained on: DDPM's linear betas, eps; the straight path and its velocity.
SCHEDULES = {"DiT": D.NoiseSchedule(beta_start=1e-4, beta_end=0.02), "SiT": D.NoiseSchedule("flow", "flow")}
# Of calls that name none: the authors' own.
OWN_OPTIONS = ("scale", "guided_channels", "images_per_device")
OF_LARGE_MODELS = {"scale": 4.0, "images_per_device": 1}


def load_dit(folder: Path, dtype: str | None = None, variant: str | None = None) -> LatentDiffusion:
    """The model in a DiTPipeline folder of diffusers; `id2label` becomes `class_names`.

    Args:
      dtype, variant: as in `pipelines.load`.

    Raises:
      CheckpointError: a component is missing, damaged, of another model or of an unknown class.
      UnknownNameError: no such dtype.
    """
    if dtype is not None:
        models.compute_dtype(dtype)
    there = checkpoints.read_model_index(folder)
    missing = [name for name in PARTS if name not in there]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: a {DIT_CLASS} needs {', '.join(PARTS)}")
    parts = checkpoints.load_components(folder, dtype=dtype, only=PARTS, variant=variant)
    entries = parts["scheduler"]
    pipe = LatentDiffusion(
        *parts["transformer"],
        D.NoiseSchedule.from_dict(entries),
        *parts["vae"],
        scheduler=FrozenDict({k: tuple(v) if isinstance(v, list) else v for k, v in entries.items()}),
        **OF_LARGE_MODELS,
    )
    return pipe.replace(**read_options(folder, pipe.num_classes))


def save_dit(pipe: LatentDiffusion, folder: Path) -> None:
    """Writes a DiTPipeline folder that `pipelines.load` and diffusers open: all of it or nothing.

    Raises:
      StorageError: `folder` holds anything else, is a file, or cannot be written.
    """
    scheduler = pipe.schedule.to_dict() if pipe.scheduler is None else dict(pipe.scheduler)
    parts = {
        "transformer": (pipe.denoiser, pipe.denoiser_params),
        "vae": (pipe.autoencoder, pipe.autoencoder_params),
        "scheduler": scheduler,
    }
    checkpoints.save_components(folder, DIT_CLASS, parts, options=written_options(pipe, OF_LARGE_MODELS))


def is_dit_pipeline(pipe: LatentDiffusion) -> bool:
    """Whether diffusers has a pipeline for it: its own DiT, in the latents of an AutoencoderKL."""
    is_theirs = isinstance(pipe.denoiser, models.DiTTransformer2DModel)
    return is_theirs and isinstance(pipe.autoencoder, models.AutoencoderKL)


def load_original(
    path: str | Path,
    architecture: str = "DiT",
    *,
    vae: str | Path | tuple[nn.Module, Any],
    schedule: D.NoiseSchedule | None = None,
    class_names: Sequence[str] = (),
    num_heads: int | None = None,
    dtype: str | None = None,
) -> LatentDiffusion:
    """A pipeline around an original file of DiT or SiT, which holds the network alone.

    `pipelines.save` writes it as a folder that `pipelines.load` opens.

    Args:
      path: the state dict as a .safetensors file.
      architecture: "DiT" or "SiT"; the file does not tell.
      vae: the folder of the autoencoder (sd-vae-ft-ema, or -mse), or (module, parameters).
      schedule: None is what the authors trained with: DDPM's linear betas and eps for DiT, for SiT the
        straight path. SiT on another: `NoiseSchedule("interpolant", "velocity", interpolant="gvp")`.
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
    module, params = checkpoints.load_dit_file(path, architecture, num_heads=num_heads, dtype=dtype)
    decoder = vae if isinstance(vae, tuple) else checkpoints.load(vae, dtype=dtype)
    schedule = SCHEDULES[architecture] if schedule is None else schedule
    schedule.make_denoiser(lambda x, t: x)  # refuses what goes with no path
    if architecture == "SiT" and schedule.make_path().num_train_timesteps is not None:
        raise InvalidArgumentError(
            'SiT counts time from 0 to 1: give it a continuous path, NoiseSchedule("flow", "flow") or '
            'NoiseSchedule("interpolant", "velocity", interpolant=...)'
        )
    return LatentDiffusion(
        module, params, schedule, *decoder, class_names=tuple(class_names), **OF_LARGE_MODELS
    )


def written_options(pipe: LatentDiffusion, usual: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """What model_index.json says of a class-to-image pipeline besides its components.

    The names of its classes as diffusers has them, {"207": "golden retriever"}, and the fields that differ
    from `usual` and the defaults of `LatentDiffusion`, with an underscore in front.
    """
    fields = {field.name: field.default for field in dataclasses.fields(pipe)}
    options = {
        f"_{name}": getattr(pipe, name)
        for name in OWN_OPTIONS
        if getattr(pipe, name) != usual.get(name, fields[name])
    }
    names = {str(label): name for label, name in enumerate(pipe.class_names)}
    return options | ({"id2label": names} if names else {})


def read_options(folder: Path, num_classes: int | None) -> dict[str, Any]:
    """The inverse of `written_options`: fields of `LatentDiffusion`, those that the folder speaks of.

    Raises:
      CheckpointError: an `id2label` that does not name each class.
    """
    index = read_json(folder / INDEX_FILE)
    options = {name: index[f"_{name}"] for name in OWN_OPTIONS if f"_{name}" in index}
    return options | {"class_names": _class_names(folder, index.get("id2label"), num_classes)}


def _class_names(folder: Path, table: Any, num_classes: int | None) -> tuple[str, ...]:
    if not table:
        return ()
    named = isinstance(table, Mapping) and all(isinstance(name, str) for name in table.values())
    if not named or set(table) != {str(label) for label in range(num_classes or 0)}:
        raise CheckpointError(
            f"{folder} has an id2label that does not name each of its network's {num_classes or 0} classes"
        )
    return tuple(table[str(label)] for label in range(num_classes))
