"""The section of `jaxldm inspect` about training: what each kept checkpoint draws, and how far off it is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxldm.commands import inspect_figures as F
from jaxldm.commands import inspect_texts as T
from jaxldm.commands.eval_images import is_run_of_captions
from jaxldm.commands.inspect_subject import Subject, steps_of
from jaxldm.errors import CheckpointError
from jaxldm.metrics.page import Section, Shown

MOST_CLASSES, MOST_GRIDS, PER_CLASS = 10, 8, 2
MOST_PIXELS = 32  # of a side, where images are compared by their pixels


class Drawn(NamedTuple):
    """What one checkpoint draws."""

    step: int
    images: Float[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, " N"]
    captions: tuple[str, ...] = ()


def checkpoint_section(subject: Subject, options: Any, network: Any, log: Any) -> Section:
    """A grid of images for each kept checkpoint, and the distance of each to real images.

    `network` is FID's, or None.
    """
    from jaxldm import training

    title = "How it learned: the checkpoints"
    if subject.dataset is None and is_run_of_captions(options.folder):
        return Section(title, [], "Leave out --prompt to see what the checkpoints draw of the test captions.")
    if subject.dataset is None:
        return Section(title, [], "This is no run folder, so it has no checkpoints and no real images.")
    steps = training.kept_steps(options.folder)
    if not steps:
        note = (
            "The run keeps no checkpoints: there is nothing to compare. Train with "
            "--keep-checkpoints 10 to keep more."
        )
        return Section(title, [], note)
    drawn, damaged = draw_each(subject, steps, options, log)
    kind, scale = (
        "captions of images that were not trained on" if subject.captions else "classes",
        guidance_of(subject, options),
    )
    steps_of_each = steps_of(options, subject.pipe)
    parts: list[str | Shown] = [T.CHECKPOINTS.format(kind=kind, steps=steps_of_each, scale=scale)]
    places = np.unique(np.linspace(0, len(drawn) - 1, MOST_GRIDS).round().astype(int)) if drawn else []
    shown = [drawn[place] for place in places]
    if drawn and subject.captions:
        parts.append(f"The captions, row by row: {'; '.join(drawn[0].captions[: PER_CLASS * MOST_CLASSES])}.")
    parts += [Shown(grid_of(one, subject), f"After {one.step} steps.") for one in shown]
    if drawn:
        parts += distances(subject, drawn, options.folder, network)
    note = f"Not shown, because they are damaged: {'; '.join(damaged)}." if damaged else ""
    if len(steps) < 3 and not note:
        note = (
            f"This run keeps {len(steps)} checkpoint{'s' * (len(steps) != 1)}. For a longer curve train with "
            "--save-every 1 "
            "--keep-checkpoints 20; this page then has all of them."
        )
    return Section(title, parts, note)


def draw_each(subject: Subject, steps: list[int], options: Any, log: Any) -> tuple[list[Drawn], list[str]]:
    """(what each checkpoint draws, what is wrong with those that cannot be read)."""
    import jax

    from jaxldm import pipelines, training
    from jaxldm.training.few_steps.networks import student_network

    stage = training.read_recipe(options.folder).diffusion
    few = None if stage is None else stage.few_steps
    pipe, number = subject.pipe, options.num_images or 200
    captions = captions_to_draw(subject, number)
    asked = list(captions) or pipe.cycle_labels(None, number)
    labels = None if captions else asked
    more = {} if captions else {"num_images": number}
    drawn, damaged = [], []
    for step in steps:
        try:
            params = student_network(few, training.read_kept(options.folder, step).params)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        log(f"drawing {number} images at step {step}")
        at_step = pipe.replace(denoiser=pipelines.Network(pipe.denoiser.module, params))
        images = at_step(
            jax.random.key(options.seed),
            asked,
            num_inference_steps=steps_of(options, pipe),
            guidance_scale=guidance_of(subject, options),
            **more,
        )
        classes = np.zeros(len(images), np.int32) if labels is None else np.asarray(labels)
        drawn.append(Drawn(step, np.nan_to_num(np.asarray(images), nan=-1.0), classes, captions))
    return drawn, damaged


def captions_to_draw(subject: Subject, number: int) -> tuple[str, ...]:
    """Captions of validation images: of other ones than those that the drawn images are compared with."""
    if not subject.captions:
        return ()
    dataset = subject.dataset
    split = "validation" if "validation" in dataset.splits else "test"
    return tuple(dataset.captions(split, number) or ())


def guidance_of(subject: Subject, options: Any) -> float:
    """The scale that checkpoints are drawn with: 1, a student's own, or that of samples on the way."""
    from jaxldm import training

    if subject.pipe.few_steps is not None:
        return subject.pipe.default_guidance_scale
    stage = training.read_recipe(options.folder).diffusion if subject.captions else None
    return 1.0 if stage is None else stage.sample_guidance_scale


