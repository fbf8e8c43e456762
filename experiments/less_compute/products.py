"""Products of few bits on an accelerator: from which matrix size on they pay.

Question: is a layer with int8 or fp8 weights and dynamic activations faster than one in bfloat16, and from
          which width on?
Command:  python -m experiments.less_compute.products
Needs:    an accelerator with units for 8-bit products (int8: Turing and later, TPU v5 and later; fp8: Hopper,
          Ada and later). Two minutes. On a processor it runs with --quick, to see that everything runs: there
          codes are multiplied as floats.

A row is a layer of a transformer: 4096 tokens times a square matrix. What rounds the activations is part of
the time. The last column is what the compiler made of the product: a call of cuBLASLt's fp8 has f8 in it.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.results import markdown, save_table
from jaxldm import host
from jaxldm.commands.terminal import run_script
from jaxldm.nn.linear import flat_matmul, quantized_matmul
from jaxldm.nn.quantized import Quantization, quantize_kernel

KINDS = ("int8", "fp8")


@dataclasses.dataclass(frozen=True)
class Products:
    """Time products in bfloat16, int8 and fp8."""

    widths: tuple[int, ...] = (512, 1024, 2048, 3072, 4096, 8192)
    """Inputs and outputs of the layer."""
    tokens: int = 4096
    """Rows that are multiplied."""
    repeats: int = 30
    """Calls of each product; the least time counts."""
    output_dir: Path = Path("runs/less-compute/products")
    """Where the table goes."""
    quick: bool = False
    """Small matrices, twice: only to see that everything runs."""

    def fitted(self) -> Products:
        """These options, or small ones with `quick`."""
        small = {"widths": (64, 128), "tokens": 64, "repeats": 2, "output_dir": self.output_dir / "quick"}
        return dataclasses.replace(self, **small) if self.quick else self


def timed(product: Callable[..., Any], *arguments: Any, repeats: int) -> tuple[float, str]:
    """(least seconds of a call, the library calls or products that it was compiled to)."""
    compiled = jax.jit(product).lower(*arguments).compile()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    text = compiled.as_text() or ""
    calls = re.findall(r'custom_call_target="([^"]*(?:matmul|gemm|dot)[^"]*)"', text)
    calls = calls or re.findall(r"= (\w+)\[[^\]]*\]\S* dot\(", text)
    return min(seconds), ", ".join(dict.fromkeys(calls)) or "fused"


def measured(options: Products, width: int) -> list[dict[str, Any]]:
    """The rows of a width."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (options.tokens, width), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (width, width), jnp.float32) / width**0.5
    plain, how = timed(flat_matmul, x, kernel.astype(jnp.bfloat16), repeats=options.repeats)
    rows = [{"width": width, "kind": "bfloat16", "seconds": plain, "speedup": 1.0, "how": how}]
    for kind in KINDS:
        packed = quantize_kernel(kernel, Quantization(kind, kind))

        def product(x: Any, packed: Any) -> Any:
            return quantized_matmul(x, packed, jnp.dtype(jnp.bfloat16)).astype(jnp.bfloat16)

        seconds, how = timed(product, x, packed, repeats=options.repeats)
        rows.append(
            {"width": width, "kind": kind, "seconds": seconds, "speedup": plain / seconds, "how": how}
        )
    return rows


def pays_from(rows: list[dict[str, Any]], kind: str) -> int | None:
    """The least width from which on a kind is faster than bfloat16 at every measured width; None: never."""
    own = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["width"])
    found = None
    for row in reversed(own):
        if row["speedup"] <= 1:
            break
        found = row["width"]
    return found


def main(options: Products) -> None:
    """Times, and writes the table."""
    host.prepare()
    options = options.fitted()
    rows = [row for width in options.widths for row in measured(options, width)]
    body = [
        [str(row["width"]), row["kind"], f"{row['seconds'] * 1e6:.0f}", f"{row['speedup']:.2f}", row["how"]]
        for row in rows
    ]
    title = f"{options.tokens} tokens times a square matrix, {jax.devices()[0].device_kind}"
    head = ["width", "numbers", "microseconds", "times as fast as bfloat16", "compiled to"]
    save_table(options.output_dir / "products.md", title, markdown(head, body))
    for kind in KINDS:
        width = pays_from(rows, kind)
        print(f"{kind}: {'never faster here' if width is None else f'faster from {width} on'}")


if __name__ == "__main__":
    run_script(main, Products)
