"""Kernels in fewer bits: closed forms of the rounding, NumPy's and PyTorch's integers, exact packing."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from jaxldm.errors import InvalidArgumentError, UnknownNameError
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import Linear, quantized_matmul
from jaxldm.nn.quantized import (
    Quantization,
    dequantize_kernel,
    low_rank,
    operands,
    pack_int4,
    quantize_kernel,
    smoothing,
    unpack_int4,
    with_factors,
)

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(24, 10)).astype(np.float32) * np.geomspace(0.01, 10, 10, dtype=np.float32)
WINDOW = RNG.normal(size=(3, 3, 6, 5)).astype(np.float32)
X = RNG.normal(size=(2, 7, 24)).astype(np.float32)
IMAGES = RNG.normal(size=(2, 5, 4, 6)).astype(np.float32) * np.array([1, 30], np.float32).reshape(2, 1, 1, 1)
INT8, FP8, INT4 = Quantization("int8", "int8"), Quantization("fp8", "fp8"), Quantization("int4", group_size=8)


def whole(kernel, how, **options):
    return np.asarray(dequantize_kernel(quantize_kernel(kernel, how, **options)))


@pytest.mark.parametrize("kernel", [KERNEL, WINDOW], ids=["matrix", "window"])
def test_int8_rounds_to_half_a_step_of_its_channel(kernel):
    axes = tuple(range(kernel.ndim - 1))
    step = np.abs(kernel).max(axes) / 127
    assert (np.abs(whole(kernel, INT8) - kernel).max(axes) <= step / 2 * (1 + 1e-5)).all()


def test_fp8_rounds_to_half_of_its_last_digit():
    scale = np.abs(KERNEL).max(0) / 448
    bound = np.maximum(np.abs(KERNEL) * 2.0**-4, scale * 2.0**-10)  # three binary digits; the least number
    assert (np.abs(whole(KERNEL, FP8) - KERNEL) <= bound * (1 + 1e-5)).all()


def test_int4_rounds_to_half_a_step_of_its_group_in_the_mean():
    """The widest scale has errors of half a step at most; the chosen one has a squared error no larger."""
    groups = KERNEL.reshape(3, 8, 10)
    step = (np.abs(groups).max(1) / 7).astype(ml_dtypes.bfloat16).astype(np.float32)[:, None]
    widest = np.clip(np.round(groups / step), -7, 7) * step
    assert (np.abs(widest - groups) <= step * 0.55).all()
    errors = [((each - groups) ** 2).sum(1) for each in (whole(KERNEL, INT4).reshape(groups.shape), widest)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all() and errors[0].sum() < errors[1].sum()


@pytest.mark.parametrize(
    ("how", "largest"), [(INT8, 127), (FP8, 448), (INT4, 7)], ids=["int8", "fp8", "int4"]
)
def test_kernels_that_the_codes_can_write_are_exact(how, largest):
    codes = RNG.integers(-7, 8, (24, 10)).astype(np.float32)
    codes[::8] = largest
    kernel = codes * 2.0 ** np.arange(-5, 5, dtype=np.float32)
    np.testing.assert_array_equal(whole(kernel, how), kernel)


def test_four_bits_are_packed_bit_by_bit():
    """Every pair of two numbers."""
    pairs = np.stack(np.meshgrid(np.arange(-8, 8), np.arange(-8, 8))).astype(np.int8).reshape(2, 256)
    packed = pack_int4(jnp.asarray(pairs))
    np.testing.assert_array_equal(packed[0], (pairs[0].view(np.uint8) & 15) | (pairs[1].view(np.uint8) << 4))
    np.testing.assert_array_equal(unpack_int4(packed), pairs)


def test_codes_and_scales_are_pytorchs():
    packed = quantize_kernel(KERNEL, INT8)
    scales, zeros = torch.tensor(np.array(packed.scales[0])), torch.zeros(10, dtype=torch.int)
    theirs = torch.fake_quantize_per_channel_affine(torch.tensor(KERNEL), scales, zeros, 1, -128, 127)
    np.testing.assert_array_equal(dequantize_kernel(packed), theirs)
    eight = quantize_kernel(KERNEL, FP8)
    scaled = torch.tensor(KERNEL) / torch.tensor(np.array(eight.scales))
    np.testing.assert_array_equal(
        np.asarray(eight.codes).view(np.uint8), scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    )


def integer_oracle(x, packed, axes):
    """The product in NumPy's whole numbers of 64 bits."""
    step = np.abs(x).max(axes, keepdims=True) / np.float32(127)
    codes = np.round(x / step).astype(np.int64)
    return codes, step, np.asarray(packed.codes, np.int64)


def test_a_product_in_int8_is_that_of_whole_numbers():
    packed = quantize_kernel(KERNEL, INT8)
    codes, step, weights = integer_oracle(X, packed, -1)
    expected = (codes @ weights) * step.astype(np.float64) * np.asarray(packed.scales, np.float64)[0]
    ours = quantized_matmul(jnp.asarray(X), packed, jnp.dtype("float32"))
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-7)


