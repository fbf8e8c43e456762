"""Models compared with diffusers, eager and torch.compile, on one device, in one run: what the scripts share.

A row is a whole run (a condition, all steps, decoding, pixels on the host) or one call of the denoising
network alone. The variants of a row take turns. What the models are is said by a module such as
`stable_diffusion_pairs`; `stable_diffusion.py` and `diffusion_transformers.py` are the commands.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np

from experiments.benchmarks.random_networks import random_weight
from experiments.benchmarks.timing import Run, cells, installed, machine, measure_row
from jaxldm import host, models
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.files import write_atomically
from jaxldm.models.cost import macs_of

TORCH_PACKAGES = ("torch", "diffusers", "transformers")
QUICK_PIXELS = 16  # The pixels of the small models are divided by it.


@dataclasses.dataclass(frozen=True)
class Options:
    """Time whole runs and single network calls compared with diffusers, and write the table."""

    quick: bool | None = None
    """Small models and pictures; default: only where JAX has no accelerator."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and computation; default bfloat16 on an accelerator, float32 on a CPU."""
    rows: tuple[str, ...] = ()
    """Model and pixels; from small to large, as JAX tells only the largest memory use so far."""
    num_inference_steps: int = 30
    rounds: int = 7
    """Turns of each variant in each row."""
    seconds: float = 0.0
    """How long a turn is, at least; one image is always made."""
    eager: bool = True
    """Time diffusers as it is."""
    compiled: bool = True
    """Time diffusers with torch.compile."""
    compile_backend: str = "inductor"
    compile_mode: str = "default"
    """The mode of torch.compile's backend: "max-autotune" is slower to compile."""
    peak_size: int | None = None
    """Side of the matrices whose product measures the peak; default 8192, 1024 on a CPU."""
    output_dir: Path = Path(__file__).parent / "results"
    """Where the table goes, as .md and .json."""


def with_defaults(options: Options) -> Options:
    """Options that were left open, chosen by what JAX runs on."""
    on_cpu = jax.default_backend() == "cpu"
    chosen = {"quick": on_cpu, "dtype": "float32" if on_cpu else "bfloat16"}
    chosen["peak_size"] = 1024 if on_cpu else 8192
    left_open = {name: value for name, value in chosen.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **left_open)


def parse_row(row: str, quick: bool, pairs: ModuleType) -> tuple[str, int]:
    """ "sdxl-1024" -> ("sdxl", 1024), or fewer pixels for the small models."""
    family, _, pixels = row.rpartition("-")
    one_of("model", family, pairs.FAMILIES)
    if not (pixels.isdigit() and int(pixels) > 0 and int(pixels) % 128 == 0):
        raise InvalidArgumentError(
            f"{row!r} should be a model and pixels, a multiple of 128, as {next(iter(pairs.FAMILIES))}-512"
        )
    return family, int(pixels) // (QUICK_PIXELS if quick else 1)


def count_flops(module: Any, inputs: dict[str, np.ndarray]) -> float:
    """Operations of products and convolutions in one call of the network: two a multiply-accumulate."""

    def call(params, inputs):
        return module.apply({"params": params}, **inputs)

    return 2.0 * macs_of(call, models.shapes(module), inputs)


def measure_peak(dtype: str, size: int, rounds: int = 5) -> float:
    """Operations a second of the fastest of a few chains of eight square matrix products."""

    @jax.jit
    def chain(a, b):
        return jax.lax.fori_loop(0, 8, lambda _, x: x @ b, a)

    key = jax.random.key(0)
    a, b = (random_weight(jax.random.fold_in(key, i), (size, size), dtype) for i in range(2))
    chain(a, b).block_until_ready()
    fastest = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        chain(a, b).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    return 8 * 2 * size**3 / fastest


def torch_side(pairs: ModuleType) -> tuple[ModuleType, ModuleType] | None:
    """(its own module, `torch_common`); None if PyTorch is missing or does not see JAX's accelerator."""
    if not installed(*TORCH_PACKAGES):
        return None
    common = importlib.import_module("experiments.benchmarks.torch_common")
    return None if common.device() is None else (importlib.import_module(pairs.TORCH_SIDE), common)


# ---------------------------------------------------------------- rows


def memory_peaks(variants: dict[str, Run], largest_before: int, common: ModuleType | None) -> dict[str, Any]:
    """Bytes of device memory in one more run of each variant; nothing on a CPU, which does not count them.

    JAX's figure is the largest so far in this process: "at_most" says that an earlier row may have set it.
    PyTorch's variants share their weights, and each is counted by itself.
    """
    peaks: dict[str, Any] = {}
    ours = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if ours is None:
        return peaks
    peaks["jaxldm"], peaks["at_most"] = ours, ours <= largest_before
    for name, run in variants.items():
        if name != "jaxldm":
            peaks[name] = common.peak_memory(run)
    return peaks


def both_sides(
    family: str, options: Options, pairs: ModuleType
) -> tuple[Any, dict[str, Any], tuple[ModuleType, ModuleType] | None]:
    """(our pipeline, those of PyTorch by the names of their variants, PyTorch's modules)."""
    side = torch_side(pairs) if options.eager or options.compiled else None
    ours, theirs = pairs.our_pipeline(family, options.dtype, options.quick), {}
    if side is not None:
        other, common = side
        pipe = other.pipeline(family, options.dtype, options.quick, common.device())
        theirs |= {"eager": pipe} if options.eager else {}
        if options.compiled:
            theirs["torch.compile"] = common.compiled(pipe, options.compile_backend, options.compile_mode)
    return ours, theirs, side


