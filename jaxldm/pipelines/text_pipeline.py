"""What every text-to-image pipeline is: parts that a folder names, and facts that callers ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxldm.pipelines.network import Network

# Of families that were published with a judge of pictures, which is not read or written here: without this
# diffusers opens the folder with a line about it.
WITHOUT_SAFETY_CHECKER = {"requires_safety_checker": False}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TextPipeline:
    """Networks, tokenizers and options, in fields named as the components of a folder of diffusers.

    A family is a subclass with a `__call__`, and a line in `text_folders`. `dataclasses.replace` swaps a
    part.

    Class attributes:
      class_names: the `_class_name`s of model_index.json that it opens. One class of ours does what several
        do there: text-to-image, image-to-image and inpainting.
      optional: components that a folder may lack; None then.
      flags: fields that are options in model_index.json and no components; absent ones keep their default.
      saved_options: options that diffusers wants to find there besides.
      draws_images: False for a stage whose call takes or gives something else than texts and images.
      default_guidance_scale, default_strength, default_num_inference_steps: of calls that name none.
      rounds_strength_up: a part of a step that `strength` leaves is walked, and not left out.
    """

    class_names: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    flags: ClassVar[tuple[str, ...]] = ()
    saved_options: ClassVar[Mapping[str, bool]] = {}
    draws_images: ClassVar[bool] = True
    default_guidance_scale: ClassVar[float] = 7.5
    default_strength: ClassVar[float] = 0.8
    default_num_inference_steps: ClassVar[int] = 50
    rounds_strength_up: ClassVar[bool] = False

    @classmethod
    def component_names(cls) -> tuple[str, ...]:
        """The components of its folder, the optional ones among them."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name not in cls.flags)

    @property
    def saved_class_name(self) -> str:
        """The `_class_name` under which diffusers opens the model."""
        return self.class_names[0]

    @property
    def networks(self) -> dict[str, Network]:
        """The networks by the names of their fields, which are those of their folders."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: part for name, part in parts.items() if isinstance(part, Network)}

    def check_parts(self) -> None:
        """Raises `CheckpointError` where the parts are of different models."""

    def default_steps(self, solver: Any = None) -> int:
        """The number of steps of a call that names none."""
        return self.default_num_inference_steps

    def count_ticks(self, num_images: int, options: Mapping[str, Any]) -> int:
        """How often a call with these options will tell its `progress`: the length of a bar."""
        steps = options.get("num_inference_steps") or self.default_steps(options.get("solver"))
        strength = options.get("strength")
        if options.get("image") is None or (strength is None and options.get("mask_image") is not None):
            strength = 1.0
        strength = self.default_strength if strength is None else strength
        walked = steps - int(steps - steps * strength) if self.rounds_strength_up else int(steps * strength)
        return max(1, walked) * -(-num_images // max(options.get("batch_size") or 1, 1))
