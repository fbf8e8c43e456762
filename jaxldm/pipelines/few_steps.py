"""What a student that draws in few steps is drawn with: its solver, its steps, and where its guidance is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from jaxldm import diffusion as D
from jaxldm.entries import build, check_types
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.exact import MAX_STEPS

ENTRY = "_few_steps"  # of model_index.json; diffusers passes over it
GUIDANCE = ("inside", "input", "outside")
# Methods that begin from nothing: whoever has such a model has no teacher to distill another one from.
UNTAUGHT = ("mean_flow", "improved_mean_flow", "shortcut", "ict", "drifting")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewSteps:
    """How a student is drawn with, as training writes it: `pipe.few_steps`, None for any other model.

    Attributes:
        method: that it was trained by, for example "lcm".
        solver: a name of `D.solvers.SOLVERS`, of a call that names none.
        default_steps: of a call that names no number; None: as many as its teacher, by its family.
        only_steps: the numbers of steps that it was made for; None: any.
        guidance: "inside": its images have the guidance of one scale, in one evaluation a step; "input": the
            network takes the scale; "outside": classifier-free guidance as for any other model.
        guidance_scale: (lowest, highest) of its training; of "inside" both are the one.
        teacher: the name of the folder of the model that it was distilled from; None: of none, or not known.
    """

    method: str
    solver: str = "ddim"
    default_steps: int | None = 4
    only_steps: tuple[int, ...] | None = None
    guidance: str = "outside"
    guidance_scale: tuple[float, float] = (1.0, 1.0)
    teacher: str | None = None

    def __post_init__(self):
        check_types(self)
        one_of("solver", self.solver, D.solvers.SOLVERS)
        one_of("guidance", self.guidance, GUIDANCE)
        for steps in (self.default_steps, *(self.only_steps or ())):
            if steps is not None and not 1 <= steps <= MAX_STEPS:
                raise InvalidArgumentError(f"steps must be from 1 to {MAX_STEPS}, got {steps}")
        low, high = self.guidance_scale
        if not 0 <= low <= high or (self.guidance == "inside" and low != high):
            raise InvalidArgumentError(
                f"guidance_scale must be (lowest, highest), both the same for guidance inside, got {low} and "
                f"{high}"
            )

    @property
    def is_taught(self) -> bool:
        """Whether its method is one of distillation, with a teacher."""
        return self.method not in UNTAUGHT

    @property
    def this(self) -> str:
        """The model in messages: a student where it has a teacher."""
        return f"this {self.method} {'student' if self.is_taught else 'model'}"

    def check_steps(self, num_inference_steps: int) -> None:
        """Raise `InvalidArgumentError` for a number of steps that the student was not made for."""
        if self.only_steps is not None and num_inference_steps not in self.only_steps:
            made = " or ".join(str(steps) for steps in self.only_steps)
            instead = ", or distill one for it with --num-steps" if self.is_taught else ""
            raise InvalidArgumentError(
                f"{self.this} was made for {made} step{'s' * (made != '1')}, not for "
                f"{num_inference_steps}: leave the number out{instead}"
            )

    def check_scale(self, guidance_scale: float, true_cfg_scale: float | None = None) -> None:
        """Raise `InvalidArgumentError` for a scale on top of one that is inside, or out of range."""
        low, high = self.guidance_scale
        if self.guidance != "outside" and true_cfg_scale not in (None, 1):
            raise InvalidArgumentError(
                f"guidance is inside {self.this}, and true_cfg_scale={true_cfg_scale:g} would guide it "
                "twice: leave it out"
            )
        if self.guidance == "inside" and guidance_scale not in (1, low):
            self._refuse_scale_on_top(guidance_scale)
        if self.guidance == "input" and not low <= guidance_scale <= high:
            other = (
                "distill with another --guidance-scale"
                if self.is_taught
                else "train one whose FewStepsRecipe has another guidance_scale"
            )
            raise InvalidArgumentError(
                f"{self.this} was trained for guidance scales from {low:g} to {high:g}, got "
                f"{guidance_scale:g}: take one of these, or {other}"
            )

    def _refuse_scale_on_top(self, guidance_scale: float) -> NoReturn:
        """Raise `InvalidArgumentError`, with what the owner of such a model can do."""
        low, asked = self.guidance_scale[0], f"{guidance_scale:g}"
        what = f"guidance of scale {low:g} is inside {self.this}, and more on top would double it"
        other = f", or distill with --guidance-scale {asked}"
        if not self.is_taught:
            other = f", or train one whose FewStepsRecipe has guidance_scale=({asked}, {asked})"
            if low == 1:  # such a network never saw the null class
                what = f"{self.this} was trained without guidance, and has no null class to guide it by"
        if self.method == "drifting":
            other = ""
        raise InvalidArgumentError(f"{what}: leave the guidance scale out{other}")

    @property
    def default_scale(self) -> float | None:
        """The scale of a call that names none; None: that of the model's family."""
        low, high = self.guidance_scale
        if self.guidance == "inside":
            return low
        return min(max(3.0, low), high) if self.guidance == "input" else None

    def to_dict(self) -> dict[str, Any]:
        """The entry of model_index.json."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def entry_of(few_steps: FewSteps | None) -> dict[str, Any]:
    """What model_index.json has for a student, nothing for any other model."""
    return {} if few_steps is None else {ENTRY: few_steps.to_dict()}


def training_of(recipe: Mapping[str, Any]) -> str:
    """The command that trains a recipe, given as a run has it: `train NAME` or `distill TEACHER`."""
    few = (recipe.get("diffusion") or {}).get("few_steps") or {}
    return f"distill {few['teacher']}" if few.get("teacher") else f"train {recipe.get('name')}"


def read_few_steps(index: Mapping[str, Any]) -> FewSteps | None:
    """What a model_index.json says of its student, None of any other model. Raises `CheckpointError`."""
    entry = index.get(ENTRY)
    return None if entry is None else build(FewSteps, entry, ENTRY)
