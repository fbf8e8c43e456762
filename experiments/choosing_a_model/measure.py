"""What each family costs: parameters, multiply-accumulates, memory, and seconds on this machine.

Question: which model can be run here, and what does a picture take?
Command:  python -m experiments.choosing_a_model.measure
Needs:    jaxldm alone; weights are random. Minutes and what came out: README.md in this folder.
          --quick measures the two networks of digits, to see that it runs.

Temporary memory is what XLA plans for every network, from shapes alone; libraries that it calls may take
more for themselves. Those that fit under --most-gigabytes and --most-tera-macs are also run, each in a
process of its own, whose largest memory is measured.
Finished rows stay in models.json: a second call with other --parts adds to them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing
from experiments.choosing_a_model import families
from experiments.figures import quick_options, read_result, save_results
from jaxldm import host, models
from jaxldm.commands.terminal import run_script
from jaxldm.errors import one_of

QUICK = ("tiny-dit", "mini-unet", "mini-autoencoder, 28 pixels")
LARGE = 1e11  # multiply-accumulates of networks whose rate stands for those that are not run
LONG = 8  # seconds of a call, beyond which one is enough


@dataclasses.dataclass(frozen=True)
class Measure:
    """Measure the networks of families.py, and write a table of them and one of whole pictures."""

    parts: tuple[str, ...] = ()
    """Names in families.py; empty: all."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of weights and computation."""
    most_gigabytes: float = 12.0
    """Networks are run whose weights and temporary memory stay below this."""
    most_tera_macs: float = 4.5
    """Networks are run whose call takes no more than so many 10^12 multiply-accumulates."""
    rounds: int = 3
    """Calls, of which the quickest counts: other programs only slow them. One where it takes 8 seconds."""
    separate: bool = True
    """A process for each, so that its largest memory is its own."""
    quick: bool = False
    """The networks of digits alone: only to see that everything runs."""
    output_dir: Path = Path("runs/choosing-a-model")
    """Where models.json and models.md go."""


def measure(name: str, dtype: str, options: Measure) -> dict[str, Any]:
    """The row of one network in one dtype."""
    host.prepare()  # here, as each row may have a process of its own
    part = families.PARTS[name]
    module = part.module(dtype)
    inputs = part.inputs(module)
    start = time.perf_counter()
    compiled = models.compile_forward(module, *inputs, dtype=dtype, **part.options)
    compile_seconds = time.perf_counter() - start
    memory = models.memory_of(compiled)
    row = {
        "part": name,
        "dtype": dtype,
        "parameters": models.count_params(module),
        "macs": models.count_macs(module, *inputs, **part.options),
        "compile_seconds": compile_seconds,
        **{f"{kind}_bytes": size for kind, size in memory._asdict().items()},
    }
    needed = (memory.weights + memory.temporary) / 1e9
    if needed > options.most_gigabytes:
        return row | {"not_run": f"{needed:.1f} GB of weights and temporary memory"}
    if row["macs"] > options.most_tera_macs * 1e12:
        return row | {"not_run": f"{row['macs'] / 1e12:.1f} x 10^12 multiply-accumulates"}
    times = run(compiled, options.rounds)
    row |= {"seconds": min(times), "calls": len(times)}
    if options.separate:  # Linux counts in KiB
        row["process_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def run(compiled: jax.stages.Compiled, rounds: int) -> list[float]:
    """Seconds of each call, the first of several left out, which touches its memory for the first time."""
    (params, *inputs), _ = jax.tree.map(small_numbers, compiled.args_info)
    times: list[float] = []
    while len(times) <= rounds and not (times and times[-1] > LONG):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, *inputs))
        times.append(time.perf_counter() - start)
    return times[1:] or times


def small_numbers(spec: Any) -> jax.Array:
    """251 numbers evenly between -0.025 and 0.025, over and over; zeros for labels and tokens."""
    if not jnp.issubdtype(spec.dtype, jnp.floating):
        return jnp.zeros(spec.shape, spec.dtype)
    return _filled(spec.shape, spec.dtype).block_until_ready()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _filled(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """One loop that writes the array, so that a process's largest memory is that of the call."""
    count = jax.lax.iota(jnp.uint32, math.prod(shape))
    values = (count % jnp.uint32(251)).astype(jnp.float32) * 2e-4 - 0.025
    return values.astype(dtype).reshape(shape)


def measured(name: str, dtype: str, options: Measure) -> dict[str, Any]:
    """`measure`, in a process that ends with it where options say so."""
    if not options.separate:
        return measure(name, dtype, options)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, name, dtype, options).result()


