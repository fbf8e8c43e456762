"""The judge for the metrics: a small classifier of the real training images."""

from __future__ import annotations

import json

import flax.linen as nn

from jaxldm.files import write_atomically
from jaxldm.metrics.evaluate import classifier_function
from jaxldm.metrics.scores import accuracy
from jaxldm.models.digit_classifier import LIGHT, classification_loss
from jaxldm.training.recipes import ClassifierRecipe, Recipe
from jaxldm.training.stages import Context, build_model, sample_size, save_finished, train_network

STAGE = "classifier"


def build_classifier(recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The classifier of a recipe. Raises `UnknownNameError`, `InvalidArgumentError`."""
    return build_model(
        recipe.classifier,
        sample_size=sample_size(image_shape),
        in_channels=image_shape[-1],
        num_classes=num_classes,
    )


def make_loss(recipe: ClassifierRecipe, module: nn.Module):
    """`loss_fn(params, key, batch, step)` for `make_train_step`; `batch` holds `image` and `label`."""

    def loss_fn(params, key, batch, step):
        classify = lambda images: module.apply({"params": params}, images)  # noqa: E731
        strength = LIGHT if recipe.augment else None
        return classification_loss(key, classify, batch["image"], batch["label"], strength)

    return loss_fn


def train_classifier(context: Context) -> None:
    """Trains the classifier of a run into `classifier/model`; writes its test accuracy to `metrics.json`."""
    recipe, folder = context.recipe.classifier, context.run.stage(STAGE)
    module = build_classifier(context.recipe, context.dataset.image_shape, context.dataset.num_classes)
    images, labels = context.train_arrays()
    columns = {"image": images, "label": labels}
    params = train_network(context, STAGE, recipe, module, make_loss(recipe, module), columns)
    classify = classifier_function(module, params)
    test_images, test_labels = context.dataset.arrays("test")
    test_accuracy = accuracy(classify(test_images)[1], test_labels)
    context.say(f"classifier: reads {test_accuracy:.1%} of the {len(test_labels)} real test images right")
    figures = {"test_accuracy": test_accuracy, "test_images": len(test_labels)}
    write_atomically(folder.path / "metrics.json", (json.dumps(figures, indent=2) + "\n").encode())
    save_finished(folder, module, params)