def test_codes_multiplied_as_floats_are_exact():
    """As on processors and in convolutions: the same numbers as the product of whole numbers."""
    x, weights = (RNG.integers(-127, 128, shape).astype(np.int8) for shape in ((3, 1024), (1024, 4)))
    exact = x.astype(np.int64) @ weights.astype(np.int64)
    np.testing.assert_array_equal(
        jnp.matmul(*operands(jnp.asarray(x), jnp.asarray(weights), jnp.float32)), exact
    )
    product = jnp.matmul(jnp.asarray(x), jnp.asarray(weights), preferred_element_type=jnp.int32)
    np.testing.assert_array_equal(product, exact)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_in_int8_is_that_of_whole_numbers(stride):
    packed = quantize_kernel(WINDOW, INT8)
    codes, step, weights = integer_oracle(IMAGES, packed, (1, 2, 3))
    theirs = torch.nn.functional.conv2d(
        torch.tensor(codes.transpose(0, 3, 1, 2), dtype=torch.float64),
        torch.tensor(weights.transpose(3, 2, 0, 1), dtype=torch.float64),
        stride=stride,
        padding=1,
    ).numpy()
    expected = theirs.transpose(0, 2, 3, 1) * step * np.asarray(packed.scales, np.float64)[0]
    layer = Conv2d(5, stride=stride, use_bias=False)
    ours = layer.apply({"params": {"kernel": packed}}, IMAGES)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "how", [Quantization("int8"), Quantization("fp8"), INT4], ids=["int8", "fp8", "int4"]
)
@pytest.mark.parametrize(
    ("layer", "kernel", "x"),
    [
        (Linear(10), KERNEL, X),
        (Conv2d(5), WINDOW, IMAGES),
        (Conv2d(5, doubled=True), WINDOW, IMAGES),
        (Conv2d(5, 1, padding=0), WINDOW[:1, :1], IMAGES),
    ],
    ids=["linear", "conv", "doubled", "pixel"],
)
def test_with_activations_as_they_are_a_layer_is_that_of_the_dequantised_kernel(how, layer, kernel, x):
    bias = np.linspace(-1, 1, kernel.shape[-1], dtype=np.float32)
    packed = quantize_kernel(kernel, how)
    assert packed.shape == kernel.shape and packed.ndim == kernel.ndim
    ours = layer.apply({"params": {"kernel": packed, "bias": bias}}, x)
    expected = layer.apply({"params": {"kernel": dequantize_kernel(packed), "bias": bias}}, x)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_halves_quantised_apart_keep_the_small_one():
    kernel = np.concatenate([KERNEL[:12] * 100, KERNEL[12:]])
    x = np.concatenate([X[..., :12], X[..., 12:] * 0.01], axis=-1)
    x[..., :12] = 0.0
    x[..., 0] = 300.0
    exact = x[..., 12:] @ kernel[12:] + x[..., :1] * kernel[:1].reshape(1, 1, -1)

    def error(parts):
        y = quantized_matmul(jnp.asarray(x), quantize_kernel(kernel, INT8, parts=parts), jnp.dtype("float32"))
        first = np.asarray(quantize_kernel(kernel, INT8, parts=parts).codes[:1], np.float64)
        scale = np.asarray(quantize_kernel(kernel, INT8, parts=parts).scales, np.float64)[0]
        large = 300.0 * first * scale  # the error of the large half alone, which both have
        return np.abs((np.asarray(y) - large.reshape(1, 1, -1)) - (exact - x[..., :1] * kernel[:1])).max()

    assert error((12, 12)) < 0.1 * error(())


def test_smoothing_is_an_identity_in_floating_point_and_shares_the_range():
    peak = np.abs(X).max((0, 1)) * np.geomspace(1, 100, 24, dtype=np.float32)
    x = X * np.geomspace(1, 100, 24, dtype=np.float32)
    divided_by = np.asarray(smoothing(jnp.asarray(KERNEL), jnp.asarray(peak), 0.5))
    np.testing.assert_allclose(
        (x / divided_by) @ (KERNEL * divided_by[:, None]), x @ KERNEL, rtol=2e-3, atol=1e-2
    )
    # At alpha 1/2 the largest input and the largest weight of a channel become equal: sqrt(max|x| max|W|).
    shared = np.sqrt(peak * np.abs(KERNEL).max(1))
    np.testing.assert_allclose(peak / divided_by, shared, rtol=1e-5)
    np.testing.assert_allclose(np.abs(KERNEL * divided_by[:, None]).max(1), shared, rtol=1e-5)
    dead = smoothing(jnp.zeros((3, 4)), jnp.asarray([0.0, 1.0, 2.0]), 0.5)
    np.testing.assert_array_equal(dead, np.ones(3))


