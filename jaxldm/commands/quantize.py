"""`jaxldm quantize`: a trained model in fewer bits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from jaxldm.commands import hints
from jaxldm.commands.options import shown
from jaxldm.commands.terminal import check_seed
from jaxldm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from jaxldm.models import Quantization

CALIBRATION_STEPS = 20
MOST_LABELS = 32  # that a calibration draws


@dataclass(frozen=True)
class Quantize:
    """Write a model with its denoising network in fewer bits.

    For example:
      jaxldm quantize runs/mini-ldm --bits int8 --output-dir mini-ldm-int8
      jaxldm quantize stable-diffusion-v1-5 --bits int4 --rank 32 --output-dir sd-int4
      jaxldm quantize runs/mini-ldm --bits int8 --smooth 0.5 --output-dir mini-ldm-int8

    Bits:
      int8  8-bit whole numbers, a scale for each output channel; activations likewise, a scale for each token
      fp8   8-bit floating point (e4m3), scales as for int8
      int4  4-bit whole numbers in groups, with a low-rank branch in 16 bits; activations as they are

    Blocks are quantised; the first and the last layer, embeddings and modulations keep 16 bits, and the
    autoencoder and text encoders stay as they are. OUT is a folder as of `jaxldm export`: sample, eval, serve
    and info read it, without the full weights in memory.
    """

    folder: Annotated[Positional[str], shown("RUN")]
    """Run folder made by `jaxldm train`, folder made by `jaxldm export`, or a folder in the layout of
    diffusers.
    """

    bits: Annotated[str, shown("NAME")] = "int8"
    """int8, fp8 or int4."""

    output_dir: Annotated[str | None, shown("OUT", "RUN-BITS")] = None
    """Folder to write: a new or empty one, or an earlier export, which is replaced."""

    activations: Annotated[str | None, shown("NAME", "as --bits; of int4 none")] = None
    """Activations in every product: int8, fp8, int4, or none, which leaves them as they are."""

    group_size: Annotated[int | None, shown("INT", "64")] = None
    """Of int4: inputs that share a scale."""

    rank: Annotated[int | None, shown("INT", "0; of int4 16")] = None
    """Rank of the branch in 16 bits that takes the largest part of each weight (SVDQuant); 0: none."""

    smooth: Annotated[float | None, shown("FLOAT", "none")] = None
    """SmoothQuant's alpha, from 0 to 1: how much of the activations' outliers goes into the weights. Draws a
    few images first, to see them.
    """

    modulation: Annotated[str | None, shown("NAME", "bfloat16")] = None
    """Weights of adaptive norms, a third of a DiT: bfloat16, or int8."""

    prompt: Annotated[tuple[str, ...] | None, shown("TEXT ...", "none")] = None
    """Of --smooth, for a model that draws from texts: what to draw."""

    seed: int = 0
    """Of --smooth: seed of the images."""

    def run(self) -> None:
        """Checks the options, quantises, writes, reads back and compares."""
        check_seed(self.seed)
        from jaxldm import models, pipelines
        from jaxldm.errors import StorageError
        from jaxldm.pipelines.folders import family_of

        how, out = self.settings(), self.output_dir or f"{self.folder.rstrip('/')}-{self.bits}"
        if os.path.realpath(out) == os.path.realpath(self.folder):
            raise InvalidArgumentError(f"--output-dir {out} is the model's own folder: give a new one")
        pipelines.check_output_folder(out)
        texts = pipelines.kind_of(self.folder) == "text-to-image"
        pipelines.check_export_folder(out, *([family_of(self.folder)] if texts else []))
        if self.prompt is not None and (not texts or how.smooth is None):
            raise InvalidArgumentError(
                "--prompt is of --smooth, for a model that draws from texts: leave it out"
            )
        if texts and how.smooth is not None and self.prompt is None:
            raise InvalidArgumentError('--smooth needs something to draw: give --prompt "a cat in the snow"')
        pipe = pipelines.load(self.folder)
        small = pipelines.quantize(pipe, how, self.maxima(pipe) if how.smooth is not None else None)
        pipelines.save(small, out)
        rows = pipelines.compare(small, pipelines.load(out))
        changed = [row.name for row in rows if row.difference]
        if changed:
            raise StorageError(
                f"{out} does not read back bit for bit, the disk may be failing: {', '.join(changed)}"
            )
        before, after = (models.param_bytes(each.denoiser.params) for each in (pipe, small))
        print(
            f"{pipe.denoiser_name}: {after / 1e6:.2f} MB instead of {before / 1e6:.2f} MB "
            f"({after / before:.1%}), in {out}"
        )
        hint = hints.sample(out, small, prompt=hints.caption_of(self.folder))
        if hint:
            print(f"try it:  {hint}")

    def settings(self) -> Quantization:
        """How the network is quantised. Raises `JaxldmError` for values that there are not."""
        from jaxldm import models

        names = ("group_size", "rank", "smooth", "modulation", "activations")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("activations") == "none":
            given["activations"] = None
        return models.quantization(self.bits, **given)

    def maxima(self, pipe: Any) -> dict:
        """The largest inputs of all layers in a few images."""
        import jax

        from jaxldm import pipelines

        key, steps = jax.random.key(self.seed), CALIBRATION_STEPS
        if self.prompt is not None:
            return pipelines.calibrate_quantization(pipe, key, list(self.prompt), num_inference_steps=steps)
        labels = pipe.cycle_labels(None, None)
        labels = None if labels is None else labels[:MOST_LABELS]
        return pipelines.calibrate_quantization(pipe, key, labels, num_inference_steps=steps)
