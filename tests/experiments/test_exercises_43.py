"""The exercises of lecture 43 run to their end with tiny settings; each checks what it shows by itself."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from amused_folders import write_amused
from PIL import Image

from experiments.lecture43 import e4_dpmpp_on_dit, e7_prompts, e8_self_test, e10_interpolants
from jaxldm import data, metrics, models
from jaxldm.errors import DataError, InvalidArgumentError


def test_interpolants(tmp_path, capsys):
    e10_interpolants.main(
        e10_interpolants.Interpolants(output_dir=tmp_path, num_samples=2000, num_inference_steps=20)
    )
    shown = capsys.readouterr().out
    assert "FAIL" not in shown and shown.count("PASS") == 25
    assert (tmp_path / "interpolants.png").stat().st_size > 0


def test_dpmpp_on_dit(random_run, tmp_path, capsys):
    options = e4_dpmpp_on_dit.DPMppOnDiT(
        random_run("smoke-dit"), tmp_path, (("dpmpp_2m", 4), ("dpmpp_2m", 2)), num_images=20
    )
    e4_dpmpp_on_dit.main(options)
    shown = capsys.readouterr().out
    assert "| dpmpp_2m | 4 |" in shown and "| dpmpp_2m | 2 |" in shown
    assert (tmp_path / "solvers.png").exists()


def test_without_a_run_it_says_how_to_make_one(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"experiments\.lecture43\.tiny_dit"):
        e4_dpmpp_on_dit.main(e4_dpmpp_on_dit.DPMppOnDiT(tmp_path / "missing"))


def test_self_test(capsys):
    e8_self_test.main(e8_self_test.SelfTest(num_images=64, steps=(1, 2, 8, 12)))
    shown = capsys.readouterr().out
    assert "FAIL" not in shown and shown.count("PASS") == 17


def test_prompts_on_a_masked_image_model(tmp_path, capsys, monkeypatch):
    """On random weights; CLIP's folder has the tokenizer of the text encoder."""
    folder, clip = write_amused(tmp_path / "amused"), tmp_path / "clip"
    shutil.copytree(folder / "tokenizer", clip)
    vocabulary = len(json.loads((clip / "vocab.json").read_text()))
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=tower | {"vocab_size": vocabulary, "eos_token_id": vocabulary - 1},
        vision_config=tower | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(clip)
    prompts = ("a cat", "the bat sat", "dog, dog!")
    options = e7_prompts.Prompts(
        folder, clip, prompts, num_images=2, num_inference_steps=3, output_dir=tmp_path / "out"
    )
    find, found = metrics.clip_similarities, []

    def spy(module, params, tokenizer, images, prompts):
        found.extend([images, find(module, params, tokenizer, images, prompts)])
        return found[1]

    monkeypatch.setattr(metrics, "clip_similarities", spy)
    e7_prompts.main(options)
    shown = capsys.readouterr().out
    assert "6 images in 3 steps" in shown and all(f"| {prompt} | " in shown for prompt in prompts)
    with Image.open(tmp_path / "out" / "prompts.png") as picture:
        border = (np.asarray(picture) == 32).all(axis=2)  # the lines between the images
        width, height = 2 * 8 + 3 * 2, 3 * 8 + 4 * 2
        rows, columns = np.flatnonzero(border.sum(1) == width), np.flatnonzero(border.sum(0) == height)
        assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (width, height)
    # The score is the cosine that transformers finds.
    images, cosines = found
    tokenizer, reference = (
        kind.from_pretrained(clip) for kind in (transformers.CLIPTokenizer, transformers.CLIPModel)
    )
    pixels = models.clip_pixel_values(data.to_uint8(images), 16).transpose(0, 3, 1, 2)
    tokens = tokenizer(list(prompts), padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = reference(input_ids=tokens, pixel_values=torch.from_numpy(pixels.copy())).logits_per_image
        expected = logits / reference.logit_scale.exp()
    np.testing.assert_allclose(cosines, expected.numpy(), atol=1e-4)
    with pytest.raises(InvalidArgumentError, match="needs a CLIPModel"):
        find(models.build("tiny-dit"), {}, None, images, prompts)
    assert metrics.clip_score(cosines, [0, 0, 1, 1, 2, 2]) == pytest.approx(
        np.mean([100 * max(cosines[n, n // 2], 0) for n in range(6)])
    )
    with pytest.raises(DataError, match=r"must be \[6\]"):
        metrics.clip_score(cosines, [0, 1])


def test_without_the_model_it_says_where_to_find_it(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"amused\.md"):
        e7_prompts.main(e7_prompts.Prompts(tmp_path / "missing"))
