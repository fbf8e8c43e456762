"""Run folders and exported folders: bit-exact both ways, read by diffusers, refused when not whole."""

import errno
import functools
import inspect
import json
import os
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_folders import write_run
from tiny_models import latent_pipeline, pixel_pipeline, random_params

from jaxldm import checkpoints, models, pipelines, training
from jaxldm import diffusion as D
from jaxldm.checkpoints import folder as model_folder
from jaxldm.errors import CheckpointError, DataError, StorageError
from jaxldm.pipelines.families import FAMILIES
from jaxldm.training.hold import HeldFolder

WEIGHTS = model_folder.WEIGHTS_FILE


def assert_same_model(first, second):
    modules = [{name: part.module for name, part in pipe.networks.items()} for pipe in (first, second)]
    assert modules[0] == modules[1]
    assert first.prediction == second.prediction and first.scheduler == second.scheduler
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32)
        ),
        *({name: part.params for name, part in pipe.networks.items()} for pipe in (first, second)),
    )


@pytest.mark.parametrize(
    "pipe",
    [
        latent_pipeline(),
        pixel_pipeline(prediction=D.flow(D.Flow())),
        pixel_pipeline(prediction=D.edm(D.EDM())),
        latent_pipeline(prediction=D.v(D.VP.named("cosine", zero_terminal_snr=True))),
    ],
)
def test_an_export_reads_back_bit_for_bit(tmp_path, pipe):
    pipelines.save(pipe, tmp_path / "out")
    assert_same_model(pipelines.load(tmp_path / "out"), pipe)
    assert all(not row.difference for row in pipelines.compare(pipelines.load(tmp_path / "out"), pipe))
    assert pipelines.kind_of(tmp_path / "out") == "export"


@pytest.mark.parametrize("make", [latent_pipeline, pixel_pipeline])
def test_a_run_folder_and_its_export_are_the_same_model(tmp_path, make):
    pipe = make()
    run = write_run(tmp_path / "run", pipe)
    assert pipelines.kind_of(run) == "run"
    assert_same_model(pipelines.load(run), pipe)
    pipelines.save(pipelines.load(run), run / "export")
    assert_same_model(pipelines.load(run / "export"), pipe)


def test_the_layout_is_that_of_diffusers(tmp_path):
    pipelines.save(latent_pipeline(), tmp_path / "latent")
    pipelines.save(pixel_pipeline(), tmp_path / "pixel")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    model = ["config.json", WEIGHTS]
    assert files == {
        "latent/model_index.json",
        "pixel/model_index.json",
        "latent/scheduler/scheduler_config.json",
        "pixel/scheduler/scheduler_config.json",
        *(
            f"{place}/{name}"
            for place in ("latent/vae", "latent/unet", "pixel/transformer")
            for name in model
        ),
    }
    index = json.loads((tmp_path / "latent" / "model_index.json").read_text())
    assert index["_class_name"] == "LatentDiffusionPipeline" and index["unet"] == ["diffusers", "UNet2DModel"]


