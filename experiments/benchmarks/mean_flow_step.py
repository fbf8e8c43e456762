"""What a training step of mean flows costs next to one of plain flow matching, at equal batch.

Question: how much do the derivative inside the target, and the further input, add to a step?
Command:  python -m experiments.benchmarks.mean_flow_step       (--quick: a small network)
Needs:    nothing but jaxldm. Minutes and figures: README.md in this folder.

A step is loss, gradients, AdamW and moving average of a diffusion transformer on latents; the variants take
turns, and the ratio is that of each round. Forward-mode derivatives do not go through flash kernels: on a GPU
in 16 bits the mean flows attend by matrix products, the plain flow by its kernel.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.timing import cells, machine, measure_row
from experiments.figures import quick_options, save_results
from experiments.results import markdown
from jaxldm import diffusion as D
from jaxldm import few_steps, models, training
from jaxldm.commands.terminal import run_script
from jaxldm.models.denoising_network import applied
from jaxldm.training.mesh import state_shardings

MEAN_FLOWS = {"mean flow": few_steps.mean_flow_loss, "improved mean flow": few_steps.improved_mean_flow_loss}


@dataclasses.dataclass(frozen=True)
class MeanFlowStep:
    """Time training steps of mean flows and of a plain flow in turns, and write the table."""

    quick: bool = False
    """A small network and one round: only to see that everything runs."""
    preset: str = "dit-b-2"
    """Which network, of latents and labels."""
    batch_size: int = 32
    """Images in a step."""
    dtype: str = "float32"
    """Of arithmetic; weights and moments are float32."""
    rounds: int = 7
    """Rounds, in each of which every variant is timed."""
    seconds: float = 5.0
    """Of each variant in each round."""
    output_dir: Path = Path("runs/benchmarks")
    """Where mean_flow_step.md and mean_flow_step.json go."""


def plain_loss(module: Any) -> Callable[..., Any]:
    """Flow matching."""
    network = models.network(module)

    def loss_fn(params: Any, state: Any, batch: Any, key: Any) -> Any:
        call = lambda x, t, labels: network(params, x, t, labels)  # noqa: E731
        return D.diffusion_loss(key, call, D.flow(D.Flow()), batch["mean"], batch["label"])

    return loss_fn


def mean_flow_loss(module: Any, loss_of: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of mean flows; the network takes t - r as its step size."""
    network = applied(module)

    def loss_fn(params: Any, state: Any, batch: Any, key: Any) -> Any:
        noise_key, time_key = jax.random.split(key)
        x_0 = batch["mean"]
        equal = 0.75
        r, t = few_steps.interval_times(time_key, len(x_0), equal)

        def u(z: Any, r: Any, t: Any, labels: Any) -> Any:
            condition = {"labels": labels, "step_size": t - r}
            # Asked for its intermediates the network attends by matrix products, which have a derivative.
            return network(params, z, t, condition, mutable=["intermediates"])[0]

        epsilon = jax.random.normal(noise_key, x_0.shape)
        return loss_of(u, x_0, epsilon, r, t, batch["label"], still=int(equal * len(x_0)))

    return loss_fn


def runner(module: Any, loss_fn: Callable[..., Any], batch: Any) -> Callable[[], Any]:
    """One more training step of a state of its own, waited for."""
    optimizer, mesh = training.optimizer(1e-4, 0, 10**6), training.make_mesh(1)
    params = models.init(module, jax.random.key(0))
    state = training.create_train_state(jax.random.key(0), params, optimizer)
    holder = [jax.device_put(state, state_shardings(mesh, state))]
    step = training.compile_train_step(training.make_train_step(loss_fn, optimizer, 0.9999), mesh)

    def run() -> None:
        holder[0], metrics = step(holder[0], batch)
        jax.block_until_ready(metrics)

    return run


def steps(
    preset: str, batch_size: int, dtype: str, quick: bool = False
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, what runs one more step of it), each with weights of its own, made when it is asked for."""
    fields: dict[str, Any] = {"dtype": dtype, "learn_sigma": False}
    if quick:
        fields |= {"depth": 2, "hidden_size": 32, "num_heads": 2, "sample_size": 8}
    plain = models.build(preset, **fields)
    student = models.build(preset, **fields, scalar_inputs=("step_size",))
    x, _, labels, *_ = plain.example_inputs()
    batch = {
        "mean": jax.random.normal(jax.random.key(1), (batch_size, *x.shape[1:])),
        "label": jnp.arange(batch_size, dtype=labels.dtype) % plain.config.num_classes,
    }
    yield "flow", runner(plain, plain_loss(plain), batch)
    for name, loss_of in MEAN_FLOWS.items():
        yield name, runner(student, mean_flow_loss(student, loss_of), batch)


def main(options: MeanFlowStep) -> None:
    """Measures, prints and writes the table."""
    options = quick_options(options, rounds=1, seconds=0.0)
    variants = dict(steps(options.preset, options.batch_size, options.dtype, options.quick))
    title = f"{options.preset}, batch {options.batch_size}, {options.dtype}"
    row = measure_row(title, variants, options.rounds, options.seconds)
    head = ["step", *(f"{name}, ms" for name in variants), *(f"{name} / flow" for name in MEAN_FLOWS)]
    table = markdown(head, [cells(row, *variants)])
    print(table)
    setting = machine("mean_flow_step", {}) | {"device": jax.devices()[0].device_kind}
    files = {
        "mean_flow_step.md": f"```\n{json.dumps(setting, indent=1)}\n```\n\n{table}",
        "mean_flow_step.json": json.dumps({**setting, "rows": [row]}, indent=1) + "\n",
    }
    save_results(options.output_dir, files)


if __name__ == "__main__":
    run_script(main, MeanFlowStep)
