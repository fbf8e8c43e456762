"""DoRA, LoHa, LoKr and biases against PEFT; names of original files, several adapters, refusals."""

import json
import warnings

import diffusers
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_non_diffusers_flux2_lora_to_diffusers,
    _convert_non_diffusers_qwen_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
)
from lora_models import FLUX, FLUX2, QWEN_IMAGE, SD3, SD15, Z_IMAGE
from torch_reference import randomised

from jaxldm import checkpoints
from jaxldm.checkpoints.original.flux import flux_table
from jaxldm.checkpoints.original.flux2 import flux2_table
from jaxldm.checkpoints.original.layout import to_original
from jaxldm.checkpoints.original.qwen_image import qwen_image_table
from jaxldm.checkpoints.original.stable_diffusion_3 import sd3_table
from jaxldm.checkpoints.original.z_image import z_image_table
from jaxldm.errors import CheckpointError, InvalidArgumentError

MODELS = {
    "unet": (diffusers.UNet2DConditionModel, SD15, None),
    "FLUX": (diffusers.FluxTransformer2DModel, FLUX, flux_table),
    "FLUX.2": (diffusers.Flux2Transformer2DModel, FLUX2, flux2_table),
    "Qwen-Image": (diffusers.QwenImageTransformer2DModel, QWEN_IMAGE, qwen_image_table),
    "SD 3": (diffusers.SD3Transformer2DModel, SD3, sd3_table),
    "Z-Image": (diffusers.ZImageTransformer2DModel, Z_IMAGE, z_image_table),
}


@pytest.fixture(scope="module")
def models_of(tmp_path_factory):
    """name -> (folder, our component by its name, their weights), each saved once."""
    known = {}

    def model(name):
        if name not in known:
            kind, config, _ = MODELS[name]
            theirs, folder = randomised(kind(**config)), tmp_path_factory.mktemp("kinds") / "model"
            theirs.save_pretrained(folder)
            component = "unet" if name == "unet" else "transformer"
            weights = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
            known[name] = (folder, {component: checkpoints.load(folder)}, weights)
        return known[name]

    return model


def assert_weights(merged, wanted, before=None):
    """Every weight to 1e-6 of the largest; with `before` some of them moved."""
    ours, moved = checkpoints.to_state_dict(merged), 0
    for name, tensor in ours.items():
        error = np.abs(tensor - wanted[name]).max()
        assert error <= 1e-6 * max(1.0, np.abs(wanted[name]).max()), f"{name}: {error:.2e}"
        moved += before is not None and not np.array_equal(tensor, before[name])
    return moved


CONV, LINEAR = ["conv1", "proj_in"], ["to_q", "to_k", "to_out.0", "ff.net.2"]
KINDS = {
    "LoRA": peft.LoraConfig(r=3, lora_alpha=2, target_modules=LINEAR + CONV),
    "DoRA": peft.LoraConfig(r=3, lora_alpha=2, target_modules=LINEAR + CONV, use_dora=True),
    "bias": peft.LoraConfig(r=3, lora_alpha=2, target_modules=["to_out.0", "ff.net.2"], lora_bias=True),
    "rsLoRA": peft.LoraConfig(r=3, lora_alpha=2, target_modules=LINEAR, use_rslora=True),
    "LoHa": peft.LoHaConfig(r=3, alpha=2, target_modules=LINEAR + CONV),
    "LoHa, Tucker": peft.LoHaConfig(r=3, alpha=2, target_modules=["conv1"], use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=1, alpha=2, target_modules=LINEAR + CONV),
    "LoKr, whole": peft.LoKrConfig(r=9, alpha=2, target_modules=LINEAR),
    "LoKr, both": peft.LoKrConfig(
        r=1, alpha=2, target_modules=LINEAR, decompose_both=True, decompose_factor=4
    ),
    "LoKr, Tucker": peft.LoKrConfig(r=1, alpha=2, target_modules=["conv1"], use_effective_conv2d=True),
}


@pytest.fixture(scope="module")
def trained(models_of):
    """kind -> (tensors as PEFT names them, the config, the weights that PEFT merges them to)."""
    known = {}

    def adapter(kind):
        if kind not in known:
            folder, _, _ = models_of("unet")
            model = diffusers.UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False)
            model = peft.get_peft_model(model, KINDS[kind])
            torch.manual_seed(len(kind))
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if any(word in name for word in ("lora_", "hada_", "lokr_")):
                        size = 1 + 0.3 * torch.rand(weight.shape)
                        grown = "magnitude" in name
                        weight.copy_(weight * size if grown else 0.3 * torch.randn(weight.shape))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it takes its own biases for parts of a matrix
                tensors = {key: t.clone() for key, t in peft.get_peft_model_state_dict(model).items()}
            config = {key: v for key, v in KINDS[kind].to_dict().items() if isinstance(v, (int, bool, float))}
            merged = {name: t.numpy() for name, t in model.merge_and_unload().state_dict().items()}
            known[kind] = tensors, config, merged
        return known[kind]

    return adapter


