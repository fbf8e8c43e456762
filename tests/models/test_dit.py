import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.models.dit import DiTBlock

PUBLISHED = {  # Peebles & Xie 2023, table 1: depth, width, heads
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
}


def small(**overrides) -> models.DiT:
    fields = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 4,
    }
    return models.build("tiny-dit", **(fields | overrides))


def random_params(module, seed=0):
    """Normal numbers everywhere: the zero-initialised layers of a fresh DiT hide everything."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape).astype(s.dtype), models.shapes(module))


def published_names(theirs: dict[str, torch.Tensor], depth: int) -> dict[str, np.ndarray]:
    """The tensors of diffusers' port under the names of the original, which has each embedder once."""
    block_names = {
        "norm1.linear": "adaLN_modulation.1",
        "attn1.to_out.0": "attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    }
    embedder = "transformer_blocks.0.norm1.emb."
    names = {
        "pos_embed.proj": "x_embedder.proj",
        embedder + "timestep_embedder.linear_1": "t_embedder.mlp.0",
        embedder + "timestep_embedder.linear_2": "t_embedder.mlp.2",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    } | {
        f"transformer_blocks.{i}.{name}": f"blocks.{i}.{ours}"
        for i in range(depth)
        for name, ours in block_names.items()
    }
    ours = {
        f"{new}.{kind}": theirs[f"{old}.{kind}"] for old, new in names.items() for kind in ("weight", "bias")
    }
    ours["y_embedder.embedding_table.weight"] = theirs[embedder + "class_embedder.embedding_table.weight"]
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = [theirs[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] for part in "qkv"]
            ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return {name: tensor.numpy() for name, tensor in ours.items()}


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_agrees_with_diffusers(learn_sigma):
    module = small(learn_sigma=learn_sigma, freq_shift=1, depth=1 + learn_sigma)
    config = module.config
    theirs = randomised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes,
            norm_eps=config.norm_eps,
        )
    )
    state = theirs.state_dict()
    for name in [name for name in state if ".norm1.emb." in name]:  # the port keeps a copy in every block
        state[name].copy_(state["transformer_blocks.0" + name.removeprefix("transformer_blocks.")[1:]])
    params = checkpoints.from_state_dict(published_names(state, config.depth), models.shapes(module))
    x, t, labels = images(3, 8, 8, 3), np.array([0.0, 17.0, 980.0], np.float32), np.array([3, 10, 0])
    ours = jax.jit(module.apply)({"params": params}, x, t, labels)
    with torch.no_grad():
        expected = theirs(to_torch(x), torch.from_numpy(t), torch.from_numpy(labels)).sample
    assert_agrees(ours, expected)


def formula(size: str, patch: int) -> int:
    """Parameters of DiT for 4 latent channels, 1000 classes and a null class, learned variance, by hand."""
    depth, width, _ = PUBLISHED[size]
    linear = lambda inputs, outputs: inputs * outputs + outputs  # noqa: E731
    embedders = linear(4 * patch**2, width) + linear(256, width) + linear(width, width) + 1001 * width
    block = (
        linear(width, 3 * width)
        + linear(width, width)
        + linear(width, 4 * width)
        + linear(4 * width, width)
        + linear(width, 6 * width)
    )
    return embedders + depth * block + linear(width, 2 * width) + linear(width, patch**2 * 8)


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_presets_have_the_published_number_of_parameters(size, patch):
    count = models.count_params(f"dit-{size}-{patch}")
    assert count == formula(size, patch)
    rounded = {"s": 33, "b": 130, "l": 458, "xl": 675}[size]
    assert abs(count / 1e6 - rounded) < 1


def test_xl_2_has_as_many_parameters_as_the_torch_port():
    with torch.device("meta"):
        theirs = diffusers.DiTTransformer2DModel()
    embedders = sum(p.numel() for name, p in theirs.named_parameters() if ".norm1.emb." in name)
    total = sum(p.numel() for p in theirs.parameters())
    # diffusers' default has 4 output channels, the published model 8; and one embedder per block
    more_outputs = (1152 + 1) * 2 * 2 * 4
    assert models.count_params("dit-xl-2") == total - embedders * 27 // 28 + more_outputs


