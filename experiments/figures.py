"""How the experiments write their figures: tables, numbers and pictures of one measurement together."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxldm.files import finish_interrupted, write_atomically, write_together


def save_results(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Writes the files of one measurement, all of them or none; the folder is made where needed."""
    encoded = {
        name: content.encode() if isinstance(content, str) else content for name, content in contents.items()
    }
    write_together(folder, encoded, contents.__contains__)


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
