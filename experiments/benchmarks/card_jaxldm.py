"""jaxldm's side of `one_card.py`: a function for each kind of row, which yields the lines of the table."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxldm
from experiments.benchmarks import (
    card_checks,
    diffusion_transformer_pairs,
    mean_flow_step,
    stable_diffusion_pairs,
)
from experiments.benchmarks.card_worker import Line, versions
from experiments.benchmarks.random_networks import count_flops, random_network, random_weight
from jaxldm import diffusion as D
from jaxldm import models, training
from jaxldm.nn import Conv2d, dot_product_attention
from jaxldm.nn.linear import flat_matmul
from jaxldm.nn.normalization import group_norm
from jaxldm.training.mesh import fastest_mesh, make_mesh, place_batch, state_shardings
from jaxldm.training.step import compile_train_step

# What decides over results and times; those of CUDA and the optional kernels where they are there.
PACKAGES = ("jax", "jaxlib", "flax", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12")
PACKAGES += ("nvidia-cudnn-cu13", "tokamax")
PROCESSOR = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, EMA_DECAY = 1e-4, 1.0, 0.01, 0.9999


def prepare(options: dict[str, Any]) -> dict[str, Any]:
    """What runs here; asked once, before any row."""
    device = jax.local_devices()[0]
    return {
        "backend": device.platform,
        "device": device.device_kind,
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "platform": device.client.platform_version,
        "versions": {"jaxldm": jaxldm.__version__} | versions(*PACKAGES),
    }


def forget() -> None:
    """Drops compiled functions, which hold memory for their constants."""
    jax.clear_caches()


def pairs_of(family: str) -> ModuleType:
    """The module that has the family."""
    both = (stable_diffusion_pairs, diffusion_transformer_pairs)
    return next(pairs for pairs in both if family in pairs.FAMILIES)


# ---------------------------------------------------------------- compiling ahead


def compile_call(function: Any, *arguments: Any) -> tuple[Callable[..., Any], Callable[[], int | None]]:
    """(the compiled function, bytes of device memory in use while it runs)."""
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    compiled = jitted.lower(*arguments).compile()
    plan = compiled.memory_analysis()

    def memory() -> int | None:
        """What is on the device now (the arguments among it), and what the function needs besides."""
        used = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")
        if used is None or plan is None:
            return None
        return used + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes

    return compiled, memory


def network_line(what: str, function: Any, *arguments: Any, flops: float | None = None) -> Line:
    """A line that calls one compiled function; its first call compiles."""
    made: list[Any] = []

    def run() -> Any:
        if not made:
            made.extend(compile_call(function, *arguments))
        return jax.block_until_ready(made[0](*arguments))

    return Line(what, run, flops, lambda: made[1]())


# ---------------------------------------------------------------- rows


def peak(variant: str, dtype: str, size: int) -> Iterator[Line]:
    """Chains of eight products of square matrices of random numbers."""

    def chain(a: Any, b: Any) -> Any:
        return jax.lax.fori_loop(0, 8, lambda _, x: x @ b, a)

    key = jax.random.key(0)
    a, b = (random_weight(jax.random.fold_in(key, i), (size, size), dtype) for i in range(2))
    what = f"eight products of {size} x {size} matrices"
    yield network_line(what, chain, a, b, flops=8 * 2 * size**3)


def correctness(variant: str, dtype: str, tokens: int, pixels: int, channels: int) -> Iterator[Line]:
    """Errors against float64, small networks against the processor, samples against themselves."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "networks.npz"
        command = [sys.executable, "-m", "experiments.benchmarks.card_checks", str(file)]
        reference = subprocess.Popen(command, env=os.environ | PROCESSOR, stdout=sys.stderr)
        for check in card_checks.checks(tokens, pixels, channels):
            error = card_checks.error(compute(check), check)
            yield Line(f"{check.name}, {check.dtype}", result={"error": error, "bound": check.bound})
        found = {dtype: dict(card_checks.network_outputs(dtype)) for dtype in card_checks.NETWORK_BOUNDS}
        if reference.wait() != 0:
            raise RuntimeError("the networks could not be computed on the processor: see the log")
        with np.load(file) as answers:
            for kind, outputs in found.items():
                for name, output in outputs.items():
                    difference = np.linalg.norm(output - answers[name]) / np.linalg.norm(answers[name])
                    result = {"error": float(np.nan_to_num(difference, nan=np.inf))}
                    result["bound"] = card_checks.NETWORK_BOUNDS[kind]
                    yield Line(f"small {name} network, {kind}", result=result)
    yield from repeats(dtype)


