import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxldm import nn
from jaxldm.nn import attention_kernels

OPTIMIZED = True  # compiled as users do, see tests/conftest.py


def heads(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(("queries", "keys", "scale"), [(5, 5, None), (3, 7, 0.3)])
def test_agrees_with_torch(queries, keys, scale):
    q, k, v = (heads(2, n, 4, 8, seed=i) for i, n in enumerate((queries, keys, keys)))
    ours = nn.dot_product_attention(*map(jnp.asarray, (q, k, v)), scale=scale)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)), scale=scale
    )
    np.testing.assert_allclose(ours, expected.transpose(1, 2).numpy(), atol=1e-5)


def test_the_way_of_accelerators_agrees_with_the_way_of_cpus(monkeypatch):
    q, k, v = (jnp.asarray(heads(2, n, 4, 8, seed=i)) for i, n in enumerate((3, 6, 6)))
    explicit = nn.dot_product_attention(q, k, v)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    elsewhere = nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(explicit, elsewhere, atol=1e-6)


@pytest.fixture
def cuda(monkeypatch):
    """JAX as on an NVIDIA device, its flash kernel replaced by plain products; returns the calls of it."""
    asked = []

    def kernel(query, key, value, *, scale, implementation, key_value_seq_lengths=None):
        asked.append((implementation, key_value_seq_lengths is not None))
        keys = jnp.arange(key.shape[1])[None, None, None, :]
        counts = None if key_value_seq_lengths is None else keys < key_value_seq_lengths[:, None, None, None]
        return attention_kernels.explicit_attention(query, key, value, scale, None, counts)[0]

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_kernels, "on_cuda", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    return asked


def test_flash_kernel_is_requested_exactly_where_it_is_supported(cuda):
    for dtype, dim, flash in (
        ("bfloat16", 64, True),
        ("float16", 64, True),
        ("float32", 64, False),
        ("bfloat16", 72, True),
        ("bfloat16", 36, False),
        ("bfloat16", 256, False),
    ):
        q = jnp.zeros((1, 4, 2, dim), dtype)
        nn.dot_product_attention(q, q, q)
        assert cuda == [("cudnn", False)] * flash
        cuda.clear()
    q = jnp.zeros((1, 4, 2, 64), "bfloat16")
    for masks, lengths in (
        ({"bias": jnp.zeros((1, 2, 4, 4))}, False),
        ({"mask": jnp.ones((1, 1, 4, 4), bool)}, False),  # causal, for example
        ({"mask": jnp.ones((1, 1, 1, 4), bool)}, True),
        ({"mask": jnp.ones((1, 1, 1, 4), bool), "bias": jnp.zeros((1, 2, 4, 4))}, False),
    ):
        nn.dot_product_attention(q, q, q, **masks)
        assert cuda == [("cudnn", True)] * lengths
        cuda.clear()


