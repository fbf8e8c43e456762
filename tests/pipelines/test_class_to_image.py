"""DiT against the pipeline of diffusers, and the authors' samplers of DiT and SiT written out in PyTorch."""

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.dit import pipeline_dit
from diffusers.schedulers import scheduling_ddpm
from dit_folders import NULL, write_dit
from picture_checks import KEY, assert_images_agree, assert_latents_agree
from reference_pipelines import LATENT, REFERENCE, noise, theirs

from jaxldm import checkpoints, models, pipelines, schedulers
from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError, StorageError, UnknownNameError

LABELS = [207, 3]
STEPS = {"num_inference_steps": 5, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dit(tmp_path_factory.mktemp("class-to-image") / "dit")


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder)


@pytest.fixture(scope="module")
def reference(folder):
    opened = diffusers.DiTPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    return opened


@pytest.mark.parametrize(("solver", "scale"), [(None, 4.0), (None, 1.0), ("dpmpp_2m", 4.0)])
def test_class_to_image(pipe, reference, monkeypatch, solver, scale):
    """None is the folder's own, DDIM."""
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *args, **options: theirs(noise(2)))
    ddim, decode, seen = reference.scheduler, reference.vae.decode, []
    monkeypatch.setattr(reference.vae, "decode", lambda z: seen.append(z) or decode(z))
    if solver is not None:
        monkeypatch.setattr(reference, "scheduler", REFERENCE[solver].from_config(ddim.config))
    call = {"num_inference_steps": 5, "guidance_scale": scale}
    reference(LABELS, output_type="pt", **call)
    latents = seen[0] * reference.vae.config.scaling_factor
    monkeypatch.setattr(reference.vae, "decode", decode)
    drawn = pipe(KEY, LABELS, latents=noise(2), solver=solver, output="latents", **call)
    assert_latents_agree(drawn, latents)
    if scale == 1.0:
        images = pipe(KEY, LABELS, latents=noise(2), solver=solver, **call)
        assert_images_agree(images, reference, latents)


def step_noise(step):
    """What a call with KEY draws in a step, for both images."""
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, image), step) for image in range(2)]
    return np.stack([jax.random.normal(key, (LATENT, LATENT, 4)) for key in keys])


def guided_answer(transformer, x, t, scale=4.0, guided=4):
    """As the authors of DiT do it: the first channels guided, the rest the conditional output's."""
    with torch.no_grad():
        labels = torch.tensor([*LABELS, NULL, NULL])
        both = transformer(torch.cat([x, x]), torch.full((4,), float(t)), labels).sample
    cond, uncond = both.chunk(2)
    mixed = uncond[:, :guided] + scale * (cond[:, :guided] - uncond[:, :guided])
    return torch.cat([mixed, cond[:, guided:]], dim=1)


