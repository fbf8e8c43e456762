"""LoRA files under the names that the published programs write, against W + scale alpha / r B A.

Which module a name means, and with which alpha, is what diffusers' own conversion of the file says.
"""

import json

import diffusers
import flax.linen
import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

from jaxldm import checkpoints
from jaxldm.checkpoints.lora import matches
from jaxldm.errors import CheckpointError, UnknownNameError

RANK = 2
COMMON = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": 12}
SD15 = COMMON | {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "layers_per_block": 1,
}
SDXL = COMMON | {
    "block_out_channels": (4, 8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
}


def saved(model, folder):
    model.save_pretrained(folder)
    return checkpoints.load(folder), {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """(components of ours, {component: weights of theirs}) of a small Stable Diffusion 1."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd15")
    text_config = transformers.CLIPTextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    unet, unet_weights = saved(diffusers.UNet2DConditionModel(**SD15), folder / "unet")
    text, text_weights = saved(transformers.CLIPTextModel(text_config), folder / "text_encoder")
    named = {
        f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text_weights.items()
    }
    return {"unet": unet, "text_encoder": text}, {"unet": unet_weights, "text_encoder": named}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    torch.manual_seed(1)
    model = diffusers.UNet2DConditionModel(**SDXL)
    unet, weights = saved(model, tmp_path_factory.mktemp("sdxl") / "unet")
    return {"unet": unet}, {"unet": weights}, model.config


def matrices(shape, rank=RANK, seed=0):
    """(down, up) for a weight of this published shape."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return down, torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)


def product(down, up):
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:]).numpy()


def modules(weights, *ends):
    """The modules whose names end so, with the shapes of their weights."""
    return {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in weights.items()
        if tensor.ndim > 1 and name.removesuffix(".weight").endswith(ends)
    }


def write(path, tensors, metadata=None):
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return checkpoints.load_lora(path)


def assert_merged(merged, before, changes):
    """Every weight is what it was, plus `changes[component][module]` where there is one."""
    for component, weights in before.items():
        ours = checkpoints.to_state_dict(merged[component][1])
        left = set(changes.get(component, {}))
        for name, tensor in ours.items():
            module = name.removesuffix(".weight")
            change = changes.get(component, {}).get(module) if name.endswith(".weight") else None
            left.discard(module)
            if change is None:
                np.testing.assert_array_equal(tensor, weights[name], name)
            else:
                wanted = weights[name] + change.reshape(tensor.shape)
                np.testing.assert_allclose(
                    tensor, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max(), err_msg=name
                )
                assert np.abs(change).max() > 1e-3
        assert not left


def said_by_diffusers(tensors, mixin, scale, **options):
    """{component: {module: scale alpha / r B A}} as diffusers reads the file."""
    state, alphas = mixin.lora_state_dict(dict(tensors), **options)
    alphas = {name.removesuffix(".alpha"): alpha for name, alpha in (alphas or {}).items()}
    changes = {}
    for component in {name.split(".")[0] for name in state}:
        own = {name.partition(".")[2]: t for name, t in state.items() if name.startswith(component + ".")}
        if component == "unet":
            peft = own if any("lora_A" in name for name in own) else convert_unet_state_dict_to_peft(own)
        else:
            peft = own if any("lora_A" in name for name in own) else convert_state_dict_to_peft(own)
        changes[component] = {}
        for name in [name for name in peft if "lora_A" in name]:
            module = name.split(".lora_A")[0]
            down, up = peft[name], peft[name.replace("lora_A", "lora_B")]
            theirs = [a for n, a in alphas.items() if same_module(n, f"{component}.{module}")]
            multiplier = theirs[0] / down.shape[0] if theirs else 1.0
            changes[component][module] = scale * multiplier * product(down, up)
    return changes


def same_module(alpha_name, module):
    """diffusers keeps its alphas under the names of the tensors before their conversion."""
    name = alpha_name.replace(".processor", "").split("_lora.")[0].split(".lora_linear_layer")[0]
    old = {"to_out": ("to_out.0", "out_proj"), "to_q": ("q_proj",), "to_k": ("k_proj",), "to_v": ("v_proj",)}
    parent, _, last = name.rpartition(".")
    return module in (name, *(f"{parent}.{new}" for new in old.get(last, ())))


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def kohya(prefix, module, shape, alpha, seed):
    down, up = matrices(shape, seed=seed)
    name = prefix + module.replace(".", "_")
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(float(alpha))}


