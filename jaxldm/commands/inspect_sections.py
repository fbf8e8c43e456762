"""The sections of `jaxldm inspect` about the network and its latents: figures, and what one sees in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxldm.commands import inspect_figures as F
from jaxldm.commands import inspect_texts as T
from jaxldm.commands.inspect_subject import Subject, chosen_rows, words_of
from jaxldm.errors import MissingDependencyError
from jaxldm.metrics.page import Section, Shown

MOST_LAYERS, MOST_HEADS, MOST_WORDS, MOST_PATCHES, MOST_CLASSES = 8, 6, 14, 800, 20
FEW_CLASSES = 10  # of more than colours can distinguish
FEWEST_IMAGES = 4  # that t-SNE can lay out


class Noised(NamedTuple):
    """One call of the network on noisy images.

    Attributes:
        inside: see `models.look_inside`.
        rows: which images.
    """

    inside: Any
    rows: Sequence[int]


def look(subject: Subject, rows: Sequence[int], options: Any, *, cond: bool, attention: bool) -> Noised:
    """Add noise of standard deviation `options.noise` times the signal, and look inside of the network.

    Image k of a seed gets the same noise whichever other images are there.
    """
    import jax
    import jax.numpy as jnp

    from jaxldm import diffusion as D
    from jaxldm import models

    pipe, path = subject.pipe, subject.pipe.prediction.path
    t = np.float32(path.time(np.float64(options.noise)))
    x_0 = jnp.asarray(subject.x_0[np.asarray(rows)], jnp.float32)
    key = jax.random.key(options.seed)
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, row), x_0.shape[1:]) for row in rows])
    x_t = np.float32(path.alpha(t)) * x_0 + np.float32(path.sigma(t)) * noise
    given = subject.cond if cond else subject.uncond
    condition = {name: np.asarray(values)[np.asarray(rows)] for name, values in given.items()}
    condition |= numbers_taken(pipe, len(rows))
    seen = []

    def network(x: Any, t: Any) -> Any:
        found = models.look_inside(
            pipe.denoiser.module, pipe.denoiser.params, x, t, condition, attention=attention
        )
        seen.append(found)
        return found.output

    D.denoiser(network, pipe.prediction, learned_variance=pipe.has_learned_variance)(x_t, t)
    return Noised(seen[0], rows)


def numbers_taken(pipe: Any, count: int) -> dict[str, Float[np.ndarray, " B"]]:
    """What a student's network takes besides: its usual guidance scale, and a step of no length."""
    usual = {"guidance_scale": pipe.default_guidance_scale, "step_size": 0.0}
    taken = getattr(pipe.denoiser.config, "scalar_inputs", ())
    return {name: np.full(count, usual[name], np.float32) for name in taken}


