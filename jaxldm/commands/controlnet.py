"""`jaxldm train controlnet`: a ControlNet for a finished model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from jaxldm.commands.finetune import recipe_of, train_further
from jaxldm.commands.hosts import SeveralHosts
from jaxldm.commands.options import shown

if TYPE_CHECKING:
    from jaxldm.training import Recipe

RUN_DIR = "runs/controlnet"


@dataclass(frozen=True)
class Controlnet(SeveralHosts):
    """Train a ControlNet for a finished Stable Diffusion (1, 2 or XL), which stays as it is.

    For example, where SD is the folder of a Stable Diffusion:
      jaxldm train controlnet --from SD --data my-pictures --control-images edges --run-dir runs/edges
      jaxldm sample SD --controlnet runs/edges --control-image edges.png --prompt "a cat"
      jaxldm train controlnet --run-dir runs/edges --resume        (after an interruption)

    Pictures have captions, and each has a picture of edges, depths or poses of the same size, named in its
    line of metadata.jsonl:
      {"file_name": "1.jpg", "conditioning_image": "poses/1.png", "text": "a cat"}
    With --control-images edges these are computed from the pictures. The result is a folder that diffusers
    opens, too.
    """

    source: Annotated[str | None, shown("FOLDER", "with --resume that of the run", name="from")] = None
    """The model to control: a folder in the layout of diffusers, an exported one, or a run folder."""

    data: Annotated[str | None, shown("FOLDER", "with --resume that of the run")] = None
    """Folder of your pictures, or a TFDS name."""

    control_images: Annotated[str | None, shown("NAME", "folder")] = None
    """folder: the pictures that metadata.jsonl or a table names; edges: Sobel's edges of the pictures."""

    caption: Annotated[str | None, shown("TEXT", "their own")] = None
    """One caption for all pictures."""

    run_dir: Annotated[str, shown("FOLDER")] = RUN_DIR
    """Folder for the checkpoints, logs, samples and the result."""

    resume: bool = False
    """Continue from the last checkpoint in the run folder."""

    epochs: Annotated[int | None, shown("INT", "20")] = None
    """How often each picture is seen."""

    batch_size: Annotated[int | Literal["auto"] | None, shown("INT|auto", "1")] = None
    """Pictures in an update; auto: as many as fit into memory."""

    accumulate: Annotated[int | None, shown("INT", "1")] = None
    """Compute each batch in so many parts, one after another, with the memory of one."""

    learning_rate: Annotated[float | None, shown("FLOAT", "1e-5")] = None
    """Highest learning rate, after the warm-up."""

    optimizer: Annotated[str | None, shown("NAME", "adamw")] = None
    """adamw, lion, muon, schedule_free_adamw, or prodigy (at --learning-rate 1 unless given)."""

    condition_dropout: Annotated[float | None, shown("FLOAT", "0.1")] = None
    """Share of the pictures that are trained on without their caption; 0.5 in the paper."""

    dtype: Annotated[str | None, shown("NAME", "float32")] = None
    """float32 or bfloat16, of the computation; parameters are float32."""

    remat: bool = False
    """Compute the inside of the blocks again in the backward pass: less memory, more time."""

    image_size: Annotated[int | None, shown("PIXELS", "the model's")] = None
    """Side to which the central square of each picture is scaled, and that of its control image."""

    save_every: Annotated[int | None, shown("INT", "5")] = None
    """Epochs between checkpoints; 0: only at the end."""

    sample_every: Annotated[int | None, shown("INT", "5")] = None
    """Epochs between pictures of what it draws, below their control images; 0: none."""

    seed: Annotated[int | None, shown("INT", "0")] = None
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
        """Trains, or goes on with a run, and says how to draw with the result."""
        train_further(self)

    def make_recipe(self, run_dir: Path) -> Recipe:
        """The recipe of the options; with --resume and no model, that of the run.

        Raises what `training.finetune_recipe` raises.
        """
        return recipe_of(self, run_dir, "controlnet", _OPTIONS, "controlnet")


_OPTIONS = (
    *("control_images", "caption", "epochs", "batch_size", "accumulate", "learning_rate", "optimizer"),
    *("condition_dropout", "dtype", "remat", "image_size", "save_every", "sample_every", "seed"),
)
