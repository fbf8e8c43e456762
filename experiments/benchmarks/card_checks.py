"""What an accelerator can get wrong: small computations compared with float64 on the host.

`checks` has the inputs and the answers, in NumPy; `card_jaxldm` and `card_torch` compute the same on the
device. Whole networks are compared with this package in float32 on the processor, by a process of its own:

Question: what do small networks give in float32 on the processor?
Command:  python -m experiments.benchmarks.card_checks FILE     (called by `one_card`)
Needs:    nothing beyond the package.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

HALVES = ("bfloat16", "float16")
# Largest ||out - answer|| / ||answer||. Products of float32 may run in TF32, with 10 bits of mantissa.
BOUNDS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-3}
# Sums of whole numbers are exact; products of 8-bit floats may be summed with 13 bits or so of mantissa.
EIGHT_BITS = {"int8": 0.0, "float8_e4m3fn": 2e-3}
NETWORK_BOUNDS = {"bfloat16": 6e-2, "float32": 1e-2}


class Check(NamedTuple):
    """One computation.

    Attributes:
        name: for the table, without the dtype.
        kind: what both sides have a function for.
        dtype: of the inputs on the device.
        bound: of the relative error.
        inputs: float32 (a mask: bool), rounded to `dtype` already.
        options: of the function, not arrays.
        answers: float64; "attention gradients" has those of query, key and value.
    """

    name: str
    kind: str
    dtype: str
    bound: float
    inputs: Mapping[str, np.ndarray]
    options: Mapping[str, Any]
    answers: tuple[np.ndarray, ...]


def error(outputs: Any, check: Check) -> float:
    """The largest relative error of the outputs; NaN is infinite."""
    errors = [
        np.linalg.norm(np.asarray(output, np.float64) - answer) / np.linalg.norm(answer)
        for output, answer in zip(outputs, check.answers, strict=True)
    ]
    return float(np.nan_to_num(max(errors), nan=np.inf))


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers that the dtype has."""
    return x.astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)


# ---------------------------------------------------------------- attention