def read(path, tensors, metadata=None):
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return checkpoints.load_lora(path)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_peft_are_merged_as_peft_merges_them(models_of, trained, tmp_path, kind):
    _, ours, before = models_of("unet")
    tensors, config, wanted = trained(kind)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora = read(tmp_path / "adapter_model.safetensors", tensors)
    assert sum(len(layer.tensors) for layer in lora.layers.values()) == len(tensors)
    moved = assert_weights(checkpoints.merge_lora(ours, lora)["unet"][1], wanted, before)
    assert moved >= len(lora.layers)


KOHYA = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
}


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "LoHa, Tucker", "LoKr", "LoKr, both", "LoKr, Tucker"])
def test_the_same_under_the_names_of_kohya_and_lycoris(models_of, trained, tmp_path, kind, prefix):
    """With an alpha for each layer; the lengths of DoRA as [out, 1] or [out, 1, 1, 1]."""
    (_, ours, before), (tensors, config, wanted) = models_of("unet"), trained(kind)
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("base_model.model.")
        module = name.split(".lora_")[0].split(".hada_")[0].split(".lokr_")[0]
        rest = KOHYA.get(name[len(module) + 1 :], name[len(module) + 1 :])
        spelled = prefix + module.replace(".", "_")
        if rest == "dora_scale":
            rank = before[f"{module}.weight"].ndim
            tensor = tensor.reshape(-1, *[1] * (rank - 1))
        renamed[f"{spelled}.{rest}"] = tensor
        renamed[f"{spelled}.alpha"] = torch.tensor(float(config.get("lora_alpha", config.get("alpha"))))
    lora = read(tmp_path / "a.safetensors", renamed)
    assert_weights(checkpoints.merge_lora(ours, lora)["unet"][1], wanted, before)


def test_dora_by_columns_and_at_half_its_scale(models_of, tmp_path):
    """LyCORIS' lengths [1, in]; half a DoRA goes half of the way."""
    _, ours, before = models_of("unet")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = before[f"{name}.weight"]
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, weight.shape[1], generator=generator), torch.randn(len(weight), 2)
    lengths = torch.rand(1, weight.shape[1], generator=generator) + 1
    spelled = "lora_unet_" + name.replace(".", "_")
    layer = {f"{spelled}.lora_down.weight": down, f"{spelled}.lora_up.weight": up}
    lora = read(tmp_path / "a.safetensors", layer | {f"{spelled}.dora_scale": lengths})
    moved = weight.astype(np.float64) + (up @ down).numpy()
    moved = moved / np.linalg.norm(moved, axis=0) * lengths.numpy()
    for scale in (1.0, 0.5):
        wanted = before | {f"{name}.weight": weight + scale * (moved - weight)}
        assert assert_weights(checkpoints.merge_lora(ours, lora, scale)["unet"][1], wanted, before) == 1


def test_whole_differences_of_weights_norms_and_biases(models_of, tmp_path):
    _, ours, before = models_of("unet")
    generator, wanted, tensors = torch.Generator().manual_seed(0), dict(before), {}
    for module, leaf, role in (
        ("down_blocks.0.resnets.0.conv1", "weight", "diff"),
        ("down_blocks.0.resnets.0.conv1", "bias", "diff_b"),
        ("mid_block.resnets.0.norm1", "weight", "w_norm"),
        ("mid_block.resnets.0.norm1", "bias", "b_norm"),
        ("conv_norm_out", "bias", "diff_b"),
    ):
        name = f"{module}.{leaf}"
        change = torch.randn(before[name].shape, generator=generator)
        tensors[f"lora_unet_{module.replace('.', '_')}.{role}"] = change
        wanted[name] = before[name] + 0.5 * change.numpy()
    lora = read(tmp_path / "a.safetensors", tensors)
    assert assert_weights(checkpoints.merge_lora(ours, lora, 0.5)["unet"][1], wanted, before) == 5


