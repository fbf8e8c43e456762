import jax
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import checkpoints, models
from jaxldm.checkpoints.names import published_name
from jaxldm.errors import CheckpointError


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("down_blocks_0/resnets_12/conv1/kernel", "down_blocks.0.resnets.12.conv1.weight"),
        ("mid_block/attentions_0/to_out_0/bias", "mid_block.attentions.0.to_out.0.bias"),
        ("time_embedding/linear_1/kernel", "time_embedding.linear_1.weight"),
        ("blocks_3/adaLN_modulation_1/kernel", "blocks.3.adaLN_modulation.1.weight"),
        ("t_embedder/mlp_2/kernel", "t_embedder.mlp.2.weight"),
        ("conv_norm_out/scale", "conv_norm_out.weight"),
        ("y_embedder/embedding_table/embedding", "y_embedder.embedding_table.weight"),
        ("pos_embed", "pos_embed"),
    ],
)
def test_published_names(path, name):
    assert published_name(tuple(path.split("/"))) == name


leaf_names = st.sampled_from(["kernel", "bias", "scale", "embedding", "weight"])
shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)
dtypes = st.sampled_from(["float32", "float16", "bfloat16", "int32", "uint8", "bool"])


@given(st.lists(st.tuples(leaf_names, shapes, dtypes), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_any_tree_survives_both_ways_bit_for_bit(leaves, seed):
    rng = np.random.default_rng(seed)
    params = {
        f"layer_{i}": {leaf: rng.integers(0, 255, shape).astype(jax.numpy.dtype(dtype))}
        for i, (leaf, shape, dtype) in enumerate(leaves)
    }
    back = checkpoints.from_state_dict(checkpoints.to_state_dict(params), params)
    for path, value in traverse_util.flatten_dict(params).items():
        result = np.asarray(traverse_util.flatten_dict(back)[path])
        assert result.dtype == value.dtype and result.shape == value.shape
        assert result.tobytes() == value.tobytes()


def test_kernels_change_axes_as_torch_wants_them():
    params = {
        "linear": {"kernel": np.zeros((3, 5))},
        "conv": {"kernel": np.zeros((4, 4, 3, 5))},
        "deconv": {"weight": np.zeros((3, 5, 4, 4))},
    }
    state = checkpoints.to_state_dict(params)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        "linear.weight": (5, 3),
        "conv.weight": (5, 3, 4, 4),
        "deconv.weight": (3, 5, 4, 4),
    }
    assert all(tensor.flags.c_contiguous for tensor in state.values())


def test_what_does_not_fit_is_named_with_both_shapes():
    template = {
        "conv": {"kernel": np.zeros((3, 3, 2, 4)), "bias": np.zeros(4)},
        "norm": {"scale": np.zeros(4)},
    }
    state = checkpoints.to_state_dict(template)
    state["conv.weight"] = np.zeros((4, 2, 1, 1))
    state["surprise"] = state.pop("norm.weight")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.from_state_dict(state, template)
    message = str(caught.value)
    assert "missing: norm.weight (4,)" in message
    assert "left over: surprise (4,)" in message
    assert "conv.weight is (4, 2, 1, 1) in the file, (4, 2, 3, 3) in the model" in message


def test_attention_names_of_early_checkpoints_are_understood():
    module = models.build("mini-unet", block_out_channels=(8,), down_block_types=("AttnDownBlock2D",),
                          up_block_types=("UpBlock2D",), norm_num_groups=4, attention_head_dim=4)  # fmt: skip
    params = models.init(module, jax.random.key(0))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in checkpoints.to_state_dict(params).items():
        for new, early in old.items():
            name = name.replace(f".{new}.", f".{early}.")
        state[name] = tensor
    assert "mid_block.attentions.0.proj_attn.weight" in state
    jax.tree.map(np.testing.assert_array_equal, checkpoints.from_state_dict(state, params), params)
