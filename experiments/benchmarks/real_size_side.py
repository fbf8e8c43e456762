"""One process of `real_size.py`: loads a folder with a library, draws two images, prints its figures.

Question: how long do loading, the first image and a step take, in how much memory?
Command:  python -m experiments.benchmarks.real_size_side jaxldm|diffusers FOLDER PIXELS STEPS
Needs:    for diffusers PyTorch as well. `real_size` calls it.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

Draw = Callable[[int, Callable[[], None]], None]  # (number of steps, called after each of them)
PROMPT = ["a cat in the snow"]


def with_jaxldm(pixels: int) -> Callable[[str], Draw]:
    """folder -> a function that draws with it."""
    import jax

    from jaxldm import host, pipelines

    host.prepare(keep_compiled=True)  # as the command line does
    host.use_compilation_cache()

    def load(folder: str) -> Draw:
        pipe = pipelines.load(folder)
        size = {"height": pixels, "width": pixels}

        def draw(steps, step_ends):
            options = {"num_inference_steps": steps, "progress": lambda done, steps: step_ends()}
            pipe(jax.random.key(0), prompt=PROMPT, **size, **options)

        return draw

    return load


def with_diffusers(pixels: int) -> Callable[[str], Draw]:
    """The same with diffusers."""
    import diffusers
    import torch

    def load(folder: str) -> Draw:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        options = {"height": pixels, "width": pixels}

        def draw(steps, step_ends):
            def note(pipe, i, t, tensors):
                step_ends()
                return tensors

            generator = torch.Generator().manual_seed(0)
            call = {"num_inference_steps": steps, "generator": generator, "callback_on_step_end": note}
            pipe(PROMPT, **options, **call)

        return draw

    return load


SIDES = {"jaxldm": with_jaxldm, "diffusers": with_diffusers}


def main(side: str, folder: str, pixels: int, steps: int) -> None:
    """Prints one line of JSON: seconds since the process began, and GB."""
    start = time.perf_counter()
    load = SIDES[side](pixels)
    figures, ends = {"import": time.perf_counter() - start}, []
    draw = load(folder)
    figures["load"] = time.perf_counter() - start - figures["import"]
    begin = time.perf_counter()
    draw(1, lambda: ends.append(time.perf_counter()))
    figures["first_image"] = time.perf_counter() - begin
    figures["first_step"] = ends[0] - start
    ends.clear()
    draw(steps, lambda: ends.append(time.perf_counter()))
    figures["step"] = (ends[-1] - ends[0]) / (steps - 1)
    figures["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
