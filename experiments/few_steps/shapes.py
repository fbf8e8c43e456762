"""Students of a model of captions, scored by what they draw: shape, colour, size, place and background.

Question: which student of the captioned shapes draws what its prompt asks for, in 1, 2, 4 and 8 steps?
Command:  python -m experiments.few_steps.shapes --run-dir runs/captioned-shapes
Needs:    a finished run of the recipe captioned-shapes, no accelerator. Minutes and what came out: README.md
          in this folder. A second call goes on where the first one stopped; --quick trains a few updates
          of each, to see that everything runs.

Guidance of one scale is inside the students, which ask their network once a step; `ect` has none inside, and
is guided as the teacher is, at two evaluations.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.captioned_shapes.score import draw
from experiments.few_steps.digits import Student, changed
from experiments.figures import quick_options
from experiments.results import Results, markdown, save_table
from experiments.trained import load_run, weights_hash
from jaxldm import host, pipelines, training
from jaxldm.commands.terminal import run_script
from jaxldm.data import shapes
from jaxldm.errors import one_of

TEACHER_STEPS = (1, 2, 4, 8, 20, 50)
SHORT = {"warmup_epochs": 0.1, "sample_every": 0, "save_every": 1}
STUDENTS = {
    "lcm": Student("lcm", options={"epochs": 1}),
    "lcm, adapter": Student(
        "lcm", options={"epochs": 1, "lora": training.LoraRecipe(rank=16), "learning_rate": 1e-3}
    ),
    "cd": Student("cd", options={"epochs": 1}),
    "ect": Student("ect", options={"epochs": 1}),
    "dmd, 4 steps": Student("dmd", options={"epochs": 1, "num_steps": 4}),
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Train students of a model of captions, draw pairs seen and held out in few steps, and read them."""

    run_dir: Path = Path("runs/captioned-shapes")
    """The teacher: a finished run of the recipe captioned-shapes."""
    output_dir: Path = Path("runs/few-steps-shapes")
    """Where students and table go."""
    students: tuple[str, ...] = ("lcm", "lcm, adapter", "ect", "dmd, 4 steps")
    """Rows of the table, of all in this file."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Steps that students are drawn in, where they can."""
    guidance_scale: float = 2.0
    """Inside the students, and of the teacher, which is best at it."""
    per_pair: int = 10
    """Pictures of each of 24 seen and 12 held-out pairs."""
    quick: bool = False
    """Eight epochs of 64 pictures each, one picture of a pair: only to see that everything runs."""


def recipe_of(options: Shapes, name: str) -> training.Recipe:
    """The recipe of a student."""
    student = STUDENTS[one_of("student", name, STUDENTS)]
    own: dict[str, Any] = {**SHORT, **student.options}
    if student.method != "ect":
        own["guidance_scale"] = options.guidance_scale
    recipe = training.distill_recipe(options.run_dir, str(student.method), **own)
    if not options.quick:
        return recipe
    return dataclasses.replace(changed(recipe, epochs=8), max_train_images=64)


def train_student(options: Shapes, name: str) -> tuple[Path, float]:
    """(run folder, seconds of its training), trained as far as it is not."""
    folder = options.output_dir / "students" / name.replace(", ", "-").replace(" ", "-")
    run = training.train(recipe_of(options, name), folder, resume=folder.exists())
    return folder, float(training.read_log(run.stage("diffusion").log)["seconds"][-1])


def measure(options: Shapes, pipe: Any, steps: int) -> dict[str, float]:
    """Figures of a number of steps."""
    few, scale = pipe.few_steps, options.guidance_scale
    figures: dict[str, float] = {
        "steps": steps,
        "evaluations": steps * (1 if few is not None and few.guidance == "inside" else 2),
    }
    per_pair = 1 if options.quick else options.per_pair
    start = time.perf_counter()
    for kind, pairs in (("seen", shapes.SEEN), ("held out", sorted(shapes.HELD_OUT))):
        _, found = draw(pipe, pairs, per_pair, scale, steps)
        figures |= {f"{kind}, {name}": found[name] for name in ("shape and colour", "all")}
    return figures | {"sampling seconds": time.perf_counter() - start}


COLUMNS = (
    ("student", "name", ""),
    ("steps", "steps", "d"),
    ("evaluations", "evaluations", "d"),
    ("shape and colour, seen", "seen, shape and colour", ".1%"),
    ("held out", "held out, shape and colour", ".1%"),
    ("all five, seen", "seen, all", ".1%"),
    ("held out", "held out, all", ".1%"),
    ("training, s", "training seconds", ".0f"),
)


def save(options: Shapes, rows: list[Mapping[str, Any]]) -> None:
    """The table so far."""
    body = [[format(row[key], form) for _, key, form in COLUMNS] for row in rows]
    title = f"Students of the captioned shapes, guidance {options.guidance_scale:g}"
    save_table(options.output_dir / "shapes.md", title, markdown([head for head, _, _ in COLUMNS], body))


def main(options: Shapes) -> None:
    """Trains, measures and writes the table."""
    host.prepare()
    options = quick_options(options)
    load_run(options.run_dir, "captioned-shapes")
    results, rows = Results(options.output_dir), []
    common = {"teacher": weights_hash(options.run_dir), "per_pair": options.per_pair, "quick": options.quick}
    for name in ("teacher", *options.students):
        folder, seconds = (options.run_dir, 0.0) if name == "teacher" else train_student(options, name)
        pipe = pipelines.load(folder)
        only = None if pipe.few_steps is None else pipe.few_steps.only_steps
        every = TEACHER_STEPS if pipe.few_steps is None else options.steps
        for steps in every if only is None else only:
            settings = common | {"steps": steps, "w": options.guidance_scale}
            figures, _ = results.row(
                f"{name}, {steps} steps",
                settings,
                lambda: (measure(options, pipe, steps), {}),  # noqa: B023
            )
            rows.append({"name": name, "training seconds": seconds, **figures})
            shares = ", ".join(f"{figures[f'{kind}, shape and colour']:.1%}" for kind in ("seen", "held out"))
            print(f"{name}, {steps} steps: {shares}", flush=True)
        save(options, rows)


if __name__ == "__main__":
    run_script(main, Shapes)
