"""Whole runs of the smallest recipes: what they leave behind, and that interruptions change nothing."""

import dataclasses
import json
import os
import shutil
import signal
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn
from PIL import Image

from jaxldm import checkpoints, data, models, pipelines, schedulers
from jaxldm import diffusion as D
from jaxldm.cli import in_one_line
from jaxldm.errors import CheckpointError, DivergenceError
from jaxldm.metrics.health import Finding
from jaxldm.models.sharding import count_by_rule
from jaxldm.training import (
    RECIPES,
    Recipe,
    create_train_state,
    make_mesh,
    optimizer,
    read_log,
    stages_of,
    train,
)
from jaxldm.training import diffusion as diffusion_stage
from jaxldm.training.diffusion import build_denoiser, latent_columns, latent_shape, make_loss
from jaxldm.training.log import CLOCKS
from jaxldm.training.mesh import batch_sharding, bytes_per_device, state_shardings
from jaxldm.training.runs import RunFolder
from jaxldm.training.stages import Context, report_health
from jaxldm.training.step import compile_train_step, make_train_step
from jaxldm.training.store import TrainingStore
from jaxldm.training.train import check_finite

SMOKE = RECIPES["smoke"]
pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run in one go, and what it said."""
    said = []
    return train(SMOKE, tmp_path_factory.mktemp("runs") / "straight", devices=1, log=said.append), said


def test_every_stage_leaves_its_model_log_and_pictures(straight):
    run, _ = straight
    for stage in stages_of(SMOKE):
        folder = run.stage(stage)
        assert (
            folder.complete
            and (folder.path / "loss.png").is_file()
            and (folder.path / "grad_norm.png").is_file()
        )
        np.testing.assert_array_equal(read_log(folder.log)["step"], np.arange(1, 9))
    assert {"reconstruction", "kl", "kl_channel_3", "beta"} <= set(read_log(run.stage("autoencoder").log))
    with Image.open(run.path / "diffusion" / "samples" / "step-000008.png") as picture:
        assert picture.width > 10 * 28 * 2 and picture.height > 28 * 2
    with Image.open(run.path / "autoencoder" / "reconstructions.png") as picture:
        assert picture.width > 8 * 28 * 2
    figures = json.loads((run.path / "classifier" / "metrics.json").read_text())
    assert 0 <= figures["test_accuracy"] <= 1 and figures["test_images"] == 500
    assert "posterior collapse" in (run.path / "autoencoder" / "health.txt").read_text()


def test_a_run_is_a_pipeline_folder(straight):
    """In the layout that `pipelines.save` writes."""
    run, _ = straight
    pipelines.save(pipelines.load(run.path), run.path / "export")
    exported = sorted(path for path in (run.path / "export").rglob("*") if path.is_file())
    assert {path.relative_to(run.path / "export").parts[0] for path in exported} == {
        "model_index.json",
        "scheduler",
        "unet",
        "vae",
    }
    for path in exported:
        ours = run.path / path.relative_to(run.path / "export")
        if path.suffix == ".json":
            assert json.loads(ours.read_text()) == json.loads(path.read_text())
        else:
            assert ours.read_bytes() == path.read_bytes()


def test_annealing_is_in_the_log(straight):
    beta = SMOKE.autoencoder.beta
    expected = np.minimum(1, np.arange(8) / 4) * beta
    np.testing.assert_allclose(read_log(straight[0].stage("autoencoder").log)["beta"], expected, rtol=1e-6)


def test_the_finished_autoencoder_gives_unit_latents(straight):
    """And the cached latents are those that its public `encode_latents` makes."""
    run, _ = straight
    module, params = checkpoints.load(run.stage("autoencoder").model)
    dataset = data.load("mnist5k")
    context = Context(SMOKE, dataset, run, make_mesh(1))
    latents = latent_columns(context)
    columns = latents.take(np.arange(len(latents)))
    images, labels = context.train_arrays()
    assert len(images) == SMOKE.max_train_images
    np.testing.assert_array_equal(columns["label"], labels)
    np.testing.assert_allclose(
        columns["mean"][:64], models.encode_latents(module, params, images[:64]), atol=1e-4
    )
    variance = np.var(columns["mean"]) + np.mean(columns["std"] ** 2)
    np.testing.assert_allclose([columns["mean"].mean(), variance], [0, 1], atol=1e-3)
    before = {path: path.stat().st_mtime_ns for path in run.latents.rglob("*")}
    latent_columns(context)
    assert {path: path.stat().st_mtime_ns for path in run.latents.rglob("*")} == before
    mean_only = dataclasses.replace(
        SMOKE, diffusion=dataclasses.replace(SMOKE.diffusion, sample_latents=False)
    )
    only_mean = latent_columns(Context(mean_only, dataset, run, make_mesh(1)))
    assert set(only_mean.take(np.arange(2))) == {"mean", "label"}


def test_the_finished_denoiser_is_the_moving_average(straight):
    run, _ = straight
    module, params = checkpoints.load(run.stage("diffusion").model)
    adam = optimizer(1e-3, 1, 8)
    template = create_train_state(jax.random.key(0), params, adam)
    with TrainingStore(run.path / "diffusion" / "checkpoints") as store:
        state = store.restore_latest(template).state
    chex.assert_trees_all_equal(state.ema_params, params)
    assert not np.array_equal(state.ema_params["conv_in"]["kernel"], state.params["conv_in"]["kernel"])
    assert module.config.in_channels == 4 and module.config.num_classes == 10


@pytest.mark.unchecked
def test_a_recipe_of_seconds_says_that_it_is_not_meant_to_learn(tmp_path):
    bad = [Finding("reconstruction", "184.6%", "too short", "train longer", False)]
    for name, expected in (("smoke", True), ("smoke-dit", True), ("mini-ldm", False)):
        said, folder = [], SimpleNamespace(path=tmp_path)
        context = SimpleNamespace(recipe=RECIPES[name], log=said.append)
        report_health(context, folder, bad)
        text = (tmp_path / "health.txt").read_text()
        assert "BAD  reconstruction: 184.6%" in said[0] and text == said[0] + "\n"
        assert (
            said[0].endswith(f"({name} only shows that everything runs: it is not meant to learn)")
            == expected
        )
        report_health(context, folder, [Finding("reconstruction", "3%")])
        assert "learn" not in said[1]


@pytest.mark.unchecked
def test_skipped_updates_are_a_finding_and_samples_without_a_number_an_error(tmp_path):
    said = []
    context = SimpleNamespace(recipe=RECIPES["mini-ldm"], log=said.append)
    folder = RunFolder(tmp_path).stage("diffusion")
    folder.path.mkdir()
    header = "epoch,step,loss,grad_norm,learning_rate,seconds,skipped\n"
    rows = [f"1,{n},1.0,1.0,0.1,{n}.0,{int(n < 4)}.0\n" for n in range(1, 9)]
    folder.log.write_text(header + "".join(rows))
    picture = np.random.default_rng(0).uniform(-1, 1, (4, 4, 1))
    report_health(context, folder, [], [picture, np.full_like(picture, np.nan)])
    assert "BAD  skipped updates: 3 of 8 updates" in (folder.path / "health.txt").read_text()
    assert "BAD  blank images: 1 of 2" in said[0]
    with pytest.raises(DivergenceError, match=r"no sample is finite, see .*health.txt: start a new run"):
        report_health(context, folder, [], [np.full_like(picture, np.nan)])
    folder.log.write_text(header + "".join(rows[4:]))
    report_health(context, folder, [], [picture])
    assert "skipped" not in said[-1]


def test_weights_that_are_not_finite_are_no_network():
    check_finite("diffusion", {"w": np.ones(3), "n": np.arange(3)}, "why")
    with pytest.raises(DivergenceError, match=r"diffusion: the weights are not finite .*; why"):
        check_finite("diffusion", {"w": np.array([1, np.inf]), "n": np.arange(3)}, "why")


def test_a_run_that_diverges_fails_and_says_what_to_do(tmp_path):
    """A learning rate of 1e9: all updates are skipped from the third on."""
    recipe = RECIPES["smoke-dit"]
    recipe = dataclasses.replace(recipe, diffusion=dataclasses.replace(recipe.diffusion, learning_rate=1e9))
    reason = r"the last 6 of 8 updates were not finite; no checkpoint .* lower --learning-rate$"
    with pytest.raises(DivergenceError, match=reason) as raised:
        train(recipe, tmp_path / "run", devices=1, log=lambda line: None)
    assert in_one_line(f"jaxldm: {raised.value}") == f"jaxldm: {raised.value}"
    assert not RunFolder(tmp_path / "run").has_model


def test_interruptions_change_no_bit_of_the_result(straight, tmp_path):
    """Ctrl-C in the middle of the autoencoder, of the diffusion model, and at the very end of that."""
    said = []

    def say_and_stop(at):
        def say(line):
            said.append(line)
            if line.startswith(at):
                os.kill(os.getpid(), signal.SIGINT)

        return say

    run_dir = tmp_path / "run"
    for number, at in enumerate(("autoencoder: epoch 1/2", "diffusion: epoch 1/2", "diffusion: epoch 2/2")):
        with pytest.raises(KeyboardInterrupt):
            train(SMOKE, run_dir, resume=number > 0, devices=1, log=say_and_stop(at))
    run = train(SMOKE, run_dir, resume=True, devices=1, log=said.append)
    assert sum(line.startswith("stopped after step") for line in said) == 3
    for stage in stages_of(SMOKE):
        ours, theirs = run.stage(stage), straight[0].stage(stage)
        logs = [read_log(folder.log) for folder in (ours, theirs)]
        for log in logs:
            for clock in CLOCKS:
                log.pop(clock)
        chex.assert_trees_all_equal(*logs)
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            assert (ours.model / name).read_bytes() == (theirs.model / name).read_bytes()


def test_resuming_a_finished_run_says_so_and_a_new_one_is_refused(straight):
    run, _ = straight
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    said = []
    train(SMOKE, run.path, resume=True, devices=1, log=said.append)
    assert said == [f"{run.path} is finished: there is nothing left to train"]
    with pytest.raises(CheckpointError, match="--resume"):
        train(SMOKE, run.path, devices=1)
    with pytest.raises(CheckpointError, match="seed is 0 in it and 1 now"):
        train(dataclasses.replace(SMOKE, seed=1), run.path, resume=True, devices=1)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_finished_network_that_is_damaged_is_written_again_from_its_checkpoint(straight, tmp_path):
    """Of the same bytes; where there is none left it is said, and nothing is trained."""
    run, said = RunFolder(shutil.copytree(straight[0].path, tmp_path / "run")), []
    file = run.stage("diffusion").model / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:20000])
    train(SMOKE, run.path, resume=True, devices=1, log=said.append)
    assert file.read_bytes() == whole
    assert "unet" in said[0] and "is written again from the newest checkpoint" in said[0]
    file.write_bytes(whole[:20000])
    shutil.rmtree(run.stage("diffusion").path / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint of the stage diffusion is left"):
        train(SMOKE, run.path, resume=True, devices=1, log=said.append)


def dit_step(dtype="float32"):
    """`train_step(state, batch)` of the smallest DiT, a state for it and a batch of 16."""
    recipe = RECIPES["smoke-dit"]
    recipe = dataclasses.replace(recipe, diffusion=dataclasses.replace(recipe.diffusion, dtype=dtype))
    module = build_denoiser(recipe, (28, 28, 1), 10)
    numbers = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: jnp.asarray(0.05 * numbers.normal(size=spec.shape), jnp.float32), models.shapes(module)
    )
    adam = optimizer(1e-3, 0, 8)
    step = make_train_step(make_loss(recipe.diffusion, module), adam, 0.9)
    images = numbers.normal(size=(16, 28, 28, 1)).astype(np.float32)
    batch = {"mean": images, "label": np.arange(16, dtype=np.int32) % 10}
    return step, create_train_state(jax.random.key(3), params, adam), batch


def test_a_dit_takes_the_same_steps_on_one_device_on_eight_and_with_its_state_split(caplog):
    """Data parallel, and fully sharded: the state's share of a device falls, the losses stay."""
    losses, params, held = {}, {}, {}
    for devices, fsdp in ((1, 1), (8, 1), (8, 4)):
        step, state, batch = dit_step()
        mesh = make_mesh(devices, fsdp=fsdp)
        shardings = state_shardings(mesh, state)
        batch, state = jax.device_put(batch, batch_sharding(mesh)), jax.device_put(state, shardings)
        compiled, losses[devices, fsdp] = compile_train_step(step, mesh), []
        caplog.clear()
        for number in range(3):
            with jax.log_compiles():
                state, metrics = compiled(state, batch)
            losses[devices, fsdp].append(float(metrics["loss"]))
            if number == 0:
                params[devices, fsdp] = np.concatenate(
                    [np.ravel(leaf) for leaf in jax.tree.leaves(state.params)]
                )
        messages = [record.getMessage() for record in caplog.records]
        assert sum(text.startswith("Compiling") and "placed_step" in text for text in messages) == 1
        assert jax.tree.all(
            jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), state, shardings)
        )
        held[devices, fsdp] = bytes_per_device(state)
    for kind in ((8, 1), (8, 4)):
        np.testing.assert_allclose(losses[1, 1], losses[kind], rtol=2e-5)
        # Adam's first step is the sign of the gradient: where that is nearly 0, rounding may turn it.
        assert np.mean(np.abs(params[1, 1] - params[kind]) > 1e-5) < 1e-3
    shapes = models.shapes(build_denoiser(RECIPES["smoke-dit"], (28, 28, 1), 10))
    rules = count_by_rule(make_mesh(8, fsdp=4), shapes)
    counters = 2 * 4  # of the state and of Adam
    assert held[8, 1] == held[1, 1]
    assert held[8, 4] == 4 * 4 * sum(rule.per_device for rule in rules) + counters < 0.34 * held[1, 1]


