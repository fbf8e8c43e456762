"""Wuerstchen's three networks against those of diffusers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated import wuerstchen as reference
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised, to_torch
from transformers_reference import perturbed

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.nn.pixel_shuffle import pixel_shuffle, pixel_unshuffle
from jaxldm.nn.resizing import cubic_weights

CONFIGS = {
    "prior": ("WuerstchenPrior", {"c_in": 3, "c": 16, "c_cond": 10, "c_r": 7, "depth": 2, "nhead": 2}),
    "decoder": (
        "WuerstchenDiffNeXt",
        {
            "c_in": 3,
            "c_out": 3,
            "c_r": 6,
            "c_cond": 12,
            "c_hidden": [8, 12, 16],
            "nhead": [-1, 2, 4],
            "blocks": [1, 2, 1],
            "level_config": ["CT", "CTA", "CTA"],
            "inject_effnet": [False, True, True],
            "effnet_embd": 5,
            "clip_embd": 10,
            "dropout": [0.0, 0.1, 0.2],
        },
    ),
    "decoder of one level": (
        "WuerstchenDiffNeXt",
        {
            "c_r": 4,
            "patch_size": 1,
            "c_cond": 8,
            "c_hidden": [8],
            "nhead": [-1],
            "blocks": [2],
            "level_config": ["CT"],
            "inject_effnet": [True],
            "effnet_embd": 5,
            "clip_embd": 10,
            "kernel_size": 5,
        },
    ),
    "stage A": (
        "PaellaVQModel",
        {"embed_dim": 16, "bottleneck_blocks": 2, "num_vq_embeddings": 24, "latent_channels": 5},
    ),
    "stage A of three levels": (
        "PaellaVQModel",
        {
            "in_channels": 2,
            "out_channels": 1,
            "up_down_scale_factor": 1,
            "levels": 3,
            "embed_dim": 16,
            "bottleneck_blocks": 1,
            "num_vq_embeddings": 16,
        },
    ),
}
# Of few frequencies: 10000 t leaves float32 three decimals, and two libraries other ones for the fast sines.
TIMES = np.array([1.0, 0.5, 0.03125], np.float32)


def random_reference(kind, fields):
    torch.manual_seed(0)
    theirs = randomised(getattr(reference, kind)(**fields))
    rng = torch.Generator().manual_seed(5)
    if (
        kind == "WuerstchenPrior"
    ):  # b away from 1: the result of dividing by |1 - b| cannot be compared near 1
        theirs.out[1].bias.data[fields["c_in"] :] -= 2
    if kind == "PaellaVQModel":
        norm = theirs.down_blocks[-1][1]
        torch.nn.init.normal_(norm.running_mean, generator=rng)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0, generator=rng)
        torch.nn.init.normal_(theirs.vquantizer.embedding.weight, generator=rng)
    return theirs


def inputs_of(config, batch=3, size=(1, 2), seed=0):
    """What the network is called with: sizes of its own kind, odd where they may be."""
    if isinstance(config, models.PaellaVQModelConfig):
        sides = (config.shrinks * side for side in size)
        return (images(batch, *sides, config.in_channels, seed=seed),)
    t = TIMES[:batch]
    if isinstance(config, models.WuerstchenPriorConfig):
        return images(batch, 3, 5, config.c_in, seed=seed), t, images(batch, 6, config.c_cond, seed=seed + 1)
    sides = (config.shrinks * side for side in size)
    x = images(batch, *sides, config.c_in, seed=seed)
    return x, t, images(batch, 3, 7, config.effnet_embd, seed=2), images(batch, 6, config.clip_embd, seed=3)


def output_of(theirs, inputs):
    x, *more = (torch.from_numpy(array) if array.ndim < 4 else to_torch(array) for array in inputs)
    with torch.no_grad():
        if isinstance(theirs, reference.PaellaVQModel):
            return theirs.decode(theirs.encode(x).latents, force_not_quantize=False).sample
        return theirs(x, *more)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same random network in diffusers and here, through a folder that diffusers wrote."""
    theirs = random_reference(*CONFIGS[request.param])
    folder = tmp_path_factory.mktemp("wuerstchen")
    theirs.save_pretrained(folder)
    module, params = checkpoints.load(folder)
    return theirs, module, params, jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))


def test_agrees_with_diffusers(pair):
    theirs, module, params, apply = pair
    inputs = inputs_of(module.config)
    assert_agrees(apply(params, *inputs), output_of(theirs, inputs))


def test_diffusers_opens_what_we_changed_and_saved(pair, tmp_path, caplog, recwarn):
    theirs, module, params, apply = pair
    changed = perturbed(params)
    checkpoints.save(tmp_path, module, changed)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    inputs = inputs_of(module.config)
    ours = apply(changed, *inputs)
    assert_agrees(ours, output_of(opened, inputs))
    assert np.abs(np.asarray(ours) - np.asarray(apply(params, *inputs))).max() > 1e-3 * np.abs(ours).max()
    module_again, params_again = checkpoints.load(tmp_path)
    assert module_again == module
    jax.tree.map(np.testing.assert_array_equal, params_again, changed)


