"""Networks in fewer bits: which layers, the same function for stacks, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxldm import models
from jaxldm.errors import InvalidArgumentError, UnknownNameError
from jaxldm.models.quantization import kind_of, skip_halves

INT8 = models.quantization("int8")


def random_params(module, seed=0):
    """Parameters of which none is zero."""
    shapes = models.shapes(module)
    draws = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.3 * draws.normal(size=leaf.shape).astype(np.float32), shapes)


def small_dit(**changes):
    return models.build("tiny-dit", **{"hidden_size": 32, "depth": 2, "num_heads": 2} | changes)


def inputs(module, num=2):
    draws = np.random.default_rng(1)
    x = draws.normal(size=(num, *module.example_inputs()[0].shape[1:])).astype(np.float32)
    return jnp.asarray(x), jnp.full(num, 0.4), jnp.arange(num)


@pytest.fixture(scope="module")
def dit():
    module = small_dit()
    return module, random_params(module)


@pytest.fixture(scope="module")
def unet():
    module = models.build("mini-unet", block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
    return module, random_params(module)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("blocks_3/attn/qkv", "block"),
        ("blocks_0to27/mlp/fc2", "block"),
        ("blocks_3/adaLN_modulation_1", "modulation"),
        ("x_embedder/proj", None),
        ("t_embedder/mlp_0", None),
        ("final_layer/linear", None),
        ("final_layer/adaLN_modulation_1", None),
        ("down_blocks_1/resnets_0/conv1", "block"),
        ("down_blocks_1/resnets_0/time_emb_proj", "modulation"),
        ("mid_block/attentions_0/transformer_blocks_0/attn2/to_k", "block"),
        ("mid_block/attentions_0/proj_in", "block"),
        ("up_blocks_0/upsamplers_0/conv", "block"),
        ("conv_in", None),
        ("conv_out", None),
        ("time_embedding/linear_1", None),
        ("single_transformer_blocks_0to37/norm/linear", "modulation"),
        ("single_transformer_blocks_0to37/proj_out", "block"),
        ("transformer_blocks_0/norm1_context/linear", "modulation"),
        ("transformer_blocks_0/norm1/emb/timestep_embedder/linear_1", None),
        ("transformer_blocks_0/attn/add_k_proj", "block"),
        ("context_embedder", None),
        ("proj_out", None),
        ("norm_out/linear", None),
        ("noise_refiner_0/adaLN_modulation_0", "modulation"),
        ("layers_0to29/feed_forward/w2", "block"),
        ("transformer_blocks_0to4/ff_context/linear_in", "block"),
        ("single_transformer_blocks_0to19/attn/to_qkv_mlp_proj", "block"),
        ("single_stream_modulation/linear", None),
    ],
)
def test_blocks_are_quantised_and_what_is_around_them_is_not(path, kind):
    kernel = (*path.split("/"), "kernel")
    assert kind_of(kernel, models.quantization("int8", modulation="int8")) == kind
    assert kind_of(kernel, INT8) == (None if kind == "modulation" else kind)
    assert kind_of((*kernel[:-1], "bias"), INT8) is None


@pytest.mark.parametrize("bits", ["int8", "fp8", "int4"])
def test_what_is_left_out_keeps_sixteen_bits_and_the_rest_is_near(dit, bits):
    module, params = dit
    how = models.quantization(bits)
    small = models.quantize(module, params, how)
    flat = traverse_util.flatten_dict(small)
    packed = {"/".join(path[:-1]) for path, leaf in flat.items() if isinstance(leaf, models.Quantized)}
    assert packed == {
        f"blocks_{n}/{name}" for n in (0, 1) for name in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    }
    for path, leaf in flat.items():
        if not isinstance(leaf, models.Quantized):
            assert leaf.dtype == (jnp.bfloat16 if leaf.ndim >= 2 else jnp.float32), path
    spec = lambda leaf: (tuple(leaf.shape), jnp.dtype(leaf.dtype))  # noqa: E731
    assert jax.tree.map(spec, small) == jax.tree.map(spec, models.quantized_shapes(module, how))
    assert models.how_quantized(small) == how and models.how_quantized(params) is None
    for path, leaf in traverse_util.flatten_dict(models.dequantize(small)).items():
        exact = traverse_util.flatten_dict(params)[path]
        np.testing.assert_allclose(leaf, exact, atol=0.12 * np.abs(exact).max(), err_msg=str(path))


def test_the_bytes_are_those_of_the_formats():
    """On the real Tiny DiT: a byte for each weight of the blocks, two for the others, four for vectors."""
    module = models.build("tiny-dit")
    whole, shapes = models.param_bytes(models.shapes(module)), models.quantized_shapes
    small = models.param_bytes(shapes(module, models.quantization("int8", modulation="int8")))
    blocks, modulation = 4 * 12 * 128**2, 4 * 6 * 128**2
    scales = 4 * 4 * (3 * 128 + 128 + 512 + 128 + 6 * 128)
    vectors = sum(leaf.size for leaf in jax.tree.leaves(models.shapes(module)) if leaf.ndim == 1)
    others = whole // 4 - blocks - modulation - vectors
    assert small == blocks + modulation + scales + 2 * others + 4 * vectors
    assert small < 0.3 * whole < models.param_bytes(shapes(module, INT8))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_scanned_stack_is_the_same_network(dit, bits):
    module, params = dit
    scanned = small_dit(scan=True)
    stacked = {name: leaf for name, leaf in params.items() if not name.startswith("blocks_")}
    stacked["blocks_0to1"] = jax.tree.map(
        lambda *leaves: np.stack(leaves), params["blocks_0"], params["blocks_1"]
    )
    how = models.quantization(bits, modulation="int8")
    results = [
        models.network(one)(models.quantize(one, tree, how), *inputs(one))
        for one, tree in ((module, params), (scanned, stacked))
    ]
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["dit", "unet"])
def test_a_network_is_near_the_whole_one_and_exactly_its_weights(which, request):
    module, params = request.getfixturevalue(which)
    params = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    call = jax.jit(models.network(module))
    exact = call(params, *inputs(module))
    weights_only = models.quantize(module, params, models.quantization("int8", activations=None))
    own = call(weights_only, *inputs(module))
    np.testing.assert_allclose(
        own,
        call(models.dequantize(weights_only), *inputs(module)),
        rtol=1e-3,
        atol=1e-4 * np.abs(exact).max(),
    )
    both = call(models.quantize(module, params, INT8), *inputs(module))
    for result in (own, both):
        assert 0 < np.linalg.norm(result - exact) < 0.05 * np.linalg.norm(exact)


def test_other_weights_compile_nothing(dit):
    module, params = dit
    call = jax.jit(models.network(module))
    for tree in (params, jax.tree.map(lambda leaf: 2 * leaf, params)):
        call(models.quantize(module, tree, INT8), *inputs(module))
    assert call._cache_size() == 1


def test_halves_of_skip_connections_are_those_that_are_joined(unet):
    module, params = unet
    halves = skip_halves({path: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()})
    # Down: 8, 8 (stride 2), 16; up: 16 from below and 16, 8; then 16 from below, after it 8, and 8, 8.
    found = {"/".join(path[:-2]): pair for path, pair in halves.items()}
    assert found == {
        "up_blocks_0/resnets_0": (16, 16),
        "up_blocks_0/resnets_1": (16, 8),
        "up_blocks_1/resnets_0": (16, 8),
        "up_blocks_1/resnets_1": (8, 8),
    }
    small = models.quantize(module, params, INT8)
    assert small["up_blocks_1"]["resnets_0"]["conv1"]["kernel"].scales.shape == (2, 8)
    assert small["down_blocks_0"]["resnets_0"]["conv1"]["kernel"].parts == (8,)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_an_adapter_is_added_to_the_dequantised_weights(dit, bits):
    module, params = dit
    small = models.quantize(module, params, models.quantization(bits, activations=None))
    lora = models.init_lora(jax.random.key(0), params, rank=2)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    ours = models.network(module)(models.apply_lora(small, lora, 0.5), *inputs(module))
    merged = models.apply_lora(models.dequantize(small), lora, 0.5)
    expected = models.network(module)(merged, *inputs(module))
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_branch_alone_learns():
    """QLoRA: gradients reach the factors through weights that do not move."""
    module = small_dit(depth=1)
    small = models.quantize(module, random_params(module), models.quantization("int8", activations=None))
    lora = models.init_lora(jax.random.key(0), models.shapes(module), rank=2)
    loss = lambda lora: jnp.sum(models.network(module)(models.apply_lora(small, lora), *inputs(module)) ** 2)  # noqa: E731
    gradient = jax.grad(loss)(lora)["blocks_0"]["attn"]["qkv"]["lora_B"]["kernel"]
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_gradients_go_through_weights_alone(dit):
    """Of rounded activations they would be 0 in every block, without a word."""
    module, params = dit
    x, t, labels = inputs(module)

    def gradient(params):
        return jax.grad(lambda x: jnp.mean(models.network(module)(params, x, t, labels)))(x)

    small = models.quantize(module, params, dataclasses.replace(INT8, activations=None))
    found, whole = gradient(small), gradient(models.dequantize(small))
    assert np.linalg.norm(found - whole) < 1e-3 * np.linalg.norm(whole)
    for how in (INT8, models.quantization("int4", activations="int4"), models.quantization("fp8")):
        with pytest.raises(InvalidArgumentError, match="no gradient: quantise its weights alone"):
            gradient(models.quantize(module, params, how))


def test_what_cannot_be_quantised_is_refused_in_one_line(dit):
    module, params = dit
    small = models.quantize(module, params, INT8)
    classifier = models.build("digit-classifier")
    smooth = models.quantization("int8", smooth=0.5)

    def maxima(more):
        """As of a calibration: of other widths, or NaN."""
        flat = traverse_util.flatten_dict(params)
        peaks = {
            path[:-1]: np.full(leaf.shape[-2] + more, np.nan) for path, leaf in flat.items() if leaf.ndim > 1
        }
        return peaks

    wrong = [
        (lambda: models.quantize(module, small, INT8), InvalidArgumentError, "quantised already, to int8"),
        (lambda: models.quantization("int3"), UnknownNameError, "int8"),
        (
            lambda: models.quantize(classifier, {}, INT8),
            InvalidArgumentError,
            "DigitClassifier cannot be quantised",
        ),
        (lambda: models.quantize(module, params, smooth), InvalidArgumentError, "needs a calibration"),
        (lambda: models.quantize(module, params, smooth, {}), InvalidArgumentError, "of another network"),
        (lambda: models.quantize(module, params, smooth, maxima(3)), InvalidArgumentError, "for each of its"),
        (lambda: models.quantize(module, params, smooth, maxima(0)), InvalidArgumentError, "got NaN or less"),
        (lambda: models.quantize(module, params, "int8"), InvalidArgumentError, "models.quantization"),
        (lambda: models.quantization("int8", group_size=32), InvalidArgumentError, "for weights in int4"),
        (lambda: models.quantization("int8", groups=32), UnknownNameError, "group_size"),
    ]
    for call, error, words in wrong:
        with pytest.raises(error, match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
