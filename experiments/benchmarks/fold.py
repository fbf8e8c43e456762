"""What the fold adds: a run of each one-evaluation solver beside as many bare network calls.

Question: does `sample` cost more than the network calls in it, and does its compile time grow with the steps?
Command:  python experiments/benchmarks/fold.py            (--quick: small models, to see that it runs)
Needs:    nothing but jaxldm. Minutes and figures: README.md beside this file.

Both sides are one jitted loop with the same weights, labels, times and images. For each solver the bare loop
and `sample` take turns, a round after another; each round gives one ratio. The aim is at most 1.05.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxldm import host

host.prepare()  # before anything is computed; the same that the command line does

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from timing import Run, machine, measure_row  # noqa: E402

from jaxldm import diffusion as D  # noqa: E402
from jaxldm import models  # noqa: E402
from jaxldm.checkpoints.storage import write_atomically  # noqa: E402

PATH = D.vp_path(D.linear_betas())
# All that ask the network once a step; a test counts it. `euler` and `dpmpp_1s` are `ddim`.
ONE_EVALUATION = (
    "ddpm",
    "ddim",
    "euler_ancestral",
    "lms",
    "deis",
    "dpmpp_2s",
    "dpmpp_2m",
    "dpmpp_3m",
    "unipc",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "lcm",
    "tcd",
    "flow_euler",
    "sit_sde",
)
NETWORKS = ("tiny-dit", "mini-unet")


@dataclasses.dataclass(frozen=True)
class Fold:
    """Time `sample` beside bare network calls, and its compilation, and write the tables."""

    quick: bool = False
    """Small models, two solvers, two rounds of two steps: only to see that everything runs."""
    networks: tuple[str, ...] = NETWORKS
    """Presets of jaxldm.models."""
    solvers: tuple[str, ...] = ONE_EVALUATION
    compiled_solvers: tuple[str, ...] = ("ddim", "dpmpp_2m", "unipc")
    """Those whose compile time is measured."""
    num_images: int = 2
    num_inference_steps: int = 50
    compiled_steps: tuple[int, ...] = (10, 50, 200)
    """Numbers of steps that are compiled, each in a grid of its own."""
    rounds: int = 7
    """Turns of the bare calls and of `sample`, for each solver."""
    seconds: float = 0.0
    """How long a turn is, at least; one run is always made."""
    output_dir: Path = Path(__file__).parent / "results"
    """Where fold.md and fold.json go."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with weights and labels: `apply(params, x [B, H, W, C], t [B])` -> [B, H, W, C]."""

    name: str
    shape: tuple[int, int, int]
    params: Any
    apply: Callable[[Any, Any, Any], Any]


