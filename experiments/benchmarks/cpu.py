"""jaxldm beside PyTorch (diffusers) on the processor: same architectures, sizes, work, threads, in one run.

Question: without an accelerator, does jaxldm train and sample as fast as diffusers, eager and torch.compile?
Command:  python experiments/benchmarks/cpu.py            (--quick: small sizes, to see that it runs)
Needs:    the `test` extra and a C++ compiler for torch.compile. Minutes and figures: README.md beside this.

The variants of a row take turns, a round after another, so that a machine whose speed drifts is fair to all;
each round gives one ratio, and the table has their median and quartiles. Compile times stand apart.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxldm import host

host.prepare()  # before anything is computed; the same that the command line does

import diffusers  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pairs  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from pairs import NUM_CLASSES, Pair, forward  # noqa: E402
from timing import Run, cells, cores, machine, measure_row  # noqa: E402

from jaxldm import diffusion as D  # noqa: E402
from jaxldm import models, training  # noqa: E402
from jaxldm.commands.terminal import run_script  # noqa: E402
from jaxldm.training.autoencoder import autoencoder_loss  # noqa: E402
from jaxldm.training.mesh import batch_sharding, make_mesh, replicated  # noqa: E402
from jaxldm.training.step import compile_train_step  # noqa: E402

LEARNING_RATE, MAX_GRAD_NORM, GUIDANCE_SCALE, BETA = 1e-4, 1.0, 3.0, 1e-6


@dataclasses.dataclass(frozen=True)
class Cpu:
    """Time jaxldm beside diffusers on the processor and write the table."""

    quick: bool = False
    """Small models and two rounds: only to see that everything runs."""
    rounds: int = 9
    """Turns of each variant in each row."""
    seconds: float = 0.8
    """How long a turn is, at least; one call is always made."""
    num_inference_steps: int = 50
    """DDIM steps of the sampling rows."""
    output_dir: Path = Path(__file__).parent / "results"
    """Where cpu.md and cpu.json go."""


# ---------------------------------------------------------------- jaxldm's side


def our_training(pair: Pair) -> Run:
    """One training step after another: AdamW, clipping, no average; the batch split over the devices."""
    mesh = make_mesh()
    optimizer = training.optimizer(LEARNING_RATE, 0, 10**6, 0.01, MAX_GRAD_NORM)
    params = models.init(pair.ours, jax.random.key(0))
    state = training.create_train_state(jax.random.key(1), params, optimizer)
    path = D.VP(D.linear_betas())

    def denoising_loss(params, key, batch, step):
        network = lambda x, t, labels: pair.ours.apply({"params": params}, x, t, labels)  # noqa: E731
        return D.diffusion_loss(key, network, D.epsilon(path), batch["image"], batch["label"])

    def reconstruction_loss(params, key, batch, step):
        apply = lambda method: lambda x: pair.ours.apply({"params": params}, x, method=method)  # noqa: E731
        return autoencoder_loss(key, apply("encode"), apply("decode"), batch["image"], beta=BETA)

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
        network = lambda x, t, c: pair.ours.apply({"params": params}, x, t, c)  # noqa: E731
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


# ---------------------------------------------------------------- PyTorch's side


def their_training(pair: Pair, compiled: bool) -> Run:
    """The same step: one t per example, mean squared error, clipping, AdamW."""
    model = pair.theirs().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    height, width, channels = pair.shape
    images = torch.rand(pair.batch_size, channels, height, width) * 2 - 1
    labels = torch.arange(pair.batch_size) % NUM_CLASSES

    def denoising_loss():
        t = torch.randint(0, 1000, (pair.batch_size,))
        noise = torch.randn_like(images)
        abar = alphas_cumprod[t][:, None, None, None]
        noised = abar.sqrt() * images + (1 - abar).sqrt() * noise
        return F.mse_loss(forward(model, noised, t, labels), noise)

    def reconstruction_loss():
        posterior = model.encode(images).latent_dist
        decoded = model.decode(posterior.sample()).sample
        return F.mse_loss(decoded, images) + BETA * posterior.kl().mean() / images[0].numel()

    loss_fn = reconstruction_loss if pair.name == "AutoencoderKL" else denoising_loss
    loss_fn = torch.compile(loss_fn) if compiled else loss_fn

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        return loss.item()

    return run


def their_sampling(pair: Pair, num_inference_steps: int, compiled: bool) -> Run:
    """The same run with diffusers' DDIMScheduler, both branches of guidance in one batch."""
    model = pair.theirs().eval()
    if pair.name == "AutoencoderKL":
        latents = torch.randn(pair.num_images, 4, 7, 7)
        decode = torch.compile(model.decode) if compiled else model.decode
        return torch.inference_mode()(lambda: decode(latents).sample)
    network = torch.compile(forward) if compiled else forward
    scheduler = diffusers.DDIMScheduler(1000, 1e-4, 0.02, timestep_spacing="trailing", clip_sample=False)
    height, width, channels = pair.shape
    start = torch.randn(pair.num_images, channels, height, width)
    labels = torch.arange(pair.num_images) % NUM_CLASSES
    labels = torch.cat([torch.full_like(labels, NUM_CLASSES), labels])

    @torch.inference_mode()
    def run():
        scheduler.set_timesteps(num_inference_steps)
        x = start
        for t in scheduler.timesteps:
            output = network(model, torch.cat([x, x]), t.expand(len(labels)), labels)
            unconditional, conditional = output.chunk(2)
            guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
            x = scheduler.step(guided, t, x).prev_sample
        return x

    return run


