"""What `jaxldm inspect` looks at: images with the latents, labels and conditions that the network takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxldm.commands.class_names import read_labels, with_class_names
from jaxldm.commands.eval_images import is_run_of_captions
from jaxldm.errors import InvalidArgumentError

MOST_REAL = 200  # test images of a run
MANY_CLASSES = 20  # above, neighbours are often alike: breeds of dogs, one shape in several colours


class Subject(NamedTuple):
    """A model and some images.

    Attributes:
        pipe: the model.
        images: `[N, H, W, C]` in [-1, 1].
        x_0: `[N, h, w, c]`, the same as the network has them: latents, or the pixels themselves.
        labels: the class of each `[N]`; zeros for a model without classes.
        class_names: of the labels.
        cond: what the network takes for each image, by argument name.
        uncond: the same without class or text.
        source: where the images are from.
        dataset: of a run, else None.
        captions: of each image; empty for a model without captions.
    """

    pipe: Any
    images: Float[np.ndarray, "N H W C"]
    x_0: Float[np.ndarray, "N h w c"]
    labels: Int[np.ndarray, " N"]
    class_names: tuple[str, ...]
    cond: Mapping[str, Any]
    uncond: Mapping[str, Any]
    source: str
    dataset: Any = None
    captions: tuple[str, ...] = ()


def load_subject(options: Any) -> Subject:
    """The subject of a run, of an exported class-to-image model, or of a text-to-image model.

    Raises:
        CheckpointError: no model.
        InvalidArgumentError: an option that this model does not have.
    """
    from jaxldm import pipelines

    kind = pipelines.kind_of(options.folder)
    of_captions = kind == "text-to-image" and not options.prompt and is_run_of_captions(options.folder)
    if kind == "text-to-image" and not options.prompt and not of_captions:
        raise InvalidArgumentError(
            f'{options.folder} draws from texts: add --prompt "a cat in the snow", whose words are shown'
        )
    if kind != "text-to-image" and options.prompt is not None:
        raise InvalidArgumentError("--prompt is for text-to-image models: leave it out")
    if kind != "run" and not of_captions and options.inception is not None:
        alone = " (without --prompt)" if is_run_of_captions(options.folder) else ""
        raise InvalidArgumentError(f"--inception measures the checkpoints of a run{alone}: leave it out")
    pipe = pipelines.load(options.folder, reference_quirks=options.reference_quirks)
    if "mask_token" in pipe.family.methods:
        raise InvalidArgumentError(
            f"{options.folder} unmasks tokens, and what is shown here is of models that remove noise: look "
            "at it with jaxldm info or jaxldm sample"
        )
    pipe = with_class_names(pipe, options.folder)
    if kind == "run" or of_captions:
        return _of_run(options, pipe)
    return _of_text(options, pipe) if kind == "text-to-image" else _of_classes(options, pipe)


def _of_run(options: Any, pipe: Any) -> Subject:
    """Test images, equally many of each class in turn, with their classes or captions."""
    from jaxldm import models, training
    from jaxldm.data import map_batches

    dataset = training.read_data(options.folder)
    images, labels = dataset.arrays("test")
    turn = np.empty(len(labels), np.int64)  # how many of its class came before
    for label in np.unique(labels):
        turn[labels == label] = np.arange(np.sum(labels == label))
    chosen = np.lexsort((labels, turn))[:MOST_REAL]
    images, labels = images[chosen], labels[chosen]
    x_0 = images
    if pipe.autoencoder is not None:
        import jax

        module, params = pipe.autoencoder.module, pipe.autoencoder.params
        encode = jax.jit(lambda params, batch: models.encode_latents(module, params, batch))
        x_0 = map_batches(lambda batch: encode(params, batch), images, 100)
    source = f"test images of {dataset.name}"
    captions: tuple[str, ...] = ()
    if pipe.num_classes is not None:
        cond, uncond = pipe.encode_prompts(labels)
    elif "tokenizer" in pipe.parts:
        found = dataset.captions("test") or []
        captions = tuple(found[row] for row in chosen)
        cond, uncond = pipe.encode_prompts(list(captions), [""] * len(captions))
    else:
        cond, uncond = {}, {}
    return Subject(pipe, images, x_0, labels, dataset.class_names, cond, uncond, source, dataset, captions)


def _of_classes(options: Any, pipe: Any) -> Subject:
    number = options.num_images or 16
    classes = read_labels(options.class_labels) or np.arange(min(pipe.num_classes or 1, 10))
    labels = pipe.cycle_labels(classes if pipe.num_classes else None, number)
    x_0, images = _draw(options, pipe, lambda key, progress, **more: pipe(
        key, labels, num_images=number, progress=progress, **more
    ))  # fmt: skip
    names = pipe.class_names or tuple(f"class {label}" for label in range(pipe.num_classes or 1))
    cond, uncond = pipe.encode_prompts(labels) if labels is not None else ({}, {})
    labels = np.zeros(number, np.int32) if labels is None else labels
    return Subject(pipe, images, x_0, labels, tuple(names), cond, uncond, "images that the model drew")


def _of_text(options: Any, pipe: Any) -> Subject:
    number = options.num_images or 4
    x_0, images = _draw(options, pipe, lambda key, progress, **more: pipe(
        key, options.prompt, num_images_per_prompt=number, progress=progress, **more
    ))  # fmt: skip
    cond, uncond = (
        {name: np.repeat(np.asarray(rows), number, axis=0) for name, rows in side.items()}
        for side in pipe.encode_prompts([options.prompt], [""])
    )
    source = f"images that the model drew of {options.prompt!r}"
    labels, captions = np.zeros(number, np.int32), (options.prompt,) * number
    return Subject(pipe, images, x_0, labels, ("image",), cond, uncond, source, captions=captions)


def _draw(options: Any, pipe: Any, call: Callable[..., Any]) -> tuple[np.ndarray, np.ndarray]:
    """(latents, images) that a model draws."""
    import jax

    from jaxldm.commands.terminal import progress_bar

    steps = steps_of(options, pipe)
    with progress_bar(steps, "drawing", options.quiet) as progress:
        latents = call(jax.random.key(options.seed), progress, num_inference_steps=steps, output="latents")
    return np.asarray(latents), np.asarray(pipe.decode(latents))


def steps_of(options: Any, pipe: Any) -> int:
    """How many steps the images are drawn in."""
    usual = 20 if pipe.few_steps is None else pipe.defaults.num_inference_steps
    return options.num_inference_steps or usual


def words_of(
    tokenizer: Any, prompt: str, length: int | None = None
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The words of a caption, each with the places of its tokens in the row that the text encoder sees.

    Words behind the `length` tokens that the encoder reads are left out.
    """
    if tokenizer is None:
        return ()
    offsets = tokenizer.backend.encode(prompt).offsets
    words, end = [], 0
    for word in prompt.split():
        start = prompt.index(word, end)
        end = start + len(word)
        places = tuple(
            place
            for place, (first, last) in enumerate(offsets)
            if first < last and first < end and last > start and (length is None or place < length)
        )
        if places:
            words.append((word, places))
    return tuple(words)


