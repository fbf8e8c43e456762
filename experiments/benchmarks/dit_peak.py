"""Training steps of diffusion transformers compared with the processor's own matrix peak: jaxldm and PyTorch.

Question: what share of the float32 peak of matrix products does a training step reach on a processor, and is
          it as fast as that of the same model in PyTorch, eager and with torch.compile?
Command:  python -m experiments.benchmarks.dit_peak            (--quick: a small model, to see that it runs)
Needs:    the `test` extra and a C++ compiler for torch.compile; without PyTorch it times jaxldm alone.
          Minutes and figures: README.md in this folder.

A step is loss, gradients, clipping, AdamW and moving average. Steps and products of square matrices take
turns, a round after another; the peak is the largest rate of any product of either framework in any round.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks import card_jaxldm
from experiments.benchmarks.timing import Run, cores, installed, machine, measure_row
from experiments.figures import quick_options, save_results
from experiments.results import markdown
from jaxldm import host, models
from jaxldm.commands.terminal import run_script
from jaxldm.training.mesh import batch_sharding, make_mesh

SIDES = ("jaxldm", "eager", "torch.compile")
HEAD = ["width, blocks, batch", "10^9 operations", *(f"{side}, s" for side in SIDES)]
HEAD += [*(f"{side}, of the peak" for side in SIDES), "eager / jaxldm", "torch.compile / jaxldm"]


@dataclasses.dataclass(frozen=True)
class DitPeak:
    """Time training steps of diffusion transformers and matrix products in turns, and write the table."""

    quick: bool = False
    """A small model and two rounds: only to see that everything runs."""
    rounds: int = 7
    """Turns of each variant in each row."""
    widths: tuple[int, ...] = (256, 384, 768)
    """Of the tokens (256 of them, on latents of 32x32x4), multiples of 64, each a row."""
    blocks: int = 4
    """Blocks of each network."""
    processor_time: bool = False
    """Count seconds of the processor and not of the clock, for a machine that other programs use; pinned to
    one core, as in `taskset -c 1 python -m experiments.benchmarks.dit_peak --processor-time`.
    """
    matrix: int = 2048
    """Rows and columns of the matrices that are multiplied, one pair for each core."""
    output_dir: Path = Path("runs/benchmarks")
    """Where dit_peak.md and dit_peak.json go."""


def network(width: int, blocks: int, quick: bool = False) -> Any:
    """DiT with patches of 2 in the layout of diffusers, the same function as theirs."""
    heads = {"num_attention_heads": max(width // 64, 1), "attention_head_dim": min(width, 64)}
    sizes = {"num_layers": blocks, "sample_size": 8 if quick else 32, "num_embeds_ada_norm": 10}
    return models.from_config(models.DiTTransformer2DConfig(out_channels=4, scan=False, **heads, **sizes))


def batch_of(width: int) -> int:
    """Latents in a step: about as many operations for every width, and a multiple of 8 devices."""
    return 8 * max(1, 1024 // width)


def our_products(side: int) -> Run:
    """A product on each device."""
    mesh = make_mesh()
    multiply = jax.jit(lambda a: jax.lax.batch_matmul(a, a))
    matrices = jax.random.normal(jax.random.key(0), (len(mesh.devices.flat), side, side))
    matrices = jax.device_put(matrices, batch_sharding(mesh))
    return lambda: multiply(matrices).block_until_ready()


def their_products(side: int) -> Run:
    """As many, one after another on all cores."""
    import torch

    torch.set_num_threads(cores())
    matrices = torch.randn(len(make_mesh().devices.flat), side, side)
    return lambda: [torch.mm(a, a) for a in matrices]


def variants(module: Any, batch_size: int, side: int, with_torch: bool) -> tuple[dict[str, Run], float]:
    """What takes turns in a row, and the operations of a step: two for a multiply-accumulate."""
    step, flops, _ = card_jaxldm.training_run(module, batch_size)
    runs: dict[str, Run] = {"jaxldm": step}
    products = {"jaxldm, products": our_products(side)}
    if with_torch:
        from experiments.benchmarks import card_torch

        card_torch.forget()  # another size would make the compiled shapes dynamic, which is slower
        products["PyTorch, products"] = their_products(side)
        for name in SIDES[1:]:
            runs[name] = card_torch.training_run(module, batch_size, name == "torch.compile")
    return runs | products, flops


def with_shares(rows: list[dict[str, Any]], of_products: float) -> tuple[list[dict[str, Any]], float]:
    """The rows with each side's share of the peak, and the peak in operations per second.

    Args:
        rows: of `measure_row`, with the `operations` of a step.
        of_products: operations of one call of a variant of products.
    """
    fastest = [time for row in rows for name, time in row["fastest"].items() if "products" in name]
    peak = of_products / min(fastest) * 1e3
    shares = [
        {side: row["operations"] / row["milliseconds"][side] * 1e3 / peak for side in sides_of(row)}
        for row in rows
    ]
    return [row | {"of_peak": share} for row, share in zip(rows, shares, strict=True)], peak


def sides_of(row: Mapping[str, Any]) -> list[str]:
    """Those that were timed."""
    return [side for side in SIDES if side in row["milliseconds"]]


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """A line of the table; empty for a side that was not timed."""
    times, shares, ratios = row["milliseconds"], row["of_peak"], row["ratio_quartiles"]
    return [
        row["row"],
        f"{row['operations'] / 1e9:.0f}",
        *(f"{times[side] / 1e3:.2f}" if side in times else "" for side in SIDES),
        *(f"{shares[side]:.0%}" if side in shares else "" for side in SIDES),
        *(
            "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratios[side]) if side in ratios else ""
            for side in SIDES[1:]
        ),
    ]


def save(options: DitPeak, rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """Write the rows, and return their table; in the folder `unfinished` while some are to come."""
    rows, peak = with_shares(rows, 2 * jax.device_count() * options.matrix**3)
    table = markdown(HEAD, [cells_of(row) for row in rows])
    setting = machine("dit_peak", versions) | {"peak, 10^9 operations per second": round(peak / 1e9, 1)}
    setting["seconds"] = "of the processor" if options.processor_time else "of the clock"
    contents = {
        "dit_peak.md": f"```\n{json.dumps(setting, indent=1)}\n```\n\n{table}",
        "dit_peak.json": json.dumps({**setting, "rows": rows}, indent=1) + "\n",
    }
    save_results(options.output_dir, contents, complete=len(rows) == len(options.widths))
    return table


def main(options: DitPeak) -> None:
    """Measures, prints and writes the table."""
    host.prepare()  # before anything is computed
    small = {"rounds": 2, "widths": (32,), "blocks": 1, "matrix": 128}
    options = quick_options(options, **small)
    versions, rows = installed("torch", "diffusers"), []
    clock = time.process_time if options.processor_time else time.perf_counter
    for width in options.widths:
        batch_size = 8 if options.quick else batch_of(width)
        module = network(width, options.blocks, options.quick)
        runs, operations = variants(module, batch_size, options.matrix, bool(versions))
        row = measure_row(f"{width}, {options.blocks}, {batch_size}", runs, options.rounds, 0.0, clock)
        rows.append(row | {"operations": operations})
        table = save(options, rows, versions)
        print(json.dumps(rows[-1]), flush=True)
    print(table)


if __name__ == "__main__":
    run_script(main, DitPeak)