@pytest.mark.parametrize("te", ["lora_te_", "lora_te1_"])
def test_kohya_names(sd15, tmp_path, te):
    components, before = sd15
    tensors = {}
    ends = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "time_emb_proj")
    for i, (module, shape) in enumerate(modules(before["unet"], *ends).items()):
        tensors |= kohya("lora_unet_", module, shape, None if i % 3 == 0 else 1 + i % 2, i)
    for i, (module, shape) in enumerate(modules(before["text_encoder"], *TEXT).items()):
        tensors |= kohya(te, module, shape, 0.5, 1000 + i)
    lora = write(tmp_path / "kohya.safetensors", tensors)
    wanted = said_by_diffusers(tensors, StableDiffusionLoraLoaderMixin, 0.7)
    assert sum(map(len, wanted.values())) == len(lora.layers) > 40
    assert_merged(checkpoints.merge_lora(components, lora, 0.7), before, wanted)


# Names as in published files for SDXL, all kinds of modules that kohya's scripts train there.
SDXL_NAMES = [
    "input_blocks_0_0",
    "input_blocks_1_0_in_layers_2",
    "input_blocks_1_0_emb_layers_1",
    "input_blocks_2_0_out_layers_3",
    "input_blocks_3_0_op",
    "input_blocks_4_0_skip_connection",
    "input_blocks_4_1_proj_in",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "input_blocks_5_1_transformer_blocks_0_attn2_to_k",
    "input_blocks_7_1_transformer_blocks_1_attn2_to_v",
    "input_blocks_8_1_transformer_blocks_1_ff_net_0_proj",
    "input_blocks_8_1_transformer_blocks_0_attn1_to_out_0",
    "middle_block_0_in_layers_2",
    "middle_block_1_transformer_blocks_1_attn1_to_k",
    "middle_block_2_out_layers_3",
    "middle_block_1_proj_out",
    "output_blocks_0_1_transformer_blocks_0_ff_net_2",
    "output_blocks_2_2_conv",
    "output_blocks_3_0_skip_connection",
    "output_blocks_5_1_transformer_blocks_0_attn2_to_out_0",
    "output_blocks_8_0_in_layers_2",
    "out_2",
    "time_embed_0",
    "time_embed_2",
    "label_emb_0_0",
    "label_emb_0_2",
]


def test_kohya_names_of_xl_are_those_of_the_original_files(sdxl, tmp_path):
    components, before, config = sdxl
    plain = {f"lora_unet_{name}.lora_down.weight": torch.zeros(1, 1) for name in SDXL_NAMES}
    plain |= {f"lora_unet_{name}.lora_up.weight": torch.zeros(1, 1) for name in SDXL_NAMES}
    state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(plain), unet_config=config)
    peft = convert_unet_state_dict_to_peft({name.removeprefix("unet."): t for name, t in state.items()})
    in_order = [name.split(".lora_A")[0] for name in peft if "lora_A" in name]
    assert len(in_order) == len(SDXL_NAMES)
    by_diffusers = {name: module_of(name, config) for name in SDXL_NAMES}
    assert set(by_diffusers.values()) == set(in_order)
    tensors, wanted = {}, {}
    for i, (name, module) in enumerate(by_diffusers.items()):
        layer = kohya("lora_unet_", name, before["unet"][f"{module}.weight"].shape, 1.0, i)
        tensors |= layer
        wanted[module] = 0.5 * product(*list(layer.values())[:2])
    lora = write(tmp_path / "xl.safetensors", tensors)
    assert_merged(checkpoints.merge_lora(components, lora), before, {"unet": wanted})


def module_of(name, config):
    """What diffusers takes one of kohya's names for."""
    tensors = {f"lora_unet_{name}.lora_{part}.weight": torch.zeros(1, 1) for part in ("down", "up")}
    state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(tensors, unet_config=config)
    peft = convert_unet_state_dict_to_peft(
        {key.removeprefix("unet."): tensor for key, tensor in state.items()}
    )
    return next(iter(peft)).split(".lora_")[0]


def diffusers_file(before, unet_name, text_name, scale):
    """({tensor}, {component: {module: change}}) of a file whose names these two functions form."""
    tensors, wanted = {}, {"unet": {}, "text_encoder": {}}
    for component, naming, ends in (("unet", unet_name, ATTENTION), ("text_encoder", text_name, TEXT[:4])):
        for i, (module, shape) in enumerate(modules(before[component], *ends).items()):
            down, up = matrices(shape, seed=i)
            tensors |= dict(zip(naming(module), (down, up), strict=True))
            wanted[component][module] = scale * product(down, up)
    return tensors, wanted


def parts(*names):
    return lambda module: [form.format(module) for form in names]


