"""`jaxldm sample` and `jaxldm info` of a DiT folder, and what a forward pass of a preset costs."""

import numpy as np
import pytest
from command_lines import complaint, run
from dit_folders import write_dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dit(tmp_path_factory.mktemp("cli") / "dit")


def test_sample_draws_classes_from_a_folder_of_diffusers(capsys, folder, tmp_path):
    words = ["--num-inference-steps", "2", "--dtype", "float32", "--output-dir", tmp_path / "out"]
    code, out, _ = run(capsys, "sample", folder, "--class-labels", "207", "3", *words)
    assert code == 0 and "2 images" in out
    saved = np.load(tmp_path / "out" / "samples.npz")
    assert saved["images"].shape == (2, 16, 16, 3) and saved["labels"].tolist() == [207, 3]
    assert "knows no texts" in complaint(capsys, "sample", folder, "--prompt", "a cat")


def test_a_folder_of_diffusers_is_shown_from_the_inside(capsys, folder, tmp_path):
    words = [
        "--class-labels",
        "beast 207",
        3,
        "--num-images",
        4,
        "--num-inference-steps",
        2,
        "--output-dir",
        tmp_path,
    ]
    code, out, err = run(capsys, "inspect", folder, *words)
    assert code == 0 and not err and "no run folder, so it has no checkpoints" in out
    page = (tmp_path / "index.html").read_text()
    assert "Class animal 207, beast 207, seen from one patch" in page and page.count("<img") == 6
    assert "4 images that the model drew" in page and "transformer_blocks_1.attn1 " in page


def test_info_says_what_it_draws(capsys, folder):
    code, out, _ = run(capsys, "info", folder)
    assert code == 0 and "8x8x4 latents -> 16x16x3 images" in out and "0 to 999" in out


def test_info_of_a_preset_says_what_a_forward_pass_costs(capsys):
    code, out, _ = run(capsys, "info", "dit-s-8")
    assert code == 0 and "a forward pass (1x32x32x4) is 0.358 G multiply-accumulates; XLA plans" in out
    assert "MB for it in addition to the weights (in float32)" in out
    # What takes minutes to compile is only counted.
    out = run(capsys, "info", "mini-unet")[1]
    assert "0.030 G multiply-accumulates\n" in out