def test_smoothing_helps_where_activations_have_outliers():
    x = X.copy()
    x[..., 3] *= 200
    kernel = RNG.normal(size=(24, 10)).astype(np.float32)
    exact = x @ kernel

    def error(how, peak=None):
        y = quantized_matmul(jnp.asarray(x), quantize_kernel(kernel, how, peak), jnp.dtype("float32"))
        return np.linalg.norm(np.asarray(y) - exact)

    smooth = dataclasses.replace(INT8, smooth=0.5)
    assert error(smooth, jnp.asarray(np.abs(x).max((0, 1)))) < 0.5 * error(INT8)


def test_the_low_rank_branch_is_the_best_of_its_rank():
    """Eckart and Young 1936: what is left is the root of the squares of the smaller singular values."""
    sizes = np.linalg.svd(KERNEL, compute_uv=False)
    first, second = low_rank(jnp.asarray(KERNEL), 4)
    left = np.linalg.norm(KERNEL - np.asarray(first) @ np.asarray(second))
    np.testing.assert_allclose(left, np.sqrt((sizes[4:] ** 2).sum()), rtol=1e-4)


@pytest.mark.parametrize("kernel", [KERNEL, WINDOW], ids=["matrix", "window"])
def test_with_a_branch_four_bits_lose_less(kernel):
    errors = [
        np.linalg.norm(whole(kernel, dataclasses.replace(INT4, rank=rank)) - kernel) for rank in (0, 2, 4)
    ]
    assert errors[0] > errors[1] > errors[2]
    full = whole(kernel, dataclasses.replace(INT4, rank=1000))  # the residual makes up for 16 bits' rounding
    assert np.linalg.norm(full - kernel) < 1e-3 * np.linalg.norm(kernel)


def test_smoothing_and_branch_stand_for_the_same_kernel():
    how = dataclasses.replace(Quantization("int8"), smooth=0.5, rank=3)
    packed = quantize_kernel(KERNEL, how, jnp.asarray(np.abs(X).max((0, 1))))
    np.testing.assert_allclose(dequantize_kernel(packed), KERNEL, atol=0.02 * np.abs(KERNEL).max())
    ours = quantized_matmul(jnp.asarray(X), packed, jnp.dtype("float32"))
    np.testing.assert_allclose(ours, X @ np.asarray(dequantize_kernel(packed)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "how", [Quantization("int8"), dataclasses.replace(INT4, rank=2)], ids=["int8", "int4"]
)
def test_further_factors_are_added_to_the_kernel(how):
    down, up = RNG.normal(size=(24, 3)).astype(np.float32), RNG.normal(size=(3, 10)).astype(np.float32)
    packed = quantize_kernel(KERNEL, how)
    more = with_factors(packed, jnp.asarray(down), jnp.asarray(up))
    np.testing.assert_allclose(
        dequantize_kernel(more), np.asarray(dequantize_kernel(packed)) + down @ up, rtol=1e-5, atol=1e-5
    )
    ours = quantized_matmul(jnp.asarray(X), more, jnp.dtype("float32"))
    np.testing.assert_allclose(ours, X @ np.asarray(dequantize_kernel(more)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", ["int8", "int4", "fp8"])
def test_activations_of_another_kind_are_rounded_by_themselves(activations):
    how = Quantization("int4", activations, group_size=8)
    packed = quantize_kernel(KERNEL, how)
    groups = X.reshape(2, 7, 3, 8) if activations == "int4" else X
    largest = {"int8": 127, "int4": 7, "fp8": 448}[activations]
    step = np.abs(groups).max(-1, keepdims=True) / np.float32(largest)
    codes = groups / step
    codes = (
        codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) if activations == "fp8" else np.round(codes)
    )
    expected = (codes * step).reshape(X.shape) @ np.asarray(dequantize_kernel(packed))
    ours = quantized_matmul(jnp.asarray(X), packed, jnp.dtype("float32"))
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_packed_kernels_are_trees_that_map_and_compile_once():
    stacked = jax.vmap(lambda kernel: quantize_kernel(kernel, INT4))(jnp.stack([jnp.asarray(KERNEL)] * 2))
    assert stacked.shape == (2, 24, 10)
    one = jax.tree.map(lambda leaf: leaf[1], stacked)
    np.testing.assert_array_equal(dequantize_kernel(one), whole(KERNEL, INT4))
    product = jax.jit(lambda x, kernel: quantized_matmul(x, kernel, jnp.dtype("float32")))
    for scale in (1.0, 3.0):
        product(jnp.asarray(X), quantize_kernel(KERNEL * scale, INT4))
    assert product._cache_size() == 1


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"weights": "int3"}, UnknownNameError, "int3"),
        ({"activations": "bf16"}, UnknownNameError, "kind of activations"),
        ({"group_size": 1}, InvalidArgumentError, "group_size must be"),
        ({"smooth": 1.5}, InvalidArgumentError, r"smooth must be a .*number in \[0, 1\]"),
        ({"rank": -1}, InvalidArgumentError, "rank must be"),
        ({"modulation": "int4"}, UnknownNameError, "kind of modulation"),
    ],
)
def test_settings_that_there_are_not(fields, error, words):
    with pytest.raises(error, match=words) as caught:
        Quantization(**fields)
    assert "\n" not in str(caught.value)
