"""Scores of images, labels and class probabilities that need no fitted distribution."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxldm.arguments import array, checked, count, optional
from jaxldm.data.images import check_labels
from jaxldm.errors import DataError
from jaxldm.pixels import in_unit_range


class ReconstructionError(NamedTuple):
    """Mean squared error over all pixels, for images in [-1, 1], and the peak signal-to-noise ratio in dB."""

    mse: float
    psnr: float


class Neighbours(NamedTuple):
    """For each image the distance to its nearest reference image, and the row number of that one."""

    distance: Float[np.ndarray, "B"]
    index: Int[np.ndarray, "B"]


@checked(logits=array("real", "[N, K]", axes=2, filled=True), labels=array("whole", "[N]", axes=1))
def accuracy(logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, "N"]) -> float:
    """Return the share of rows whose largest entry is at the label, in [0, 1]."""
    _check_one_each(logits, labels)
    labels = check_labels(labels, len(logits), np.shape(logits)[1])
    return float((np.argmax(logits, axis=1) == labels).mean())


@checked(probabilities=array("real"))
def inception_score(probabilities: Float[np.ndarray, "N K"]) -> float:
    """Return exp(mean over x of KL(p(y|x) || p(y))), with p(y) the mean of p(y|x): between 1 and K.

    K if every image is surely of one class and all classes are equally frequent; 1 if all images look alike
    to the classifier. Over the whole set, not averaged over ten parts. With another classifier than
    Inception say which.

    Source: Salimans et al. 2016, section 4. Raises `DataError` if rows are not probabilities.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if (
        p.ndim != 2
        or 0 in p.shape
        or not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(axis=1), 1, atol=1e-3))
    ):
        raise DataError("probabilities must be [N, K] with N >= 1, not negative, with rows that add up to 1")
    marginal = p.mean(axis=0)
    ratio = np.divide(p, marginal, out=np.ones_like(p), where=p > 0)  # 0 log 0 = 0
    return float(np.exp((p * np.log(ratio)).sum(axis=1).mean()))


class SplitScore(NamedTuple):
    """Mean and standard deviation of the Inception Score over the splits."""

    mean: float
    std: float