def repeats(dtype: str) -> Iterator[Line]:
    """A sample is the same to the last bit each time, and image k whatever the number of images."""
    pipe = diffusion_transformer_pairs.our_pipeline("dit-xl", dtype, True).replace(images_per_device=2)

    def draw(labels: list[int]) -> np.ndarray:
        return np.asarray(pipe(jax.random.key(0), labels, num_inference_steps=4))

    first, second, alone = draw([1, 2, 3]), draw([1, 2, 3]), draw([1])
    for what, a, b in (("repeat of a sample", first, second), ("image 0 of 3 and of 1", first[:1], alone)):
        same = bool(np.array_equal(a, b) and np.isfinite(a).all() and a.std() > 0)
        yield Line(f"{what}, bit for bit", result={"error": 0.0 if same else 1.0, "bound": 0.0})


def compute(check: card_checks.Check) -> list[Any]:
    """The outputs of a check on the device."""
    inputs = {
        name: jnp.asarray(value, None if value.dtype == bool else check.dtype)
        for name, value in check.inputs.items()
    }
    function = functools.partial(CHECKS[check.kind], **check.options)
    outputs = jax.jit(function)(**inputs)
    return [np.asarray(output, np.float32) for output in jax.tree.leaves(outputs)]


def _attention_gradients(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
    return jax.vjp(dot_product_attention, query, key, value)[1](cotangent)


def _convolution(x: Any, kernel: Any, stride: int, doubled: bool) -> Any:
    channels = kernel.shape[-1]
    layer = Conv2d(channels, stride=stride, doubled=doubled, dtype=x.dtype.name, use_bias=False)
    return layer.apply({"params": {"kernel": kernel}}, x)


def _product_of_8_bits(x: Any, kernel: Any) -> Any:
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return flat_matmul(x, kernel, jnp.dtype(wide))  # as `nn.linear.quantized_matmul` calls it


CHECKS = {
    "attention": dot_product_attention,
    "attention gradients": _attention_gradients,
    "group norm": functools.partial(group_norm, eps=1e-5),
    "convolution": _convolution,
    "product": flat_matmul,
    "product of 8 bits": _product_of_8_bits,
}


def training_step(variant: str, dtype: str, batch_size: int, quick: bool) -> Iterator[Line]:
    """One update: loss, gradients, clipping, AdamW, average; float32 masters, arithmetic in `dtype`."""
    run, flops, memory = training_run(training_module(dtype, quick), batch_size)
    yield Line(f"training step, batch {batch_size}", run, flops, memory, calls=5)


def training_run(module: Any, batch_size: int) -> tuple[Callable[[], None], float, Callable[[], int | None]]:
    """(one more update of a network with random weights, its operations, bytes in use while it runs)."""
    optimizer = training.optimizer(LEARNING_RATE, 0, 10**6, WEIGHT_DECAY, MAX_GRAD_NORM)
    path = D.VP(D.linear_betas())

    def loss_fn(params: Any, state: Any, batch: Any, key: Any) -> Any:
        network = functools.partial(models.network(module), params)
        return D.diffusion_loss(key, network, D.epsilon(path), batch["mean"], batch["label"])

    params = random_network(module, "float32").params
    mesh = fastest_mesh(make_mesh(), params)
    step = compile_train_step(training.make_train_step(loss_fn, optimizer, EMA_DECAY), mesh)
    state = training.create_train_state(jax.random.key(1), params, optimizer)
    holder = [jax.device_put(state, state_shardings(mesh, state))]
    del state
    side = module.config.sample_size
    latents = jax.random.normal(jax.random.key(2), (batch_size, side, side, module.config.in_channels))
    labels = jnp.arange(batch_size, dtype=jnp.int32) % module.config.num_classes
    batch = place_batch(mesh, {"mean": latents, "label": labels})
    memory: list[Any] = []

    def run() -> None:
        if not memory:
            compiled, of_step = compile_call(step, holder[0], batch)
            memory.extend((compiled, of_step))
        holder[0], metrics = memory[0](holder[0], batch)
        metrics["loss"].block_until_ready()

    # Gradients of weights and of activations cost a forward pass each.
    flops = 3 * count_flops(module, {"x": latents, "t": jnp.zeros(batch_size), "labels": labels})
    return run, flops, lambda: memory[1]()


def training_module(dtype: str, quick: bool) -> Any:
    """DiT-XL/2 in the layout of diffusers, with eps alone as its output."""
    family = diffusion_transformer_pairs.FAMILIES["dit-xl"]
    small = family.small if quick else {}
    return models.from_config(models.DiTTransformer2DConfig(out_channels=4, dtype=dtype, **small))


def model(
    variant: str, dtype: str, family: str, pixels: int, steps: int = 0, images: int = 1, quick: bool = False
) -> Iterator[Line]:
    """One call of the network (one step of one image), and a whole run where there are steps."""
    pairs = pairs_of(family)
    pipe = pairs.our_pipeline(family, dtype, quick)
    network = pairs.our_denoiser(pipe)
    inputs = pairs.network_inputs(network.module, pairs.latent_shape(pipe, pixels)[0])
    flops = count_flops(network.module, inputs)
    if images == 1:
        arguments = (network, jax.device_put(inputs))
        yield network_line(
            f"one call for {len(inputs['t'])}", lambda net, given: net(**given), *arguments, flops=flops
        )
        del arguments
    if steps:
        latents = noise(pairs, pipe, pixels, images)
        scale = pairs.FAMILIES[family].guidance_scale
        run = functools.partial(pairs.our_draw, pipe, latents, steps, scale)
        z = jax.ShapeDtypeStruct(latents.shape, jnp.float32)
        whole = images * steps * flops + count_flops(pipe.vae.module, {"z": z}, "decode")
        yield Line(image_title(steps, images), run, whole, peak_so_far)


def noise(pairs: ModuleType, pipe: Any, pixels: int, images: int) -> np.ndarray:
    """Latents to start from, [N, h, w, c]."""
    shape = (images, *pairs.latent_shape(pipe, pixels))
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def image_title(steps: int, images: int) -> str:
    """What a whole run is called."""
    return f"{steps} steps, " + ("an image" if images == 1 else f"{images} images")


def peak_so_far() -> int | None:
    """JAX tells only the largest use since its process began: at most this."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def decoding(variant: str, dtype: str, family: str, pixels: int, quick: bool = False) -> Iterator[Line]:
    """Latents of one image to pixels."""
    vae = random_network(pairs_of(family).modules(family, dtype, quick)["vae"], dtype)
    side = pixels // 2 ** (len(vae.config.block_out_channels) - 1)
    z = jax.random.normal(jax.random.key(0), (1, side, side, vae.config.latent_channels))

    def decode(vae: Any, z: Any) -> Any:
        return models.decode_latents(vae.module, vae.params, z)

    flops = count_flops(vae.module, {"z": z}, "decode")
    yield network_line(f"decoding an image of {pixels} pixels", decode, vae, z, flops=flops)


def program_line(what: str, module: str, *words: object) -> Line:
    """A script, once, in a process of its own; {run} in its words is a folder that is made for it."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            given = [str(word).format(run=Path(folder) / "run") for word in words]
            command = [sys.executable, "-m", module, *given]
            done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        print(done.stderr, file=sys.stderr)
        if done.returncode != 0:
            raise RuntimeError((done.stderr.strip() or f"{module} failed").splitlines()[-1])

    return Line(what, run, calls=1)


def demo(variant: str, dtype: str, recipe: str, num_images: int, num_inference_steps: int) -> Iterator[Line]:
    """`make demo`: training, drawing, measuring and the export."""
    options = {"--recipe": recipe, "--num-images": num_images, "--num-inference-steps": num_inference_steps}
    words = [word for pair in options.items() for word in pair]
    script = "experiments.lecture39.mini_ldm"
    yield program_line("training, digits, metrics, export", script, "--run-dir", "{run}", *words)


def captions(variant: str, dtype: str, quick: bool = False) -> Iterator[Line]:
    """The recipe of captioned shapes: training, and pictures of every pair of shape and colour."""
    script = "experiments.benchmarks.card_captions"
    yield program_line("training, pictures as asked", script, "{run}", *(["--quick"] if quick else []))


def few_steps(variant: str, dtype: str, batch_size: int, quick: bool = False) -> Iterator[Line]:
    """Training steps of a plain flow and of mean flows, which have a derivative in their target."""
    for name, run in mean_flow_step.steps("dit-b-2", batch_size, dtype, quick):
        yield Line(f"{name}: training step, batch {batch_size}", run)


KINDS = {
    "correctness": correctness,
    "peak": peak,
    "training": training_step,
    "model": model,
    "decoding": decoding,
    "demo": demo,
    "captions": captions,
    "few-steps": few_steps,
}
