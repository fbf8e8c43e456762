"""How much memory a training step plans, with activations kept and computed again.

Question: from which batch size on does a network need `remat=True`, and how much does it save?
Command:  python -m experiments.benchmarks.train_step_memory       (--quick: a small network)
Needs:    nothing but jaxldm. Minutes and figures: README.md in this folder.

The step has loss, gradients, clipping, AdamW and moving average, on images of the preset's size; it is
compiled from shapes alone and not run. "Temporary" is what XLA plans besides weights, moments and batch.
Compiled for a processor this is a stand-in for a GPU: there attention keeps no weights and XLA fuses more, so
that it needs less.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.timing import machine
from experiments.figures import quick_options, save_results
from jaxldm import diffusion as D
from jaxldm import models, training
from jaxldm.commands.terminal import run_script

# What is computed again in the backward pass: nothing; the inside of each block; all, in one piece.
POLICIES = ("off", "blocks", "whole network")


@dataclasses.dataclass(frozen=True)
class TrainStepMemory:
    """Compile training steps with abstract parameters, and write the table."""

    quick: bool = False
    """A small network, one batch size: only to see that everything runs."""
    preset: str = "dit-xl-2"
    """Which denoising network."""
    batch_sizes: tuple[int, ...] = (32, 256)
    """Images in a step."""
    policies: tuple[str, ...] = POLICIES
    """What is computed again."""
    dtype: str = "float32"
    """Of arithmetic; weights and moments are float32. A processor widens 16 bits, which costs it memory."""
    output_dir: Path = Path("runs/benchmarks")
    """Where train_step_memory.md and train_step_memory.json go."""


def planned(module: Any, policy: str, batch_size: int) -> dict[str, int]:
    """Bytes of the state and of what the compiled step needs besides."""
    module = models.from_config(dataclasses.replace(module.config, remat=policy == "blocks"))
    x, _, *conditions = jax.tree.map(
        lambda given: jax.ShapeDtypeStruct((batch_size, *given.shape[1:]), given.dtype),
        module.example_inputs(),
    )
    names = [*inspect.signature(module.__call__).parameters][2:]
    condition = {name: given for name, given in zip(names, conditions, strict=False) if given is not None}
    optimizer = training.optimizer(1e-4, 0, 10**6, max_grad_norm=1.0)
    continuous = models.convention(module).continuous
    prediction = D.flow(D.Flow()) if continuous else D.epsilon(D.VP(D.linear_betas()))
    call = models.network(module)

    def predict(params: Any, x: Any, t: Any, condition: Any) -> Any:
        return call(params, x, t, condition)[..., : x.shape[-1]]

    def loss_fn(params: Any, state: Any, batch: Any, key: Any) -> Any:
        network = jax.checkpoint(predict) if policy == "whole network" else predict
        network = functools.partial(network, params)
        return D.diffusion_loss(key, network, prediction, batch["mean"], batch["condition"])

    state = jax.eval_shape(
        lambda params: training.create_train_state(jax.random.key(0), params, optimizer),
        models.shapes(module),
    )
    step = training.compile_train_step(
        training.make_train_step(loss_fn, optimizer, 0.9999), training.make_mesh(1)
    )
    analysis: Any = step.lower(state, {"mean": x, "condition": condition}).compile().memory_analysis()
    return {"state": analysis.argument_size_in_bytes, "temporary": analysis.temp_size_in_bytes}


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each batch size and policy."""
    head = ["batch", "computed again", "state, GB", "temporary, GB", "of that without"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    kept = {row["batch_size"]: row["temporary"] for row in rows if row["policy"] == "off"}
    for row in rows:
        share = row["temporary"] / kept.get(row["batch_size"], float("nan"))
        sizes = [f"{row[kind] / 1e9:.3g}" for kind in ("state", "temporary")]
        lines.append(
            "| " + " | ".join([str(row["batch_size"]), row["policy"], *sizes, f"{share:.0%}"]) + " |"
        )
    return "\n".join(lines)


def main(options: TrainStepMemory) -> None:
    options = quick_options(options, batch_sizes=(2,))
    small = {"depth": 2, "hidden_size": 32, "num_heads": 2} if options.quick else {}
    module = models.build(options.preset, dtype=options.dtype, **small)
    rows: list[dict[str, Any]] = []
    for batch_size in options.batch_sizes:
        for policy in options.policies:
            figures = planned(module, policy, batch_size)
            rows.append({"batch_size": batch_size, "policy": policy, **figures})
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    setting = machine("train_step_memory.py", {}) | {"preset": options.preset, "dtype": options.dtype}
    text = f"```\n{json.dumps(setting, indent=1)}\n```\n\n{table(rows)}\n"
    figures = json.dumps({**setting, "rows": rows}, indent=1)
    files = {"train_step_memory.md": text, "train_step_memory.json": figures}
    save_results(options.output_dir, files)


if __name__ == "__main__":
    run_script(main, TrainStepMemory)
