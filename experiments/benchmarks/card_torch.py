"""PyTorch's side of `one_card.py`, with diffusers: the same rows as `card_jaxldm`, eager and torch.compile.

JAX is in this process only to read configs and to count operations: it runs on the processor.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers

from experiments.benchmarks import card_checks, card_jaxldm, torch_common
from experiments.benchmarks.card_jaxldm import EMA_DECAY, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY
from experiments.benchmarks.card_worker import Line
from experiments.benchmarks.random_networks import count_flops
from experiments.benchmarks.torch_common import synchronize

BACKEND = {"name": "inductor"}  # of torch.compile


def prepare(options: dict[str, Any]) -> dict[str, Any]:
    """What runs here; asked once, before any row. options: compile_backend, memory_fraction."""
    BACKEND["name"] = options["compile_backend"]
    found = {
        "backend": "cpu",
        "device": "cpu",
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True  # convolutions of one size: the fastest algorithm of each
        torch.cuda.set_per_process_memory_fraction(options["memory_fraction"])
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        device = torch.cuda.get_device_properties(0)
        found |= {"backend": "gpu", "device": device.name, "memory_bytes": device.total_memory}
    return found


def forget() -> None:
    """Between rows: nothing of one stays for the next."""
    torch_common.forget()


def memory() -> int | None:
    """The largest use of device memory in this row."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def synchronized(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Runs it and waits."""

    def run() -> None:
        with torch.no_grad():
            function(*arguments)
        synchronize()

    return run


# ---------------------------------------------------------------- rows


def peak(variant: str, dtype: str, size: int) -> Iterator[Line]:
    """As `card_jaxldm.peak`."""
    kind = {"device": torch_common.device(), "dtype": getattr(torch, dtype)}
    a, b = ((torch.rand(size, size, **kind) - 0.5) * (12 / size) ** 0.5 for _ in range(2))

    def chain() -> None:
        x = a
        for _ in range(8):
            x = x @ b

    what = f"eight products of {size} x {size} matrices"
    yield Line(what, synchronized(chain), 8 * 2.0 * size**3, memory)


def correctness(variant: str, dtype: str, tokens: int, pixels: int, channels: int) -> Iterator[Line]:
    """The errors of PyTorch's own kernels, next to ours."""
    for check in card_checks.checks(tokens, pixels, channels):
        error = card_checks.error(compute(check), check)
        yield Line(f"{check.name}, {check.dtype}", result={"error": error, "bound": check.bound})


def compute(check: card_checks.Check) -> list[np.ndarray]:
    """The outputs of a check on the device."""
    dtype, device = getattr(torch, check.dtype), torch_common.device()
    inputs = {}
    for name, value in check.inputs.items():
        tensor = torch.from_numpy(np.array(value)).to(device)
        inputs[name] = tensor if value.dtype == bool else tensor.to(dtype)
    with torch.no_grad() if check.kind != "attention gradients" else torch.enable_grad():
        outputs = CHECKS[check.kind](**inputs, **check.options)
    return [output.detach().float().cpu().numpy() for output in outputs]


def _attention(query, key, value, mask=None, bias=None, causal=False):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if mask is not None and causal:
        mask = mask & torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and bias is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    given = mask if bias is None else bias
    alone = causal and given is None
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=given, is_causal=alone)
    return [out.transpose(1, 2)]


def _attention_gradients(query, key, value, cotangent):
    leaves = [x.requires_grad_() for x in (query, key, value)]
    return torch.autograd.grad(_attention(*leaves), leaves, cotangent)


def _group_norm(x, scale, bias, num_groups):
    return [F.group_norm(x.permute(0, 3, 1, 2), num_groups, scale, bias).permute(0, 2, 3, 1)]


def _convolution(x, kernel, stride, doubled):
    x = x.permute(0, 3, 1, 2)
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x
    return [F.conv2d(x, kernel.permute(3, 2, 0, 1), None, stride, 1).permute(0, 2, 3, 1)]


def _product_of_8_bits(x, kernel):
    columns = kernel.t().contiguous().t()  # the layout that both kernels take
    if x.dtype == torch.int8:
        return [torch._int_mm(x, columns)]
    one = torch.ones((), device=x.device)
    return [torch._scaled_mm(x, columns, one, one, out_dtype=torch.float32)]


CHECKS = {
    "attention": _attention,
    "attention gradients": _attention_gradients,
    "group norm": _group_norm,
    "convolution": _convolution,
    "product": lambda x, kernel: [x @ kernel],
    "product of 8 bits": _product_of_8_bits,
}