def make_network(name: str, num_images: int, quick: bool) -> Network:
    """A preset whose weights are all random: those of zero at the start would make every image the same."""
    small = {"tiny-dit": {"hidden_size": 16, "depth": 1}, "mini-unet": {"block_out_channels": (16, 32)}}
    module = models.build(name, **(small[name] if quick else {}))
    params = models.init(module, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.01 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    size, labels = module.config.sample_size, jnp.arange(num_images, dtype=jnp.int32) % 10

    def apply(params, x, t):
        return module.apply({"params": params}, x, t, labels)

    return Network(name, (size, size, module.config.in_channels), jax.tree.unflatten(tree, noisy), apply)


def start(network: Network, options: Fold, steps: int) -> tuple[Any, D.Grid, Any, Any]:
    """(params, grid, key, x_T) of a run."""
    grid, key = D.make_grid(PATH, steps), jax.random.key(2)
    return network.params, grid, key, D.initial_noise(key, (options.num_images, *network.shape), grid)


def bare_calls(network: Network, options: Fold) -> Run:
    """x <- network(x, t_i) at the times of the grid, and nothing else, in one jitted loop."""

    @jax.jit
    def loop(params, grid, key, x):
        def body(x, t):
            return network.apply(params, x, jnp.broadcast_to(t, x.shape[:1])), None

        return jax.lax.scan(body, x, grid.t[:-1])[0]

    arguments = jax.device_put(start(network, options, options.num_inference_steps))
    return lambda: loop(*arguments).block_until_ready()


def draw(network: Network, solver: str) -> Callable[..., Any]:
    """(params, grid, key, x_T) -> x_0 by `sample`."""

    def run(params, grid, key, x):
        denoise = D.denoiser(lambda x, t: network.apply(params, x, t), PATH)
        return D.sample(key, denoise, D.solvers.make(solver), grid, x)

    return run


def fold(network: Network, solver: str, options: Fold) -> Run:
    """`sample` over the same times, with the same weights."""
    run = jax.jit(draw(network, solver))
    arguments = jax.device_put(start(network, options, options.num_inference_steps))
    return lambda: run(*arguments).block_until_ready()


def compile_seconds(network: Network, solver: str, steps: int, options: Fold) -> float:
    """Seconds to trace and compile `sample` for that many steps."""
    arguments, begin = start(network, options, steps), time.perf_counter()
    jax.jit(draw(network, solver)).lower(*arguments).compile()
    return time.perf_counter() - begin


def ratio_line(row: dict[str, Any]) -> str:
    """One line of the table of ratios."""
    solver = row["solver"]
    cells = [row["network"], solver, *(f"{row['milliseconds'][name]:.1f}" for name in ("bare", solver))]
    cells.append("{1:.3f} ({0:.3f} to {2:.3f})".format(*row["ratio_quartiles"][solver]))
    return "| " + " | ".join(cells) + " |"


RATIO_HEAD = "| network | solver | bare calls, ms | sample, ms | sample / bare |\n" + "|---" * 5 + "|"


def compile_table(rows: list[dict[str, Any]], steps: tuple[int, ...]) -> str:
    """The table of compile times: the median of three, in seconds."""
    head = ["network", "solver", *(f"{number} steps, s" for number in steps)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{np.median(seconds):.2f}" for seconds in row["compile_seconds"].values()]
        lines.append("| " + " | ".join([row["network"], row["solver"], *cells]) + " |")
    return "\n".join(lines)


def measure(options: Fold) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of ratios, and rows of compile times; the numbers of steps take turns as well."""
    ratios, compilations = [], []
    for name in options.networks:
        network = make_network(name, options.num_images, options.quick)
        bare = bare_calls(network, options)
        for solver in options.solvers:
            variants = {"bare": bare, solver: fold(network, solver, options)}
            row = measure_row(f"{name}, {solver}", variants, options.rounds, options.seconds)
            ratios.append({"network": name, "solver": solver, **row})
            print(ratio_line(ratios[-1]), flush=True)
        for solver in options.compiled_solvers:
            seconds: dict[int, list[float]] = {steps: [] for steps in options.compiled_steps}
            for _ in range(1 if options.quick else 3):
                for steps in options.compiled_steps:
                    seconds[steps].append(compile_seconds(network, solver, steps, options))
            compilations.append({"network": name, "solver": solver, "compile_seconds": seconds})
            print(f"{name}, {solver}: seconds of compiling {seconds}", flush=True)
    return ratios, compilations


def main(options: Fold) -> None:
    if options.quick:
        few = {"solvers": ("ddim", "dpmpp_2m"), "compiled_solvers": ("ddim",), "rounds": 2, "num_images": 2}
        few |= {"num_inference_steps": 2, "compiled_steps": (2, 4)}
        options = dataclasses.replace(options, **few)
    setting = machine("fold.py", {})
    print(json.dumps(setting) + "\n\n" + RATIO_HEAD, flush=True)
    ratios, compilations = measure(options)
    table = "\n".join([RATIO_HEAD, *map(ratio_line, ratios)])
    work = f"{options.num_inference_steps} steps, {options.num_images} images, {options.rounds} rounds"
    text = f"```\n{json.dumps(setting, indent=1)}\n```\n\n{work}; median and quartiles of the ratio.\n\n"
    text += f"{table}\n"
    text += f"\nCompile time of `sample`.\n\n{compile_table(compilations, options.compiled_steps)}\n"
    figures = {**setting, "work": work, "ratios": ratios, "compilations": compilations}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output_dir / "fold.md", text.encode())
    write_atomically(options.output_dir / "fold.json", json.dumps(figures, indent=1).encode())
    print(f"\nwritten to {options.output_dir}/fold.md and fold.json")


if __name__ == "__main__":
    main(tyro.cli(Fold, config=(tyro.conf.FlagCreatePairsOff,)))
