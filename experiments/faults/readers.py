"""For each reader of the library: a small valid folder of files, and the call that reads it."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import os
import pickle
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxldm import checkpoints, data, models, pipelines, schedulers
from jaxldm.checkpoints.safetensors_file import read_safetensors, safetensors_bytes
from jaxldm.checkpoints.weight_files import open_weights
from jaxldm.metrics.image_metrics import read_statistics
from jaxldm.metrics.image_sets import open_image_set
from jaxldm.models.registry import ARCHITECTURES
from jaxldm.reading import read_json


class Reader(NamedTuple):
    """A reader with its valid input.

    Attributes:
        files: path within the folder -> content.
        call: folder -> anything; reads the files.
        weight: how often it is chosen, relative to the others: less for those that build networks.
    """

    files: Mapping[str, bytes]
    call: Callable[[Path], Any]
    weight: float


def _json(entries: Any) -> bytes:
    return json.dumps(entries).encode()


@functools.cache
def _network(config: Any) -> tuple[Any, dict]:
    """(module, parameters of small numbers) without compiling anything."""
    module = models.from_config(config)
    return module, jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, leaf.dtype), models.shapes(module))


def _tensors(config: Any) -> bytes:
    module, params = _network(config)
    constants = dict(module.constant_tensors()) if hasattr(module, "constant_tensors") else {}
    return safetensors_bytes(checkpoints.to_state_dict(params) | constants)


VAE = models.AutoencoderKLConfig(sample_size=8, block_out_channels=(32,), latent_channels=2)
CLIP = models.CLIPTextConfig(
    vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
)
DIT = models.DiTConfig(
    sample_size=4, patch_size=2, in_channels=2, hidden_size=8, depth=2, num_heads=2, num_classes=3
)
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"variance_type": "fixed_small", "clip_sample": True, "clip_sample_range": 1.0},
    "DDIMScheduler": {"set_alpha_to_one": False, "steps_offset": 1, "thresholding": False},
    "PNDMScheduler": {"skip_prk_steps": True, "trained_betas": [0.1, 0.2]},
    "LCMScheduler": {"original_inference_steps": 50, "timestep_scaling": 10.0},
    "EulerDiscreteScheduler": {"timestep_spacing": "trailing", "use_karras_sigmas": True, "sigma_max": None},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "lambda_min_clipped": -5.1,
    },
    "UniPCMultistepScheduler": {"disable_corrector": [0], "solver_type": "bh2"},
    "EDMEulerScheduler": {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "sigma_data": 0.5},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5},
    "PathScheduler": {
        "path": {"type": "interpolant", "kind": "gvp"},
        "prediction": "velocity",
        "grid": {"spacing": "trailing"},
    },
}


def _scheduler(folder: Path) -> None:
    scheduler = schedulers.from_config(read_json(folder / "scheduler_config.json"))
    assert scheduler.solver is not None and scheduler.prediction.path.t_noisy is not None


def _scheduler_files(name: str) -> dict[str, bytes]:
    common = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    discrete = {} if name in ("EDMEulerScheduler", "PathScheduler") else common
    return {"scheduler_config.json": _json({"_class_name": name, **discrete, **SCHEDULERS[name]})}


def _config_files(name: str) -> dict[str, bytes]:
    return {"config.json": _json(models.config_to_dict(ARCHITECTURES[name][1]()) | _of_class(name))}


def _of_class(name: str) -> dict[str, Any]:
    kind = ARCHITECTURES[name][1]
    return {"_class_name": name} if kind.library == "diffusers" else {"architectures": [name]}


def _config(folder: Path) -> None:
    models.config_to_dict(models.config_from_dict(checkpoints.read_config(folder)))


def model_files(config: Any) -> dict[str, bytes]:
    stem = "model" if config.library == "transformers" else "diffusion_pytorch_model"
    return {"config.json": _json(models.config_to_dict(config)), f"{stem}.safetensors": _tensors(config)}


def _shards() -> dict[str, bytes]:
    parts = [{f"{name}{n}": np.ones((2, 3), np.float32) for n in range(2)} for name in ("a", "b")]
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index = {"metadata": {"total_size": 96}, "weight_map": places}
    return {
        "model.safetensors.index.json": _json(index),
        **{file: safetensors_bytes(part) for file, part in zip(files, parts, strict=True)},
    }


_HADAMARD = ("w1_a", "w1_b", "w2_a", "w2_b")


def _lora_tensors(spelling: str) -> dict[str, np.ndarray]:
    down, up = (np.ones(shape, np.float32) for shape in ((2, 4), (4, 2)))
    if spelling == "kohya":
        name = "lora_unet_mid_block_attentions_0_proj_in"
        return {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": np.array(1.0),
        }
    if spelling == "lycoris":
        hadamard = {f"{place}.hada_{part}": down.T @ down for place in ("a", "b") for part in _HADAMARD}
        dora = {"c.lora_down.weight": down, "c.lora_up.weight": up, "c.dora_scale": up[:, :1]}
        kronecker = {"d.lokr_w1": down, "d.lokr_w2_a": down.T, "d.lokr_w2_b": down, "d.diff_b": up[0]}
        return {f"lycoris_{name}": value for name, value in (hadamard | dora | kronecker).items()}
    name = "unet.mid_block.attentions.0.proj_in"
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def lora_files(spelling: str) -> dict[str, bytes]:
    settings = {"lora_alpha": 4, "r": 2, "alpha_pattern": {"mid_block.*.proj_in": 3}, "use_rslora": False}
    if spelling == "peft":
        tensors = {f"base_model.model.{name}": value for name, value in _lora_tensors("peft").items()}
        return {
            "adapter_model.safetensors": safetensors_bytes(tensors),
            "adapter_config.json": _json(settings),
        }
    metadata = {"format": "pt"}
    if spelling == "diffusers":
        metadata["lora_adapter_metadata"] = json.dumps(
            {f"unet.{key}": value for key, value in settings.items()}
        )
    tensors = _lora_tensors("peft" if spelling == "diffusers" else spelling)
    return {"pytorch_lora_weights.safetensors": safetensors_bytes(tensors, metadata)}


_SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def _clip_files() -> dict[str, bytes]:
    letters = [*"abct1", *(f"{letter}</w>" for letter in "abct1"), "at</w>", *_SPECIAL]
    tokens = {
        "bos_token": _SPECIAL[0],
        "eos_token": {"content": _SPECIAL[1], "lstrip": False, "normalized": True},
    }
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": "!", **tokens}
    decoder = {"13": {"content": "!", "special": True, "single_word": False}}
    return {
        "vocab.json": _json({text: number for number, text in enumerate(letters)}),
        "merges.txt": b"#version: 0.2\na t</w>\n",
        "tokenizer_config.json": _json(settings | {"added_tokens_decoder": decoder}),
        "special_tokens_map.json": _json(tokens),
        "added_tokens.json": _json({"!": 13}),
    }


def _bert_files() -> dict[str, bytes]:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s"]
    settings = {"do_lower_case": True, "strip_accents": None, "model_max_length": 1e30}
    return {"vocab.txt": "\n".join(words).encode(), "tokenizer_config.json": _json(settings)}


def _spiece() -> bytes:
    """A sentencepiece model of a few pieces."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    pieces = [
        ("<pad>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<unk>", 0.0, 2),
        ("▁a", -1.0, 1),
        ("t", -2.0, 1),
        ("▁", -3.0, 1),
    ]
    message = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind]))
        for text, score, kind in pieces
    )
    return message + field(2, bytes([3 << 3, 1])) + field(3, b"\x0a\x03nmt")


