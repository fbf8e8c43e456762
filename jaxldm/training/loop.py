"""The training loop. Every side effect of training happens here: files, the screen, signals."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from jaxldm.arguments import (
    a_path,
    a_tree,
    check_fields,
    checked,
    count,
    flag,
    function,
    instance,
    optional,
    refuse,
    text,
)
from jaxldm.errors import CheckpointError, DivergenceError, InvalidArgumentError
from jaxldm.files import storage_errors
from jaxldm.functions import NamedFields
from jaxldm.metrics.health import MOST_SKIPPED_SHARE
from jaxldm.training.hold import HeldFolder
from jaxldm.training.interruption import StopRequest, agreed_stop
from jaxldm.training.log import CsvLog
from jaxldm.training.mesh import (
    A_MESH,
    check_every_process,
    fastest_mesh,
    make_mesh,
    place_batch,
    place_state,
    splits,
    state_shardings,
)
from jaxldm.training.peak import seconds_at_peak
from jaxldm.training.plots import plot_log_or_report
from jaxldm.training.progress import MOST_SKIPPED, Progress
from jaxldm.training.state import A_STATE, TrainState
from jaxldm.training.step import TrainStep, compile_train_step
from jaxldm.training.store import TrainingStore


@runtime_checkable
class Batches(Protocol):
    """`batches[step]`: the batch of update `step`, always the same; `len(...)`: steps per epoch."""

    def __getitem__(self, step: int) -> dict[str, Any]: ...
    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Plan(NamedFields):
    """When the loop does what, in updates; 0 is never.

    Attributes:
        num_steps: of the whole training.
        save_every: a checkpoint, and one at the end.
        sample_every: `on_sample`, likewise.
        keep: checkpoints that stay.
        save_frozen: False: checkpoints lack `state.frozen`, which whoever resumes gives again: the weights of
            a published model under an adapter are large, and lie on the disk already.
    """

    num_steps: int
    save_every: int = 0
    sample_every: int = 0
    keep: int = 2
    save_frozen: bool = True

    def __post_init__(self):
        counts = {"save_every": count(0), "sample_every": count(0), "keep": count(1)}
        check_fields(self, num_steps=count(1), save_frozen=flag, **counts)

    def saved(self, state: TrainState) -> TrainState:
        """What a checkpoint holds of a state."""
        return state if self.save_frozen else state.replace(frozen=None)


A_PLAN = instance(Plan, "a training.Plan(num_steps)")


def SOME_BATCHES(name: str, value: Any) -> Any:
    """What `Batches` describes."""
    if isinstance(value, (str, dict)) or not (hasattr(value, "__getitem__") and hasattr(value, "__len__")):
        raise refuse(name, "a sequence of batches, batches[step] and len(batches)", value)
    if isinstance(value, type) or not len(value):
        raise refuse(name, "a sequence of at least one batch", value)
    return value


def _resume(
    state: TrainState,
    store: TrainingStore,
    resume: bool,
    rows: CsvLog,
    log: Callable[[str], None],
    plan: Plan,
    mesh: Mesh,
) -> tuple[TrainState, int, float]:
    """State, updates done and seconds spent, from the newest whole checkpoint where there is one."""
    if not resume and (store.steps() or rows.path.exists()):
        raise CheckpointError(
            f"{rows.path.parent} already holds a run: give resume=True to go on with it, or choose "
            "another folder to start a new one"
        )
    kept = plan.saved(state)
    restored = store.restore_latest(kept, log, state_shardings(mesh, kept)) if resume else None
    if restored is None:
        return state, 0, rows.keep_until(0, log)
    log(f"resuming from the checkpoint of step {restored.step}")
    if splits(mesh):  # two states may be more than the devices hold
        for leaf in jax.tree.leaves(kept):
            if isinstance(leaf, jax.Array):
                leaf.delete()
    found = restored.state if plan.save_frozen else restored.state.replace(frozen=state.frozen)
    return found, restored.step, rows.keep_until(restored.step, log)


@checked(
    state=A_STATE,
    train_step=function("(state, batch) -> (state, metrics)"),
    batches=SOME_BATCHES,
    plan=A_PLAN,
    run_dir=a_path,
    resume=flag,
    mesh=optional(A_MESH),
    name=text,
    on_sample=optional(function("(state, step)")),
    explain_divergence=optional(function("(step, metrics) -> text")),
    log=function("(line)"),
    bar=optional(flag),
)
def fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Batches,
    plan: Plan,
    run_dir: Path | str,
    *,
    resume: bool = False,
    mesh: Mesh | None = None,
    name: str = "training",
    on_sample: Callable[[TrainState, int], None] | None = None,
    explain_divergence: Callable[[int, dict[str, Any]], str] | None = None,
    log: Callable[[str], None] = tqdm.write,
    bar: bool | None = None,
) -> TrainState:
    """Run `train_step` until `plan.num_steps` updates are done, and return the last state.

    A resumed run has, bit for bit, the losses of one that was never interrupted, because batch n depends only
    on n, and the random numbers of update n only on the key and n. Ctrl-C ends the step, saves, says how to
    resume and raises `KeyboardInterrupt`.

    Args:
        state: donated to the first step, which reuses its memory: go on with the one returned.
        train_step: pure, not yet compiled; see `make_train_step`.
        batches: the data; where several processes train together, each one's part of every batch (see
            `local_examples`). The first of them writes checkpoints and log.csv, the n-th log.n.csv.
        plan: number of updates, when to save and to sample, and what of the state.
        run_dir: receives `log.csv` and the same for TensorBoard, `checkpoints/<step>` and at the end
            `loss.png` and `grad_norm.png`.
        resume: go on from the newest whole checkpoint in `run_dir`, on this mesh or another.
        mesh: where the state and the batch live (see `jaxldm.training.mesh`); None: all devices along `data`,
            but the first alone where it is one of a processor and the network has no convolutions.
        name: of the training, in messages.
        on_sample: `on_sample(state, step)`, called in every process, every `plan.sample_every` updates
            and at the end.
        explain_divergence: `explain_divergence(step, metrics)`, the words for a loss that is not finite.
        log: takes each line of text.
        bar: a progress bar; None: where the output is a screen.

    Raises:
        DivergenceError: the losses or gradients of ten updates in a row were not finite, or those of the last
            updates. (Fewer are skipped: see `make_train_step`.) None of them is saved, so that the last good
            checkpoint stays.
        CheckpointError: a folder that holds a run (without `resume`) or another model's (with it), or that
            another process trains in; it was moved, removed or replaced meanwhile.
        StorageError: the disk is full.
        InvalidArgumentError: a mesh over whose fsdp or tensor axis nothing of the state can be split.
    """
    if isinstance(batches, (list, tuple)) and len(batches) < plan.num_steps:
        raise InvalidArgumentError(
            f"batches are {len(batches)}, and the plan has {plan.num_steps} updates: give one for each, or "
            "data.Batches, which begin again"
        )
    run_dir = Path(run_dir)
    mesh = fastest_mesh(make_mesh(), state.params, state.frozen) if mesh is None else mesh
    check_every_process(mesh)
    state_shardings(mesh, state)  # refuses a mesh that splits nothing
    number = jax.process_index()
    rows = CsvLog(run_dir / (f"log.{number}.csv" if number else "log.csv"), events=not number)
    if number:  # the first process speaks for all
        log, bar = say_nothing, False
    with (
        HeldFolder(run_dir, log) as held,
        TrainingStore(run_dir / "checkpoints", plan.keep, lambda: held.lost() is None) as store,
        StopRequest() as stop,
    ):
        state, start, seconds = _resume(state, store, resume, rows, log, plan, mesh)
        if start > plan.num_steps:
            raise CheckpointError(
                f"{run_dir} has a checkpoint of step {start}, and this training ends at step "
                f"{plan.num_steps}: give the number of epochs or steps that it was begun with"
            )
        store.check_space(plan.saved(state))
        counts = {"start": start, "num_steps": plan.num_steps, "steps_per_epoch": len(batches)}
        progress = Progress(rows, name=name, **counts, seconds=seconds, log=log, bar=bar)
        loop = _Loop(plan, store, progress, stop, explain_divergence, on_sample, held, log)
        with contextlib.closing(progress):
            step, state = compile_train_step(train_step, mesh), place_state(mesh, state)
            state = loop.run(state, step, batches, mesh, start)
        loop.end(state)
        loop.plot()
    return state


def say_nothing(line: str) -> None:
    """A log that nobody reads."""


@dataclasses.dataclass
class _Loop:
    plan: Plan
    store: TrainingStore
    progress: Progress
    stop: StopRequest
    explain_divergence: Callable[[int, dict[str, Any]], str] | None
    on_sample: Callable[[TrainState, int], None] | None
    held: HeldFolder
    log: Callable[[str], None]
    due: bool = False  # a checkpoint, which waits for an update that is not skipped

    @property
    def run_dir(self) -> Path:
        return self.held.path

    def run(
        self, state: TrainState, train_step: TrainStep, batches: Batches, mesh: Mesh, start: int
    ) -> TrainState:
        last = self.plan.num_steps
        if start > 0 and self.sample_is_due(start):
            self.sample(start, state)  # a kill may have come between the checkpoint and this
        for step in range(start + 1, last + 1):
            began, idle = time.perf_counter(), self.progress.idle()
            batch = place_batch(mesh, a_tree(f"batches[{step - 1}]", batches[step - 1]))
            waiting, examples = time.perf_counter() - began, _examples(batch)
            if not (idle or self.progress.idle()):  # the device was busy all the time
                waiting = 0.0
            if step == start + 1:
                self.log(f"{self.progress.name}: compiling the training step")
                self.progress.at_peak = seconds_at_peak(train_step, state, batch, mesh)
            state, metrics = train_step(state, batch)
            self.progress.push(step, metrics, waiting=waiting, examples=examples)
            self.due |= bool(self.progress.diverged) or step == last or _due(step, self.plan.save_every)
            if self.due or self.stop or self.sample_is_due(step):
                self.check_place(step, state)
            saved = self.due and self.save(step, state)
            self.due &= not saved
            if self.sample_is_due(step):
                self.sample(step, state)
            if agreed_stop(self.stop, step, last):
                self.end_early(step, saved or self.save(step, state))
        return state

    def plot(self) -> None:
        """The curves of the log."""
        if jax.process_index() == 0:
            plot_log_or_report(self.run_dir / "log.csv", self.log)

    def sample_is_due(self, step: int) -> bool:
        """Every `sample_every` updates, and at the end."""
        every = self.plan.sample_every
        return self.on_sample is not None and (
            _due(step, every) or (step == self.plan.num_steps and every > 0)
        )

    def sample(self, step: int, state: TrainState) -> None:
        """Call `on_sample`."""
        with storage_errors(self.run_dir):
            cast(Any, self.on_sample)(state, step)

    def check_place(self, step: int, state: TrainState) -> None:
        """Save elsewhere, and raise `CheckpointError`, when the run folder is not where it was."""
        lost = self.held.lost()
        if lost is None:
            return
        with contextlib.suppress(Exception):  # it has nowhere to write to, which is said below
            self.store.wait()
        with storage_errors(lost.place):
            lost.place.mkdir(parents=True, exist_ok=True)
        self.progress.write_to(lost.place / "log.csv")
        self.progress.drain()
        if self.progress.diverged:
            self.end_diverged()
        with TrainingStore(lost.place / "checkpoints", self.plan.keep) as store:
            store.save(step, self.plan.saved(state))
        raise CheckpointError(
            f"{self.run_dir} {lost.what} during the training: the state of step {step} is saved in "
            f"{lost.place}; to go on, type the same command with --resume and --run-dir {lost.place.parent}"
        )

    def end(self, state: TrainState) -> None:
        """Wait for the last save, and see that it is where it should be."""
        try:
            self.store.wait()
        except Exception:
            if self.held.lost() is None:
                raise
        self.check_place(self.plan.num_steps, state)

    def save(self, step: int, state: TrainState) -> bool:
        """Save, when the numbers so far are known; the rows reach the disk before the state.

        Not while the newest updates were skipped, which may be because the state is spoilt: it would take the
        place of a good one. False then. At the end that is an error, but for a single one of many updates.
        """
        self.progress.drain()
        if self.progress.diverged:
            self.end_diverged()
        skipped, last = self.progress.skipped_in_a_row, self.plan.num_steps
        if skipped and step < last:
            return False
        if skipped > 1 or skipped > MOST_SKIPPED_SHARE * last:
            of_step, metrics = cast(Any, self.progress.newest_skipped)
            raise self.divergence(
                of_step,
                metrics,
                f"the losses or gradients of the last {skipped} of {last} updates were not finite",
            )
        self.store.save(step, self.plan.saved(state))
        return True

    def end_early(self, step: int, saved: bool) -> None:
        self.store.wait()
        self.plot()
        kept = self.store.steps()
        newest = f"the newest checkpoint is of step {kept[-1]}" if kept else "there is no checkpoint"
        done = "saved" if saved else f"not saved, as the newest updates were skipped ({newest}),"
        message = (
            f"stopped after step {step} of {self.plan.num_steps} and {done} in {self.run_dir}: "
            "to go on, type the same command with --resume"
        )
        self.log(message)
        self.stop.stop(message)

    def end_diverged(self) -> None:
        step, metrics = cast(Any, self.progress.diverged)
        many = f", and {MOST_SKIPPED} updates in a row were skipped" if "skipped" in metrics else ""
        raise self.divergence(
            step,
            metrics,
            f"the loss was {float(metrics['loss'])} and the gradient norm {float(metrics['grad_norm'])} at "
            f"step {step}{many}",
        )

    def divergence(self, step: int, metrics: dict[str, Any], what: str) -> DivergenceError:
        """The error, when what was saved is on disk; what to do is at its end."""
        self.store.wait()
        self.plot()
        kept = self.store.steps()
        newest = (
            f"the newest checkpoint, of step {kept[-1]} in {self.store.folder}," if kept else "no checkpoint"
        )
        why = f"; {self.explain_divergence(step, metrics)}" if self.explain_divergence else ""
        return DivergenceError(f"{self.progress.name}: {what}; {newest} was saved before that{why}")


def _examples(batch: Any) -> int:
    """How many examples a batch has, in all processes."""
    return next((len(leaf) for leaf in jax.tree.leaves(batch) if leaf.ndim), 0)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