# ---------------------------------------------------------------- the convolutions alone


def convolutions(pair: Pair) -> list[tuple[torch.Tensor, torch.nn.Conv2d]]:
    """(input, layer) of every convolution that a training step of this architecture makes."""
    model, found = pair.theirs(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
            module.register_forward_hook(lambda layer, args, _: found.append((args[0].detach(), layer)))
    height, width, channels = pair.shape
    x = torch.randn(pair.batch_size, channels, height, width)
    with torch.no_grad():
        if pair.name == "AutoencoderKL":
            model(x)
        else:
            labels = torch.zeros(pair.batch_size, dtype=torch.long)
            forward(model, x, torch.zeros(pair.batch_size, dtype=torch.long), labels)
    return found


def bare_convolutions(pair: Pair) -> tuple[Run, Run]:
    """Forward and both gradients of those convolutions one by one: jaxldm's way, and PyTorch's."""
    mesh, found = make_mesh(), convolutions(pair)
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

    leaves = [(x.clone().requires_grad_(), layer) for x, layer in found]

    def theirs():
        for x, layer in leaves:
            y = F.conv2d(x, layer.weight, None, layer.stride, layer.padding)
            torch.autograd.grad(y, (x, layer.weight), y.detach())

    return lambda: jax.block_until_ready(ours(inputs, kernels)), theirs


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


def main(options: Cpu) -> None:
    if options.quick:
        options = dataclasses.replace(options, rounds=2, seconds=0.0, num_inference_steps=2)
    torch.set_num_threads(cores())
    setting = machine("cpu.py", {"torch": torch.__version__, "diffusers": diffusers.__version__})
    setting, rows = {**setting, "threads": torch.get_num_threads()}, []
    print(json.dumps(setting) + "\n\n" + HEAD, flush=True)
    for make in (pairs.mini_unet, pairs.tiny_dit, pairs.autoencoder):
        pair = make(4) if options.quick else make()
        if options.quick:
            pair = dataclasses.replace(pair, batch_size=8, num_images=8)
        size = f"batch {pair.batch_size}"
        variants = {"jaxldm": our_training(pair), "eager": their_training(pair, False)}
        variants["torch.compile"] = their_training(pair, True)
        rows.append(measure(f"{pair.name}, training step, {size}", variants, options))
        if pair.name != "Tiny DiT":
            ours, theirs = bare_convolutions(pair)
            title = f"{pair.name}, its convolutions alone, forward and gradients"
            rows.append(measure(title, {"jaxldm": ours, "eager": theirs}, options))
        steps = options.num_inference_steps
        variants = {"jaxldm": our_sampling(pair, steps)}
        variants["eager"] = their_sampling(pair, steps, False)
        variants["torch.compile"] = their_sampling(pair, steps, True)
        what = "decoding" if pair.name == "AutoencoderKL" else f"{steps}-step DDIM with guidance"
        rows.append(measure(f"{pair.name}, {what}, {pair.num_images} images", variants, options))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    table = "\n".join([HEAD, *(as_line(row) for row in rows)])
    text = f"```\n{json.dumps(setting, indent=1)}\n```\n\n{table}\n"
    (options.output_dir / "cpu.md").write_text(text, encoding="utf-8")
    (options.output_dir / "cpu.json").write_text(
        json.dumps({**setting, "rows": rows}, indent=1), encoding="utf-8"
    )
    print(f"\nwritten to {options.output_dir}/cpu.md and cpu.json")


if __name__ == "__main__":
    run_script(main, Cpu)
