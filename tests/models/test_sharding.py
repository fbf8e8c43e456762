"""Weights split over a mesh by rule: how much a device has, and that nothing else changes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from tiny_models import random_params

from jaxldm import models
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.sharding import AXES, RULES, a_mesh, check_splits, count_by_rule, mesh_of, some_rules

MESHES = {"tensor": (1, 1, 8), "fsdp": (1, 8, 1), "both": (1, 2, 4), "both, and images": (2, 2, 2)}


def mesh_of_sizes(sizes):
    return AbstractMesh(sizes, AXES)


@pytest.fixture(scope="module")
def flux():
    return shapes_of("flux-dev")


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_each_device_has_its_share_of_flux(flux, sizes):
    """All but vectors: 12 billion parameters, 1.5 billion on each of eight devices."""
    counts = count_by_rule(mesh_of_sizes(sizes), flux)
    total, each = (sum(getattr(count, name) for count in counts) for name in ("numbers", "per_device"))
    assert total == models.count_params("flux-dev") == 11_901_408_320
    assert total / (sizes[1] * sizes[2]) <= each < 1.01 * total / (sizes[1] * sizes[2])
    assert counts[-1].pattern is None and counts[-1].numbers < 1e-3 * total


PRESETS = (
    *("sd3-medium", "z-image", "qwen-image", "flux2-klein-4b", "dit-s-8", "amused-256", "wuerstchen-prior"),
    *("t5-base", "qwen3-4b", "clip-l", "minilm", "mini-unet"),
)


@functools.cache
def shapes_of(preset):
    return models.shapes(models.build(preset))


@pytest.mark.parametrize("name", PRESETS)
def test_each_device_has_its_share_of_other_networks(name):
    counts = count_by_rule(mesh_of_sizes((1, 2, 2)), shapes_of(name))
    numbers = sum(count.numbers for count in counts)
    assert sum(count.per_device for count in counts) < 0.3 * numbers


def test_heads_and_hidden_layers_stay_on_their_device():
    """The first product splits its output, the second its input: between the two nothing moves."""
    place = models.sharding_of(mesh_of_sizes((1, 1, 2)))
    for first, second in (
        (("attn", "to_q"), ("attn", "to_out_0")),
        (("attn", "add_v_proj"), ("attn", "to_add_out")),
        (("attn", "qkv"), ("attn", "proj")),
        (("mlp", "fc1"), ("mlp", "fc2")),
        (("SelfAttention", "q"), ("SelfAttention", "o")),
        (("DenseReluDense", "wi_0"), ("DenseReluDense", "wo")),
        (("feed_forward", "w1"), ("feed_forward", "w2")),
        (("mlp", "up_proj"), ("mlp", "down_proj")),
    ):
        assert place(("blocks_0", *first, "kernel"), (8, 4)).spec == PartitionSpec(None, "tensor")
        assert place(("blocks_0", *second, "kernel"), (4, 8)).spec == PartitionSpec("tensor")
    assert place(("pos_embed", "proj", "kernel"), (2, 2, 4, 8)).spec == PartitionSpec(
        None, None, None, "tensor"
    )


def test_blocks_of_a_scan_are_split_as_those_that_are_written_out():
    place = models.sharding_of(mesh_of_sizes((1, 2, 2)))
    alone = place(("blocks_0", "mlp", "fc1", "kernel"), (4, 16)).spec
    stacked = place(("blocks_0to7", "mlp", "fc1", "kernel"), (8, 4, 16)).spec
    assert stacked == PartitionSpec(None, *alone) == PartitionSpec(None, "fsdp", "tensor")
    assert place(("blocks_0to7", "mlp", "fc1", "bias"), (8, 16)).spec == PartitionSpec()


def test_what_cannot_be_split_evenly_is_whole_or_split_otherwise():
    place = models.sharding_of(mesh_of_sizes((1, 2, 3)))
    assert place(("a", "kernel"), (4, 8)).spec == PartitionSpec(None, "fsdp")
    assert place(("a", "kernel"), (4, 9)).spec == PartitionSpec("fsdp", "tensor")
    assert place(("a", "kernel"), (5, 7)).spec == PartitionSpec()


def test_own_rules_come_first():
    rules = (("a/kernel", PartitionSpec(("fsdp", "tensor"), None)), *RULES)
    place = models.sharding_of(mesh_of_sizes((1, 2, 2)), rules)
    assert place(("a", "kernel"), (8, 4)).spec == PartitionSpec(("fsdp", "tensor"))
    assert place(("b", "kernel"), (8, 4)).spec == PartitionSpec("fsdp", "tensor")
    with pytest.raises(InvalidArgumentError, match=r"splits 3 axes, and a/kernel has 2, \[4, 4\]"):
        models.sharding_of(mesh_of_sizes((1, 2, 2)), [("a/kernel", PartitionSpec(None, None, "fsdp"))])(
            ("a", "kernel"), (4, 4)
        )


NETWORKS = {
    "FLUX": ("flux-dev", dict(
        in_channels=16, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, num_layers=2,
        num_single_layers=2, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6),
    )),
    "SD 3.5": ("sd35-medium", dict(
        sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8, num_attention_heads=2,
        num_layers=2, caption_projection_dim=16, joint_attention_dim=12, pooled_projection_dim=10,
        pos_embed_max_size=8, dual_attention_layers=(0,),
    )),
    "DiT": ("dit-s-2", dict(sample_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=7)),
    "SD 1.5": ("sd15-unet", dict(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=2, cross_attention_dim=12, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    )),
    "T5": ("t5-base", dict(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)),
}  # fmt: skip


def values(spec, seed):
    """An input: random numbers of its shape; tokens and labels below the smallest table."""
    if spec is None:
        return None
    rng = np.random.default_rng(seed)
    shape = (2, *spec.shape[1:])
    if jnp.issubdtype(spec.dtype, jnp.integer):
        return rng.integers(0, 7, shape).astype(spec.dtype)
    return rng.standard_normal(shape).astype(spec.dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_split_networks_compute_the_same(name):
    preset, fields = NETWORKS[name]
    module = models.build(preset, **fields)
    params = random_params(module)
    inputs = [values(spec, seed) for seed, spec in enumerate(module.example_inputs())]
    forward = jax.jit(lambda params, *inputs: jax.tree.leaves(module.apply({"params": params}, *inputs))[0])
    mesh = models.make_mesh(8, fsdp=2, tensor=2)
    split = jax.device_put(params, models.shardings(mesh, params))
    assert mesh_of(split) is mesh
    ours, whole = forward(split, *inputs), forward(params, *inputs)
    np.testing.assert_allclose(ours, whole, atol=1e-5 * np.abs(whole).max())
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(split))
    assert held < 0.4 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_step_of_flux_is_compiled_for_its_share_of_the_weights():
    """At the published size, from shapes alone: what a device is given is an eighth of the weights."""
    module = models.build("flux-dev", scan=True, dtype="bfloat16")
    mesh, shapes = models.make_mesh(8, tensor=8), models.shapes(module)
    where = models.shardings(mesh, shapes)
    params = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=w), shapes, where)
    x, *rest = module.example_inputs()
    inputs = (jax.ShapeDtypeStruct((1, 4, 4, x.shape[-1]), x.dtype), *rest)
    forward = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))
    compiled = forward.lower(params, *inputs).compile()
    given = compiled.memory_analysis().argument_size_in_bytes
    assert given < 1.02 * 2 * models.count_params("flux-dev") / 8
    assert re.search("all-reduce", compiled.as_text())


def test_arrays_of_one_device_are_on_no_mesh():
    mesh = models.make_mesh(8, tensor=8)
    assert mesh_of({"a": np.ones(8), "b": jnp.ones(8)}) is None
    assert mesh_of(jax.device_put(np.ones(8), NamedSharding(mesh, PartitionSpec()))) is None
    assert mesh_of(jax.device_put(np.ones(8), NamedSharding(mesh, PartitionSpec("tensor")))) is mesh


def test_meshes_and_rules_that_cannot_be():
    networks = {"dit": models.shapes(models.build("dit-s-8"))}
    for sizes, rules, words in (
        ((1, 1, 5), (), "tensor=5 divides no axis of any of the"),
        ((1, 5, 1), (), "fsdp=5 divides no axis"),
        ((8, 1, 1), (), "data=8 alone splits no weights"),
        ((1, 1, 2), [("blocks_0", PartitionSpec())], "matches 'blocks_0': .* such as .*/kernel"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            check_splits(mesh_of_sizes(sizes), networks, rules)
    with pytest.raises(InvalidArgumentError, match="must divide the 8 devices"):
        models.make_mesh(8, tensor=3)
    with pytest.raises(InvalidArgumentError, match="axes data, fsdp, tensor, got x"):
        a_mesh("mesh", Mesh(np.asarray(jax.devices()), ("x",)))
    for rules, words in (
        ("kernel", "must be pairs such as"),
        ([("kernel",)], "must be pairs such as"),
        ([("kernel", "tensor")], "PartitionSpec"),
        ([("(", PartitionSpec())], "is no pattern"),
        ([("a", PartitionSpec("model"))], "split over model; a mesh has the axes"),
        ([("a", PartitionSpec("fsdp", "fsdp"))], "each of them once"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            some_rules("rules", rules)


def test_every_pattern_matches():
    """The names in the rules exist."""
    trees = [traverse_util.flatten_dict(shapes_of(preset)) for preset in (*PRESETS, "flux-dev")]
    names = {"/".join(path) for tree in trees for path in tree}
    for pattern, _ in RULES:
        assert any(re.fullmatch(pattern, name) for name in names), pattern
