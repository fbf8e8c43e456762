"""Guidance away from the same network, made weak: skip-layer and perturbed-attention guidance.

FreeU and token merging, further ways to call a network with the parameters that it has, are here, too.

    output = guided + s (cond - weak), with the weak network called under the condition.

    pipe(key, "a cat", weak_guidance=pipelines.PerturbedAttention(scale=3.0))      # Stable Diffusion, SDXL
    pipe(key, "a cat", weak_guidance=pipelines.SkipLayers())                        # Stable Diffusion 3.5

The weak network has the same parameters: it costs a third call and no memory. Other scales and steps compile
nothing, other layers do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import traverse_util

from jaxldm import models
from jaxldm.arguments import check_fields, checked, count, number, optional, several, text
from jaxldm.checkpoints.names import published_name
from jaxldm.errors import InvalidArgumentError, one_of, shown
from jaxldm.pipelines.network import Network, as_merging, merging_tokens
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline

_FIELDS = {"scale": number(0), "start": number(0, 1), "stop": number(0, 1)}


@dataclasses.dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance, as Stability publishes it for Stable Diffusion 3.5 medium.

    Attributes:
        layers: numbers of the blocks that the weak network leaves out, from 0 on.
        scale: s.
        start, stop: the part of the steps in which it is used: those behind start and before stop.
    """

    layers: tuple[int, ...] = (7, 8, 9)
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def __post_init__(self) -> None:
        check_fields(self, layers=several(count(0)), **_FIELDS)

    def weak(self, network: Network) -> Any:
        """The module of the weak network. Raises `InvalidArgumentError` for one that cannot skip layers."""
        total = getattr(network.config, "num_layers", 0)
        if not hasattr(network.module, "skip_layers"):
            raise InvalidArgumentError(
                f"SkipLayers is for Stable Diffusion 3, not for {type(network.module).__name__}: leave it out"
            )
        if not self.layers or max(self.layers) >= total:
            raise InvalidArgumentError(f"layers must be of 0 to {total - 1} here, got {self.layers}")
        return network.module.clone(skip_layers=tuple(sorted(set(self.layers))))


@dataclasses.dataclass(frozen=True)
class PerturbedAttention:
    """Perturbed-attention guidance of U-Nets: in the weak network each pixel attends to itself alone.

    Ahn et al. 2024, arXiv:2403.17377, equation 15.

    Attributes:
        layers: published names of blocks, or what they begin with: "mid_block", "up_blocks.1",
            "down_blocks.2.attentions.0".
        scale: s.
        start, stop: as in `SkipLayers`.
    """

    layers: tuple[str, ...] = ("mid_block",)
    scale: float = 3.0
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, layers=several(text), **_FIELDS)

    def weak(self, network: Network) -> Any:
        """The module of the weak network. Raises `InvalidArgumentError` for one without such layers."""
        if not hasattr(network.module, "identity_attention"):
            raise InvalidArgumentError(
                "PerturbedAttention is for the U-Nets of Stable Diffusion, not for a "
                f"{type(network.module).__name__}: leave it out"
            )
        names = [published_name(path) for path in traverse_util.flatten_dict(network.params)]
        blocks = sorted({name.split(".transformer_blocks")[0] for name in names if ".attn1." in name})
        for layer in self.layers:
            if not any(f"{block}.".startswith(f"{layer}.") for block in blocks):
                raise InvalidArgumentError(
                    f"layers has {layer!r}, and no self-attention is there: it is in {', '.join(blocks)}"
                )
        return network.module.clone(identity_attention=tuple(self.layers))


NOTATIONS = {"skip-layers": SkipLayers, "perturbed-attention": PerturbedAttention}


@checked(notation=text)
def read_weak_guidance(notation: str) -> SkipLayers | PerturbedAttention:
    """What a notation says: "skip-layers:2.8,0.01,0.2@7+8+9", "perturbed-attention:3@mid_block".

    A name of `NOTATIONS`; behind a colon scale, start and stop, with commas; behind an @ the layers. Those
    left out have their defaults.

    Raises:
        UnknownNameError: no such name.
        InvalidArgumentError: too many numbers, or one that is none or out of range.

    >>> from jaxldm import pipelines
    >>> pipelines.read_weak_guidance("skip-layers:2.5@7+9")
    SkipLayers(layers=(7, 9), scale=2.5, start=0.01, stop=0.2)
    """
    settings, at, layers = notation.partition("@")
    name, _, rest = settings.partition(":")
    one_of("weak_guidance", name, NOTATIONS)
    words = rest.split(",") if rest else []
    wanted = f"write {name}:SCALE,START,STOP@LAYER+LAYER, as in {_EXAMPLES[name]}"
    try:
        options: dict[str, Any] = dict(
            zip(_FIELDS, map(float, words[: len(_FIELDS)]), strict=False),
        )
        if at:
            kind = int if name == "skip-layers" else str
            options["layers"] = tuple(kind(layer) for layer in layers.split("+"))
    except ValueError:
        raise InvalidArgumentError(f"weak_guidance {shown(notation)} is no notation: {wanted}") from None
    if len(words) > len(_FIELDS):
        raise InvalidArgumentError(f"weak_guidance {shown(notation)} has {len(words)} numbers: {wanted}")
    return NOTATIONS[name](**options)


_EXAMPLES = {"skip-layers": "skip-layers:2.8,0.01,0.2@7+8+9", "perturbed-attention": "perturbed-attention:3"}


@checked(pipe=A_PIPELINE, s1=number(0), s2=number(0), b1=number(0), b2=number(0))
def with_free_u(
    pipe: Pipeline, s1: float = 0.9, s2: float = 0.2, b1: float = 1.5, b2: float = 1.6
) -> Pipeline:
    """The model with FreeU in its U-Net: Si et al. 2023, arXiv:2309.11497; the parameters stay.

    Args:
        pipe: of Stable Diffusion 1, 2 or XL; stays as it is. The authors' values are (0.9, 0.2, 1.5, 1.6) for
            1.4 and 1.5, (0.9, 0.2, 1.4, 1.6) for 2.1 and (0.9, 0.2, 1.3, 1.4) for XL.
        s1, s2: factors of the low frequencies of the skips in the first and the second up block.
        b1, b2: factors of half of the channels of the backbone there.

    Raises:
        InvalidArgumentError: a model without such a U-Net.
    """
    module = pipe.denoiser.module
    if not hasattr(module, "free_u"):
        raise InvalidArgumentError(
            f"FreeU is for the U-Nets of Stable Diffusion, not for a {type(module).__name__}"
        )
    changed = module.clone(free_u=(float(s1), float(s2), float(b1), float(b2)))
    return pipe.replace(denoiser=Network(changed, pipe.denoiser.params))


@checked(pipe=A_PIPELINE, token_merging=optional(as_merging))
def with_token_merging(pipe: Pipeline, token_merging: float | models.TokenMerging | None = 0.5) -> Pipeline:
    """The model with tokens merged in all of its calls, for a server; of one call it is an option.

    Args:
        pipe: of DiT, SiT, or Stable Diffusion 1, 2 or XL; stays as it is.
        token_merging: as in `Call`; None or 0 changes nothing.

    Raises:
        InvalidArgumentError: a model whose tokens cannot be merged.
    """
    options = None if token_merging is None else as_merging("token_merging", token_merging)
    return pipe.replace(denoiser=merging_tokens(pipe.denoiser, options))
