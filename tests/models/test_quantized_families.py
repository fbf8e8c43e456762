"""Fewer bits in every family: which kernels are packed, what is drawn with them, and from disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from small_networks import NETWORKS, B, build, params_of

from jaxldm import checkpoints, models
from jaxldm.models.quantization import MODULATION

WEIGHTS = models.quantization("int4", rank=2, group_size=8, modulation="int8")


@pytest.fixture(scope="module", params=NETWORKS)
def family(request):
    module, x, condition = build(request.param)
    return module, params_of(module), (x, jnp.full(B, 0.7), condition)


# What is not in a block, and keeps 16 bits whatever the settings: the first and last layers, embeddings.
OUTSIDE = {
    "unet": "conv_in conv_out time_embedding",
    "unet-of-texts": "conv_in conv_out time_embedding",
    "dit": "final_layer t_embedder x_embedder",
    "sit-scanned": "final_layer t_embedder x_embedder",
    "dit-of-diffusers": "pos_embed proj_out_1 proj_out_2",
    "sd3": "context_embedder norm_out pos_embed proj_out time_text_embed",
    "flux": "context_embedder norm_out proj_out time_text_embed x_embedder",
    "flux2": "context_embedder norm_out proj_out time_guidance_embed x_embedder double_stream_modulation_img "
    "double_stream_modulation_txt single_stream_modulation",
    "pixart": "adaln_single caption_projection pos_embed proj_out",
    "qwen-image": "img_in norm_out proj_out time_text_embed txt_in",
    "z-image": "all_final_layer all_x_embedder cap_embedder_1 t_embedder",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_of_blocks_are_packed_and_nothing_else(name):
    module = build(name)[0]
    for path, leaf in traverse_util.flatten_dict(models.quantized_shapes(module, WEIGHTS)).items():
        inside = path[0] not in OUTSIDE[name].split() and "timestep_embedder" not in path
        assert isinstance(leaf, models.Quantized) == (inside and path[-1] == "kernel"), path
    plain = models.quantized_shapes(module, models.quantization("int8"))
    packed = [path for path, leaf in traverse_util.flatten_dict(plain).items() if hasattr(leaf, "codes")]
    assert packed and not any(MODULATION.fullmatch(part) for path in packed for part in path)


def test_it_draws_what_the_dequantised_weights_draw_and_is_read_back(family, tmp_path):
    module, params, inputs = family
    small = models.quantize(module, params, WEIGHTS)
    call = jax.jit(models.network(module))
    found, wanted = call(small, *inputs), call(models.dequantize(small), *inputs)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(found - call(params, *inputs)).max() > 1e-3 * np.abs(wanted).max()
    checkpoints.save(tmp_path, module, small)
    again, read = checkpoints.load(tmp_path)
    assert again.config == module.config
    jax.tree.map(np.testing.assert_array_equal, read, small)
    rounded = models.quantize(module, params, models.quantization("int8"))
    assert jax.eval_shape(call, rounded, *inputs).shape == wanted.shape  # activations, too