def test_bfloat16_compute_leaves_loss_and_state_in_float32():
    step, state, batch = dit_step("bfloat16")
    assert "bf16" in str(jax.make_jaxpr(step)(state, batch))
    new, metrics = jax.eval_shape(step, state, batch)
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(new.params, new.ema_params, state.params)


class StandIn:
    """A network that answers with its input."""

    __class__ = nn.Module  # to `isinstance`

    class config:
        num_classes = 3

    def __call__(self, x, t, labels, train=False):
        return x

    def apply(self, variables, x, t, labels, train, rngs):
        return self(x, t, labels, train)


def test_the_loss_of_a_recipe_is_the_diffusion_loss_of_drawn_latents(monkeypatch):
    """x_0 = mean + std eps, with another eps at each update; every option of the recipe reaches the loss."""
    seen = {}

    def diffusion_loss(key, network, prediction, x_0, condition, **options):
        seen.update(
            options, x_0=x_0, prediction=prediction, output=network(x_0, jnp.zeros(len(x_0)), condition)
        )
        return jnp.float32(0), {}

    monkeypatch.setattr(diffusion_stage.D, "diffusion_loss", diffusion_loss)
    recipe = dataclasses.replace(
        SMOKE.diffusion,
        weight={"name": "min_snr", "gamma": 5.0},
        time={"name": "logit_normal", "mean": 0.5, "std": 0.25},
        noise_offset=0.1,
        condition_dropout=0.2,
        prediction=D.flow(D.Flow()),
    )
    loss_fn = make_loss(recipe, StandIn())
    batch = {
        "mean": jnp.full((4000, 2, 2, 1), 3.0),
        "std": jnp.full((4000, 2, 2, 1), 0.5),
        "label": jnp.zeros(4000, jnp.int32),
    }
    loss_fn({}, None, batch, jax.random.key(0))
    first = seen["x_0"]
    np.testing.assert_allclose([first.mean(), first.std()], [3.0, 0.5], atol=0.02)
    loss_fn({}, None, batch, jax.random.key(1))
    assert not np.array_equal(first, seen["x_0"])
    assert seen["prediction"] == D.flow(D.Flow()) and int(seen["null_condition"]) == 3
    assert (seen["noise_offset"], seen["condition_dropout"]) == (0.1, 0.2)
    assert seen["weight"](jnp.log(4.0)) == pytest.approx(4.0) and seen["weight"](jnp.inf) == 5.0  # Min-SNR
    t = np.asarray(seen["time"](jax.random.key(0), (1000,), D.Flow(t_min=1e-6)))
    assert scipy.stats.kstest(np.log(t / (1 - t)), scipy.stats.norm(0.5, 0.25).cdf).pvalue > 1e-3
    del batch["std"]
    plain = dataclasses.replace(recipe, prediction=D.edm(D.EDM(), 0.7), weight=None, time=None)
    make_loss(plain, StandIn())({}, None, batch, jax.random.key(2))
    assert seen["prediction"] == D.edm(D.EDM(), 0.7) and seen["weight"] is seen["time"] is None
    np.testing.assert_array_equal(seen["x_0"], batch["mean"])


