"""LoRA files that we write: diffusers and PEFT merge them to the weights that `models.apply_lora` makes."""

import comfyui_names
import diffusers
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from diffusers.loaders import (
    AmusedLoraLoaderMixin,
    Flux2LoraLoaderMixin,
    FluxLoraLoaderMixin,
    QwenImageLoraLoaderMixin,
    SD3LoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    ZImageLoraLoaderMixin,
)
from diffusers.pipelines.deprecated import wuerstchen
from lora_models import (
    AMUSED,
    DEEPFLOYD_IF,
    DIT,
    FLUX,
    FLUX2,
    PIXART,
    QWEN_IMAGE,
    SD3,
    SD15,
    SDXL,
    WUERSTCHEN,
    Z_IMAGE,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch_reference import randomised

from jaxldm import checkpoints, models
from jaxldm.checkpoints.lora_names import COMPONENT_NAMES, targets
from jaxldm.errors import InvalidArgumentError, UnknownNameError

RANK, SCALE = 2, 0.375
# Class, config, and what reads LoRA files in diffusers, a pipeline or its part; PixArt's and DiT's have none.
FAMILIES = {
    "Stable Diffusion": (diffusers.UNet2DConditionModel, SD15, StableDiffusionLoraLoaderMixin),
    "SDXL": (diffusers.UNet2DConditionModel, SDXL, StableDiffusionXLLoraLoaderMixin),
    "DeepFloyd IF": (diffusers.UNet2DConditionModel, DEEPFLOYD_IF, StableDiffusionLoraLoaderMixin),
    "Wuerstchen": (wuerstchen.WuerstchenPrior, WUERSTCHEN, wuerstchen.WuerstchenPriorPipeline),
    "aMUSEd": (diffusers.UVit2DModel, AMUSED, AmusedLoraLoaderMixin),
    "SD 3": (diffusers.SD3Transformer2DModel, SD3, SD3LoraLoaderMixin),
    "FLUX": (diffusers.FluxTransformer2DModel, FLUX, FluxLoraLoaderMixin),
    "FLUX.2": (diffusers.Flux2Transformer2DModel, FLUX2, Flux2LoraLoaderMixin),
    "Qwen-Image": (diffusers.QwenImageTransformer2DModel, QWEN_IMAGE, QwenImageLoraLoaderMixin),
    "PixArt": (diffusers.PixArtTransformer2DModel, PIXART, None),
    "Z-Image": (diffusers.ZImageTransformer2DModel, Z_IMAGE, ZImageLoraLoaderMixin),
    "DiT": (diffusers.DiTTransformer2DModel, DIT, None),
}


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), tree)


def targets_of(family, kind):
    """Attention and, for U-Nets, a convolution and a 1x1 convolution or matrix, too."""
    if kind is not diffusers.UNet2DConditionModel:
        return None
    attention = ["*/to_[qkv]", "*/to_out_0"]  # of DeepFloyd IF the texts' keys and values besides
    own = ["*/add_[kv]_proj"] if family == "DeepFloyd IF" else ["*/proj_in"]
    return [*attention, "*/conv1", *own]


