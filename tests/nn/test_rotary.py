import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from jaxldm import nn
from jaxldm.errors import InvalidArgumentError


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((2, 15, 3, 16)).astype(np.float32)


def test_neighbouring_pairs_turn_as_in_diffusers(x):
    positions = np.stack(np.unravel_index(np.arange(15), (1, 3, 5)), axis=1) * [[1, 1, 400]]
    cos, sin = nn.rotary_embedding_of_axes(positions, (4, 6, 6), theta=10000.0)
    tables = FluxPosEmbed(theta=10000, axes_dim=(4, 6, 6))(torch.from_numpy(positions))
    for ours, expected in zip((cos, sin), tables, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(np.repeat(ours, 2, axis=1), expected.numpy(), atol=1e-6)
    expected = apply_rotary_emb(torch.from_numpy(x), tables, sequence_dim=1).numpy()
    np.testing.assert_allclose(nn.apply_rotary(jnp.asarray(x), cos, sin), expected, atol=1e-5)


def test_halves_turn_as_in_transformers_and_positions_may_differ_in_a_batch(x):
    both = [nn.rotary_embedding(np.arange(15) + first, 16, 1e6) for first in (0, 7)]
    cos, sin = (np.stack(tables) for tables in zip(*both, strict=True))
    ours = nn.apply_rotary(jnp.asarray(x), cos, sin, interleaved=False)
    doubled = [torch.from_numpy(np.concatenate([table, table], axis=-1)) for table in (cos, sin)]
    query = torch.from_numpy(x).transpose(1, 2)
    expected = apply_rotary_pos_emb(query, query, *doubled)[0].transpose(1, 2).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
def test_products_see_distances_only(x, interleaved):
    def product(shift):
        tables = nn.rotary_embedding(np.arange(15) + shift, 16, 100.0)
        query = nn.apply_rotary(jnp.asarray(x), *tables, interleaved=interleaved)
        return jnp.einsum("bnhd,bmhd->bhnm", query, query)

    np.testing.assert_allclose(product(0), product(23), atol=2e-5)
    plain = jnp.einsum("bnhd,bmhd->bhnm", x, x)
    assert np.abs(product(0) - plain).max() > 1.0  # they do turn


def test_sixteen_bit_inputs_are_turned_in_float32(x):
    tables = nn.rotary_embedding(np.arange(15) * 97, 16, 10000.0)
    half = nn.apply_rotary(jnp.asarray(x, jnp.bfloat16), *tables)
    assert half.dtype == jnp.bfloat16
    exact = nn.apply_rotary(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), *tables)
    np.testing.assert_array_equal(half, exact.astype(jnp.bfloat16))


def test_pairs_need_an_even_width():
    with pytest.raises(InvalidArgumentError, match="an even width, got 7"):
        nn.rotary_embedding(np.arange(3), 7, 10000.0)
