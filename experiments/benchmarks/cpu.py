"""jaxldm and PyTorch (diffusers) on the processor: same architectures, sizes, work and threads, in one run.

Question: without an accelerator, does jaxldm train and sample as fast as diffusers, eager and torch.compile?
Command:  python -m experiments.benchmarks.cpu            (--quick: small sizes, to see that it runs)
Needs:    the `test` extra and a C++ compiler for torch.compile; without PyTorch it times jaxldm alone.
          Minutes and figures: README.md in this folder.

The variants of a row take turns, a round after another, so that a machine whose speed drifts is fair to all;
each round gives one ratio, and the table has their median and quartiles. Compile times stand apart.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import pairs
from experiments.benchmarks.pairs import BETA, GUIDANCE_SCALE, LEARNING_RATE, MAX_GRAD_NORM, NUM_CLASSES, Pair
from experiments.benchmarks.timing import Run, cells, installed, machine, measure_row
from experiments.figures import quick_options, save_results
from jaxldm import diffusion as D
from jaxldm import host, models, training
from jaxldm.commands.terminal import run_script
from jaxldm.errors import one_of
from jaxldm.training.mesh import batch_sharding, fastest_mesh, make_mesh, replicated
from jaxldm.training.step import compile_train_step

ARCHITECTURES = {
    "mini-unet": pairs.mini_unet,
    "tiny-dit": pairs.tiny_dit,
    "autoencoder": pairs.autoencoder,
}


@dataclasses.dataclass(frozen=True)
class Cpu:
    """Time jaxldm compared with diffusers on the processor and write the table."""

    quick: bool = False
    """Small models and two rounds: only to see that everything runs."""
    rounds: int = 9
    """Turns of each variant in each row."""
    seconds: float = 0.8
    """How long a turn is, at least; one call is always made."""
    num_inference_steps: int = 50
    """DDIM steps of the sampling rows."""
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    """Which, in order."""
    output_dir: Path = Path("runs/benchmarks")
    """Where cpu.md and cpu.json go."""


# ---------------------------------------------------------------- jaxldm's side


def our_training(pair: Pair) -> Run:
    """One training step after another: AdamW, clipping, no average; on the devices that a training takes."""
    optimizer = training.optimizer(LEARNING_RATE, 0, 10**6, 0.01, MAX_GRAD_NORM)
    params = models.init(pair.ours, jax.random.key(0))
    mesh = fastest_mesh(make_mesh(), params)
    state = training.create_train_state(jax.random.key(1), params, optimizer)
    path = D.VP(D.linear_betas())

    def denoising_loss(params, state, batch, key):
        network = functools.partial(models.network(pair.ours), params)
        return D.diffusion_loss(key, network, D.epsilon(path), batch["image"], batch["label"])

    def reconstruction_loss(params, state, batch, key):
        apply = lambda method: lambda x: pair.ours.apply({"params": params}, x, method=method)  # noqa: E731
        return training.autoencoder_loss(key, apply("encode"), apply("decode"), batch["image"], beta=BETA)

    loss_fn = reconstruction_loss if pair.name == "AutoencoderKL" else denoising_loss
    step = compile_train_step(training.make_train_step(loss_fn, optimizer), mesh)
    batch = {
        "image": jax.random.uniform(jax.random.key(2), (pair.batch_size, *pair.shape), minval=-1),
        "label": jnp.arange(pair.batch_size, dtype=jnp.int32) % NUM_CLASSES,
    }
    batch = jax.device_put(batch, batch_sharding(mesh))
    holder = [jax.device_put(state, replicated(mesh))]

    def run():
        holder[0], metrics = step(holder[0], batch)
        return metrics["loss"].block_until_ready()

    return run


def our_sampling(pair: Pair, num_inference_steps: int) -> Run:
    """DDIM with both branches of guidance in one batch (or one decoding), images split over the devices."""
    mesh = make_mesh()
    params = jax.device_put(models.init(pair.ours, jax.random.key(0)), replicated(mesh))
    if pair.name == "AutoencoderKL":
        latents = jax.random.normal(jax.random.key(1), (pair.num_images, 7, 7, 4))
        latents = jax.device_put(latents, batch_sharding(mesh))
        decode = jax.jit(lambda params, z: models.decode_latents(pair.ours, params, z))
        return lambda: decode(params, latents).block_until_ready()
    path = D.VP(D.linear_betas())
    grid = D.make_grid(path, num_inference_steps)
    solver = D.solvers.ddim()

    def draw(params, key, noise, labels):
        network = functools.partial(models.network(pair.ours), params)
        null = jnp.int32(NUM_CLASSES)
        predict = D.classifier_free_guidance(network, labels, null, GUIDANCE_SCALE)
        return D.sample(key, D.denoiser(predict, D.epsilon(path)), solver, grid, noise)

    rows = jax.sharding.PartitionSpec(("data", "fsdp"))
    whole = jax.sharding.PartitionSpec()
    draw = jax.jit(
        jax.shard_map(draw, mesh=mesh, in_specs=(whole, whole, rows, rows), out_specs=rows, check_vma=False)
    )
    key = jax.random.key(1)
    noise = D.initial_noise(key, (pair.num_images, *pair.shape), grid)
    labels = jnp.arange(pair.num_images, dtype=jnp.int32) % NUM_CLASSES
    return lambda: draw(params, key, noise, labels).block_until_ready()


def our_convolutions(pair: Pair, found: list[Any]) -> Run:
    """Forward and both gradients of those convolutions of PyTorch (`cpu_torch.convolutions`), one by one."""
    mesh = make_mesh()
    strides = [(layer.stride[0], layer.padding[0]) for _, layer in found]
    inputs = [jnp.asarray(x.permute(0, 2, 3, 1).numpy()) for x, _ in found]
    inputs = jax.device_put(inputs, batch_sharding(mesh))
    kernels = [jnp.asarray(layer.weight.detach().permute(2, 3, 1, 0).numpy()) for _, layer in found]
    kernels = jax.device_put(kernels, replicated(mesh))

    def convolve(xs, ws):
        return [
            jax.lax.conv_general_dilated(
                x, w, (stride, stride), ((pad, pad),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            for x, w, (stride, pad) in zip(xs, ws, strides, strict=True)
        ]

    @jax.jit
    def ours(xs, ws):
        outputs, pull = jax.vjp(convolve, xs, ws)
        return pull(outputs)

    return lambda: jax.block_until_ready(ours(inputs, kernels))


# ---------------------------------------------------------------- timing


def measure(title: str, variants: dict[str, Run], options: Cpu) -> dict[str, Any]:
    """A row: compile seconds, milliseconds and the ratios of every other variant to the first."""
    row = measure_row(title, variants, options.rounds, options.seconds)
    print(as_line(row), flush=True)
    return row


def as_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    compiling = ", ".join(f"{seconds:.1f}" for seconds in row["first_call_seconds"].values())
    return "| " + " | ".join([*cells(row, "jaxldm", "eager", "torch.compile"), compiling]) + " |"


COLUMNS = ("row", "jaxldm, ms", "eager, ms", "torch.compile, ms", "eager / jaxldm", "torch.compile / jaxldm")
HEAD = "| " + " | ".join([*COLUMNS, "first calls, s"]) + " |\n" + "|---" * 7 + "|"


def measure_pair(pair: Pair, options: Cpu, theirs: Any) -> Iterator[dict[str, Any]]:
    """The rows of one architecture; `theirs` is `cpu_torch`, or None where PyTorch is not installed."""
    steps = options.num_inference_steps
    variants = {"jaxldm": our_training(pair)}
    if theirs:
        variants["eager"] = theirs.training_step(pair, False)
        variants["torch.compile"] = theirs.training_step(pair, True)
    yield measure(f"{pair.name}, training step, batch {pair.batch_size}", variants, options)
    if theirs and pair.name != "Tiny DiT":
        found = theirs.convolutions(pair)
        title = f"{pair.name}, its convolutions alone, forward and gradients"
        variants = {"jaxldm": our_convolutions(pair, found), "eager": theirs.their_convolutions(found)}
        yield measure(title, variants, options)
    variants = {"jaxldm": our_sampling(pair, steps)}
    if theirs:
        variants["eager"] = theirs.sampling(pair, steps, False)
        variants["torch.compile"] = theirs.sampling(pair, steps, True)
    what = "decoding" if pair.name == "AutoencoderKL" else f"{steps}-step DDIM with guidance"
    yield measure(f"{pair.name}, {what}, {pair.num_images} images", variants, options)


def main(options: Cpu) -> None:
    makers = [ARCHITECTURES[one_of("architecture", name, ARCHITECTURES)] for name in options.architectures]
    host.prepare()  # before anything is computed
    options = quick_options(options, rounds=2, seconds=0.0, num_inference_steps=2)
    versions, theirs = installed("torch", "diffusers"), None
    if versions:
        from experiments.benchmarks import cpu_torch as theirs
    setting, rows = machine("cpu", versions) | (theirs.prepare() if theirs else {}), []
    print(json.dumps(setting) + ("" if theirs else "\nPyTorch is not installed: jaxldm alone"))
    print("\n" + HEAD, flush=True)
    for make in makers:
        pair = make(4) if options.quick else make()
        if options.quick:
            pair = dataclasses.replace(pair, batch_size=8, num_images=8)
        rows.extend(measure_pair(pair, options, theirs))
    table = "\n".join([HEAD, *(as_line(row) for row in rows)])
    text = f"```\n{json.dumps(setting, indent=1)}\n```\n\n{table}\n"
    figures = json.dumps({**setting, "rows": rows}, indent=1)
    save_results(options.output_dir, {"cpu.md": text, "cpu.json": figures})
    print(f"\nwritten to {options.output_dir}/cpu.md and cpu.json")


if __name__ == "__main__":
    run_script(main, Cpu)
