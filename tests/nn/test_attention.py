import contextlib
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxldm import models, nn
from jaxldm.errors import InvalidArgumentError
from jaxldm.nn import attention_kernels, flash_attention

OPTIMIZED = True  # compiled as users do, see tests/conftest.py
WORKS = flash_attention.works.__wrapped__


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
    """JAX as on an NVIDIA device, its flash kernel replaced by plain products; returns the calls of it.

    Each call is the names of what it was given. The kernel is not tried first.
    """
    asked = []

    def kernel(query, key, value, bias=None, *, scale, implementation, is_causal=False, **lengths):
        assert implementation == "cudnn" and set(lengths) <= {"key_value_seq_lengths"}
        given = {"bias": bias is not None, "causal": is_causal, "lengths": bool(lengths)}
        if query.shape[1] != 64:  # that of the trial
            asked.append([name for name, there in given.items() if there])
        counts = lengths.get("key_value_seq_lengths")
        mask = attention_kernels.merged_mask(None, is_causal, counts, query.shape[1], key.shape[1])
        return attention_kernels.explicit_attention(query, key, value, scale, bias, mask)[0]

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(flash_attention, "on_cuda", lambda: True)
    monkeypatch.setattr(flash_attention, "on_hopper", lambda: False)
    monkeypatch.setattr(flash_attention, "KERNELS", dict(flash_attention.KERNELS))
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    monkeypatch.setattr(flash_attention, "works", lambda *asked: True)
    return asked


@pytest.fixture
def tried(cuda, monkeypatch):
    """The same, and kernels are tried first; trials are not among the calls."""
    monkeypatch.setattr(flash_attention, "works", functools.cache(WORKS))
    return cuda


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
        assert cuda == [[]] * flash
        cuda.clear()


# Masks -> what the flash kernel is given in their place.
B, H, N = 2, 2, 5
KEYS = jnp.asarray(np.array([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0]]), bool)[:, None, None]
ANY = jnp.asarray(np.random.default_rng(9).random((B, H, N, N)) < 0.5).at[0, 0, 2].set(False)
BIAS = jnp.asarray(heads(1, H, N, N, seed=3), jnp.bfloat16).astype(jnp.float32)
FORMS = {
    "causal": ({"causal": True}, ["causal"]),
    "lengths": ({"key_lengths": jnp.array([3, 5], jnp.int32)}, ["lengths"]),
    "causal lengths": ({"key_lengths": jnp.array([3, 5], jnp.int32), "causal": True}, ["causal", "lengths"]),
    "keys": ({"mask": KEYS}, ["lengths"]),
    "causal keys": ({"mask": KEYS, "causal": True}, ["bias"]),
    "any mask": ({"mask": ANY}, ["bias"]),
    "bias": ({"bias": BIAS}, ["bias"]),
    "bias and keys": ({"bias": BIAS, "mask": KEYS}, ["bias"]),
    "bias and causal": ({"bias": BIAS, "causal": True}, ["bias"]),
}


@pytest.mark.parametrize(
    ("form", "dtype"), [*((form, "bfloat16") for form in FORMS), ("any mask", "float16"), ("keys", "float16")]
)
def test_masks_and_biases_have_a_form_that_the_flash_kernel_takes(monkeypatch, cuda, form, dtype):
    """Results and gradients, of the bias too, are those of a CPU; a row that may attend to nothing also."""
    masks, given = FORMS[form]
    q, k, v = (jnp.asarray(heads(B, N, H, 8, seed=i), dtype) for i in range(3))
    weight = heads(B, N, H, 8, seed=5)
    bias = masks.get("bias", jnp.zeros((1, 1, 1, 1)))

    def value(q, k, v, bias):
        biased = masks | ({"bias": bias} if "bias" in masks else {})
        out = nn.dot_product_attention(q, k, v, **biased).astype(jnp.float32)
        return (out * weight).sum(), out

    found = jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)
    assert cuda == [given]
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    expected = jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        one, other = (np.asarray(x.astype(jnp.float32)) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=0.02 * max(1.0, np.abs(other).max()))


