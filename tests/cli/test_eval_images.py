"""`jaxldm eval IMAGES --metrics`, with a small network in place of Inception."""

import json
import types

import jax
import numpy as np
import pytest
from command_lines import complaint, run
from PIL import Image

from jaxldm import checkpoints, metrics, models
from jaxldm.commands import eval_images
from jaxldm.metrics.extraction import FeatureNetwork


def toy_network():
    directions = np.random.default_rng(0).normal(size=[12, 5]).astype(np.float32) / 10

    def apply(params, x):
        rows = x.reshape(x.shape[0], -1) @ params
        return {"pool": rows, "spatial": rows[:, :3], "logits": rows}

    layers = ("pool", "spatial", "logits")
    return FeatureNetwork(
        "inception", "tf1", "f" * 64, layers, lambda x: x.astype(np.float32), apply, directions
    )


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    files = {"inception": {"file": "toy.pth", "sha256": "f" * 64}}
    monkeypatch.setattr(eval_images, "load_networks", lambda *_: ({"inception": toy_network()}, None, files))
    monkeypatch.setenv(eval_images.FEATURE_CACHE, str(tmp_path / "cache"))


@pytest.fixture
def folders(tmp_path):
    random = np.random.default_rng(1)
    made = []
    for name, number in (("drawn", 20), ("real", 24)):
        (tmp_path / name).mkdir()
        images = random.integers(0, 256, [number, 2, 2, 3], dtype=np.uint8)
        for index, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{index:02}.png")
        made.append((tmp_path / name, images))
    return made


def test_every_figure_stands_beside_its_weights_and_variant(capsys, folders, tmp_path):
    (drawn, x), (real, y) = folders
    words = [
        "--real",
        real,
        "--metrics",
        "fid",
        "sfid",
        "kid",
        "is",
        "prdc",
        "mind",
        "--json",
        tmp_path / "o.json",
    ]
    code, out, err = run(capsys, "eval", drawn, *words)
    assert code == 0
    report = json.loads((tmp_path / "o.json").read_text())
    network = toy_network()
    a, b = (np.asarray(network.apply(network.params, z.astype(np.float32))["pool"]) for z in (x, y))
    figures = report["metrics"]
    np.testing.assert_allclose(figures["fid"]["fid"], metrics.frechet_distance(a, b), rtol=1e-4)
    np.testing.assert_allclose(figures["mind"]["mind"], metrics.sliced_wasserstein(a, b), rtol=1e-4)
    assert set(figures) == {"fid", "sfid", "kid", "is", "prdc", "mind"}
    assert figures["prdc"].keys() == {"precision", "recall", "density", "coverage"}
    assert (report["num_images"], report["num_real"], report["resize"]) == (20, 24, "tf1")
    for figure in ("fid", "sfid", "kid", "is", "precision", "mind"):
        line = next(line for line in out.splitlines() if line.split()[:1] == [figure])
        assert line.endswith("inception tf1 ffffffffffff")
    assert f"SHA-256 {'f' * 64}" in out
    assert "20 images are fewer than the 2048 features" in err and "KID is over subsets of 20" in err
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 6


def test_an_npz_file_of_images_and_one_of_statistics(capsys, folders, tmp_path):
    (_, x), (_, y) = folders
    np.savez(tmp_path / "x.npz", x)
    np.savez(tmp_path / "y.npz", arr_0=y)
    words = ["--real", tmp_path / "y.npz", "--metrics", "fid,kid", "--json", tmp_path / "o.json", "--quiet"]
    code, out, _ = run(capsys, "eval", tmp_path / "x.npz", *words)
    assert code == 0 and out == ""
    assert json.loads((tmp_path / "o.json").read_text())["metrics"].keys() == {"fid", "kid"}
    np.savez(tmp_path / "moments.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    line = complaint(
        capsys, "eval", tmp_path / "x.npz", "--real", tmp_path / "moments.npz", "--metrics", "kid"
    )
    assert "kid needs the real images" in line
    np.savez(tmp_path / "moments.npz", mu=np.zeros(7), sigma=np.eye(7))
    line = complaint(
        capsys, "eval", tmp_path / "x.npz", "--real", tmp_path / "moments.npz", "--metrics", "fid"
    )
    assert "not of FID's network" in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--metrics", "fid"], "add --real"),
        ([], "add --real"),
        (["--metrics", "fdi", "--real", "{real}"], "did you mean 'fid'?"),
        (["--resize", "tf2", "--real", "{real}"], "resize variant"),
        (["--prompts", "x", "--real", "{real}"], "--prompts has no effect on fid, kid, prdc"),
        (["--batch-size", "0", "--real", "{real}"], "batch_size must be 1 or more"),
        (["--real", "{real}/absent"], "there are no images"),
        (["--real", "{real}", "--json", "{real}"], "is a folder"),
        (["--real", "{real}", "--json", "{real}/00.png"], "no JSON file: give another name"),
        (["--real", "{real}", "--metrics", ","], "--metrics names none: choose some of fid"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, folders, words, expected):
    (drawn, _), (real, _) = folders
    assert expected in complaint(capsys, "eval", drawn, *(word.format(real=real) for word in words))


