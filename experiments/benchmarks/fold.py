"""What the fold adds: a run of each one-evaluation solver compared with as many bare network calls.

Question: does `sample` cost more than the network calls in it, and does its compile time grow with the steps?
Command:  python -m experiments.benchmarks.fold            (--quick: small models, to see that it runs)
Needs:    nothing but jaxldm. Minutes and figures: README.md in this folder.

Both sides are one jitted loop with the same weights, labels, times and images. For each solver the bare loop
and `sample` take turns, a round after another; each round gives one ratio. The aim is at most 1.05.
With a network of one multiplication the difference is what the solver itself takes, in microseconds a step.
The rows so far are in the folder `unfinished` of the output: a run that is stopped leaves what it has.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import Run, machine, measure_row, turns
from experiments.figures import quick_options, save_results
from jaxldm import diffusion as D
from jaxldm import host, models
from jaxldm.commands.terminal import run_script

PATH = D.VP(D.linear_betas())
# All that call the network once a step; a test counts it. `euler` and `dpmpp_1s` are `ddim`.
ONE_EVALUATION = (
    "ddpm",
    "ddim",
    "euler_ancestral",
    "lms",
    "deis",
    "dpmpp_2s",
    "dpmpp_2m",
    "dpmpp_3m",
    "dpmpp_3s",
    "dpm_2s",
    "dpm_3s",
    "dpm_2m",
    "dpm_3m",
    "dpm_sde",
    "ipndm",
    "sa_solver",
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
    """Time `sample` compared with bare network calls, and its compilation, and write the tables."""

    quick: bool = False
    """Small models, two solvers, two rounds of two steps: only to see that everything runs."""
    networks: tuple[str, ...] = NETWORKS
    """Presets of jaxldm.models."""
    solvers: tuple[str, ...] = ONE_EVALUATION
    compiled_solvers: tuple[str, ...] = ("dpmpp_2m",)
    """Those whose compile time is measured."""
    num_images: int = 4
    num_inference_steps: int = 50
    compiled_steps: tuple[int, ...] = (10, 50, 200)
    """Numbers of steps that are compiled, each in a grid of its own."""
    rounds: int = 5
    """Turns of the bare calls and of `sample`, for each solver."""
    seconds: float = 0.0
    """How long a turn is, at least; one run is always made."""
    output_dir: Path = Path("runs/benchmarks")
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


def multiplication() -> Network:
    """x -> 0.9 x on pixels of digits: as good as no network, to see what the rest takes."""
    return Network("multiplication", (28, 28, 1), {}, lambda params, x, t: 0.9 * x)


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
        denoise = D.denoiser(lambda x, t: network.apply(params, x, t), D.epsilon(PATH))
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


def ratio_table(rows: list[dict[str, Any]], added: dict[str, float]) -> str:
    """The table of ratios.

    On a machine that is never quiet the last column is the one to believe: 1 + what the solver takes by
    itself (`added`, milliseconds of the whole run) over the fastest round of bare calls.
    """
    head = ["network", "solver", "bare calls, ms", "sample, ms", "sample / bare", "1 + solver alone / bare"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        solver = row["solver"]
        cells = [row["network"], solver, *(f"{row['milliseconds'][name]:.1f}" for name in ("bare", solver))]
        cells.append("{1:.3f} ({0:.3f} to {2:.3f})".format(*row["ratio_quartiles"][solver]))
        cells.append(f"{1 + added[solver] / row['fastest']['bare']:.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def added_table(rows: list[dict[str, Any]]) -> str:
    """The table of what each solver takes on top of the network."""
    lines = ["| solver | added to a step, microseconds |", "|---|---|"]
    return "\n".join(lines + [f"| {row['solver']} | {row['added_microseconds']:.0f} |" for row in rows])


def compile_table(rows: list[dict[str, Any]], steps: tuple[int, ...]) -> str:
    """The table of compile times: the median of three, in seconds."""
    head = ["network", "solver", *(f"{number} steps, s" for number in steps)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{np.median(seconds):.2f}" for seconds in row["compile_seconds"].values()]
        lines.append("| " + " | ".join([row["network"], row["solver"], *cells]) + " |")
    return "\n".join(lines)


def measure_added(options: Fold, keep: Callable[..., None]) -> None:
    """What each solver takes on top of the network: the fastest rounds of a run without one, per step."""
    network = multiplication()
    bare = bare_calls(network, options)
    for solver in options.solvers:
        variants = {"bare": bare, solver: fold(network, solver, options)}
        for run in variants.values():
            run()
        fastest = {name: min(times) for name, times in turns(variants, 5 * options.rounds, 0.0).items()}
        added = (fastest[solver] - fastest["bare"]) / options.num_inference_steps * 1e3
        keep("added", {"solver": solver, "added_microseconds": added, "num_images": options.num_images})


def measure_network(name: str, options: Fold, keep: Callable[..., None]) -> None:
    """Compile times, the numbers of steps taking turns, then the ratio of each solver."""
    network = make_network(name, options.num_images, options.quick)
    for solver in options.compiled_solvers:
        seconds: dict[int, list[float]] = {steps: [] for steps in options.compiled_steps}
        for _ in range(1 if options.quick else 3):
            for steps in options.compiled_steps:
                seconds[steps].append(compile_seconds(network, solver, steps, options))
        keep("compilations", {"network": name, "solver": solver, "compile_seconds": seconds})
    bare = bare_calls(network, options)
    for solver in options.solvers:
        variants = {"bare": bare, solver: fold(network, solver, options)}
        row = measure_row(f"{name}, {solver}", variants, options.rounds, options.seconds)
        keep("ratios", {"network": name, "solver": solver, **row})


def main(options: Fold) -> None:
    host.prepare()  # before anything is computed
    few = {"solvers": ("ddim", "dpmpp_2m"), "compiled_solvers": ("ddim",), "rounds": 2, "num_images": 2}
    few |= {"num_inference_steps": 2, "compiled_steps": (2, 4)}
    options = quick_options(options, **few)
    setting = machine("fold", {})
    work = f"{options.num_inference_steps} steps, {options.num_images} images, {options.rounds} rounds"
    print(f"{json.dumps(setting)}\n{work}", flush=True)
    rows: dict[str, list[dict[str, Any]]] = {"added": [], "ratios": [], "compilations": []}

    def keep(kind: str, row: dict[str, Any]) -> None:
        print(kind, json.dumps(row), flush=True)
        rows[kind].append(row)
        save(complete=False)

    def save(complete: bool) -> None:
        parts = [f"```\n{json.dumps(setting, indent=1)}\n```", f"{work}; median and quartiles of the ratio."]
        added = {
            row["solver"]: row["added_microseconds"] * options.num_inference_steps / 1e3
            for row in rows["added"]
        }
        parts += [
            ratio_table(rows["ratios"], added),
            "The solvers by themselves:",
            added_table(rows["added"]),
        ]
        parts += ["Compile time of `sample`:", compile_table(rows["compilations"], options.compiled_steps)]
        figures = {**setting, "work": work, **rows}
        contents = {"fold.md": "\n\n".join(parts) + "\n", "fold.json": json.dumps(figures, indent=1)}
        save_results(options.output_dir, contents, complete)

    measure_added(options, keep)
    for name in options.networks:
        measure_network(name, options, keep)
    save(complete=True)
    print(f"\nwritten to {options.output_dir}/fold.md and fold.json")


if __name__ == "__main__":
    run_script(main, Fold)
