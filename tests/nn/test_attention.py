import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxldm import nn
from jaxldm.nn import attention

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


@pytest.mark.unchecked
def test_flash_kernel_is_requested_exactly_where_it_is_supported(monkeypatch):
    implementations = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "_on_cuda", lambda: True)
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda q, k, v, bias, mask, *, scale, implementation: implementations.append(implementation),
    )
    for dtype, dim in (
        ("bfloat16", 64),
        ("float32", 64),
        ("bfloat16", 72),
        ("bfloat16", 36),
        ("bfloat16", 256),
    ):
        q = jnp.zeros((1, 4, 2, dim), dtype)
        nn.dot_product_attention(q, q, q)
    nn.dot_product_attention(*[jnp.zeros((1, 4, 2, 64), "bfloat16")] * 3, bias=jnp.zeros((1, 2, 4, 4)))
    assert implementations == ["cudnn", None, "cudnn", None, None, None]


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


@pytest.mark.unchecked
def test_shapes_that_do_not_fit_are_refused():
    q, k = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 4, 2, 6))
    with pytest.raises(AssertionError):
        nn.dot_product_attention(q, k, k)
    with pytest.raises(AssertionError):
        nn.dot_product_attention(q, q, k)
