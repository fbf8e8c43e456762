"""`jaxldm eval`: metrics of the images of a trained model."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from jaxldm.commands import eval_images
from jaxldm.commands.options import first_devices, numbers, shown
from jaxldm.commands.sample import check_solver, supported
from jaxldm.commands.terminal import check_seed, print_findings, progress_bar
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError

_OURS = re.compile(r"grid-w.+\.png|metrics\.(json|md)")  # of an earlier evaluation: replaced as a whole


@dataclass(frozen=True)
class Eval:
    """Evaluate the images of a trained model next to real images: metrics.md and metrics.json.

    For example:
      jaxldm eval runs/mini-ldm --guidance-scale 1 3 7.5
      jaxldm eval samples --real photos --metrics fid kid prdc --inception FILE --json out.json

    The first uses the classifier of the run. Its accuracy on real test images, and the Frechet distance
    between two sets of real images, are given for comparison. The second computes published metrics of any
    images, with a network whose weights you have: FILE is pt_inception-2015-12-05-6726825d.pth of the project
    pytorch-fid, or another form of the same.
    """

    folder: Annotated[Positional[str], shown("RUN")]
    """Run folder made by `jaxldm train`; with --metrics also a folder of images or an .npz file."""

    real: Annotated[str | None, shown("IMAGES", "none")] = None
    """The real images that --metrics compare with: a folder, an .npz file (of images, or of their mu and
    sigma), or a run folder, of which they are the test images.
    """

    metrics: Annotated[tuple[str, ...], shown("NAME ...", "fid kid prdc with --real")] = ()
    """Published metrics: fid, sfid, kid, is, prdc (precision, recall, density, coverage), mind, fd-dinov2,
    cmmd, clip-score, and lpips, which compares each image with the real one at its place.
    """

    inception: Annotated[str | None, shown("FILE", "one in the folder $JAXLDM_WEIGHTS")] = None
    """Weights of FID's InceptionV3: .pth, .pt, .pb, .pickle or .safetensors."""

    dinov2: Annotated[str | None, shown("FOLDER", "none")] = None
    """Folder of DINOv2, for fd-dinov2."""

    clip: Annotated[str | None, shown("FOLDER", "none")] = None
    """Folder of CLIP, for cmmd and clip-score."""

    prompts: Annotated[str | None, shown("FILE", "none")] = None
    """Text file for clip-score: a line for each image, in the order of their names. A run of captions draws
    its lines, or without it the captions of test images.
    """

    lpips: Annotated[str | None, shown("FILE", "none")] = None
    """Weights of VGG16 or AlexNet, for lpips: torchvision's vgg16-397923af.pth or
    alexnet-owt-7be5be79.pth.
    """

    resize: Annotated[str, shown("NAME")] = "tf1"
    """How images get to Inception's 299 pixels: tf1, pytorch or clean. Each is a metric of its own."""

    json: Annotated[str | None, shown("OUT.json", "none")] = None
    """File for the figures of --metrics."""

    guidance_scale: Annotated[
        tuple[float, ...], shown("FLOAT ...", "1 3; 1 without classes; those of a student")
    ] = ()
    """One or several guidance scales; each is evaluated separately."""

    num_images: int = 500
    """Number of images at each scale, equally many of each class."""

    num_inference_steps: Annotated[
        int | None, shown("INT", "50, a student's own, one for each of --sigmas; 12 for masked tokens")
    ] = None
    """Number of steps from noise to image."""

    solver: Annotated[str | None, shown("NAME", "ddim, or a student's own")] = None
    """Solver (`jaxldm info` lists all), or package.module:function."""

    spacing: Annotated[str | None, shown("NAME", "the one that fits the model")] = None
    """Spacing of the steps: trailing, linspace, karras, ... (`jaxldm info` lists all), or
    package.module:function.
    """

    sigmas: Annotated[tuple[str, ...] | None, shown("FLOAT ...", "none")] = None
    """The noise levels sigma / alpha of the steps, in place of a spacing, from the noisiest down."""

    seed: int = 0
    """Seed of all random numbers, from 0 to 4294967295."""

    batch_size: int = 64
    """Number of images at once; it does not change an image."""

    devices: Annotated[int | None, shown("INT", "all")] = None
    """Number of devices to use."""

    output_dir: Annotated[str | None, shown("OUT", "RUN/eval")] = None
    """Folder for metrics.json, metrics.md and a grid of images for each scale."""

    reference_quirks: bool = False
    """Draw what diffusers draws with the folder, also where its schedulers err: to compare pictures."""

    quiet: bool = False
    """Print only errors and warnings, and no progress bar."""

    def run(self) -> None:
        """Checks the options, then samples and evaluates at each scale, prints and saves."""
        from jaxldm import metrics, pipelines, training

        check_seed(self.seed)
        check_solver(self.solver)
        first_devices(self.devices)
        if self.resize != "tf1" and not eval_images.is_asked(self):
            raise InvalidArgumentError("--resize is of --metrics: give --metrics, too, or leave it out")
        if eval_images.is_asked(self):
            eval_images.evaluate_images(self)
            return
        out = Path(self.output_dir or Path(self.folder) / "eval")
        pipelines.check_output_folder(out)
        classify = load_classifier(self.folder)
        pipe = pipelines.load(self.folder, reference_quirks=self.reference_quirks)
        scales = [pipe.check_guidance_scale(scale) for scale in self.guidance_scale or default_scales(pipe)]
        fewest = 2 * (pipe.num_classes or 1)
        if self.num_images < fewest:
            raise InvalidArgumentError(
                f"num_images must be {fewest} or more, two of each class, got {self.num_images}"
            )
        options = self.call_options(pipe)
        pipe.num_callbacks(self.num_images, **options)  # checks them, before the data is loaded
        dataset = training.read_data(self.folder)
        check_real_images(dataset)

        self.announce(pipe, scales, self.num_images)
        figures: dict[str, Any] = {"settings": self.settings(pipe)}
        grids = {}
        sections, warnings = [], dict[str, None]()
        if pipe.autoencoder is not None:
            figures["reconstruction"], text = measure_reconstruction(pipe, dataset, self.quiet)
            sections.append(text)
        for scale in scales:
            began = time.perf_counter()
            images, labels = self.draw(pipe, scale)
            if not self.quiet:
                print(f"guidance scale {scale:g}: drawn in {time.perf_counter() - began:.0f} s", flush=True)
            with progress_bar(None, "measuring", self.quiet, "image") as progress:
                report = metrics.evaluate(images, labels, classify, dataset, progress=progress)
            figures[f"guidance_scale {scale:g}"] = report.to_dict()
            sections.append(f"guidance scale {scale:g}\n\n{report.to_markdown(warnings=False)}")
            warnings |= dict.fromkeys(report.warnings())
            grids[f"grid-w{scale:g}.png"] = grid_of(images, scale, pipe.num_classes, dataset.class_names)
        text = "\n\n".join([*sections, *warnings]) + "\n"  # those of all scales, once
        save_results(out, figures, text, grids)
        if not self.quiet:
            print(text)
            print(f"saved in {out}: metrics.md, metrics.json and a grid of images for each guidance scale")

    def announce(self, pipe: Any, scales: Sequence[float], number: int, *, by_class: bool = True) -> None:
        """Says how many images will be drawn, before the first one is."""
        if self.quiet:
            return
        many = "" if not by_class or (pipe.num_classes or 1) == 1 else ", equally many of each class"
        names = ", ".join(f"{scale:g}" for scale in scales)
        where = f"at guidance scale {names}" if len(scales) == 1 else f"at each guidance scale ({names})"
        print(f"drawing {number} images {where}{many}", flush=True)

    def settings(self, pipe: Any) -> dict[str, Any]:
        """The options that the metrics depend on."""
        options = {"num_images": self.num_images, **self.call_options(pipe), "seed": self.seed}
        names = ("num_images", "num_inference_steps", "solver", "seed", "spacing", "sigmas")
        quirks = {"reference_quirks": True} if self.reference_quirks else {}
        return {name: options[name] for name in names if name in options} | quirks

    def call_options(self, pipe: Any) -> dict[str, Any]:
        """The options of the pipeline's call: those that are given, and the defaults of an evaluation."""
        sigmas = numbers(self.sigmas, "sigmas")
        steps, solver = self.num_inference_steps, self.solver
        if "solver" in pipe.call_options():
            own = pipe.few_steps is not None  # a student's own solver and steps
            solver = "ddim" if solver is None and not own else solver
            if steps is None and not own:
                steps = 50 if sigmas is None else len(sigmas)
        options = {
            "num_inference_steps": pipe.defaults.num_inference_steps if steps is None else steps,
            "solver": solver,
            "spacing": self.spacing,
            "sigmas": sigmas,
            "batch_size": self.batch_size,
            "devices": first_devices(self.devices),
        }
        return supported(pipe, options)

    def draw(self, pipe: Any, guidance_scale: float, captions: list[str] | None = None) -> tuple[Any, Any]:
        """Images and their labels, equally many of each class; or an image of each caption."""
        import jax
        import numpy as np

        from jaxldm import pipelines

        labels = None if captions else pipe.cycle_labels(None, self.num_images)
        number = len(captions) if captions else self.num_images
        options = self.call_options(pipe)
        total = pipe.num_callbacks(number, **options)
        if not captions:
            options["num_images"] = number
        with progress_bar(total, f"w = {guidance_scale:g}", self.quiet) as progress:
            images = pipe(
                jax.random.key(self.seed),
                captions or labels,
                guidance_scale=guidance_scale,
                progress=progress,
                **options,
            )
        print_findings(pipelines.check_drawn(images, guidance_scale))
        return images, np.zeros(len(images), np.int32) if labels is None else labels


