"""ControlNets against diffusers: alone, and as what they add to a U-Net."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm import diffusion as D
from jaxldm.checkpoints.names import published
from jaxldm.diffusion import caching
from jaxldm.errors import CheckpointError, InvalidArgumentError

COMMON = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}
SMALL = {"conditioning_embedding_out_channels": (2, 4)}  # pictures of twice the side of the latents
KINDS = {
    "SD 1.5": ({"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}, {}),
    "SDXL": (
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 10 + 6 * 4,
        },
        {"mid_block_type": "UNetMidBlock2D", "controlnet_conditioning_channel_order": "bgr"},
    ),
}
UP = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}


def inputs_of(kind, seed=0):
    """What both networks take, an odd size of the latents among it."""
    inputs = {
        "x": images(2, 6, 4, 4, seed=seed),
        "t": np.array([17.0, 980.0], np.float32),
        "encoder_hidden_states": images(2, 5, 6, seed=seed + 1),
    }
    if kind == "SDXL":
        ids = np.array([[1024, 768, 0, 16, 512, 640], [300, 400, 8, 8, 6, 1]], np.float32)
        inputs |= {"text_embeds": images(2, 10, seed=seed + 2), "time_ids": ids}
    return inputs


def as_theirs(inputs):
    inputs = {name: torch.from_numpy(value) for name, value in inputs.items()}
    added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
    x, t = to_torch(inputs.pop("x")), inputs.pop("t")
    return (x, t), inputs | {"added_cond_kwargs": added or None}


PICTURE = np.random.default_rng(5).random((2, 12, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module", params=KINDS)
def trio(request, tmp_path_factory):
    """(kind, their ControlNet and U-Net, our ControlNet and U-Net through the folders that they wrote)."""
    own, of_control = KINDS[request.param]
    up = tuple(UP[kind] for kind in reversed(own["down_block_types"]))
    theirs = (
        randomised(diffusers.ControlNetModel(**COMMON, **own, **SMALL, **of_control), 1),
        randomised(diffusers.UNet2DConditionModel(**COMMON, **own, up_block_types=up), 2),
    )
    folders = [tmp_path_factory.mktemp(name) for name in ("controlnet", "unet")]
    for model, folder in zip(theirs, folders, strict=True):
        model.save_pretrained(folder)
    return request.param, theirs, [checkpoints.load(folder) for folder in folders]


def test_residuals_agree_with_diffusers(trio, tmp_path, caplog, recwarn):
    kind, (theirs, _), ((module, params), _) = trio
    inputs = inputs_of(kind)
    given = jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs))(
        params, inputs | {"control_image": PICTURE}
    )
    places, named = as_theirs(inputs)
    with torch.no_grad():
        down, mid = theirs(*places, **named, controlnet_cond=to_torch(PICTURE), return_dict=False)
    assert len(given["down_block_additional_residuals"]) == len(down) == module.config.num_residuals - 1
    for ours, other in zip(given["down_block_additional_residuals"], down, strict=True):
        assert_agrees(ours, other)
    assert_agrees(given["mid_block_additional_residual"], mid)
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    with torch.no_grad():
        again = opened(*places, **named, controlnet_cond=to_torch(PICTURE), return_dict=False)[1]
    np.testing.assert_array_equal(again, mid)


def test_a_unet_takes_them_and_those_of_an_adapter(trio):
    """Adapters change a level before its change of size where it has transformers, else behind it."""
    kind, (_, theirs), (_, (module, params)) = trio
    inputs, sizes = inputs_of(kind, 3), [(6, 4, 4), (6, 4, 4), (3, 2, 4), (3, 2, 8)]
    skips = tuple(images(2, *size, seed=i) for i, size in enumerate(sizes))
    mid = images(2, 3, 2, 8, seed=9)
    first = (6, 4, 4) if kind == "SD 1.5" else (3, 2, 4)
    levels = tuple(images(2, *size, seed=20 + i) for i, size in enumerate((first, (3, 2, 8), (3, 2, 8))))
    ours = {
        "down_block_additional_residuals": skips,
        "mid_block_additional_residual": mid,
        "down_intrablock_additional_residuals": levels,
    }
    apply = jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs))
    places, named = as_theirs(inputs)
    with torch.no_grad():
        output = theirs(
            *places,
            **named,
            down_block_additional_residuals=tuple(map(to_torch, skips)),
            mid_block_additional_residual=to_torch(mid),
            down_intrablock_additional_residuals=list(map(to_torch, levels)),
        ).sample
    assert_agrees(apply(params, inputs | ours), output)
    more = {name: value for name, value in inputs.items() if name not in ("x", "t")} | ours
    x, t = inputs["x"], inputs["t"]
    # Cut within the outermost level, or behind its last layer.
    for cache in [caching.deepcache(2, skips=2)] + [caching.deepcache(2)] * (kind == "SD 1.5"):
        call = functools.partial(models.caching_network(module, params), cache, None, 0)
        assert_agrees(jax.jit(call)(x, t, more)[0], output)


def test_residuals_of_another_network_are_refused(trio):
    kind, _, (_, (module, _)) = trio
    wrong = {"mid_block_additional_residual": np.zeros((2, 3, 2, 4), np.float32)}
    with pytest.raises(InvalidArgumentError, match="gives residuals"):
        jax.eval_shape(module.apply, {"params": models.shapes(module)}, **inputs_of(kind), **wrong)


def test_pooled_over_the_image():
    """The shuffle ControlNet gives one number for each channel."""
    config = models.ControlNetConfig(**COMMON, **KINDS["SD 1.5"][0], **SMALL, global_pool_conditions=True)
    module = models.ControlNetModel(config)
    given = jax.eval_shape(
        module.apply, {"params": models.shapes(module)}, **inputs_of("SD 1.5"), control_image=PICTURE
    )
    assert given["mid_block_additional_residual"].shape == (2, 1, 1, 8)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"control_image": PICTURE[:, :10]}, "control_image must be 12x8 pixels"),
        ({"control_image": PICTURE[..., :1]}, "control_image is 1 wide; this ControlNet takes 3"),
        ({"encoder_hidden_states": np.zeros((2, 5, 7), np.float32)}, "is 7 wide; this ControlNet takes 6"),
        ({"text_embeds": np.zeros((2, 5), np.float32)}, "text_embeds given to"),
    ],
)
def test_wrong_inputs_are_refused(wrong, words):
    module = models.ControlNetModel(models.ControlNetConfig(**COMMON, **KINDS["SD 1.5"][0], **SMALL))
    inputs = inputs_of("SD 1.5") | {"control_image": PICTURE} | wrong
    with pytest.raises(InvalidArgumentError, match=words):
        jax.eval_shape(module.apply, {"params": models.shapes(module)}, **inputs)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        models.config_from_dict({"_class_name": "ControlNetModel", "num_attention_heads": 3})


@pytest.mark.parametrize(
    ("preset", "published"),
    [("sd15-controlnet", 361_279_120), ("sd2-controlnet", 364_228_240), ("sdxl-controlnet", 1_251_014_160)],
)
def test_presets_have_as_many_parameters_as_the_published_models(preset, published):
    assert models.count_params(preset) == published


def test_an_untrained_one_adds_nothing():
    module = models.ControlNetModel(models.ControlNetConfig(**COMMON, **KINDS["SD 1.5"][0], **SMALL))
    params = models.init(module, jax.random.key(0))
    inputs = inputs_of("SD 1.5") | {"control_image": PICTURE}
    given = jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs))(params, inputs)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(given))


def small_unet():
    """A U-Net whose output depends on its skips: fresh last layers would be too even."""
    own = KINDS["SD 1.5"][0]
    up = tuple(UP[kind] for kind in reversed(own["down_block_types"]))
    config = models.UNet2DConditionConfig(**COMMON, **own, up_block_types=up, in_channels=2, out_channels=2)
    unet = models.UNet2DConditionModel(config)
    return unet, models.init(unet, jax.random.key(0))


def test_one_begins_as_the_unet_that_it_is_for():
    """As diffusers begins one, and with zeros to add: nothing changes yet."""
    unet, params = small_unet()
    control, own = models.controlnet_from_unet(unet, params, jax.random.key(1), **SMALL)
    theirs = diffusers.ControlNetModel.from_unet(
        diffusers.UNet2DConditionModel(
            **COMMON,
            in_channels=2,
            out_channels=2,
            down_block_types=unet.config.down_block_types,
            up_block_types=unet.config.up_block_types,
        ),
        conditioning_embedding_out_channels=(2, 4),
    )
    assert set(published(own)) == set(theirs.state_dict())
    same = jax.tree.map(np.array_equal, own["mid_block"], params["mid_block"])
    assert all(jax.tree.leaves(same))
    x, t = jnp.asarray(images(2, 6, 4, 2)), jnp.array([17.0, 980.0])
    text = {"encoder_hidden_states": jnp.asarray(images(2, 5, 6))}
    call = jax.jit(models.controlled_network(unet, params, control))
    output = call(own, x, t, text | {"control_image": PICTURE})
    plain = jax.jit(models.network(unet))(params, x, t, text)
    np.testing.assert_allclose(output, plain, atol=1e-6 * np.abs(plain).max())
    with pytest.raises(InvalidArgumentError, match="lacks control_image"):
        models.controlled_network(unet, params, control)(own, x, t, text)


def test_one_learns_what_the_picture_shows():
    """Images that are their picture, which the U-Net alone cannot know; its parameters stay."""
    unet, params = small_unet()
    control, own = models.controlnet_from_unet(unet, params, jax.random.key(1), **SMALL)
    network = models.controlled_network(unet, params, control)
    rng = np.random.default_rng(0)
    pictures = np.repeat(np.repeat(rng.integers(0, 2, (8, 4, 4, 1)), 2, 1), 2, 2).astype(np.float32)
    x_0 = jnp.asarray(np.tile(2 * pictures[:, ::2, ::2] - 1, 2))
    condition = {
        "encoder_hidden_states": jnp.zeros((8, 3, 6)),
        "control_image": jnp.asarray(np.tile(pictures, 3)),
    }
    prediction, optimizer = D.x0(D.VP.named("linear")), optax.adam(1e-2)

    def loss(own, key):
        return D.diffusion_loss(key, functools.partial(network, own), prediction, x_0, condition)[0]

    @jax.jit
    def update(state, key):
        own, moments = state
        value, gradient = jax.value_and_grad(loss)(own, key)
        change, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(own, change), moments), value

    state, values = (own, optimizer.init(own)), []
    with jax.numpy_dtype_promotion("standard"):  # of the optimizer
        for step in range(60):
            state, value = update(state, jax.random.key(step))
            values.append(float(value))
    assert np.mean(values[-10:]) < 0.6 * np.mean(values[:5])
