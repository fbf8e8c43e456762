"""One process of `real_size.py`: the same with diffusers.

Question: how long do loading, the first image and a step take with diffusers, in how much memory?
Command:  python -m experiments.benchmarks.real_size_torch FOLDER PIXELS STEPS     (called by `real_size`)
Needs:    PyTorch and diffusers.
"""

import json
import resource
import sys
import time


def main(folder: str, pixels: int, steps: int) -> None:
    """Prints one line of JSON: seconds since the process began, and GB."""
    start = time.perf_counter()
    import diffusers
    import torch

    figures, ends = {"import": time.perf_counter() - start}, []
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    figures["load"] = time.perf_counter() - start - figures["import"]

    def note(pipe, i, t, tensors):
        ends.append(time.perf_counter())
        return tensors

    def draw(steps: int) -> float:
        begin = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        pipe(
            ["a cat in the snow"],
            height=pixels,
            width=pixels,
            num_inference_steps=steps,
            generator=generator,
            callback_on_step_end=note,
        )
        return time.perf_counter() - begin

    figures["first_image"] = draw(1)
    figures["first_step"] = ends[0] - start
    ends.clear()
    draw(steps)
    figures["step"] = (ends[-1] - ends[0]) / (steps - 1)
    figures["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
