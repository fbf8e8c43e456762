"""The exercises of lecture 43 run to their end with tiny settings; each checks what it shows by itself."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from amused_folders import write_amused
from PIL import Image

from experiments.lecture43 import (
    e1_e2_e3_shapes,
    e4_dpmpp_on_dit,
    e5_masked_images,
    e6_dit_against_unet,
    e7_prompts,
    e8_self_test,
    e10_interpolants,
    small_models,
)
from jaxldm import data, metrics, models, training
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


def test_masked_images(random_run, tmp_path, capsys, monkeypatch):
    """On random networks, whose training is taken for done."""
    runs = {name: training.RunFolder(random_run(f"smoke-{name}")) for name in ("masked", "dit")}
    for run, stage in zip(runs.values(), ("masked_tokens", "diffusion"), strict=True):
        run.stage(stage).path.mkdir()
        columns = "epoch,step,loss,grad_norm,learning_rate,seconds"
        run.stage(stage).log.write_text(f"{columns}\n1,1,2.0,1.0,0.001,0.5\n1,2,1.0,1.0,0.001,1.5\n")
    monkeypatch.setattr(e5_masked_images, "train", lambda options: runs)
    every = e5_masked_images.rows_of(e5_masked_images.MaskedImages(slow_steps=101))
    few = [dataclasses.replace(row, steps=row.steps if row.steps > 100 else row.steps // 3) for row in every]
    monkeypatch.setattr(e5_masked_images, "rows_of", lambda options: [few[0], few[1], few[6]])
    out = tmp_path / "out"
    out.mkdir()
    (out / "masked").mkdir()  # the runs lie where the results are written
    options = e5_masked_images.MaskedImages(out, num_images=20, timed_images=10)
    e5_masked_images.main(options)
    shown, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert "| masked tokens | 2 | 4 |" in shown and "| Tiny DiT, DDPM | 3 | 101 |" in shown
    assert results["trained"]["masked"]["updates"] == 2 and len(every) == 7
    assert [row["images_per_call"] for row in results["rows"]] == [10, 20, 20]
    assert "accuracy" not in results["rows"][-1] and 0 <= results["rows"][0]["accuracy"] <= 1
    text = (out / "results.md").read_text()
    assert text.count("| masked tokens |") == 2 and "| real test digits |" in text
    assert (out / "digits.png").stat().st_size > 0 and (out / "masked").is_dir()


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
        find(models.build("tiny-dit"), {}, lambda texts, max_length: None, images, prompts)
    assert metrics.clip_score(cosines, [0, 0, 1, 1, 2, 2]) == pytest.approx(
        np.mean([100 * max(cosines[n, n // 2], 0) for n in range(6)])
    )
    with pytest.raises(DataError, match=r"must be \[6\]"):
        metrics.clip_score(cosines, [0, 1])


def test_without_the_model_it_says_where_to_find_it(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"amused\.md"):
        e7_prompts.main(e7_prompts.Prompts(tmp_path / "missing"))


def test_small_models(random_run, tmp_path, capsys, monkeypatch):
    """E6 and E1 to E3 in their quick form: the second uses the model of the first, and trains one more."""
    options = {"run_dir": random_run("smoke-dit"), "models_dir": tmp_path / "models", "quick": True}
    trained, train, measure = [], small_models.run_job, small_models.measure_seconds
    monkeypatch.setattr(small_models, "run_job", lambda *args: trained.append(args) or train(*args))
    seconds = {"DiT-Tiny": {"epoch_seconds": 7.0, "sample_milliseconds": 3.0}}
    monkeypatch.setattr(small_models, "measure_seconds", lambda names, bench: seconds)
    e6 = e6_dit_against_unet.DiTAgainstUNet(**options, output_dir=tmp_path / "e6", models=("DiT-Tiny",))
    e6_dit_against_unet.main(e6)
    shown = capsys.readouterr().out
    assert "| DiT-Tiny | 0.0" in shown and "| 0.8 M | 7.0 | 3.0 |" in shown and "epochs in 7 s" in shown
    monkeypatch.setattr(small_models, "measure_seconds", lambda names, bench: measure(["no classes"], bench))
    monkeypatch.setattr(e1_e2_e3_shapes, "ROWS", {"as it is": "DiT-Tiny", "without": "no classes"})
    e1_e2_e3_shapes.main(e1_e2_e3_shapes.Shapes(**options, output_dir=tmp_path / "shapes"))
    shown = capsys.readouterr().out
    assert len(trained) == 2 and "| as it is | 0.0" in shown and "| no class |" in shown
    for name in ("e6/quick/quality-against-seconds.png", "e6/quick/digits.png", "shapes/quick/digits.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "e6" / "quick" / "table.md").exists() and (tmp_path / "models" / "quick").is_dir()


def test_equal_seconds_lie_between_measurements():
    curve = e6_dit_against_unet.Curve(np.array([2, 4]), np.array([0.2, 0.6]), np.array([16.0, 4.0]), 10.0)
    assert curve.at(20.0) == pytest.approx((2, 0.2, 16))
    assert curve.at(30.0) == pytest.approx((3, 0.4, 8))  # the distance falls by a factor


def test_the_small_models_are_as_large_as_they_say():
    """The lecture counts a transformer's 12 width^2 a block, without modulation and embedders."""
    digits = {"sample_size": 28, "in_channels": 1, "out_channels": 1}
    counts = {}
    for name in ("DiT-Tiny", "U-Net-Small", "U-Net-Medium"):
        model = small_models.MODELS[name]
        from_data = digits if model.preset == "mini-unet" else {}
        counts[name] = models.count_params(models.build(model.preset, **model.overrides, **from_data))
    assert 1.2e6 < counts["U-Net-Small"] < 1.3e6 and 4.4e6 < counts["U-Net-Medium"] < 4.6e6
    assert counts["DiT-Tiny"] == 1_275_408 and pytest.approx(0.8e6, rel=0.03) == 4 * 12 * 128**2
    assert pytest.approx(3.2e6, rel=0.03) == 4 * 12 * 256**2
