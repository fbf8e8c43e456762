"""What the stages read of a split: the rows that they need, and not all at once."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxldm import training
from jaxldm.data import ArrayRows, Dataset
from jaxldm.metrics import classifier_function, real_images
from jaxldm.training import classifier, stages
from jaxldm.training.stages import Context


@dataclasses.dataclass
class NotedRows:
    """Random pictures that note which of them are taken at once."""

    number: int
    taken: list = dataclasses.field(default_factory=list)

    def __len__(self):
        return self.number

    def take(self, rows):
        self.taken.append(len(rows))
        images = [np.random.default_rng(row).uniform(-1, 1, (8, 8, 1)) for row in rows]
        return {"image": np.float32(images).reshape(-1, 8, 8, 1), "label": np.int32(rows % 2)}


@pytest.fixture
def context(tmp_path):
    """Of 5000 training pictures, of which the recipe wants 300."""
    splits = {"train": NotedRows(5000), "validation": NotedRows(3000), "test": NotedRows(3000)}
    recipe = dataclasses.replace(training.RECIPES["smoke"], max_train_images=300)
    mesh, run = training.make_mesh(1), training.RunFolder(tmp_path)
    return Context(recipe, Dataset("noted", (8, 8, 1), ("a", "b"), splits), run, mesh, log=lambda line: None)


def test_of_a_limited_split_no_more_rows_are_taken(context):
    rows = context.train_rows()
    assert isinstance(rows, ArrayRows) and len(rows) == 300
    assert context.dataset.rows("train").taken == [300]
    images, labels = context.train_arrays()
    np.testing.assert_array_equal(images, rows.columns["image"])
    np.testing.assert_array_equal(labels, rows.columns["label"])
    assert context.dataset.rows("train").taken == [300, 300]


def test_held_out_pictures_are_a_thousand_or_as_many_as_fit(context, monkeypatch):
    assert len(context.some("validation")[0]) == 1000 and len(context.some("validation", 5)[0]) == 5
    monkeypatch.setattr(stages, "MAX_BYTES_OF_SOME", 4 * 64 * 100)
    assert len(context.some("validation")[0]) == 100
    monkeypatch.setattr(stages, "MAX_BYTES_OF_SOME", 0)
    assert len(context.some("validation")[0]) == 32
    assert context.dataset.rows("validation").taken == [1000, 5, 100, 32]


def test_the_classifier_reads_test_pictures_batch_by_batch(context, monkeypatch):
    monkeypatch.setattr(classifier, "MOST_TESTED", 700)
    monkeypatch.setattr(classifier, "save_classifier", lambda *network: None)
    small = {"block_out_channels": (2, 2, 2), "num_features": 4}
    recipe = dataclasses.replace(context.recipe.classifier, overrides=small)
    context = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, classifier=recipe))
    job, module = classifier.prepare(context), classifier.build_classifier(context.recipe, (8, 8, 1), 2)
    context.run.stage("classifier").path.mkdir(parents=True)
    params = job.init(jax.random.key(0))
    job.finish(params)
    assert context.dataset.rows("test").taken == [256, 256, 188]
    whole = NotedRows(700).take(np.arange(700))
    classify = classifier_function(module, params)
    answers = real_images.classified(classify, context.dataset, "test", 700)
    for found, expected in zip(answers, (*classify(whole["image"]), whole["label"]), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    figures = json.loads((context.run.stage("classifier").path / "metrics.json").read_text())
    expected = float((answers.logits.argmax(axis=1) == whole["label"]).mean())
    assert figures == {"test_accuracy": expected, "test_images": 700}
