"""Training a ControlNet: what it is at first, what stays to the last bit, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from finetuned import FEW, changed, write_model
from PIL import Image
from tiny_models import random_params

from jaxldm import checkpoints, data, models, pipelines, training
from jaxldm.commands.controlnet import Controlnet
from jaxldm.commands.info import describe
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError
from jaxldm.pipelines.runs import CONTROL_FOLDER
from jaxldm.training.control_pictures import ControlledRows
from jaxldm.training.finetuning import tuned_of

pytestmark = pytest.mark.usefixtures("shapes_once")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random model of Stable Diffusion's kind whose U-Net has a middle, as a ControlNet needs it."""
    folder = write_model(tmp_path_factory.mktemp("source"))
    pipe = pipelines.load(folder)
    fields = vars(pipe.unet.config) | {"mid_block_type": "UNetMidBlock2DCrossAttn"}
    unet = models.from_config(models.UNet2DConditionConfig(**fields))
    pipelines.save(pipe.replace(unet=pipelines.Network(unet, random_params(unet))), folder.parent / "whole")
    return folder.parent / "whole"


def write_pictures(folder, **lines):
    """Four pictures with captions and condition pictures, as metadata.jsonl names them."""
    (folder / "edges").mkdir(parents=True)
    entries = []
    for n in range(4):
        for place, seed in ((f"{n}.png", n), (f"edges/{n}.png", n + 10)):
            pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / place)
        entries.append({"file_name": f"{n}.png", "conditioning_image": f"edges/{n}.png", "text": f"cat {n}"})
        entries[-1]["text"] = ["a red cat", "a dark cat", "a tall cat", "a cat"][n]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "metadata.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


def trained(source, pictures, run_dir, **options):
    recipe = training.finetune_recipe(source, pictures, "controlnet", **{**FEW, **options})
    return training.train(recipe, run_dir, devices=1, log=lambda line: None, bar=False)


@pytest.fixture(scope="module")
def run(source, pictures, tmp_path_factory, compile_once):
    options = {"epochs": 40, "save_every": 20, "sample_every": 40, "sample_steps": 1, "learning_rate": 3e-3}
    return trained(source, pictures, tmp_path_factory.mktemp("runs") / "control", **options)


def inputs():
    keys = jax.random.split(jax.random.key(3), 3)
    return (
        jax.random.normal(keys[0], (2, 8, 8, 4)),
        jnp.array([10.0, 700.0]),
        jax.random.normal(keys[1], (2, 5, 8)),
        jax.random.uniform(keys[2], (2, 16, 16, 3)),
    )


def test_at_first_it_is_the_model_bit_for_bit(source):
    pipe = pipelines.load(source)
    recipe = training.FinetuneRecipe(source=str(source), control=training.ControlRecipe())
    tuned = tuned_of(recipe, pipe)
    params = tuned.network(tuned.init(jax.random.key(0)), tuned.frozen)
    x, t, text, picture = inputs()
    text = {"encoder_hidden_states": text}
    found = jax.jit(tuned.call)(params, x, t, {**text, "control_image": picture})
    wanted = jax.jit(models.network(pipe.unet.module))(pipe.unet.params, x, t, text)
    np.testing.assert_array_equal(found, wanted)


def test_the_model_stays_and_the_loss_falls(source, run):
    before = pipelines.load(source)
    after = pipelines.load(source, controlnet=run.path)
    assert not changed(before, pipelines.with_control(after, []))
    loss = training.read_log(run.stage("finetune").log)["loss"]
    assert len(loss) == 80 and np.mean(loss[-20:]) < 0.95 * np.mean(loss[:20])
    step = training.kept_steps(run.path, "finetune")[-1]
    manifest = run.path / "finetune" / "checkpoints" / str(step) / "manifest.json"
    assert "frozen" not in manifest.read_text()


def test_the_result_draws_along_a_picture(source, run):
    pipe = pipelines.load(source, controlnet=run.path)
    options = {"num_inference_steps": 2, "output": "latents", "height": 16, "width": 16}
    images = [
        pipe(jax.random.key(0), "a cat", control_image=np.full((16, 16, 3), grey, np.uint8), **options)
        for grey in (0, 255)
    ]
    assert np.abs(images[0] - images[1]).max() > 1e-3
    assert list((run.path / "finetune" / "samples").glob("*.png"))
    assert f"--controlnet {run.path} --control-image {run.path}/finetune/control-images/0.png" in describe(
        str(run.path)
    )
    with pytest.raises(CheckpointError, match=r"holds a ControlNet .* --control-image FILE --controlnet"):
        pipelines.load(run.path)


