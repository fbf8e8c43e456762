"""`jaxldm prune`: a folder that is drawn from and trained further, and what is refused."""

import numpy as np
import pytest
from PIL import Image
from tiny_models import latent_pipeline, pixel_pipeline

from jaxldm import cli, pipelines

SMALL = ("--num-images", 6, "--timesteps", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    pipelines.save(pixel_pipeline(depth=2, num_heads=4, patch_size=2, in_channels=3), folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(6):
        path = folder / "abc"[n % 3] / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 40 * n, np.uint8)).save(path)
    return folder


def command(capsys, *words):
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_half_of_a_model_is_trained_further_and_sampled(model, pictures, tmp_path, capsys):
    out, run = tmp_path / "half", tmp_path / "run"
    code, said, err = command(capsys, "prune", model, "--data", pictures, *SMALL, "--output-dir", out)
    assert (code, err) == (0, "")
    assert "2 of 4 heads and 32 of 64 channels of each block" in said
    assert f"train finetune --from {out} --data" in said
    small = pipelines.load(out)
    config = small.denoiser.config
    assert (config.num_heads, config.head_dim, config.mlp_ratio) == (2, 4, 2.0)
    words = ("--from", out, "--data", pictures, "--method", "full", "--run-dir", run, "--epochs", 1)
    code, _, err = command(capsys, "train", "finetune", *words, "--sample-every", 0, "--quiet")
    assert (code, err) == (0, "")
    tuned = pipelines.load(run)
    assert tuned.denoiser.config == config
    moved = [row for row in pipelines.compare(small, tuned) if row.difference]
    assert moved


def test_what_cannot_be_pruned_is_refused_in_one_line(model, pictures, tmp_path, capsys):
    pipelines.save(latent_pipeline(), tmp_path / "unet")
    for words, match in (
        ((model,), "does not say what it was trained on: give --data"),
        ((model, "--data", pictures, "--heads", 0), "--heads must be"),
        ((model, "--data", pictures, "--heads", 0.1), "heads=0.1 keeps none of the 4 heads of a block"),
        ((model, "--data", pictures, "--heads", 1, "--mlp", 1), "leave everything"),
        ((model, "--data", pictures, "--output-dir", model), "is the model's own folder"),
        ((model, "--data", pictures, "--timesteps", 0), "--timesteps must be"),
        ((tmp_path / "unet", "--data", pictures), "pruning is for DiT and SiT"),
    ):
        own = () if "--output-dir" in words else ("--output-dir", tmp_path / "out")
        code, _, err = command(capsys, "prune", *words, *own)
        assert code == 2 and match in err and err.count("\n") == 1 and len(err) < 400, err
    assert not (tmp_path / "out").exists()