def test_a_fresh_model_answers_zero_and_its_blocks_are_the_identity():
    module = small()
    params = models.init(module, jax.random.key(0))
    x, t = images(2, 8, 8, 3), np.array([3.0, 500.0], np.float32)
    np.testing.assert_array_equal(jax.jit(module.apply)({"params": params}, x, t), np.zeros_like(x))

    final = params["final_layer"] | {"linear": random_params(module)["final_layer"]["linear"]}
    with_blocks = params | {"final_layer": final}
    without = {name: value for name, value in with_blocks.items() if not name.startswith("blocks_")}
    shallow = small(depth=0)
    expected = jax.jit(shallow.apply)({"params": without}, x, t)
    assert np.abs(expected).max() > 0.1
    ours = jax.jit(module.apply)({"params": with_blocks}, x, t)
    np.testing.assert_allclose(ours, expected, atol=1e-6 * np.abs(expected).max())


def test_jit_agrees_with_eager_on_latents_of_one_pixel_patches():
    module = small(sample_size=7, patch_size=1, in_channels=4, depth=1)
    params = random_params(module)
    x, t, labels = images(2, 7, 7, 4), np.array([1.0, 2.0], np.float32), np.array([0, 10])
    eager = module.apply({"params": params}, x, t, labels)
    assert eager.shape == (2, 7, 7, 4) and eager.dtype == jnp.float32
    compiled = jax.jit(module.apply)({"params": params}, x, t, labels)
    np.testing.assert_allclose(compiled, eager, atol=1e-5 * np.abs(eager).max())
    unlabelled, null = (module.apply({"params": params}, x, t, y) for y in (None, np.array([10, 10])))
    np.testing.assert_array_equal(unlabelled, null)


def test_attention_weights_are_there_for_whoever_asks():
    module = small(depth=2)
    variables = {"params": random_params(module)}
    x, t = images(2, 8, 8, 3), np.array([1.0, 2.0], np.float32)
    out, kept = module.apply(variables, x, t, mutable=["intermediates"])
    np.testing.assert_allclose(out, module.apply(variables, x, t), atol=1e-5 * np.abs(out).max())
    for block in ("blocks_0", "blocks_1"):
        (weights,) = kept["intermediates"][block]["attn"]["attention_weights"]
        assert weights.shape == (2, 4, 16, 16)
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)


def test_bfloat16_stays_near_float32():
    module = small()
    params = random_params(module)
    x, t = images(2, 8, 8, 3), np.array([1.0, 999.0], np.float32)
    exact, rounded = (jax.jit(m.apply)({"params": params}, x, t) for m in (module, small(dtype="bfloat16")))
    assert rounded.dtype == jnp.float32 and np.isfinite(rounded).all()
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


def test_a_scan_with_remat_has_the_same_tensors_and_answers(tmp_path):
    plain, scanned = small(), small(scan=True, remat=True)
    params = random_params(plain)
    checkpoints.save(tmp_path, plain, params)
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries | {"scan": True, "remat": True}))
    loaded, stacked = checkpoints.load(tmp_path)
    assert loaded == scanned and stacked["blocks_0to1"]["mlp"]["fc1"]["kernel"].shape == (2, 32, 128)
    x, t, labels = images(2, 8, 8, 3), np.array([1.0, 999.0], np.float32), np.array([3, 10])
    ours = jax.jit(scanned.apply)({"params": stacked}, x, t, labels)
    expected = jax.jit(plain.apply)({"params": params}, x, t, labels)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def test_dropout_draws_from_its_own_numbers_in_a_scan():
    module = small(scan=True, dropout=0.5)
    variables, x, t = {"params": random_params(module)}, images(2, 8, 8, 3), np.ones(2, np.float32)
    train = jax.jit(lambda key: module.apply(variables, x, t, train=True, rngs={"dropout": key}))
    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01 and np.isfinite(first).all()


def test_learned_positions_are_parameters_and_survive_the_folder(tmp_path):
    module = small(position_embedding="learned", num_classes=None)
    params = models.init(module, jax.random.key(0))
    assert params["pos_embed"].shape == (1, 16, 32) and "y_embedder" not in params
    checkpoints.save(tmp_path, module, params)
    loaded_module, loaded = checkpoints.load(tmp_path)
    assert loaded_module == module
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_fixed_positions_are_in_the_file_as_published_and_checked(tmp_path):
    module = small()
    checkpoints.save(tmp_path, module, models.init(module, jax.random.key(0)))
    import safetensors.numpy

    stored = safetensors.numpy.load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert stored["pos_embed"].shape == (1, 16, 32)
    assert checkpoints.load(tmp_path)[0] == module
    stored["pos_embed"] = stored["pos_embed"][:, 1:]
    safetensors.numpy.save_file(stored, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 15, 32\) in the file, \(1, 16, 32\)"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "overrides", [{"patch_size": 3}, {"num_heads": 5}, {"hidden_size": 34, "num_heads": 1}]
)
def test_impossible_configs_are_refused(overrides):
    with pytest.raises(InvalidArgumentError):
        small(**overrides)


