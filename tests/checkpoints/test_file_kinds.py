"""A file given to the option of another kind is named as what it is, with its own option."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from jaxldm import checkpoints
from jaxldm.checkpoints.file_kinds import kind_of_file
from jaxldm.errors import CheckpointError

MATRIX = np.zeros((4, 4), np.float32)
LORA = "a LoRA, not", "--lora", "pipelines.with_lora"
ADAPTER = "an IP-Adapter, not", "--ip-adapter", "pipelines.with_ip_adapter"
WORD = "a file of textual inversion, not", "--embedding", "pipelines.with_embedding"
FILES = {
    "peft": (["unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_B.weight"], LORA),
    "kohya": (["lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha"], LORA),
    "old": (["unet.a.processor.to_q_lora.down.weight", "unet.a.processor.to_q_lora.up.weight"], LORA),
    "lycoris": (["lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2"], LORA),
    "adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], ADAPTER),
    "face": (["image_proj.proj.weight", "ip_adapter.0.to_q_lora.down.weight"], ADAPTER),
    "word": (["<cat-toy>"], WORD),
    "a1111": (["emb_params"], WORD),
    "sdxl": (["clip_l", "clip_g"], WORD),
}
TAKES = {
    LORA: checkpoints.load_lora,
    ADAPTER: checkpoints.load_ip_adapter,
    WORD: checkpoints.load_embedding,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_said_to_be_that(tmp_path, name):
    names, own = FILES[name]
    path = tmp_path / "a.safetensors"
    save_file(dict.fromkeys(names, MATRIX), path)
    for kind, load in TAKES.items():
        if kind != own:
            with pytest.raises(CheckpointError) as caught:
                load(path)
            assert all(words in str(caught.value) for words in (str(path), *own)), caught.value
            assert len(str(caught.value)) < len(str(path)) + 120


def test_a_pickle_of_another_kind_than_a_lora(tmp_path):
    word = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 4)}, "name": "cat"}
    adapter = {
        "image_proj": {"proj.weight": torch.zeros(4, 4)},
        "ip_adapter": {"1.to_k_ip.weight": torch.zeros(4)},
    }
    for name, tensors, own in (("a.pt", word, WORD), ("b.bin", adapter, ADAPTER)):
        torch.save(tensors, tmp_path / name)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.load_lora(tmp_path / name)
        assert all(words in str(caught.value) for words in own), caught.value
    torch.save({"lora_unet_a.lora_up.weight": torch.zeros(4, 4)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="is a pickle file"):
        checkpoints.load_lora(tmp_path / "c.pt")


def test_files_of_none_of_these_kinds_are_not_mistaken():
    for names in (
        ["conv_in.weight", "conv_in.bias"],
        ["control_model.input_blocks.0.0.weight"],
        ["lora_unet_a.diff"],
        ["weight.of.one.layer"],
        [],
    ):
        assert kind_of_file(dict.fromkeys(names, MATRIX)) is None, names
