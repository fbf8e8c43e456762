"""The part of `jaxldm sample` that draws from texts."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxldm.commands.terminal import STEP_BAR
from jaxldm.errors import DataError, InvalidArgumentError

if TYPE_CHECKING:
    from jaxldm.commands.sample import Sample


def draw_prompts(command: Sample) -> tuple[Any, float]:
    """(images [N, H, W, 3] in [-1, 1], guidance scale) of what `jaxldm sample --prompt ...` asks for."""
    import jax

    from jaxldm import pipelines

    prompts, negatives = _cycled(command.prompt, command.negative_prompt, command.num_images)
    image = None if command.image is None else read_picture(command.image, command.height, command.width)
    mask = None if command.mask is None else _read_mask(command.mask, image)
    if command.refiner is not None and pipelines.kind_of(command.refiner) != "text-to-image":
        raise InvalidArgumentError(f"--refiner {command.refiner} is no text-to-image model")
    pipe = pipelines.load(command.folder, dtype=command.dtype)
    if not pipe.family.draws_images:
        raise InvalidArgumentError(
            f"{command.folder} holds one stage of a model, a {pipe.family.name}: put all of them into one "
            "folder, as the page on the model says"
        )
    if command.lora is not None:
        pipe = pipelines.with_lora(pipe, command.lora, command.lora_scale)
    refiner = None if command.refiner is None else pipelines.load(command.refiner, dtype=command.dtype)
    common = {
        "num_inference_steps": command.num_inference_steps,
        "guidance_scale": command.guidance_scale,
        "true_cfg_scale": command.true_cfg_scale,
        "guidance_rescale": command.guidance_rescale or None,
        "solver": command.solver,
        "eta": command.eta,
        "spacing": command.spacing,
        "batch_size": command.batch_size,
    }
    start = {"image": image, "strength": command.strength, "mask_image": mask}
    start |= {"height": command.height, "width": command.width}
    options = _known_to(pipe, start | common)
    key, progress = jax.random.key(command.seed), {"progress": STEP_BAR.tick}
    with _warnings_as_lines(), STEP_BAR.showing(pipe.num_callbacks(len(prompts), **options), "sampling"):
        if refiner is None:
            images = pipe(key, prompts, negatives, **options, **progress)
        else:
            first = _known_to(pipe, {"denoising_end": command.hand_over, "output": "latents"})
            latents = pipe(key, prompts, negatives, **options, **first, **progress)
            second = _known_to(refiner, {"denoising_start": command.hand_over, "latents": latents} | common)
            images = refiner(key, prompts, negatives, **second, **progress)
    scale = pipe.default_guidance_scale if command.guidance_scale is None else command.guidance_scale
    return images, scale


def read_picture(path: str, height: int | None = None, width: int | None = None, mode: str = "RGB") -> Any:
    """A picture file as 8-bit pixels, [H, W, 3] ("RGB") or [H, W] ("L"), resized to the sides that are given.

    Raises:
      DataError: no such file, or no picture.
    """
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise DataError(f"there is no picture {path}")
    try:
        with Image.open(path) as opened:
            picture = opened.convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}") from error
    size = (width or picture.width, height or picture.height)
    if min(size) < 1:
        raise InvalidArgumentError(f"height and width must be 1 or more, not {size[1]} and {size[0]}")
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.NEAREST if mode == "L" else Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _read_mask(path: str, image: Any) -> Any:
    if image is None:
        raise InvalidArgumentError("--mask says which part of --image to draw anew: give --image, too")
    return read_picture(path, image.shape[0], image.shape[1], mode="L")


def _cycled(prompts, negatives, num_images) -> tuple[list[str], list[str] | None]:
    """The text of each image, and what each steers away from."""
    if not prompts:
        raise InvalidArgumentError('--prompt is empty: say what to draw, as in --prompt "a cat in the snow"')
    if num_images is not None and num_images < 1:
        raise InvalidArgumentError(f"num_images must be 1 or more, not {num_images}")
    count = len(prompts) if num_images is None else num_images
    if negatives and len(negatives) not in (1, len(prompts)):
        raise InvalidArgumentError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for all, or one for each"
        )
    cycled = [list(itertools.islice(itertools.cycle(texts), count)) for texts in (prompts, negatives or [])]
    return cycled[0], cycled[1] or None


def _known_to(pipe: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those that were given. Raises `InvalidArgumentError` for one that this kind of model has no use for."""
    given = {name: value for name, value in options.items() if value is not None}
    known = pipe.call_options()
    for name in given:
        if name not in known:
            option = "mask" if name == "mask_image" else name.replace("_", "-")
            raise InvalidArgumentError(f"--{option} is not for a model of the family {pipe.family.name}")
    return given


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Prints what the pipelines warn of, such as words that the text encoder does not see, line by line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        print(f"jaxldm: warning: {' '.join(text.split())}", file=sys.stderr)
