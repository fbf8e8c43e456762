"""`evaluate`: all figures of a set of generated images, each compared with that of real images."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxldm.arguments import a_params, array, checked, count, function, instance, optional, refuse
from jaxldm.data.batches import map_batches
from jaxldm.data.dataset import Dataset
from jaxldm.data.images import check_images, check_labels
from jaxldm.errors import DataError, InvalidArgumentError, shown
from jaxldm.metrics.frechet import frechet_distance
from jaxldm.metrics.health import Finding
from jaxldm.metrics.real_images import (
    Progress,
    classified,
    nearest_in_split,
    nearest_of_split,
    pixel_diversities,
)
from jaxldm.metrics.scores import accuracy, class_diversities, inception_score
from jaxldm.pixels import in_unit_range

Classify = Callable[[Float[np.ndarray, "N H W C"]], tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]]]


PICTURES = in_unit_range(array("floating", "[N, H, W, C]", axes=4), drawn=True)
ROWS, LABELS = array("real", "[N, ...]", axes=(1, 64)), array("whole", "[N]", axes=1)


def A_CLASSIFIER(name: str, value: Any) -> Any:
    """A module with the method that the metrics call."""
    if not hasattr(value, "apply") or not hasattr(value, "features_and_logits") or isinstance(value, type):
        raise refuse(name, "a classifier such as models.build('digit-classifier')", value)
    return value


@dataclasses.dataclass(frozen=True)
class Report:
    """The figures of `evaluate`; `real_...` is the same statistic for real images never trained on.

    Attributes:
        dataset: name of the real data.
        num_images: generated images.
        num_compared: size of each set in the set-wise figures (Fréchet distance, Inception-Score analogue).
        classifier_accuracy: the classifier's accuracy on the real test images.
        accuracy: share of the generated images that are classified as the requested class.
        frechet_distance: on classifier features, generated against real test images.
        real_frechet_distance: the floor: real validation against real test images, sets of the same sizes.
        inception_score: the analogue with this classifier's probabilities; real_: of real test images.
        feature_diversity, pixel_diversity: within-class diversity of the generated images as a ratio to
            that of the real test images of the same classes: 1 is as diverse as real.
        nearest_distance: median pixel distance to the nearest training image; real_: of real test images.
        near_copies: share of the generated images that are nearer to a training image than the nearest 1 %
            of the real test images are: about 0.01 for a model that does not copy.
        findings: warnings, for example that there are few images.
    """

    dataset: str
    num_images: int
    num_compared: int
    classifier_accuracy: float
    accuracy: float
    frechet_distance: float
    real_frechet_distance: float
    inception_score: float
    real_inception_score: float
    feature_diversity: float
    pixel_diversity: float
    nearest_distance: float
    real_nearest_distance: float
    near_copies: float
    findings: tuple[Finding, ...] = ()

    @property
    def frechet_ratio(self) -> float:
        """The Fréchet distance as a multiple of the floor."""
        return self.frechet_distance / self.real_frechet_distance if self.real_frechet_distance else math.inf

    def to_dict(self) -> dict:
        """Return the figures as plain data for JSON, `frechet_ratio` included."""
        figures = dataclasses.asdict(self)
        figures["findings"] = [finding._asdict() for finding in self.findings]
        return {**figures, "frechet_ratio": self.frechet_ratio}

    def warnings(self) -> list[str]:
        """Return a sentence or two for each finding that is not ok."""
        return [f"Warning: {finding.seen}. {finding.fix}." for finding in self.findings if not finding.ok]

    def to_markdown(self, *, warnings: bool = True) -> str:
        """Return the figures as a table, those of real images in the third column, and the `warnings`."""
        n = self.num_compared
        rows = [
            (
                "images classified as the requested class",
                f"{self.accuracy:.1%}",
                f"{self.classifier_accuracy:.1%} (the classifier on real test images)",
            ),
            (
                "Fréchet distance on classifier features",
                f"{self.frechet_distance:.3f}",
                f"{self.real_frechet_distance:.3f} (validation against test, {n} images); "
                f"ratio {self.frechet_ratio:.2f}",
            ),
            (
                "Inception-Score analogue (this classifier)",
                f"{self.inception_score:.2f}",
                f"{self.real_inception_score:.2f} ({n} test images)",
            ),
            ("within-class diversity of features, ratio to real", f"{self.feature_diversity:.2f}", "1"),
            ("within-class diversity of pixels, ratio to real", f"{self.pixel_diversity:.2f}", "1"),
            (
                "median distance to the nearest training image",
                f"{self.nearest_distance:.2f}",
                f"{self.real_nearest_distance:.2f} (test images)",
            ),
            ("nearer to a training image than 99 % of test images", f"{self.near_copies:.1%}", "1.0%"),
        ]
        lines = [
            f"| {self.num_images} generated images, {self.dataset} | generated | real |",
            "|---|---|---|",
        ]
        lines += [f"| {name} | {value} | {real} |" for name, value, real in rows]
        lines += [f"\n{warning}" for warning in (self.warnings() if warnings else [])]
        return "\n".join(lines)


@checked(module=A_CLASSIFIER, params=a_params, batch_size=count(1))
def classifier_function(module: Any, params: Any, batch_size: int = 256) -> Classify:
    """Return images [N, H, W, C] -> (features [N, D], logits [N, K]) of a classifier, jitted, in batches.

    `module` has the method `features_and_logits`, as `models.build("digit-classifier")` does.
    """
    forward = jax.jit(
        lambda params, images: module.apply({"params": params}, images, method="features_and_logits")
    )

    def classify(images: Any) -> tuple[Any, Any]:
        from jaxldm.models.inputs import fitting  # late: `import jaxldm.metrics` loads no Flax

        with fitting(module):
            rows = np.asarray(PICTURES("images", images), np.float32)
            return map_batches(lambda batch: forward(params, batch), rows, batch_size)

    return classify


@checked(
    classify=function("images -> (features, logits)"),
    dataset=instance(Dataset, "a dataset from data.load(name)"),
    progress=optional(function("(images done, images in all)")),
)
def evaluate(
    images: Float[np.ndarray, "N H W C"],
    labels: Int[np.ndarray, "N"],
    classify: Classify,
    dataset: Dataset,
    *,
    progress: Callable[[int, int], Any] | None = None,
) -> Report:
    """Return the figures of generated images, each next to that of real images never trained on.

    Real images are those of the generated classes only; they are read block by block. Set-wise figures use
    sets of one size on both sides (as many as the smallest set has, spread evenly over the classes), because
    they change with the number of images.

    Args:
        images: generated, [N, H, W, C] in [-1, 1].
        labels: the requested class of each.
        classify: see `classifier_function`.
        dataset: real images with splits train, validation and test.
        progress: called with (done, total) as images are classified or compared with: `D.bar_progress(bar)`.

    Raises:
        DataError: images or labels are wrong, or a generated class has fewer than two real images.
    """
    images = check_images(images, dataset.image_shape, "generated images")
    labels = check_labels(labels, len(images), dataset.num_classes)
    classify, done = _answering(classify), _counter(progress, len(images), dataset)
    test = classified(classify, dataset, "test", progress=done)
    classifier_accuracy = accuracy(test.logits, test.labels)
    same = np.flatnonzero(np.isin(test.labels, labels))  # the rows of the test images that are compared
    test = test.of(same)
    validation = classified(classify, dataset, "validation", progress=done)
    validation = validation.of(np.isin(validation.labels, labels))
    features, logits = classify(images)
    done(len(images))

    num_real = min(len(test.labels), len(validation.labels))
    number = min(len(images), num_real)
    if num_real < 2:
        raise DataError(f"{dataset.name} has fewer than two real images of the generated classes")
    chosen, test_chosen = stratified_subset(labels, number), stratified_subset(test.labels, number)
    validation_chosen = stratified_subset(validation.labels, number)
    nearest = nearest_in_split(images, dataset, "train", done)
    real_nearest = nearest_of_split(dataset, "test", same, "train", done)
    pixels = pixel_diversities(dataset, "test", same, test.labels)
    return Report(
        dataset=dataset.name,
        num_images=len(images),
        num_compared=number,
        classifier_accuracy=classifier_accuracy,
        accuracy=accuracy(logits, labels),
        frechet_distance=frechet_distance(features[chosen], test.features),
        real_frechet_distance=frechet_distance(validation.features[validation_chosen], test.features),
        inception_score=inception_score(softmax(logits[chosen])),
        real_inception_score=inception_score(softmax(test.logits[test_chosen])),
        feature_diversity=diversity_ratio(features, labels, test.features, test.labels),
        pixel_diversity=_ratio(class_diversities(images, labels), pixels),
        nearest_distance=float(np.median(nearest)),
        real_nearest_distance=float(np.median(real_nearest)),
        near_copies=float(np.mean(nearest < np.quantile(real_nearest, 0.01))),
        findings=tuple(_warnings(labels, test.labels, number, features.shape[1], classifier_accuracy)),
    )


def _counter(progress: Callable[[int, int], Any] | None, number: int, dataset: Dataset) -> Progress:
    """What adds up the images that are done, of all that an evaluation of so many images looks at."""
    test, validation, train = (len(dataset.rows(split)) for split in ("test", "validation", "train"))
    done, total = 0.0, test + validation + number + 2 * train

    def count(more: float) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(min(round(done), total), total)

    return count


def _answering(classify: Classify) -> Classify:
    """The same function, whose answers are checked."""

    def answers(images: Any) -> tuple[Any, Any]:
        found = classify(images)
        if (
            not isinstance(found, (tuple, list))
            or len(found) != 2
            or any(np.ndim(part) < 2 for part in found)
        ):
            raise InvalidArgumentError(
                f"classify must return (features [N, D], logits [N, K]), got {shown(found)}: see "
                "metrics.classifier_function"
            )
        return found

    return answers


@checked(labels=array("whole", "[N]", axes=1, filled=True), number=count(0))
def stratified_subset(labels: Int[np.ndarray, "N"], number: int) -> Int[np.ndarray, "M"]:
    """Return `number` row numbers, spread evenly over the rows in order of their class."""
    order = np.argsort(labels, kind="stable")
    return order[np.arange(number) * len(labels) // number]


@checked(vectors=ROWS, labels=LABELS, real_vectors=ROWS, real_labels=LABELS)
def diversity_ratio(
    vectors: Float[np.ndarray, "N ..."],
    labels: Int[np.ndarray, "N"],
    real_vectors: Float[np.ndarray, "M ..."],
    real_labels: Int[np.ndarray, "M"],
) -> float:
    """Return within-class diversity over that of real images, both averaged over the classes that both have.

    NaN if no class has two images on both sides.
    """
    return _ratio(class_diversities(vectors, labels), class_diversities(real_vectors, real_labels))


def _ratio(drawn: dict[int, float], real: dict[int, float]) -> float:
    both = sorted(drawn.keys() & real.keys())
    if not both:
        return math.nan
    return float(np.mean([drawn[label] for label in both]) / np.mean([real[label] for label in both]))


def softmax(logits: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Return exp(logits) / sum exp(logits) along the last axis, in float64."""
    logits = np.asarray(logits, np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _warnings(labels, test_labels, number: int, width: int, classifier_accuracy: float) -> list[Finding]:
    findings = []
    if number < 5 * width:
        findings.append(
            Finding(
                "sample count",
                f"{number} images for the covariance of {width} features: the Fréchet distance and its "
                "floor are both biased upwards",
                "few images were generated, or few real ones are held out",
                f"Compare it with the floor only; it needs {5 * width} "
                + ("generated images" if number == len(labels) else "real images that are held out"),
                False,
            )
        )
    per_class = np.bincount(labels)[np.unique(labels)].min()
    if per_class < 20:
        findings.append(
            Finding(
                "images per class",
                f"the smallest class has {per_class} generated images: diversity and accuracy are rough",
                "few images were generated",
                "Generate at least 20 of each class",
                False,
            )
        )
    if classifier_accuracy < 0.97:
        findings.append(
            Finding(
                "classifier",
                f"only {classifier_accuracy:.1%} of the real test images are classified correctly",
                "the classifier is trained too short, or the recipe only shows that everything runs",
                "Train a run with more epochs of the classifier (--classifier-epochs) before you believe "
                "figures that rest on it",
                False,
            )
        )
    return findings + _balance(labels, test_labels)


def _balance(labels: Any, test_labels: Any) -> list[Finding]:
    """A warning where the classes are not equally frequent on both sides, and which side has to change."""
    counts = np.bincount(labels)
    classes = np.flatnonzero(counts)
    real = np.bincount(test_labels, minlength=len(counts))[classes] / len(test_labels)
    shares = counts[classes] / len(labels)
    if np.abs(shares - real).max() <= 0.05:
        return []
    if np.ptp(counts[classes]) > 1:
        seen = "the classes are not as frequent among the generated images as among the real ones"
        cause, fix = "the requested labels are not balanced", "Request each class as often as it is real"
    else:
        seen = (
            "each class has equally many generated images, but not equally many real test images "
            f"({real.min():.0%} to {real.max():.0%} of them)"
        )
        cause = "the real images are not balanced, or few are held out"
        fix = "Hold out equally many of each class, or compare only models with the same test images"
    finding = Finding("class balance", f"{seen}: the Fréchet distance counts that, too", cause, fix, False)
    return [finding]
