"""Commands that are suggested to people: they work as they are printed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from jaxldm.commands import IMPORTED


def command(*words: Any) -> str:
    """`jaxldm WORDS` as a shell takes it, with the `--import`s of this process.

    >>> command("sample", "my runs/a")
    "jaxldm sample 'my runs/a'"
    """
    imports = [word for module in IMPORTED.get() for word in ("--import", module)]
    return shlex.join(["jaxldm", *imports, *map(str, words)])


def sample_classes(folder: Path | str, num_classes: int | None, family: str | None = None) -> str:
    """The command to sample from a model of classes, or of none."""
    labels = [] if num_classes is None else ["--class-labels", 0] + ([1] if num_classes > 1 else [])
    return command("sample", folder, *_family(family), *labels, "--num-images", 16, "--output-dir", "samples")


def sample_texts(folder: Path | str, family: str | None = None, prompt: str | None = None) -> str:
    """The command to sample from a text-to-image model; `prompt` is one that it knows."""
    words = ("--prompt", prompt or "a cat in the snow", "--output-dir", "samples")
    return command("sample", folder, *_family(family), *words)


def caption_of(folder: Path | str) -> str | None:
    """A text that the model of a run was trained with; None where `folder` is no run or has none."""
    from jaxldm import training
    from jaxldm.errors import CheckpointError

    try:
        entries = training.read_config(folder)
    except CheckpointError:
        return None
    return (entries["recipe"].get("finetune") or {}).get("prompt") or entries["data"].get("caption")


def sample_run(folder: Path) -> str:
    """The command to sample from a finished run: with a caption of its test images, or its classes."""
    from jaxldm import training

    entries = training.read_config(folder)
    if entries["recipe"].get("text") is not None:
        return sample_texts(folder, prompt=caption_of(folder))
    return sample_classes(folder, len(entries["data"]["class_names"]))


def sample_adapter(folder: Path) -> str | None:
    """The command to draw with the teacher of a run and the adapter that the run trained; None of others."""
    from jaxldm import training
    from jaxldm.training.few_steps.method import counts_timesteps
    from jaxldm.training.few_steps.methods import METHODS

    recipe = training.read_recipe(folder)
    few = None if recipe.diffusion is None else recipe.diffusion.few_steps
    if recipe.diffusion is None or few is None or few.lora is None:
        return None
    solver = METHODS[few.method].solver
    words = ["--lora", folder, "--solver", solver, "--num-inference-steps", 4]
    if solver == "lcm" and counts_timesteps(recipe.diffusion.prediction.path):
        words += ["--spacing", "lcm"]
    if few.guidance_scale is not None:
        words += ["--guidance-scale", 1]
    what = sample_run(folder).removeprefix(command("sample", folder))
    return f"{command('sample', few.teacher)}{what} {shlex.join(map(str, words))}"


def sample(folder: Path | str, pipe: Any, family: str | None = None, prompt: str | None = None) -> str | None:
    """The command to sample from a pipeline that lies in `folder`; None for one stage of several.

    Args:
        family: the place of a family from outside, as in `pipelines.load`.
        prompt: a text that a text-to-image model knows.
    """
    from jaxldm import pipelines

    if pipelines.kind_of(folder, family) != "text-to-image":
        return sample_classes(folder, pipe.num_classes, family)
    return sample_texts(folder, family, prompt) if pipe.family.draws_images else None


def resume(recipe: Any, folder: Path | str) -> str:
    """The command to go on with a run."""
    few = None if recipe.diffusion is None else recipe.diffusion.few_steps
    if few is None or few.teacher is None:
        return command("train", recipe.name, "--run-dir", folder, "--resume")
    return command("distill", few.teacher, "--method", few.method, "--run-dir", folder, "--resume")


def _family(family: str | None) -> list[str]:
    return [] if family is None else ["--family", family]