@checked(logits=array("real", "[N, K]", axes=2, filled=True), splits=count(1), seed=optional(count(0)))
def inception_score_of_splits(
    logits: Float[np.ndarray, "N K"], splits: int = 10, seed: int | None = 2020
) -> SplitScore:
    """Return the published Inception Score: the mean of exp(KL) over parts of the set.

    It is that of the papers with logits of FID's Inception network without the bias of its last layer. It
    grows with the size of a part; papers have 50 000 images in 10 splits. Salimans et al. 2016, section 4.

    Args:
        logits: of the generated images.
        splits: number of parts.
        seed: of the shuffle before splitting, which is that of torch-fidelity; None: in the order given.

    Raises:
        DataError: fewer images than splits, NaN.
    """
    import scipy.special  # late: `import jaxldm.metrics` loads no SciPy

    logits = np.asarray(logits)
    number = len(logits)
    if logits.ndim != 2 or not 1 <= splits <= number:
        raise DataError(f"logits must be [N, K] with N >= splits = {splits} >= 1, got shape {logits.shape}")
    if not np.isfinite(logits).all():
        raise DataError("logits have NaN or infinity")
    order = np.arange(number)
    if seed is not None:
        order = np.random.RandomState(seed).permutation(number)
    scores = []
    for part in range(splits):
        rows = logits[order[part * number // splits : (part + 1) * number // splits]].astype(np.float64)
        log_p = scipy.special.log_softmax(rows, axis=1)
        p = np.exp(log_p)
        scores.append(np.exp((p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return SplitScore(float(np.mean(scores)), float(np.std(scores)))


@checked(vectors=array("real", "[N, ...]", axes=(1, 64)), labels=array("whole", "[N]", axes=1))
def within_class_diversity(vectors: Float[np.ndarray, "N ..."], labels: Int[np.ndarray, "N"]) -> float:
    """Return the mean Euclidean distance between two different images of a class, averaged over the classes.

    Args:
        vectors: one row per image: pixels [N, H, W, C] or features [N, D].
        labels: the class of each. Classes with fewer than two images are left out.

    Raises:
        DataError: no class has two images.
    """
    diversities = list(class_diversities(vectors, labels).values())
    if not diversities:
        raise DataError("the diversity within a class needs a class with at least two images")
    return float(np.mean(diversities))


@checked(vectors=array("real", "[N, ...]", axes=(1, 64)), labels=array("whole", "[N]", axes=1))
def class_diversities(vectors: Float[np.ndarray, "N ..."], labels: Int[np.ndarray, "N"]) -> dict[int, float]:
    """Return for each class with at least two images the mean distance between two different ones of it."""
    _check_one_each(vectors, labels)
    diversities = {}
    for label in np.unique(labels):
        members = _flat(vectors)[labels == label]
        count = len(members)
        if count >= 2:
            diversities[int(label)] = float(sum_of_distances(members) / (count * (count - 1)))
    return diversities


def sum_of_distances(vectors: Float[np.ndarray, "N ..."], others: Any = None) -> float:
    """Add up the distances of each vector to each of the others; of None to each of the vectors."""
    a = _flat(vectors)
    b = a if others is None else _flat(others)  # the diagonal of one set adds nothing
    return float(sum(np.sqrt(block).sum() for _, block in _squared_distances(a, b)))


@checked(
    images=array("real", "[N, ...]", axes=(1, 64), filled=True),
    reference=array("real", "[M, ...]", axes=(1, 64), filled=True),
)
def nearest_neighbour_distances(
    images: Float[np.ndarray, "N ..."], reference: Float[np.ndarray, "M ..."]
) -> Neighbours:
    """Return the Euclidean distance of each image to its nearest reference image, and which one that is.

    Against the training set this shows copies (distance 0). Compare with the same figure for real images that
    were not trained on: what is nearer than those is suspicious.
    """
    images, reference = _flat(images), _flat(reference)
    if images.shape[1] != reference.shape[1]:
        raise DataError(
            f"images have {images.shape[1]} numbers each, the reference images {reference.shape[1]}"
        )
    distance, index = np.empty(len(images)), np.empty(len(images), dtype=np.int64)
    for rows, block in _squared_distances(images, reference):
        index[rows] = block.argmin(axis=1)
        # The difference itself, not the expanded square, so that an exact copy has distance exactly 0.
        distance[rows] = np.linalg.norm(images[rows] - reference[index[rows]], axis=1)
    return Neighbours(distance, index)


@checked(images=in_unit_range(array("real"), drawn=True), reconstructions=array("real"))
def reconstruction_error(
    images: Float[np.ndarray, "N H W C"], reconstructions: Float[np.ndarray, "N H W C"]
) -> ReconstructionError:
    """Return the MSE over all pixels and PSNR = 10 log10(2^2 / MSE), for images in [-1, 1]."""
    images, reconstructions = np.asarray(images, np.float64), np.asarray(reconstructions, np.float64)
    if images.shape != reconstructions.shape:
        raise DataError(f"images {images.shape} and reconstructions {reconstructions.shape} differ in shape")
    return with_psnr(float(np.mean((images - reconstructions) ** 2)))


def with_psnr(mse: float) -> ReconstructionError:
    """The mean squared error of images in [-1, 1] and its PSNR."""
    return ReconstructionError(mse, float("inf") if mse == 0 else float(10 * np.log10(4 / mse)))


def _check_one_each(rows, labels) -> None:
    if len(rows) != len(labels):
        raise DataError(f"labels must be one for each of {len(rows)} images, got {len(labels)}")


def _flat(vectors) -> Float[np.ndarray, "N D"]:
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors.reshape(len(vectors), -1)


def _squared_distances(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"], block_size: int = 1024):
    """Yield (rows, |a[rows] - b|^2 as [B, M]) block by block, through |a|^2 + |b|^2 - 2 a b^T in float64."""
    norms = (b * b).sum(axis=1)
    for start in range(0, len(a), block_size):
        rows = slice(start, start + block_size)
        part = a[rows]
        squares = (part * part).sum(axis=1)[:, None] + norms[None] - 2 * part @ b.T
        if a is b:
            np.fill_diagonal(squares[:, start:], 0)
        yield rows, np.maximum(squares, 0, out=squares)
