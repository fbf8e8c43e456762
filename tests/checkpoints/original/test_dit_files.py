"""DiT in its original layout and in that of diffusers, and files in the former."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from jaxldm import checkpoints, models
from jaxldm.checkpoints.names import published
from jaxldm.checkpoints.original.dit import dit_config
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

FIELDS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 6}
NAMES = [
    "pos_embed",
    "x_embedder.proj.weight",
    "x_embedder.proj.bias",
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.0.bias",
    "t_embedder.mlp.2.weight",
    "t_embedder.mlp.2.bias",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
    "final_layer.adaLN_modulation.1.weight",
    "final_layer.adaLN_modulation.1.bias",
]
OF_BLOCK = [
    "attn.qkv.weight",
    "attn.qkv.bias",
    "attn.proj.weight",
    "attn.proj.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
    "adaLN_modulation.1.weight",
    "adaLN_modulation.1.bias",
]


def reference(folder, same_embedders=True, **fields):
    """A folder of diffusers with the model in it; its blocks share their embedders as published ones do."""
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        **(FIELDS | {"out_channels": 8, "num_embeds_ada_norm": 5} | fields)
    )
    state = theirs.state_dict()
    for name in [name for name in state if same_embedders and ".1.norm1.emb." in name]:
        state[name].copy_(state[name.replace(".1.", ".0.", 1)])
    theirs.eval().save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    return reference(folder), *checkpoints.load(folder)


@pytest.fixture(scope="module")
def answers(pair):
    """x, t, labels, and the output of diffusers, channels last."""
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((3, 6, 6, 4)).astype(np.float32), np.array([0.0, 400.0, 999.0], np.float32)
    labels = np.array([0, 5, 3])
    with torch.no_grad():
        nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        said = pair[0](nchw, torch.from_numpy(t), torch.from_numpy(labels)).sample
    return x, t, labels, said.numpy().transpose(0, 2, 3, 1)


def largest_difference(pair, answers, freq_shift):
    _, module, params = pair
    original, turned = checkpoints.dit_from_diffusers(module, params, freq_shift=freq_shift)
    *given, said = answers
    return np.abs(jax.jit(original.apply)({"params": turned}, *given) - said).max() / np.abs(said).max()


def test_the_original_layout_answers_as_diffusers_does_with_its_frequencies(pair, answers):
    assert largest_difference(pair, answers, freq_shift=1) < 1e-4


def test_the_frequencies_of_diffusers_are_not_the_original_ones(pair, answers):
    """Peebles & Xie's code has w_k = 10000^(-k / 128); the port gives the same weights other sinusoids."""
    assert largest_difference(pair, answers, freq_shift=0) > 1e-2
    t, k = torch.tensor([999.0]), torch.arange(128)
    original = torch.cos(999.0 * torch.exp(-np.log(10000.0) * k / 128))
    of_port = pair[0].transformer_blocks[0].norm1.emb.time_proj(t)[0, :128]
    of_ours = models.DiTConfig().freq_shift
    assert of_ours == 0 and (of_port - original).abs().max() > 0.5


def test_back_to_diffusers_bit_for_bit(pair):
    _, module, params = pair
    again_module, again = checkpoints.dit_to_diffusers(*checkpoints.dit_from_diffusers(module, params))
    assert again_module == module
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_sixteen_bits_stay_what_they_are(pair):
    _, module, params = pair
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), jax.device_get(params))
    _, turned = checkpoints.dit_from_diffusers(module, half)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(turned)} == {"bfloat16"}


def test_embedders_that_differ_are_refused(tmp_path):
    reference(tmp_path, same_embedders=False)
    with pytest.raises(
        CheckpointError, match=r"blocks\.1\.norm1\.emb\..* differs from transformer_blocks\.0"
    ):
        checkpoints.dit_from_diffusers(*checkpoints.load(tmp_path))