def component_of(kind):
    """What the network is in a folder of its pipeline."""
    return {"UNet2DConditionModel": "unet", "WuerstchenPrior": "prior"}.get(kind.__name__, "transformer")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(their model, its component, who reads files, our weights with the adapter, lora, folder)."""
    kind, fields, mixin = FAMILIES[request.param]
    theirs = randomised(kind(**fields))
    folder = tmp_path_factory.mktemp("lora")
    theirs.save_pretrained(folder / "model")
    module, params = checkpoints.load(folder / "model")
    lora = random_like(models.init_lora(jax.random.key(0), params, RANK, targets_of(request.param, kind)))
    component = component_of(kind)
    wanted = checkpoints.to_state_dict(models.apply_lora(params, lora, SCALE))
    before = checkpoints.to_state_dict(params)
    assert sum(not np.array_equal(wanted[name], before[name]) for name in wanted) * 2 == len(
        checkpoints.to_state_dict(lora)
    )
    return {
        "family": request.param,
        "kind": kind,
        "component": component,
        "mixin": mixin,
        "wanted": wanted,
        "before": before,
        "parts": {component: (module, params)},
        "lora": lora,
        "folder": folder,
    }


def assert_weights(state, wanted):
    """Every weight within 1e-6 of the largest."""
    state = {name.replace(".base_layer.", "."): tensor.detach().numpy() for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    compared = 0
    for name, tensor in wanted.items():
        if name in state:
            np.testing.assert_allclose(
                state[name], tensor, rtol=0, atol=1e-6 * max(1.0, np.abs(tensor).max()), err_msg=name
            )
            compared += 1
    assert compared >= 0.9 * len(wanted)


def fresh(case):
    return case["kind"].from_pretrained(case["folder"] / "model", low_cpu_mem_usage=False)


def written(case, names="diffusers"):
    path = case["folder"] / f"{names}.safetensors"
    checkpoints.save_lora(path, {case["component"]: case["lora"]}, SCALE, names)
    return path


def by_diffusers(case, path):
    """Their weights with the file loaded and merged, as their pipeline does it."""
    theirs, mixin = fresh(case), case["mixin"]
    if mixin is None:
        theirs.load_lora_adapter(load_file(path), prefix=case["component"])
    elif case["component"] in ("unet", "prior"):
        state, alphas = mixin.lora_state_dict(path, unet_config=theirs.config)
        mixin.load_lora_into_unet(state, network_alphas=alphas, unet=theirs, adapter_name="ours")
    else:
        state = mixin.lora_state_dict(path)
        if mixin is AmusedLoraLoaderMixin:
            state, alphas = state
            assert not alphas
        options = {"network_alphas": None} if mixin in (FluxLoraLoaderMixin, AmusedLoraLoaderMixin) else {}
        mixin.load_lora_into_transformer(state, transformer=theirs, adapter_name="ours", **options)
    theirs.fuse_lora()
    return theirs.state_dict()


def test_diffusers_merges_the_same_weights(case, caplog):
    if case["mixin"] is None and not hasattr(case["kind"], "load_lora_adapter"):
        return  # diffusers has none for it; PEFT has, below
    diffusers.utils.logging.enable_propagation()
    assert_weights(by_diffusers(case, written(case)), case["wanted"])
    assert not caplog.records


def test_peft_merges_the_same_weights(case):
    state = {name.split(".", 1)[1]: tensor for name, tensor in load_file(written(case)).items()}
    modules = sorted({name.split(".lora_")[0] for name in state})
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules)
    theirs = peft.inject_adapter_in_model(config, fresh(case))
    result = peft.set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys
    layers = [module for module in theirs.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == len(modules)
    for layer in layers:
        layer.merge()
    assert_weights(theirs.state_dict(), case["wanted"])


def test_our_reader_merges_the_same_weights(case):
    """The file under both kinds of names, by the code that reads everybody's files."""
    for names in ("diffusers", "kohya") if has_kohya_names(case) else ("diffusers",):
        merged = checkpoints.merge_lora(case["parts"], checkpoints.load_lora(written(case, names)))
        ours = {
            name: torch.tensor(tensor)
            for name, tensor in checkpoints.to_state_dict(merged[case["component"]][1]).items()
        }
        assert_weights(ours, case["wanted"])


def test_names_without_a_component_are_those_of_the_denoiser(case):
    ((component, network),) = case["parts"].items()
    places = targets({"text_encoder": network, component: network})
    layers = {name.split(".lora_")[0] for name in checkpoints.to_state_dict(case["lora"])}
    assert {places[layer].component for layer in layers} == {component}


def has_kohya_names(case):
    return case["component"] == "unet" and case["family"] != "DeepFloyd IF"


