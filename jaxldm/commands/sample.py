"""`jaxldm sample`: images from a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from jaxldm.commands.options import shown
from jaxldm.commands.terminal import STEP_BAR, check_seed, print_findings


@dataclass(frozen=True)
class Sample:
    """Draw images with a trained model: OUT/grid.png, one PNG per image and OUT/samples.npz.

    For example:
      jaxldm sample runs/mini-ldm --class-labels 3 7 --num-images 64 --guidance-scale 3 --output-dir OUT

    The same seed draws the same pictures: image 5 is the same however many images are asked for, in whatever
    batches, on however many devices.
    """

    folder: Annotated[Positional[str], shown("RUN")]
    """Run folder made by `jaxldm train`, or folder made by `jaxldm export`."""

    class_labels: Annotated[tuple[int, ...] | None, shown("LABEL ...", "every class once")] = None
    """Classes to draw, counted from 0; they repeat in this order until there are --num-images images."""

    num_images: Annotated[int | None, shown("INT", "one for each label")] = None
    """How many images to draw."""

    num_inference_steps: int = 50
    """In how many steps noise becomes an image; more steps are slower and finer."""

    guidance_scale: Annotated[float | None, shown("FLOAT", "3, or 1 for a model without classes")] = None
    """How strongly the class steers: 1 is the model as trained, more gives clearer images that vary less."""

    guidance_rescale: float = 0.0
    """Between 0 and 1: how far the contrast that a strong guidance adds is taken back (0.7 is usual)."""

    negative_class_labels: Annotated[tuple[int, ...] | None, shown("LABEL ...", "none")] = None
    """Classes to steer away from: one for all images, or several, repeating as --class-labels do."""

    solver: Annotated[str, shown("NAME")] = "ddim"
    """How the steps are taken: ddim, dpmpp_2m, heun, ddpm, ...; `jaxldm info` lists all."""

    eta: Annotated[float | None, shown("FLOAT", "the solver's own")] = None
    """Fresh noise in each step, for solvers that have this option (ddim): 0 is none, 1 is as in DDPM."""

    spacing: Annotated[str | None, shown("NAME", "the one that fits the model")] = None
    """Which training timesteps the steps stop at: leading, trailing, linspace, ..."""

    seed: int = 0
    """Which random numbers: any whole number from 0 to 4294967295; another seed draws other images."""

    batch_size: int = 64
    """How many images are on the way at once; it never changes a picture."""

    output_dir: Annotated[str, shown("OUT")] = "samples"
    """Folder for the images; it is made where needed, and images of an earlier call in it are replaced."""

    def run(self) -> None:
        """Checks everything, draws, looks at what was drawn, writes it."""
        check_seed(self.seed)

        import jax

        from jaxldm import pipelines

        pipelines.check_output_folder(self.output_dir)
        pipe = pipelines.load(self.folder)
        labels = pipe.cycle_labels(self.class_labels, self.num_images)
        num_images = (self.num_images or 1) if labels is None else len(labels)
        guidance_scale = pipe.default_guidance_scale if self.guidance_scale is None else self.guidance_scale
        with STEP_BAR.showing(pipe.count_steps(num_images, self.num_inference_steps), "sampling"):
            images = pipe(
                jax.random.key(self.seed),
                labels,
                num_images=num_images,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=guidance_scale,
                guidance_rescale=self.guidance_rescale,
                negative_labels=self.negative_class_labels,
                solver=self.solver,
                eta=self.eta,
                spacing=self.spacing,
                batch_size=self.batch_size,
                on_step=STEP_BAR.tick,
            )
        print_findings(pipelines.check_drawn(images, guidance_scale))
        columns = pipelines.columns_for(num_images, len(self.class_labels or ()) or pipe.num_classes or 1)
        pipelines.save_samples(self.output_dir, images, labels, columns)
        print(
            f"{num_images} images: look at {self.output_dir}/grid.png; samples.npz beside it holds them all"
        )