# Modules of original files, all of those that trainers change: fused projections and some of the others.
ORIGINAL = {
    "FLUX": [
        *(f"double_blocks.1.{stream}_{part}" for stream in ("img", "txt") for part in ("attn.qkv", "mlp.0")),
        *("double_blocks.0.img_attn.proj", "double_blocks.0.txt_mlp.2", "double_blocks.0.img_mod.lin"),
        *("single_blocks.0.linear1", "single_blocks.1.linear2", "single_blocks.1.modulation.lin"),
        *("img_in", "txt_in", "time_in.in_layer", "vector_in.out_layer", "guidance_in.in_layer"),
        *("final_layer.linear", "final_layer.adaLN_modulation.1"),
    ],
    "FLUX.2": [
        *(f"double_blocks.1.{stream}_{part}" for stream in ("img", "txt") for part in ("attn.qkv", "mlp.0")),
        *("double_blocks.0.img_attn.proj", "double_blocks.0.txt_mlp.2", "double_stream_modulation_img.lin"),
        *("single_blocks.0.linear1", "single_blocks.1.linear2", "single_stream_modulation.lin"),
        *("img_in", "txt_in", "time_in.in_layer", "guidance_in.out_layer", "final_layer.linear"),
        "final_layer.adaLN_modulation.1",
    ],
    "Qwen-Image": [
        *(f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_out.0", "add_k_proj", "to_add_out")),
        *("transformer_blocks.1.img_mlp.net.0.proj", "transformer_blocks.1.txt_mlp.net.2"),
        *("transformer_blocks.1.img_mod.1", "img_in", "txt_in", "proj_out", "norm_out.linear"),
        "time_text_embed.timestep_embedder.linear_1",
    ],
    "SD 3": [
        *("joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.context_block.attn.qkv"),
        *("joint_blocks.0.x_block.mlp.fc1", "joint_blocks.1.x_block.attn.proj", "context_embedder"),
        *("joint_blocks.1.context_block.adaLN_modulation.1", "y_embedder.mlp.0", "final_layer.linear"),
    ],
    "Z-Image": [
        *("layers.0.attention.qkv", "noise_refiner.0.attention.qkv", "layers.1.attention.out"),
        *("layers.0.feed_forward.w1", "cap_embedder.1"),
    ],
}
NAMINGS = {
    "diffusion_model": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", False),
    "ComfyUI, alpha": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", True),
    "original": ("{}.lora_A.weight", "{}.lora_B.weight", False),
    "PEFT": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight", False),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", True),
}


def originally(name, params):
    """Weights by the names and in the layout of the original file."""
    module = params[0]
    return {
        key: np.asarray(t)
        for key, t in to_original(
            checkpoints.to_state_dict(params[1]), MODELS[name][2](module.config)
        ).items()
    }


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", ORIGINAL)
def test_names_of_original_files(models_of, tmp_path, name, naming):
    """W + scale alpha / r B A in the layout of the original, fused projections included."""
    _, ours, _ = models_of(name)
    before, tensors, wanted = originally(name, ours["transformer"]), {}, {}
    down_name, up_name, with_alpha = NAMINGS[naming]
    present = [module for module in ORIGINAL[name] if f"{module}.weight" in before]
    assert len(present) > 4
    for seed, module in enumerate(present):
        weight, generator = before[f"{module}.weight"], torch.Generator().manual_seed(seed)
        down = torch.randn(2, weight.shape[1], generator=generator)
        up = torch.randn(len(weight), 2, generator=generator)
        spelled = module.replace(".", "_") if naming == "kohya" else module
        tensors |= {down_name.format(spelled): down, up_name.format(spelled): up}
        if with_alpha:
            tensors[down_name.format(spelled).replace("lora_down.weight", "alpha")] = torch.tensor(1.0)
        wanted[f"{module}.weight"] = weight + (0.25 if with_alpha else 0.5) * (up @ down).numpy()
    lora = read(tmp_path / "a.safetensors", tensors)
    assert len(lora.layers) == len(present)
    merged = checkpoints.merge_lora(ours, lora, 0.5)["transformer"]
    after = originally(name, merged)
    for key, tensor in after.items():
        expected = wanted.get(key, before[key])
        assert np.abs(tensor - expected).max() <= 1e-6 * max(1.0, np.abs(expected).max()), key


