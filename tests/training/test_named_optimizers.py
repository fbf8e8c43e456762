"""Optimizers by name: which parameters they move how, and their first steps against what they are."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from toy import ToyBatches, loss_fn, toy_params

from jaxldm import models, training
from jaxldm.errors import InvalidArgumentError, UnknownNameError
from jaxldm.training.kinds import decay_mask, map_with_names, muon_axes, three_apart
from jaxldm.training.optimizer import OPTIMIZERS, optimizer
from jaxldm.training.state import create_train_state
from jaxldm.training.step import compile_train_step, make_train_step

NO_WARMUP = dict(total_steps=10**6, max_grad_norm=None)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_trains_and_leaves_the_owners_arrays_alone(name):
    rate = {"lion": 1e-2, "prodigy": 1.0, "schedule_free_adamw": 5e-2}.get(name, 3e-2)
    steps = 300 if name == "prodigy" else 60  # it begins with a rate of 1e-6
    adam = optimizer(rate, warmup_steps=3, total_steps=steps, weight_decay=1e-3, name=name)
    params = toy_params(16)
    state = create_train_state(jax.random.key(7), params, adam, ema=False)
    step = compile_train_step(make_train_step(loss_fn, adam), training.make_mesh(1))
    losses = []
    for number in range(steps):
        state, metrics = step(state, ToyBatches()[number])
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.6 * losses[0], losses
    chex.assert_trees_all_equal(params, toy_params(16))  # none was donated
    assert not np.isnan(jax.tree.leaves(state.evaluation_params)[0]).any()


def test_lion_is_the_sign():
    params = {"w": jnp.asarray([[1.0, -2.0, 3.0]]), "b": jnp.asarray([1.0])}
    gradients = {"w": jnp.asarray([[0.1, -5.0, 0.0]]), "b": jnp.asarray([-1e-4])}
    lion = optimizer(0.1, name="lion", weight_decay=0.5, **NO_WARMUP)
    updates, _ = lion.update(gradients, lion.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * (np.sign(gradients["w"]) + 0.5 * params["w"]), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [0.1], rtol=1e-6)  # which does not decay


def test_muon_orthogonalises_each_block_of_a_scan_each_of_qkv_and_convolutions():
    numbers = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(numbers.normal(size=shape), jnp.float32)  # noqa: E731
    gradients = {
        "blocks_0to2": {"fc1": {"kernel": normal(3, 8, 6), "bias": normal(3, 6)}},
        "blocks_3": {"attn": {"qkv": {"kernel": normal(8, 24)}}, "conv": {"kernel": normal(3, 3, 4, 6)}},
        "up_0": {"weight": normal(4, 6, 2, 2)},
        "conv_in": {"kernel": normal(3, 3, 4, 6)},
    }
    params = jax.tree.map(jnp.zeros_like, gradients)
    muon = optimizer(1.0, name="muon", **NO_WARMUP)
    updates, _ = jax.jit(muon.update)(gradients, muon.init(params), params)
    chex.assert_trees_all_equal_shapes(updates, params)
    qkv = updates["blocks_3"]["attn"]["qkv"]["kernel"]
    matrices = [
        *updates["blocks_0to2"]["fc1"]["kernel"],
        *(qkv[:, 8 * part : 8 * part + 8] for part in range(3)),
        updates["blocks_3"]["conv"]["kernel"].reshape(36, 6),
        updates["up_0"]["weight"].transpose(0, 2, 3, 1).reshape(16, 6),  # transposed: [in, out, h, w]
    ]
    for matrix in matrices:
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
        assert singular.min() > 0.4 and singular.max() < 1.4, singular  # Newton and Schulz, not exact
    for update, gradient in (  # AdamW's first step: a sign
        (updates["blocks_0to2"]["fc1"]["bias"], gradients["blocks_0to2"]["fc1"]["bias"]),
        (updates["conv_in"]["kernel"], gradients["conv_in"]["kernel"]),
    ):
        np.testing.assert_array_equal(np.sign(update), -np.sign(gradient))
        np.testing.assert_allclose(np.abs(update), np.abs(update).max(), rtol=1e-3)


# Of each network: the last names of what AdamW moves, besides biases and the scales of norms.
ADAMW = {
    "dit-xl-2": {
        "final_layer/adaLN_modulation_#/kernel",
        "final_layer/linear/kernel",
        "t_embedder/mlp_#/kernel",
        "x_embedder/proj/kernel",
        "y_embedder/embedding_table/embedding",
    },
    "tiny-dit": "dit-xl-2",
    "sd15-unet": {"conv_in/kernel", "conv_out/kernel", "time_embedding/linear_#/kernel"},
    "mini-unet": {
        "conv_in/kernel",
        "conv_out/kernel",
        "time_embedding/linear_#/kernel",
        "class_embedding/embedding",
    },
    "sdxl-unet": {
        "conv_in/kernel",
        "conv_out/kernel",
        "time_embedding/linear_#/kernel",
        "add_embedding/linear_#/kernel",
    },
    "sd3-medium": {
        "context_embedder/kernel",
        "norm_out/linear/kernel",
        "pos_embed/pos_embed",
        "pos_embed/proj/kernel",
        "proj_out/kernel",
        "time_text_embed/text_embedder/linear_#/kernel",
        "time_text_embed/timestep_embedder/linear_#/kernel",
    },
    "pixart-sigma": {
        "adaln_single/emb/timestep_embedder/linear_#/kernel",
        "adaln_single/linear/kernel",
        "caption_projection/linear_#/kernel",
        "pos_embed/proj/kernel",
        "proj_out/kernel",
        "scale_shift_table",
        "transformer_blocks_#to#/scale_shift_table",
    },
    "tiny-maskgit": {
        "cls_emb/embedding_table/embedding",
        "conv_in/kernel",
        "conv_out/kernel",
        "in_proj/kernel",
        "tok_emb/embedding",
    },
    "tiny-d2it": {
        "final_layer/adaLN_modulation_#/kernel",
        "final_layer/linear/kernel",
        "fine_embedder/kernel",
        "fine_final_layer/adaLN_modulation_#/kernel",
        "fine_final_layer/linear/kernel",
        "grain_embedding",
        "grain_head/kernel",
        "t_embedder/mlp_#/kernel",
        "x_embedder/proj/kernel",
        "y_embedder/embedding_table/embedding",
    },
    "z-image": {
        "all_final_layer/#-#/adaLN_modulation_#/kernel",
        "all_final_layer/#-#/linear/kernel",
        "all_x_embedder/#-#/kernel",
        "cap_embedder_#/kernel",
        "cap_pad_token",
        "t_embedder/mlp_#/kernel",
        "x_pad_token",
    },
    "sd-vae": {
        *(f"{half}/conv_{end}/kernel" for half in ("encoder", "decoder") for end in ("in", "out")),
        "post_quant_conv/kernel",
        "quant_conv/kernel",
    },
    "ldm-vq-f4": {
        *(f"{half}/conv_{end}/kernel" for half in ("encoder", "decoder") for end in ("in", "out")),
        "post_quant_conv/kernel",
        "quant_conv/kernel",
        "quantize/embedding/embedding",
    },
    "mini-autoencoder": {
        f"{half}/conv_{end}/kernel" for half in ("encoder", "decoder") for end in ("in", "out")
    },
    "flux-dev": {
        "context_embedder/kernel",
        "norm_out/linear/kernel",
        "proj_out/kernel",
        "time_text_embed/guidance_embedder/linear_#/kernel",
        "time_text_embed/text_embedder/linear_#/kernel",
        "time_text_embed/timestep_embedder/linear_#/kernel",
        "x_embedder/kernel",
    },
}


# So that the large ones are traced in less time.
SMALL = {
    "sdxl-unet": {"layers_per_block": 1, "transformer_layers_per_block": (1, 1, 1)},
    "z-image": {"n_layers": 2},
}


@pytest.mark.parametrize("preset", ADAMW)
def test_which_parameters_muon_moves(preset):
    """All kernels of blocks, and nothing else: their number is that of the kernels that are not AdamW's."""
    shapes = models.shapes(models.build(preset, **SMALL.get(preset, {})))
    apart = jax.eval_shape(functools.partial(map_with_names, three_apart), shapes)
    axes = traverse_util.flatten_dict(muon_axes(apart))
    expected = ADAMW[preset] if isinstance(ADAMW[preset], set) else ADAMW[ADAMW[preset]]
    found, kernels = set(), 0
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        name = re.sub(r"\d+", "#", "/".join(path))
        if path[-1] in ("bias", "scale"):
            assert axes[path] is None, name
        elif axes[path] is None:
            found.add(name)
        else:
            kernels += 1
            first = 1 if re.search(r"_\d+to\d+", "/".join(path)) else 0  # blocks, one by one
            inputs = tuple(range(first, leaf.ndim - 1))
            if path[-1] == "weight":  # of a transposed convolution [in, out, h, w]
                inputs = (0, 2, 3)
            assert axes[path].reduction_axis == inputs and len(axes[path].output_axis) == 1, name
    assert found == expected and kernels >= 4


