"""A whole run: every stage of a recipe, in order, skipping what is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray
from tqdm import tqdm

from jaxldm import checkpoints, data, models
from jaxldm.arguments import a_path, checked, count, flag, function, instance, optional, several, text
from jaxldm.data import ArrayRows, Batches, BucketedBatches, Reader
from jaxldm.data.buckets import buckets_of
from jaxldm.errors import CheckpointError, DataError, DivergenceError, InvalidArgumentError, one_of
from jaxldm.files import write_atomically
from jaxldm.training.autoencoder import TASK as AUTOENCODER_TASK
from jaxldm.training.batch_size import (
    find_batch_size,
    read_batch_size,
    smallest_batch,
    with_some_size,
    write_batch_size,
)
from jaxldm.training.beginning import begin_on
from jaxldm.training.classifier import TASK as CLASSIFIER_TASK
from jaxldm.training.comes_back import check_comes_back
from jaxldm.training.diffusion import TASK as DIFFUSION_TASK
from jaxldm.training.few_steps.job import TASK as FEW_STEPS_TASK
from jaxldm.training.few_steps.teachers import bring_parts
from jaxldm.training.finetuning import TASK as FINETUNE_TASK
from jaxldm.training.fitting_batches import check_batches, training_images, with_fitting_batches
from jaxldm.training.freezing import freeze, merge
from jaxldm.training.hold import HeldFolder
from jaxldm.training.loop import Plan, fit, say_nothing
from jaxldm.training.masked_tokens import TASK as MASKED_TOKENS_TASK
from jaxldm.training.mesh import (
    A_MESH,
    check_every_process,
    fastest_mesh,
    local_examples,
    make_mesh,
    on_host,
    own_split,
)
from jaxldm.training.processes import by_first, first_then_others, is_first, together
from jaxldm.training.recipes import Recipe
from jaxldm.training.report import bring_up_to_date, reported
from jaxldm.training.runs import STAGES, RunFolder, begin_stage, check_run_folder, open_run
from jaxldm.training.stage_recipe import AUTO
from jaxldm.training.stages import (
    Context,
    Job,
    Task,
    check_state_fits,
    make_optimizer,
    of_one_shape,
    stage_keys,
)
from jaxldm.training.state import TrainState, create_train_state
from jaxldm.training.step import LossFunction, TrainStep, make_train_step
from jaxldm.training.store import TrainingStore
from jaxldm.training.text import check_captions_of

SKIPPED_FILE = "skipped-pictures.jsonl"  # of a folder of pictures, in the run folder


TASKS = {
    "autoencoder": AUTOENCODER_TASK,
    "diffusion": DIFFUSION_TASK,
    "masked_tokens": MASKED_TOKENS_TASK,
    "finetune": FINETUNE_TASK,
    "classifier": CLASSIFIER_TASK,
}


def task_of(recipe: Recipe, stage: str) -> Task:
    """What a stage of a recipe trains: a denoising network of few steps has a task of its own."""
    few = stage == "diffusion" and cast(Any, recipe.diffusion).few_steps is not None
    return FEW_STEPS_TASK if few else TASKS[stage]


A_RECIPE = instance(Recipe, "a recipe such as training.RECIPES['smoke']")
A_DATASET = instance(data.Dataset, "a dataset from data.load(name)")


@checked(recipe=A_RECIPE, dataset=A_DATASET, mesh=A_MESH)
def check_recipe(recipe: Recipe, dataset: data.Dataset, mesh: Mesh) -> None:
    """Build every network and optimizer of a recipe, without computing anything.

    Raises:
        UnknownNameError, InvalidArgumentError: for whatever would fail later, before anything is written.
    """
    if recipe.text is not None and dataset.captions("train", 1) is None:
        raise DataError(
            f"the recipe {recipe.name} is trained on captions, and {dataset.name} has none: put a .txt file "
            "next to each picture, or take a recipe of classes such as mini-ldm"
        )
    for stage in stages_of(recipe):
        task = task_of(recipe, stage)
        module = task.build(recipe, dataset.image_shape, dataset.num_classes)
        if task.check is not None:
            task.check(recipe, dataset, mesh)
        elif stage == recipe.generator:
            check_state_fits(getattr(recipe, stage), module, mesh)
    for stage in stages_of(recipe):
        own = with_some_size(getattr(recipe, stage), mesh)
        check_batches(recipe, dataset, stage, own.batch_size)
        make_optimizer(own, training_images(recipe, dataset), mesh)


def check_all(recipe: Recipe, dataset: data.Dataset, mesh: Mesh) -> None:
    """`check_recipe`, and the captions of a recipe of texts."""
    check_recipe(recipe, dataset, mesh)
    if recipe.text is not None:
        texts = dataset.captions("train", recipe.max_train_images)
        check_captions_of(recipe.text, cast(list[str], texts))


@checked(recipe=A_RECIPE)
def stages_of(recipe: Recipe) -> list[str]:
    """The stages that a recipe has, in order: the classifier last, unless another stage's loss needs it."""
    stages = [stage for stage in STAGES if getattr(recipe, stage) is not None]
    return sorted(stages, key=lambda stage: stage != "classifier") if recipe.classifier_first else stages


