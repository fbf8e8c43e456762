"""Every method of few steps from one teacher, in one table.

Question: which student of the demo's model draws best in 1, 2, 4 and 8 steps, and what did it cost?
Command:  python -m experiments.few_steps.digits --run-dir runs/mini-ldm
Needs:    a finished run folder (make demo), the `demo` extra; two CPU cores, no accelerator. Minutes and
          what came out: README.md in this folder. A second call goes on where the first one stopped; --quick
          trains a few updates of each, to see that everything runs.

Students take the guidance scale as an input, 1 to 4, so that one of each method answers at w = 1 and w = 3;
ect, shortcut and ict are guided as any model, at two evaluations a step, and drifting cannot be guided. Those
without a teacher begin from nothing, and have five epochs here: their recipes have eighteen.
Digits are measured by the run's classifier, and by a second one of another kind, trained on other digits.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.few_steps import judge
from experiments.figures import quick_options
from experiments.results import Results, markdown, save_table
from experiments.trained import check_demo, load_classifier, load_dataset, weights_hash
from jaxldm import diffusion as D
from jaxldm import few_steps, host, metrics, pipelines, training
from jaxldm.commands.terminal import run_script

RANGE = (1.0, 4.0)
TEACHER_STEPS = (1, 2, 4, 8, 20, 50)
STRAIGHTNESS_STEPS = 50
FOLLOWS_AN_ODE = ("teacher", "guidance", "reflow")  # of which a straightness can be said


class Student(NamedTuple):
    """A row of the table.

    Attributes:
        method: of `jaxldm distill`, or None for a recipe of its own.
        recipe: the name of that.
        options: of `training.distill_recipe`.
    """

    method: str | None = None
    recipe: str | None = None
    options: Mapping[str, Any] = {}


GUIDED = {"guidance_scale": RANGE}
SOON = GUIDED | {"epochs": 6}  # in place of eight, so that all of it takes half an hour
STUDENTS = {
    "guidance": Student("guidance", options=GUIDED),
    "progressive, 4 steps": Student("progressive", options=GUIDED | {"num_steps": 4}),
    "progressive, 1 step": Student("progressive", options=GUIDED | {"num_steps": 1}),
    "lcm": Student("lcm", options=SOON),
    "cd": Student("cd", options=SOON),
    "ect": Student("ect"),
    "scm": Student("scm", options=SOON),
    "reflow": Student("reflow", options=GUIDED | {"numbers": {"pairs": 8_000}}),
    "dmd, 4 steps": Student("dmd", options=GUIDED | {"num_steps": 4, "epochs": 5}),
    "dmd, 1 step": Student("dmd", options=GUIDED | {"num_steps": 1, "epochs": 5}),
    "mean flow": Student(recipe="mini-mean-flow"),
    "improved mean flow": Student(recipe="mini-improved-mean-flow"),
    "shortcut": Student(recipe="mini-shortcut"),
    "ict": Student(recipe="mini-ict"),
    "drifting": Student(recipe="mini-drifting"),
}


@dataclasses.dataclass(frozen=True)
class Digits:
    """Train a student by each method, draw digits in few steps, and measure them."""

    run_dir: Path = Path("runs/mini-ldm")
    """The teacher: a finished run of the demo."""
    output_dir: Path = Path("runs/few-steps-digits")
    """Where students, table and pictures go."""
    students: tuple[str, ...] = tuple(STUDENTS)
    """Rows of the table."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Steps that students are drawn in, where they can."""
    guidance_scales: tuple[float, ...] = (1.0, 3.0)
    """Of teacher and students."""
    epochs: int = 5
    """Of the students that begin from nothing; 18 are those of their recipes."""
    num_images: int = 500
    """Digits of each row; the real test set has 500."""
    quick: bool = False
    """Eight epochs of 64 digits each: only to see that everything runs."""
    seed: int = 0


def recipe_of(options: Digits, name: str) -> training.Recipe:
    """The recipe of a student."""
    student = STUDENTS[name]
    if student.method is None:
        recipe = training.RECIPES[str(student.recipe)]
        recipe = changed(recipe, epochs=options.epochs)
        few = dataclasses.replace(recipe.diffusion.few_steps, teacher=None)
        if few.guidance_scale is not None:
            few = dataclasses.replace(few, guidance_scale=RANGE)
            overrides = {"scalar_inputs": ("guidance_scale", "step_size")}
            recipe = changed(recipe, few_steps=few, overrides=overrides)
    else:
        recipe = training.distill_recipe(options.run_dir, student.method, **student.options)
    recipe = changed(recipe, sample_every=0)  # what a student draws is measured behind its training
    if not options.quick:
        return recipe
    recipe = changed(recipe, epochs=8)  # updates for rounds of halving, and for a critic
    return dataclasses.replace(recipe, max_train_images=64)