def test_flux_of_kohya_as_diffusers_fuses_it(models_of, tmp_path):
    folder, ours, before = models_of("FLUX")
    tensors, original = {}, originally("FLUX", ours["transformer"])
    for seed, module in enumerate(ORIGINAL["FLUX"]):
        if not module.startswith(("double_blocks", "single_blocks")) or module.endswith("linear1"):
            continue  # of linear1 it knows FLUX's own width alone
        weight, generator = original[f"{module}.weight"], torch.Generator().manual_seed(seed)
        spelled = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{spelled}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator)
        tensors[f"{spelled}.lora_up.weight"] = torch.randn(len(weight), 2, generator=generator)
        tensors[f"{spelled}.alpha"] = torch.tensor(1.0)
    lora = read(tmp_path / "a.safetensors", tensors)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
    state, alphas = FluxLoraLoaderMixin.lora_state_dict(tmp_path / "a.safetensors", return_alphas=True)
    FluxLoraLoaderMixin.load_lora_into_transformer(state, alphas, transformer=theirs, adapter_name="kohya")
    theirs.fuse_lora()
    wanted = {
        name.replace(".base_layer.", "."): t.detach().numpy() for name, t in theirs.state_dict().items()
    }
    merged = checkpoints.merge_lora(ours, lora)["transformer"][1]
    assert assert_weights(merged, wanted, before) == sum(name.endswith("lora_A.weight") for name in state)


def test_flux_of_xlabs_as_diffusers_reads_it(models_of, tmp_path):
    """The same layers under XLabs' names, and under those that diffusers makes of them."""
    _, ours, _ = models_of("FLUX")
    original, tensors = originally("FLUX", ours["transformer"]), {}
    layers = {
        f"double_blocks.{n}.processor.{kind}_lora{k}": f"double_blocks.{n}.{stream}_attn.{kind}"
        for n in (0, 1)
        for kind in ("qkv", "proj")
        for k, stream in ((1, "img"), (2, "txt"))
    }
    layers |= {"single_blocks.1.processor.qkv_lora": "single_blocks.1.linear1"}
    layers |= {"single_blocks.0.processor.proj_lora": "single_blocks.0.linear2"}
    for seed, (spelled, module) in enumerate(layers.items()):
        weight, generator = original[f"{module}.weight"], torch.Generator().manual_seed(seed)
        rows = 3 * weight.shape[1] if spelled.endswith(".qkv_lora") else len(weight)
        tensors[f"{spelled}.down.weight"] = torch.randn(2, weight.shape[1], generator=generator)
        tensors[f"{spelled}.up.weight"] = torch.randn(rows, 2, generator=generator)
    lora = read(tmp_path / "xlabs.safetensors", tensors)
    assert len(lora.layers) == len(layers)
    converted = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    same = read(tmp_path / "diffusers.safetensors", {name: t.clone() for name, t in converted.items()})
    merged, wanted = (
        checkpoints.to_state_dict(checkpoints.merge_lora(ours, each, 0.5)["transformer"][1])
        for each in (lora, same)
    )
    before = checkpoints.to_state_dict(ours["transformer"][1])
    changed = [name for name in before if np.abs(np.asarray(wanted[name]) - before[name]).max() > 1e-3]
    assert len(changed) == 2 * 2 * 4 + 3 + 1
    for name, tensor in wanted.items():
        np.testing.assert_allclose(np.asarray(merged[name]), np.asarray(tensor), atol=1e-6)


CONVERTED = {
    "FLUX.2": _convert_non_diffusers_flux2_lora_to_diffusers,
    "Qwen-Image": _convert_non_diffusers_qwen_lora_to_diffusers,
}


