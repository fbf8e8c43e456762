"""The stage of a network of few steps: its loss, its examples, and how it draws."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Shaped

from jaxldm import diffusion as D
from jaxldm import models, schedulers
from jaxldm.data import Dataset, Rows, fingerprint, sharded
from jaxldm.diffusion.grids import step_after
from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.pipelines.few_steps import FewSteps
from jaxldm.schedulers import GridRule
from jaxldm.training.batch_size import with_some_size
from jaxldm.training.diffusion import (
    STAGE,
    Conditioned,
    build_denoiser,
    conditioned,
    decoded_draws,
    denoiser_recipe,
    latent_shape,
)
from jaxldm.training.few_steps.consistency import ORIGINAL_STEPS
from jaxldm.training.few_steps.method import TABLE, TEACHER, Method, Setting, counts_timesteps, named
from jaxldm.training.few_steps.methods import METHODS
from jaxldm.training.few_steps.networks import (
    critic_module,
    critic_network,
    first_params,
    of_adapter,
    save_adapter,
    scale_input_of,
    student_of,
)
from jaxldm.training.few_steps.recipe import FewStepsRecipe
from jaxldm.training.few_steps.reflow import NOISE, SAMPLE, SCALE
from jaxldm.training.few_steps.teachers import (
    begin_as_teacher,
    check_channels,
    check_classes,
    check_student,
)
from jaxldm.training.fitting_batches import training_images
from jaxldm.training.mesh import own_placement
from jaxldm.training.recipes import DiffusionRecipe, Recipe
from jaxldm.training.runs import save_denoiser
from jaxldm.training.stages import (
    Context,
    Job,
    Task,
    check_state_fits,
    make_optimizer,
    report_health,
    save_samples,
    stage_keys,
)
from jaxldm.training.state import Params
from jaxldm.training.step import LossFunction

PAIRS_AT_ONCE = 250


def few_recipe(recipe: DiffusionRecipe) -> FewStepsRecipe:
    """The part that says the method."""
    return cast(FewStepsRecipe, recipe.few_steps)


def build(recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The student's network. Raises what `build_denoiser` raises, and what the method refuses."""
    own = denoiser_recipe(recipe)
    few = few_recipe(own)
    METHODS[few.method].check(own.prediction, few.num_steps, few.numbers)
    module = build_denoiser(recipe, image_shape, num_classes)
    if few.teacher is not None:
        check_student(few, module)
    check_inputs(few, module)
    critic_module(few, module)
    if few.lora is not None:
        models.init_lora(jax.random.key(0), models.shapes(module), few.lora.rank, few.lora.targets)
    method = METHODS[few.method]
    if method.tables is not None and recipe.text is not None:
        raise InvalidArgumentError(
            f"{few.method} is for classes, not for captions: leave the recipe's text out"
        )
    if (method.pairs or method.tables is not None) and recipe.buckets is not None:
        raise InvalidArgumentError(f"{few.method} is for images of one size: leave the recipe's buckets out")
    return module


def check_inputs(few: FewStepsRecipe, module: nn.Module) -> None:
    """Refuse a network without the further inputs of the method."""
    config = cast(Any, module).config
    wanted = METHODS[few.method].inputs + (("guidance_scale",) if few.takes_scale else ())
    given = tuple(getattr(config, "scalar_inputs", ()))
    if getattr(config, "time_cond_proj_dim", None) is not None:
        given += ("guidance_scale",)
    if set(wanted) != set(given):
        raise InvalidArgumentError(
            f"{few.method} needs a network that takes {' and '.join(wanted) or 'no further numbers'}: give "
            f"the recipe's overrides scalar_inputs {list(wanted)}"
        )


def few_steps_of(recipe: DiffusionRecipe) -> FewSteps:
    """How the finished student draws."""
    few = few_recipe(recipe)
    method = METHODS[few.method]
    low, high = few.guidance_scale or (1.0, 1.0)
    guidance = "input" if few.takes_scale else "inside"
    return FewSteps(
        method=few.method,
        solver=method.solver,
        default_steps=few.num_steps or method.default_steps,
        only_steps=None if few.num_steps is None else (few.num_steps,),
        guidance="outside" if method.guidance == "outside" else guidance,
        guidance_scale=(low, high),
        teacher=None if few.teacher is None else Path(few.teacher).name or None,
    )


def scheduler_of(recipe: DiffusionRecipe) -> dict[str, Any]:
    """The entries of the student's scheduler_config.json; of consistency functions LCM's, where it counts."""
    path = recipe.prediction.path
    if few_steps_of(recipe).solver != "lcm" or not counts_timesteps(path):
        return schedulers.to_config(recipe.prediction)
    original = min(ORIGINAL_STEPS, cast(int, path.num_train_timesteps))
    return schedulers.to_config(recipe.prediction, GridRule(spacing="lcm", original_steps=original))