def test_diffusers_opens_the_parts_and_they_compute_the_same(tmp_path):
    """UNet2DModel, AutoencoderKL and the scheduler of diffusers, on the exported folder as it is."""
    pipe = latent_pipeline(prediction=D.v(D.VP.named("scaled_linear")))
    autoencoder = models.build(
        "sd-vae",
        block_out_channels=(4, 4),
        latent_channels=2,
        sample_size=8,
        in_channels=1,
        out_channels=1,
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipe = pipe.replace(vae=pipelines.Network(autoencoder, random_params(autoencoder)))
    pipelines.save(pipe, tmp_path / "out")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out", subfolder="vae").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"

    x, t, labels = (
        np.random.default_rng(0).standard_normal((2, 4, 4, 2)).astype(np.float32),
        500,
        np.array([1, 3]),
    )
    ours = jax.jit(lambda *inputs: pipe.denoiser(*inputs))(x, jnp.full(2, 500.0), labels)
    with torch.no_grad():
        theirs = unet(torch.tensor(x).permute(0, 3, 1, 2), t, class_labels=torch.tensor(labels)).sample
        image = vae.decode(torch.tensor(x).permute(0, 3, 1, 2) / vae.config.scaling_factor).sample
    decode = functools.partial(models.decode_latents, pipe.vae.module, pipe.vae.params)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(jax.jit(decode)(x), image.permute(0, 2, 3, 1), atol=2e-3, rtol=1e-3)


def test_a_pipeline_that_diffusers_wrote_is_opened(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(beta_end=0.01)).save_pretrained(tmp_path)
    pipe = pipelines.load(tmp_path)
    assert (pipe.num_classes, pipe.image_shape()) == (None, (8, 8, 1))
    assert pipe.prediction.path == D.VP.named("linear", beta_end=0.01)
    theirs = unet.conv_in.weight.detach().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(pipe.denoiser.params["conv_in"]["kernel"], theirs)


def test_compare_names_what_differs():
    first = latent_pipeline()
    params = jax.tree.map(np.array, first.denoiser.params)
    params["conv_in"]["bias"][0] *= -1.0
    changed = first.replace(denoiser=first.denoiser.replace(params=params))
    rows = {row.name: row.difference for row in pipelines.compare(first, changed)}
    assert [name for name, difference in rows.items() if difference] == ["unet/conv_in.bias"]
    assert rows["unet/conv_in.bias"] == "1 of 8 numbers differ"
    rows = pipelines.compare(first, first.replace(vae=None))
    assert {row.name.split("/")[0] for row in rows if row.difference == "only in the first"} == {"vae"}
    other = latent_pipeline(block_out_channels=(12,))
    assert any(
        "[8]" in row.difference and "[12]" in row.difference for row in pipelines.compare(first, other)
    )


def test_compare_sees_the_sign_of_zero_and_takes_nan_for_itself():
    first = pixel_pipeline()
    zeros = jax.tree.map(lambda x: np.zeros_like(np.asarray(x)), first.denoiser.params)
    minus = jax.tree.map(lambda x: -x, zeros)
    nan = jax.tree.map(lambda x: x + np.float32("nan"), zeros)

    def compare(first_params, second_params):
        pipes = (
            first.replace(denoiser=first.denoiser.replace(params=params))
            for params in (first_params, second_params)
        )
        return {bool(row.difference) for row in pipelines.compare(*pipes)}

    assert compare(zeros, minus) == {True} and compare(nan, nan) == {False}


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    pipelines.save(latent_pipeline(), out)
    pipelines.save(pixel_pipeline(), out)
    assert not (out / "vae").exists() and pipelines.load(out).autoencoder is None
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        pipelines.save(latent_pipeline(), out)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(StorageError, match="other files"):
        pipelines.save(latent_pipeline(), foreign)
    assert (foreign / "model_index.json").read_text() == '{"_class_name": "StableDiffusionPipeline"}'
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="is a file"):
        pipelines.save(latent_pipeline(), tmp_path / "file")


def test_a_full_disk_leaves_the_earlier_export_whole(tmp_path, monkeypatch):
    pipe = latent_pipeline()
    pipelines.save(pipe, tmp_path / "out")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jaxldm.checkpoints.pipeline_folder.save_component", full)
    with pytest.raises(StorageError, match="disk is full"):
        pipelines.save(pixel_pipeline(), tmp_path / "out")
    assert_same_model(pipelines.load(tmp_path / "out"), pipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", latent_pipeline())


@pytest.fixture
def exported(tmp_path):
    pipelines.save(latent_pipeline(), tmp_path / "exported")
    return tmp_path / "exported"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_header(path):
    content = bytearray(path.read_bytes())
    content[12] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: truncate(run / "unet" / WEIGHTS), WEIGHTS),
        (lambda run: flip_header(run / "vae" / WEIGHTS), WEIGHTS),
        (lambda run: (run / "unet" / WEIGHTS).unlink(), WEIGHTS),
        (lambda run: (run / "unet/config.json").write_text('{"_class_name": '), "config.json"),
        (lambda run: (run / "config.json").write_text('{"recipe": '), "config.json"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json"),
        (lambda run: (run / "config.json").write_text("{}"), "config.json"),
        (lambda run: (run / "model_index.json").unlink(), "no finished model yet.*--resume"),
        (lambda run: shutil.rmtree(run / "vae"), "vae"),
        (lambda run: shutil.rmtree(run), "does not exist, and nothing is downloaded"),
        (
            lambda run: [(run / name).unlink() for name in ("config.json", "model_index.json")],
            "neither a run folder",
        ),
    ],
)
def test_a_run_folder_that_is_not_whole(run, damage, words):
    damage(run)
    with pytest.raises(CheckpointError, match=words) as caught:
        pipelines.load(run)
    assert "\n" not in str(caught.value)


