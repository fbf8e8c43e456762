"""Parameters that do not move, by the patterns of their names; and the one call of `fit`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import training
from jaxldm.data import load
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.freezing import freeze, merge
from jaxldm.training.runs import RunFolder
from jaxldm.training.stages import Context, Job
from jaxldm.training.train import run_job

PARAMS = {
    "encoder": {"dense": {"kernel": np.full((3, 4), 0.1, np.float32), "bias": np.zeros(4, np.float32)}},
    "head": {"kernel": np.full((4, 1), 0.1, np.float32), "bias": np.zeros(1, np.float32)},
}
PLAYERS = ("maker", "critic")


def test_what_is_split_comes_together_again():
    for patterns, frozen in {
        ("encoder/*",): {"encoder/dense/kernel", "encoder/dense/bias"},
        ("*/bias",): {"encoder/dense/bias", "head/bias"},
        ("head/kernel", "encoder/dense/[bk]ias"): {"head/kernel", "encoder/dense/bias"},
    }.items():
        parts = freeze(PARAMS, patterns)
        names = [
            {"/".join(str(key.key) for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in parts
        ]
        assert names[1] == frozen and not names[0] & names[1]
        chex.assert_trees_all_equal(merge(*parts), PARAMS)


def test_a_pattern_of_nothing_and_one_of_everything_are_refused():
    with pytest.raises(InvalidArgumentError, match="no parameter is named 'decoder/"):
        freeze(PARAMS, ["head/*", "decoder/*"])
    with pytest.raises(InvalidArgumentError, match="nothing is left to train"):
        freeze(PARAMS, ["head/*", "encoder/*"])
    with pytest.raises(InvalidArgumentError, match="head/kernel is in params and in frozen"):
        merge(PARAMS, {"head": {"kernel": np.zeros(1)}})


def predict(params, x):
    hidden = jnp.tanh(x @ params["encoder"]["dense"]["kernel"] + params["encoder"]["dense"]["bias"][None])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"][None]


@pytest.fixture
def context(tmp_path):
    own = training.ClassifierRecipe(epochs=2, batch_size=8, accumulate=2, sample_every=1, ema_decay=0.9)
    recipe = training.Recipe(name="own", classifier=own)
    return Context(
        recipe, load("mnist5k"), RunFolder(tmp_path), training.make_mesh(1), log=lambda line: None, bar=False
    )


COLUMNS = {
    "x": np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32),
    "y": np.random.default_rng(1).normal(size=(32, 1)).astype(np.float32),
}


def test_a_job_trains_what_is_not_frozen_and_finishes_the_whole(context, tmp_path):
    seen, finished = [], []

    def loss(params, state, batch, key):
        return jnp.mean((predict(params, batch["x"]) - batch["y"]) ** 2) + 0.0 * state.frozen["teacher"], {}

    job = Job(
        init=lambda key: PARAMS,
        loss=loss,
        data=COLUMNS,
        finish=finished.append,
        preview=lambda params, step: seen.append((step, params)),
        frozen={"teacher": np.float32(1.0)},
        freeze=["encoder/*"],
    )
    run_job(context, "classifier", job)
    assert [step for step, _ in seen] == [4, 8]
    chex.assert_trees_all_equal(finished[0]["encoder"], PARAMS["encoder"])
    chex.assert_trees_all_equal(finished[0], seen[-1][1])
    assert (finished[0]["head"]["kernel"] != PARAMS["head"]["kernel"]).all()
    kept = training.read_kept(tmp_path, 8, "classifier").params
    assert set(kept) == {"head"}  # of the optimizer and the average, too: nothing is held twice


def test_a_job_of_players_is_the_same_loop(context):
    finished = []

    def loss(params, state, batch, key):
        return jnp.mean((predict(params, batch["x"]) - batch["y"]) ** 2), {
            "others": jnp.float32(len(PLAYERS))
        }

    adam = training.optimizer(1e-2, total_steps=8)
    players = [training.Player(name, loss, adam, ema_decay=0.9) for name in PLAYERS]
    job = Job(lambda key: {name: PARAMS for name in PLAYERS}, players, COLUMNS, finished.append)
    run_job(context, "classifier", job)
    log = training.read_log(context.run.stage("classifier").log)
    assert len(log["critic_loss"]) == 8 and log["critic_loss"][-1] < log["critic_loss"][0]
    assert set(finished[0]) == set(PLAYERS)
    with pytest.raises(InvalidArgumentError, match="freeze is for one network"):
        run_job(context, "classifier", job._replace(freeze=["maker/*"]))