def make_setting(context: Context, module: nn.Module, given: Conditioned, num_examples: int) -> Setting:
    """What the loss of a run is made from."""
    recipe = denoiser_recipe(context.recipe)
    few, path = few_recipe(recipe), recipe.prediction.path
    critic = critic_module(few, module)
    rounds = METHODS[few.method].rounds(few.num_steps, few.numbers)
    make = functools.partial(make_optimizer, recipe, num_examples, context.mesh, rounds)
    return Setting(
        network=models.network(module),
        prediction=recipe.prediction,
        on=given.on,
        num_steps=few.num_steps,
        guidance_scale=few.guidance_scale or (1.0, 1.0),
        scale_input=scale_input_of(module),
        numbers=few.numbers,
        updates=make()[1].num_steps,
        condition_dropout=recipe.condition_dropout,
        optimizer_of=lambda every, share: make(every, share)[0],
        ema_decay=recipe.ema_decay,
        critic=None if critic is None else critic_network(critic, float(path.t_noisy)),
        whole_batch=context.mesh.size == 1,
    )


def make_sampler(context: Context, setting: Setting, shown: Mapping[str, Any]) -> Callable[..., Any]:
    """`draw(params, key)`: pictures of the conditions that are shown, as the finished student draws."""
    recipe = denoiser_recipe(context.recipe)
    few = few_steps_of(recipe)
    scheduler = schedulers.from_config(scheduler_of(recipe), few.solver)
    columns = {name: np.concatenate([value] * recipe.samples_per_class) for name, value in shown.items()}
    number = len(next(iter(columns.values())))
    scale = jnp.full(number, cast(float, few.default_scale), jnp.float32) if few.guidance == "input" else 1.0
    condition = setting.condition(jax.tree.map(jnp.asarray, columns), scale)
    takes_step = "step_size" in METHODS[few.method].inputs
    outside = recipe.sample_guidance_scale if few.guidance == "outside" else 1.0

    grid = scheduler.make_grid(few.default_steps or recipe.sample_steps)

    def denoiser_of(params):
        def network(x, t, condition):
            further = {"step_size": step_after(grid, t)} if takes_step else {}
            return setting.network(params, x, t, {**named(condition), **further} if further else condition)

        null = setting.on.nulls() if few.guidance == "outside" else condition
        return scheduler.sampler.denoiser(D.classifier_free_guidance(network, condition, null, outside))

    return decoded_draws(context, denoiser_of, scheduler.solver, grid, number)


class PairRows(NamedTuple):
    """Pairs of noise and sample, each with the condition of the example that it was drawn for."""

    pairs: Rows
    examples: Rows
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        """The columns of these pairs; `mean` is the sample, which stands for x_0."""
        found = self.examples.take(rows % len(self.examples))
        pair = self.pairs.take(rows)
        return {**{name: found[name] for name in self.names}, **pair, "mean": pair[SAMPLE]}


def draw_pairs(context: Context, setting: Setting, teacher: Params, given: Conditioned) -> PairRows:
    """Noise, and what the guided teacher draws of it; kept in the run folder, in shards."""
    recipe, numbers = denoiser_recipe(context.recipe), setting.numbers
    shape = latent_shape(context.recipe, context.dataset.image_shape)
    grid = D.make_grid(setting.path, numbers["teacher_steps"])
    names = tuple(setting.on.null) if setting.on.column is None else (setting.on.column,)
    key = jax.random.fold_in(stage_keys(context.recipe.seed, STAGE).sample, 1)
    total = numbers["pairs"]

    @jax.jit
    def draw(params, columns, key):
        noise_key, scale_key, own = jax.random.split(key, 3)
        size = len(next(iter(columns.values())))
        batch = {"mean": jnp.zeros((size, *shape)), **columns}
        scale = setting.scales(batch, scale_key)
        noise = jax.random.normal(noise_key, batch["mean"].shape)
        teach = setting.teacher(params, setting.condition(batch, scale), scale)
        sample = D.sample(own, teach, D.solvers.ddim(), grid, noise * grid.sigma[0])
        return {NOISE: noise, SAMPLE: sample, **({} if np.ndim(scale) == 0 else {SCALE: scale})}

    def compute(start: int, stop: int) -> dict[str, Any]:
        context.log(f"{STAGE}: drawing the pairs {start + 1} to {stop} of {total} with the teacher")
        parts = []
        for first in range(start, stop, PAIRS_AT_ONCE):
            rows = np.minimum(np.arange(first, first + PAIRS_AT_ONCE), stop - 1) % len(given.columns)
            found = given.columns.take(rows)
            columns = {name: jnp.asarray(found[name]) for name in names}
            drawn = draw(teacher, columns, jax.random.fold_in(key, first))
            parts.append(jax.tree.map(lambda leaf: np.asarray(leaf)[: stop - first], drawn))  # noqa: B023
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    written = json.dumps({"few": few_recipe(recipe).numbers, "scale": setting.guidance_scale}, default=list)
    mark = fingerprint(teacher, written, context.recipe.data, context.recipe.seed)
    rows = sharded(context.run.path / "pairs", mark, total, compute, rows_per_shard=5000)
    return PairRows(rows, given.columns, names)