def processors(prefix, rename=lambda last: last):
    def name(module):
        parent, last = module.rsplit(".", 1) if not module.endswith("to_out.0") else (module[:-9], "to_out")
        return [f"{prefix.format(parent)}{rename(last)}_lora.{part}.weight" for part in ("down", "up")]

    return name


to_projection = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
NAMINGS = {
    "PEFT": (
        parts("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
        parts("text_encoder.{}.lora_A.weight", "text_encoder.{}.lora_B.weight"),
    ),
    "PEFT, without the tower's name": (
        parts("unet.{}.lora_A.default.weight", "unet.{}.lora_B.default.weight"),
        lambda module: [
            f"text_encoder.{module.removeprefix('text_model.')}.lora_{part}.weight" for part in "AB"
        ],
    ),
    "diffusers": (
        parts("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
        parts("text_encoder.{}.lora_linear_layer.down.weight", "text_encoder.{}.lora_linear_layer.up.weight"),
    ),
    "old diffusers": (
        processors("unet.{}.processor."),
        processors("text_encoder.{}.", to_projection.get),
    ),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_diffusers_names(sd15, tmp_path, naming):
    components, before = sd15
    tensors, wanted = diffusers_file(before, *NAMINGS[naming], 0.3)
    if "without" not in naming:
        theirs = said_by_diffusers(tensors, StableDiffusionLoraLoaderMixin, 0.3)
        for component, changes in theirs.items():
            assert changes.keys() == wanted[component].keys()
            for module, change in changes.items():
                np.testing.assert_allclose(change, wanted[component][module], rtol=1e-6)
    lora = write(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    assert_merged(checkpoints.merge_lora(components, lora, 0.3), before, wanted)


def test_attention_processors_alone_are_the_unets(sd15, tmp_path):
    components, before = sd15
    naming = (processors("{}.processor."), lambda module: [f"drop.{module}.down.weight", f"drop.{module}.up"])
    tensors, wanted = diffusers_file(before, *naming, 1.0)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("drop")}
    lora = write(tmp_path / "a.safetensors", tensors)
    assert_merged(checkpoints.merge_lora(components, lora), before, {"unet": wanted["unet"]})


def test_alphas_that_peft_stores_next_to_the_tensors(sd15, tmp_path):
    components, before = sd15
    first, second = list(modules(before["unet"], "attn1.to_q"))[:2]
    down, up = matrices(before["unet"][f"{first}.weight"].shape)
    down_2, up_2 = matrices(before["unet"][f"{second}.weight"].shape, rank=4)
    tensors = {
        f"unet.{first}.lora_A.weight": down,
        f"unet.{first}.lora_B.weight": up,
        f"unet.{second}.lora_A.weight": down_2,
        f"unet.{second}.lora_B.weight": up_2,
    }

    def merged(**settings):
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()})}
        lora = write(tmp_path / "a.safetensors", tensors, metadata)
        return checkpoints.merge_lora(components, lora)

    one, two = product(down, up), product(down_2, up_2)
    assert_merged(merged(lora_alpha=8), before, {"unet": {first: 4 * one, second: 2 * two}})
    by_pattern = merged(lora_alpha=8, r=2, alpha_pattern={second.split(".", 1)[1]: 3})
    assert_merged(by_pattern, before, {"unet": {first: 4 * one, second: 0.75 * two}})
    rank_stabilised = merged(lora_alpha=8, use_rslora=True)
    assert_merged(rank_stabilised, before, {"unet": {first: 8 / 2**0.5 * one, second: 4 * two}})
    (tmp_path / "peft").mkdir()
    bare = {f"base_model.model.{name.removeprefix('unet.')}": tensor for name, tensor in tensors.items()}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2}))
    write(tmp_path / "peft" / "adapter_model.safetensors", bare)
    folder = checkpoints.merge_lora(components, checkpoints.load_lora(tmp_path / "peft"))
    assert_merged(folder, before, {"unet": {first: 4 * one, second: 2 * two}})


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("down.0.to_q", True),
        ("0.to_q", True),
        ("o_q", False),
        ("to_q", True),
        ("^to_q", False),
        ("^down.0.to_q$", True),
        ("down.*.to_q", True),
        ("*", True),
        ("down.*.to_k", False),
        ("*.to_q*to_q", False),
        ("", False),
    ],
)
def test_patterns_of_a_file_are_names_or_have_stars(pattern, fits):
    assert matches(pattern, "down.0.to_q") is fits


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha_pattern": {"(a*)*b": 3}}, r"has the pattern '\(a\*\)\*b'; only names of modules"),
        ({"alpha_pattern": {"down": "3"}}, "alpha_pattern.down must be a number"),
        ({"alpha_pattern": ["down"]}, "alpha_pattern must be an object or null"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number, not '8'"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    ],
)
def test_wrong_settings_of_peft_are_refused(tmp_path, settings, words):
    tensors = {"unet.down.lora_A.weight": torch.zeros(2, 4), "unet.down.lora_B.weight": torch.zeros(4, 2)}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()})}
    with pytest.raises(CheckpointError, match=words):
        write(tmp_path / "a.safetensors", tensors, metadata)