def check_options(subject: Subject, options: Any) -> None:
    """Raise `InvalidArgumentError` for what does not fit the model or its images, before much is computed."""
    pipe, is_run = subject.pipe, subject.dataset is not None
    number = options.num_images or (200 if is_run else len(subject.images))
    fewest = 2 * (pipe.num_classes or 1)
    if is_run and number < fewest:
        raise InvalidArgumentError(f"num_images must be {fewest} or more, two of each class, got {number}")
    if is_run:
        pipe.num_callbacks(number, num_inference_steps=steps_of(options, pipe))
    height, width = subject.images.shape[1:3]
    y, x = options.point or (0, 0)
    if not (0 <= y < height and 0 <= x < width):
        raise InvalidArgumentError(f"--point must lie in the image of {height} x {width} pixels, got {y} {x}")
    chosen_rows(subject, options.class_labels)


def chosen_rows(subject: Subject, class_labels: Sequence[int | str]) -> list[int]:
    """One image of each of the classes; of the first three, or three far apart of many, if none is named."""
    from jaxldm.pipelines.labels import label_numbers

    known = list(dict.fromkeys(subject.labels.tolist()))
    given = label_numbers(read_labels(class_labels) or [], getattr(subject.pipe, "class_names", ()))
    for label in given:
        if label not in known:
            there = ", ".join(map(str, sorted(known)))
            raise InvalidArgumentError(f"--class-labels {label}: there are images of class {there}")
    apart = max(1, len(known) // 3) if len(known) > MANY_CLASSES else 1
    wanted = given or known[::apart][:3]
    return [subject.labels.tolist().index(label) for label in wanted]


def default_output(folder: str) -> Path:
    """Where the report goes when nobody says."""
    return Path(folder) / "inspect"