def test_kohya_names_for_diffusers_and_comfyui(case):
    if not has_kohya_names(case):
        refused = rf"kohya's names are for unet, .* got {case['component']}"
        if case["component"] == "unet":  # diffusers would lose the keys and values of the texts
            refused = r"add_[kv]_proj has no name of kohya's that a program reads: .*names='diffusers'"
        with pytest.raises(InvalidArgumentError, match=refused):
            written(case, "kohya")
        return
    path = written(case, "kohya")
    assert all(name.startswith("lora_unet_") for name in load_file(path))
    assert_weights(by_diffusers(case, path), case["wanted"])


def read_by_comfyui(case, names):
    """(change of each layer that ComfyUI finds in the file, tensors that it leaves, layers of the file)."""
    shapes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in case["before"].items()
        if name.endswith(".weight")
    }
    layers = {name.split(".lora_")[0] for name in checkpoints.to_state_dict(case["lora"])}
    return *comfyui_names.read(case["family"], shapes, load_file(written(case, names))), layers


def test_comfyui_finds_every_layer_and_makes_the_same_weights(case):
    """Of a U-Net under kohya's names; under diffusers' it finds all but the attention, as the docs say."""
    if case["family"] not in comfyui_names.FAMILIES:
        return  # no model of ComfyUI
    of_unet = case["component"] == "unet"
    changes, left, layers = read_by_comfyui(case, "kohya" if of_unet else "diffusers")
    assert not left and changes.keys() == layers
    for layer, change in changes.items():
        before, wanted = (case[key][f"{layer}.weight"] for key in ("before", "wanted"))
        np.testing.assert_allclose(
            before + change.numpy(), wanted, rtol=0, atol=1e-6 * max(1.0, np.abs(wanted).max()), err_msg=layer
        )
    if of_unet:
        changes, left, _ = read_by_comfyui(case, "diffusers")
        attention = {layer for layer in layers if ".to_" in layer}
        assert attention and changes.keys() == layers - attention
        assert {name.split(".lora_")[0].removeprefix("unet.") for name in left} == attention


def test_text_encoders_have_the_prefix_that_comfyui_looks_for(tmp_path):
    config = transformers.CLIPTextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    theirs = randomised(transformers.CLIPTextModel(config))
    theirs.save_pretrained(tmp_path / "text_encoder")
    parts = {"text_encoder": checkpoints.load(tmp_path / "text_encoder")}
    params = parts["text_encoder"][1]
    lora = random_like(models.init_lora(jax.random.key(0), params, RANK))
    wanted = checkpoints.to_state_dict(models.apply_lora(params, lora, SCALE))
    for names, prefix in (
        ("diffusers", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A"),
        ("kohya", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down"),
    ):
        path = tmp_path / f"{names}.safetensors"
        checkpoints.save_lora(path, {"text_encoder": lora}, SCALE, names)
        assert f"{prefix}.weight" in load_file(path)
        merged = checkpoints.merge_lora(parts, checkpoints.load_lora(path))["text_encoder"][1]
        for name, tensor in checkpoints.to_state_dict(merged).items():
            np.testing.assert_allclose(tensor, wanted[name], rtol=0, atol=1e-6 * np.abs(wanted[name]).max())


def test_what_cannot_be_written(tmp_path):
    lora = {"to_q": {"lora_A": {"kernel": np.ones((4, 2))}, "lora_B": {"kernel": np.ones((2, 4))}}}
    path = tmp_path / "a.safetensors"
    with pytest.raises(InvalidArgumentError, match=r"must end in \.safetensors"):
        checkpoints.save_lora(tmp_path / "a.bin", {"unet": lora})
    with pytest.raises(UnknownNameError, match=COMPONENT_NAMES[0]):
        checkpoints.save_lora(path, {"unnet": lora})
    with pytest.raises(UnknownNameError, match="kohya"):
        checkpoints.save_lora(path, {"unet": lora}, names="koya")
    with pytest.raises(InvalidArgumentError, match="lora_A and lora_B"):
        checkpoints.save_lora(path, {"unet": {"to_q": {"kernel": np.ones((4, 4))}}})
    assert not list(tmp_path.iterdir())
