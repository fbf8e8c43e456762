"""Original files in fewer bits: the codes stay packed, and the network computes with what they stand for."""

import dataclasses
import importlib
import struct
import zlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxldm import checkpoints, models
from jaxldm.checkpoints.gguf_file import open_gguf
from jaxldm.checkpoints.gguf_types import NAMES
from jaxldm.errors import CheckpointError

FLUX = models.FluxTransformer2DConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=128,
    num_attention_heads=1,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    axes_dims_rope=(16, 56, 56),
    guidance_embeds=False,
)
SD3 = models.SD3Transformer2DConfig(
    sample_size=8,
    num_layers=3,
    attention_head_dim=64,
    num_attention_heads=1,
    joint_attention_dim=6,
    caption_projection_dim=64,
    pooled_projection_dim=10,
    pos_embed_max_size=8,
)
MODULES = {
    "FLUX": (models.FluxTransformer2DModel, FLUX, ("double_blocks", "single_blocks")),
    "FLUX of 256": (
        models.FluxTransformer2DModel,
        dataclasses.replace(FLUX, num_attention_heads=2, num_single_layers=1),
        ("double_blocks", "single_blocks"),
    ),
    "SD 3": (models.SD3Transformer2DModel, SD3, ("model.diffusion_model.joint_blocks",)),
}


def quantised(tensors, inside, by_rows):
    """(the file's tensors in 8 bits inside of the blocks, the numbers that they stand for)."""
    file, numbers = {}, {}
    for name, tensor in tensors.items():
        file[name] = numbers[name] = tensor
        if name.endswith(".weight") and tensor.ndim == 2 and name.startswith(inside):
            peak = np.abs(tensor).max(axis=1, keepdims=True) if by_rows else np.abs(tensor).max()
            scale = np.asarray(peak / 448, np.float32)
            file[name] = (tensor / scale).astype(ml_dtypes.float8_e4m3fn)
            stem = name.removesuffix("weight")
            file[f"{stem}weight_scale" if by_rows else f"{stem}scale_weight"] = scale
            file[f"{stem}scale_input"] = np.ones((), np.float32)
            numbers[name] = file[name].astype(np.float32) * scale
    return file | {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}, numbers


def written(path, name):
    """An original file of a random network, as save_single_file writes it."""
    kind, config, inside = MODULES[name]
    module, rng = kind(config), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), models.shapes(module)
    )
    checkpoints.save_single_file(path, {"transformer": (module, params)})
    return load_file(path), inside


@pytest.mark.parametrize(("name", "by_rows"), [("FLUX", False), ("SD 3", True)])
def test_the_codes_stay_and_compute_what_their_numbers_do(tmp_path, name, by_rows):
    tensors, inside = written(tmp_path / "a.safetensors", name)
    file, numbers = quantised(tensors, inside, by_rows)
    save_file(file, tmp_path / "fp8.safetensors")
    save_file(numbers, tmp_path / "numbers.safetensors")
    module, packed = checkpoints.load_single_file(tmp_path / "fp8.safetensors")["transformer"]
    same, dense = checkpoints.load_single_file(tmp_path / "numbers.safetensors")["transformer"]
    assert module.config == same.config
    kernels = [leaf for leaf in jax.tree.leaves(packed, is_leaf=is_packed) if is_packed(leaf)]
    assert len(kernels) >= 6 and all(leaf.codes.dtype == ml_dtypes.float8_e4m3fn for leaf in kernels)
    assert models.param_bytes(packed) < 0.6 * models.param_bytes(dense)
    jax.tree.map(np.testing.assert_array_equal, models.dequantize(packed), dense)
    rng = np.random.default_rng(1)
    shapes = [spec.shape for spec in module.example_inputs() if spec is not None]
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    inputs[1] = np.full(1, 0.5, np.float32)
    if name == "FLUX":
        inputs[0], inputs[2] = inputs[0][:, :4, :4], inputs[2][:, :3]
    call = jax.jit(lambda params: module.apply({"params": params}, *inputs))
    found, wanted = call(packed), call(dense)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def is_packed(leaf):
    return isinstance(leaf, models.Quantized)


def test_a_dtype_is_of_what_is_no_code(tmp_path):
    tensors, inside = written(tmp_path / "a.safetensors", "SD 3")
    file, _ = quantised(tensors, inside, False)
    save_file(file, tmp_path / "fp8.safetensors")
    loaded = checkpoints.load_single_file(tmp_path / "fp8.safetensors", dtype="bfloat16")
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(loaded["transformer"][1])}
    assert kinds == {"bfloat16", "float32", "float8_e4m3fn"}  # the scales stay as they are