@pytest.mark.parametrize("pair", ["prior"], indirect=True)
def test_one_image(pair):
    theirs, module, params, apply = pair
    inputs = inputs_of(module.config, 1, (3, 1), seed=8)
    assert_agrees(apply(params, *inputs), output_of(theirs, inputs))


@pytest.mark.parametrize("pair", ["stage A"], indirect=True)
def test_stage_a_decodes_what_it_is_given_and_scales_for_diffusion(pair):
    """Without the codebook, as in the pipelines of diffusers; `encode_latents` takes [-1, 1]."""
    theirs, module, params, _ = pair
    x = np.tanh(images(2, 8, 4, 3))
    with torch.no_grad():
        latents = theirs.encode(to_torch(x / 2 + 0.5)).latents
        pixels = theirs.decode(latents).sample

    @jax.jit
    def there_and_back(params, x):
        drawn = models.encode_latents(module, params, x)
        return drawn, models.decode_latents(module, params, drawn)

    drawn, back = there_and_back(params, x)
    assert_agrees(drawn * module.config.scale_factor, latents)
    assert_agrees(back / 2 + 0.5, pixels)


@pytest.mark.parametrize("pair", ["prior", "decoder of one level", "stage A"], indirect=True)
def test_bfloat16_stays_near_float32(pair):
    theirs, module, params, apply = pair
    low = models.from_config(dataclasses.replace(module.config, dtype="bfloat16"))
    inputs = inputs_of(module.config)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jax.device_get(params))
    rounded = jax.jit(low.apply)({"params": half}, *inputs)
    exact = apply(params, *inputs)
    assert rounded.dtype == exact.dtype == jnp.float32 and np.isfinite(rounded).all()
    if not isinstance(theirs, reference.PaellaVQModel):  # where another entry of the codebook may be nearest
        assert 0 < np.abs(rounded - exact).max() < 0.2 * np.abs(exact).max()


@pytest.mark.parametrize("pair", ["prior"], indirect=True)
def test_dropout_is_drawn_in_training_alone(pair):
    _, module, params, apply = pair
    inputs = inputs_of(module.config)

    def call(seed):
        return module.apply({"params": params}, *inputs, train=True, rngs={"dropout": jax.random.key(seed)})

    first, second = (jax.jit(call)(seed) for seed in (0, 1))
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-3
    assert np.abs(np.asarray(first) - np.asarray(apply(params, *inputs))).max() > 1e-3


