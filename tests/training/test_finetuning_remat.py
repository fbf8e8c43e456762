"""Fine-tuning with the blocks computed again in the backward pass: the same gradients, in less memory."""

import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetuned import tuned, write_pictures
from tiny_models import TEXT_UNET, latent_pipeline, pixel_pipeline, random_params, text_parts

from jaxldm import models, pipelines, training
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.families import STABLE_DIFFUSION
from jaxldm.training.conditions import Condition, label_condition
from jaxldm.training.finetuning import denoising, make_loss, tuned_of


def loss_of(pipe, on, **changes):
    """(loss of a LoRA of all layers and a batch, that LoRA)."""
    lora = training.LoraRecipe(rank=2, targets=("*",))
    recipe = training.FinetuneRecipe(source="nowhere", lora=lora, sample_latents=False, **changes)
    own = tuned_of(recipe, pipe)
    loss = make_loss(recipe, pipe.prediction, denoising(pipe, recipe), own, on)
    state = types.SimpleNamespace(frozen=own.frozen)
    begun = jax.tree.map(lambda leaf: leaf + 0.01, own.init(jax.random.key(0)))  # B is 0 at first
    return lambda lora, batch: loss(lora, state, batch, jax.random.key(1))[0], begun


def test_gradients_are_the_same_in_less_memory():
    """Of a transformer whose blocks are a scan: from others XLA's compiler for CPUs removes it again."""
    pipe = pixel_pipeline(depth=6, hidden_size=32, num_heads=2, scan=True)
    images = jax.random.normal(jax.random.key(2), (16, 8, 8, 1))
    batch = {"mean": images, "label": jnp.zeros(16, jnp.int32)}
    memory, gradients = [], []
    for remat in (False, True):
        loss, lora = loss_of(pipe, label_condition(pipe.num_classes), remat=remat)
        program = jax.jit(jax.grad(loss)).lower(lora, batch).compile()
        memory.append(program.memory_analysis().temp_size_in_bytes)
        gradients.append(program(lora, batch))
    assert memory[1] < 0.5 * memory[0], memory
    chex.assert_trees_all_close(*gradients, atol=1e-6, rtol=1e-4)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients[0])) > 1e-3


def blocks_computed_again(loss, *inputs):
    """How many calls in the gradient are of `jax.checkpoint`."""
    return str(jax.make_jaxpr(jax.grad(loss))(*inputs)).count("remat")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A Stable Diffusion of random weights."""
    parts = text_parts(tmp_path_factory.mktemp("model") / "tokenizer")
    unet = models.from_config(
        models.UNet2DConditionConfig(**TEXT_UNET | {"mid_block_type": "UNetMidBlock2DCrossAttn"})
    )
    parts["unet"] = pipelines.Network(unet, random_params(unet))
    return pipelines.Pipeline(STABLE_DIFFUSION, parts)


def test_the_blocks_of_a_u_net_are_computed_again(pipe):
    states = "encoder_hidden_states"
    batch = {"mean": jnp.zeros((2, 8, 8, 4)), states: jnp.zeros((2, 7, 8))}
    counts = []
    for remat in (False, True):
        loss, lora = loss_of(pipe, Condition({states: np.zeros((7, 8), np.float32)}), remat=remat)
        counts.append(blocks_computed_again(loss, lora, batch))
    assert counts[0] == 0 and counts[1] >= 6, counts


@pytest.mark.parametrize(
    "preset", ["sd15-unet", "sdxl-unet", "sd3-medium", "flux-dev", "pixart-sigma", "tiny-dit", "sit-s-8"]
)
def test_the_networks_of_every_family_have_it(preset):
    recipe = training.FinetuneRecipe(source="nowhere", remat=True, dtype="bfloat16")
    config = recipe.computing(models.PRESETS[preset])
    assert config == dataclasses.replace(models.PRESETS[preset], remat=True, dtype="bfloat16")
    kept = dataclasses.replace(recipe, remat=False, dtype="float32").computing(config)
    assert kept == dataclasses.replace(config, dtype="float32")  # a model that has it keeps it


def test_a_network_without_it_is_refused_before_anything_is_written(tmp_path):
    recipe = training.FinetuneRecipe(source="nowhere", remat=True)
    with pytest.raises(InvalidArgumentError, match="a DiT with routers has no remat: leave it out"):
        recipe.computing(models.PRESETS["tiny-dydit"])
    pipelines.save(latent_pipeline(), tmp_path / "model")
    pictures = write_pictures(tmp_path / "pictures", size=8)
    with pytest.raises(InvalidArgumentError, match="a UNet2DModel has no remat: leave it out"):
        tuned(tmp_path / "model", pictures, tmp_path / "run", "full", remat=True)
    assert not (tmp_path / "run").exists()


def test_a_controlnet_is_computed_with_it_too(pipe, monkeypatch):
    """Both networks, the controlled one and the one that controls."""
    seen = []
    monkeypatch.setattr(
        models, "controlled_network", lambda unet, params, control: seen.extend((unet, control))
    )
    own = training.FinetuneRecipe(source="nowhere", control=training.ControlRecipe(), remat=True)
    with pytest.raises(TypeError):  # nothing to call
        tuned_of(own, pipe).call({"network": {}, "control": {}}, None, None, None)
    assert [module.config.remat for module in seen] == [True, True]
