"""Two updates by each method, the folder they leave, and a draw; interrupted runs; pictures on the way."""

import dataclasses
import os
import signal

import chex
import jax
import numpy as np
import pytest
from students import SMALL, evaluations, pipeline, random_params, student

from jaxldm import data, pipelines
from jaxldm import diffusion as D
from jaxldm.data import ArrayRows
from jaxldm.errors import DataError
from jaxldm.training import RECIPES, make_mesh, read_kept, train
from jaxldm.training.conditions import label_condition
from jaxldm.training.diffusion import Conditioned
from jaxldm.training.few_steps import job
from jaxldm.training.log import CLOCKS, read_log
from jaxldm.training.runs import RunFolder
from jaxldm.training.stages import Context

pytestmark = pytest.mark.usefixtures("compile_once")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "export"
    pipelines.save(pipeline(random=True), folder)
    return folder


def from_nothing(name):
    """The recipe of a method without a teacher, in the pixels of 64 digits by the smallest network."""
    known = RECIPES[name]
    diffusion = dataclasses.replace(
        known.diffusion,
        preset="tiny-dit",
        overrides={**known.diffusion.overrides, **SMALL, "patch_size": 7},
        epochs=1,
        warmup_epochs=0,
        sample_every=1,
        samples_per_class=1,
    )
    return dataclasses.replace(
        known, autoencoder=None, classifier=None, max_train_images=64, diffusion=diffusion
    )


def losses(run):
    """The log of a run but for its clocks."""
    log = read_log(run.stage("diffusion").path / "log.csv")
    return {name: column for name, column in log.items() if name not in CLOCKS}


def assert_trained(run):
    """Two updates that moved something, and a picture."""
    log = losses(run)
    assert len(log["loss"]) == 2 and np.isfinite(log["loss"]).all() and (log["grad_norm"] > 0).all()
    assert (run.stage("diffusion").path / "samples" / "step-000002.png").is_file()


# Method -> (options of training, options of a draw, how many images its network is given in that).
TAUGHT = {
    "guidance": ({"guidance_scale": (1.0, 4.0)}, {"num_inference_steps": 2, "guidance_scale": 2.0}, 2),
    "cd": ({"guidance_scale": 2.0}, {}, 4),
    "ect": ({}, {"guidance_scale": 2.0}, 8),
    "scm": ({"guidance_scale": 2.0}, {"num_inference_steps": 2}, 2),
}
UNTAUGHT = {
    "mini-mean-flow": ({}, 1),
    "mini-improved-mean-flow": ({"num_inference_steps": 2}, 2),
    "mini-shortcut": ({"guidance_scale": 2.0}, 8),
    "mini-ict": ({"guidance_scale": 1.0}, 4),
    "mini-drifting": ({}, 1),
}


@pytest.mark.parametrize("method", TAUGHT)
def test_a_student_is_trained_exported_and_draws(teacher, tmp_path, method):
    options, drawn, calls = TAUGHT[method]
    recipe = student(teacher, method, epochs=1, sample_every=1, **options)
    run = train(recipe, tmp_path / "run", devices=1, log=lambda line: None)
    assert_trained(run)
    assert (run.path / WEIGHTS).read_bytes() != (teacher / WEIGHTS).read_bytes()
    pipe = pipelines.load(run.path)
    assert pipe.few_steps.method == method and pipe.few_steps.teacher == teacher.name
    assert evaluations(pipe, **drawn) == calls


@pytest.mark.parametrize("name", UNTAUGHT)
def test_a_model_without_a_teacher_is_trained_exported_and_draws(tmp_path, name):
    drawn, calls = UNTAUGHT[name]
    run = train(from_nothing(name), tmp_path / "run", devices=1, log=lambda line: None)
    assert_trained(run)
    pipe = pipelines.load(run.path)
    assert pipe.few_steps.method == RECIPES[name].diffusion.few_steps.method
    assert evaluations(pipe, **drawn) == calls


@pytest.mark.parametrize("method", ["dmd", "reflow"])
def test_an_interrupted_run_comes_to_the_student_of_an_unbroken_one(teacher, tmp_path, method):
    """Of both players, bit for bit, and on the pairs that were drawn before."""
    pairs = {"numbers": {"pairs": 96, "teacher_steps": 2}}
    options = {"dmd": {"num_steps": 2}, "reflow": pairs}[method]
    recipe = student(teacher, method, epochs=2, guidance_scale=1.0, **options)
    recipe, said = dataclasses.replace(recipe, max_train_images=96), []
    straight = train(recipe, tmp_path / "straight", devices=1, log=lambda line: None)

    def stop(line):
        if line.startswith("diffusion: epoch 1/2"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "killed", devices=1, log=stop)
    killed = train(recipe, tmp_path / "killed", devices=1, resume=True, log=said.append)
    assert any(line.startswith("resuming from the checkpoint of step ") for line in said)
    assert not any("drawing the pairs" in line for line in said)
    chex.assert_trees_all_equal(*(read_kept(run.path, 6).params for run in (straight, killed)))
    chex.assert_trees_all_equal(losses(straight), losses(killed))
    assert (straight.path / WEIGHTS).read_bytes() == (killed.path / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["mini-shortcut", "mini-mean-flow"])
def test_a_picture_on_the_way_is_what_the_finished_student_draws(tmp_path, name):
    """Its network, too, is given the length of each step."""
    recipe = from_nothing(name)
    context = Context(recipe, data.load("mnist5k"), RunFolder(tmp_path), make_mesh(1))
    module = job.build(recipe, (28, 28, 1), 10)
    labels = np.arange(3, dtype=np.int32)
    shown = {"label": labels}
    given = Conditioned(label_condition(10), ("0", "1", "2"), shown, ArrayRows(shown), None)
    draw = job.make_sampler(context, job.make_setting(context, module, given, 64), shown)
    params = random_params(module)
    own = job.few_steps_of(recipe.diffusion)
    pipe = pipelines.class_to_image(pipelines.Network(module, params), recipe.diffusion.prediction)
    pipe = dataclasses.replace(pipe, few_steps=own)
    guided = {"guidance_scale": recipe.diffusion.sample_guidance_scale} if own.guidance == "outside" else {}
    key = jax.random.key(1)
    noise = D.initial_noise(key, (3, 28, 28, 1), pipe.grid()[1])
    expected = pipe(key, [0, 1, 2], latents=noise, output="latents", **guided)
    np.testing.assert_allclose(draw(params, key), expected, atol=1e-4)


@pytest.mark.parametrize("at_once", [2, 250])
def test_the_table_of_drifting_has_as_many_of_each_class(at_once, monkeypatch):
    monkeypatch.setattr(job, "PAIRS_AT_ONCE", at_once)
    images = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1)
    rows = ArrayRows({"mean": images, "label": np.array([0, 1, 0, 0, 1, 2, 0], np.int32)})
    table = job.class_table(rows, 3, 3)
    assert table.shape == (3, 3, 1, 1, 1)
    np.testing.assert_array_equal(table.reshape(3, 3), [[0, 2, 3], [1, 4, 1], [5, 5, 5]])
    np.testing.assert_array_equal(job.class_table(rows, 1, 3).ravel(), [0, 1, 5])
    with pytest.raises(DataError, match="no training image of class 3"):
        job.class_table(rows, 3, 4)