@pytest.mark.parametrize("naming", ["diffusion_model", "kohya"])
@pytest.mark.parametrize("name", CONVERTED)
def test_newer_families_as_diffusers_reads_them(models_of, tmp_path, name, naming):
    """The same layers under the names of a file, and under those that diffusers makes of them."""
    _, ours, _ = models_of(name)
    original, tensors = originally(name, ours["transformer"]), {}
    # Of FLUX.2 diffusers forgets that the last norm has its shift first, and of kohya's names some.
    left_out = ("final_layer.adaLN",)
    left_out += ("double_stream", "single_stream", "guidance_in") if naming == "kohya" else ()
    layers = [layer for layer in ORIGINAL[name] if name != "FLUX.2" or not layer.startswith(left_out)]
    down_name, up_name, with_alpha = NAMINGS[naming]
    for seed, module in enumerate(layers):
        weight, generator = original[f"{module}.weight"], torch.Generator().manual_seed(seed)
        spelled = module.replace(".", "_") if naming == "kohya" else module
        tensors[down_name.format(spelled)] = torch.randn(2, weight.shape[1], generator=generator)
        tensors[up_name.format(spelled)] = torch.randn(len(weight), 2, generator=generator)
        if with_alpha:
            tensors[down_name.format(spelled).replace("lora_down.weight", "alpha")] = torch.tensor(1.0)
    lora = read(tmp_path / "file.safetensors", tensors)
    assert len(lora.layers) == len(layers)
    convert = CONVERTED[name]
    if (name, naming) == ("FLUX.2", "kohya"):
        convert = _convert_kohya_flux2_lora_to_diffusers
    converted = {key: tensor.clone() for key, tensor in convert(dict(tensors)).items()}
    same = read(tmp_path / "diffusers.safetensors", converted)
    merged, wanted = (
        checkpoints.to_state_dict(checkpoints.merge_lora(ours, each, 0.5)["transformer"][1])
        for each in (lora, same)
    )
    before = checkpoints.to_state_dict(ours["transformer"][1])
    assert sum(np.abs(np.asarray(wanted[key]) - before[key]).max() > 1e-3 for key in before) >= len(layers)
    for key, tensor in wanted.items():
        np.testing.assert_allclose(np.asarray(merged[key]), np.asarray(tensor), atol=2e-6)


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_dora_of_a_fused_matrix(models_of, tmp_path, kind):
    """Its lengths are those of the matrix as a whole."""
    _, ours, _ = models_of("FLUX")
    before, name = originally("FLUX", ours["transformer"]), "double_blocks.0.img_attn.qkv"
    weight, generator = before[f"{name}.weight"], torch.Generator().manual_seed(0)
    down, up = torch.randn(2, weight.shape[1], generator=generator), torch.randn(len(weight), 2)
    axis = 1 if kind == "rows" else 0
    lengths = torch.rand((len(weight), 1) if axis else (1, weight.shape[1]), generator=generator) + 1
    prefix = f"diffusion_model.{name}"
    tensors = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    lora = read(tmp_path / "a.safetensors", tensors | {f"{prefix}.dora_scale": lengths})
    moved = weight.astype(np.float64) + (up @ down).numpy()
    moved = moved / np.linalg.norm(moved, axis=axis, keepdims=True) * lengths.numpy()
    after = originally("FLUX", checkpoints.merge_lora(ours, lora)["transformer"])[f"{name}.weight"]
    np.testing.assert_allclose(after, moved, atol=1e-6 * np.abs(moved).max())


def test_several_adapters_add_up_in_any_order(models_of, trained, tmp_path):
    """Each is the change of the weights as they are, a DoRA's too."""
    _, ours, before = models_of("unet")
    loras, wanted = [], dict(before)
    for kind, scale in (("LoRA", 0.5), ("DoRA", -0.25), ("LoHa", 2.0)):
        tensors, config, merged = trained(kind)
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "adapter_config.json").write_text(json.dumps(config))
        loras.append(read(tmp_path / kind / "adapter_model.safetensors", tensors))
        wanted = {name: wanted[name] + scale * (merged[name] - before[name]) for name in wanted}
    merge = checkpoints.merge_lora
    assert_weights(merge(ours, loras, [0.5, -0.25, 2.0])["unet"][1], wanted)
    assert_weights(merge(ours, loras[::-1], [2.0, {"unet": -0.25}, 0.5])["unet"][1], wanted)
    assert_weights(merge(ours, loras, 0.0)["unet"][1], before)
    with pytest.raises(InvalidArgumentError, match="2 numbers for 3 LoRAs"):
        merge(ours, loras, [0.5, 0.5])


def test_adapters_of_another_family_and_nan_are_refused(models_of, trained, tmp_path):
    tensors, _, _ = trained("LoRA")
    _, flux, _ = models_of("FLUX")
    with pytest.raises(
        CheckpointError, match=r"the model: no such module: .*to_q\.lora_A\.weight.* it is of another model"
    ):
        checkpoints.merge_lora(flux, read(tmp_path / "a.safetensors", tensors))
    name = next(iter(tensors))
    lora = read(tmp_path / "b.safetensors", tensors | {name: tensors[name] * torch.nan})
    with pytest.raises(CheckpointError) as caught:
        checkpoints.merge_lora(models_of("unet")[1], lora)
    assert str(caught.value) == f"{lora.path} holds NaN or infinity, in {name}: copy it again"
    pair = [each for each in tensors if each.startswith(name.rsplit(".", 2)[0] + ".")]
    huge = {each: torch.full_like(tensors[each], 1e30) for each in pair}
    lora = read(tmp_path / "c.safetensors", tensors | huge)
    with pytest.raises(CheckpointError, match=r"c\.safetensors: the change by .* too large for float32"):
        checkpoints.merge_lora(models_of("unet")[1], lora)
