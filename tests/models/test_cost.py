"""Multiply-accumulates against the published table, PyTorch's counter, and counts by hand."""

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import Primitive
from torch.utils.flop_counter import FlopCounterMode

from jaxldm import models
from jaxldm.errors import InvalidArgumentError

GFLOPS = {  # Peebles & Xie 2023, table 4, for 256x256 images; patches of 8, 4 and 2
    "s": (0.36, 1.41, 6.06),
    "b": (1.42, 5.56, 23.01),
    "l": (5.01, 19.70, 80.71),
    "xl": (7.39, 29.05, 118.64),
}


@pytest.mark.parametrize("size", GFLOPS)
def test_dits_cost_what_the_paper_says(size):
    for patch, published in zip((8, 4, 2), GFLOPS[size], strict=True):
        assert abs(models.count_macs(f"dit-{size}-{patch}") / 1e9 / published - 1) < 0.01


def test_a_scan_counts_as_its_blocks_do():
    plain = models.build("dit-s-8", scan=False)
    assert models.count_macs("dit-s-8") == models.count_macs(plain) == models.count_macs("sit-s-8")
    x, t = jax.ShapeDtypeStruct((5, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((5,), jnp.float32)
    assert models.count_macs("dit-s-8", x, t) == 5 * models.count_macs("dit-s-8")


def test_pytorch_counts_the_same_in_a_transformer_and_a_convolutional_network():
    fields = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 16}
    theirs = diffusers.DiTTransformer2DModel(**fields, in_channels=3, num_embeds_ada_norm=5)
    config = {"_class_name": "DiTTransformer2DModel", **theirs.config}
    ours = models.from_config(models.config_from_dict(config))
    x, t, labels = torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    twice = 256 * 16 + 16 * 16  # the reference applies the first block's embedder again at the end
    assert models.count_macs(ours) + twice == torch_macs(lambda: theirs(x, t, labels))

    fields = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    theirs = diffusers.AutoencoderKL(**fields, **blocks)
    ours = models.build("sd-vae", **fields, **blocks, layers_per_block=1)
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    count = models.count_macs(ours, images, method="encode")
    assert count == torch_macs(lambda: theirs.encode(torch.zeros(1, 3, 16, 16)))


def torch_macs(run):
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math, FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def test_control_flow_and_nesting():
    a, b = np.ones((2, 3), np.float32), np.ones((3, 5), np.float32)
    square = np.ones((3, 3), np.float32)

    @jax.jit
    def nested(a, b):
        return jax.checkpoint(lambda a, b: a @ b)(a, b)

    def either(a, square, flag):
        return jax.lax.cond(flag, lambda: a @ square @ square, lambda: a @ square)

    def again_and_again(a, square):
        return jax.lax.scan(lambda a, _: (nn.relu(a @ square), None), a, length=7)[0]

    assert models.macs_of(nested, a, b) == 30
    assert models.macs_of(either, a, square, True) == 36
    assert models.macs_of(again_and_again, a, square) == 7 * 18
    assert models.macs_of(jax.vmap(nested, (None, 0)), a, np.ones((4, 3, 5), np.float32)) == 4 * 30

    def as_long_as_it_takes(a, square):
        return jax.lax.while_loop(lambda a: a.sum() < 9, lambda a: a @ square, a)

    with pytest.raises(InvalidArgumentError, match="while loop"):
        models.macs_of(as_long_as_it_takes, a, square)


def test_the_flash_kernel_counts_as_its_two_products():
    """On an NVIDIA device attention is one operation, by this name, of `jax.nn.dot_product_attention`."""
    kernel = Primitive("dot_product_attention_fwd_wrapper")
    kernel.def_abstract_eval(lambda query, key, value: query)
    query, key = np.ones((2, 5, 3, 8), np.float32), np.ones((2, 7, 3, 8), np.float32)
    explicit = models.macs_of(nn.dot_product_attention, query, key, key)
    assert models.macs_of(kernel.bind, query, key, key) == explicit == 2 * 2 * 3 * 5 * 7 * 8


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions(stride):
    x, kernel = np.ones((1, 6, 6, 8), np.float32), np.ones((3, 3, 4, 10), np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")

    def grouped(x, kernel):
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(
            x, kernel, strides, "SAME", dimension_numbers=numbers, feature_group_count=2
        )

    assert models.macs_of(grouped, x, kernel) == (6 // stride) ** 2 * 10 * 9 * 4

    def transposed(x, kernel):
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=numbers)

    kernel = np.ones((4, 4, 8, 10), np.float32)
    assert models.macs_of(transposed, x, kernel) == 12**2 * 10 * 4 * 8  # four of the sixteen meet a pixel


def test_memory_does_not_grow_with_the_blocks_of_a_scan():
    shallow, deep = (models.forward_memory(models.build("dit-s-8", depth=depth)) for depth in (2, 8))
    assert deep.weights == 4 * models.count_params(models.build("dit-s-8", depth=8))
    moved = 4 * (32 * 32 * 4 + 1 + 1) + 4 * 32 * 32 * 8
    assert moved <= deep.inputs_and_outputs == shallow.inputs_and_outputs < 2 * moved
    activation = 4 * 16 * 4 * 384  # the widest: 16 tokens in the middle of the MLP
    one_block = (deep.weights - shallow.weights) // 6
    assert activation <= deep.temporary < shallow.temporary + one_block
