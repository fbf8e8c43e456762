"""`evaluate` on images whose figures are known beforehand, and the classifier that it asks."""

import json

import jax
import numpy as np
import pytest

from jaxldm import models
from jaxldm.data import ArrayRows, Dataset
from jaxldm.errors import DataError
from jaxldm.metrics import (
    classifier_function,
    diversity_ratio,
    evaluate,
    frechet_distance,
    real_images,
    stratified_subset,
)
from jaxldm.metrics.evaluate import softmax

CLASSES = 4
DIRECTIONS = np.linalg.qr(np.random.default_rng(0).normal(size=[16, 16]))[0][:, :CLASSES].T


def draw(per_class, seed):
    """Images near one of four directions: [N, 4, 4, 1] in (-1, 1), sorted by class."""
    labels = np.repeat(np.arange(CLASSES), per_class).astype(np.int32)
    noise = np.random.default_rng(seed).normal(size=[len(labels), 16])
    images = np.tanh(0.6 * DIRECTIONS[labels] + 0.05 * noise)
    return images.reshape(-1, 4, 4, 1).astype(np.float32), labels


def columns(per_class, seed):
    images, labels = draw(per_class, seed)
    return ArrayRows({"image": images, "label": labels})


DATASET = Dataset(
    "toy",
    (4, 4, 1),
    tuple("abcd"),
    {"train": columns(100, 1), "validation": columns(40, 2), "test": columns(40, 3)},
)


def classify(images):
    """Reads the direction: features are the projections, logits ten times those."""
    features = images.reshape(len(images), -1) @ DIRECTIONS.T
    return features, 40 * features


def test_images_of_the_same_distribution_get_the_figures_of_real_ones():
    report = evaluate(*draw(40, 4), classify, DATASET)
    assert report.accuracy == report.classifier_accuracy == 1
    assert 0.3 < report.frechet_ratio < 3
    assert report.inception_score == pytest.approx(CLASSES, rel=0.05)
    assert report.real_inception_score == pytest.approx(CLASSES, rel=0.05)
    assert report.feature_diversity == pytest.approx(1, abs=0.1) == report.pixel_diversity
    assert report.nearest_distance == pytest.approx(report.real_nearest_distance, rel=0.1)
    assert report.near_copies < 0.05 and report.findings == ()
    assert report.num_images == report.num_compared == 160


def test_the_figures_are_those_of_the_single_functions():
    images, labels = draw(40, 4)
    report = evaluate(images, labels, classify, DATASET)
    real, validation = classify(DATASET.arrays("test")[0])[0], classify(DATASET.arrays("validation")[0])[0]
    assert report.frechet_distance == frechet_distance(classify(images)[0], real)
    assert report.real_frechet_distance == frechet_distance(validation, real)
    assert report.pixel_diversity == diversity_ratio(images, labels, *DATASET.arrays("test"))


class NotedRows:
    """Rows that note how many are taken at once."""

    def __init__(self, rows):
        self.rows, self.taken = rows, []

    def __len__(self):
        return len(self.rows)

    def take(self, rows):
        self.taken.append(len(rows))
        return self.rows.take(rows)


def test_no_split_is_read_as_a_whole_and_the_figures_are_the_same(monkeypatch):
    noted = {name: NotedRows(rows) for name, rows in DATASET.parts.items()}
    dataset = Dataset("toy", (4, 4, 1), tuple("abcd"), noted)
    images, labels = draw(40, 4)
    images[:3] = DATASET.arrays("train")[0][[0, 150, 399]]  # copies, which have distance 0 in whichever block
    expected = evaluate(images, labels, classify, DATASET)  # a split is one block
    monkeypatch.setattr(real_images, "AT_ONCE", 50)
    monkeypatch.setattr(real_images, "MAX_BYTES", 30 * 8 * 16)
    seen, totals = [], set()
    report = lambda done, total: (seen.append(done), totals.add(total))  # noqa: E731
    found = evaluate(images, labels, classify, dataset, progress=report)
    assert max(noted["train"].taken) == 30 and max(noted["validation"].taken) == 50 == max(
        noted["test"].taken
    )
    texts = ("dataset", "findings")
    figures, wanted = (
        {name: value for name, value in report.to_dict().items() if name not in texts}
        for report in (found, expected)
    )
    assert totals == {160 + 160 + 160 + 2 * 400} == {seen[-1]}
    assert len(seen) > 40 and seen == sorted(set(seen))  # nothing counts twice
    assert figures == pytest.approx(wanted, rel=1e-9) and found.findings == expected.findings
    assert found.near_copies >= 3 / 160
    for split in ("test", "validation"):
        assert real_images.nearest_in_split(DATASET.arrays(split)[0], dataset, split).max() == 0


def test_classes_without_two_real_images_are_refused():
    few = columns(40, 3).take(np.arange(0, 121))  # one of the last class
    dataset = Dataset("toy", (4, 4, 1), tuple("abcd"), {**DATASET.parts, "test": ArrayRows(few)})
    with pytest.raises(DataError, match="fewer than two real images"):
        evaluate(draw(2, 4)[0][-2:], np.array([3, 3]), classify, dataset)


