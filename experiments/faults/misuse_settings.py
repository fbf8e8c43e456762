"""The valid calls that `misuse` starts from, of what holds settings: configs of models, recipes, options."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from experiments.faults.misuse_cases import Case
from jaxldm import data, models, schedulers
from jaxldm import diffusion as D
from jaxldm import training as T
from jaxldm.models.registry import ARCHITECTURES, VARIANTS


def settings() -> list[Case]:
    """Frozen dataclasses: configs of models, recipes, options."""
    configs = {kind.__name__: kind for *_, kind in (*ARCHITECTURES.values(), *VARIANTS.values())}
    small = [
        Case(
            "models.Tiling",
            models.Tiling,
            {"size": 64, "overlap": 0.25},
        ),
        Case(
            "D.Restart",
            lambda **values: D.restart_grid(D.EDM(), D.make_grid(D.EDM(), 8), [D.Restart(**values)]),
            {"lowest": 2.0, "highest": 4.0, "num_steps": 1, "times": 1},
            words=dict.fromkeys(("lowest", "highest", "num_steps", "times"), "restart"),
        ),
        Case(
            "schedulers.GridRule",
            schedulers.GridRule,
            {field.name: field.default for field in dataclasses.fields(schedulers.GridRule)},
        ),
        Case(
            "schedulers.Scheduler",
            schedulers.Scheduler,
            fields_of(schedulers.from_config({"_class_name": "DDIMScheduler"})),
        ),
        Case("data.ArrayRows", data.ArrayRows, {"columns": {"a": np.zeros(3)}}),
        Case(
            "data.Dataset",
            data.Dataset,
            {"name": "a", "image_shape": (8, 8, 1), "class_names": ("a", "b"), "parts": {}},
        ),
    ]
    recipes = {kind.__name__: kind for kind in (T.AutoencoderRecipe, T.ClassifierRecipe, T.DiffusionRecipe)}
    recipes |= {kind.__name__: kind for kind in (T.MaskedTokensRecipe, T.TextRecipe, T.DiscriminatorRecipe)}
    recipes |= {
        "ControlRecipe": T.ControlRecipe,
        "LoraRecipe": T.LoraRecipe,
        "DynamicRecipe": T.DynamicRecipe,
    }
    return [
        *small,
        *(of_fields(f"models.{name}", kind, kind()) for name, kind in configs.items()),
        *(of_fields(f"T.{name}", kind, kind()) for name, kind in recipes.items()),
        of_fields("T.AlignmentRecipe", T.AlignmentRecipe, T.AlignmentRecipe(block=1)),
        of_fields("T.PriorRecipe", T.PriorRecipe, T.PriorRecipe(prompt="a photo of a dog")),
        of_fields("T.WordRecipe", T.WordRecipe, T.WordRecipe(word="<cat>", initial="cat")),
        of_fields("T.FinetuneRecipe", T.FinetuneRecipe, T.FinetuneRecipe(source="sd")),
        of_fields(
            "T.FewStepsRecipe",
            T.FewStepsRecipe,
            T.FewStepsRecipe(method="progressive", teacher="runs/a", guidance_scale=(1.0, 3.0)),
        ),
        of_fields("T.Recipe", T.Recipe, T.RECIPES["smoke"]),
    ]


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, by name."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def of_fields(name: str, kind: Any, value: Any) -> Case:
    """The case of a dataclass: whatever its own checks compare is named, which may be another field."""
    fields = fields_of(value)
    any_field = "|".join([*fields, *(field.replace("_", " ") for field in fields), TOGETHER])
    return Case(name, kind, fields, words=dict.fromkeys(fields, any_field))


TOGETHER = (
    "pixels|sizes|heads|channels|groups|levels|blocks|layers|patch|width|block type|activation|wide|tokens|"
    "codebook"
)