def report(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """models.md: a table of networks for each dtype, and one of pictures."""
    dtypes = dict.fromkeys(dtype for _, dtype in rows)
    parts = [f"Networks, {dtype}\n\n{networks_table(rows, dtype)}" for dtype in dtypes]
    return "\n".join([*parts, f"Pictures, float32\n\n{pictures_table(rows)}"])


def networks_table(rows: dict[tuple[str, str], dict[str, Any]], dtype: str) -> str:
    """A line for each network that was measured in that dtype."""
    head = ["network", "parameters, M", "G multiply-accumulates", "weights, GB", "temporary, GB"]
    body = []
    for name in families.PARTS:
        row = rows.get((name, dtype))
        if row is None:
            continue
        line = [name, f"{row['parameters'] / 1e6:,.1f}", number(row["macs"], 1e9)]
        line += [number(row.get(f"{kind}_bytes"), 1e9) for kind in ("weights", "temporary", "process")]
        body.append([*line, number(row.get("seconds"))])
    return markdown([*head, "process, GB", "seconds"], body)


def pictures_table(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """A line for each picture whose parts are all known, in float32."""
    head = ["picture", "pixels", "calls", "parameters, M", "weights, GB", "T multiply-accumulates", "seconds"]
    of = {name: row for (name, dtype), row in rows.items() if dtype == "float32"}
    body = []
    for title, picture in families.PICTURES.items():
        if not set(picture.calls) <= set(of):
            continue
        # A network stands in several parts where it has several sizes.
        networks = {families.PARTS[name].preset: of[name]["parameters"] for name in picture.calls}
        count = sum(networks.values())
        macs = sum(of[name]["macs"] * calls for name, calls in picture.calls.items())
        line = [title, str(picture.pixels), picture.how, f"{count / 1e6:,.1f}", number(4 * count, 1e9)]
        body.append([*line, number(macs, 1e12), seconds_of(picture, of)])
    return markdown(head, body)


def seconds_of(picture: families.Picture, rows: dict[str, dict[str, Any]]) -> str:
    """Calls times seconds; "about" where a part was not run: what it multiplies, at the rate of others."""
    large = [row for row in rows.values() if row.get("seconds") and row["macs"] > LARGE]
    total, known = 0.0, True
    for name, calls in picture.calls.items():
        seconds = rows[name].get("seconds")
        if seconds is None:
            if not large:
                return ""
            known = False
            seconds = (
                rows[name]["macs"] * sum(row["seconds"] for row in large) / sum(r["macs"] for r in large)
            )
        total += calls * seconds
    return number(total) if known else f"about {float(f'{total:.2g}'):,.0f}"


def number(value: float | None, unit: float = 1.0) -> str:
    """Three digits, or nothing."""
    if value is None:
        return ""
    value /= unit
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(options: Measure) -> None:
    options = quick_options(options, parts=options.parts or QUICK)
    names = options.parts or tuple(families.PARTS)
    for name in names:
        one_of("part", name, families.PARTS)
    kept = json.loads(read_result(options.output_dir / "models.json") or '{"rows": []}')["rows"]
    rows = {(row["part"], row["dtype"]): row for row in kept}
    versions = timing.machine("", {})["versions"]
    where = timing.machine("", {})["processor"] + f", {timing.cores()} core(s)"
    for name in names:
        for dtype in options.dtypes:
            row = measured(name, dtype, options) | {"machine": where, "versions": versions}
            rows[name, dtype] = row
            print(name, dtype, f"{number(row.get('seconds'))} s", row.get("not_run", ""), flush=True)
            text = report(rows)
            content = json.dumps({"rows": list(rows.values())}, indent=1)
            save_results(options.output_dir, {"models.json": content, "models.md": text})
    print(f"\n{text}\n{where}; models.json and models.md: {options.output_dir}")


if __name__ == "__main__":
    run_script(main, Measure)