def training_step(variant: str, dtype: str, batch_size: int, quick: bool) -> Iterator[Line]:
    """As `card_jaxldm.training_step`: autocast, AdamW and the average in float32."""
    module = card_jaxldm.training_module(dtype, quick)
    run = training_run(module, batch_size, variant == "torch.compile")
    side, channels = module.config.sample_size, module.config.in_channels
    shapes = {"x": np.zeros((batch_size, side, side, channels), np.float32)}
    shapes |= {"t": np.zeros(batch_size, np.float32), "labels": np.zeros(batch_size, np.int32)}
    flops = 3 * count_flops(module, shapes)
    yield Line(f"training step, batch {batch_size}", run, flops, memory, calls=5)


def training_run(module: Any, batch_size: int, compiled: bool) -> Callable[[], None]:
    """One more update of the network of diffusers with the config of our module."""
    device, dtype = torch_common.device(), module.config.dtype
    network = torch_common.random_module(module.config, "float32", device).train()
    parameters = list(network.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=device), 0)
    side, channels = module.config.sample_size, module.config.in_channels
    latents = torch.randn(batch_size, channels, side, side, device=device)
    labels = torch.arange(batch_size, device=device) % module.config.num_classes

    def loss_fn() -> torch.Tensor:
        t = torch.randint(0, 1000, (batch_size,), device=device)
        noise = torch.randn_like(latents)
        abar = alphas_cumprod[t][:, None, None, None]
        noised = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            output = network(noised, timestep=t, class_labels=labels, return_dict=False)[0]
        return F.mse_loss(output.float(), noise)

    if compiled:
        loss_fn = torch.compile(loss_fn, backend=BACKEND["name"])

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_fn().backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - EMA_DECAY)
        synchronize()

    return run


def pipeline_of(variant: str, dtype: str, family: str, quick: bool) -> tuple[ModuleType, ModuleType, Any]:
    """(our module of the family, theirs, the pipeline of diffusers)."""
    pairs = card_jaxldm.pairs_of(family)
    other = importlib.import_module(pairs.TORCH_SIDE)
    pipe = other.pipeline(family, dtype, quick, torch_common.device())
    if variant == "torch.compile":
        pipe = torch_common.compiled(pipe, BACKEND["name"], whole=family != "flux")
    return pairs, other, pipe


def model(
    variant: str, dtype: str, family: str, pixels: int, steps: int = 0, images: int = 1, quick: bool = False
) -> Iterator[Line]:
    """As `card_jaxldm.model`."""
    pairs, other, pipe = pipeline_of(variant, dtype, family, quick)
    parts = pairs.modules(family, dtype, quick)
    module = parts["unet"] if "unet" in parts else parts["transformer"]
    side = pixels // 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    inputs = pairs.network_inputs(module, side)
    flops = count_flops(module, inputs)
    if images == 1:
        run = other.network(torch_common.denoiser(pipe), inputs, dtype)
        yield Line(f"one call for {len(inputs['t'])}", run, flops, memory)
        del run
    if steps:
        z = np.zeros((images, side, side, parts["vae"].config.latent_channels), np.float32)
        latents = np.random.default_rng(0).standard_normal(z.shape).astype(np.float32)
        run = functools.partial(other.draw, pipe, latents, steps, pairs.FAMILIES[family].guidance_scale)
        whole = images * steps * flops + count_flops(parts["vae"], {"z": z}, "decode")
        yield Line(card_jaxldm.image_title(steps, images), run, whole, memory)


def decoding(variant: str, dtype: str, family: str, pixels: int, quick: bool = False) -> Iterator[Line]:
    """As `card_jaxldm.decoding`."""
    module, device = card_jaxldm.pairs_of(family).modules(family, dtype, quick)["vae"], torch_common.device()
    vae = torch_common.random_module(module.config, dtype, device)
    decode = torch.compile(vae.decode, backend=BACKEND["name"]) if variant == "torch.compile" else vae.decode
    side = pixels // 2 ** (len(module.config.block_out_channels) - 1)
    channels = module.config.latent_channels
    z = torch.randn(1, channels, side, side, device=device, dtype=getattr(torch, dtype))
    flops = count_flops(module, {"z": np.zeros((1, side, side, channels), np.float32)}, "decode")
    yield Line(f"decoding an image of {pixels} pixels", synchronized(decode, z), flops, memory)


KINDS = {
    "correctness": correctness,
    "peak": peak,
    "training": training_step,
    "model": model,
    "decoding": decoding,
}