# Parameters of the published folders; 1 B for stage C in the paper.
PUBLISHED = {
    "wuerstchen-prior": 993_636_896,
    "wuerstchen-decoder": 1_055_365_280,
    "wuerstchen-vqgan": 18_406_894,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_tensors(preset, monkeypatch):
    module = models.build(preset)
    shapes = models.shapes(module)
    if preset == "wuerstchen-decoder":  # it starts all its blocks again for each of its modules
        monkeypatch.setattr(reference.WuerstchenDiffNeXt, "_init_weights", lambda self, part: None)
    with torch.device("meta"):
        kind = getattr(reference, models.class_name(module.config))
        theirs = kind.from_config(models.config_to_dict(module.config))
    monkeypatch.setattr(models.registry, "shapes", lambda _: shapes)  # once is enough
    tensors = {name: tensor.shape for name, tensor in checkpoints.names.published(shapes).items()}
    if preset == "wuerstchen-vqgan":
        tensors |= {name: tensor.shape for name, tensor in module.constant_tensors().items()}
    assert tensors == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert models.count_params(module) == PUBLISHED[preset] == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(("name", "blocks"), [("prior", 2 * 2), ("decoder of one level", 2 * 2)])
def test_remat_recomputes_all_but_the_timesteps(name, blocks):
    kind, fields = CONFIGS[name]
    plain = models.from_config(models.config_from_dict({"_class_name": kind, **fields}))
    module = models.from_config(dataclasses.replace(plain.config, remat=True))
    shapes = models.shapes(module)
    assert models.shapes(plain) == shapes
    traced = jax.make_jaxpr(module.apply)({"params": shapes}, *module.example_inputs())
    assert sum(equation.primitive.name == "remat2" for equation in traced.eqns) == blocks


def test_published_config_files_are_the_presets():
    prior = {"c": 1536, "c_cond": 1280, "c_in": 16, "c_r": 64, "depth": 32, "dropout": 0.1, "nhead": 24}
    files = {
        "wuerstchen-prior": {"_class_name": "WuerstchenPrior", "_diffusers_version": "0.21.0.dev0", **prior},
        "wuerstchen-decoder": {
            "_class_name": "WuerstchenDiffNeXt",
            "_diffusers_version": "0.21.0.dev0",
            "blocks": [4, 4, 14, 4],
            "c_cond": 1024,
            "c_hidden": [320, 640, 1280, 1280],
            "c_in": 4,
            "c_out": 4,
            "c_r": 64,
            "clip_embd": 1024,
            "dropout": 0.1,
            "effnet_embd": 16,
            "inject_effnet": [False, True, True, True],
            "kernel_size": 3,
            "level_config": ["CT", "CTA", "CTA", "CTA"],
            "nhead": [-1, 10, 20, 20],
            "patch_size": 2,
        },
        "wuerstchen-vqgan": {
            "_class_name": "PaellaVQModel",
            "bottleneck_blocks": 12,
            "embed_dim": 384,
            "in_channels": 3,
            "latent_channels": 4,
            "levels": 2,
            "num_vq_embeddings": 8192,
            "out_channels": 3,
            "scale_factor": 0.3764,
            "up_down_scale_factor": 2,
        },
    }
    for preset, entries in files.items():
        assert models.config_from_dict(entries) == models.PRESETS[preset]
    with pytest.raises(CheckpointError, match="unknown key 'latent_size'"):
        models.config_from_dict(files["wuerstchen-prior"] | {"latent_size": [12, 12]})
    with pytest.raises(CheckpointError, match="2 levels, but 4 nhead"):
        models.config_from_dict(files["wuerstchen-decoder"] | {"c_hidden": [320, 640]})


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("wuerstchen-prior", {"nhead": 7}, "cannot be split into 7 heads"),
        ("wuerstchen-prior", {"depth": 0}, "depth"),
        ("wuerstchen-prior", {"c_r": 2}, "c_r"),
        ("wuerstchen-decoder", {"dropout": (0.1,)}, "1 dropout"),
        ("wuerstchen-decoder", {"level_config": ("CT", "CTA", "TCA", "CTA")}, "'TCA'"),
        ("wuerstchen-decoder", {"nhead": (-1, 10, 20, -1)}, "into -1 heads"),
        ("wuerstchen-decoder", {"blocks": (4, 0, 14, 4)}, "blocks"),
        ("wuerstchen-decoder", {"c_out": 5}, "c_out 5"),
        ("wuerstchen-decoder", {"kernel_size": 4}, "odd"),
        ("wuerstchen-decoder", {"c_r": 3}, "c_r"),
        ("wuerstchen-vqgan", {"levels": 0}, "levels"),
        ("wuerstchen-vqgan", {"embed_dim": 15}, "embed_dim 15"),
    ],
)
def test_impossible_configs_are_refused(preset, changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        dataclasses.replace(models.PRESETS[preset], **changes)


@pytest.mark.parametrize(
    ("name", "number", "array", "message"),
    [
        ("prior", 0, images(3, 3, 5, 4), "channels .* takes 3"),
        ("prior", 2, images(3, 6, 11), "text states .* takes 10"),
        ("decoder", 0, images(3, 8, 12, 3), "8x12 .* multiples of 8"),
        ("decoder", 0, images(3, 8, 16, 4), "latents .* takes 3"),
        ("decoder", 2, images(3, 2, 2, 16), "image embeddings .* takes 5"),
        ("decoder", 3, images(3, 6, 12), "text states .* takes 10"),
        ("decoder", 3, None, "give encoder_hidden_states"),
        ("stage A", 0, images(1, 4, 6, 3), "4x6.* multiples of 4"),
        ("stage A", 0, images(1, 4, 4, 1), "images .* takes 3"),
    ],
)
def test_inputs_that_do_not_fit_are_named(name, number, array, message):
    kind, fields = CONFIGS[name]
    module = models.from_config(models.config_from_dict({"_class_name": kind, **fields}))
    inputs = list(inputs_of(module.config))
    inputs[number] = array
    with pytest.raises(InvalidArgumentError, match=message):
        jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))


@pytest.mark.parametrize("lengths", [(3, 3), (7, 16), (2, 5), (24, 9), (5, 1), (1, 4), (13, 12), (24, 128)])
def test_cubic_weights_are_those_of_pytorch(lengths):
    """A column of the weights is what an image with one bright row becomes. Not of one column: of such
    images PyTorch 2.13 on a CPU repeats rows.
    """
    length, wanted = lengths
    pixels = torch.eye(length).reshape(length, 1, length, 1).repeat(1, 1, 1, 4)
    size = (wanted, 5)
    theirs = torch.nn.functional.interpolate(
        pixels, size=size, mode="bicubic", antialias=True, align_corners=True
    )
    np.testing.assert_allclose(cubic_weights(*lengths), theirs[:, 0, :, 0].numpy().T, atol=2e-6)


def test_pixel_shuffle_is_that_of_pytorch():
    x = images(2, 6, 4, 3)
    unshuffled = pixel_unshuffle(x, 2)
    assert_agrees(unshuffled, torch.nn.functional.pixel_unshuffle(to_torch(x), 2), 0)
    np.testing.assert_array_equal(pixel_shuffle(unshuffled, 2), x)
    with pytest.raises(InvalidArgumentError, match=r"6x4 .* 4x4"):
        pixel_unshuffle(x, 4)
    with pytest.raises(InvalidArgumentError, match=r"3 channels .* 2x2"):
        pixel_shuffle(x, 2)