def test_ddpm_with_the_learned_variance(pipe, reference, monkeypatch):
    queue = [theirs(step_noise(step)) for step in range(5)]
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **options: queue.pop(0))
    config = reference.scheduler.config
    scheduler = diffusers.DDPMScheduler.from_config(config, variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(5)
    x = theirs(noise(2))
    for t in scheduler.timesteps:
        x = scheduler.step(guided_answer(reference.transformer, x, t), t, x).prev_sample
    call = dict(latents=noise(2), output="latents", **STEPS)
    drawn = pipe(KEY, LABELS, variance="learned", **call)
    assert_latents_agree(drawn, x)
    # A folder whose scheduler says so needs no option.
    entries = {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "clip_sample": False}
    scheduler = pipe.scheduler | entries
    np.testing.assert_allclose(pipe.replace(scheduler=scheduler)(KEY, LABELS, **call), drawn, atol=1e-5)


def test_three_channels_guided_as_the_authors_do(pipe, reference):
    scheduler = reference.scheduler
    scheduler.set_timesteps(5)
    x = theirs(noise(2))
    for t in scheduler.timesteps:
        x = scheduler.step(guided_answer(reference.transformer, x, t, guided=3)[:, :4], t, x).prev_sample
    three = pipe.replace(guided_channels=3)
    assert_latents_agree(three(KEY, LABELS, latents=noise(2), output="latents", **STEPS), x)


def test_the_folder_says_what_calls_leave_out(pipe, reference):
    assert pipe.default_guidance_scale == 4.0 and pipe.images_per_device == 1
    assert pipe.class_names[207] == "animal 207, beast 207" and reference.labels["beast 207"] == 207
    assert pipe.image_shape() == (16, 16, 3) and pipe.num_classes == NULL


def test_classes_by_their_names(pipe, sit):
    labels = pipe.cycle_labels(["animal 207", "beast 3", 4, "animal 5, beast 5"], None)
    assert labels.tolist() == [207, 3, 4, 5]
    with pytest.raises(UnknownNameError, match="did you mean 'beast 20"):
        pipe.cycle_labels(["beats 207"], None)
    with pytest.raises(InvalidArgumentError, match="nobody named"):
        sit.cycle_labels(["animal 207"], None)


def test_a_thousand_classes_are_not_drawn_by_mistake(pipe):
    with pytest.raises(InvalidArgumentError, match="1000 classes: name those"):
        pipe(KEY)
    assert pipe.cycle_labels(None, 3).tolist() == [0, 1, 2]


def test_a_folder_that_ours_wrote_is_opened_by_diffusers(folder, pipe, reference, tmp_path, caplog, recwarn):
    pipelines.save(pipe.replace(guided_channels=3), tmp_path / "dit")
    diffusers.utils.logging.enable_propagation()

    def complaints(folder):
        caplog.clear()
        opened = diffusers.DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
        return opened, [record.getMessage() for record in caplog.records]

    opened, warned = complaints(tmp_path / "dit")
    # JSON has no whole numbers as keys: of id2label it complains in published folders, too.
    assert (
        warned == complaints(folder)[1] and all("id2label" in line for line in warned) and not list(recwarn)
    )
    assert opened.labels == reference.labels
    assert type(opened.scheduler) is diffusers.DDIMScheduler
    state = opened.transformer.state_dict()
    for name, tensor in reference.transformer.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    again = pipelines.load(tmp_path / "dit")
    assert not any(row.difference for row in pipelines.compare(pipe, again))
    assert again.scheduler == pipe.scheduler and again.class_names == pipe.class_names
    assert (again.guided_channels, again.default_guidance_scale, again.images_per_device) == (3, 4.0, 1)


def test_weights_and_computation_in_sixteen_bits(folder):
    low = pipelines.load(folder, dtype="bfloat16")
    for network in (low.transformer, low.vae):
        assert network.config.dtype == "bfloat16"
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(network.params)} == {"bfloat16"}


@pytest.fixture(scope="module")
def sit(pipe, folder, tmp_path_factory):
    """The same weights taken for a SiT, with the frequencies that diffusers has."""
    path = tmp_path_factory.mktemp("original") / "SiT.safetensors"
    dit, params = checkpoints.dit_from_diffusers(pipe.denoiser.module, pipe.denoiser.params)
    checkpoints.save_dit_file(path, dit, params)
    loaded = pipelines.load_original(path, "SiT", vae=folder / "vae", num_heads=2)
    assert type(loaded.denoiser.module) is models.SiT and loaded.default_guidance_scale == 4.0
    config = dataclasses.replace(loaded.denoiser.config, freq_shift=1)
    return loaded.replace(denoiser=loaded.denoiser.replace(module=models.SiT(config)))


def sit_run(transformer, diffusion=False):
    """SiT's Euler and Euler-Maruyama steps, in its own time: from noise at 0 to data at 1."""
    x = theirs(noise(2))
    for step in range(5):
        t, h = step / 5, 1 / 5
        v = guided_answer(transformer, x, t)[:, :4]
        if not diffusion:
            x = x + h * v
            continue
        score, w = (t * v - x) / (1 - t), 1 - t  # D = sigma, the straight path
        x = x + h * (v + w * score)
        if step < 4:  # the last step is the mean
            x = x + (2 * w * h) ** 0.5 * theirs(step_noise(step))
    return x


@pytest.mark.parametrize("interpolant", [None, "gvp"])
def test_sit_by_euler(sit, reference, interpolant):
    """A velocity is followed alike on every path."""
    if interpolant is not None:
        prediction = D.velocity(D.Interpolant(interpolant))
        sit = sit.replace(scheduler=schedulers.to_config(prediction))
    call = dict(latents=noise(2), solver="flow_euler", output="latents", **STEPS)
    assert_latents_agree(sit(KEY, LABELS, **call), sit_run(reference.transformer))


