"""What the compiled sampling loop of the pipelines holds: one network call a step, and nothing of a call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from programs import equations, products

from jaxldm import diffusion as D
from jaxldm import models, pipelines, schedulers
from jaxldm.pipelines import latents, sampling_run

IMAGES, STEPS = 3, 5


@pytest.fixture(scope="module")
def loop():
    """(module, the program of `take_steps` under guidance, its arguments), abstract arrays everywhere."""
    module = models.build("dit-s-8", depth=1, hidden_size=16, num_heads=2, num_classes=4, sample_size=8)
    labels = np.arange(IMAGES, dtype=np.int32)
    scheduler = schedulers.from_config({"_class_name": "DPMSolverMultistepScheduler"})
    shape = (8, 8, 4)
    compiled = sampling_run.Compiled(
        scheduler.sampler,
        sampling_run.classifier_free_guidance,
        shape,
        4,
        jax.random.key_impl(jax.random.key(0)),
    )
    grid = D.make_grid(scheduler.path_for(64), STEPS)
    per_call = sampling_run.PerCall(grid, np.float32(4.0), np.float32(0.0))
    keys = np.asarray(jax.random.key_data(D.image_keys(jax.random.key(0), IMAGES)))
    per_image = sampling_run.PerImage(keys, {"labels": labels}, {"labels": np.full_like(labels, 4)})
    network = pipelines.Network(module, models.shapes(module))
    begin = functools.partial(latents._first_carry, compiled=compiled)
    carry = jax.eval_shape(begin, network, per_call, per_image)
    take = functools.partial(latents.take_steps, compiled=compiled)
    arguments = (network, per_call, per_image, carry, np.int32(0), np.int32(STEPS))
    return module, jax.make_jaxpr(take)(*arguments), (arguments, compiled)


def test_both_branches_of_guidance_are_one_call_of_the_network(loop):
    module, program, _ = loop
    rows = 2 * IMAGES
    x, t = jax.ShapeDtypeStruct((rows, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    call = jax.make_jaxpr(lambda params, *inputs: module.apply({"params": params}, *inputs))
    once = products(call(models.shapes(module), x, t, labels).jaxpr)
    assert len(once) > 5
    assert products(program.jaxpr) == once


def test_nothing_calls_the_host_and_nothing_of_a_call_is_a_constant(loop):
    """Grid, scales, keys and conditions are arguments: only tables of the module and path are compiled in."""
    _, program, _ = loop
    names = {equation.primitive.name for equation in equations(program.jaxpr)}
    assert "while" in names and not any("callback" in name for name in names)
    positions, frequencies, of_path = (1, 1, 16), (1, 128), (1000,)
    shapes = {np.shape(constant) for constant in program.consts if np.size(constant) > 1}
    assert shapes <= {positions, frequencies, of_path}


def test_the_latents_of_the_last_step_give_their_memory_to_the_next(loop):
    """State and previews alone: weights and conditions are used again."""
    _, _, ((network, per_call, per_image, carry, *bounds), compiled) = loop
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("images",))
    carry = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), carry)
    arguments = ((network, per_call), per_image, carry, *bounds)
    lowered = latents._take_steps.lower(*arguments, compiled=compiled, mesh=mesh)
    count = len(jax.tree.leaves(carry))
    text = lowered.as_text()
    assert count > 1 and text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == count
    assert "callback" not in text
    donated = [[leaf.donated for leaf in jax.tree.leaves(part)] for part in lowered.args_info[0]]
    assert [set(part) for part in donated] == [{False}, {False}, {True}, {False}, {False}]