def test_convolutions(sd15, tmp_path):
    """3x3 as two convolutions, 3x3 as three (LyCORIS), and a 1x1 convolution trained as a matrix."""
    components, before = sd15
    conv1, conv2 = list(modules(before["unet"], "conv1"))[:2]
    proj_in = next(iter(modules(before["unet"], "proj_in")))
    rng = torch.Generator().manual_seed(5)
    shapes = {module: before["unet"][f"{module}.weight"].shape for module in (conv1, conv2, proj_in)}
    tensors = kohya("lora_unet_", conv1, shapes[conv1], 1.0, 0)
    name = "lora_unet_" + conv2.replace(".", "_")
    down = torch.randn(3, shapes[conv2][1], 1, 1, generator=rng)
    mid = torch.randn(3, 3, 3, 3, generator=rng)
    up = torch.randn(shapes[conv2][0], 3, 1, 1, generator=rng)
    tensors |= {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_up.weight": up,
    }
    matrix = kohya("lora_unet_", proj_in, shapes[proj_in][:2], None, 1)
    tensors |= matrix
    merged = checkpoints.merge_lora(components, write(tmp_path / "a.safetensors", tensors))
    # What the three convolutions do to single pixels is the kernel of the one that does the same.
    pixels = torch.zeros(shapes[conv2][1], shapes[conv2][1], 5, 5)
    pixels[range(len(pixels)), range(len(pixels)), 2, 2] = 1.0
    conv = torch.nn.functional.conv2d
    seen = conv(conv(conv(pixels, down), mid, padding=1), up)[:, :, 1:4, 1:4]
    three = seen.flip(2, 3).transpose(0, 1).numpy()
    change_1 = 0.5 * product(*list(tensors.values())[:2])
    changes = {conv1: change_1, conv2: three, proj_in: product(*matrix.values())}
    assert_merged(merged, before, {"unet": changes})


def test_a_scale_for_each_component(sd15, tmp_path):
    components, before = sd15
    tensors, wanted = diffusers_file(before, *NAMINGS["PEFT"], 1.0)
    lora = write(tmp_path / "a.safetensors", tensors)
    half = {"unet": {module: 0.5 * change for module, change in wanted["unet"].items()}}
    assert_merged(checkpoints.merge_lora(components, lora, {"unet": 0.5}), before, half)
    alone = checkpoints.merge_lora({"unet": components["unet"], "scheduler": {"a": 1}}, lora.of("unet"), 0.5)
    assert alone["scheduler"] == {"a": 1}
    assert_merged(alone, {"unet": before["unet"]}, half)
    with pytest.raises(UnknownNameError, match="text_encoder"):
        checkpoints.merge_lora(components, lora, {"text_encoders": 0.5})
    assert_merged(components, before, {})  # what went in is as it was


def test_dtype_and_device_stay(sd15, tmp_path):
    (module, params), before = sd15[0]["unet"], sd15[1]["unet"]
    device = jax.devices()[3]
    params = jax.device_put(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params), device)
    tensors, wanted = diffusers_file(sd15[1], *NAMINGS["PEFT"], 1.0)
    lora = write(tmp_path / "a.safetensors", tensors).of("unet")
    merged = checkpoints.merge_lora({"unet": (module, params)}, lora)["unet"][1]
    assert all(leaf.dtype == "bfloat16" and leaf.devices() == {device} for leaf in jax.tree.leaves(merged))
    name, change = next(iter(wanted["unet"].items()))
    weight = before[f"{name}.weight"].astype("bfloat16").astype(np.float32) + change
    np.testing.assert_array_equal(
        checkpoints.to_state_dict(merged)[f"{name}.weight"], weight.astype("bfloat16")
    )