def softmax_attention(query, key, value, mask=None, bias=None):
    """(softmax(Q K^T / sqrt(d)) V, the softmax), float64, [B, N, H, D] and [B, H, N, M]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(query.shape[-1])
    logits = logits if bias is None else logits + bias
    logits = logits if mask is None else np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhd->bnhd", weights, value), weights


def attention_gradients(query, key, value, cotangent):
    """Gradients of sum(attention x cotangent) with respect to query, key and value."""
    out, weights = softmax_attention(query, key, value)
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    of_weights = np.einsum("bnhd,bmhd->bhnm", cotangent, value)
    inner = np.einsum("bnhd,bnhd->bhn", cotangent, out)[..., None]
    of_logits = weights * (of_weights - inner) / np.sqrt(query.shape[-1])
    return (
        np.einsum("bhnm,bmhd->bnhd", of_logits, key),
        np.einsum("bhnm,bnhd->bmhd", of_logits, query),
        np.einsum("bhnm,bnhd->bmhd", weights, cotangent),
    )


def attention_checks(rng: np.random.Generator, tokens: int) -> Iterator[Check]:
    """Self-attention with the head sizes of the published models, text, padding, causal and biased."""

    causal_mask = np.tril(np.ones((tokens, tokens), bool))[None, None]

    def make(name, dtype, dim, keys=tokens, gradients=False, causal=False, **masks):
        shape = {"query": (2, tokens, 4, dim), "key": (2, keys, 4, dim), "value": (2, keys, 4, dim)}
        if gradients:
            shape["cotangent"] = shape["query"]
        inputs = {name: rounded(rng.standard_normal(size), dtype) for name, size in shape.items()}
        if gradients:
            kind, answers = "attention gradients", attention_gradients(**inputs)
        else:
            later = {"mask": causal_mask & masks.get("mask", True)} if causal else {}
            kind, answers = "attention", softmax_attention(**inputs, **(masks | later))[:1]
        options = {"causal": True} if causal else {}
        bound = BOUNDS[dtype] * (2 if gradients else 1)
        return Check(f"{name}, heads of {dim}", kind, dtype, bound, inputs | masks, options, answers)

    lengths = np.array([tokens // 3, tokens - 5])
    padding = (np.arange(tokens) < lengths[:, None])[:, None, None, :]
    bias = rounded(rng.standard_normal((1, 4, tokens, tokens)), "bfloat16")
    for dtype in HALVES:
        for dim in (64, 72, 128):
            yield make("self-attention", dtype, dim)
        yield make("attention to 77 keys", dtype, 64, keys=77)
        yield make("attention with padding", dtype, 64, mask=padding)
        yield make("causal attention", dtype, 64, causal=True)
        yield make("causal attention with padding", dtype, 64, causal=True, mask=padding)
        yield make("attention with any mask", dtype, 64, mask=causal_mask)
        yield make("attention with a bias", dtype, 64, bias=bias)
        yield make("attention with a bias and padding", dtype, 64, bias=bias, mask=padding)
        yield make("gradients of attention", dtype, 64, gradients=True)
    yield make("one head of all channels", "bfloat16", 512)
    yield make("self-attention", "float32", 64)


# ---------------------------------------------------------------- norms, convolutions, products


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """3x3, padding 1, float64: one product for each tap."""
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height : stride, j : j + width : stride] @ kernel[i, j].astype(np.float64)
        for i in range(3)
        for j in range(3)
    )


def layer_checks(rng: np.random.Generator, pixels: int, channels: int) -> Iterator[Check]:
    """Group norm, convolutions and a matrix product."""
    for dtype in ("bfloat16", "float16", "float32"):
        bound = BOUNDS[dtype]
        x = rounded(3 + rng.standard_normal((2, pixels, pixels, channels)), dtype)
        scale, shift = (rounded(rng.standard_normal(channels), dtype) for _ in range(2))
        grouped = x.astype(np.float64).reshape(2, pixels**2, 8, -1)
        mean = grouped.mean((1, 3), keepdims=True)
        normal = (grouped - mean) / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-5)
        answer = normal.reshape(x.shape) * scale + shift
        inputs = {"x": x, "scale": scale, "bias": shift}
        yield Check("group norm", "group norm", dtype, bound, inputs, {"num_groups": 8}, (answer,))
        x = rounded(rng.standard_normal((1, pixels, pixels, channels)), dtype)
        kernel = rounded(rng.standard_normal((3, 3, channels, channels)) / np.sqrt(9 * channels), dtype)
        inputs = {"x": x, "kernel": kernel}
        for stride in (1, 2):
            answers = (convolve(x, kernel, stride),)
            options = {"stride": stride, "doubled": False}
            yield Check(
                f"3x3 convolution, stride {stride}", "convolution", dtype, bound, inputs, options, answers
            )
        doubled = x.repeat(2, axis=1).repeat(2, axis=2)
        options, answers = {"stride": 1, "doubled": True}, (convolve(doubled, kernel, 1),)
        yield Check("convolution of the doubled image", "convolution", dtype, bound, inputs, options, answers)
        rows = x.reshape(-1, channels)
        answers = (rows.astype(np.float64) @ kernel[0, 0],)
        inputs = {"x": rows, "kernel": kernel[0, 0]}
        yield Check("matrix product", "product", dtype, bound, inputs, {}, answers)


def product_checks(rng: np.random.Generator, rows: int, channels: int) -> Iterator[Check]:
    """Products of numbers of 8 bits, summed in 32."""
    for dtype, bound in EIGHT_BITS.items():
        x, kernel = (rounded(20 * rng.standard_normal((n, channels)), dtype) for n in (rows, channels))
        inputs, answers = {"x": x, "kernel": kernel}, (x.astype(np.float64) @ kernel.astype(np.float64),)
        yield Check("matrix product", "product of 8 bits", dtype, bound, inputs, {}, answers)


def checks(tokens: int, pixels: int, channels: int) -> Iterator[Check]:
    """All checks that both sides make."""
    rng = np.random.default_rng(0)
    yield from attention_checks(rng, tokens)
    yield from layer_checks(rng, pixels, channels)
    yield from product_checks(rng, 32 * pixels, 16 * channels)


# ---------------------------------------------------------------- whole networks


def network_outputs(dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, output) of small networks of each kind; weights and inputs drawn by NumPy, alike anywhere."""
    import jax

    from experiments.benchmarks import diffusion_transformer_pairs, stable_diffusion_pairs
    from jaxldm import models

    def weights(module):
        rng = np.random.default_rng(3)
        draw = lambda leaf: (  # noqa: E731
            rng.standard_normal(leaf.shape) / np.sqrt(max(1, leaf.size // leaf.shape[-1]))
        ).astype(np.float32)
        return jax.tree.map(draw, models.shapes(module))

    for pairs, family in (
        (stable_diffusion_pairs, "sdxl"),
        (diffusion_transformer_pairs, "dit-xl"),
        (diffusion_transformer_pairs, "sd3"),
        (diffusion_transformer_pairs, "flux"),
    ):
        modules = pairs.modules(family, dtype, True)
        module = modules["unet"] if "unet" in modules else modules["transformer"]
        inputs = pairs.network_inputs(module, 2 if family == "dit-xl" else 8)
        call = jax.jit(lambda params, inputs, module=module: module.apply({"params": params}, **inputs))
        yield family, np.asarray(call(weights(module), inputs), np.float32)
    vae = modules["vae"]
    latents = np.random.default_rng(4).standard_normal((1, 8, 8, vae.config.latent_channels))
    decode = jax.jit(lambda params, z: models.decode_latents(vae, params, z))
    yield "autoencoder", np.asarray(decode(weights(vae), latents.astype(np.float32)), np.float32)


if __name__ == "__main__":
    np.savez(sys.argv[1], **dict(network_outputs("float32")))
