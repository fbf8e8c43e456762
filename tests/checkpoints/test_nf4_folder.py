"""Folders in NF4: the codes stay packed, and stand for the numbers that bitsandbytes says."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.nn.quantized import NF4

FILE = "diffusion_pytorch_model.safetensors"
DIT = {"hidden_size": 64, "depth": 2, "num_heads": 2, "num_classes": 4, "sample_size": 8}


def in_nf4(name, tensor, nested, block=64):
    """(tensors of the file, the numbers that they stand for), one by one, as bitsandbytes writes them."""
    numbers = tensor.reshape(-1, block)
    absmax = np.abs(numbers).max(1)
    about = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(tensor.shape)}
    file = {}
    if nested:
        table = np.linspace(-1, 1, 256, dtype=np.float32)
        about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(absmax.mean())}
        rest = absmax - np.float32(absmax.mean())
        outer = np.array([np.abs(rest[n : n + 256]).max() for n in range(0, len(rest), 256)], np.float32)
        places = [np.abs(table - r / outer[n // 256]).argmin() for n, r in enumerate(rest)]
        stored = np.array(places, np.uint8)
        absmax = table[stored] * outer[np.arange(len(rest)) // 256] + np.float32(absmax.mean())
        file |= {f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": table}
    else:
        stored = absmax
    codes = np.abs(numbers[..., None] / absmax[:, None, None] - np.array(NF4)).argmin(-1).reshape(-1)
    file |= {
        name: (codes[0::2] * 16 + codes[1::2]).astype(np.uint8)[:, None],
        f"{name}.absmax": stored,
        f"{name}.quant_map": np.array(NF4, np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(about).encode(), np.uint8),
    }
    table = np.array(NF4, np.float32)
    return file, (table[codes].reshape(-1, block) * absmax[:, None].astype(np.float32)).reshape(tensor.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DiT of random weights."""
    folder = tmp_path_factory.mktemp("dit")
    module, rng = models.build("tiny-dit", **DIT), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), models.shapes(module)
    )
    checkpoints.save(folder, module, params)
    return folder


def quantised(folder, out, nested):
    """(the folder in NF4, the tensors as numbers)."""
    tensors, file, numbers = load_file(folder / FILE), {}, {}
    for name, tensor in tensors.items():
        file[name] = numbers[name] = tensor
        if name.endswith(".weight") and tensor.ndim == 2 and tensor.size % 64 == 0 and "emb" not in name:
            del file[name]
            parts, numbers[name] = in_nf4(name, tensor, nested)
            file |= parts
    out.mkdir()
    save_file(file, out / FILE)
    config = json.loads((folder / "config.json").read_text())
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    return file, numbers


@pytest.mark.parametrize("nested", [False, True])
def test_codes_stay_packed_and_compute_what_their_numbers_do(folder, tmp_path, nested):
    _, numbers = quantised(folder, tmp_path / "nf4", nested)
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(numbers, tmp_path / "dense" / FILE)
    module, packed = checkpoints.load(tmp_path / "nf4")
    same, dense = checkpoints.load(tmp_path / "dense")
    assert module.config == same.config
    kernels = [leaf for leaf in jax.tree.leaves(packed, is_leaf=is_packed) if is_packed(leaf)]
    assert len(kernels) >= 4 and {leaf.codes.dtype.name for leaf in kernels} == {"uint8"}
    assert models.param_bytes(packed) < 0.35 * models.param_bytes(dense)
    jax.tree.map(
        lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-7),
        models.dequantize(packed),
        dense,
    )
    x, t, labels = np.ones((2, 8, 8, module.config.in_channels), np.float32), np.ones(2, np.float32), [1, 2]
    call = jax.jit(lambda params: module.apply({"params": params}, x, t, np.array(labels)))
    np.testing.assert_allclose(call(packed), call(dense), atol=1e-4)
    with pytest.raises(InvalidArgumentError, match="codes of another program's file"):
        checkpoints.save(tmp_path / "again", module, packed)


def is_packed(leaf):
    return isinstance(leaf, models.Quantized)


def test_damaged_folders_are_refused(folder, tmp_path):
    file, _ = quantised(folder, tmp_path / "nf4", False)
    state = next(name for name in file if name.endswith("bitsandbytes__nf4"))
    weight = state.partition(".quant_state")[0]
    about = json.loads(file[state].tobytes())

    def as_bytes(entries):
        return np.frombuffer(json.dumps(entries).encode(), np.uint8)

    for changes, words in (
        ({f"{weight}.absmax": None}, "absmax is missing"),
        ({f"{weight}.quant_map": np.zeros(16, np.float32)}, "not the table of NF4"),
        ({weight: file[weight][:-1]}, "in blocks of 64"),
        ({state: as_bytes(about | {"shape": [1, -64]})}, "damaged"),
        ({state: np.frombuffer(b"{", np.uint8)}, "no JSON"),
        ({state: None, f"{weight}.quant_state.bitsandbytes__fp4": file[state]}, "in fp4 of bitsandbytes"),
    ):
        changed = {name: value for name, value in (file | changes).items() if value is not None}
        save_file(changed, tmp_path / "nf4" / FILE)
        with pytest.raises(CheckpointError, match=words):
            checkpoints.load(tmp_path / "nf4")


def test_the_language_model_of_one_that_sees_images_is_read_as_numbers(tmp_path):
    """Under the names of the whole model, as folders of FLUX.2-dev in NF4 have them."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    module = models.build("mistral-small-3.2", **sizes, **heads)
    tensors = checkpoints.to_state_dict(models.init(module, jax.random.key(0)))
    file, numbers = {}, dict(tensors)
    for name, tensor in tensors.items():
        whole = f"language_model.model.{name}"
        if "_proj" in name:
            codes, numbers[name] = in_nf4(whole, tensor, nested=True)
            file |= codes
        else:
            file[whole] = tensor
    file |= in_nf4("vision_tower.layers.0.weight", np.ones((64, 64), np.float32), nested=False)[0]
    file["language_model.lm_head.weight"] = tensors["embed_tokens.weight"]
    save_file(file, tmp_path / "model.safetensors")
    text = module.config.to_dict() | {"model_type": "mistral"}
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    entries = {"architectures": ["Mistral3ForConditionalGeneration"], "quantization_config": how}
    (tmp_path / "config.json").write_text(json.dumps(entries | {"vision_config": {}, "text_config": text}))
    opened, params = checkpoints.load(tmp_path)
    assert opened == module
    found = checkpoints.to_state_dict(params)
    assert found.keys() == numbers.keys()
    for name, tensor in numbers.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-6, err_msg=name)
