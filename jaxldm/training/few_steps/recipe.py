"""How a network of few steps is trained, as plain data: a part of the recipe of its stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxldm.arguments import count, number
from jaxldm.entries import check_types
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.exact import MAX_STEPS
from jaxldm.functions import NamedFields
from jaxldm.training.few_steps.method import Method
from jaxldm.training.few_steps.methods import METHODS
from jaxldm.training.finetune_recipe import LoraRecipe

LARGEST_SCALE = 1e3


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewStepsRecipe(NamedFields):
    """The method by which a denoising network is trained to draw in few steps, and its numbers.

    Attributes:
        method: a name of `METHODS`: "progressive", "lcm", ...
        teacher: the folder of the trained model that the student learns from and begins as; None for methods
            that begin from nothing.
        num_steps: of the student, for methods that are trained for one number; None: the method's own.
        guidance_scale: (lowest, highest) of the teacher's guidance, which comes inside. Where they differ
            the network takes the scale as an input. None: of a method that leaves guidance outside.
        numbers: of the method, by name; what is left out is the method's own.
        lora: an adapter of the teacher is trained in its place, and written as a file besides; None: all of
            its parameters.
    """

    method: str
    teacher: str | None = None
    num_steps: int | None = None
    guidance_scale: tuple[float, float] | None = None
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lora: LoraRecipe | None = None

    def __post_init__(self):
        check_types(self)
        method = METHODS[one_of("method", self.method, METHODS)]
        if method.taught == (self.teacher is None):
            raise InvalidArgumentError(
                f"the method {self.method} learns from a teacher: give its folder (jaxldm distill RUN)"
                if method.taught
                else f"the method {self.method} has no teacher: train it with `jaxldm train`"
            )
        if method.steps is None and self.num_steps is not None:
            raise InvalidArgumentError(
                f"--num-steps has no effect on {self.method}, whose students are not made for one number of "
                "steps: leave it out, and give --num-inference-steps when you sample"
            )
        steps = method.steps if self.num_steps is None else self.num_steps
        if steps is not None:
            count(1, MAX_STEPS)("num_steps", steps)
        object.__setattr__(self, "num_steps", steps)
        object.__setattr__(self, "guidance_scale", self._scales(method))
        object.__setattr__(self, "numbers", self._numbers(method))
        if self.lora is not None:
            self._check_adapter(method)

    def _check_adapter(self, method: Method) -> None:
        """Refuse what no adapter of the teacher can be."""
        if not method.adapts:
            fitting = ", ".join(name for name, other in METHODS.items() if other.adapts)
            raise InvalidArgumentError(
                f"{self.method} trains more than one network, or a new one, and takes no --rank: leave it "
                f"out, or take the method {fitting}"
            )
        if self.takes_scale:
            raise InvalidArgumentError(
                "an adapter changes layers that its model has, and none of them takes the guidance scale: "
                "give one scale, as in --guidance-scale 3, or leave --rank out"
            )

    def _scales(self, method: Method) -> tuple[float, float] | None:
        given = self.guidance_scale
        if method.guidance != "inside":
            if given is not None:
                later = ", and guide the student when you sample" if method.guidance == "outside" else ""
                raise InvalidArgumentError(
                    f"--guidance-scale is not for {self.method}, which has no guidance inside: leave it "
                    f"out{later}"
                )
            return None
        low, high = given or method.scales or (1.0, 1.0)
        for value in (low, high):
            number(0, LARGEST_SCALE)("guidance_scale", value)
        if low > high:
            raise InvalidArgumentError(
                f"guidance_scale must be one scale, or the lowest and the highest, got {low:g} and {high:g}"
            )
        if self.method == "guidance" and low == high:
            raise InvalidArgumentError(
                f"guidance distillation is for a range of scales, got {low:g} alone: give the lowest and the "
                "highest, as in --guidance-scale 1 7.5"
            )
        return low, high

    def _numbers(self, method: Method) -> dict[str, float]:
        found = dict(method.numbers)
        for name, value in self.numbers.items():
            one_of(f"number of {self.method}", name, method.numbers)
            whole = isinstance(method.numbers[name], int) and value == int(value)  # JSON may have 16.0
            found[name] = method.limits[name](name, int(value) if whole else value)
        return found

    @property
    def takes_scale(self) -> bool:
        """Whether the network takes the guidance scale as an input."""
        return self.guidance_scale is not None and self.guidance_scale[0] < self.guidance_scale[1]
