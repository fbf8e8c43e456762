"""`jaxldm export`: a trained model for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from jaxldm.commands import hints
from jaxldm.commands.options import shown


@dataclass(frozen=True)
class Export:
    """Write a trained model as safetensors and JSON, in the layout of a pipeline of diffusers.

    For example:
      jaxldm export runs/mini-ldm exported/mini-ldm

    The folder then holds model_index.json, vae/ (for a latent model), unet/ or transformer/, and scheduler/;
    `jaxldm sample` and `jaxldm info` read it like a run folder.
    """

    folder: Annotated[Positional[str], shown("RUN")]
    """Run folder made by `jaxldm train`."""

    out: Annotated[Positional[str], shown("OUT")]
    """Folder to write: a new or empty one, or an earlier export, which is replaced."""

    def run(self) -> None:
        """Loads the model, writes it, reads it back and compares."""
        from jaxldm import pipelines
        from jaxldm.errors import StorageError

        pipelines.check_output_folder(self.out)
        pipelines.check_export_folder(self.out)
        pipe = pipelines.load(self.folder)
        pipelines.save(pipe, self.out)
        rows = pipelines.compare(pipe, pipelines.load(self.out))
        changed = [row.name for row in rows if row.difference]
        if changed:
            raise StorageError(
                f"{self.out} does not read back bit for bit, the disk may be failing: {', '.join(changed)}"
            )
        print(f"{len(rows)} tensors written to {self.out}, and read back bit for bit")
        hint = hints.sample(self.out, pipe, prompt=hints.caption_of(self.folder))
        if hint:
            print(f"try it:  {hint}")