def test_images_of_another_size_are_refused():
    module = small()
    with pytest.raises(AssertionError):
        jax.eval_shape(
            module.apply, {"params": models.shapes(module)}, images(1, 4, 4, 3), np.zeros(1, np.float32)
        )


def test_sides_of_as_many_tokens_have_the_positions_of_a_network_of_that_size():
    """For aspect-ratio buckets: the parameters do not depend on the size."""
    module, t = small(), np.full(2, 0.5, np.float32)
    params = jax.tree.map(lambda leaf: leaf + 0.1, models.init(module, jax.random.key(0)))
    wide = models.from_config(dataclasses.replace(module.config, sample_size=(4, 16)))
    x = images(2, 4, 16, 3)
    given = module.apply({"params": params}, x, t)
    np.testing.assert_array_equal(given, wide.apply({"params": params}, x, t))
    turned = module.apply({"params": params}, x.swapaxes(1, 2), t)
    assert np.abs(given - turned.swapaxes(1, 2)).max() > 1e-3


def test_config_survives_its_dictionary():
    config = dataclasses.replace(models.PRESETS["tiny-dit"], sample_size=(8, 12), dropout=0.5)
    assert models.config_from_dict(models.config_to_dict(config)) == config


def test_kept_tokens_go_through_the_route_as_if_there_were_no_others():
    """By hand from the block's own parameters; the others skip it. A tap sees what is on the way."""
    module = small(depth=3, route=(1, 2), tap=1)
    params = random_params(small(depth=3))
    x, t, labels = images(2, 8, 8, 3), np.float32([0.3, 700]), np.array([1, 2])
    kept = np.array([[0, 3, 9], [15, 2, 7]])

    @jax.jit
    def both(params, kept):
        _, seen = module.apply(
            {"params": params}, x, t, labels, kept=kept, capture_intermediates=True, mutable="intermediates"
        )
        seen = seen["intermediates"]
        before, after = seen["blocks_0"]["__call__"][0], seen["blocks_2"]["__call__"][0]
        c = seen["t_embedder"]["__call__"][0] + seen["y_embedder"]["__call__"][0]
        block = DiTBlock(module.config)
        h = jnp.take_along_axis(before, kept[..., None], 1)
        h = block.apply({"params": params["blocks_1"]}, h, c)
        h = before.at[jnp.arange(2)[:, None], kept].set(h)
        return after, block.apply({"params": params["blocks_2"]}, h, c), before, seen["tapped"][0]

    found, expected, before, tapped = both(params, kept)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(tapped, before)


def test_a_scanned_network_with_a_route_has_the_published_tensors():
    unrolled, scanned = small(depth=4), small(depth=4, scan=True, route=(1, 3))
    params = random_params(unrolled)
    same = checkpoints.from_state_dict(checkpoints.to_state_dict(params), models.shapes(scanned))
    names = [name for name in same if name.startswith("blocks")]
    assert names == ["blocks_0to0", "blocks_1to2", "blocks_3to3"]
    x, t, labels = images(2, 8, 8, 3), np.float32([0.3, 700]), np.array([1, 2])
    expected = jax.jit(unrolled.apply)({"params": params}, x, t, labels)
    apply = jax.jit(scanned.apply)
    every = np.tile(np.arange(16), (2, 1))
    for kept in (None, every):  # without routing, and with all tokens on the route
        found = apply({"params": same}, x, t, labels, kept=kept)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    few = apply({"params": same}, x, t, labels, kept=every[:, :5])
    assert few.shape == expected.shape and np.abs(few - expected).max() > 0.1


@pytest.mark.parametrize("fields", [{"route": (2, 2)}, {"route": (0, 5)}, {"route": (1,)}, {"tap": 5}])
def test_routes_and_taps_that_cannot_be(fields):
    with pytest.raises(InvalidArgumentError, match=next(iter(fields))):
        small(depth=4, **fields)


def test_kept_tokens_need_a_route():
    module = small()
    with pytest.raises(InvalidArgumentError, match="route="):
        module.apply({"params": {}}, images(1, 8, 8, 3), np.ones(1, np.float32), kept=np.zeros((1, 2), int))