def test_a_bias_too_large_to_be_written_out_is_added_in_chunks(monkeypatch, cuda):
    monkeypatch.setattr(flash_attention, "MOST_BIASES", H * N * N - 1)
    q, k, v = (jnp.asarray(heads(B, N, H, 8, seed=i), jnp.bfloat16) for i in range(3))
    found = nn.dot_product_attention(q, k, v, bias=BIAS)
    assert cuda == []
    expected = attention_kernels.explicit_attention(q, k, v, 8**-0.5, BIAS)[0]
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (found, expected)), atol=0.02)


@pytest.mark.parametrize("fault", ["raises", "wrong", "not a number"])
def test_a_kernel_that_fails_its_trial_is_not_used_and_one_line_says_so(monkeypatch, tried, fault):
    """Also inside of a compiled, sharded, recomputed scan; the trial is made once."""
    trials = []

    def broken(query, *given):
        trials.append(query.shape)
        if fault == "raises":
            raise RuntimeError("no\nsuch kernel")
        return query * (jnp.nan if fault == "not a number" else 1)

    broken_kernel = flash_attention.KERNELS["cuDNN"]._replace(attend=broken)
    monkeypatch.setitem(flash_attention.KERNELS, "cuDNN", broken_kernel)
    q = jnp.asarray(heads(1, 4, 2, 8), jnp.bfloat16)
    mesh = jax.make_mesh((1,), ("images",))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    def run(q):
        body = jax.checkpoint(lambda q, _: (nn.dot_product_attention(q, q, q), None))
        return jax.grad(lambda q: jax.lax.scan(body, q, jnp.arange(3))[0].astype(jnp.float32).sum())(q)

    reason = "RuntimeError: no such kernel" if fault == "raises" else "its error is"
    with pytest.warns(UserWarning, match=f"^attention without cuDNN's kernel for heads of 8 .*: {reason}"):
        assert np.isfinite(np.asarray(run(q), np.float32)).all()
    count = len(trials)
    nn.dot_product_attention(q, q, q)  # without another warning
    assert len(trials) == count > 0


@pytest.mark.parametrize("package", ["works", "refuses these shapes", "fails", "absent"])
def test_hopper_kernels_are_used_where_the_package_is_there_and_works(monkeypatch, tried, package):
    """Tokamax first, then cuDNN; one line says why not."""
    calls = []

    def attention(query, key, value, *, scale, is_causal, key_value_seq_lengths, implementation):
        assert implementation == "mosaic"
        of_trial = query.shape[1] == 64
        if package == "fails" or (package == "refuses these shapes" and not of_trial):
            raise NotImplementedError("not for these")
        calls.extend([] if of_trial else [query.shape])
        mask = attention_kernels.merged_mask(
            None, is_causal, key_value_seq_lengths, query.shape[1], key.shape[1]
        )
        return attention_kernels.explicit_attention(query, key, value, scale, None, mask)[0]

    module = None if package == "absent" else types.SimpleNamespace(dot_product_attention=attention)
    monkeypatch.setitem(sys.modules, "tokamax", module)
    monkeypatch.setattr(flash_attention, "on_hopper", lambda: True)
    q = jnp.asarray(heads(1, 5, 2, 8), jnp.bfloat16)
    said = package in ("refuses these shapes", "fails")
    expect = pytest.warns(UserWarning, match="without tokamax's kernel") if said else contextlib.nullcontext()
    with expect:
        found = nn.dot_product_attention(q, q, q, causal=True)
    assert (calls, tried) == (([q.shape], []) if package == "works" else ([], [["causal"]]))
    expected = attention_kernels.explicit_attention(
        q, q, q, 8**-0.5, None, jnp.tril(jnp.ones((1, 1, 5, 5), bool))
    )
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (found, expected[0])), atol=0.02)
    if package == "works":
        assert models.macs_of(lambda q: nn.dot_product_attention(q, q, q), q) == 2 * 5 * 5 * 2 * 8
        nn.dot_product_attention(q, q, q, bias=jnp.zeros((1, 2, 5, 5)))  # which only cuDNN takes
        assert tried == [["bias"]]


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
    assert cuda == [["lengths"]]
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
    for function in (attention_kernels.chunked_attention, lambda *x: nn.dot_product_attention(*x[:3])):
        program = str(jax.make_jaxpr(value(function))(q, k, v))
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
    with pytest.raises(InvalidArgumentError, match="do not go together"):
        nn.dot_product_attention(q, k, k)
    with pytest.raises(InvalidArgumentError, match="do not go together"):
        nn.dot_product_attention(q, q, k)