def changed(recipe: training.Recipe, **changes: Any) -> training.Recipe:
    """The recipe with other fields of its denoising network."""
    return dataclasses.replace(recipe, diffusion=dataclasses.replace(recipe.diffusion, **changes))


def train_student(options: Digits, name: str) -> tuple[Path, float]:
    """(run folder, seconds of its training), trained as far as it is not."""
    folder = options.output_dir / "students" / name.replace(", ", "-").replace(" ", "-")
    recipe = recipe_of(options, name)
    if recipe.diffusion.few_steps.teacher is None:
        bring_teachers_parts(options.run_dir, folder, recipe)
    run = training.train(recipe, folder, resume=folder.exists())
    return folder, float(training.read_log(run.stage("diffusion").log)["seconds"][-1])


def bring_teachers_parts(run_dir: Path, folder: Path, recipe: training.Recipe) -> None:
    """The teacher's autoencoder and classifier, so that all rows are of the same latents and classifier."""
    from jaxldm.training.few_steps.teachers import copy_parts
    from jaxldm.training.runs import open_run

    if not folder.exists():
        run = open_run(folder, recipe, recipe.load_data(), resume=False)
        copy_parts(run, recipe, run_dir, print)


class Measured(NamedTuple):
    """What the digits of all rows are measured with."""

    dataset: Any
    classify: Any
    judge: Callable[[Any], Any]


def measure(options: Digits, tools: Measured, pipe: Any, steps: int, scale: float) -> tuple[dict, dict]:
    """(figures, arrays) of a number of steps and a guidance scale."""
    labels = np.arange(options.num_images, dtype=np.int32) % pipe.num_classes
    call = {"num_inference_steps": steps, "guidance_scale": scale}
    pipe.warm_up(labels, **call)
    start = time.perf_counter()
    images = pipe(jax.random.key(options.seed), labels, **call)
    seconds = time.perf_counter() - start
    report = metrics.evaluate(images, labels, tools.classify, tools.dataset)
    few = pipe.few_steps
    twice = scale != 1 and (few is None or few.guidance == "outside")
    figures = {
        "steps": steps,
        "w": scale,
        "evaluations": steps * (1 + twice),
        "accuracy": report.accuracy,
        "second judge": float(np.mean(tools.judge(images) == labels)),
        "distance": report.frechet_ratio,
        "diversity": report.feature_diversity,
        "sampling seconds": seconds,
    }
    return figures, {"images": images[:40]}


def straightness(options: Digits, pipe: Any, scale: float) -> float:
    """How far the ODE's trajectories of fifty digits are from straight lines, in 50 steps: 0 is straight.

    Divided by alpha + sigma, a row of any path becomes one of straight lines: what is on a line is there
    (1 - s) x_0 + s noise, with s = sigma / (alpha + sigma).
    """
    labels, kept = np.arange(min(50, options.num_images), dtype=np.int32) % pipe.num_classes, []
    call = {"num_inference_steps": STRAIGHTNESS_STEPS, "guidance_scale": scale}
    _, grid = pipe.grid(**call)
    rows = slice(0, int(D.steps_in(grid)) + 1)
    sums = np.asarray(grid.alpha[rows] + grid.sigma[rows])
    x_T = np.asarray(D.initial_noise(jax.random.key(options.seed), (len(labels), *pipe.latent_shape()), grid))
    one = {"devices": jax.devices()[:1], "output": "latents"}
    pipe(
        jax.random.key(0),
        labels,
        latents=x_T,
        on_step=lambda _, x: kept.append(np.asarray(x)),
        **call,
        **one,
    )
    by_batch = np.stack(kept).reshape(-1, len(sums) - 1, *kept[0].shape)  # one batch after another
    steps = np.concatenate(list(by_batch), axis=1)[:, : len(labels)]
    trajectory = np.concatenate([x_T[None], steps]) / sums.reshape(-1, *[1] * x_T.ndim)
    return float(few_steps.straightness(trajectory, np.asarray(grid.sigma[rows]) / sums))