def measure(
    row: str, options: Options, peak: float, largest: int, pairs: ModuleType
) -> Iterator[dict[str, Any]]:
    """Two rows of the table: the whole run, and the network alone. peak: operations a second."""
    family, pixels = parse_row(row, options.quick, pairs)
    steps, scale = options.num_inference_steps, pairs.FAMILIES[family].guidance_scale
    ours, theirs, side = both_sides(family, options, pairs)
    other, common = side or (None, None)
    network = pairs.our_denoiser(ours)
    inputs = pairs.network_inputs(network.module, pairs.latent_shape(ours, pixels)[0])
    flops = count_flops(network.module, inputs)
    shape = (1, *pairs.latent_shape(ours, pixels))
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    networks = {"jaxldm": pairs.our_network(network, inputs)}
    images = {"jaxldm": lambda: pairs.our_draw(ours, latents, steps, scale)}  # from the same latents
    for name, pipe in theirs.items():
        networks[name] = other.network(common.denoiser(pipe), inputs, options.dtype)
        images[name] = functools.partial(other.draw, pipe, latents, steps, scale)
    for what, variants, work in (
        (f"{steps} steps, an image", images, flops * steps),
        (f"the network, one call for {len(inputs['t'])}", networks, flops),
    ):
        measured = measure_row(
            f"{pairs.FAMILIES[family].title}, {pixels} pixels, {what}",
            variants,
            options.rounds,
            options.seconds,
        )
        times = measured["milliseconds"]
        first = measured["first_call_seconds"]
        is_image = variants is images
        yield {
            **measured,
            "model": family,
            "pixels": pixels,
            "network_flops": work,
            "fraction_of_peak": {name: work / (ms / 1e3) / peak for name, ms in times.items()},
            "peak_memory_bytes": memory_peaks(variants, largest, common) if is_image else {},
            # The network alone is not compiled again by PyTorch after the whole run.
            "compile_seconds": {name: first[name] - times[name] / 1e3 for name in times if is_image},
        }


# ---------------------------------------------------------------- the table

VARIANTS = ("jaxldm", "eager", "torch.compile")
COLUMNS = (
    "row",
    *(f"{name}, ms" for name in VARIANTS),
    *(f"{name} / jaxldm" for name in VARIANTS[1:]),
    "share of the peak",
    "compiling, s",
    "memory, GB",
)
HEAD = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"


def as_line(row: dict[str, Any]) -> str:
    """One line of the table; the last three columns have jaxldm, eager and torch.compile, "-" if not run."""

    def three(values: dict[str, float], form: str, unit: float = 1.0) -> str:
        found = [format(values[name] / unit, form) if name in values else "-" for name in VARIANTS]
        return ", ".join(found) if any(name in values for name in VARIANTS) else ""

    memory = three(row["peak_memory_bytes"], ".2f", 1e9)
    memory = f"at most {memory}" if row["peak_memory_bytes"].get("at_most") else memory
    last = [three(row["fraction_of_peak"], ".1%"), three(row["compile_seconds"], ".1f"), memory]
    return "| " + " | ".join([*cells(row, *VARIANTS), *last]) + " |"


def describe(options: Options, peak: float, pairs: ModuleType) -> str:
    """What was run, in words: small sizes and missing variants are said."""
    lines = [
        f"{options.dtype}, {options.num_inference_steps} steps of {pairs.SAMPLER}, one image, "
        f"random weights, {options.rounds} rounds; median and quartiles of the ratio.",
        f"Peak: {peak / 1e12:.3g} TFLOP/s, measured in this run by products of {options.peak_size} x "
        f"{options.peak_size} matrices in {options.dtype}. Shares of it count the network alone.",
    ]
    if options.quick:
        lines.append(
            f"SMALL SIZES, on {jax.default_backend()}: {pairs.SMALL}, pixels divided by {QUICK_PIXELS}. "
            "They show that everything runs, not what the published sizes do."
        )
    if torch_side(pairs) is None:
        lines.append("PyTorch is missing, or does not see the accelerator that JAX sees: jaxldm alone.")
    return "\n".join(lines)


def main(options: Options, pairs: ModuleType, name: str) -> None:
    """Measures every row and writes NAME.md and NAME.json after each."""
    # PyTorch needs a part of the same memory: JAX takes what it uses, not three quarters at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    host.prepare()  # before anything is computed
    options = with_defaults(options)
    for row in options.rows:
        parse_row(row, options.quick, pairs)
    side = torch_side(pairs)
    device = jax.local_devices()[0]
    setting = machine(name, installed(*TORCH_PACKAGES)) | {
        "backend": device.platform,
        "device": device.device_kind,
    }
    setting |= {"small_sizes": options.quick, "dtype": options.dtype} | (side[1].prepare() if side else {})
    peak = measure_peak(options.dtype, options.peak_size)
    work = describe(options, peak, pairs)
    print(f"{json.dumps(setting)}\n{work}\n\n{HEAD}", flush=True)
    rows: list[dict[str, Any]] = []
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for row in options.rows:
        largest = max((done["peak_memory_bytes"].get("jaxldm", 0) for done in rows), default=0)
        for measured in measure(row, options, peak, largest, pairs):
            print(as_line(measured), flush=True)
            rows.append(measured)
            table = "\n".join([HEAD, *(as_line(done) for done in rows)])
            text = f"```\n{json.dumps(setting, indent=1)}\n```\n\n{work}\n\n{table}\n"
            figures = {**setting, "work": work, "peak_flops_per_second": peak, "rows": rows}
            write_atomically(options.output_dir / f"{name}.md", text.encode())
            write_atomically(options.output_dir / f"{name}.json", json.dumps(figures, indent=1).encode())
        gc.collect()
        if side is not None:
            side[1].forget()
    print(f"\nwritten to {options.output_dir}/{name}.md and {name}.json")