def test_one_network_of_a_run_names_the_run(run):
    with pytest.raises(CheckpointError, match=f"holds one network.*{run.name}$"):
        pipelines.load(run / "unet")


def test_a_whole_model_is_no_network(run, exported):
    for folder, words in ((run, "such as unet$"), (exported, "such as unet$")):
        with pytest.raises(
            CheckpointError, match=rf"holds a whole model: open it with pipelines\.load.*{words}"
        ):
            checkpoints.load(folder)


def test_a_run_that_is_being_trained_says_by_whom(run):
    (run / "model_index.json").unlink()
    with HeldFolder(run, print):
        with pytest.raises(CheckpointError, match=rf"process {os.getpid()} on .* is training it"):
            pipelines.load(run)
        with pytest.raises(CheckpointError, match="in use"), HeldFolder(run, print):  # and it still holds it
            pass
    with pytest.raises(CheckpointError, match="go on with its training"):
        pipelines.load(run)


def test_data_that_is_not_that_of_the_training_is_refused(run):
    with pytest.raises(DataError, match=r"shape \[28, 28, 1\], and .* was trained with \[\d, \d, 1\]"):
        training.read_data(run)


def put(folder, pipe):
    shutil.rmtree(folder)
    checkpoints.save(folder, pipe.denoiser.module, pipe.denoiser.params)


@pytest.mark.parametrize(
    "mix",
    [
        lambda run: put(run / "unet", latent_pipeline(in_channels=3, out_channels=3)),
        lambda run: put(run / "unet", latent_pipeline(sample_size=8)),
        lambda run: put(run / "unet", latent_pipeline(num_classes=7)),
        lambda run: put(run / "vae", latent_pipeline()),
        lambda run: (
            shutil.rmtree(run / "unet"),
            shutil.copytree(run / "vae", run / "unet"),
        ),
    ],
)
def test_parts_of_another_model(run, mix):
    mix(run)
    with pytest.raises(CheckpointError, match=r"mixes two models|are needed"):
        pipelines.load(run)


def test_weights_of_another_model(run):
    other = write_run(run.parent / "other", latent_pipeline(block_out_channels=(12,)))
    shutil.copy(other / "unet" / WEIGHTS, run / "unet" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"12.*8|8.*12"):
        pipelines.load(run)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: truncate(out / "unet" / WEIGHTS), WEIGHTS),
        (lambda out: (out / "model_index.json").write_text("{"), "model_index.json"),
        (
            lambda out: (out / "model_index.json").write_text('{"_class_name": "LatentDiffusionPipeline"}'),
            "unet",
        ),
        (
            lambda out: (out / "scheduler/scheduler_config.json").unlink(),
            r"there is no .*scheduler_config\.json",
        ),
        (
            lambda out: (out / "scheduler/scheduler_config.json").write_text('{"_class_name": "Y"}'),
            "DDIMScheduler",
        ),
        (lambda out: shutil.rmtree(out / "vae"), "vae"),
    ],
)
def test_an_exported_folder_that_is_not_whole(exported, damage, words):
    damage(exported)
    with pytest.raises(CheckpointError, match=words):
        pipelines.load(exported)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_images_per_device": 0}, "_images_per_device must be a whole number from 1 to 65536, not 0"),
        ({"_images_per_device": "4"}, "_images_per_device must be a whole number"),
        ({"_scale": [3]}, "_scale must be a number"),
        ({"id2label": "ab"}, "id2label must be an object"),
        ({"id2label": {"0": "a", "2": "b"}}, "does not name each"),
        ({"_class_name": ["LatentDiffusionPipeline"]}, "_class_name must be a string"),
        ({"_class_name": "LatentDifusionPipeline"}, "did you mean 'LatentDiffusionPipeline'"),
    ],
)
def test_wrong_entries_of_an_index_are_refused_with_their_name(exported, changes, words):
    index = exported / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    with pytest.raises(CheckpointError, match=words) as caught:
        pipelines.load(exported)
    assert "\n" not in str(caught.value) and str(exported) in str(caught.value)


def test_an_absent_option_means_what_it_means_in_diffusers():
    compared = 0
    for family in FAMILIES:
        for name in family.folder.class_names:
            reference = getattr(diffusers, name, None)
            known = {} if reference is None else inspect.signature(reference.__init__).parameters
            for option, default in family.folder.options.items():
                if option in known:
                    assert default == known[option].default, (name, option)
                    compared += 1
    assert compared >= 9