@pytest.mark.parametrize("preset", ["tiny-dit", "sit-s-8"])
def test_a_velocity_on_an_interpolant_trains_and_is_drawn_from(tmp_path, preset):
    """From the recipe's JSON to pictures: the run's scheduler_config.json knows the path again."""
    recipe = RECIPES["smoke-dit"]
    prediction = D.velocity(D.Interpolant("gvp", gamma=(0.001, 0.1)))
    diffusion = dataclasses.replace(
        recipe.diffusion,
        preset=preset,
        overrides={**recipe.diffusion.overrides, "patch_size": 7},
        prediction=prediction,
        time={"name": "uniform"},
        epochs=1,
    )
    recipe = dataclasses.replace(recipe, diffusion=diffusion, classifier=None, max_train_images=128)
    recipe = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert recipe.diffusion.prediction == prediction
    run = train(recipe, tmp_path / "run", devices=1, log=lambda line: None)
    assert np.isfinite(read_log(run.stage("diffusion").log)["loss"]).all()
    scheduler = schedulers.from_config(json.loads((run.path / "scheduler/scheduler_config.json").read_text()))
    assert scheduler.sampler.prediction == prediction
    module, params = checkpoints.load(run.stage("diffusion").model)
    network = lambda x, t: models.network(module)(params, x, t, jnp.array([1, 2]))  # noqa: E731
    grid = D.make_grid(prediction.path, 2)
    x_T = D.initial_noise(jax.random.key(0), (2, 28, 28, 1), grid)
    draw = jax.jit(
        lambda x: D.sample(jax.random.key(1), scheduler.sampler.denoiser(network), D.solvers.ddim(), grid, x)
    )
    assert np.isfinite(draw(x_T)).all()


def test_models_fit_themselves_to_the_data():
    assert latent_shape(SMOKE, (28, 28, 1)) == (7, 7, 4)
    assert latent_shape(SMOKE, (32, 16, 3)) == (8, 4, 4)
    module = build_denoiser(SMOKE, (32, 16, 3), 7)
    assert (module.config.sample_size, module.config.in_channels, module.config.num_classes) == ((8, 4), 4, 7)
    pixels = build_denoiser(RECIPES["smoke-dit"], (28, 28, 3), 5)
    assert (pixels.config.in_channels, pixels.config.learn_sigma) == (3, False)
