"""Results of an exercise: rows of figures and their arrays, kept as they come: a second call goes on."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxldm.errors import CheckpointError
from jaxldm.files import write_atomically
from jaxldm.reading import reading

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Results:
    """Rows by name in results.json of a folder, and the arrays of each in arrays/NAME.npz."""

    folder: Path

    @property
    def path(self) -> Path:
        """The file of the rows."""
        return self.folder / "results.json"

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows so far: settings and figures. Raises `CheckpointError` for a damaged file."""
        if not self.path.exists():
            return {}
        with reading(self.path, CheckpointError):
            return json.loads(self.path.read_text(encoding="utf-8"))

    def row(
        self, name: str, settings: Mapping[str, Any], make: Callable[[], tuple[dict[str, Any], Arrays]]
    ) -> tuple[dict[str, Any], Arrays]:
        """Figures and arrays of a row: `make()`, unless it was made with these settings before."""
        settings = json.loads(json.dumps(settings))
        arrays_file = self.folder / "arrays" / f"{re.sub(r'[^a-zA-Z0-9.]+', '-', name)}.npz"
        known = self.rows().get(name)
        if known is not None and known["settings"] == settings and arrays_file.exists():
            with np.load(arrays_file, allow_pickle=False) as arrays:
                return known["figures"], dict(arrays)
        figures, arrays = make()
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        arrays_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arrays_file, content.getvalue())
        rows = self.rows() | {name: {"settings": settings, "figures": figures}}
        write_atomically(self.path, (json.dumps(rows, indent=1) + "\n").encode())
        return figures, arrays


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def save_table(path: Path, title: str, text: str) -> None:
    """Prints a table, and writes it under its title as Markdown."""
    print("\n" + text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"# {title}\n\n{text}".encode())