def test_where_not_all_blocks_have_codes_they_are_numbers(tmp_path):
    """A scan has one kind of parameters for all of its blocks."""
    tensors, inside = written(tmp_path / "a.safetensors", "FLUX")
    file, numbers = quantised(tensors, inside, False)
    name = "single_blocks.1.linear1"
    file[f"{name}.weight"] = numbers[f"{name}.weight"]
    del file[f"{name}.scale_weight"], file[f"{name}.scale_input"]
    save_file(file, tmp_path / "fp8.safetensors")
    save_file(numbers, tmp_path / "numbers.safetensors")
    packed, dense = (
        checkpoints.load_single_file(tmp_path / f"{kind}.safetensors")["transformer"][1]
        for kind in ("fp8", "numbers")
    )
    jax.tree.map(np.testing.assert_array_equal, models.dequantize(packed), dense)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"double_blocks.7.a.scale_weight": np.ones((), np.float32)}, "which is not there"),
        ({"double_blocks.0.img_mlp.0.scale_weight": np.full((), np.nan, np.float32)}, "finite number"),
        ({"double_blocks.0.img_mlp.0.scale_weight": np.ones(3, np.float32)}, "one for each of the 512 rows"),
    ],
)
def test_wrong_scales_are_refused(tmp_path, change, words):
    tensors, inside = written(tmp_path / "a.safetensors", "FLUX")
    file, _ = quantised(tensors, inside, False)
    save_file(file | change, tmp_path / "fp8.safetensors")
    with pytest.raises(CheckpointError, match=words):
        checkpoints.load_single_file(tmp_path / "fp8.safetensors")


# ---------------------------------------------------------------- GGUF


def text(word):
    return struct.pack("<Q", len(word)) + word.encode()


def write_gguf(path, tensors, kinds, entries=()):
    """The format as it is published, in a second program: name -> numbers, name -> type."""
    infos, data = b"", b""
    for name, tensor in tensors.items():
        kind = kinds.get(name, 0)
        data += b"\0" * (-len(data) % 64)
        dims = tensor.shape[::-1]
        infos += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += ENCODERS[kind](tensor)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 2 + len(entries))
    header += text("general.architecture") + struct.pack("<I", 8) + text("flux")
    header += text("general.alignment") + struct.pack("<II", 4, 64)
    for name, values in entries:
        header += text(name) + struct.pack(f"<IIQ{len(values)}i", 9, 5, len(values), *values)
    header += infos
    path.write_bytes(header + b"\0" * (-len(header) % 64) + data)


def blocks(tensor):
    return tensor.reshape(-1, 32)


def q8_0(tensor):
    rows = blocks(tensor)
    d = (np.abs(rows).max(axis=1, keepdims=True) / 127).astype("<f2")
    codes = np.rint(rows / np.maximum(d.astype(np.float32), 1e-9)).clip(-127, 127).astype(np.int8)
    return np.concatenate([d.view(np.uint8), codes.view(np.uint8)], axis=1).tobytes()


def q4_0(tensor):
    rows = blocks(tensor)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    d = (largest / -8).astype("<f2")
    unit = np.where(d == 0, 1, d).astype(np.float32)
    codes = np.floor(rows / unit + 8.5).clip(0, 15).astype(np.uint8)
    return np.concatenate([d.view(np.uint8), codes[:, :16] | (codes[:, 16:] << 4)], axis=1).tobytes()


ENCODERS = {0: lambda t: t.astype("<f4").tobytes(), 1: lambda t: t.astype("<f2").tobytes(), 2: q4_0, 8: q8_0}
ENCODERS[30] = lambda t: t.astype(ml_dtypes.bfloat16).tobytes()
ENCODERS[10] = ENCODERS[0]  # a type that is not known


# type -> (numbers, bytes of a block, where its half-precision scales are)
OTHERS = {3: (32, 20, (0, 2)), 6: (32, 22, (0,)), 7: (32, 24, (0, 2)), 12: (256, 144, (0, 2))}
OTHERS |= {13: (256, 176, (0, 2)), 14: (256, 210, (208,))}


