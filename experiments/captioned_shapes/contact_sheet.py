"""A picture of 96 captioned shapes.

Question: what do the pictures look like?
Command:  python -m experiments.captioned_shapes.contact_sheet OUT.png
Needs:    the `plots` extra.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import UInt8

from jaxldm.commands.terminal import run_script
from jaxldm.data import shapes
from jaxldm.files import write_atomically


@dataclasses.dataclass(frozen=True)
class ContactSheet:
    """Draw 96 pictures of the training split on one."""

    out: Annotated[Path, tyro.conf.Positional]
    """The PNG file to write."""


def sheet(images: UInt8[np.ndarray, "N H W C"], columns: int) -> bytes:
    """A PNG file of pictures in rows of so many, two pixels apart, in twice their size."""
    from PIL import Image

    tiles = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
    _, height, width, channels = tiles.shape
    rows = tiles.reshape(-1, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(rows.reshape(-1, columns * width, channels))
    content = io.BytesIO()
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(content, "PNG")
    return content.getvalue()


def main(options: ContactSheet) -> None:
    """Write 6 rows of 16 pictures of the training split."""
    numbers = np.arange(96)
    images = shapes.render(1, numbers, shapes.draw_attributes(1, numbers), 32)
    write_atomically(options.out, sheet(images, 16))


if __name__ == "__main__":
    run_script(main, ContactSheet)