def max_devices(recipe: Recipe) -> int:
    """The largest number of this machine's devices over which every batch of a recipe can be split."""
    stages = [getattr(recipe, stage) for stage in stages_of(recipe)]
    sizes = [stage.batch_size // stage.accumulate for stage in stages]
    return next(n for n in range(jax.device_count(), 0, -1) if all(size % n == 0 for size in sizes))


def _report_skipped(run: RunFolder, dataset: data.Dataset, log: Callable[[str], None]) -> None:
    """Count the pictures of a folder that are not used, and list them in the run folder."""
    if not dataset.skipped:
        return
    path = run.path / SKIPPED_FILE
    write_atomically(path, data.describe_skipped(dataset.skipped).encode())
    used = sum(len(dataset.rows(split)) for split in dataset.splits)
    log(f"{len(dataset.skipped)} of {len(dataset.skipped) + used} pictures are not used: {path} says why")


class _Parts(NamedTuple):
    """`frozen` of a state whose network is partly frozen: the rest of it, and what else the loss looks at."""

    params: Any
    other: Any


def _of_whole_network(loss_fn: LossFunction) -> LossFunction:
    """The loss, given the parameters that move, of the whole network."""

    def whole(params, state, batch, key):
        held = state.frozen
        return loss_fn(merge(params, held.params), state.replace(frozen=held.other), batch, key)

    return whole


def in_rounds(step: TrainStep, job: Job, num_steps: int) -> TrainStep:
    """The step that, behind the last of a round, hands the state to the next one."""
    following, length = job.next_round, num_steps // job.rounds
    if following is None or job.rounds == 1:
        return step

    def train_step(state, batch):
        state, metrics = step(state, batch)
        ends = (state.step % length == 0) & (state.step < job.rounds * length)
        return jax.tree.map(
            lambda new, old: jnp.where(ends, new, old) if new is not old else old, following(state), state
        ), metrics

    return train_step


def batches_of(
    rows: Any, batch_size: int, key: PRNGKeyArray, part: slice | None = None
) -> tuple[Batches | BucketedBatches, bool]:
    """The batches of a stage, each of one bucket where there are buckets; whether all is in memory."""
    own = buckets_of(rows)
    if own is not None:
        return BucketedBatches(rows, own, batch_size, key, part=part), False
    batches = Batches(rows, batch_size, key, part=part)
    return batches, isinstance(batches.rows, ArrayRows)


class _Training(NamedTuple):
    """What the loop runs for a job: how the state begins (on a mesh), the step, and the plan."""

    begin: Callable[[Mesh | None], TrainState]
    step: TrainStep
    plan: Plan


def training_of(context: Context, stage: str, job: Job, num_examples: int) -> _Training:
    """State, step and plan of a job by the numbers of the stage's recipe; nothing is computed yet."""
    recipe, keys = getattr(context.recipe, stage), stage_keys(context.recipe.seed, stage)
    adam, plan = make_optimizer(recipe, num_examples, context.mesh, job.rounds)
    one_network, power = callable(job.loss), recipe.power_ema
    if job.freeze and not one_network:
        raise InvalidArgumentError("freeze is for one network: leave it out with several players")
    loss: Any = _of_whole_network(cast(LossFunction, job.loss)) if job.freeze else job.loss

    def parts() -> tuple[Any, Any]:
        params = job.init(keys.init)
        if not job.freeze:
            return params, job.frozen
        moving, rest = freeze(params, job.freeze)
        return moving, _Parts(rest, job.frozen)

    def create(key: PRNGKeyArray, params: Any, frozen: Any) -> TrainState:
        moved, ema = adam if one_network else loss, recipe.ema_decay is not None
        return create_train_state(key, params, moved, ema=ema, frozen=frozen, power_ema=power)

    def begin(mesh: Mesh | None) -> TrainState:
        return begin_on(mesh, parts, create, keys.train)

    own: dict[str, Any] = {"optimizer": adam, "ema_decay": recipe.ema_decay} if one_network else {}
    step = make_train_step(loss, **own, accumulate=recipe.accumulate, power_ema=power)
    plan = dataclasses.replace(plan, save_frozen=job.save_frozen)
    return _Training(begin, in_rounds(step, job, plan.num_steps), plan)


def with_batch_size(context: Context, stage: str) -> Context:
    """The context with the batch size that the stage began with, or the largest that fits, if it has none."""
    recipe, folder = getattr(context.recipe, stage), context.run.stage(stage)
    if recipe.batch_size != AUTO:
        return context

    def of(size: int) -> Context:
        sized = dataclasses.replace(recipe, batch_size=size)
        return dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, **{stage: sized}))

    size = read_batch_size(folder)
    if size is None:
        some = of(smallest_batch(recipe, context.mesh))
        job = first_then_others(lambda: task_of(context.recipe, stage).prepare(some))
        rows = of_one_shape(ArrayRows(job.data) if isinstance(job.data, Mapping) else job.data)
        begin, step, _ = training_of(some, stage, job, len(rows))
        log = lambda line: context.log(f"{stage}: {line}")  # noqa: E731
        state, row = jax.eval_shape(functools.partial(begin, None)), rows.take(np.arange(1))
        size = find_batch_size(recipe, step, state, row, len(rows), context.mesh, log)
        by_first(lambda: write_batch_size(folder, size))
    return of(size)


