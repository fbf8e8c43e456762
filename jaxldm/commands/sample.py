"""`jaxldm sample`: images from a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from jaxldm.commands.terminal import STEP_BAR, check_seed, print_findings


@dataclass(frozen=True)
class Sample:
    """Draw images with a trained model: OUT/grid.png, one PNG per image and OUT/samples.npz.

    For example:
      jaxldm sample runs/mini-ldm --class-labels 3 7 --num-images 64 --guidance-scale 3 --output-dir OUT

    The same seed draws the same pictures: image 5 is the same however many images are asked for, in whatever
    batches, on however many devices.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder made by `jaxldm train`, or folder made by `jaxldm export`."""

    class_labels: Annotated[tuple[int, ...], tyro.conf.arg(
        metavar="LABEL ...", help_behavior_hint="(default: every class once)")] = ()
    """Classes to draw, counted from 0; they repeat in this order until there are --num-images images."""

    num_images: Annotated[int | None, tyro.conf.arg(
        metavar="INT", help_behavior_hint="(default: one for each label)")] = None
    """How many images to draw."""

    num_inference_steps: int = 50
    """In how many steps noise becomes an image; more steps are slower and finer."""

    guidance_scale: Annotated[float | None, tyro.conf.arg(
        metavar="FLOAT", help_behavior_hint="(default: 3, or 1 for a model without classes)")] = None
    """How strongly the class steers: 1 is the model as trained, more gives clearer images that vary less."""

    guidance_rescale: float = 0.0
    """Between 0 and 1: how far the contrast that a strong guidance adds is taken back (0.7 is usual)."""

    negative_class_labels: Annotated[tuple[int, ...], tyro.conf.arg(
        metavar="LABEL ...", help_behavior_hint="(default: none)")] = ()
    """Classes to steer away from: one for all images, or as many as --class-labels, repeating with them."""

    solver: str = "ddim"
    """How the steps are taken: ddim, dpmpp_2m, heun, ddpm, ...; `jaxldm info` lists all."""

    eta: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: the solver's own)")] = None
    """Fresh noise in each step of the solvers that have this option (ddim): 0 is none, 1 is as much as DDPM's."""

    spacing: Annotated[str | None, tyro.conf.arg(
        metavar="NAME", help_behavior_hint="(default: the one that fits the model)")] = None
    """Which training timesteps the steps stop at: leading, trailing or linspace."""

    seed: int = 0
    """Which random numbers: any whole number from 0 to 4294967295; another seed draws other images."""

    batch_size: int = 64
    """How many images are on the way at once; it changes the memory needed, never a picture."""

    output_dir: str = "samples"
    """Folder for the images; it is made where needed, and images of an earlier call in it are replaced."""

    def run(self) -> None:
        """Checks everything, draws, looks at what was drawn, writes it."""
        check_seed(self.seed)

        import jax

        from jaxldm import pipelines
        from jaxldm.metrics import health
        from jaxldm.pipelines.images import check_output_folder, columns_for, save_samples

        check_output_folder(self.output_dir)
        pipe = pipelines.load(self.folder)
        labels = pipe.cycle_labels(self.class_labels or None, self.num_images)
        num_images = (self.num_images or 1) if labels is None else len(labels)
        with STEP_BAR.showing(pipe.count_steps(num_images, self.num_inference_steps), "sampling"):
            images = pipe(
                jax.random.key(self.seed), labels, num_images=num_images,
                num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale,
                guidance_rescale=self.guidance_rescale, negative_labels=self.negative_class_labels or None,
                solver=self.solver, eta=self.eta, spacing=self.spacing, batch_size=self.batch_size, on_step=STEP_BAR.tick)
        print_findings(health.check_samples(images))
        save_samples(self.output_dir, images, labels, columns_for(num_images, len(self.class_labels or labels or ())))
        print(f"{num_images} images of {self.folder}: look at {self.output_dir}/grid.png (numbers in "
              f"{self.output_dir}/samples.npz)")
