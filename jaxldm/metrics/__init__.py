"""Metrics of images, health checks and pictures: each figure next to that of real images."""

from jaxldm.metrics import health
from jaxldm.metrics.clip import clip_score, clip_similarities
from jaxldm.metrics.evaluate import Report, classifier_function, diversity_ratio, evaluate, stratified_subset
from jaxldm.metrics.frechet import fit_gaussian, frechet_distance, gaussian_frechet_distance
from jaxldm.metrics.health import Finding
from jaxldm.metrics.pictures import image_grid, labelled_grid, nearest_neighbour_panel, save_png
from jaxldm.metrics.scores import (
    Neighbours,
    ReconstructionError,
    accuracy,
    class_diversities,
    inception_score,
    nearest_neighbour_distances,
    reconstruction_error,
    within_class_diversity,
)

__all__ = [
    "Finding",
    "Neighbours",
    "ReconstructionError",
    "Report",
    "accuracy",
    "class_diversities",
    "classifier_function",
    "clip_score",
    "clip_similarities",
    "diversity_ratio",
    "evaluate",
    "fit_gaussian",
    "frechet_distance",
    "gaussian_frechet_distance",
    "health",
    "image_grid",
    "inception_score",
    "labelled_grid",
    "nearest_neighbour_distances",
    "nearest_neighbour_panel",
    "reconstruction_error",
    "save_png",
    "stratified_subset",
    "within_class_diversity",
]