def grid_of(drawn: Drawn, subject: Subject) -> bytes:
    """Two images of each of the first ten classes, a class a column."""
    from jaxldm.metrics import labelled_grid
    from jaxldm.metrics.pictures import png_bytes

    classes = min(subject.pipe.num_classes or MOST_CLASSES, MOST_CLASSES)
    rows = [place for place, label in enumerate(drawn.labels) if label < MOST_CLASSES][: PER_CLASS * classes]
    columns = min(classes, len(rows))
    names = subject.class_names[:columns] if subject.pipe.num_classes else ()
    names = names if len(names) == columns else ()
    scale = -(-56 // drawn.images.shape[1])
    return png_bytes(labelled_grid(drawn.images[rows], columns, column_labels=names, scale=scale))


def distances(subject: Subject, drawn: list[Drawn], folder: str, network: Any) -> list[str | Shown]:
    """The curve of each distance that can be measured here, and how to read it."""
    curves: dict[str, list[float]] = {}
    classify = classifier_of(folder)
    if classify is not None:
        from jaxldm import metrics

        reports = [metrics.evaluate(one.images, one.labels, classify, subject.dataset) for one in drawn]
        floor: float | None = reports[0].real_frechet_distance
        curves["Fréchet distance, classifier features"] = [report.frechet_distance for report in reports]
        if subject.pipe.num_classes:
            curves["share classified as requested"] = [report.accuracy for report in reports]
    else:
        found, floor = pixel_distances(subject, drawn)
        curves["sliced Wasserstein distance of pixels"] = found
    if drawn[0].captions and subject.dataset.name.startswith("captioned_shapes"):
        curves["share that shows what the caption says"] = [share_as_asked(one) for one in drawn]
    if network is not None:
        curves["FID (Inception features)"] = inception_distances(subject, drawn, network)
    figure = F.curve_figure([one.step for one in drawn], curves, floor)
    return [
        Shown(
            figure, f"{len(drawn[0].images)} generated images of each checkpoint, compared with test images."
        ),
        T.PIXEL_DISTANCES if classify is None else T.DISTANCES,
        T.DISTANCES_SEEN,
    ]


def pixel_distances(subject: Subject, drawn: list[Drawn]) -> tuple[list[float], float | None]:
    """(distance of each checkpoint's images from test images, that of validation images: the floor).

    Without a classifier nothing better is at hand that needs no weights. Sets are of one size.
    """
    from jaxldm import metrics

    dataset = subject.dataset
    there = [dataset.arrays("test")[0]]
    there += [dataset.arrays("validation")[0]] if "validation" in dataset.splits else []
    number = min(len(drawn[0].images), *(len(images) for images in there))
    real, *held_out = (pixel_rows(images[:number]) for images in there)
    found = [metrics.sliced_wasserstein(pixel_rows(one.images[:number]), real) for one in drawn]
    return found, metrics.sliced_wasserstein(held_out[0], real) if held_out else None


def pixel_rows(images: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N D"]:
    """The pixels of each image, a row each; of large ones means over blocks."""
    block = max(1, -(-max(images.shape[1:3]) // MOST_PIXELS))
    h, w = images.shape[1] // block, images.shape[2] // block
    blocks = images[:, : h * block, : w * block].reshape(len(images), h, block, w, block, -1)
    return np.clip(blocks.mean((2, 4), dtype=np.float32), -1, 1).reshape(len(images), -1)


def share_as_asked(drawn: Drawn) -> float:
    """The share of captioned shapes that show every attribute that their captions name."""
    from jaxldm.data import to_uint8
    from jaxldm.metrics.shapes import asked_of, read_shapes

    found = read_shapes(to_uint8(np.clip(drawn.images, -1, 1)))
    right = [
        all(getattr(found, kind)[place] == value for kind, value in asked_of(caption).items())
        for place, caption in enumerate(drawn.captions)
    ]
    return float(np.mean(right))


def classifier_of(folder: str) -> Any:
    """The classifier of a run, None where there is no finished one."""
    from jaxldm import checkpoints, metrics, training

    stage = training.RunFolder(Path(folder)).stage("classifier")
    return metrics.classifier_function(*checkpoints.load(stage.model)) if stage.complete else None


def inception_distances(subject: Subject, drawn: list[Drawn], network: Any) -> list[float]:
    """FID of each checkpoint against the test images."""
    from jaxldm import metrics
    from jaxldm.data import to_uint8

    sets = [subject.dataset.arrays("test")[0], *(one.images for one in drawn)]
    with tempfile.TemporaryDirectory() as folder:
        real, *found = (
            metrics.extract(metrics.array_set(to_uint8(images), f"set {k}"), network, ["pool"], Path(folder))
            for k, images in enumerate(sets)
        )
        return [metrics.frechet_distance(features["pool"], real["pool"]) for features in found]


def inception_of(options: Any) -> Any:
    """FID's network of `--inception FILE`, None without one. Raises `CheckpointError`."""
    from jaxldm import checkpoints, metrics

    if options.inception is None:
        return None
    loaded = checkpoints.load_inception(options.inception)
    return metrics.inception_network(loaded.module, loaded.params, loaded.sha256)