def test_biases_of_a_scan_do_not_decay():
    shapes = models.shapes(models.build("dit-s-2"))
    mask = traverse_util.flatten_dict(decay_mask(shapes))
    assert {path[-1] for path, decays in mask.items() if decays} == {"kernel", "embedding"}
    params = {"blocks_0to1": {"fc1": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}}}
    for name in ("adamw", "lion", "schedule_free_adamw"):
        adam = optimizer(0.1, name=name, weight_decay=0.5, **NO_WARMUP)
        updates, _ = adam.update(jax.tree.map(jnp.zeros_like, params), adam.init(params), params)
        assert (np.asarray(updates["blocks_0to1"]["fc1"]["bias"]) == 0).all(), name
        assert (np.asarray(updates["blocks_0to1"]["fc1"]["kernel"]) < 0).all(), name


def test_schedule_free_adamw_is_the_recursion_and_is_drawn_with_its_average(tmp_path):
    """z, x and y of Defazio et al., Algorithm 1, in float64, with a warm-up: against `evaluation_params`."""
    rate, b1, b2, eps, steps = 0.05, 0.9, 0.99, 1e-8, 12
    target = np.array([1.0, -2.0, 0.5])
    loss = lambda params, state, batch, key: (jnp.sum((params["w"] - target) ** 4), {})  # noqa: E731
    adam = optimizer(rate, 4, steps, max_grad_norm=None, b1=b1, b2=b2, eps=eps, name="schedule_free_adamw")
    state = create_train_state(jax.random.key(0), {"w": jnp.zeros(3)}, adam, ema=False)
    batches = [{"x": np.zeros(1)}] * steps
    state = training.fit(
        state,
        make_train_step(loss, adam),
        batches,
        training.Plan(steps),
        tmp_path / "autoencoder",
        mesh=training.make_mesh(1),
        log=lambda line: None,
        bar=False,
    )
    x = z = y = np.zeros(3)
    nu, weights = np.zeros(3), 0.0
    for step in range(1, steps + 1):
        gradient = 4 * (y - target) ** 3
        nu = b2 * nu + (1 - b2) * gradient**2
        lr = rate * min(1.0, step / 4)
        z = z - lr * gradient / (np.sqrt(nu / (1 - b2**step)) + eps)
        weights += lr**2
        x = x + (lr**2 / weights) * (z - x)
        y = (1 - b1) * z + b1 * x
    np.testing.assert_allclose(state.params["w"], y, rtol=1e-4)
    np.testing.assert_allclose(state.evaluation_params["w"], x, rtol=1e-4)
    kept = training.read_kept(tmp_path, steps, "autoencoder").params
    np.testing.assert_allclose(kept["w"], state.evaluation_params["w"], rtol=1e-6)


def test_what_is_unknown_or_cannot_be_is_refused():
    with pytest.raises(UnknownNameError, match="adamw"):
        optimizer(1e-3, name="adam")
    with pytest.raises(UnknownNameError, match="muon"):
        training.DiffusionRecipe(optimizer="sgd")
    with pytest.raises(InvalidArgumentError, match="leave ema_decay out"):
        training.ClassifierRecipe(optimizer="schedule_free_adamw", ema_decay=0.9)
    with pytest.raises(InvalidArgumentError, match="b1 must be > 0"):
        optimizer(1e-3, name="schedule_free_adamw", b1=0.0)
