"""Files of textual inversion in every form that people have, against diffusers with the same file loaded."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from reference_pipelines import open_reference, write_sd, write_sdxl
from safetensors.torch import save_file

from jaxldm import checkpoints, pipelines
from jaxldm.errors import CheckpointError, InvalidArgumentError

WORD = "zebra"
PROMPT = f"a {WORD} at"
VECTORS = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
VECTORS_2 = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("words")
    return {"sd": write_sd(root / "sd"), "sdxl": write_sdxl(root / "sdxl")}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: pipelines.load(folder) for name, folder in folders.items()}


def a1111(vectors):
    """As its `Embedding.save` writes it."""
    token = {"*": torch.tensor(265)}
    content = {"string_to_token": token, "string_to_param": {"*": vectors}, "name": WORD, "step": 7}
    return content | {"sd_checkpoint": None, "sd_checkpoint_name": None}


def written(path, form, vectors=VECTORS):
    if form in ("diffusers .bin", "A1111 .pt", "parameter .pt"):
        path = path / f"{WORD}{form[-4:] if form.endswith('.bin') else '.pt'}"
        kept = torch.nn.Parameter(vectors) if form == "parameter .pt" else vectors
        torch.save({WORD: vectors} if "bin" in form else a1111(kept), path)
    else:
        path = path / f"{WORD}.safetensors"
        name = WORD if form == "diffusers" else "emb_params"
        save_file({name: vectors}, path)
    return path


FORMS = ["diffusers", "diffusers .bin", "A1111", "A1111 .pt", "parameter .pt"]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_the_states_of_a_prompt_are_those_of_diffusers(folders, pipes, tmp_path, form, count):
    path = written(tmp_path, form, VECTORS[:count])
    reference = open_reference(StableDiffusionPipeline, folders["sd"])
    if form != "A1111":  # of which diffusers does not know the name
        reference.load_textual_inversion(path)
    else:
        reference.load_textual_inversion({WORD: VECTORS[:count]})
    states = reference.encode_prompt(PROMPT, "cpu", 1, do_classifier_free_guidance=False)[0]
    pipe = pipelines.with_embedding(pipes["sd"], path)
    cond, _ = pipe.encode_prompts([PROMPT])
    np.testing.assert_allclose(cond["encoder_hidden_states"], states.detach(), atol=1e-4)
    assert (
        np.abs(
            cond["encoder_hidden_states"] - pipes["sd"].encode_prompts([PROMPT])[0]["encoder_hidden_states"]
        ).max()
        > 0.01
    )
    renamed = pipelines.with_embedding(pipes["sd"], path, word="<horse>").encode_prompts(["a <horse> at"])
    np.testing.assert_array_equal(renamed[0]["encoder_hidden_states"], cond["encoder_hidden_states"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_pair_for_both_encoders_of_sdxl(folders, pipes, tmp_path, suffix):
    """Also in chunks, where the word becomes its tokens as well."""
    path, pair = tmp_path / f"{WORD}{suffix}", {"clip_g": VECTORS_2, "clip_l": VECTORS}
    save_file(pair, path) if suffix == ".safetensors" else torch.save(pair, path)
    reference = open_reference(StableDiffusionXLPipeline, folders["sdxl"])
    for name, part in (("clip_l", ""), ("clip_g", "_2")):
        parts = {"tokenizer": getattr(reference, f"tokenizer{part}")}
        parts["text_encoder"] = getattr(reference, f"text_encoder{part}")
        reference.load_textual_inversion({WORD: pair[name]}, token=WORD, **parts)
    states, _, pooled, _ = reference.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    pipe = pipelines.with_embedding(pipes["sdxl"], path)
    for options in ({}, {"prompt_syntax": "chunks"}):
        cond, _ = pipe.encode_prompts([PROMPT], **options)
        np.testing.assert_allclose(cond["encoder_hidden_states"], states.detach(), atol=1e-4)
        np.testing.assert_allclose(cond["text_embeds"], pooled.detach(), atol=1e-4)
    pipelines.save(pipe, tmp_path / "saved")
    cond_again, _ = pipelines.load(tmp_path / "saved").encode_prompts([PROMPT])
    np.testing.assert_array_equal(cond_again["encoder_hidden_states"], cond["encoder_hidden_states"])


def test_one_encoder_of_sdxl_alone(pipes, tmp_path):
    path = written(tmp_path, "diffusers", VECTORS_2)
    pipe = pipelines.with_embedding(pipes["sdxl"], path)
    assert pipe.tokenizer is pipes["sdxl"].tokenizer and pipe.tokenizer_2 is not pipes["sdxl"].tokenizer_2


@pytest.mark.parametrize(
    ("family", "tensors", "words"),
    [
        ("sd", {WORD: VECTORS_2}, ["20 wide", "are 16", "another model; give some made for this one"]),
        ("sdxl", {"clip_l": VECTORS_2, "clip_g": VECTORS_2}, ["20 and 20 wide", "16 and 20"]),
        ("sd", {"clip_l": VECTORS, "clip_g": VECTORS_2}, ["16 and 20 wide"]),
        ("sdxl", {"clip_l": VECTORS, "clip_g": VECTORS_2[:1]}, ["different numbers"]),
        ("sd", {WORD: VECTORS * torch.nan}, ["a.safetensors holds NaN or infinity, in " + WORD]),
        ("sd", {"a": VECTORS, "b": VECTORS}, ["no file of one word", "a [3, 16]"]),
        ("sd", {WORD: VECTORS[None]}, ["no file of one word"]),
    ],
)
def test_files_that_do_not_fit_are_refused(pipes, tmp_path, family, tensors, words):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as error:
        pipelines.with_embedding(pipes[family], tmp_path / "a.safetensors")
    assert all(word in str(error.value) for word in words), error.value


def test_a_pickle_that_would_run_a_program_is_refused(pipes, tmp_path):
    class Program:
        def __reduce__(self):
            return eval, ("1 + 1",)

    torch.save({WORD: VECTORS, "more": Program()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"eval.*may run a program"):
        checkpoints.load_embedding(tmp_path / "a.pt")
    (tmp_path / "b.bin").write_bytes(json.dumps({}).encode())
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load_embedding(tmp_path / "b.bin")
    with pytest.raises(InvalidArgumentError, match="token of this tokenizer already"):
        pipelines.with_word(pipes["sd"], "<|endoftext|>", VECTORS.numpy())
