"""The metrics of sets of images by name: which network each needs, and what it makes of the features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.metrics.frechet import Gaussian, check_gaussian, gaussian_frechet_distance
from jaxldm.metrics.health import Finding
from jaxldm.metrics.image_sets import ImageSet
from jaxldm.metrics.kernels import clip_mmd, kernel_distance
from jaxldm.metrics.manifolds import manifold_overlap
from jaxldm.metrics.moments import fit_gaussian_by_blocks
from jaxldm.metrics.scores import inception_score_of_splits
from jaxldm.metrics.sliced import sliced_wasserstein
from jaxldm.reading import reading

Figures = dict[str, float]
KID_SUBSET = 1000
ENOUGH_IMAGES = 2048  # the width of FID's features: below, their covariance is singular


class Metric(NamedTuple):
    """A metric of a set of images.

    Attributes:
        network: "inception", "dinov2", "clip" or "lpips".
        layer: the features that it takes.
        fewest: images that each set must have.
        compute: (features [N, D], those of the real images or their `Gaussian`) -> {name: value}; of a paired
            metric (distances [N], None).
        compares: whether it needs real images.
        from_statistics: whether a mean and a covariance are enough for the real ones.
        best: what is better, for the table.
        paired: whether each image is compared with the real one at its place.
        of_texts: whether `compute` takes the embeddings of the images' texts in place of real features.
    """

    network: str
    layer: str
    fewest: int
    compute: Callable[[Any, Any], Figures]
    compares: bool = True
    from_statistics: bool = False
    best: str = "lower"
    paired: bool = False
    of_texts: bool = False


def _frechet(name: str) -> Callable[[Any, Any], Figures]:
    def compute(features: Any, real: Any) -> Figures:
        known = real if isinstance(real, Gaussian) else fit_gaussian_by_blocks(real, "real features")
        return {name: gaussian_frechet_distance(fit_gaussian_by_blocks(features), known)}

    return compute


def _kid(features: Any, real: Any) -> Figures:
    size = min(KID_SUBSET, len(features), len(real))
    distance = kernel_distance(features, real, subset_size=size)
    return {"kid": distance.mean, "kid_std": distance.std}


def _inception_score(features: Any, real: Any) -> Figures:
    score = inception_score_of_splits(features)
    return {"is": score.mean, "is_std": score.std}


def _overlap(features: Any, real: Any) -> Figures:
    """Precision and recall with 3 neighbours, density and coverage with 5: each as it was published."""
    three, five = (manifold_overlap(features, real, k) for k in (3, 5))
    return {
        "precision": three.precision,
        "recall": three.recall,
        "density": five.density,
        "coverage": five.coverage,
    }


def _paired(distances: Any, real: Any) -> Figures:
    return {"lpips": float(distances.mean()), "lpips_std": float(distances.std())}


def _clip_score(embeddings: Any, texts: Any) -> Figures:
    """100 max(cos, 0) of each image and its own text, averaged (Hessel et al. 2021)."""
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.asarray(embeddings), texts))
    scores = 100 * np.maximum((images * texts).sum(axis=1), 0)
    return {"clip-score": float(scores.mean()), "clip-score_std": float(scores.std())}


METRICS: dict[str, Metric] = {
    "fid": Metric("inception", "pool", 2, _frechet("fid"), from_statistics=True),
    "sfid": Metric("inception", "spatial", 2, _frechet("sfid"), from_statistics=True),
    "kid": Metric("inception", "pool", 2, _kid),
    "is": Metric("inception", "logits", 10, _inception_score, compares=False, best="higher"),
    "prdc": Metric("inception", "pool", 6, _overlap, best="higher"),
    "mind": Metric("inception", "pool", 2, lambda a, b: {"mind": sliced_wasserstein(a, b)}),
    "fd-dinov2": Metric("dinov2", "embedding", 2, _frechet("fd-dinov2")),
    "cmmd": Metric("clip", "embedding", 2, lambda a, b: {"cmmd": clip_mmd(a, b)}),
    "clip-score": Metric("clip", "embedding", 1, _clip_score, compares=False, best="higher", of_texts=True),
    "lpips": Metric("lpips", "pairs", 1, _paired, paired=True),
}


def check_counts(metrics: Mapping[str, Metric], images: ImageSet, real: ImageSet | None) -> None:
    """Raise `DataError` if a set is too small for one of the metrics."""
    for name, metric in metrics.items():
        for part in (images, real if metric.compares else None):
            if part is not None and part.count < metric.fewest:
                raise DataError(
                    f"{part.name} has {part.count} image{'s' * (part.count > 1)}, and {name} needs at least "
                    f"{metric.fewest}"
                )


def read_statistics(path: Path | str) -> dict[str, Gaussian] | None:
    """Return the moments of real images from an .npz file of reference statistics; None for other files.

    Such files have `mu` and `sigma` of the layer pool, and `mu_s` and `sigma_s` of the layer spatial (ADM's).
    With images in them, too, those are used.

    Raises:
        DataError: a damaged file, or moments of another network.
    """
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return None
    with reading(path, DataError), np.load(path, allow_pickle=False) as file:
        if "mu" not in file.files or "sigma" not in file.files or "arr_0" in file.files:
            return None
        pairs = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
        found = {
            layer: Gaussian(_numbers(file[mean]), _numbers(file[covariance]))
            for layer, (mean, covariance) in pairs.items()
            if mean in file.files and covariance in file.files
        }
    for layer, width in (("pool", 2048), ("spatial", 2023)):
        shapes = [part.shape for part in found.get(layer, ())]
        if shapes and shapes != [(width,), (width, width)]:
            raise DataError(f"{path} has moments of shape {shapes}, not of FID's network: {width} features")
        if shapes:
            check_gaussian(found[layer], f"{path}: {layer}")
    return found


def _numbers(values: np.ndarray) -> np.ndarray:
    """Real numbers as float64; others as they are, to be refused."""
    return values.astype(np.float64) if values.dtype.kind in "fiu" else values


def check_statistics(metrics: Mapping[str, Metric], statistics: Mapping[str, Gaussian], name: str) -> None:
    """Raise `InvalidArgumentError` if a metric needs more of the real images than their moments."""
    for metric_name, metric in metrics.items():
        if metric.compares and not (metric.from_statistics and metric.layer in statistics):
            raise InvalidArgumentError(
                f"{metric_name} needs the real images, and {name} has only the mean and covariance of "
                f"{', '.join(statistics)} features: give a folder of images, or leave {metric_name} out"
            )


def warnings_of(metrics: Mapping[str, Metric], images: ImageSet, real: ImageSet | None) -> list[Finding]:
    """Return what makes the figures rough, or not those of other programs."""
    fewest = min(part.count for part in (images, real) if part is not None)
    findings = []
    frechet = [name for name in metrics if name in ("fid", "sfid", "fd-dinov2")]
    if frechet and fewest < ENOUGH_IMAGES:
        findings.append(
            Finding(
                "sample count",
                f"{fewest} images are fewer than the {ENOUGH_IMAGES} features whose covariance "
                f"{', '.join(frechet)} needs: it is singular, and the distance is biased upwards",
                "few images",
                "Compare it only with sets of the same size; kid and mind are made for few images",
                False,
            )
        )
    if "kid" in metrics and fewest < KID_SUBSET:
        findings.append(
            Finding(
                "KID's subsets",
                f"KID is over subsets of {fewest} images, not of {KID_SUBSET} as published",
                "few images",
                f"Give at least {KID_SUBSET} images of each kind",
                False,
            )
        )
    if real is not None and images.size != real.size:
        findings.append(
            Finding(
                "image sizes",
                f"{images.name} has images of {images.size[1]}x{images.size[0]}, {real.name} of "
                f"{real.size[1]}x{real.size[0]}: part of the distance is the resizing",
                "the sets were made for different sizes",
                "Resize the real images to the size of the generated ones",
                False,
            )
        )
    if images.lossy or (real is not None and real.lossy):
        findings.append(
            Finding(
                "JPEG files",
                "some of the images are JPEG files, whose artefacts change every distance",
                "they were saved so",
                "Save generated images as PNG; real ones that exist only as JPEG are as published",
                False,
            )
        )
    return findings
