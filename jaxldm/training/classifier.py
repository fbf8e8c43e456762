"""The classifier for the metrics, trained on the real training images."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, cast

import chex
import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxldm import models
from jaxldm.data.augmentation import LIGHT, Augmentation, augment
from jaxldm.files import write_atomically
from jaxldm.indices import check_indices
from jaxldm.metrics.evaluate import classifier_function
from jaxldm.metrics.real_images import classified
from jaxldm.metrics.scores import accuracy
from jaxldm.training.recipes import ClassifierRecipe, Recipe
from jaxldm.training.runs import save_classifier
from jaxldm.training.stages import Context, Job, Task, build_model, sample_size, with_names
from jaxldm.training.state import Params

STAGE = "classifier"
MOST_TESTED = 10_000  # images


def classification_loss(
    key: Key[Array, ""],
    classify: Callable[[Float[Array, "B H W C"]], Float[Array, "B K"]],
    images: Float[Array, "B H W C"],
    labels: Int[Array, " B"],
    augmentation: Augmentation | None = LIGHT,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy -log p(label | augmented image), and {"accuracy": share classified correctly}.

    Args:
        key: draws the augmentation.
        classify: images -> logits, closed over the parameters.
        images: `[B, H, W, C]` in [-1, 1].
        labels: `[B]`.
        augmentation: None trains on the images as they are.
    """
    if augmentation is not None:
        images = augment(key, images, augmentation)
    logits = classify(images)
    chex.assert_shape(logits, (labels.shape[0], None))
    check_indices("labels", labels, logits.shape[1], where="the classes of the classifier")
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"accuracy": (jnp.argmax(logits, axis=-1) == labels).mean()}


def build_classifier(recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The classifier of a recipe. Raises `UnknownNameError`, `InvalidArgumentError`."""
    return build_model(
        cast(ClassifierRecipe, recipe.classifier),
        sample_size=sample_size(image_shape),
        in_channels=image_shape[-1],
        num_classes=num_classes,
    )


def make_loss(recipe: ClassifierRecipe, module: nn.Module):
    """`loss_fn(params, state, batch, key)` for `make_train_step`; `batch` holds `image` and `label`."""

    def loss_fn(params, state, batch, key):
        def classify(images) -> Any:
            return module.apply({"params": params}, images)

        strength = LIGHT if recipe.augment else None
        return classification_loss(key, classify, batch["image"], batch["label"], strength)

    return loss_fn


def prepare(context: Context) -> Job:
    """The classifier of a run, into `classifier/model`; its test accuracy goes to `metrics.json`."""
    recipe, folder = cast(ClassifierRecipe, context.recipe.classifier), context.run.stage(STAGE)
    module = build_classifier(context.recipe, context.dataset.image_shape, context.dataset.num_classes)
    columns = with_names(context.train_rows(), image="image", label="label")

    def finish(params: Params) -> None:
        test = classified(classifier_function(module, params), context.dataset, "test", MOST_TESTED)
        test_accuracy, number = accuracy(test.logits, test.labels), len(test.labels)
        context.log(f"classifier: {test_accuracy:.1%} of {number} real test images classified correctly")
        figures = {"test_accuracy": test_accuracy, "test_images": number}
        write_atomically(folder.path / "metrics.json", (json.dumps(figures, indent=2) + "\n").encode())
        save_classifier(context.run, module, params)

    return Job(functools.partial(models.init, module), make_loss(recipe, module), columns, finish)


TASK = Task(build_classifier, prepare)