def run_job(context: Context, stage: str, job: Job) -> None:
    """Train what a job says by the numbers of the stage's recipe, and finish it: the one call of `fit`."""
    recipe, keys = getattr(context.recipe, stage), stage_keys(context.recipe.seed, stage)
    part = local_examples(context.mesh, recipe.batch_size)
    batches, in_memory = batches_of(job.data, recipe.batch_size, keys.order, part)
    begin, step, plan = training_of(context, stage, job, len(batches.rows))

    def finished_params(state: TrainState) -> Any:
        found = state.evaluation_params
        return merge(found, state.frozen.params) if job.freeze else found

    def preview(state: TrainState, step: int) -> None:
        params = finished_params(state)
        if own_split(context.mesh) is None:
            params = on_host(params)  # gathered from all
        if is_first():
            cast(Any, job.preview)(params, step)

    why = explain_divergence(context.recipe, stage)
    with Reader(batches, num_workers=context.workers) as reader:
        state = fit(
            begin(context.mesh),
            step,
            batches if in_memory else reader,
            plan,
            context.run.stage(stage).path,
            resume=context.resume,
            mesh=context.mesh,
            name=stage,
            on_sample=None if job.preview is None else preview,
            explain_divergence=lambda step, metrics: why,
            log=context.log,
            bar=context.bar,
        )
    params = on_host(finished_params(state))

    def finish() -> None:
        check_finite(stage, params, why)
        job.finish(params)

    by_first(finish)


