"""Metrics of images, health checks and pictures: each figure next to that of real images."""

from jaxldm.metrics import health
from jaxldm.metrics.clip import clip_score, clip_similarities
from jaxldm.metrics.evaluate import Report, classifier_function, diversity_ratio, evaluate, stratified_subset
from jaxldm.metrics.frechet import fit_gaussian, frechet_distance, gaussian_frechet_distance
from jaxldm.metrics.health import Finding
from jaxldm.metrics.kernels import KernelDistance, clip_mmd, kernel_distance, polynomial_mmd
from jaxldm.metrics.manifolds import Manifolds, manifold_overlap
from jaxldm.metrics.moments import (
    Moments,
    add_rows,
    fit_gaussian_by_blocks,
    gaussian_of,
    merge_moments,
    no_moments,
)
from jaxldm.metrics.pictures import image_grid, labelled_grid, nearest_neighbour_panel, save_png
from jaxldm.metrics.scores import (
    Neighbours,
    ReconstructionError,
    SplitScore,
    accuracy,
    class_diversities,
    inception_score,
    inception_score_of_splits,
    nearest_neighbour_distances,
    reconstruction_error,
    within_class_diversity,
)
from jaxldm.metrics.sliced import sliced_wasserstein

__all__ = [
    "Finding",
    "KernelDistance",
    "Manifolds",
    "Moments",
    "Neighbours",
    "ReconstructionError",
    "Report",
    "SplitScore",
    "accuracy",
    "add_rows",
    "class_diversities",
    "classifier_function",
    "clip_mmd",
    "clip_score",
    "clip_similarities",
    "diversity_ratio",
    "evaluate",
    "fit_gaussian",
    "fit_gaussian_by_blocks",
    "frechet_distance",
    "gaussian_frechet_distance",
    "gaussian_of",
    "health",
    "image_grid",
    "inception_score",
    "inception_score_of_splits",
    "kernel_distance",
    "labelled_grid",
    "manifold_overlap",
    "merge_moments",
    "nearest_neighbour_distances",
    "nearest_neighbour_panel",
    "no_moments",
    "polynomial_mmd",
    "reconstruction_error",
    "save_png",
    "sliced_wasserstein",
    "stratified_subset",
    "within_class_diversity",
]