def test_too_few_images_are_refused(capsys, folders, tmp_path):
    (tmp_path / "one").mkdir()
    Image.fromarray(np.zeros([2, 2, 3], np.uint8)).save(tmp_path / "one" / "a.png")
    line = complaint(capsys, "eval", tmp_path / "one", "--real", folders[1][0], "--metrics", "fid")
    assert "has 1 image, and fid needs at least 2" in line


def test_without_weights_the_line_says_which_file_to_get(capsys, folders, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv(eval_images.WEIGHTS, str(tmp_path / "no-weights"))
    (drawn, _), (real, _) = folders
    words = ["eval", drawn, "--real", real]
    line = complaint(capsys, *words)
    assert "pt_inception-2015-12-05-6726825d.pth" in line and "--inception FILE" in line and len(line) < 400
    assert "docs/metrics.md#the-weights" in line and "set JAXLDM_WEIGHTS to its folder" in line
    assert "facebook/dinov2-large" in complaint(capsys, *words, "--metrics", "fd-dinov2")
    assert "clip-vit-large-patch14-336" in complaint(capsys, *words, "--metrics", "cmmd")
    assert "vgg16-397923af.pth" in complaint(capsys, *words, "--metrics", "lpips")
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    line = complaint(capsys, *words, "--inception", tmp_path / "weights.pth")
    assert "unknown form" in line


def test_image_encoders_come_from_folders(capsys, folders, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv(eval_images.FEATURE_CACHE, "off")
    (drawn, x), (real, y) = folders
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
    vision = models.CLIPVisionConfig(image_size=28, intermediate_size=16, projection_dim=6, **sizes)
    for name, config in (("dinov2", models.Dinov2Config(image_size=28, **sizes)), ("clip", vision)):
        module = models.from_config(config)
        checkpoints.save(tmp_path / name, module, models.init(module, jax.random.key(0)))
    names = ["--metrics", "fd-dinov2", "cmmd", "--dinov2", tmp_path / "dinov2", "--clip", tmp_path / "clip"]
    words = ["eval", drawn, "--real", real, *names, "--json", tmp_path / "o.json", "--devices", 1]
    code, _, err = run(capsys, *words)
    assert code == 0, err
    report = json.loads((tmp_path / "o.json").read_text())
    module, params = checkpoints.load(tmp_path / "clip")
    a, b = (module.apply({"params": params}, models.clip_pixel_values(z, 28)).image_embeds for z in (x, y))
    np.testing.assert_allclose(report["metrics"]["cmmd"]["cmmd"], metrics.clip_mmd(a, b), rtol=1e-3)
    assert report["metrics"]["fd-dinov2"]["fd-dinov2"] > 0
    assert len({entry["sha256"] for entry in report["weights"].values()}) == 2
    line = complaint(capsys, *words[:4], "--metrics", "cmmd", "--clip", tmp_path / "dinov2")
    assert "holds a Dinov2Model" in line


def test_the_clip_score_of_images_and_their_texts(capsys, folders, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv(eval_images.FEATURE_CACHE, "off")
    drawn, x = folders[0]
    tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = models.CLIPTextConfig(vocab_size=573, max_position_embeddings=12, eos_token_id=572, **tower)
    vision = models.CLIPVisionConfig(image_size=28, patch_size=14, **tower)
    config = models.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    module = models.from_config(config)
    checkpoints.save(tmp_path / "clip", module, models.init(module, jax.random.key(0)))

    def tokenizer(texts, max_length):
        """The first token, the letters' numbers, the last one, as CLIP's has them."""
        letters = [[570, *text.encode()[-5:], *[572] * 4] for text in texts]
        return types.SimpleNamespace(input_ids=np.array(letters)[:, :max_length])

    monkeypatch.setattr(checkpoints, "load_tokenizer", lambda folder: tokenizer)
    texts = [f"picture {number:02}" for number in range(len(x))]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(texts) + "\n")
    words = ["eval", drawn, "--metrics", "clip-score", "--clip", tmp_path / "clip", "--prompts", prompts]
    code, _, err = run(capsys, *words, "--json", tmp_path / "o.json", "--devices", 1)
    assert code == 0, err
    found = json.loads((tmp_path / "o.json").read_text())["metrics"]["clip-score"]["clip-score"]
    module, params = checkpoints.load(tmp_path / "clip")
    pixels = models.clip_pixel_values(x, 28)
    logits = jax.jit(module.apply)({"params": params}, tokenizer(texts, 12).input_ids, pixels)
    cosines = np.asarray(logits) / np.exp(np.asarray(params["logit_scale"]))
    np.testing.assert_allclose(found, metrics.clip_score(cosines, range(len(x))), rtol=1e-3, atol=1e-3)
    prompts.write_text("one\ntwo\n")
    assert "has 2 lines" in complaint(capsys, *words)
    assert "--prompts FILE" in complaint(capsys, *words[:-2])
