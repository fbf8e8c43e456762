"""The section of `jaxldm inspect` about training: what each kept checkpoint draws, and how far off it is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxldm.commands import inspect_figures as F
from jaxldm.commands import inspect_texts as T
from jaxldm.commands.inspect_subject import Subject, steps_of
from jaxldm.errors import CheckpointError
from jaxldm.metrics.page import Section, Shown

MOST_CLASSES, MOST_GRIDS, PER_CLASS = 10, 8, 2


class Drawn(NamedTuple):
    """What one checkpoint draws."""

    step: int
    images: Float[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, " N"]


def checkpoint_section(subject: Subject, options: Any, network: Any, log: Any) -> Section:
    """A grid of images for each kept checkpoint, and the distance of each to real images.

    `network` is FID's, or None.
    """
    from jaxldm import training

    title = "How it learned: the checkpoints"
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
    parts: list[str | Shown] = [T.CHECKPOINTS.format(steps=steps_of(options, subject.pipe))]
    places = np.unique(np.linspace(0, len(drawn) - 1, MOST_GRIDS).round().astype(int)) if drawn else []
    shown = [drawn[place] for place in places]
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
    from jaxldm.training.few_steps.matching import of_student

    pipe, number = subject.pipe, options.num_images or 200
    labels = pipe.cycle_labels(None, number)
    drawn, damaged = [], []
    for step in steps:
        try:
            params = of_student(training.read_kept(options.folder, step).params)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        log(f"drawing {number} images at step {step}")
        at_step = pipe.replace(denoiser=pipelines.Network(pipe.denoiser.module, params))
        images = at_step(
            jax.random.key(options.seed),
            labels,
            num_images=number,
            num_inference_steps=steps_of(options, pipe),
            guidance_scale=1.0 if pipe.few_steps is None else pipe.default_guidance_scale,
        )
        classes = np.zeros(number, np.int32) if labels is None else labels
        drawn.append(Drawn(step, np.nan_to_num(np.asarray(images), nan=-1.0), classes))
    return drawn, damaged


def grid_of(drawn: Drawn, subject: Subject) -> bytes:
    """Two images of each of the first ten classes, a class a column."""
    from jaxldm.metrics import labelled_grid
    from jaxldm.metrics.pictures import png_bytes

    classes = min(subject.pipe.num_classes or MOST_CLASSES, MOST_CLASSES)
    rows = [place for place, label in enumerate(drawn.labels) if label < MOST_CLASSES][: PER_CLASS * classes]
    columns = min(classes, len(rows))
    names = subject.class_names[:columns] if subject.pipe.num_classes else ()
    names = names if len(names) == columns else ()
    scale = max(1, 56 // drawn.images.shape[1])
    return png_bytes(labelled_grid(drawn.images[rows], columns, column_labels=names, scale=scale))


def distances(subject: Subject, drawn: list[Drawn], folder: str, network: Any) -> list[str | Shown]:
    """The curve of each distance that can be measured here, and how to read it."""
    curves: dict[str, list[float]] = {}
    floor = None
    classify = classifier_of(folder)
    if classify is not None:
        from jaxldm import metrics

        name = "Fréchet distance, classifier features"
        reports = [metrics.evaluate(one.images, one.labels, classify, subject.dataset) for one in drawn]
        curves[name], floor = (
            [report.frechet_distance for report in reports],
            reports[0].real_frechet_distance,
        )
        if subject.pipe.num_classes:
            curves["share classified as requested"] = [report.accuracy for report in reports]
    if network is not None:
        curves["FID (Inception features)"] = inception_distances(subject, drawn, network)
    if not curves:
        return ["No distance: this run has no finished classifier, and no --inception FILE was given."]
    figure = F.curve_figure([one.step for one in drawn], curves, floor)
    return [
        Shown(
            figure, f"{len(drawn[0].images)} generated images of each checkpoint, compared with test images."
        ),
        T.DISTANCES,
    ]


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