def cells_of(number: int, shape: Sequence[int]) -> tuple[int, int] | None:
    """(rows, columns) of so many queries over latents of this (height, width); None if they are no grid."""
    rows = round((number * shape[0] / shape[1]) ** 0.5)
    return (rows, number // rows) if rows and rows * (number // rows) == number else None


def evenly(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, from the first to the last."""
    if len(names) <= most:
        return list(names)
    places: list[int] = np.linspace(0, len(names) - 1, most).round().astype(int).tolist()
    return [names[place] for place in dict.fromkeys(places)]


def most_detailed(image: Float[np.ndarray, "H W C"], cells: tuple[int, int]) -> tuple[int, int]:
    """The pixel in the middle of the cell in which the image varies most."""
    grey = np.asarray(image).mean(-1)
    rows, columns = (
        np.linspace(0, side, n + 1).astype(int) for side, n in zip(grey.shape, cells, strict=True)
    )
    spread = np.array(
        [[grey[a:b, c:d].std() for c, d in itertools.pairwise(columns)] for a, b in itertools.pairwise(rows)]
    )
    row, column = np.unravel_index(spread.argmax(), spread.shape)
    return int(rows[row] + rows[row + 1]) // 2, int(columns[column] + columns[column + 1]) // 2


# ---------------------------------------------------------------- attention


def attention_section(subject: Subject, options: Any) -> Section:
    """Self-attention over the image: from one patch, and averaged over all."""
    title = "Where the network looks: self-attention"
    rows = chosen_rows(subject, options.class_labels)
    noised = look(subject, rows, options, cond=True, attention=True)
    shape = subject.x_0.shape[1:3]
    over_image = {
        name: np.asarray(weights)
        for name, weights in noised.inside.attention.items()
        if weights.shape[2] == weights.shape[3] and cells_of(weights.shape[2], shape)
    }
    if not over_image:
        return Section(title, [], "This network has no attention from patches of the image to patches.")
    layers = evenly(list(over_image), MOST_LAYERS)
    parts: list[str | Shown] = [
        T.ATTENTION,
        T.ATTENTION_INPUT.format(noise=options.noise),
    ]
    if len(layers) < len(over_image):
        parts.append(f"Shown are {len(layers)} of {len(over_image)} layers, evenly spaced.")
    for place, row in enumerate(rows):
        maps = {name: over_image[name][place] for name in layers}
        parts += _of_one_image(subject, row, maps, options)
    parts.append(T.ATTENTION_SEEN)
    return Section(title, parts)


def _of_one_image(
    subject: Subject, row: int, maps: Mapping[str, Float[np.ndarray, "_ _ _"]], options: Any
) -> list[str | Shown]:
    image, shape = subject.images[row], subject.x_0.shape[1:3]
    cells = {name: cells_of(weights.shape[1], shape) or shape for name, weights in maps.items()}
    finest = max(cells.values())
    y, x = options.point or most_detailed(image, finest)
    query = {name: (y * h // image.shape[0], x * w // image.shape[1]) for name, (h, w) in cells.items()}
    heads = min(MOST_HEADS, max(len(weights) for weights in maps.values()))
    names = ["mean of heads", *(f"head {head}" for head in range(heads))]
    from_one, averaged = {}, {}
    for name, weights in maps.items():
        h, w = cells[name]
        with_mean = np.concatenate([weights.mean(0, keepdims=True), weights[:MOST_HEADS]])
        from_one[name] = with_mean[:, query[name][0] * w + query[name][1]].reshape(-1, h, w)
        averaged[name] = with_mean.mean(1).reshape(-1, h, w)
    reach = ", ".join(
        f"{name} {effective_number(weights):.0f} of {weights.shape[1]}" for name, weights in maps.items()
    )
    what = f"Class {subject.class_names[subject.labels[row]]}" if len(subject.class_names) > 1 else "Image"
    if subject.captions:
        what = f'"{subject.captions[row]}"'
    number = next(iter(maps.values())).shape[1]
    return [
        Shown(F.attention_figure(image, from_one, names, query), T.FROM_ONE.format(what=what, reach=reach)),
        Shown(
            F.attention_figure(image, averaged, names),
            T.AVERAGED.format(what=what, number=number, even=1 / number),
        ),
    ]


def effective_number(weights: Float[np.ndarray, "heads N M"]) -> float:
    """exp(entropy) of a row, averaged: 1 where all weight is on one key, M where it is even."""
    weights = np.asarray(weights, np.float64)
    entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(-1)
    return float(np.exp(entropy).mean())


def caption_section(subject: Subject, options: Any) -> Section:
    """Cross-attention: for each word of a caption, where in the image it is used."""
    title = "Which word goes where: cross-attention"
    rows = chosen_rows(subject, options.class_labels)
    noised = look(subject, rows, options, cond=True, attention=True)
    shape = subject.x_0.shape[1:3]
    lengths = {np.shape(v)[1] for v in subject.cond.values() if np.ndim(v) == 3}
    found = {
        name: np.asarray(weights)
        for name, weights in noised.inside.attention.items()
        if weights.shape[3] in lengths
        and weights.shape[2] != weights.shape[3]
        and cells_of(weights.shape[2], shape)
    }
    if not found:
        return Section(
            title, [], "This network mixes text and image in one attention, or has none from image to text."
        )
    layers = evenly(list(found), MOST_LAYERS)
    figures = [
        _of_one_caption(subject, row, {name: found[name][place] for name in layers})
        for place, row in enumerate(rows)
    ]
    return Section(title, [T.CAPTION, *filter(None, figures), T.CAPTION_SEEN])


def _of_one_caption(
    subject: Subject, row: int, weights: Mapping[str, Float[np.ndarray, "_ _ _"]]
) -> Shown | None:
    """A map for each word of an image's caption and each layer; None for a caption without words."""
    shape, caption = subject.x_0.shape[1:3], subject.captions[row]
    length = min(of_layer.shape[2] for of_layer in weights.values())
    every = words_of(subject.pipe.parts.get("tokenizer"), caption, length)
    words = every[:MOST_WORDS]
    if not words:
        return None
    maps = {}
    for name, of_layer in weights.items():
        h, w = cells_of(of_layer.shape[1], shape) or shape
        mean = of_layer.mean(0)
        maps[name] = np.stack([mean[:, list(places)].sum(-1).reshape(h, w) for _, places in words])
    whose = "the image that was drawn of them" if subject.dataset is None else "its image"
    cut = f" Shown are the first {len(words)} words." if len(words) < len(caption.split()) else ""
    figure = F.attention_figure(subject.images[row], maps, [word for word, _ in words])
    return Shown(figure, f"Words of {caption!r} over {whose}.{cut}")


# ---------------------------------------------------------------- latents


def latents_section(subject: Subject) -> Section:
    """Each channel of what the network draws, against N(0, 1)."""
    latent = subject.pipe.autoencoder is not None
    name = "latents" if latent else "pixels"
    channels = subject.x_0.reshape(-1, subject.x_0.shape[-1])[:, :16]
    figure = F.histogram_figure(channels, name)
    parts = [
        T.LATENTS if latent else T.PIXELS,
        Shown(figure, f"{name.capitalize()} of {len(subject.x_0)} {subject.source} by channel, and N(0, 1)."),
        *([T.LATENTS_SEEN] if latent else []),
    ]
    return Section("What the network draws: " + name, parts)


# ---------------------------------------------------------------- t-SNE


def embedding_section(subject: Subject, options: Any) -> Section:
    """t-SNE of patches as they enter and inside of the network, and of whole images."""
    title = "What the network knows of a patch: t-SNE"
    try:
        embed = tsne_function(options.seed)
    except MissingDependencyError as error:
        return Section(title, [], f"This section is missing: {error}.")
    rows = rows_of_few_classes(subject)
    inside = look(subject, rows, options, cond=False, attention=False).inside
    tokens = {
        name: rows_of_patches(values)
        for name, values in inside.outputs.items()
        if is_of_patches(values, len(rows))
    }
    first, middle = ends_of(tokens)
    labels = subject.labels[np.asarray(rows)]
    random = np.random.default_rng(options.seed)
    panels, colours = {}, {}
    for name, layer in (("patches as they enter", first), ("patches inside", middle)):
        patches = tokens[layer]
        chosen = random.permutation(patches.shape[0] * patches.shape[1])[:MOST_PATCHES]
        title_of = f"{name}: {layer}"
        panels[title_of] = embed(patches.reshape(-1, patches.shape[-1])[chosen])
        colours[title_of] = np.repeat(labels, patches.shape[1])[chosen]
    if len(rows) >= FEWEST_IMAGES:
        whole = f"one point an image: mean of {middle}"
        panels[whole], colours[whole] = embed(tokens[middle].mean(1)), labels
    return Section(
        title,
        [
            T.TSNE,
            Shown(
                F.scatter_figure(panels, colours, subject.class_names),
                f"Patches of {len(rows)} {subject.source}, with noise ({options.noise:g} times the signal)."
                + classes_left_out(subject, rows),
            ),
            T.TSNE_SEEN,
        ],
    )


def rows_of_few_classes(subject: Subject) -> list[int]:
    """The images of as many classes as colours can distinguish: of all classes, or of ten of them."""
    known = np.unique(subject.labels)
    if len(known) > MOST_CLASSES:
        known = known[np.linspace(0, len(known) - 1, FEW_CLASSES).round().astype(int)]
    return np.flatnonzero(np.isin(subject.labels, known)).tolist()


def classes_left_out(subject: Subject, rows: Sequence[int]) -> str:
    """A sentence where not all classes are shown."""
    shown, there = (len(np.unique(labels)) for labels in (subject.labels[np.asarray(rows)], subject.labels))
    return f" Shown are {shown} of {there} classes, so that colours are distinct." * (shown < there)


def tsne_function(seed: int) -> Any:
    """`[N, D]` -> `[N, 2]`. Raises `MissingDependencyError` without scikit-learn."""
    try:
        from sklearn.manifold import TSNE  # late: a second, and few need it
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "inspect", "t-SNE of patch embeddings") from error

    def embed(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N 2"]:
        rows = np.asarray(rows, np.float32)
        near = max(1.0, min(30.0, (len(rows) - 1) / 3))
        start = "pca" if min(rows.shape) >= 2 else "random"
        with threadpool_limits(1):  # threads add up in another order each time, and wait for each other
            return TSNE(2, perplexity=near, init=start, random_state=seed).fit_transform(rows)

    return embed


def is_of_patches(values: Any, number: int) -> bool:
    """Whether an output is a vector for each patch of so many images."""
    return values.ndim in (3, 4) and values.shape[0] == number and math.prod(values.shape[1:-1]) > 1


def rows_of_patches(values: Any) -> Float[np.ndarray, "B N C"]:
    """`[B, N, C]`, of tokens or of a picture of them."""
    return np.asarray(values, np.float32).reshape(values.shape[0], -1, values.shape[-1])


def ends_of(tokens: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the first layer, and of one in the middle: a U-Net's `mid_block`."""
    names = list(tokens)
    middle = next((name for name in names if name.startswith("mid_block")), names[len(names) // 2])
    return names[0], middle