def any_blocks(kind):
    """Bytes of a tensor's size, any but for the scales: gguf-py decodes these types, and encodes none."""

    def encode(tensor):
        size, length, places = OTHERS[kind]
        rng = np.random.default_rng(zlib.crc32(tensor.tobytes()))
        content = rng.integers(0, 256, (tensor.size // size, length), np.uint8)
        for place in places:
            scales = rng.uniform(1e-4, 1e-3, len(content)).astype("<f2")
            content[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
        return content.tobytes()

    return encode


ENCODERS |= {kind: any_blocks(kind) for kind in OTHERS}


def decoded(kind, tensor):
    """The numbers that a tensor's bytes stand for; only for `OTHERS` by the reference."""
    if kind in OTHERS:
        gguf = importlib.import_module("gguf")
        rows = np.frombuffer(ENCODERS[kind](tensor), np.uint8).reshape(len(tensor), -1)
        return gguf.dequantize(rows, gguf.GGMLQuantizationType(kind)).reshape(tensor.shape)
    if kind not in (2, 8):
        return np.frombuffer(ENCODERS[kind](tensor), {0: "<f4", 1: "<f2"}[kind]).reshape(tensor.shape)
    rows = np.frombuffer(ENCODERS[kind](tensor), np.uint8).reshape(-1, 18 if kind == 2 else 34)
    d, body = rows[:, :2].copy().view("<f2").astype(np.float32), rows[:, 2:].copy()
    halves = np.concatenate([body & 15, body >> 4], axis=1).astype(np.float32) - 8
    return (d * (halves if kind == 2 else body.view(np.int8))).astype(np.float32).reshape(tensor.shape)


# Q4_0, Q8_0, Q4_K and Q6_K.
KINDS = [("FLUX", 2, 0.35), ("FLUX", 8, 0.45)]
KINDS += [
    pytest.param("FLUX of 256", 12, 0.4, marks=pytest.mark.torch),
    pytest.param("FLUX of 256", 14, 0.45, marks=pytest.mark.torch),
]


@pytest.mark.parametrize(("name", "kind", "smaller"), KINDS)
def test_gguf_stays_packed_and_computes_what_its_numbers_do(tmp_path, name, kind, smaller):
    """Fewer bits inside of the blocks, half precision and a shape of its own elsewhere."""
    tensors, inside = written(tmp_path / "a.safetensors", name)
    kinds = {
        name: kind if name.startswith(inside) and tensor.ndim == 2 else 1 for name, tensor in tensors.items()
    }
    numbers = {name: decoded(kinds[name], tensor).astype(np.float32) for name, tensor in tensors.items()}
    stored = dict(tensors) | {"img_in.weight": tensors["img_in.weight"].reshape(-1)}
    shape = tensors["img_in.weight"].shape
    write_gguf(tmp_path / "a.gguf", stored, kinds, [("comfy.gguf.orig_shape.img_in.weight", shape)])
    save_file(numbers, tmp_path / "numbers.safetensors")
    module, packed = checkpoints.load_single_file(tmp_path / "a.gguf")["transformer"]
    _, dense = checkpoints.load_single_file(tmp_path / "numbers.safetensors")["transformer"]
    assert sum(map(is_packed, jax.tree.leaves(packed, is_leaf=is_packed))) >= 6
    stack = next(name for name in packed if name.startswith("single_transformer_blocks_0"))
    blocks = (params[stack]["attn"] for params in (packed, dense))
    sizes = [models.param_bytes(params) for params in blocks]
    assert sizes[0] < smaller * sizes[1]
    jax.tree.map(
        lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-6),
        models.dequantize(packed),
        dense,
    )
    rng = np.random.default_rng(1)
    shapes = ((1, 4, 4, 4), (1,), (1, 3, 12), (1, 10))
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    call = jax.jit(lambda params: module.apply({"params": params}, *inputs))
    found, wanted = call(packed), call(dense)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.torch
def test_every_type_is_read_as_gguf_py_reads_it(tmp_path, kind):
    """As numbers, and as codes times scales plus offsets."""
    tensors = {"a.weight": np.random.default_rng(kind).standard_normal((6, 512), np.float32)}
    write_gguf(tmp_path / "a.gguf", tensors, {"a.weight": kind})
    tensor = open_gguf(tmp_path / "a.gguf")["a.weight"]
    wanted = decoded(kind, tensors["a.weight"])
    np.testing.assert_allclose(np.asarray(tensor), wanted, rtol=1e-6, atol=1e-7)
    scales, offsets = tensor.scales(), tensor.offsets()
    groups = tensor.codes().reshape(*scales.shape, -1) * scales[..., None].astype(np.float32)
    groups += 0 if offsets is None else offsets[..., None]
    np.testing.assert_array_equal(groups.reshape(wanted.shape), np.asarray(tensor))


def test_types_of_gguf_have_their_published_names():
    import gguf

    published = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    assert NAMES[23] == "IQ4_XS" and not {0, 1, 30} & NAMES.keys()  # F32, F16 and BF16 are plain
    assert {number: published.get(number, name) for number, name in NAMES.items()} == NAMES


def test_gguf_files_that_are_refused(tmp_path):
    tensors, _ = written(tmp_path / "a.safetensors", "FLUX")
    path = tmp_path / "a.gguf"
    write_gguf(path, tensors, {"img_in.weight": 10})
    with pytest.raises(CheckpointError, match=r"'img_in\.weight' is of type Q2_K; known: F32, F16,"):
        checkpoints.load_single_file(path)
    content = path.read_bytes()
    at = content.index(b"img_in.weight") + len("img_in.weight") + 4 + 2 * 8  # its two sides, then its type
    assert content[at : at + 4] == struct.pack("<I", 10)
    for number, words in ((23, "is of type IQ4_XS; known"), (39, "type MXFP4;"), (77, "type number 77;")):
        path.write_bytes(content[:at] + struct.pack("<I", number) + content[at + 4 :])
        with pytest.raises(CheckpointError, match=rf"a\.gguf: .*'img_in\.weight' .*{words}.* Q4_K or Q8_0"):
            checkpoints.load_single_file(path)
    write_gguf(path, tensors, {})
    whole = path.read_bytes()
    for content, words in (
        (b"GGUX" + whole[4:], "begins with GGUF"),
        (whole[:4] + struct.pack("<I", 1) + whole[8:], "version 1"),
        (whole[:8] + struct.pack("<Q", 2**60) + whole[16:], "damaged"),
        (whole[:40], "ends within its header"),
        (whole[:-100], "ends within the tensor"),
        (b"", "ends within its header"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            checkpoints.load_single_file(path)