def test_diffusers_has_the_same_residuals(run):
    import torch
    from diffusers import ControlNetModel

    theirs = ControlNetModel.from_pretrained(run.path / CONTROL_FOLDER)
    ours, params = checkpoints.load(run.path / CONTROL_FOLDER)
    x, t, text, picture = inputs()
    given = ours.apply({"params": params}, x, t, text, picture)
    planes = [torch.from_numpy(np.array(each).transpose(0, 3, 1, 2)) for each in (x, picture)]
    with torch.no_grad():
        down, middle = theirs(
            planes[0],
            torch.from_numpy(np.array(t)),
            torch.from_numpy(np.array(text)),
            planes[1],
            return_dict=False,
        )
    found = (*given["down_block_additional_residuals"], given["mid_block_additional_residual"])
    assert len(found) == len(down) + 1
    for own, other in zip(found, (*down, middle), strict=True):
        assert np.abs(own).max() > 1e-3
        np.testing.assert_allclose(own, other.numpy().transpose(0, 2, 3, 1), atol=1e-4)


def test_a_killed_run_goes_on_to_the_same_bits(run, tmp_path):
    """From the checkpoint of step 40, by the command without the model and the pictures."""
    shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / CONTROL_FOLDER)
    shutil.rmtree(tmp_path / "run" / "finetune" / "checkpoints" / "80")
    with pytest.raises(CheckpointError, match=r"no finished ControlNet yet: .*train controlnet --run-dir"):
        pipelines.load(training.read_recipe(run.path).finetune.source, controlnet=tmp_path / "run")
    recipe = Controlnet(run_dir=str(tmp_path / "run"), resume=True).make_recipe(tmp_path / "run")
    assert recipe == training.read_recipe(run.path)
    said = []
    again = training.train(recipe, tmp_path / "run", resume=True, devices=1, log=said.append, bar=False)
    assert "resuming from the checkpoint of step 40" in said
    file = f"{CONTROL_FOLDER}/diffusion_pytorch_model.safetensors"
    assert (again.path / file).read_bytes() == (run.path / file).read_bytes()


def test_control_images_are_those_of_the_line_or_edges(pictures, source):
    rows = data.load_folder(pictures, image_size=16, hold_out=False).rows("train")
    names = [example.name for example in rows.examples]
    assert sorted(names) == ["0.png", "1.png", "2.png", "3.png"]
    found = rows.control_images(np.arange(4))
    for name, own in zip(names, found, strict=True):
        np.testing.assert_array_equal(
            own, np.asarray(Image.open(pictures / "edges" / name)) / np.float32(255)
        )


def test_edges_are_sobels():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 7, 9, 1)).astype(np.float32)
    y = (images[..., 0].astype(np.float64) + 1) / 2
    both = [[scipy.ndimage.sobel(each, axis, mode="nearest") for each in y] for axis in (0, 1)]
    wanted = np.minimum(1, np.hypot(*map(np.stack, both)) / 4)
    np.testing.assert_allclose(data.edges(images)[..., 0], wanted, atol=1e-6)
    assert not data.edges(np.full((1, 4, 4, 3), 0.3, np.float32)).any()


def refused(source, pictures, run_dir, error, match, **options):
    with pytest.raises(error, match=match):
        trained(source, pictures, run_dir, **options)
    assert not run_dir.exists()


def test_what_cannot_be_is_refused_in_one_line(source, pictures, tmp_path):
    """Before anything is written or compiled."""
    run_dir = tmp_path / "run"
    plain, sizes, lost = (shutil.copytree(pictures, tmp_path / name) for name in ("plain", "sizes", "lost"))
    lines = [json.loads(line) for line in (plain / "metadata.jsonl").read_text().splitlines()]
    shutil.rmtree(plain / "edges")
    text = "".join(json.dumps({**line, "conditioning_image": ""}) + "\n" for line in lines)
    (plain / "metadata.jsonl").write_text(text)
    refused(source, plain, run_dir, DataError, r"has no condition picture: .*--control-images edges")
    Image.new("RGB", (16, 20)).save(sizes / "edges" / "2.png")
    refused(
        source, sizes, run_dir, DataError, r"condition picture of 2\.png has 16x20 pixels, and that has 16x16"
    )
    (lost / "edges" / "1.png").unlink()
    refused(source, lost, run_dir, DataError, r"1\.png: there is no edges/1\.png, its condition picture")
    (plain / "metadata.jsonl").unlink()
    refused(source, plain, run_dir, DataError, "no captions: .*--caption", control_images="edges")
    refused(source, pictures, run_dir, InvalidArgumentError, "rank has no effect with method contr", rank=4)
    no_middle = source.parent / "sd"
    refused(
        no_middle,
        pictures,
        run_dir,
        CheckpointError,
        "no ControlNet can be made for the U-Net of .*mid_block",
    )


def test_one_caption_and_edges_need_nothing_but_pictures(source, pictures, tmp_path):
    plain = shutil.copytree(pictures, tmp_path / "plain")
    shutil.rmtree(plain / "edges")
    (plain / "metadata.jsonl").unlink()
    recipe = training.finetune_recipe(source, plain, "controlnet", control_images="edges", caption="a cat")
    dataset = recipe.load_data()
    training.check_recipe(recipe, dataset, training.make_mesh(1))
    rows = dataset.rows("train")
    found = ControlledRows(rows, rows, "edges").take(np.arange(2))
    wanted = data.edges(found["image"])
    np.testing.assert_array_equal(found["control_image"], np.broadcast_to(wanted, (2, 16, 16, 3)))
