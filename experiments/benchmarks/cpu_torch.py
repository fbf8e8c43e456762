"""PyTorch's side of `cpu.py`: diffusers' models with its own training step and sampler."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn.functional as F

from experiments.benchmarks.pairs import BETA, GUIDANCE_SCALE, LEARNING_RATE, MAX_GRAD_NORM, NUM_CLASSES, Pair
from experiments.benchmarks.timing import Run, cores


def prepare() -> dict[str, Any]:
    """Uses every core; returns what the table says about PyTorch."""
    torch.set_num_threads(cores())
    return {"threads": torch.get_num_threads()}


def forward(model: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> Any:
    """A denoising network of diffusers as a function of (x, t, labels)."""
    if isinstance(model, diffusers.DiTTransformer2DModel):
        return model(x, timestep=t, class_labels=labels, return_dict=False)[0]
    return model(x, t, class_labels=labels, return_dict=False)[0]


def training_step(pair: Pair, compiled: bool) -> Run:
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


def sampling(pair: Pair, num_inference_steps: int, compiled: bool) -> Run:
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


def their_convolutions(found: list[tuple[torch.Tensor, torch.nn.Conv2d]]) -> Run:
    """Forward and both gradients of those convolutions one by one."""
    leaves = [(x.clone().requires_grad_(), layer) for x, layer in found]

    def run():
        for x, layer in leaves:
            y = F.conv2d(x, layer.weight, None, layer.stride, layer.padding)
            torch.autograd.grad(y, (x, layer.weight), y.detach())

    return run