def main(options: Digits) -> None:
    """Trains, measures and writes the table."""
    host.prepare()
    options = quick_options(options)
    check_demo(options.run_dir)
    dataset = load_dataset(options.run_dir)
    tools = Measured(dataset, load_classifier(options.run_dir), judge.second_judge(dataset))
    print(f"second classifier: {judge.known(tools.judge, dataset):.1%} of the real training digits")
    results, common = Results(options.output_dir), {"teacher": weights_hash(options.run_dir)}
    common |= {"second judge": judge.TRAINED_ON}
    common |= {"num_images": options.num_images, "seed": options.seed, "quick": options.quick}
    rows, shown, straight = [], {}, []
    for name in ("teacher", *options.students):
        folder, seconds = (options.run_dir, 0.0) if name == "teacher" else train_student(options, name)
        pipe = pipelines.load(folder)
        for scale in options.guidance_scales:
            if scale not in (1, pipe.default_guidance_scale) and is_inside(pipe):
                continue
            for steps in steps_of(options, pipe):
                title = f"{name}, {steps} steps, w {scale:g}"
                settings = common | {"steps": steps, "w": scale}
                figures, arrays = results.row(
                    title,
                    settings,
                    lambda: measure(options, tools, pipe, steps, scale),  # noqa: B023
                )
                rows.append({"name": name, "training seconds": seconds, **figures})
                shown[name, steps, scale] = arrays["images"]
                print(f"{title}: {figures['accuracy']:.1%}, distance {figures['distance']:.2f}")
            if name in FOLLOWS_AN_ODE:
                figures, _ = results.row(
                    f"straightness of {name}, w {scale:g}",
                    common,
                    lambda: ({"straightness": straightness(options, pipe, scale)}, {}),  # noqa: B023
                )
                straight.append([name, f"{scale:g}", f"{figures['straightness']:.4f}"])
        save(options, rows, shown)
        title = f"Straightness of trajectories in {STRAIGHTNESS_STEPS} steps, 0 is straight"
        text = markdown(["student", "w", "mean square of the bend"], straight)
        save_table(options.output_dir / "straightness.md", title, text)


def is_inside(pipe: Any) -> bool:
    """Whether a student has one guidance scale, that of its training."""
    return pipe.few_steps is not None and pipe.few_steps.guidance == "inside"


def steps_of(options: Digits, pipe: Any) -> tuple[int, ...]:
    """The numbers of steps in which a model is drawn."""
    if pipe.few_steps is None:
        return TEACHER_STEPS
    steps = options.steps if pipe.few_steps.method != "guidance" else (*options.steps, 20)
    return tuple(n for n in steps if pipe.few_steps.only_steps is None or n in pipe.few_steps.only_steps)


COLUMNS = (
    ("student", "name", ""),
    ("w", "w", "g"),
    ("steps", "steps", "d"),
    ("evaluations", "evaluations", "d"),
    ("as requested", "accuracy", ".1%"),
    ("by the second classifier", "second judge", ".1%"),
    ("distance, multiple of the floor", "distance", ".2f"),
    ("diversity", "diversity", ".2f"),
    ("training, s", "training seconds", ".0f"),
    ("sampling, s", "sampling seconds", ".2f"),
)


def save(options: Digits, rows: list[dict[str, Any]], shown: Mapping[Any, Any]) -> None:
    """The table so far, and a picture of one step at the largest scale."""
    body = [[format(row[key], form) for _, key, form in COLUMNS] for row in rows]
    text = markdown([title for title, _, _ in COLUMNS], body)
    title = f"Students of few steps: {options.num_images} digits each"
    save_table(options.output_dir / "digits.md", title, text)
    scale = options.guidance_scales[-1]
    first: dict[str, Any] = {}  # the rows of a student come by their steps
    for (name, _, w), images in shown.items():
        if w == scale:
            first.setdefault(name, images)
    picture = metrics.labelled_grid(
        np.concatenate([images[:10] for images in first.values()]),
        10,
        title=f"In the fewest steps, w = {scale:g}",
        row_labels=list(first),
        scale=1,
    )
    metrics.save_png(options.output_dir / "digits.png", picture)


if __name__ == "__main__":
    run_script(main, Digits)
