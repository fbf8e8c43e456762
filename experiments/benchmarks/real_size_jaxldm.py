"""One process of `real_size.py`: loads a folder with jaxldm, draws two images, prints its figures.

Question: how long do loading, the first image and a step take with jaxldm, in how much memory?
Command:  python -m experiments.benchmarks.real_size_jaxldm FOLDER PIXELS STEPS     (called by `real_size`)
Needs:    nothing but the package.
"""

import json
import resource
import sys
import time


def main(folder: str, pixels: int, steps: int) -> None:
    """Prints one line of JSON: seconds since the process began, and GB."""
    start = time.perf_counter()
    import jax

    from jaxldm import host, pipelines

    host.use_compilation_cache()
    figures, ends = {"import": time.perf_counter() - start}, []
    pipe = pipelines.load(folder)
    figures["load"] = time.perf_counter() - start - figures["import"]

    def draw(steps: int) -> float:
        begin = time.perf_counter()
        pipe(
            jax.random.key(0),
            prompt=["a cat in the snow"],
            height=pixels,
            width=pixels,
            num_inference_steps=steps,
            progress=lambda done, steps: ends.append(time.perf_counter()),
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
