"""`jaxldm sample`: images from a model of classes or of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from jaxldm.commands.options import shown
from jaxldm.commands.terminal import STEP_BAR, check_seed, print_findings
from jaxldm.errors import InvalidArgumentError, one_of

# Options that only one kind of model has a use for.
OF_CLASSES = ("class_labels", "negative_class_labels")
OF_TEXTS = (
    "prompt",
    "negative_prompt",
    "true_cfg_scale",
    "height",
    "width",
    "image",
    "strength",
    "mask",
    "refiner",
    "lora",
)


@dataclass(frozen=True)
class Sample:
    """Draw images with a trained model: OUT/grid.png, one PNG per image and OUT/samples.npz.

    For example:
      jaxldm sample runs/mini-ldm --class-labels 3 7 --num-images 64 --guidance-scale 3 --output-dir OUT
      jaxldm sample stable-diffusion-v1-5 --prompt "a cat in the snow" --solver dpmpp_2m --dtype bfloat16
      jaxldm sample sdxl-base --refiner sdxl-refiner --prompt "a cat" --height 1024 --width 768
      jaxldm sample stable-diffusion-v1-5 --prompt "a red hat" --image cat.png --mask hat.png

    The same seed draws the same pictures: image 5 is the same however many images are asked for, in whatever
    batches, on however many devices.
    """

    folder: Annotated[Positional[str], shown("RUN")]
    """Run folder made by `jaxldm train`, folder made by `jaxldm export`, or a folder of Stable Diffusion."""

    prompt: Annotated[tuple[str, ...] | None, shown("TEXT ...", "for text-to-image models")] = None
    """What to draw; several texts repeat in this order until there are --num-images images."""

    negative_prompt: Annotated[tuple[str, ...] | None, shown("TEXT ...", "none")] = None
    """What to steer away from: one text for all prompts, or one for each."""

    height: Annotated[int | None, shown("PIXELS", "the model's own, or the image's")] = None
    """Height of the pictures, with --prompt; a multiple of 8."""

    width: Annotated[int | None, shown("PIXELS", "the model's own, or the image's")] = None
    """Width of the pictures, with --prompt; a multiple of 8."""

    image: Annotated[str | None, shown("FILE", "none: start from noise")] = None
    """Picture to start from, with --prompt; it is resized to --height and --width where these are given."""

    strength: Annotated[float | None, shown("FLOAT", "0.8, SDXL 0.3; with --mask 1")] = None
    """How far to leave --image: the last part of the steps that is walked, up to 1."""

    mask: Annotated[str | None, shown("FILE", "none")] = None
    """Picture that is white where --image is drawn anew and black where it stays."""

    refiner: Annotated[str | None, shown("FOLDER", "none")] = None
    """Folder of the SDXL refiner, which takes over from the base model at --hand-over."""

    hand_over: float = 0.8
    """Part of the noise that the base model takes away before the --refiner goes on."""

    lora: Annotated[str | None, shown("FILE", "none")] = None
    """LoRA file to merge into the weights of the text-to-image model."""

    lora_scale: float = 1.0
    """How much of --lora to merge."""

    dtype: Annotated[str | None, shown("NAME", "that of the files")] = None
    """float32, bfloat16 or float16, for folders of diffusers: of the weights and the computation."""

    class_labels: Annotated[tuple[int, ...] | None, shown("LABEL ...", "each of up to 100 once")] = None
    """Classes to draw, counted from 0; they repeat in this order until there are --num-images images."""

    num_images: Annotated[int | None, shown("INT", "one for each label")] = None
    """How many images to draw."""

    num_inference_steps: Annotated[int | None, shown("INT", "50, or 4 for LCM")] = None
    """In how many steps noise becomes an image; more steps are slower and finer."""

    guidance_scale: Annotated[float | None, shown("FLOAT", "3 for classes, 7.5 or 5 for texts")] = None
    """How strongly the class or text steers: 1 is the model as trained, more is clearer and varies less."""

    true_cfg_scale: Annotated[float | None, shown("FLOAT", "1")] = None
    """How strongly to steer away from --negative-prompt, for models that are told --guidance-scale (FLUX)."""

    guidance_rescale: float = 0.0
    """Between 0 and 1: how far the contrast that a strong guidance adds is taken back (0.7 is usual)."""

    negative_class_labels: Annotated[tuple[int, ...] | None, shown("LABEL ...", "none")] = None
    """Classes to steer away from: one for all images, or several, repeating as --class-labels do."""

    solver: Annotated[str | None, shown("NAME", "ddim, or the one that the folder names")] = None
    """How the steps are taken: ddim, dpmpp_2m, heun, ddpm, ...; `jaxldm info` lists all."""

    eta: Annotated[float | None, shown("FLOAT", "the solver's own")] = None
    """Fresh noise in each step, for solvers that have this option (ddim): 0 is none, 1 is as in DDPM."""

    spacing: Annotated[str | None, shown("NAME", "the one that fits the model")] = None
    """Which training timesteps the steps stop at: leading, trailing, linspace, ..."""

    seed: int = 0
    """Which random numbers: any whole number from 0 to 4294967295; another seed draws other images."""

    batch_size: Annotated[int | None, shown("INT", "64; with --prompt 1")] = None
    """How many images are on the way at once; larger is faster on a large device, and takes its memory."""

    output_dir: Annotated[str, shown("OUT")] = "samples"
    """Folder for the images; it is made where needed, and images of an earlier call in it are replaced."""

    def run(self) -> None:
        """Checks everything, draws, looks at what was drawn, writes it."""
        check_seed(self.seed)

        from jaxldm import diffusion as D
        from jaxldm import pipelines

        pipelines.check_output_folder(self.output_dir)
        if self.solver is not None:
            one_of("solver", self.solver, D.solvers.SOLVERS)
        texts = pipelines.kind_of(self.folder) == "text-to-image"
        self._check_options(texts)
        if texts:
            from jaxldm.commands.sample_prompts import draw_prompts

            images, guidance_scale = draw_prompts(self)
            labels, columns = None, pipelines.columns_for(len(images), len(self.prompt))
        else:
            images, guidance_scale, labels, columns = self._draw_classes()
        print_findings(pipelines.check_drawn(images, guidance_scale))
        pipelines.save_samples(self.output_dir, images, labels, columns)
        print(
            f"{len(images)} images: look at {self.output_dir}/grid.png; samples.npz beside it holds them all"
        )

    def _check_options(self, texts: bool) -> None:
        """Raises `InvalidArgumentError` for options of the other kind of model."""
        wrong = OF_CLASSES if texts else OF_TEXTS
        for name in wrong:
            if getattr(self, name) is not None:
                kind = "draws from texts" if texts else "knows no texts"
                raise InvalidArgumentError(
                    f"--{name.replace('_', '-')} is of no use here: {self.folder} {kind}; leave it out"
                )
        if texts and self.prompt is None:
            raise InvalidArgumentError(
                f'{self.folder} draws from texts: say what, as in --prompt "a cat in the snow"'
            )

    def _draw_classes(self):
        """(images, guidance scale, labels, columns of the grid) of a model of classes."""
        import jax

        from jaxldm import pipelines

        pipe = pipelines.load(self.folder, dtype=self.dtype)
        labels = pipe.cycle_labels(self.class_labels, self.num_images)
        num_images = (self.num_images or 1) if labels is None else len(labels)
        guidance_scale = pipe.default_guidance_scale if self.guidance_scale is None else self.guidance_scale
        steps = 50 if self.num_inference_steps is None else self.num_inference_steps
        callbacks = pipe.num_callbacks(num_images, num_inference_steps=steps)
        with STEP_BAR.showing(callbacks, "sampling"):
            images = pipe(
                jax.random.key(self.seed),
                labels,
                num_images=num_images,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                guidance_rescale=self.guidance_rescale,
                negative_labels=self.negative_class_labels,
                solver=self.solver,
                eta=self.eta,
                spacing=self.spacing,
                batch_size=64 if self.batch_size is None else self.batch_size,
                progress=STEP_BAR.tick,
            )
        columns = pipelines.columns_for(num_images, len(self.class_labels or ()) or pipe.num_classes or 1)
        return images, guidance_scale, labels, columns
