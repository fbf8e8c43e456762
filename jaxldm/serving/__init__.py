"""A server of images: many requests share the steps of one network.

`slots` is the arithmetic, `engine` says which image is in which slot, `jobs` makes rows of a pipeline's call.
`alone` draws a call by itself, `admission` says who may wait and who is next. A `worker` is the thread of an
engine, mostly in one of `processes`; the `service` gives it orders and starts it again, and `application` is
what speaks HTTP.
"""

from jaxldm.serving.admission import Limits
from jaxldm.serving.alone import as_served
from jaxldm.serving.embeddings import Embeddings
from jaxldm.serving.engine import Drawn, Engine, Seen
from jaxldm.serving.jobs import Job, prepare, sharing

__all__ = ["Drawn", "Embeddings", "Engine", "Job", "Limits", "Seen", "as_served", "prepare", "sharing"]