def t5_files() -> dict[str, bytes]:
    return {"spiece.model": _spiece(), "tokenizer_config.json": _json({"extra_ids": 3, "eos_token": "</s>"})}


def _fast_files(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same tokenizer as a tokenizer.json."""
    tokenizer = _in_folder(files, checkpoints.load_tokenizer)
    return {
        "tokenizer.json": tokenizer.backend.to_str().encode(),
        "tokenizer_config.json": files["tokenizer_config.json"],
    }


def _in_folder(files: Mapping[str, bytes], call: Callable[[Path], Any]) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files)
        return call(Path(folder))


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files of a reader."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _tokenizer(folder: Path) -> None:
    assert checkpoints.load_tokenizer(folder)(["a cat"]).input_ids.shape[0] == 1


def _pipeline_files() -> dict[str, bytes]:
    index = {
        "_class_name": "LatentDiffusionPipeline",
        "_jaxldm_version": "0.2.0",
        "_images_per_device": 4,
        "transformer": ["jaxldm", "DiT"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "id2label": {"0": "a", "1": "b", "2": "c"},
    }
    parts = {
        "transformer": model_files(DIT),
        "vae": model_files(VAE),
        "scheduler": _scheduler_files("DDIMScheduler"),
    }
    files = {f"{part}/{name}": content for part, own in parts.items() for name, content in own.items()}
    return {"model_index.json": _json(index), **files}


def _index(folder: Path) -> None:
    pipelines.kind_of(folder)
    checkpoints.read_model_index(folder)


def _vae_alone() -> dict[str, bytes]:
    module, params = _network(VAE)

    def content(folder: Path) -> bytes:
        checkpoints.save_single_file(folder / "vae.safetensors", {"vae": (module, params)})
        return (folder / "vae.safetensors").read_bytes()

    return {"vae.safetensors": _in_folder({}, content)}


def _dit_alone() -> dict[str, bytes]:
    config = dataclasses.replace(DIT, scan=True)
    return {"dit.safetensors": _tensors(config)}


def _run_files() -> dict[str, bytes]:
    from jaxldm.training import RECIPES

    data_of_run = {"name": "mnist5k", "image_shape": [28, 28, 1], "class_names": [*"0123456789"]}
    recipe = RECIPES["smoke"].to_dict()
    rows = [f"1,{step},0.5,1.25,0.001,{step}.5" for step in range(1, 6)]
    log = "\n".join(["epoch,step,loss,grad_norm,learning_rate,seconds", *rows, ""])
    entries = {"format": 2, "recipe": recipe, "data": data_of_run, "versions": {"jaxldm": "0.2"}}
    return {"config.json": _json(entries), "log.csv": log.encode()}


def _run(folder: Path) -> None:
    from jaxldm import training

    training.read_recipe(folder)
    training.read_log(folder / "log.csv")


def _info_files() -> dict[str, bytes]:
    files = _run_files()
    return {"config.json": files["config.json"], "diffusion/log.csv": files["log.csv"]}


def _info(folder: Path) -> None:
    from jaxldm.commands.info import describe

    assert "resume" in describe(str(folder))


def _idx_files() -> dict[str, bytes]:
    header = b"\0\0\x08\x03" + struct.pack(">3I", 2, 4, 4)
    return {"images.gz": gzip.compress(header + bytes(range(32)), mtime=0), "plain.gz": header + bytes(32)}


def _idx(folder: Path) -> None:
    from jaxldm.data.idx_images import read_idx
    from jaxldm.errors import DataError

    try:
        read_idx(folder / "plain.gz")
    except DataError:
        read_idx(folder / "images.gz")


def _cache_files() -> dict[str, bytes]:
    content = io.BytesIO()
    columns = {"mean": np.zeros((3, 2), np.float32), "std": np.ones((3, 2), np.float32)}
    np.savez(content, __fingerprint__=np.array(["key", *columns]), **columns)
    return {"latents.npz": content.getvalue()}


def _cache(folder: Path) -> None:
    columns = {"mean": np.zeros((3, 2), np.float32), "std": np.ones((3, 2), np.float32)}
    found = data.cached(folder / "latents.npz", "key", lambda: columns)
    assert {name: column.shape for name, column in found.items()} == {"mean": (3, 2), "std": (3, 2)}


def _shard_rows(start: int, stop: int) -> dict[str, np.ndarray]:
    numbers = np.arange(start, stop, dtype=np.float32)
    return {"mean": np.stack([numbers, -numbers], 1), "label": numbers.astype(np.int32)}


def _row_shards() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        rows = data.sharded(folder, "key", 5, _shard_rows, 3)
        return {os.path.relpath(path, folder): Path(path).read_bytes() for path in rows.paths}


def _read_rows(folder: Path) -> None:
    found = data.sharded(folder, "key", 5, _shard_rows, 3).take(np.arange(5))
    for name, column in _shard_rows(0, 5).items():
        np.testing.assert_array_equal(found[name], column)


def _picture_files(suffix: str) -> dict[str, bytes]:
    from PIL import Image

    content = io.BytesIO()
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(content, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return {f"picture.{suffix}": content.getvalue()}


def _picture(folder: Path) -> None:
    from jaxldm.data.pictures import open_picture, rgb_of

    rgb_of(open_picture(next(folder.iterdir())))


def _tar(files: Mapping[str, bytes]) -> bytes:
    import tarfile

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, part in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(part)
            archive.addfile(member, io.BytesIO(part))
    return content.getvalue()


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content, one = io.BytesIO(), _picture_files("png")["picture.png"]
    columns = {"image": [{"bytes": one, "path": None}] * 12, "text": ["a cat"] * 12, "label": [0, 1] * 6}
    pq.write_table(pa.table(columns), content)
    return content.getvalue()


def _own_pictures(layout: str) -> dict[str, bytes]:
    """Twelve pictures as people have them."""
    one = _picture_files("png")["picture.png"]
    if layout == "parquet":
        return {"a.parquet": _parquet()}
    if layout == "shard":
        parts = {f"{n}.png": one for n in range(12)} | {f"{n}.txt": b"a cat" for n in range(6)}
        return {"a.tar": _tar(parts | {f"{n}.json": _json({"caption": "a dog"}) for n in range(6, 12)})}
    pictures = {f"{n}.png": one for n in range(12)}
    lines = [json.dumps({"file_name": name, "text": "a cat"}) for name in pictures]
    return pictures | {"metadata.jsonl": "\n".join(lines).encode()}


def _folder(folder: Path) -> None:
    data.load_folder(folder, image_size=8, max_skipped=1).arrays("test")


def _npz(**arrays: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    return content.getvalue()


def _images(folder: Path) -> None:
    for batch in open_image_set(folder / "images.npz").batches(2):
        assert batch.shape[1:] == (6, 5, 3)


def _pickled() -> bytes:
    """Weights as jax-fid passes them on: a pickle of nested dictionaries of arrays."""
    return pickle.dumps({"Mixed_5b": {"branch1x1": {"conv": {"kernel": np.ones((1, 1, 2, 3), np.float32)}}}})


def _shard(folder: Path) -> None:
    for tensor in open_weights(folder, "model")[1].values():
        np.asarray(tensor)


@functools.cache
def readers() -> dict[str, Reader]:
    """All readers by name; makes their files."""
    named: dict[str, Reader] = {
        f"config of {name}": Reader(_config_files(name), _config, 1.0) for name in ARCHITECTURES
    }
    for name in SCHEDULERS:
        named[f"scheduler {name}"] = Reader(_scheduler_files(name), _scheduler, 2.0)
    for spelling in ("kohya", "diffusers", "peft", "lycoris"):
        named[f"LoRA of {spelling}"] = Reader(lora_files(spelling), checkpoints.load_lora, 3.0)
    for name, files in (("CLIP", _clip_files()), ("BERT", _bert_files()), ("T5", t5_files())):
        named[f"tokenizer of {name}"] = Reader(files, _tokenizer, 3.0)
        named[f"tokenizer.json of {name}"] = Reader(_fast_files(files), _tokenizer, 2.0)
    for suffix in ("png", "jpg", "gif"):
        named[f"picture {suffix}"] = Reader(_picture_files(suffix), _picture, 1.0)
    for layout in ("parquet", "shard", "metadata.jsonl"):
        named[f"own pictures, {layout}"] = Reader(_own_pictures(layout), _folder, 1.0)
    tensors = {"a.weight": np.ones((2, 3), np.float32), "blocks.0.b": np.zeros(5, np.float16)}
    one_file = {"a.safetensors": safetensors_bytes(tensors)}
    return named | {
        "safetensors": Reader(one_file, lambda folder: read_safetensors(folder / "a.safetensors"), 8.0),
        "shards": Reader(_shards(), _shard, 4.0),
        "model_index.json": Reader({"model_index.json": _pipeline_files()["model_index.json"]}, _index, 4.0),
        "pipeline folder": Reader(_pipeline_files(), pipelines.load, 0.15),
        "model folder of VAE": Reader(model_files(VAE), checkpoints.load, 0.3),
        "model folder of CLIP": Reader(model_files(CLIP), checkpoints.load, 0.3),
        "model folder of DiT": Reader(model_files(DIT), checkpoints.load, 0.3),
        "single file of a VAE": Reader(
            _vae_alone(), lambda folder: checkpoints.load_single_file(folder / "vae.safetensors"), 0.3
        ),
        "original file of DiT": Reader(
            _dit_alone(),
            lambda folder: checkpoints.load_dit_file(folder / "dit.safetensors", num_heads=2),
            0.3,
        ),
        "run folder": Reader(_run_files(), _run, 4.0),
        "jaxldm info of a run": Reader(_info_files(), _info, 2.0),
        "images in .npz": Reader(
            {"images.npz": _npz(arr_0=np.arange(270).astype(np.uint8).reshape(3, 6, 5, 3))}, _images, 2.0
        ),
        "moments in .npz": Reader(
            {"moments.npz": _npz(mu=np.zeros(4), sigma=np.eye(4))},
            lambda folder: read_statistics(folder / "moments.npz"),
            1.0,
        ),
        "weights in a pickle": Reader(
            {"weights.pickle": _pickled()},
            lambda folder: checkpoints.read_weights(folder / "weights.pickle"),
            2.0,
        ),
        "IDX": Reader(_idx_files(), _idx, 2.0),
        "latents cache": Reader(_cache_files(), _cache, 2.0),
        "shards of latents": Reader(_row_shards(), _read_rows, 2.0),
    }
