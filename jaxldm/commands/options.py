"""How options look in `--help`."""

from __future__ import annotations

from typing import Any

import tyro


def shown(metavar: str, default: str | None = None) -> Any:
    """An option whose value is called `metavar`, and whose default is told in words."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else None)
