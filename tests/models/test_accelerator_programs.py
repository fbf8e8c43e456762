"""A denoising step on an accelerator: never all logits of its attention, never a copy of the weights.

The programs of all presets, and of a network of each family that has none, are traced with abstract weights
at their published sizes, as on an NVIDIA device: denoising networks in the sampling loop that pipelines run,
with guidance; text encoders on texts of the published lengths, with padding; autoencoders on whole images.
What XLA and cuDNN make of them is not seen here.
"""

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import equations

from jaxldm import diffusion as D
from jaxldm import models, pipelines, schedulers
from jaxldm.models.cost import _jaxprs_in
from jaxldm.models.registry import ARCHITECTURES, VARIANTS
from jaxldm.nn import attention_kernels, flash_attention
from jaxldm.pipelines import latents, sampling_run
from jaxldm.pipelines import tokens as token_steps
from jaxldm.pipelines.families import instruct_pix2pix


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """Traces as on an NVIDIA device, with cuDNN at hand."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(flash_attention, "on_cuda", lambda: True)
    monkeypatch.setattr(flash_attention, "on_hopper", lambda: False)
    monkeypatch.setattr(flash_attention, "works", lambda *asked: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def array(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def shapes(module):
    return models.shapes(module)


def weights(module, dtype):
    return jax.tree.map(lambda leaf: array(leaf.shape, dtype), shapes(module))


def traced(module, dtype, *inputs, method=None):
    """The program of a call: weights, then inputs."""
    forward = lambda params, *inputs: module.apply({"params": params}, *inputs, method=method)  # noqa: E731
    return jax.make_jaxpr(forward)(weights(module, dtype), *inputs)


def sampling_loop(module, dtype, branches=2, x=None, **more):
    """The program of the loop over the steps that pipelines run, for one image.

    Weights come first; grid, scales, keys and conditions are arguments as well. branches: 2 with guidance, 3
    with that of InstructPix2Pix. x: what the network takes, by default its example. more: conditions.
    """
    example, _, *others = module.example_inputs()
    x = example if x is None else x
    names = list(inspect.signature(module.__call__).parameters)[2:]
    cond = {name: value for name, value in zip(names, others, strict=False) if value is not None} | more
    channels = x.shape[-1] - (more["extra_channels"].shape[-1] if "extra_channels" in more else 0)
    continuous = models.convention(module).continuous
    kind = "FlowMatchEulerDiscreteScheduler" if continuous else "DPMSolverMultistepScheduler"
    scheduler = schedulers.from_config({"_class_name": kind})
    grid = jax.tree.map(
        lambda leaf: array(jnp.shape(leaf), jnp.result_type(leaf)), D.make_grid(scheduler.path_for(64), 5)
    )
    key = jax.random.key(0)
    shape = (*x.shape[1:3], channels)
    combine = instruct_pix2pix.guidance if branches == 3 else sampling_run.classifier_free_guidance
    compiled = sampling_run.Compiled(scheduler.sampler, combine, shape, channels, jax.random.key_impl(key))
    per_call = sampling_run.PerCall(grid, array(()), array(()))
    others = {"uncond": cond if branches > 1 else None, "between": cond if branches > 2 else None}
    per_image = sampling_run.PerImage(array((1, 2), "uint32"), cond, **others)
    network = pipelines.Network(module, weights(module, dtype))
    begin = functools.partial(latents._first_carry, compiled=compiled)
    carry = jax.eval_shape(begin, network, per_call, per_image)
    take = functools.partial(latents.take_steps, compiled=compiled)
    bounds = (array((), "int32"), array((), "int32"))
    return jax.make_jaxpr(take)(network, per_call, per_image, carry, *bounds)


def token_loop(module, dtype, mask_token, names):
    """The same of masked tokens. names: of the conditions."""
    tokens, *cond = module.example_inputs()
    cond = dict(zip(names, cond, strict=True))
    per_call = token_steps.PerCall(D.make_unmasking(5, "cosine"), array(()), array(()))
    per_image = token_steps.PerImage(array((1, 2), "uint32"), tokens, array((1,), "int32"), cond, cond)
    compiled = token_steps.Compiled(mask_token, jax.random.key_impl(jax.random.key(0)))
    network = pipelines.Network(module, weights(module, dtype))
    return jax.make_jaxpr(functools.partial(token_steps.unmask, compiled=compiled))(
        network, per_call, per_image
    )


def attention_of(jaxpr):
    """(batches of the flash kernel's calls, numbers in the largest softmax or product of batches)."""
    found = list(equations(jaxpr))
    flash = [x for x in found if x.primitive.name.startswith("dot_product_attention_fwd")]
    logits = [
        equation.outvars[0].aval
        for equation in found
        if equation.primitive.name == "exp"
        or (equation.primitive.name == "dot_general" and equation.params["dimension_numbers"][1][0])
    ]
    sizes = [math.prod(x.shape) for x in logits if len(x.shape) >= 3]
    return [x.invars[0].aval.shape[0] for x in flash], max(sizes, default=0)


VIEWS = ("reshape", "squeeze", "broadcast_in_dim", "slice", "stop_gradient")  # read where they are used


def carried_by(scan, body):
    """The positions of the carry among a scan's arguments: constants, carry, what it goes through."""
    carry = sum(own.aval == outer.aval for own, outer in zip(body.outvars, scan.outvars, strict=True))
    whole = sum(own.aval == outer.aval for own, outer in zip(body.invars, scan.invars, strict=True))
    return range(whole - carry, whole)


def prepared_from_weights(jaxpr, weights):
    """(operation, numbers) of all that is computed from weights alone: the same again in every step."""
    known = set(weights)
    for equation in jaxpr.eqns:
        arrays = [variable for variable in equation.invars if not hasattr(variable, "val")]
        alone = bool(arrays) and known.issuperset(arrays)
        inner = list(_jaxprs_in(equation.params.values()))
        for function in inner:
            given = equation.invars[len(equation.invars) - len(function.invars) :]  # a condition has one more
            carried = range(0)
            if equation.primitive.name == "scan":
                carried = carried_by(equation, function)
            passed = [
                own
                for number, (own, outer) in enumerate(zip(function.invars, given, strict=True))
                if number not in carried and not hasattr(outer, "val") and outer in known
            ]
            yield from prepared_from_weights(function, passed)
        if alone:
            known.update(equation.outvars)
            if not inner and equation.primitive.name not in VIEWS:
                yield equation.primitive.name, max(variable.aval.size for variable in equation.outvars)


def check(name, module, program, flash, branches=1, norms=0.002):
    """Few logits, no work on weights alone, no call of the host, no large constant.

    flash: how many calls of the flash kernel there are, those in a scan once; None: some.
    branches: images or texts in each. norms: their share in the weights, at most; they are float32.
    """
    jaxpr = program.jaxpr
    batches, largest = attention_of(jaxpr)
    assert largest <= attention_kernels.MOST_LOGITS, name
    assert len(batches) == flash if flash is not None else batches, f"{name}: {len(batches)}"
    assert set(batches) <= {branches}
    params = jaxpr.invars[: len(jax.tree.leaves(shapes(module)))]
    prepared = sum(size for _, size in prepared_from_weights(jaxpr, params))
    assert prepared < norms * sum(x.aval.size for x in params), name
    assert not any("callback" in equation.primitive.name for equation in equations(jaxpr))
    assert max((np.size(constant) for constant in program.consts), default=0) < 2**25  # tables of positions


# Preset -> (dtype, calls of the flash kernel, one in each scan; other options, fewer blocks of a kind).
# Small feature maps of Stable Diffusion 1.5 have heads of 160 channels, which are attended in chunks.
FEWER = {"layers_per_block": 1}
DENOISERS = {
    "sd15-unet": ("float16", 12, FEWER),
    "sdxl-unet": ("float16", None, FEWER),
    "if-i-xl": ("bfloat16", None, FEWER),
    "dit-xl-2": ("bfloat16", 1, {}),
    "sit-xl-2": ("float16", 1, {}),
    "flux-dev": ("bfloat16", 2, {}),  # blocks of both kinds
    "flux2-dev": ("bfloat16", 2, {}),
    "pixart-sigma-2k": ("float16", 2, {}),  # of the image, and to the text
    "sd3-medium": ("float16", 2, {}),  # the last block is of another kind
    "sd35-medium": ("bfloat16", None, {}),  # some blocks attend twice
    "wuerstchen-prior": ("bfloat16", None, {}),
    "wuerstchen-decoder": ("float16", None, {}),
    "z-image": ("bfloat16", 3, {}),  # the refiners of text and image, then all tokens
    "qwen-image": ("bfloat16", 1, {}),
}
# Preset -> one with the same blocks, heads up to its size, and as many tokens or more.
SIZES = [f"{kind}-{size}" for kind in ("dit", "sit") for size in ("s", "b", "l", "xl")]
ALIKE = {
    **dict.fromkeys(("lcm-unet", "sd15-controlnet"), "sd15-unet"),
    **dict.fromkeys(("sd20-unet", "sd21-unet", "sdxl-refiner-unet", "playground-unet"), "sdxl-unet"),
    **dict.fromkeys(("sd2-controlnet", "sdxl-controlnet"), "sdxl-unet"),
    **dict.fromkeys(("if-i-l", "if-i-m", "if-ii-l", "if-ii-m"), "if-i-xl"),
    **{f"{name}-{patch}": f"{name[:3]}-xl-2" for name in SIZES for patch in (2, 4, 8)},
    **dict.fromkeys(("flux-schnell", "flux-controlnet"), "flux-dev"),
    **dict.fromkeys(("flux2-klein-4b", "flux2-klein-9b"), "flux2-dev"),
    **{f"pixart-sigma{size}": "pixart-sigma-2k" for size in ("", "-256", "-512")},
    **dict.fromkeys(("sd35-large", "sd3-controlnet", "sd35-large-controlnet"), "sd3-medium"),
    "amused-256": "amused-512",
    "qwen2.5-vl-7b": "qwen3-4b",
    **dict.fromkeys(
        ("sd-vae", "playground-vae", "sd3-vae", "flux-vae", "flux2-vae", "qwen-image-vae"), "sdxl-vae"
    ),
    **dict.fromkeys(("asymmetric-vae-x1.5", "asymmetric-vae-x2", "consistency-decoder"), "sdxl-vae"),
    **dict.fromkeys(("ldm-vq-f8", "kandinsky2-movq"), "ldm-vq-f4"),
    **dict.fromkeys(("openclip-h", "openclip-bigg", "ldm-bert"), "clip-l"),
    **dict.fromkeys(("t5-base", "t5-xl"), "t5-xxl"),
    **dict.fromkeys(("qwen3-8b", "mistral-small-3.2"), "qwen3-4b"),
}
WITHOUT_ATTENTION = {
    "flux-redux",
    *("taesd", "taesdxl", "taesd3", "taef1"),
    "mini-autoencoder",
    "digit-classifier",
    "amused-vq",
    "wuerstchen-vqgan",
    *("taesd", "taesdxl", "taesd3", "taef1"),
    *("sd15-t2i-adapter", "sd15-light-t2i-adapter", "sdxl-t2i-adapter"),
    "sana-dc-ae",  # linear, without logits
    "patch-gan",
    "mini-patch-gan",
}
SMALL = {
    *("mini-unet", "tiny-dit", "tiny-maskgit"),
    *("tiny-dydit", "tiny-adaptive-depth", "tiny-token-pruning", "tiny-d2it"),
}
CONTROL_NETWORKS = ("sd15-controlnet", "sd3-controlnet", "flux-controlnet")
TEXT_MASKS = {"pixart-sigma-2k": 300, "z-image": 128, "qwen-image": 512, "if-i-xl": 77}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_step_uses_the_flash_kernel_for_both_branches_at_once_and_weights_as_they_are(name):
    dtype, flash, options = DENOISERS[name]
    module = models.build(name, dtype=dtype, **options)
    more = {}
    if name in TEXT_MASKS:
        more["encoder_attention_mask"] = array((1, TEXT_MASKS[name]), "int32")
    check(name, module, sampling_loop(module, dtype, **more), flash, branches=2)


# Families without a preset, as in their published folders: (config, options of the loop, kernel calls).
CROSS = {
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
}
FOLDERS = {
    "DiT of diffusers": (models.DiTTransformer2DConfig(out_channels=8, sample_size=64), {}, 2),
    "x4 upscaler": (
        models.UNet2DConditionConfig(
            sample_size=128,
            in_channels=7,
            block_out_channels=(256, 512, 512, 1024),
            only_cross_attention=(True, True, True, False),
            cross_attention_dim=1024,
            use_linear_projection=True,
            num_class_embeds=1000,
            **CROSS,
        ),
        {"extra_channels": array((1, 128, 128, 3))},
        None,
    ),
    "x2 latent upscaler": (
        models.KUNet2DConditionConfig(),
        {
            "x": array((1, 128, 128, 8)),
            "extra_channels": array((1, 128, 128, 4)),
            "encoder_hidden_states": array((1, 77, 768)),
            "encoder_attention_mask": array((1, 77)),
        },
        None,
    ),
    "InstructPix2Pix": (
        dataclasses.replace(models.PRESETS["sd15-unet"], in_channels=8, **FEWER),
        {
            "branches": 3,
            "extra_channels": array((1, 64, 64, 4)),
            instruct_pix2pix._SCALE: array((1,)),
        },
        12,
    ),
    "FLUX.1 Kontext": (models.PRESETS["flux-dev"], {"reference": array((1, 128, 128, 16))}, 2),
    "LDM super-resolution": (
        models.UNet2DConfig(
            sample_size=64,
            in_channels=6,
            block_out_channels=(160, 320, 320, 640),
            attention_head_dim=32,
            down_block_types=(*("DownBlock2D",) * 3, "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", *("UpBlock2D",) * 3),
        ),
        {"branches": 1, "extra_channels": array((1, 64, 64, 3))},
        None,
    ),
    "consistency model": (
        models.UNet2DConfig(
            sample_size=64,
            block_out_channels=(192, 384, 576, 768),
            layers_per_block=3,
            attention_head_dim=64,
            down_block_types=("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
            up_block_types=(*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            num_classes=999,
        ),
        {"branches": 1},
        None,
    ),
    "DDPM": (  # one head of all channels
        models.UNet2DConfig(
            sample_size=256,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            attention_head_dim=None,
            down_block_types=(*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
        ),
        {"branches": 1},
        0,
    ),
    "NCSN++": (models.NCSNppConfig(sample_size=256), {"branches": 1}, None),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_step_of_families_without_a_preset_is_like_those(name):
    config, options, flash = FOLDERS[name]
    module = models.from_config(dataclasses.replace(config, dtype="bfloat16"))
    check(name, module, sampling_loop(module, "bfloat16", **options), flash, options.get("branches", 2))


@pytest.mark.parametrize("name", sorted(SMALL - {"tiny-maskgit"}))
def test_a_step_of_small_networks_is_like_those(name):
    module = models.build(name, dtype="bfloat16")
    check(name, module, sampling_loop(module, "bfloat16"), None, branches=2, norms=0.01)


def test_steps_of_tokens_use_the_flash_kernel_for_both_branches_at_once():
    module = models.build("amused-512", dtype="bfloat16")
    names = ("encoder_hidden_states", "pooled_text_emb", "micro_conds")
    loop = token_loop(module, "bfloat16", module.config.vocab_size - 1, names)
    check("amused-512", module, loop, None, branches=2)
    module = models.build("tiny-maskgit", dtype="bfloat16")
    loop = token_loop(module, "bfloat16", module.config.mask_token, ("labels",))
    check("tiny-maskgit", module, loop, None, branches=2, norms=0.01)


@pytest.mark.parametrize("name", CONTROL_NETWORKS)
def test_control_networks_take_weights_as_they_are(name):
    module = models.build(name, dtype="bfloat16")
    check(name, module, traced(module, "bfloat16", *module.example_inputs()), None)


# Texts and tokens of (preset, whether they have padding), as published; two layers of each.
ENCODERS = {
    ("clip-l", False): (1, 77),
    ("clip-l", True): (2, 77),
    ("t5-xxl", False): (1, 512),  # FLUX
    ("t5-xxl", True): (2, 300),  # PixArt
    ("qwen3-4b", True): (2, 512),
    ("minilm", True): (2, 256),
    ("ldm-bert", False): (1, 77),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "padded"), ENCODERS)
def test_text_encoders_use_the_flash_kernel(name, padded, dtype):
    """Causal, with padding, and with T5's bias."""
    shape, own = ENCODERS[name, padded], {"t5-xxl": "num_layers", "ldm-bert": "encoder_layers"}
    module = models.build(name, dtype=dtype, **{own.get(name, "num_hidden_layers"): 2})
    tokens = array(shape, "int32")
    program = traced(module, dtype, tokens, *([tokens] if padded else []))
    check(name, module, program, 2, branches=shape[0])


@pytest.mark.parametrize("name", ["clip-l-vision", "dinov2-large", "siglip-so400m"])
def test_image_encoders_use_the_flash_kernel(name):
    """SigLIP's head attends once more."""
    module = models.build(name, dtype="bfloat16", num_hidden_layers=2)
    calls = 3 if name == "siglip-so400m" else 2
    check(name, module, traced(module, "bfloat16", *module.example_inputs()), calls)


def test_float32_is_attended_in_chunks():
    module = models.build("flux-dev", dtype="float32")
    flash, largest = attention_of(traced(module, "float32", *module.example_inputs()).jaxpr)
    assert flash == [] and 0 < largest <= attention_kernels.MOST_LOGITS


@pytest.mark.parametrize("name", ["sdxl-vae", "ldm-vq-f4"])
def test_one_head_of_all_channels_of_an_autoencoder_is_attended_in_chunks(name):
    """In both directions, of images of the published size."""
    module = models.build(name, dtype="bfloat16")
    (image,) = module.example_inputs()
    encode = lambda params, image: module.apply({"params": params}, image, method="encode")  # noqa: E731
    moments = jax.eval_shape(encode, weights(module, "bfloat16"), image)
    for method, given in (("encode", image), ("decode", getattr(moments, "mean", moments))):
        flash, largest = attention_of(traced(module, "bfloat16", given, method=method).jaxpr)
        assert flash == [] and 0 < largest <= attention_kernels.MOST_LOGITS


def test_every_preset_is_among_these_or_like_one():
    checked = {*DENOISERS, *(name for name, _ in ENCODERS), "amused-512", "sdxl-vae", "ldm-vq-f4"}
    checked |= {"clip-l-vision", "dinov2-large", "siglip-so400m"}
    assert checked | set(ALIKE) | WITHOUT_ATTENTION | SMALL == set(models.PRESETS)
    assert {ALIKE[name] for name in ALIKE} <= checked


def test_every_architecture_is_among_these():
    known = {type(config) for config in models.PRESETS.values()}
    known |= {type(config) for config, *_ in FOLDERS.values()}
    kinds = [(name, kind) for name, (_, kind) in ARCHITECTURES.items()]
    kinds += [(f"{name}, another", kind) for name, (*_, kind) in VARIANTS.items()]
    # The text encoder above with one product more, and both encoders of CLIP in one.
    assert {name for name, kind in kinds if kind not in known} <= {"CLIPTextModelWithProjection", "CLIPModel"}


def test_what_is_computed_from_weights_alone_is_found():
    """In scans, in functions that are called, and after views; what depends on x is not."""

    params = {"a": jnp.ones((2, 4)), "b": jnp.ones((6, 4)), "c": jnp.ones((3, 8, 8))}
    forward = lambda params, x: (  # noqa: E731
        x @ jnp.concatenate([params["a"], params["b"]]).reshape(8, 4),
        jax.lax.scan(lambda c, w: (c @ (w * 2), None), x, params["c"])[0],
        jax.jit(jnp.negative)(params["a"]),
        jnp.exp(x),
    )
    jaxpr = jax.make_jaxpr(forward)(params, jnp.ones((1, 8))).jaxpr
    found = dict(prepared_from_weights(jaxpr, jaxpr.invars[:3]))
    assert found == {"concatenate": 32, "mul": 64, "neg": 8}