def check_real_images(dataset: Any) -> None:
    """Raises `DataError` where the validation or the test split has too few images to compare with."""
    for split in ("validation", "test"):
        found = len(dataset.rows(split))
        if found < 2:
            raise DataError(
                f"the {split} split of {dataset.name} has {found} real image{'s' * (found != 1)}, and an "
                f"evaluation compares with two or more of validation and of test: put more into {split}"
            )


def grid_of(images: Any, scale: float, num_classes: int | None, class_names: Sequence[str]) -> Any:
    """A picture of the first hundred images, or somewhat fewer: its rows are whole."""
    from jaxldm import metrics, pipelines

    columns = pipelines.columns_for(len(images[:100]), num_classes or 1)
    names = tuple(class_names) if columns % len(class_names) == 0 else ()
    return metrics.labelled_grid(
        images[: len(images[:100]) // columns * columns],
        columns,
        title=f"Images drawn at guidance scale w = {scale:g}",
        column_labels=names * (columns // max(len(names), 1)),
    )


def save_results(out: Path, figures: dict[str, Any], text: str, grids: dict[str, Any]) -> None:
    """Writes metrics.json, metrics.md and the grids, all in place of those of an earlier evaluation."""
    from jaxldm.files import Content, write_together
    from jaxldm.metrics.pictures import png_bytes

    contents: dict[str, Content] = {name: png_bytes(picture) for name, picture in grids.items()}
    content = json.dumps(without_nan(figures), indent=2) + "\n"
    contents |= {"metrics.json": content.encode(), "metrics.md": text.encode()}
    write_together(out, contents, lambda name: _OURS.fullmatch(name) is not None)


def load_classifier(folder: str) -> Any:
    """The classifier of a run, images -> (features, logits). Raises `CheckpointError` when there is none."""
    from jaxldm import checkpoints, metrics, pipelines, training

    kind = pipelines.kind_of(folder)
    if kind == "text-to-image":
        own = eval_images.is_run_of_captions(folder)  # it knows its captions and real images
        name = f"{folder} --real {folder}" if own else "SAMPLES --real IMAGES"
        raise CheckpointError(
            f"{folder} draws from texts, which no classifier measures: compare its images with real ones, "
            f"jaxldm eval {name} --metrics fid kid --inception FILE"
        )
    if kind != "run":
        raise CheckpointError(
            f"{folder} is an exported folder, without data and classifier: give the run folder"
        )
    stage = training.RunFolder(Path(folder)).stage("classifier")
    if not stage.complete:
        recipe = training.read_recipe(folder)
        fix = f"resume with `jaxldm train {recipe.name} --run-dir {folder} --resume`"
        if recipe.classifier is None:
            fix = "train a recipe that has one"
        raise CheckpointError(f"{folder} has no finished classifier: {fix}")
    return metrics.classifier_function(*checkpoints.load(stage.model))


def without_nan(figures: Any) -> Any:
    """The data with None for NaN and infinity, which JSON lacks."""
    if isinstance(figures, dict):
        return {name: without_nan(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [without_nan(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def default_scales(pipe: Any) -> tuple[float, ...]:
    """1 and 3, only 1 for a model without a null class, only its own for a student with guidance inside."""
    if pipe.few_steps is not None and pipe.few_steps.guidance != "outside":
        return (pipe.default_guidance_scale,)
    return (1.0, 3.0) if pipe.has_null_class else (1.0,)


def measure_reconstruction(pipe: Any, dataset: Any, quiet: bool = False) -> tuple[dict[str, float], str]:
    """The reconstruction error of the autoencoder on real test images, as data and as a line."""
    import jax
    import numpy as np

    from jaxldm import models
    from jaxldm.data.batches import map_batches
    from jaxldm.metrics.scores import with_psnr

    rows, at_once = dataset.rows("test"), 250
    module, params = pipe.autoencoder.module, pipe.autoencoder.params

    @jax.jit
    def reconstruct(params, batch):
        latents = models.encode_latents(module, params, batch)
        return models.decode_latents(module, params, latents)

    def errors(batch: Any) -> Any:
        """Mean squared error of each image of a batch: no more images are in memory."""
        differences = np.asarray(reconstruct(params, batch), np.float64) - batch
        progress(None, None)
        return np.mean(differences**2, axis=(1, 2, 3))

    with progress_bar(-(-len(rows) // at_once), "reconstructing", quiet) as progress:
        figures = with_psnr(float(np.mean(map_batches(errors, rows, at_once))))._asdict()
    words = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
    return figures, f"the autoencoder on {len(rows)} real test images: {words}"
