import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import models, nn
from jaxldm.errors import InvalidArgumentError


@pytest.mark.parametrize("dim", [16, 33])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("max_period", [10000, 100])
def test_timestep_embedding_agrees_with_diffusers(dim, flip, shift, max_period):
    t = np.array([0.0, 0.5, 37.25, 999.0], np.float32)
    ours = nn.timestep_embedding(
        jnp.asarray(t), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift, max_period=max_period
    )
    expected = get_timestep_embedding(torch.from_numpy(t), dim, flip, shift, max_period=max_period).numpy()
    # float32 angles of up to 999 radians are good to 1e-4
    np.testing.assert_allclose(ours, expected, atol=2e-4)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (4, 4)])
def test_positions_agree_with_diffusers(height, width):
    ours = nn.sincos_position_embedding_2d(16, height, width)
    expected = get_2d_sincos_pos_embed(16, (height, width), base_size=height, output_type="pt").numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((7, 7), {"base_size": 7}),
        ((3, 5), {"base_size": 4, "interpolation_scale": 2.0}),  # PixArt's other sizes
        ((6, 6), {"base_size": 2, "interpolation_scale": 0.5}),
    ],
)
def test_positions_stretched_to_a_common_range_agree_with_diffusers(grid, options):
    ours = nn.sincos_position_embedding_2d(16, *grid, **options)
    expected = get_2d_sincos_pos_embed(16, grid, output_type="pt", **options).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_positions_of_an_oblong_grid_read_row_by_row():
    table = nn.sincos_position_embedding_2d(8, 2, 3).reshape(2, 3, 8)
    np.testing.assert_allclose(table[1, 2, :2], np.sin([2.0, 2.0 / 100]), rtol=1e-6)  # the column
    np.testing.assert_allclose(table[1, 2, 4:6], np.sin([1.0, 1.0 / 100]), rtol=1e-6)  # the row
    with pytest.raises(InvalidArgumentError, match="multiple of 4"):
        nn.sincos_position_embedding_2d(10, 2, 2)


sides = st.integers(1, 4)


@given(st.integers(1, 3), sides, sides, st.integers(1, 3), st.integers(1, 3))
def test_patches_go_back_together_exactly(batch, rows, columns, patch, channels):
    shape = (batch, rows * patch, columns * patch, channels)
    images = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    tokens = models.patchify(images, patch)
    assert tokens.shape == (batch, rows * columns, patch * patch * channels)
    np.testing.assert_array_equal(models.unpatchify(tokens, patch, *shape[1:3]), images)
    # a token is one patch, and tokens are counted along rows first
    last = images[:, -patch:, -patch:].reshape(batch, -1)
    np.testing.assert_array_equal(tokens[:, -1], last)
    np.testing.assert_array_equal(tokens[:, columns - 1], images[:, :patch, -patch:].reshape(batch, -1))


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(InvalidArgumentError, match="7x8"):
        models.patchify(jnp.zeros((1, 7, 8, 1)), 2)
    with pytest.raises(InvalidArgumentError, match="5 tokens"):
        models.unpatchify(jnp.zeros((1, 5, 4)), 2, 4, 4)
