"""`jaxldm distill`: a student that draws in few steps, from a trained model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional

from jaxldm.commands import hints
from jaxldm.commands.hosts import SeveralHosts
from jaxldm.commands.options import batch_size, devices_or_mesh, named_values, shown
from jaxldm.commands.train import given
from jaxldm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from jaxldm.training import LoraRecipe, Recipe

_METHOD = "the method's"


@dataclass(frozen=True)
class Distill(SeveralHosts):
    """Train a student that draws in few steps, from a trained model, its teacher.

    For example:
      jaxldm distill runs/mini-ldm --method lcm --run-dir runs/mini-lcm
      jaxldm sample runs/mini-lcm --num-inference-steps 1 --output-dir OUT
      jaxldm distill runs/mini-ldm --method progressive --num-steps 2 --run-dir runs/two-steps
      jaxldm distill runs/captions --method lcm --rank 8 --run-dir runs/lcm-lora

    Methods:
      progressive  the steps are halved in rounds: a student for exactly --num-steps (4)
      guidance     guidance in one evaluation a step, at any scale of --guidance-scale (1 7.5); as many steps
      lcm          latent consistency, for 1 to 8 steps
      cd           consistency distillation, for 1 to 8 steps
      ect          easy consistency tuning, without asking the teacher; guidance as usual
      scm          continuous-time consistency, for 1 to 8 steps
      reflow       straight trajectories, for 1 to 8 steps
      dmd          distribution matching: a student for exactly --num-steps (4)

    OUT is a run folder as of `jaxldm train`: sample, eval, export, info and inspect read it. What it needs of
    its teacher (autoencoder, classifier, latents) is copied. With --rank an adapter of the teacher (LoRA) is
    trained in place of its network, and OUT has its file besides.
    """

    teacher: Annotated[Positional[str], shown("RUN")]
    """Run folder of the teacher, or the folder made by `jaxldm export` (then with --dataset)."""

    method: Annotated[str | None, shown("NAME")] = None
    """progressive, guidance, lcm, cd, ect, scm, reflow or dmd."""

    run_dir: Annotated[str | None, shown("OUT", "RUN-METHOD")] = None
    """Folder for the student: a new one."""

    resume: bool = False
    """Continue from the last checkpoint in OUT."""

    num_steps: Annotated[int | None, shown("INT", "4")] = None
    """Steps of the student, for progressive and dmd; the others are not made for one number."""

    guidance_scale: Annotated[tuple[float, ...] | None, shown("FLOAT ...", "the teacher's")] = None
    """The scale of guidance that comes inside; or the lowest and the highest, which the student then takes as
    an input.
    """

    options: Annotated[tuple[str, ...] | None, shown("NAME=VALUE ...", _METHOD)] = None
    """Numbers of the method, as in `--options start_steps=32`."""

    rank: Annotated[int | None, shown("INT", "none: the whole network")] = None
    """Train an adapter (LoRA) whose change of each layer has this rank: of lcm, cd, ect, scm and reflow."""

    alpha: Annotated[float | None, shown("FLOAT", "the rank")] = None
    """Of the adapter: the change is multiplied with alpha / rank."""

    targets: Annotated[tuple[str, ...] | None, shown("PATTERN ...", "all projections of attention")] = None
    """Of the adapter: the layers that it changes, by patterns of their paths, as in '*/to_q' '*/to_v'."""

    epochs: Annotated[int | None, shown("INT", _METHOD)] = None
    """Epochs over the training images."""

    batch_size: Annotated[int | Literal["auto"] | None, shown("INT|auto", "the teacher's")] = None
    """Images per step; auto: as many as fit into memory."""

    learning_rate: Annotated[float | None, shown("FLOAT", _METHOD)] = None
    """Highest learning rate, after the warm-up."""

    save_every: Annotated[int | None, shown("INT", "the teacher's")] = None
    """Epochs between checkpoints."""

    dataset: Annotated[str | None, shown("NAME|FOLDER", "the teacher's")] = None
    """Another data set: a TFDS name, or a folder of your own pictures."""

    seed: Annotated[int | None, shown("INT", "the teacher's")] = None
    """Seed of all random numbers, from 0 to 4294967295."""

    devices: Annotated[int | None, shown("INT", "as many as divide every batch")] = None
    """Number of devices over which each batch is split."""

    mesh: Annotated[str | None, shown("AXIS=INT,...", "all devices along data")] = None
    """Split the batch over data and fsdp, the state over fsdp and tensor, as in data=2,fsdp=4."""

    workers: int = 0
    """Processes that read and decode pictures that do not fit into memory; 0: a thread."""

    quiet: bool = False
    """Print only errors, and no progress bar."""

    def run(self) -> None:
        """Checks the teacher, then trains the student."""
        self.join_hosts()
        from jaxldm import training

        run_dir, recipe, where = self.agreed(
            lambda: (self.out(), self.make_recipe(self.out()), devices_or_mesh(self.devices, self.mesh))
        )
        options: dict[str, Any] = where | {"resume": self.resume, "workers": self.workers}
        if self.quiet:
            training.train(recipe, run_dir, **options, log=lambda line: None, bar=False)
            return
        run = training.train(recipe, run_dir, **options)
        if not self.speaks():
            return
        print(f"finished: everything is in {run.path}; try")
        print(f"  {hints.sample_run(run.path)}")
        with_teacher = hints.sample_adapter(run.path)
        if with_teacher is not None:
            print(f"  {with_teacher}")

    def out(self) -> Path:
        """The student's folder. Raises `InvalidArgumentError` where that is the teacher's own."""
        if self.run_dir is None and self.method is None:
            raise InvalidArgumentError("--method is missing: give one, as in --method lcm")
        run_dir = Path(self.run_dir or f"{self.teacher.rstrip('/')}-{self.method}")
        if run_dir.resolve() == Path(self.teacher).resolve():
            raise InvalidArgumentError(f"--run-dir {run_dir} is the teacher's own folder: give a new one")
        return run_dir

    def make_recipe(self, run_dir: Path) -> Recipe:
        """The student's recipe; with --resume that of its run, with the changes of the options."""
        from jaxldm import training
        from jaxldm.data import source_name
        from jaxldm.training.few_steps.methods import taught
        from jaxldm.training.few_steps.teachers import check_there

        of_run = training.recipe_to_resume(run_dir) if self.resume else None
        few = None if of_run is None or of_run.diffusion is None else of_run.diffusion.few_steps
        method = self.method or (None if few is None else few.method)
        if method is None:
            raise InvalidArgumentError("--method is missing: give one, as in --method lcm")
        known = taught(method)
        if few is not None and method != few.method:
            raise InvalidArgumentError(
                f"{run_dir} holds a run of the method {few.method}, not of {method}: leave --method out to "
                "go on with it, or give another --run-dir"
            )
        if self.options and not known.numbers:
            raise InvalidArgumentError(f"the method {method} has no numbers: leave --options out")
        numbers = named_values(self.options, "options", list(known.numbers))
        changes = {name: getattr(self, name) for name in ("epochs", "learning_rate", "save_every")}
        changes["batch_size"] = batch_size(self.batch_size)
        changes = {name: value for name, value in changes.items() if value is not None}
        asked = {"num_steps": self.num_steps, "guidance_scale": self._scales(), "numbers": numbers or None}
        asked["lora"] = self._adapter(None if few is None else few.lora)
        if of_run is not None and few is not None:
            same = few.teacher is not None and Path(few.teacher).resolve() == Path(self.teacher).resolve()
            if few.teacher is not None and not same:
                check_there(few.teacher)
            changed = {**asked, "teacher": few.teacher if same else self.teacher}
            few = given(few, **changed | {"numbers": {**few.numbers, **numbers} if numbers else None})
            student = given(of_run.diffusion, few_steps=few, **changes)
            data = None if self.dataset is None else source_name(self.dataset)
            return given(of_run, diffusion=student, seed=self.seed, data=data)
        return training.distill_recipe(
            self.teacher, method, **asked, dataset=self.dataset, seed=self.seed, **changes
        )

    def _adapter(self, of_run: LoraRecipe | None) -> LoraRecipe | None:
        """What --rank, --alpha and --targets say, with --resume on top of what the run has."""
        from jaxldm.training import LoraRecipe

        given = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return None
        if of_run is None and self.rank is None:
            raise InvalidArgumentError(f"--{next(iter(given))} is of an adapter: give its --rank, such as 8")
        return LoraRecipe(**given) if of_run is None else dataclasses.replace(of_run, **given)

    def _scales(self) -> tuple[float, float] | None:
        scales = self.guidance_scale
        if scales is None:
            return None
        if len(scales) not in (1, 2):
            raise InvalidArgumentError(
                f"--guidance-scale takes one scale, or the lowest and the highest, got {len(scales)}"
            )
        return scales[0], scales[-1]
