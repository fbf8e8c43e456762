"""Whether a folder of pictures still has the files that a run began with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxldm.data.load import described_source
from jaxldm.errors import DataError


def check_same_files(run: Path, began_with: Mapping[str, Any] | None, source: str) -> None:
    """Raise `DataError` when a folder of pictures has other files than a run began with, by name or size.

    The order of the pictures, and which are held out, depends on all of them. `began_with` is what
    config.json says of them: None in a run of an older version, and where the data is no folder.
    """
    now = described_source(source) if began_with else {}
    if not began_with or not now or now == began_with:  # a folder that is gone is refused when it is read
        return
    before, more = began_with["number"], now["number"] - began_with["number"]
    what = f"{abs(more)} {'more' if more > 0 else 'fewer'}" if more else "files of other names or sizes"
    raise DataError(
        f"{run} began with the {before} files of {source}, which has {what} now, so that other pictures "
        "would be held out: put them back as they were, or start a new run in another folder"
    )
