"""The timesteps that latent consistency models were distilled on and sample at (Luo et al. 2023)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from jaxldm.arguments import checked, count, number
from jaxldm.diffusion.paths import Path
from jaxldm.errors import InvalidArgumentError
from jaxldm.exact import MAX_STEPS, MAX_TIMESTEPS, floor_product, least_share


def lcm_times(path: Path, count: int, original_steps: int) -> Float[np.ndarray, " N"]:
    """N values of t, see `lcm`."""
    if path.num_train_timesteps is None:
        raise InvalidArgumentError(
            f"spacing='lcm' counts timesteps, and this {path.name} path has none: use 'trailing'"
        )
    return lcm_timesteps(count, path.num_train_timesteps, original_steps).astype(np.float64)


@checked(
    num_inference_steps=count(1, MAX_STEPS),
    num_train_timesteps=count(1, MAX_TIMESTEPS),
    original_inference_steps=count(1, MAX_STEPS),
    strength=number(above=0, high=1),
)
def lcm_timesteps(
    num_inference_steps: int,
    num_train_timesteps: int = 1000,
    original_inference_steps: int = 50,
    strength: float = 1.0,
) -> Int[np.ndarray, " N"]:
    """The timesteps that a latent consistency model samples at, for `at_times`.

    Distillation visits k, 2 k, ... less 1, with k = num_train_timesteps // original_inference_steps (Luo et
    al. 2023, section 4.3); N of them are taken, evenly by their place in that list, from its noisy end.

    Args:
        num_inference_steps: N, usually 1 to 8.
        num_train_timesteps: of the path.
        original_inference_steps: how many timesteps the distillation used. TCD uses the same list.
        strength: below 1 to start from a noised image: the noisiest part of the list is left out.

    Raises:
        InvalidArgumentError: more steps than the list has, or a strength outside (0, 1].

    >>> from jaxldm import diffusion as D
    >>> D.lcm_timesteps(4)
    array([999, 759, 499, 259])
    """
    if not 1 <= original_inference_steps <= num_train_timesteps:
        raise InvalidArgumentError(
            f"original_inference_steps must lie in 1 to {num_train_timesteps}, not {original_inference_steps}"
        )
    visited = np.arange(1, floor_product(original_inference_steps, strength) + 1)
    visited = visited * (num_train_timesteps // original_inference_steps) - 1
    if not len(visited):
        raise InvalidArgumentError(
            f"strength={strength} leaves none of {original_inference_steps} original_inference_steps: take a "
            f"strength of {least_share(original_inference_steps)}"
        )
    if not 1 <= num_inference_steps <= len(visited):
        raise InvalidArgumentError(
            f"num_inference_steps={num_inference_steps}, but the distillation had {original_inference_steps} "
            f"timesteps, {len(visited)} of them in strength={strength:g}: ask for 1 to {len(visited)} steps"
        )
    places = np.linspace(0, len(visited), num_inference_steps, endpoint=False).astype(int)
    return visited[::-1][places]