def check_finite(stage: str, params: Any, why: str) -> None:
    """Raise `DivergenceError` for weights that no network can be used with."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise DivergenceError(f"{stage}: the weights are not finite after the last update; {why}")


def explain_divergence(recipe: Recipe, stage: str) -> str:
    """Likely cause of numbers that are not finite, and what can be done: a run keeps its own settings."""
    lower = "--learning-rate" if stage == recipe.generator else f"{stage}.learning_rate in the recipe"
    return f"the learning rate is likely too high: start a new run with a lower {lower}"


def _is_unfinished(run: RunFolder, stage: str, log: Callable[[str], None]) -> bool:
    """Whether a stage is not complete, or its network cannot be read and a checkpoint can give it again."""
    folder = run.stage(stage)
    if not folder.complete or stage == "finetune":
        return not folder.complete
    try:
        checkpoints.load(folder.model)
    except CheckpointError as error:
        if not TrainingStore(folder.path / "checkpoints").has_whole():
            raise CheckpointError(
                f"{error}; no checkpoint of the stage {stage} is left to write it again from: copy it back, "
                "or train in another run folder"
            ) from error
        log(f"{error}; it is written again from the newest checkpoint")
        return True
    return False


@checked(
    recipe=A_RECIPE,
    run_dir=a_path,
    resume=flag,
    devices=optional(count(1)),
    dataset=optional(a_path),
    log=function("(line)"),
    bar=optional(flag),
    workers=count(0, 1024),
    mesh=optional(A_MESH),
    keep_batch_size=several(text),
)
def train(
    recipe: Recipe,
    run_dir: Path | str,
    *,
    resume: bool = False,
    devices: int | None = None,
    dataset: Path | str | None = None,
    log: Callable[[str], None] = tqdm.write,
    bar: bool | None = None,
    workers: int = 0,
    mesh: Mesh | None = None,
    keep_batch_size: Sequence[str] = (),
) -> RunFolder:
    """Train all the stages of a recipe in a run folder (see `jaxldm.training.runs`), and return it.

    Args:
        recipe: for example `RECIPES["mini-ldm"]`.
        run_dir: a folder that does not exist yet; with `resume`, that of the run to go on with.
        resume: finished stages are kept, a half-finished one goes on from its newest whole checkpoint; a
            finished network that cannot be read is written again from there.
        devices: split each batch over so many devices; None: as many as divide every batch of the recipe,
            but one of a processor for a network without convolutions, which is faster there.
        dataset: in place of the recipe's: a TFDS name, or the folder of your own pictures (see
            `jaxldm.data.load`), of which those that cannot be used are listed in skipped-pictures.jsonl.
            A stage whose batch is more than its training images takes smaller ones, and the log says so.
        log: takes each line of text.
        bar: a progress bar; None: where the output is a screen.
        workers: processes that read and decode what is not in memory; 0: a thread of this one.
        mesh: in place of `devices`: over which the batch and the state are split, `make_mesh(fsdp=4)`. A run
            goes on on another one, too.
        keep_batch_size: stages, ("diffusion",), whose batch size is refused where `dataset` has fewer images.

    Raises:
        UnknownNameError, InvalidArgumentError, DataError, MissingDependencyError: before anything is written.
        CheckpointError: a run without `resume`, the run of another recipe, a folder that is none, or that
            another process trains in; it was moved, removed or replaced meanwhile (the state is saved where
            it can be, and the message says where).
        StorageError: the disk is full; what was saved stays.
        DivergenceError: the losses or gradients of ten updates in a row, or of the last ones, were not
            finite, or the weights, or no sample was. What was saved before stays.
        KeyboardInterrupt: Ctrl-C, after everything was saved.

    Several processes, on hosts that share a disk, train one run when each calls this, after
    `jax.distributed.initialize()`: each reads its part of every batch, the first writes the run folder.

    >>> from jaxldm import training                                                  # doctest: +SKIP
    >>> run = training.train(training.RECIPES["mini-ldm"], "runs/mini-ldm")          # doctest: +SKIP
    """
    if mesh is not None and devices is not None:
        raise InvalidArgumentError("a mesh has its own devices: leave devices out, or the mesh")
    if not is_first():  # the first process speaks for all
        log, bar = say_nothing, False
    if dataset is not None:
        recipe = dataclasses.replace(recipe, data=data.source_name(dataset))
        for stage in keep_batch_size:
            one_of("stage", stage, stages_of(recipe))
    whole = jax.process_count() > 1  # each process has a part of every batch
    if mesh is None and (whole or devices is not None):
        mesh = make_mesh(devices)
    if mesh is not None:
        check_every_process(mesh)

    def fitting_data() -> tuple[Recipe, data.Dataset]:
        check_comes_back(recipe)
        if dataset is None or not resume:
            check_run_folder(run_dir, recipe, resume=resume)
        loaded = recipe.load_data()
        if dataset is None:
            return recipe, loaded
        shares = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        fitted = with_fitting_batches(recipe, loaded, shares, keep_batch_size, log)
        check_run_folder(run_dir, fitted, resume=resume)
        return fitted, loaded

    recipe, loaded = first_then_others(fitting_data)  # on one disk two would prepare a data set at a time
    chosen = mesh is not None
    mesh = make_mesh(max_devices(recipe)) if mesh is None else mesh
    first_then_others(lambda: check_all(recipe, loaded, mesh))
    with contextlib.ExitStack() as stack:
        held = together(lambda: stack.enter_context(HeldFolder(run_dir, log)))
        run = first_then_others(
            lambda: open_run(run_dir, recipe, loaded, resume=resume or not is_first(), log=log)
        )
        _train_stages(Context(recipe, loaded, run, mesh, resume, log, bar, workers), held, chosen)
    return run


def on_fastest_mesh(context: Context, stage: str) -> Context:
    """The context with those of its devices on which the network of a stage trains fastest."""
    image_shape, num_classes = context.dataset.image_shape, context.dataset.num_classes
    module = task_of(context.recipe, stage).build(context.recipe, image_shape, num_classes)
    return dataclasses.replace(context, mesh=fastest_mesh(context.mesh, models.shapes(module)))


def _train_stages(context: Context, held: HeldFolder, chosen: bool) -> None:
    """Train the stages of a run that are not complete, on the devices of the context if those were chosen."""
    run, recipe, dataset, log = context.run, context.recipe, context.dataset, context.log

    def begin() -> None:
        _report_skipped(run, dataset, log)
        if dataset.license:
            log(f"the pictures of {dataset.name}: {dataset.license}")
        bring_parts(run, recipe, log)

    by_first(begin)
    unfinished = together(lambda: [name for name in stages_of(recipe) if _is_unfinished(run, name, log)])
    if not unfinished:
        by_first(lambda: bring_up_to_date(run))
        log(f"{run.path} is finished: there is nothing left to train")
    for stage in unfinished:
        by_first(functools.partial(begin_stage, run, stage))
        with reported(run) if is_first() else contextlib.nullcontext():
            placed = context if chosen else on_fastest_mesh(context, stage)
            sized = with_batch_size(placed, stage)
            prepare = functools.partial(task_of(recipe, stage).prepare, sized)
            run_job(sized, stage, first_then_others(prepare))
        held.check()
