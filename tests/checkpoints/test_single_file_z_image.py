"""Z-Image as one file: the reference's converter reads what we write, and we read back every bit."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils

from jaxldm import checkpoints, models
from jaxldm.checkpoints.safetensors_file import read_safetensors, safetensors_bytes
from jaxldm.checkpoints.single_file import FAMILIES, load_single_file, save_single_file
from jaxldm.checkpoints.single_file_names import place_of
from jaxldm.errors import CheckpointError

# One head as wide as the published ones.
TRANSFORMER = {"in_channels": 4, "dim": 128, "n_heads": 1, "n_kv_heads": 1, "n_layers": 2, "cap_feat_dim": 10}
QWEN = {
    "vocab_size": 40,
    "hidden_size": 10,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    axes_lens = models.PRESETS["z-image"].axes_lens
    return {
        "transformer": diffusers.ZImageTransformer2DModel(**TRANSFORMER, axes_lens=list(axes_lens)),
        "text_encoder": transformers.Qwen3Model(transformers.Qwen3Config(**QWEN)),
    }


@pytest.fixture(scope="module")
def components(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    parts = {}
    for name, model in theirs.items():
        torch.nn.init.normal_(next(model.parameters()))
        model.save_pretrained(folder / name)
        parts[name] = checkpoints.load(folder / name)
    return parts


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, (module, params) in expected.items():
        assert found[name][0] == module, name
        jax.tree.map(np.testing.assert_array_equal, found[name][1], params)


def converted(state):
    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in state.items()}
    return single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(tensors)


def test_the_reference_converts_our_file_to_the_published_tensors(theirs, components, tmp_path):
    """And we read one that also holds a norm which no layer has."""
    path = tmp_path / "z_image_turbo_bf16.safetensors"
    save_single_file(path, {"transformer": components["transformer"]})
    state = read_safetensors(path)
    assert state["noise_refiner.1.attention.qkv.weight"].shape == (3 * 128, 128)
    path.write_bytes(safetensors_bytes(state | {"norm_final.weight": np.ones(128, np.float32)}))
    found, expected = converted(read_safetensors(path)), theirs["transformer"].state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy(), err_msg=name)
    assert_same(load_single_file(path), {"transformer": components["transformer"]})


def test_all_in_one_file_as_comfyui_has_it(theirs, components, tmp_path):
    path = tmp_path / "all.safetensors"
    save_single_file(path, components)
    state = read_safetensors(path)
    assert "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_norm.weight" in state
    found = converted({name: tensor for name, tensor in state.items() if name.startswith("model.")})
    assert found.keys() == theirs["transformer"].state_dict().keys()
    assert_same(load_single_file(path), components)


# Tensors of the published file and their shapes.
PUBLISHED = {
    "x_embedder.weight": (3840, 64),
    "x_pad_token": (1, 3840),
    "t_embedder.mlp.0.weight": (1024, 256),
    "cap_embedder.0.weight": (2560,),
    "cap_embedder.1.weight": (3840, 2560),
    "context_refiner.1.attention.out.weight": (3840, 3840),
    "layers.29.attention.qkv.weight": (11520, 3840),
    "layers.29.attention.k_norm.weight": (128,),
    "layers.29.feed_forward.w1.weight": (10240, 3840),
    "layers.29.adaLN_modulation.0.weight": (15360, 256),
    "final_layer.adaLN_modulation.1.weight": (3840, 256),
    "final_layer.linear.weight": (64, 3840),
}


def test_the_preset_stands_in_the_published_file():
    """Names and shapes; and from them, the preset is found again."""
    config, part = models.PRESETS["z-image"], FAMILIES["Z-Image"]["transformer"]
    with torch.device("meta"):
        theirs = diffusers.ZImageTransformer2DModel.from_config(models.config_to_dict(config)).state_dict()
    shapes = {}
    for name, tensor in theirs.items():
        place, shape = place_of(name, part.table(config)), tuple(tensor.shape)
        shape = (3 * shape[0], *shape[1:]) if isinstance(place.form, int) else shape
        assert shapes.setdefault(place.name, shape) == shape
    assert {name: shapes.get(name) for name in PUBLISHED} == PUBLISHED
    assert part.config(shapes, dataclasses.replace(config, n_layers=1, n_refiner_layers=1)) == config
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert single_file_utils.infer_diffusers_model_type(meta) == "z-image-turbo"
    found = single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(meta)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layers.1.feed_forward.w2.weight", None, r"missing: layers\.1\.feed_forward\.w2\.weight"),
        ("layers.1.attention.qkv.weight", (383, 128), r"to_q\.weight is \(383, 128\) in the file"),
        ("layers.0.surprise", (3,), r"left over: layers\.0\.surprise \(3,\)"),
        ("x_embedder.weight", None, r"the transformer is not whole: it has no tensor x_embedder\.weight"),
        ("layers.0.attention.q_norm.weight", (64,), "shapes of no model: axes_dims"),
    ],
)
def test_what_does_not_fit_is_named(components, tmp_path, name, change, message):
    path = tmp_path / "changed.safetensors"
    save_single_file(path, {"transformer": components["transformer"]})
    state = dict(read_safetensors(path))
    if change is None:
        del state[name]
    else:
        state[name] = np.zeros(change, np.float32)
    path.write_bytes(safetensors_bytes(state))
    with pytest.raises(CheckpointError, match=message):
        load_single_file(path)