def test_sit_by_its_sde(sit, reference):
    call = dict(latents=noise(2), solver="sit_sde", output="latents", **STEPS)
    assert_latents_agree(sit(KEY, LABELS, **call), sit_run(reference.transformer, diffusion=True))


def test_a_sit_folder(sit, tmp_path):
    sit = sit.replace(scheduler=schedulers.to_config(D.velocity(D.Interpolant("gvp"))))
    pipelines.save(sit, tmp_path / "sit")
    again = pipelines.load(tmp_path / "sit")
    assert type(again.denoiser.module) is models.SiT and again.denoiser.module == sit.denoiser.module
    assert again.prediction == sit.prediction and (again.default_guidance_scale, again.images_per_device) == (
        4.0,
        1,
    )
    assert not any(row.difference for row in pipelines.compare(sit, again))


def test_an_original_dit_goes_back_to_diffusers(pipe, folder, tmp_path):
    dit, params = checkpoints.dit_from_diffusers(pipe.denoiser.module, pipe.denoiser.params)
    checkpoints.save_dit_file(tmp_path / "DiT.safetensors", dit, params)
    original = pipelines.load_original(tmp_path / "DiT.safetensors", vae=folder / "vae", num_heads=2)
    assert original.prediction == pipe.prediction and original.has_learned_variance
    theirs_again, params = checkpoints.dit_to_diffusers(original.denoiser.module, original.denoiser.params)
    turned = original.replace(denoiser=pipelines.Network(theirs_again, params))
    pipelines.save(turned, tmp_path / "dit")
    opened = pipelines.load(tmp_path / "dit")
    assert not any(row.difference for row in pipelines.compare(pipe, opened))


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"latents": noise(1)}, InvalidArgumentError, r"\[2, 8, 8, 4\].*\[1, 8, 8, 4\]"),
        ({"output": "pil"}, UnknownNameError, "latents"),
        ({"solver": "ddim", "variance": "learned"}, InvalidArgumentError, 'solver="ddpm"'),
        ({"variance": "tiny"}, UnknownNameError, "learned"),
        ({"class_labels": [1000, 1]}, DataError, r"\[0, 999\]"),
    ],
)
def test_what_cannot_be_drawn(pipe, wrong, error, words):
    with pytest.raises(error, match=words):
        pipe(KEY, **({"class_labels": LABELS} | wrong))


def test_a_variance_that_was_not_learned_and_channels_that_are_not_there(sit):
    with pytest.raises(InvalidArgumentError, match="no learned variance"):
        sit(KEY, LABELS, variance="learned")
    for wrong in (0, 5):
        with pytest.raises(InvalidArgumentError, match="between 1 and the network's 4 channels"):
            sit.replace(guided_channels=wrong)(KEY, LABELS)


def test_folders_that_are_not_whole(folder, pipe, tmp_path):
    def changed(name, **entries):
        copy = tmp_path / name
        copy.mkdir()
        for part in ("transformer", "vae", "scheduler"):
            (copy / part).symlink_to(folder / part)
        index = json.loads((folder / "model_index.json").read_text()) | entries
        (copy / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError) as caught:
            pipelines.load(copy)
        return str(caught.value)

    assert "lacks vae: a DiTPipeline needs transformer, vae, scheduler" in changed("a", vae=[None, None])
    assert "each of its network's 1000 classes" in changed("b", id2label={"0": "tench"})
    vae = (pipe.vae.module, pipe.vae.params)
    with pytest.raises(InvalidArgumentError, match="continuous path"):
        prediction = D.epsilon(D.VP.named("linear"))
        pipelines.load_original(_file(pipe, tmp_path), "SiT", vae=vae, num_heads=2, prediction=prediction)
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="taken"):
        pipelines.save(pipe, tmp_path / "taken")


def _file(pipe, folder):
    path = folder / "DiT.safetensors"
    checkpoints.save_dit_file(
        path, *checkpoints.dit_from_diffusers(pipe.denoiser.module, pipe.denoiser.params)
    )
    return path
