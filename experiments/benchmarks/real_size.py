"""Stable Diffusion 1.5 at its real size on a processor: loading, first image, a step, memory.

Question: without an accelerator, does jaxldm load, start and draw as fast as diffusers, in no more memory?
Command:  python -m experiments.benchmarks.real_size          (--quick: a small model, to see that it runs)
Needs:    the `test` extra, 5 GB of disk and 10 GB of memory. Minutes and figures: README.md in this folder.

The folder has random weights; both sides read the same files. Each line is a process of its own, so that the
memory is its own: jaxldm with an empty compilation cache and with the one that this left, then diffusers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.benchmarks.timing import installed, machine
from experiments.figures import quick_options, save_results
from jaxldm import host
from jaxldm.commands.terminal import run_script

SIDES = ("jaxldm, empty cache", "jaxldm, warm cache", "diffusers")
COLUMNS = ("", "import, s", "load, s", "process start to first step, s", "first image, s", "a step, s")
COLUMNS += ("peak memory, GB",)
HEAD = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"


@dataclasses.dataclass(frozen=True)
class RealSize:
    """Draw with Stable Diffusion 1.5 on the processor in both libraries, and write the table."""

    quick: bool = False
    """A small model: only to see that everything runs."""
    pixels: int = 512
    """Height and width of the image."""
    steps: int = 3
    """Steps of the second image; the first image has one."""
    folder: Path | None = None
    """Where the model's folder is made, or is from an earlier run; by default a temporary one."""
    output_dir: Path = Path("runs/benchmarks")
    """Where real_size.md and real_size.json go."""


def make_folder(folder: Path, quick: bool) -> None:
    """A pipeline folder with random weights, in float32, as diffusers writes it."""
    import torch

    from experiments.benchmarks import stable_diffusion_torch

    if (folder / "model_index.json").exists():
        return
    stable_diffusion_torch.pipeline("sd15", "float32", quick, torch.device("cpu")).save_pretrained(folder)


def run_side(side: str, folder: Path, cache: Path, options: RealSize) -> dict[str, Any]:
    """The figures that one process measured of itself."""
    given = [side.split(",")[0], str(folder), str(options.pixels), str(options.steps)]
    command = [sys.executable, "-m", "experiments.benchmarks.real_size_side", *given]
    environment = os.environ | {host.COMPILATION_CACHE: str(cache), "JAX_PLATFORMS": "cpu"}
    lines = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"side": side, **json.loads(lines.splitlines()[-1])}


def as_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    names = ("import", "load", "first_step", "first_image", "step", "peak_gb")
    return f"| {row['side']} | " + " | ".join(f"{row[name]:.1f}" for name in names) + " |"


def main(options: RealSize) -> None:
    options = quick_options(options, pixels=32)
    setting = machine("real_size", installed("torch", "diffusers"))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary, "model")
        make_folder(folder, options.quick)
        print(HEAD, flush=True)
        for side in SIDES:
            rows.append(run_side(side, folder, Path(temporary, "cache"), options))
            print(as_line(rows[-1]), flush=True)
    text = f"```\n{json.dumps(setting, indent=1)}\n```\n\n" + "\n".join([HEAD, *map(as_line, rows)]) + "\n"
    result = json.dumps({**setting, "pixels": options.pixels, "rows": rows}, indent=1) + "\n"
    save_results(options.output_dir, {"real_size.md": text, "real_size.json": result})
    print(f"\nwritten to {options.output_dir}/real_size.md and real_size.json")


if __name__ == "__main__":
    run_script(main, RealSize)
