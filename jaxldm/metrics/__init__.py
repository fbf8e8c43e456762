"""Metrics of images, health checks and pictures: each figure next to that of real images."""

from jaxldm.metrics import health
from jaxldm.metrics.clip import clip_score, clip_similarities
from jaxldm.metrics.evaluate import Report, classifier_function, diversity_ratio, evaluate, stratified_subset
from jaxldm.metrics.extraction import FeatureNetwork, extract, image_encoder_network, inception_network
from jaxldm.metrics.frechet import fit_gaussian, frechet_distance, gaussian_frechet_distance
from jaxldm.metrics.health import Finding
from jaxldm.metrics.image_sets import ImageSet, array_set, open_image_set
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
from jaxldm.metrics.pairs import pair_distances
from jaxldm.metrics.pictures import image_grid, labelled_grid, nearest_neighbour_panel, save_png
from jaxldm.metrics.resizing import inception_inputs
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
from jaxldm.metrics.verifiers import clip_verifier, shapes_verifier

__all__ = [
    "FeatureNetwork",
    "Finding",
    "ImageSet",
    "KernelDistance",
    "Manifolds",
    "Moments",
    "Neighbours",
    "ReconstructionError",
    "Report",
    "SplitScore",
    "accuracy",
    "add_rows",
    "array_set",
    "class_diversities",
    "classifier_function",
    "clip_mmd",
    "clip_score",
    "clip_similarities",
    "clip_verifier",
    "diversity_ratio",
    "evaluate",
    "extract",
    "fit_gaussian",
    "fit_gaussian_by_blocks",
    "frechet_distance",
    "gaussian_frechet_distance",
    "gaussian_of",
    "health",
    "image_encoder_network",
    "image_grid",
    "inception_inputs",
    "inception_network",
    "inception_score",
    "inception_score_of_splits",
    "kernel_distance",
    "labelled_grid",
    "manifold_overlap",
    "merge_moments",
    "nearest_neighbour_distances",
    "nearest_neighbour_panel",
    "no_moments",
    "open_image_set",
    "pair_distances",
    "polynomial_mmd",
    "reconstruction_error",
    "save_png",
    "shapes_verifier",
    "sliced_wasserstein",
    "stratified_subset",
    "within_class_diversity",
]
