"""How the experiments write their figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from jaxldm.files import write_atomically


def save_figure(path: Path, figure: Any, dpi: int = 100) -> None:
    """Writes a figure of matplotlib as PNG: whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
