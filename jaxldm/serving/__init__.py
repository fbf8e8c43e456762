"""A server of images: many requests share the steps of one network.

`slots` is the arithmetic, `engine` says which image is in which slot, `jobs` makes rows of a pipeline's call.
`alone` draws a call by itself, `admission` says who may wait and who is next. A `worker` is the thread of an
engine, mostly in one of `processes`; the `service` gives it orders and starts it again, and `application` is
what speaks HTTP.

Each name is imported when it is first touched: a process that only starts a worker needs none of them.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxldm.serving.admission import Limits
    from jaxldm.serving.alone import as_served
    from jaxldm.serving.embeddings import Embeddings
    from jaxldm.serving.engine import Drawn, Engine, Seen
    from jaxldm.serving.jobs import Job, prepare, sharing

_WHERE = {"Limits": "admission", "as_served": "alone", "Embeddings": "embeddings"}
_WHERE |= dict.fromkeys(("Drawn", "Engine", "Seen"), "engine") | dict.fromkeys(
    ("Job", "prepare", "sharing"), "jobs"
)
__all__ = ["Drawn", "Embeddings", "Engine", "Job", "Limits", "Seen", "as_served", "prepare", "sharing"]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f"jaxldm.serving.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'jaxldm.serving' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
