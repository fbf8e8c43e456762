"""Numbers that a network takes besides the time: a student with them begins as its teacher."""

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
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

BOTH = ("guidance_scale", "step_size")
TINY = {
    "mini-unet": {
        "sample_size": 4,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
        "norm_num_groups": 4,
        "num_classes": 3,
    },
    "tiny-dit": {
        "sample_size": 4,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
        "scan": True,
    },
}
TINY["sit-s-8"] = TINY["tiny-dit"]
X, T, LABELS = images(3, 4, 4, 4), np.array([0.1, 0.5, 0.9], np.float32), np.array([0, 2, 3])
SCALES, STEPS = np.array([1.0, 3.0, 7.5], np.float32), np.array([0.0, 0.2, 0.8], np.float32)
CONDITION = {"labels": LABELS, "guidance_scale": SCALES, "step_size": STEPS}


def tiny(preset, inputs=BOTH):
    return models.build(preset, **TINY[preset], scalar_inputs=inputs)


def random_params(module, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape).astype(s.dtype), models.shapes(module))


@pytest.mark.parametrize("preset", TINY)
def test_a_student_begins_as_its_teacher_and_learns_from_each_number(preset):
    teacher, student = tiny(preset, ()), tiny(preset)
    params = random_params(teacher)
    begun = models.init_from(student, jax.random.key(0), params)
    assert jax.tree.structure(begun) == jax.tree.structure(models.shapes(student))
    call = jax.jit(models.network(student))
    expected = jax.jit(models.network(teacher))(params, X, T, LABELS)
    np.testing.assert_array_equal(call(begun, X, T, CONDITION), expected)

    def loss(params):
        return jnp.sum((call(params, X, T, CONDITION) - X) ** 2)

    gradients = jax.grad(loss)(begun)
    kind = "embedding" if preset == "mini-unet" else "embedder"
    moved = jax.tree.map(lambda p, g: p - 0.01 * np.sign(g), begun, gradients)
    for name in BOTH:
        assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients[f"{name}_{kind}"]))
        other = CONDITION | {name: CONDITION[name] + 0.5}
        assert np.abs(call(moved, X, T, CONDITION) - call(moved, X, T, other)).max() > 1e-4


@pytest.mark.parametrize(("preset", "of_time"), [("mini-unet", "time_embedding"), ("tiny-dit", "t_embedder")])
def test_a_number_is_embedded_as_the_time_is(preset, of_time):
    module = tiny(preset, ("step_size",))
    params = random_params(module)
    params["step_size_" + ("embedding" if preset == "mini-unet" else "embedder")] = params[of_time]
    call = jax.jit(models.network(module))
    ours = call(params, X, T, {"labels": LABELS, "step_size": STEPS})
    turned = call(params, X, jnp.asarray(STEPS), {"labels": LABELS, "step_size": T})
    np.testing.assert_allclose(ours, turned, atol=1e-5 * np.abs(ours).max())


@pytest.mark.parametrize("preset", ["mini-unet", "tiny-dit"])
def test_folders_keep_the_inputs_and_published_folders_have_no_word_of_them(preset, tmp_path):
    module = tiny(preset)
    params = models.init(module, jax.random.key(0))
    checkpoints.save(tmp_path / "student", module, params)
    loaded, read = checkpoints.load(tmp_path / "student")
    assert loaded == module
    jax.tree.map(np.testing.assert_array_equal, read, params)
    key = {"mini-unet": "_scalar_inputs", "tiny-dit": "scalar_inputs"}[preset]
    entries = json.loads((tmp_path / "student" / "config.json").read_text())
    assert entries[key] == list(BOTH)
    plain = models.config_to_dict(dataclasses.replace(module.config, scalar_inputs=()))
    assert plain.keys() == entries.keys() - {key}
    with pytest.raises(CheckpointError, match=r"scalar input 'step'.*step_size"):
        models.config_from_dict(entries | {key: ["step"]})
    with pytest.raises(InvalidArgumentError, match="each input once"):
        tiny(preset, ("step_size", "step_size"))
    with pytest.raises(UnknownNameError, match="second_time"):
        tiny(preset, ("second_time",))


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (LABELS, "needs guidance_scale"),
        ({"labels": LABELS, "guidance_scale": SCALES, "step_size": STEPS}, "step_size given to a network"),
        (
            {"labels": LABELS, "guidance_scale": SCALES[:2]},
            r"guidance_scale must be \[B\], one for each of 3",
        ),
        (
            {"labels": LABELS, "guidance_scale": 3.0},
            r"guidance_scale must be an array of numbers \[B\]",
        ),
        ({"labels": LABELS, "guidance": SCALES}, "guidance"),
    ],
)
@pytest.mark.unchecked
@pytest.mark.parametrize("preset", TINY)
def test_conditions_that_do_not_fit(preset, condition, words):
    module = tiny(preset, ("guidance_scale",))
    with pytest.raises(InvalidArgumentError, match=words):
        jax.eval_shape(models.network(module), models.shapes(module), X, T, condition)


def test_a_network_of_another_kind_is_no_teacher():
    student = tiny("tiny-dit")
    wide, deep = (
        models.build("tiny-dit", **TINY["tiny-dit"] | more) for more in ({"hidden_size": 8}, {"depth": 3})
    )
    for other in (wide, deep):
        with pytest.raises(
            InvalidArgumentError, match=r"params do not fit this DiT: of .*further inputs alone"
        ):
            models.init_from(student, jax.random.key(0), models.shapes(other))
    whole = random_params(student)
    again = models.init_from(student, jax.random.key(0), whole)  # one that takes the numbers already
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    with pytest.raises(InvalidArgumentError, match="of guidance_scale_embedder/mlp_0/bias it has none"):
        models.init_from(tiny("tiny-dit", ()), jax.random.key(0), whole)


def test_the_guidance_embedding_of_lcm_begins_at_its_teacher_for_diffusers_too(tmp_path):
    """`time_cond_proj_dim` and `timestep_cond`, the published form."""
    fields = {
        "sample_size": 4,
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 6,
        "attention_head_dim": 2,
    }
    theirs = randomised(diffusers.UNet2DConditionModel(**fields, mid_block_type=None))
    theirs.save_pretrained(tmp_path / "teacher")
    teacher, params = checkpoints.load(tmp_path / "teacher")
    student = models.from_config(dataclasses.replace(teacher.config, time_cond_proj_dim=8))
    begun = models.init_from(student, jax.random.key(0), params)
    assert np.abs(begun["time_embedding"]["cond_proj"]["kernel"]).max() == 0
    text, scale = images(3, 5, 6), np.array(models.guidance_embedding(SCALES - 1, 8))
    condition = {"encoder_hidden_states": text, "timestep_cond": scale}
    call = jax.jit(models.network(student))
    with torch.no_grad():
        expected = theirs(to_torch(X), torch.from_numpy(T), torch.from_numpy(text)).sample
    assert_agrees(call(begun, X, T, condition), expected)

    begun["time_embedding"]["cond_proj"]["kernel"] += 0.3 * images(8, 8)
    checkpoints.save(tmp_path / "student", student, begun)
    opened = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "student", low_cpu_mem_usage=False)
    given = (torch.from_numpy(each) for each in (T, text))
    with torch.no_grad():
        moved = opened.eval()(to_torch(X), *given, timestep_cond=torch.from_numpy(scale)).sample
    ours = call(begun, X, T, condition)
    assert_agrees(ours, moved)
    assert np.abs(ours - expected.numpy().transpose(0, 2, 3, 1)).max() > 1e-2
