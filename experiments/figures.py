"""How the experiments write their figures: tables, numbers and pictures of one measurement together."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxldm.files import finish_interrupted, write_atomically, write_together

Options = TypeVar("Options", bound=Any)

# Folders inside of that of the results: what a look wrote, and the rows of a run that goes on or was stopped.
QUICK, UNFINISHED = "quick", "unfinished"


def output_folder(folder: Path, quick: bool) -> Path:
    """Where a run writes: `folder`, or the folder `quick` in it, so that a look replaces no measurement."""
    return folder / QUICK if quick else folder


def quick_options(options: Options, **small: Any) -> Options:
    """The options of a run: as they are, or for a look (`options.quick`) smaller and with files of its own.

    Args:
        options: a dataclass with `quick` and `output_dir`; a look has no pictures for the docs (`image_dir`).
        small: fields that a look changes.
    """
    if not options.quick:
        return options
    small["output_dir"] = output_folder(options.output_dir, True)
    if hasattr(options, "image_dir"):
        small["image_dir"] = None
    return dataclasses.replace(options, **small)


def save_results(folder: Path, contents: Mapping[str, str | bytes], complete: bool = True) -> None:
    """Writes the files of one measurement, all of them or none; the folder is made where needed.

    Rows of a run that is not yet complete go to the folder `unfinished` in it: an earlier result stays until
    all of the new one is there.
    """
    encoded = {
        name: content.encode() if isinstance(content, str) else content for name, content in contents.items()
    }
    unfinished = folder / UNFINISHED
    write_together(folder if complete else unfinished, encoded, contents.__contains__)
    if complete and unfinished.is_dir():
        for name in contents:
            (unfinished / name).unlink(missing_ok=True)
        if not any(unfinished.iterdir()):
            unfinished.rmdir()


def read_result(path: Path) -> str | None:
    """The text of a file that `save_results` wrote, None where there is none."""
    finish_interrupted(path.parent)
    return path.read_text(encoding="utf-8") if path.exists() else None


def figure_png(figure: Any, dpi: int = 100) -> bytes:
    """A figure of matplotlib as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def save_figure(path: Path, figure: Any, dpi: int = 100) -> None:
    """Writes a figure of matplotlib as PNG: whole or not at all."""
    write_atomically(path, figure_png(figure, dpi))
