"""Several prompts on a masked image model (lecture 43, exercise E7).

Question: which prompts does a small masked image model draw well, and how soon?
Command:  python -m experiments.lecture43.e7_prompts --model-dir amused-256 --clip-dir clip-vit-base-patch32
Needs:    a folder of aMUSEd as `diffusers` lays it out (see docs/amused.md), and for the score a folder of
          CLIP with its tokenizer. What is known: README.md in this folder.

CLIP score is 100 cos(image, text) (Hessel et al. 2021). Its level depends on the text, so each image is also
assigned to the prompt with the highest score: a prompt works where its images are assigned to it.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from jaxldm import checkpoints, metrics, pipelines
from jaxldm.commands.terminal import run_script
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.families.amused import AMUSED

PROMPTS = (
    "a photo of a red apple on a wooden table",
    "a cat in the snow",
    "three blue balloons",
    "a green cube on top of a red ball",
    "a lighthouse at night, oil painting",
    "a sign that says open",
)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Draw several prompts with a masked image model, and score the images by CLIP."""

    model_dir: Path = Path("amused-256")
    """A folder of aMUSEd."""
    clip_dir: Path | None = None
    """A folder of CLIP, for the score; none: no score."""
    prompts: tuple[str, ...] = PROMPTS
    """What to draw: things, their number, colours, places, styles and letters are asked for."""
    negative_prompt: str | None = None
    """What to steer away from."""
    num_images: int = 4
    """Of each prompt."""
    num_inference_steps: int = 12
    """Of unmasking."""
    guidance_scale: float = 10.0
    """On the logits."""
    dtype: str | None = None
    """float32, bfloat16 or float16."""
    seed: int = 0
    """Which random numbers."""
    output_dir: Path = Path("runs/lecture43/e7")
    """Where the picture is written: a row for each prompt."""


def draw(pipe: pipelines.Pipeline, options: Prompts) -> tuple[np.ndarray, float]:
    """(images [K num_images, H, W, 3], seconds an image without compiling)."""
    call = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    key = jax.random.key(options.seed)
    pipe(key, options.prompts[0], options.negative_prompt, **call)  # compiles
    start = time.perf_counter()
    images = pipe(
        key, options.prompts, options.negative_prompt, num_images_per_prompt=options.num_images, **call
    )
    return images, (time.perf_counter() - start) / len(images)


def main(options: Prompts) -> None:
    if not (options.model_dir / "model_index.json").exists():
        raise InvalidArgumentError(
            f"{options.model_dir} is no model folder: docs/amused.md says where aMUSEd's are; name yours "
            "with --model-dir"
        )
    pipe = pipelines.load(options.model_dir, dtype=options.dtype)
    if pipe.family is not AMUSED:
        raise InvalidArgumentError(f"{options.model_dir} holds a {pipe.family.name}, no masked image model")
    images, seconds = draw(pipe, options)
    print(f"{len(images)} images in {options.num_inference_steps} steps, {seconds:.2f} seconds each\n")
    if options.clip_dir is not None:
        clip = (*checkpoints.load(options.clip_dir), checkpoints.load_tokenizer(options.clip_dir))
        show_scores(options, metrics.clip_similarities(*clip, images, options.prompts))
    title = f"Images of a masked image model in {options.num_inference_steps} steps"
    grid = metrics.labelled_grid(images, options.num_images, title=title, row_labels=options.prompts)
    metrics.save_png(options.output_dir / "prompts.png", grid)
    print(f"\nLook at {options.output_dir}/prompts.png.")


def show_scores(options: Prompts, similarities: np.ndarray) -> None:
    """A row for each prompt: the mean score of its images, and how many of them CLIP assigns to it."""
    print("| prompt | CLIP score | assigned to it | of the others, most often to |\n|---|---|---|---|")
    of_prompt = similarities.reshape(len(options.prompts), options.num_images, len(options.prompts))
    for k, (prompt, rows) in enumerate(zip(options.prompts, of_prompt, strict=True)):
        taken = rows.argmax(1)
        wrong = taken[taken != k]
        other = options.prompts[np.bincount(wrong).argmax()] if len(wrong) else "none"
        print(f"| {prompt} | {100 * rows[:, k].mean():.1f} | {(taken == k).mean():.0%} | {other} |")
    prompt_of = np.repeat(np.arange(len(options.prompts)), options.num_images)
    print(
        f"\nmean score {metrics.clip_score(similarities, prompt_of):.1f}, by chance "
        f"{1 / len(options.prompts):.0%} are assigned to their prompt"
    )


if __name__ == "__main__":
    run_script(main, Prompts)
