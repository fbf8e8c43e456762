"""`jaxldm prune`: a trained DiT with fewer attention heads and narrower MLPs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from jaxldm.commands import hints
from jaxldm.commands.options import shown
from jaxldm.commands.terminal import check_seed
from jaxldm.errors import InvalidArgumentError


@dataclass(frozen=True)
class Prune:
    """Write a DiT or SiT without its least important attention heads and channels of the MLPs.

    For example:
      jaxldm prune runs/tiny-dit --heads 0.5 --mlp 0.5 --output-dir tiny-dit-half
      jaxldm train finetune --from tiny-dit-half --data mnist5k --method full --epochs 6 \
          --batch-size 16 --learning-rate 1e-3 --run-dir runs/tiny-dit-half

    A head or channel is important where the training loss would change without it: |weight x gradient|, added
    up over its weights and averaged over --timesteps evenly spaced times, on pictures of the data. All blocks
    keep as many, each its own. OUT is a folder as of `jaxldm export`: a smaller model, which draws worse
    until it is trained a little further, as in the second line.
    """

    folder: Annotated[Positional[str], shown("RUN")]
    """Run folder made by `jaxldm train`, or a folder made by `jaxldm export` (then with --data)."""

    heads: float = 0.5
    """Share of the attention heads that stays, above 0 and up to 1."""

    mlp: float = 0.5
    """Share of the channels of the MLPs that stays, likewise."""

    output_dir: Annotated[str | None, shown("OUT", "RUN-pruned")] = None
    """Folder to write: a new or empty one, or an earlier export, which is replaced."""

    data: Annotated[str | None, shown("NAME|FOLDER", "the run's")] = None
    """Pictures to measure the importance on: a TFDS name, or a folder of your own."""

    num_images: int = 256
    """How many pictures of the data, evenly spaced."""

    timesteps: int = 10
    """At how many times."""

    seed: int = 0
    """Seed of the noise."""

    def run(self) -> None:
        """Checks the options, measures, prunes, writes and reads back."""
        check_seed(self.seed)
        import jax

        from jaxldm import models, pipelines
        from jaxldm.errors import StorageError
        from jaxldm.models.pruning import check_can_prune

        self.check()
        out = self.output_dir or f"{self.folder.rstrip('/')}-pruned"
        if os.path.realpath(out) == os.path.realpath(self.folder):
            raise InvalidArgumentError(f"--output-dir {out} is the model's own folder: give a new one")
        pipelines.check_output_folder(out)
        if pipelines.kind_of(self.folder) == "text-to-image":
            raise InvalidArgumentError(f"pruning is for DiT and SiT, and {self.folder} draws from texts")
        pipelines.check_export_folder(out)
        pipe = pipelines.load(self.folder)
        check_can_prune(pipe.denoiser.module, pipe.denoiser.params)
        counts = models.pruning.unit_counts(pipe.denoiser.module)
        ones = models.pruning.Units(*map(_ones, counts))
        models.pruning.mask(ones, heads=self.heads, channels=self.mlp)  # refuses shares that leave none
        images, labels, name = self.pictures(pipe)
        key = jax.random.key(self.seed)
        found = pipelines.unit_importance(pipe, key, images, labels, num_times=self.timesteps)
        keep = models.pruning.mask(found, heads=self.heads, channels=self.mlp)
        small = pipelines.prune(pipe, keep)
        pipelines.save(small, out)
        if any(row.difference for row in pipelines.compare(small, pipelines.load(out))):
            raise StorageError(f"{out} does not read back bit for bit, the disk may be failing")
        config, kept = small.denoiser.config, int(keep.channels[0].sum())
        before, after = (models.count_macs(each.denoiser.module) for each in (pipe, small))
        sizes = [models.count_params(each.denoiser.module) / 1e6 for each in (pipe, small)]
        print(
            f"{config.num_heads} of {counts.heads[1]} heads and {kept} of {counts.channels[1]} channels of "
            f"each block: {sizes[1]:.2f} of {sizes[0]:.2f} million parameters, {after / before:.1%} of the "
            f"multiply-accumulates, in {out}"
        )
        words = ("--from", out, "--data", name, "--method", "full", "--epochs", 6, "--batch-size", 16)
        words += ("--learning-rate", "1e-3", "--run-dir", f"{out}-tuned")
        print(f"train it a little further:  {hints.command('train', 'finetune', *words)}")

    def check(self) -> None:
        """Raises `InvalidArgumentError` for numbers that cannot be, before any model is read."""
        from jaxldm.arguments import count, number

        for name in ("heads", "mlp"):
            number(above=0, high=1)(f"--{name}", getattr(self, name))
        if self.heads == self.mlp == 1:
            raise InvalidArgumentError("--heads 1 and --mlp 1 leave everything: give less of one of them")
        count(1, 1000)("--timesteps", self.timesteps)
        count(1, 2**20)("--num-images", self.num_images)

    def pictures(self, pipe: Any) -> tuple[Any, Any, str]:
        """(images, labels or None, name of the data). Raises `InvalidArgumentError` for other sizes."""
        import numpy as np

        from jaxldm import data, pipelines, training

        shape = pipe.image_shape()
        if self.data is not None:
            dataset = data.load(self.data, image_size=shape[0], hold_out=False)
        elif pipelines.kind_of(self.folder) == "run":
            dataset = training.read_data(Path(self.folder))
        else:
            raise InvalidArgumentError(
                f"{self.folder} does not say what it was trained on: give --data, a TFDS name or a folder"
            )
        if tuple(dataset.image_shape) != tuple(shape):
            raise InvalidArgumentError(
                f"{dataset.name} has images of {list(dataset.image_shape)}, the model draws {list(shape)}"
            )
        rows = dataset.rows("train")
        places = np.unique(np.linspace(0, len(rows) - 1, self.num_images).round().astype(int))
        columns = rows.take(places)
        has_classes = pipe.num_classes == dataset.num_classes
        return columns["image"], np.asarray(columns["label"]) if has_classes else None, dataset.name


def _ones(shape: tuple[int, int]) -> Any:
    import numpy as np

    return np.ones(shape)