def test_a_mask_of_keys_is_a_number_of_keys_for_the_flash_kernel(cuda):
    """Whatever the order of the keys that count, and where none does; gradients too."""
    mask = np.array([[1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    mask = jnp.asarray(mask, bool)[:, None, None, :]
    q, k, v = (jnp.asarray(heads(4, n, 2, 8, seed=i), jnp.bfloat16) for i, n in enumerate((3, 6, 6)))

    def kernel(q, k, v):
        return nn.dot_product_attention(q, k, v, mask=mask).astype(jnp.float32)

    def plain(q, k, v):
        return attention_kernels.explicit_attention(q, k, v, 8**-0.5, None, mask)[0].astype(jnp.float32)

    found, expected = kernel(q, k, v), plain(q, k, v)
    assert cuda == [("cudnn", True)]
    np.testing.assert_allclose(found, expected, atol=0.02)
    weight = heads(*found.shape, seed=5)
    of_kernel, of_plain = (
        jax.grad(lambda *x, f=f: (f(*x) * weight).sum(), argnums=(0, 1, 2))(q, k, v) for f in (kernel, plain)
    )
    for one, other in zip(of_kernel, of_plain, strict=True):
        np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (one, other)), atol=0.05)


@pytest.mark.parametrize("masks", ["none", "keys", "all", "both"])
def test_chunks_of_queries_are_exact_and_hold_few_logits(monkeypatch, masks):
    """7 queries in chunks of at most 2: the last one is filled up."""
    q, k, v = (jnp.asarray(heads(2, n, 2, 4, seed=i)) for i, n in enumerate((7, 5, 5)))
    given = {
        "none": (None, None),
        "keys": (None, jnp.arange(5)[None, None, None] < jnp.array([3, 5])[:, None, None, None]),
        "all": (None, jnp.tril(jnp.ones((7, 5), bool))[None, None]),
        "both": (jnp.asarray(heads(1, 2, 7, 5, seed=3)), jnp.ones((1, 1, 1, 5), bool)),
    }[masks]
    weight = heads(2, 7, 2, 4, seed=4)

    def value(function):
        return jax.value_and_grad(lambda *x: (function(*x, 0.5, *given) * weight).sum(), argnums=(0, 1, 2))

    expected = value(lambda *x: attention_kernels.explicit_attention(*x)[0])(q, k, v)
    monkeypatch.setattr(attention_kernels, "MOST_LOGITS", 2 * 2 * 5 * 2)
    found = value(attention_kernels.chunked_attention)(q, k, v)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    program = str(jax.make_jaxpr(value(attention_kernels.chunked_attention))(q, k, v))
    assert "f32[4,2,5]" in program and "f32[4,7,5]" not in program  # the heads are folded into the batch


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_bias_and_mask_agree_with_torch(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    q, k, v = (heads(2, n, 4, 8, seed=i) for i, n in enumerate((3, 6, 6)))
    bias, mask = (
        heads(1, 4, 3, 6, seed=3),
        np.arange(6).reshape(1, 1, 1, 6) < np.array([4, 6]).reshape(2, 1, 1, 1),
    )
    ours = nn.dot_product_attention(*map(jnp.asarray, (q, k, v)), bias=bias, mask=mask)
    added = torch.from_numpy(np.where(mask, bias, -np.inf).astype(np.float32))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)), attn_mask=added
    )
    np.testing.assert_allclose(ours, expected.transpose(1, 2).numpy(), atol=1e-5)


def test_weights_are_the_softmax_that_made_the_result():
    q, k, v = (jnp.asarray(heads(2, 6, 4, 8, seed=i)) for i in range(3))
    out, weights = nn.dot_product_attention(q, k, v, return_weights=True)
    assert weights.shape == (2, 4, 6, 6) and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(jnp.einsum("bhnm,bmhd->bnhd", weights, v), out, atol=1e-5)


def test_softmax_of_large_bfloat16_logits_is_finite_and_near_float32():
    q, k, v = (jnp.asarray(30 * heads(1, 6, 2, 8, seed=i), jnp.bfloat16) for i in range(3))
    half = nn.dot_product_attention(q, k, v)
    exact = nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.02 * np.abs(exact).max())


def test_projections_are_the_same_maps_where_they_are_not_joined(monkeypatch):
    x, context, mask = heads(2, 4, 8), heads(2, 5, 6, seed=1), np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    module = nn.CrossAttention(2, use_bias=True)
    params = module.init(jax.random.key(0), x, context, mask)
    joined = module.apply(params, x, context, mask), jax.make_jaxpr(module.apply)(params, x, context, mask)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    apart = module.apply(params, x, context, mask), jax.make_jaxpr(module.apply)(params, x, context, mask)
    np.testing.assert_allclose(joined[0], apart[0], atol=1e-6)
    assert [str(program).count("concatenate") for _, program in (joined, apart)] == [2, 0]


@pytest.mark.parametrize("dim", [72, 128])
def test_16_bit_queries_are_rounded_once(dim):
    """The scale is no power of two: applied to 16-bit queries it would cost as much again as their format."""
    q, k, v = (jnp.asarray(heads(1, 64, 2, dim, seed=i), jnp.bfloat16) for i in range(3))
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    logits = np.einsum("bnhd,bmhd->bhnm", wide[0], wide[1]) * dim**-0.5
    _, weights = nn.dot_product_attention(q, k, v, return_weights=True)
    exact = np.exp(logits - logits.max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    assert np.linalg.norm(weights - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.unchecked
def test_shapes_that_do_not_fit_are_refused():
    q, k = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 4, 2, 6))
    with pytest.raises(AssertionError):
        nn.dot_product_attention(q, k, k)
    with pytest.raises(AssertionError):
        nn.dot_product_attention(q, q, k)