def test_copies_of_the_training_set_are_found_out():
    images, labels = DATASET.arrays("train")
    report = evaluate(images[::2], labels[::2], classify, DATASET)
    assert report.near_copies == 1 and report.nearest_distance == 0 < report.real_nearest_distance


def test_one_image_over_and_over_has_no_diversity_and_is_far_from_real():
    images, labels = draw(40, 4)
    report = evaluate(np.repeat(images[::40], 40, axis=0), labels, classify, DATASET)
    assert report.feature_diversity < 1e-3 and report.pixel_diversity < 1e-3 and report.frechet_ratio > 3


def test_images_of_the_wrong_class_are_counted():
    images, labels = draw(40, 4)
    assert evaluate(images, (labels + 1) % CLASSES, classify, DATASET).accuracy == 0


def test_only_real_images_of_the_asked_classes_are_compared():
    images, labels = draw(40, 4)
    report = evaluate(images[:80], labels[:80], classify, DATASET)  # classes 0 and 1
    assert 0.3 < report.frechet_ratio < 3 and report.num_compared == 80
    assert report.real_inception_score == pytest.approx(2, rel=0.05)


def test_few_and_unbalanced_images_are_warned_about():
    images, labels = draw(40, 4)
    report = evaluate(images[:45], labels[:45], classify, DATASET)
    assert {finding.check for finding in report.findings} == {"images per class", "class balance"}
    report = evaluate(images[::10], labels[::10], classify, DATASET)
    assert {finding.check for finding in report.findings} == {"images per class", "sample count"}
    assert "Warning: 16 images" in report.to_markdown()
    assert "Warning" not in report.to_markdown(warnings=False) and len(report.warnings()) == 2
    assert "needs 20 generated images." in report.to_markdown()


def test_it_is_said_which_side_is_not_balanced():
    images, labels = draw(40, 4)
    [unequal] = evaluate(images[:45], labels[:45], classify, DATASET).warnings()[1:]
    assert "Request each class as often as it is real" in unequal
    few = ArrayRows(columns(40, 3).take(np.arange(0, 130)))  # ten of the last class
    dataset = Dataset("toy", (4, 4, 1), tuple("abcd"), {**DATASET.parts, "test": few})
    [of_real] = evaluate(images, labels, classify, dataset).warnings()
    assert "equally many generated images, but not equally many real test images (8% to 31%" in of_real
    assert "Hold out equally many of each class" in of_real and "Request" not in of_real
    few = ArrayRows(columns(40, 3).take(np.arange(0, 160, 10)))
    dataset = Dataset("toy", (4, 4, 1), tuple("abcd"), {**DATASET.parts, "test": few})
    [sizes] = evaluate(images, labels, classify, dataset).warnings()
    assert "needs 20 real images that are held out" in sizes


def test_a_classifier_that_reads_badly_is_warned_about():
    report = evaluate(*draw(40, 4), lambda images: (classify(images)[0], -classify(images)[1]), DATASET)
    assert [finding.check for finding in report.findings] == [
        "classifier"
    ] and report.classifier_accuracy == 0


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros([2, 5, 4, 1], np.float32), np.zeros(2, int), "generated images must be 4x4x1"),
        (np.full([2, 4, 4, 1], np.nan, np.float32), np.zeros(2, int), "NaN"),
        (np.zeros([2, 4, 4, 1], np.float32), np.array([0, 4]), r"in \[0, 3\], but labels\[1\] is 4"),
    ],
)
def test_bad_images_and_labels_are_refused(images, labels, message):
    with pytest.raises(DataError, match=message):
        evaluate(images, labels, classify, DATASET)


def test_the_table_puts_real_beside_generated_and_never_says_fid():
    report = evaluate(*draw(40, 4), classify, DATASET)
    table = report.to_markdown()
    assert "FID" not in table and "100.0% (the classifier on real test images)" in table
    assert f"{report.real_frechet_distance:.3f} (validation against test, 160 images)" in table
    assert json.loads(json.dumps(report.to_dict()))["frechet_ratio"] == report.frechet_ratio


def test_a_stratified_subset_takes_the_same_share_of_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [10, 20, 30, 40, 100]))
    chosen = stratified_subset(labels, 20)
    assert len(np.unique(chosen)) == 20
    assert np.bincount(labels[chosen]).tolist() == [1, 2, 3, 4, 10]


def test_softmax_is_a_probability_even_for_huge_logits():
    p = softmax(np.array([[1e5, 0.0, 1e5]]))
    np.testing.assert_allclose(p, [[0.5, 0, 0.5]])


def test_the_classifier_function_gives_features_and_logits_of_any_number_of_images():
    module = models.build("digit-classifier", sample_size=8, block_out_channels=(2, 2, 2), num_features=3)
    params = models.init(module, jax.random.key(0))
    images = np.random.default_rng(0).uniform(-1, 1, size=[5, 8, 8, 1]).astype(np.float32)
    features, logits = classifier_function(module, params, batch_size=2)(images)
    expected = module.apply({"params": params}, images, method="features")
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, module.apply({"params": params}, images), rtol=1e-5, atol=1e-6)
    assert features.shape == (5, 3) and logits.shape == (5, 10)