def test_layers_that_match_nothing_are_all_named(sd15, tmp_path):
    components, before = sd15
    module, shape = next(iter(modules(before["unet"], "to_q").items()))
    tensors = kohya("lora_unet_", module, (shape[0] + 1, shape[1]), 1.0, 0)
    tensors |= kohya("lora_unet_", "down_blocks.7.conv1", (4, 4, 3, 3), None, 1)
    tensors |= kohya("lora_te2_", "text_model.encoder.layers.0.mlp.fc1", (4, 4), 1.0, 2)
    lora = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.merge_lora(components, lora)
    message = str(caught.value)
    assert f"({shape[0] + 1}, {shape[1]}) in the file, {tuple(shape)} in the model" in message
    unmatched = [name for name in tensors if "blocks_7" in name or "te2" in name]
    assert len(unmatched) == 5 and all(f"no such module: {name}" in message for name in unmatched)
    assert "give text_encoder_2 among the components" in message


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"lora_unet_b.oft_blocks": (4, 1)}, r"not of a LoRA, DoRA.*lora_unet_b\.oft_blocks \(4, 1\)"),
        ({"lora_unet_b.hada_w1_a": (4, 2)}, r"lora_unet_b\.hada_w1_a .*without its counterpart"),
        ({"lora_unet_b.lokr_w1": (4, 2), "lora_unet_b.lokr_w2_a": (4, 2)}, r"lokr_w2_a .*without"),
        ({"lora_unet_a.hada_w1_a": (4, 2)}, r"lora_unet_a\.hada_w1_a .*without its counterpart"),
        ({"lora_unet_a.dora_scale": (3, 1)}, r"dora_scale is \(3, 1\).* 4 rows or 4 columns"),
        ({"lora_unet_b.alpha": ()}, r"lora_unet_b\.alpha .*without its counterpart"),
        (
            {"lora_unet_b.lora_down.weight": (2, 4)},
            r"lora_unet_b\.lora_down\.weight .*without its counterpart",
        ),
        ({"unet.b.lora_A.weight": (2, 4), "unet.b.lora.down.weight": (2, 4)}, r"unet\.b\.lora"),
        ({"lora_unet_b.lora_down.weight": (2, 4), "lora_unet_b.lora_up.weight": (4, 3)}, r"fit.*\(4, 3\)"),
        ({"lora_unet_b.lora_down.weight": (2, 4, 3), "lora_unet_b.lora_up.weight": (4, 2)}, "fit together"),
        ({"lora_unet_a.alpha": (2,)}, r"alpha is \(2,\), not one number"),
    ],
)
def test_what_is_no_plain_lora(tmp_path, extra, words):
    tensors = {"lora_unet_a.lora_down.weight": (2, 4), "lora_unet_a.lora_up.weight": (4, 2)} | extra
    with pytest.raises(CheckpointError, match=rf"a\.safetensors.*{words}"):
        write(tmp_path / "a.safetensors", {name: torch.zeros(shape) for name, shape in tensors.items()})


def test_files_that_are_no_lora(tmp_path):
    with pytest.raises(CheckpointError, match="no LoRA layers"):
        write(tmp_path / "a.safetensors", {})
    with pytest.raises(CheckpointError, match="there is no weight file"):
        checkpoints.load_lora(tmp_path / "b.safetensors")
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "c.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        checkpoints.load_lora(tmp_path / "c.bin")
    safetensors.torch.save_file({}, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors, d\.safetensors: give the path"):
        checkpoints.load_lora(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    with pytest.raises(
        CheckpointError, match=r"holds a network, 'ControlNetModel', and no LoRA: .*--controlnet"
    ):
        checkpoints.load_lora(tmp_path)


def test_a_layer_of_a_stack_of_blocks_is_merged_into_its_own_block(tmp_path):
    """Parameters of a scan: the file names a block, the change goes there and nowhere else."""
    rng = np.random.default_rng(0)
    layers = {
        f"transformer.blocks.{n}.mlp.lora_{part}.weight": rng.standard_normal(shape).astype(np.float32)
        for n in (0, 2)
        for part, shape in (("A", (2, 4)), ("B", (6, 2)))
    }
    safetensors.numpy.save_file(layers, tmp_path / "lora.safetensors")
    kernel = rng.standard_normal((3, 4, 6)).astype(np.float32)

    class Stack(flax.linen.Module):
        config: object = None

    merged = checkpoints.merge_lora(
        {"transformer": (Stack(), {"blocks_0to2": {"mlp": {"kernel": jax.numpy.asarray(kernel)}}})},
        checkpoints.load_lora(tmp_path / "lora.safetensors"),
        0.5,
    )
    expected = kernel.copy()
    for n in (0, 2):
        up, down = (layers[f"transformer.blocks.{n}.mlp.lora_{part}.weight"] for part in "BA")
        expected[n] += 0.5 * (up @ down).T
    result = merged["transformer"][1]["blocks_0to2"]["mlp"]["kernel"]
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    np.testing.assert_array_equal(result[1], kernel[1])