def class_table(rows: Rows, per_class: int, num_classes: int) -> Float[np.ndarray, "K M h w c"]:
    """The first `per_class` latents of each class; of a class that has fewer, these again and again.

    Raises:
        DataError: a class without any.
    """
    found: list[list[np.ndarray]] = [[] for _ in range(num_classes)]
    for start in range(0, len(rows), PAIRS_AT_ONCE):
        part = rows.take(np.arange(start, min(start + PAIRS_AT_ONCE, len(rows))))
        for latents, label in zip(part["mean"], part["label"], strict=True):
            if len(found[label]) < per_class:
                found[label].append(latents)
        if all(len(own) == per_class for own in found):
            break
    for label, own in enumerate(found):
        if not own:
            raise DataError(f"there is no training image of class {label}, and drifting needs some of each")
    return np.stack([np.stack(own)[np.arange(per_class) % len(own)] for own in found])


def prepare(context: Context) -> Job:
    """The student of a run: it begins as its teacher, which is frozen next to it."""
    recipe, folder = denoiser_recipe(context.recipe), context.run.stage(STAGE)
    few, few_steps = few_recipe(recipe), few_steps_of(recipe)
    method: Method = METHODS[few.method]
    module = build(context.recipe, context.dataset.image_shape, context.dataset.num_classes)
    given = conditioned(context, module)
    keys = stage_keys(context.recipe.seed, STAGE)
    place = own_placement(context.mesh)
    teacher = None if few.teacher is None else begin_as_teacher(few, module, keys.init, place)
    frozen = None if teacher is None else {TEACHER: teacher}
    columns: Rows = given.columns
    setting = make_setting(context, module, given, len(columns))
    if method.pairs:
        columns = draw_pairs(context, setting, teacher, given)
        setting = make_setting(context, module, given, len(columns))
    loss = method.make_loss(setting)
    if few.lora is not None:
        loss = of_adapter(cast(LossFunction, loss), few.lora)
    if method.tables is not None:
        table = class_table(given.columns, int(few.numbers[method.tables]), module.config.num_classes)
        frozen = {**(frozen or {}), TABLE: table}
    players = None if callable(loss) else [player.name for player in loss]
    draw = make_sampler(context, setting, given.shown)
    drawn: list[np.ndarray] = []

    def init(key: Any) -> Params:
        return first_params(few, module, teacher, players, key, place)

    def preview(params: Params, step: int) -> None:
        drawn[:] = draw(student_of(few, teacher, params), keys.sample)
        save_samples(folder, np.stack(drawn), given.names, step)

    def finish(params: Params) -> None:
        report_health(context, folder, [], drawn)
        scheduler = scheduler_of(recipe)
        if few.lora is not None:
            save_adapter(context.run, few.lora, module, params)
        network = student_of(few, teacher, params)
        save_denoiser(context.run, module, network, scheduler, given.text, few_steps=few_steps)

    rounds = method.rounds(few.num_steps, few.numbers)
    return Job(
        init,
        loss,
        columns,
        finish,
        preview,
        frozen=frozen,
        save_frozen=rounds > 1,  # else it is what the teacher's folder holds
        rounds=rounds,
        next_round=method.next_round,
    )


def check(recipe: Recipe, dataset: Dataset, mesh: Mesh) -> None:
    """Refuse what would fail later, before anything is written or compiled.

    Raises:
        DataError: images of other classes or channels than the teacher's.
        InvalidArgumentError: more than the memory; fewer updates than the method's rounds, or than its critic
            has before the student moves again; fewer pairs than a batch, or examples than a loss has parts.
    """
    own = with_some_size(denoiser_recipe(recipe), mesh)
    few = few_recipe(own)
    check_state_fits(own, build_denoiser(recipe, dataset.image_shape, dataset.num_classes), mesh)
    if few.teacher is not None:
        check_channels(few.teacher, recipe, dataset)
    if few.teacher is not None and recipe.text is None:
        check_classes(few.teacher, dataset)
    examples = training_images(recipe, dataset)
    least, batch = METHODS[few.method].least_batch, own.batch_size // own.accumulate
    if batch < least:
        raise InvalidArgumentError(
            f"a batch of {few.method} must be at least {least} examples, got {batch}: give a larger "
            "--batch-size"
        )
    pairs = cast(int, few.numbers["pairs"]) if METHODS[few.method].pairs else None
    if pairs is not None and pairs < own.batch_size:
        raise InvalidArgumentError(
            f"pairs must be at least one batch, {own.batch_size}, got {pairs}: give more, as in --options "
            f"pairs={max(20_000, own.batch_size)}, or a smaller --batch-size"
        )
    rounds = METHODS[few.method].rounds(few.num_steps, few.numbers)
    _, plan = make_optimizer(own, pairs or examples, mesh, rounds)
    every = few.numbers.get("critic_updates", 1)
    if every > plan.num_steps:
        raise InvalidArgumentError(
            f"critic_updates must be at most the {plan.num_steps} updates of this training, got {every}: the "
            "student moves once in so many; give a smaller one, or more --epochs"
        )


TASK = Task(build, prepare, check)
