"""The training loop. Every side effect of training happens here: files, the screen, signals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from jaxldm.checkpoints.training_store import TrainingStore
from jaxldm.errors import CheckpointError, DivergenceError, InvalidArgumentError
from jaxldm.files import storage_errors
from jaxldm.training.interruption import StopRequest
from jaxldm.training.log import CsvLog
from jaxldm.training.mesh import batch_sharding, make_mesh, replicated
from jaxldm.training.plots import plot_log_or_report
from jaxldm.training.progress import Progress
from jaxldm.training.state import TrainState
from jaxldm.training.step import TrainStep, compile_train_step


class Batches(Protocol):
    """`batches[step]`: the batch of update `step`, the same whenever asked; `len(...)`: steps per epoch."""

    def __getitem__(self, step: int) -> dict[str, Any]: ...
    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """When the loop does what, in updates; 0 is never. `keep` is the number of checkpoints that stay."""

    num_steps: int
    save_every: int = 0
    sample_every: int = 0
    keep: int = 2

    def __post_init__(self):
        if self.num_steps < 1:
            raise InvalidArgumentError(f"num_steps must be at least 1, not {self.num_steps}")
        if self.save_every < 0 or self.sample_every < 0 or self.keep < 1:
            raise InvalidArgumentError("save_every and sample_every must be 0 or more, keep 1 or more")


def _resume(
    state: TrainState, store: TrainingStore, resume: bool, log: CsvLog, say: Callable[[str], None]
) -> tuple[TrainState, int, float]:
    """State, updates done and seconds spent, from the newest whole checkpoint where there is one."""
    if not resume and (store.steps() or log.path.exists()):
        raise CheckpointError(
            f"{log.path.parent} already holds a run: type --resume (resume=True) to go on with it, "
            "or choose another folder to start a new one"
        )
    restored = store.restore_latest(state, say) if resume else None
    if restored is None:
        return state, 0, log.keep_until(0)
    say(f"resuming from the checkpoint of step {restored.step}")
    return restored.state, restored.step, log.keep_until(restored.step)


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
    say: Callable[[str], None] = tqdm.write,
    bar: bool | None = None,
) -> TrainState:
    """Runs `train_step` (pure, not yet compiled) until `plan.num_steps` updates are done.

    Returns the last state, and writes into `run_dir`: `log.csv`, `checkpoints/<step>`, and at the end
    `loss.png` and `grad_norm.png`. `resume` goes on from the newest whole checkpoint there: the losses are,
    bit for bit, those of a run that was never interrupted, because batch n depends only on n, and the random
    numbers of update n only on the key and n. `on_sample(state, step)` is called every `plan.sample_every`
    updates, and at the end. `state` is given away to the first step, which takes its memory: go on with the
    one returned.

    Ctrl-C ends the step, saves, says how to resume and raises `KeyboardInterrupt`. A loss or gradient that is
    not finite raises `DivergenceError` with the words of `explain_divergence(step, metrics)`; the last good
    checkpoint stays. Raises `CheckpointError` for a folder that holds a run (without `resume`) or another
    model's (with it), `StorageError` for a full disk.
    """
    run_dir = Path(run_dir)
    mesh = make_mesh() if mesh is None else mesh
    log = CsvLog(run_dir / "log.csv")
    with storage_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    with TrainingStore(run_dir / "checkpoints", plan.keep) as store, StopRequest() as stop:
        state, start, seconds = _resume(state, store, resume, log, say)
        store.check_space(state)
        progress = Progress(
            log,
            name=name,
            start=start,
            num_steps=plan.num_steps,
            steps_per_epoch=len(batches),
            seconds=seconds,
            say=say,
            bar=bar,
        )
        loop = _Loop(plan, store, progress, stop, explain_divergence, on_sample, run_dir, say)
        try:
            state = jax.device_put(state, replicated(mesh))
            state = loop.run(
                state, compile_train_step(train_step, mesh), batches, batch_sharding(mesh), start
            )
        finally:
            progress.close()
    plot_log_or_report(log.path, say)
    return state


@dataclasses.dataclass
class _Loop:
    plan: Plan
    store: TrainingStore
    progress: Progress
    stop: StopRequest
    explain_divergence: Callable[[int, dict[str, Any]], str] | None
    on_sample: Callable[[TrainState, int], None] | None
    run_dir: Path
    say: Callable[[str], None]

    def run(
        self, state: TrainState, train_step: TrainStep, batches: Batches, sharding, start: int
    ) -> TrainState:
        last = self.plan.num_steps
        for step in range(start + 1, last + 1):
            batch = jax.device_put(batches[step - 1], sharding)
            state, metrics = train_step(state, batch)
            self.progress.push(step, metrics)
            saved = bool(self.progress.diverged) or step == last or _due(step, self.plan.save_every)
            if saved:
                self.save(step, state)
            last_sample = step == last and self.plan.sample_every > 0
            if self.on_sample is not None and (last_sample or _due(step, self.plan.sample_every)):
                with storage_errors(self.run_dir):
                    self.on_sample(state, step)
            if self.stop:
                if not saved:
                    self.save(step, state)
                self.end_early(step)
        return state

    def save(self, step: int, state: TrainState) -> None:
        """Saves when every loss so far is known to be finite; the rows reach the disk before the state."""
        self.progress.drain()
        if self.progress.diverged:
            self.end_diverged()
        self.store.save(step, state)

    def end_early(self, step: int) -> None:
        self.store.wait()
        plot_log_or_report(self.run_dir / "log.csv", self.say)
        message = (
            f"stopped after step {step} of {self.plan.num_steps} and saved in {self.run_dir}: "
            "to go on, type the same command with --resume"
        )
        self.say(message)
        self.stop.stop(message)

    def end_diverged(self) -> None:
        self.store.wait()
        plot_log_or_report(self.run_dir / "log.csv", self.say)
        step, metrics = self.progress.diverged
        why = f": {self.explain_divergence(step, metrics)}" if self.explain_divergence else ""
        kept = self.store.steps()
        place = (
            f"the checkpoint of step {kept[-1]} in {self.store.folder} is the last good one"
            if kept
            else "there is no checkpoint before it"
        )
        raise DivergenceError(
            f"{self.progress.name}: the loss was {float(metrics['loss'])} and the gradient norm "
            f"{float(metrics['grad_norm'])} at step {step}{why}; {place}"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
