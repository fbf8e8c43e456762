"""Seconds from `jaxldm sample` to its first step, with compiled functions on disk and without.

Question: how long does a user wait before the first step of a sample is done?
Command:  python -m experiments.benchmarks.startup       (--quick: a small network, one round)
Needs:    nothing but jaxldm. Minutes and figures: README.md in this folder.

Each line is a process of its own (`startup_side`), as the command line starts it; the three kinds take turns.
The demo's networks have random weights, since their values cost nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.timing import machine
from experiments.figures import quick_options, save_results
from jaxldm import diffusion as D
from jaxldm import host, models, pipelines
from jaxldm.commands.terminal import run_script

KINDS = ("empty cache", "warm cache", "no cache")
COLUMNS = {"command": "imports, s", "ready": "model read, s", "first_step": "first step, s", "end": "end, s"}
HEAD = "| compiled functions | " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * 5 + "|"


@dataclasses.dataclass(frozen=True)
class Startup:
    """Time the start of `jaxldm sample` and write the table."""

    quick: bool = False
    """A small network and one round: only to see that everything runs."""
    folder: Path | None = None
    """A model of your own; by default one of the demo's size is made."""
    words: tuple[str, ...] = ("--num-inference-steps", "20")
    """More words of the command, such as --prompt for a model of texts."""
    rounds: int = 3
    """Turns of each kind."""
    output_dir: Path = Path("runs/benchmarks")
    """Where startup.md and startup.json go."""


def make_folder(folder: Path, quick: bool) -> None:
    """The demo's networks with the weights that they start with, as a folder of `jaxldm export`."""
    small = {"block_out_channels": (8, 8), "attention_head_dim": 4, "norm_num_groups": 4} if quick else {}
    denoiser, autoencoder = models.build("mini-unet", **small), models.build("mini-autoencoder")
    networks = [
        pipelines.Network(module, models.init(module, jax.random.key(0)))
        for module in (denoiser, autoencoder)
    ]
    prediction = D.v(D.VP.named("cosine"))
    pipelines.save(pipelines.class_to_image(networks[0], prediction, networks[1]), folder)


def run_side(folder: Path, out: Path, cache: str, words: tuple[str, ...]) -> dict[str, float]:
    """The marks of one process, in seconds since it was started."""
    command = [sys.executable, "-m", "experiments.benchmarks.startup_side", str(time.time())]
    command += ["sample", str(folder), "--output-dir", str(out), "--quiet", *words]
    environment = os.environ | {host.COMPILATION_CACHE: cache}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def as_line(kind: str, rounds: list[dict[str, float]]) -> str:
    """One line of the table: medians."""
    cells = [f"{np.median([marks[name] for marks in rounds]):.2f}" for name in COLUMNS]
    return f"| {kind} | " + " | ".join(cells) + " |"


def main(options: Startup) -> None:
    options = quick_options(options, rounds=1)
    setting = machine("startup", {})
    marks: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary, "model")
        if options.folder is None:
            make_folder(folder, options.quick)
        for number in range(options.rounds):
            cache = str(Path(temporary, f"cache-{number}"))
            for kind in KINDS:
                place = "off" if kind == "no cache" else cache
                marks[kind].append(run_side(folder, Path(temporary, "out"), place, options.words))
                print(json.dumps({"kind": kind, **marks[kind][-1]}), flush=True)
    table = "\n".join([HEAD, *(as_line(kind, rounds) for kind, rounds in marks.items())])
    print(f"\n{table}")
    text = f"```\n{json.dumps(setting, indent=1)}\n```\n\n{table}\n"
    figures = json.dumps({**setting, "marks": marks}, indent=1) + "\n"
    save_results(options.output_dir, {"startup.md": text, "startup.json": figures})
    print(f"\nwritten to {options.output_dir}/startup.md and startup.json")


if __name__ == "__main__":
    run_script(main, Startup)