@pytest.mark.parametrize(
    "fields", [{"attention_bias": False}, {"activation_fn": "gelu"}, {"out_channels": 5}]
)
def test_what_the_original_does_not_have_is_refused(tmp_path, fields):
    reference(tmp_path, **fields)
    with pytest.raises(InvalidArgumentError, match="original DiT has"):
        checkpoints.dit_from_diffusers(*checkpoints.load(tmp_path))


@pytest.mark.parametrize(
    "fields",
    [{"num_classes": None}, {"sample_size": (8, 4)}, {"mlp_ratio": 2.0}, {"position_embedding": "learned"}],
)
def test_what_diffusers_does_not_have_is_refused(fields):
    module = models.build("tiny-dit", **fields)
    with pytest.raises(InvalidArgumentError, match="diffusers has DiTs with classes"):
        checkpoints.dit_to_diffusers(module, {})


@pytest.fixture
def file(pair, tmp_path):
    """An original file, and the model in it."""
    _, module, params = pair
    original, turned = checkpoints.dit_from_diffusers(module, params)
    path = tmp_path / "DiT.safetensors"
    checkpoints.save_dit_file(path, original, turned)
    return path, original, turned


@pytest.mark.parametrize("architecture", ["DiT", "SiT"])
def test_an_original_file_comes_back_as_it_was(file, architecture):
    path, original, params = file
    assert set(safetensors.numpy.load_file(path)) == {
        *NAMES,
        *(f"blocks.{block}.{name}" for block in (0, 1) for name in OF_BLOCK),
    }
    module, loaded = checkpoints.load_dit_file(path, architecture, num_heads=2)
    kind = models.DiTConfig if architecture == "DiT" else models.SiTConfig
    fields = {field.name: getattr(original.config, field.name) for field in dataclasses.fields(kind)}
    # A file holds no config: epsilon is the published one.
    assert module.config == kind(**fields | {"norm_eps": 1e-6})
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    _, half = checkpoints.load_dit_file(path, architecture, num_heads=2, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half)} == {"bfloat16"}


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_shapes_say_which_preset_it_is(kind):
    presets = {name: config for name, config in models.PRESETS.items() if name.startswith(f"{kind}-")}
    assert len(presets) == 12
    for config in presets.values():
        module = models.from_config(config)
        shapes = {name: tensor.shape for name, tensor in published(models.shapes(module)).items()}
        shapes |= {name: table.shape for name, table in module.constant_tensors().items()}
        assert dit_config(shapes, type(config)) == config


def test_what_cannot_be_read(file, tmp_path):
    path, _, _ = file
    with pytest.raises(UnknownNameError, match="SiT"):
        checkpoints.load_dit_file(path, "UiT")
    with pytest.raises(InvalidArgumentError, match=r"widths 384, 768, 1024, 1152 .* not for 16"):
        checkpoints.load_dit_file(path)
    with pytest.raises(CheckpointError, match="pickle"):
        (tmp_path / "DiT.pt").write_bytes(b"PK\x03\x04")
        checkpoints.load_dit_file(tmp_path / "DiT.pt")
    tensors = safetensors.numpy.load_file(path)

    def changed(**others):
        kept = {name: tensor for name, tensor in (tensors | others).items() if tensor is not None}
        safetensors.numpy.save_file(kept, path)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.load_dit_file(path, num_heads=2)
        return str(caught.value)

    assert "not an original file of DiT or SiT: it has no tensor x_embedder.proj.weight" in changed(
        **{"x_embedder.proj.weight": None}
    )
    assert "missing: blocks.1.attn.qkv.bias (48,)" in changed(**{"blocks.1.attn.qkv.bias": None})
    assert "left over: more (2,)" in changed(more=np.zeros(2, np.float32))
    assert "learned positions" in changed(pos_embed=tensors["pos_embed"] + 0.1)


def test_only_the_original_layout_becomes_a_file(pair, tmp_path):
    with pytest.raises(InvalidArgumentError, match="dit_from_diffusers"):
        checkpoints.save_dit_file(tmp_path / "DiT.safetensors", *pair[1:])
