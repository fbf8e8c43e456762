"""How long tracing and compiling the forward passes of the large transformers takes, with and without scan.

Question: does one scan over the identical blocks keep compiling FLUX.1 under a minute on two cores?
Command:  python -m experiments.benchmarks.compile_time       (--quick: two blocks of each kind)
Needs:    nothing but jaxldm; no weights: they are abstract. Minutes and figures: README.md in this folder.

Each row is one network at its published size, weights and arithmetic in bfloat16, one image. Its blocks are
one scan, or written out one behind the other. The rows so far are in the folder `unfinished` of the output,
so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.timing import cores, machine
from experiments.figures import quick_options, save_results
from jaxldm import models
from jaxldm.commands.terminal import run_script

NETWORKS = ("flux-dev", "sd3-medium", "sd35-large", "dit-xl-2")
# The fields that say how many blocks a network has.
DEPTHS = ("num_layers", "num_single_layers", "depth")


@dataclasses.dataclass(frozen=True)
class CompileTime:
    """Trace and compile forward passes with abstract weights, and write the table."""

    quick: bool = False
    """Two blocks of each kind: only to see that everything runs."""
    networks: tuple[str, ...] = NETWORKS
    """Presets of jaxldm.models."""
    scan: tuple[bool, ...] = (True, False)
    """Blocks as one scan, and written out."""
    dtype: str = "bfloat16"
    """Of weights and arithmetic."""
    output_dir: Path = Path("runs/benchmarks")
    """Where compile_time.md and compile_time.json go."""


def make_module(name: str, scan: bool, options: CompileTime) -> Any:
    """A preset, or with --quick the same with two blocks of each kind."""
    fields = {field.name for field in dataclasses.fields(models.PRESETS[name])}
    few = {depth: 2 for depth in DEPTHS if depth in fields} if options.quick else {}
    return models.build(name, scan=scan, dtype=options.dtype, **few)


def measure(name: str, scan: bool, options: CompileTime) -> dict[str, Any]:
    """Seconds of tracing and of compiling one forward pass, and the memory that XLA plans for it."""
    module = make_module(name, scan, options)
    shapes = models.shapes(module)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, options.dtype), shapes)

    def forward(params, *inputs):
        return module.apply({"params": params}, *inputs)

    begin = time.perf_counter()
    lowered = jax.jit(forward).lower(params, *module.example_inputs())
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    plan = compiled.memory_analysis()
    jax.clear_caches()
    return {
        "network": name,
        "scan": scan,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "input": list(module.example_inputs()[0].shape),
        "trace_seconds": traced - begin,
        "compile_seconds": done - traced,
        "weight_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
        "temporary_bytes": getattr(plan, "temp_size_in_bytes", None),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each row: seconds, and GiB of weights and of of what is planned on top of them."""
    head = ["network", "parameters", "x", "blocks", "trace, s", "compile, s", "both, s", "temporary, GiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        both = row["trace_seconds"] + row["compile_seconds"]
        planned = row["temporary_bytes"]
        cells = [
            row["network"],
            f"{row['parameters']:,}",
            "x".join(map(str, row["input"])),
            "one scan" if row["scan"] else "written out",
            f"{row['trace_seconds']:.1f}",
            f"{row['compile_seconds']:.1f}",
            f"{both:.1f}",
            "" if planned is None else f"{planned / 2**30:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(options: CompileTime, setting: dict[str, Any], rows: list[dict[str, Any]], complete: bool) -> None:
    """compile_time.md and compile_time.json."""
    text = f"```\n{json.dumps(setting, indent=1)}\n```\n\n{table(rows)}\n"
    figures = json.dumps({**setting, "rows": rows}, indent=1)
    contents = {"compile_time.md": text, "compile_time.json": figures}
    save_results(options.output_dir, contents, complete)


def main(options: CompileTime) -> None:
    options = quick_options(options)
    setting = machine("compile_time", {}) | {"cores": cores(), "dtype": options.dtype}
    print(json.dumps(setting), flush=True)
    rows: list[dict[str, Any]] = []
    planned = [(name, scan) for name in options.networks for scan in options.scan]
    for name, scan in planned:
        rows.append(measure(name, scan, options))
        print(json.dumps(rows[-1]), flush=True)
        write(options, setting, rows, complete=len(rows) == len(planned))
    print(f"\nwritten to {options.output_dir}/compile_time.md and compile_time.json")


if __name__ == "__main__":
    run_script(main, CompileTime)
