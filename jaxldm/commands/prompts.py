"""The texts of `jaxldm sample`, and the pictures that FLUX.1 Redux puts in their place."""

from __future__ import annotations

import itertools
from typing import Any

from jaxldm.errors import InvalidArgumentError

OF_REDUX = ("redux", "redux_image", "redux_scale")


def repeat_prompts(
    prompts: tuple[str, ...], negatives: tuple[str, ...] | None, num_images: int | None
) -> tuple[list[str], list[str] | None]:
    """The prompt and the negative prompt of each image."""
    from jaxldm.memory import check_fits

    if not prompts:
        raise InvalidArgumentError('--prompt is empty: give a text, as in --prompt "a cat in the snow"')
    if num_images is not None and num_images < 1:
        raise InvalidArgumentError(f"num_images must be 1 or more, got {num_images}")
    count = len(prompts) if num_images is None else num_images
    check_fits(4 * 64 * 64 * count, f"{count} images need", "draw fewer at a time")  # of 64x64 or more
    if negatives and len(negatives) not in (1, len(prompts)):
        raise InvalidArgumentError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for all, or one for each"
        )
    repeated = [list(itertools.islice(itertools.cycle(texts), count)) for texts in (prompts, negatives or ())]
    return repeated[0], repeated[1] or None


def redux_states(options: Any) -> dict[str, Any]:
    """The options of a call that stand for the pictures of --redux-image; none without --redux.

    Raises:
        InvalidArgumentError: a folder of another model, a negative prompt.
    """
    import jax

    from jaxldm import pipelines
    from jaxldm.data.pictures import open_picture

    if options.redux is None:
        return {}
    if options.negative_prompt is not None:
        raise InvalidArgumentError("--negative-prompt is not for --redux: leave one of them out")
    redux = pipelines.load(options.redux, dtype=options.dtype)
    if redux.family.name != "FluxRedux":
        raise InvalidArgumentError(f"--redux {options.redux} is a {redux.family.name}, not FLUX.1 Redux")
    scales = options.redux_scale or (1.0,)
    states: list[Any] = []
    for file in options.redux_image:
        prompt = None if options.prompt is None else list(options.prompt)[:1]
        states.append(redux(jax.random.key(options.seed), prompt, image=open_picture(file)))
    weights = scales * len(states) if len(scales) == 1 else scales
    if len(weights) != len(states):
        raise InvalidArgumentError(
            f"--redux-scale has {len(scales)} numbers for {len(states)} pictures: give one, or one for each"
        )
    summed = {
        name: sum(w * each[name] for w, each in zip(weights, states, strict=True)) for name in states[0]
    }
    return summed | {"num_images_per_prompt": options.num_images}
