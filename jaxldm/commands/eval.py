"""`jaxldm eval`: how good the images of a trained model are."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from jaxldm.commands.options import shown
from jaxldm.commands.terminal import STEP_BAR, check_seed, print_findings
from jaxldm.errors import CheckpointError, InvalidArgumentError


@dataclass(frozen=True)
class Eval:
    """Measure the images of a trained model, real images beside each figure: metrics.md and metrics.json.

    For example:
      jaxldm eval runs/mini-ldm --guidance-scale 1 3 7.5

    The judge is the classifier that was trained with the run; its own accuracy on real test images and the
    Frechet distance between two sets of real images stand beside the figures that rest on them.
    """

    folder: Annotated[Positional[str], shown("RUN")]
    """Run folder made by `jaxldm train`."""

    guidance_scale: Annotated[
        tuple[float, ...], shown("FLOAT ...", "1 3, or 1 for a model without classes")
    ] = ()
    """One or several guidance scales; each is measured by itself."""

    num_images: int = 500
    """How many images to draw at each scale, as many of each class as of the others."""

    num_inference_steps: int = 50
    """In how many steps noise becomes an image."""

    solver: Annotated[str, shown("NAME")] = "ddim"
    """How the steps are taken; `jaxldm info` lists all."""

    seed: int = 0
    """Which random numbers: any whole number from 0 to 4294967295."""

    batch_size: int = 64
    """How many images are on the way at once; it never changes a picture."""

    output_dir: Annotated[str | None, shown("OUT", "RUN/eval")] = None
    """Folder for metrics.json, metrics.md and a grid of images for each scale."""

    def run(self) -> None:
        """Checks everything, then draws and measures at each scale, prints and saves."""
        from jaxldm import data, metrics, pipelines, training
        from jaxldm.files import write_together

        out = Path(self.output_dir or Path(self.folder) / "eval")
        check_seed(self.seed)
        pipelines.check_output_folder(out)
        classify = load_judge(self.folder)
        pipe, recipe = pipelines.load(self.folder), training.read_recipe(self.folder)
        scales = [pipe.check_guidance_scale(scale) for scale in self.guidance_scale or default_scales(pipe)]
        fewest = 2 * (pipe.num_classes or 1)
        if self.num_images < fewest:
            raise InvalidArgumentError(
                f"num_images must be {fewest} or more, two of each class, not {self.num_images}"
            )
        dataset = data.load(recipe.data, image_size=recipe.image_size)

        figures: dict[str, Any] = {"settings": self.settings()}
        sections = []
        if pipe.autoencoder is not None:
            figures["reconstruction"], text = measure_reconstruction(pipe, dataset)
            sections.append(text)
        for scale in scales:
            images, labels = self.draw(pipe, scale)
            report = metrics.evaluate(images, labels, classify, dataset)
            figures[f"guidance_scale {scale:g}"] = report.to_dict()
            sections.append(f"guidance scale {scale:g}\n\n{report.to_markdown()}")
            columns = pipelines.columns_for(len(images[:100]), pipe.num_classes or 1)
            metrics.save_png(out / f"grid-w{scale:g}.png", metrics.image_grid(images[:100], columns))
        text = "\n\n".join(sections) + "\n"
        print(text)
        numbers = json.dumps(without_nan(figures), indent=2) + "\n"
        write_together({out / "metrics.json": numbers.encode(), out / "metrics.md": text.encode()})
        print(f"saved in {out}: metrics.md, metrics.json and a grid of images for each guidance scale")

    def settings(self) -> dict[str, Any]:
        """What the figures were measured with."""
        names = ("num_images", "num_inference_steps", "solver", "seed")
        return {name: getattr(self, name) for name in names}

    def draw(self, pipe: Any, guidance_scale: float) -> tuple[Any, Any]:
        """Images and their labels, every class equally often."""
        import jax
        import numpy as np

        from jaxldm import pipelines

        labels = pipe.cycle_labels(None, self.num_images)
        with STEP_BAR.showing(
            pipe.num_callbacks(self.num_images, num_inference_steps=self.num_inference_steps),
            f"w = {guidance_scale:g}",
        ):
            images = pipe(
                jax.random.key(self.seed),
                labels,
                num_images=self.num_images,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=guidance_scale,
                solver=self.solver,
                batch_size=self.batch_size,
                progress=STEP_BAR.tick,
            )
        print_findings(pipelines.check_drawn(images, guidance_scale))
        return images, np.zeros(len(images), np.int32) if labels is None else labels


def load_judge(folder: str) -> Any:
    """The classifier of a run, images -> (features, logits). Raises `CheckpointError` when there is none."""
    from jaxldm import checkpoints, metrics, pipelines, training

    if pipelines.kind_of(folder) != "run":
        raise CheckpointError(f"{folder} is an exported folder, without data and judge: give the run folder")
    stage = training.RunFolder(folder).stage("classifier")
    if not stage.complete:
        recipe = training.read_recipe(folder)
        cure = f"go on with `jaxldm train {recipe.name} --run-dir {folder} --resume`"
        if recipe.classifier is None:
            cure = "train a recipe that has one"
        raise CheckpointError(f"{folder} has no finished classifier to judge with: {cure}")
    return metrics.classifier_function(*checkpoints.load(stage.model))


def without_nan(figures: Any) -> Any:
    """NaN and infinity, which JSON does not know, as None."""
    if isinstance(figures, dict):
        return {name: without_nan(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [without_nan(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def default_scales(pipe: Any) -> tuple[float, ...]:
    """1 and 3, or only 1 where there are no classes to guide by."""
    return (1.0,) if pipe.num_classes is None else (1.0, 3.0)


def measure_reconstruction(pipe: Any, dataset: Any) -> tuple[dict[str, float], str]:
    """How well the autoencoder gives back real test images, as data and as a line."""
    import jax

    from jaxldm import metrics, models
    from jaxldm.data.batches import map_batches

    images, _ = dataset.arrays("test")

    module, params = pipe.autoencoder.module, pipe.autoencoder.params

    @jax.jit
    def reconstruct(params, batch):
        latents = models.encode_latents(module, params, batch)
        return models.decode_latents(module, params, latents)

    error = metrics.reconstruction_error(
        images, map_batches(lambda batch: reconstruct(params, batch), images, 250)
    )
    figures = {name: float(value) for name, value in error._asdict().items()}
    words = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
    return figures, f"the autoencoder on {len(images)} real test images: {words}"
