"""Run by test_placement.py in a process of its own: how much host memory loading a folder takes.

Prints the largest growth of the resident memory while it loads, and the bytes of the parameters, which on a
CPU are in that memory too.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from jaxldm import checkpoints, models
from jaxldm.checkpoints.safetensors_file import read_safetensors


def resident(key: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def all_at_once(folder: Path) -> tuple[object, dict]:
    """What `load` must not do: the whole state dictionary first, then the parameters."""
    module = models.from_config(models.config_from_dict(checkpoints.read_config(folder)))
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= read_safetensors(file)
    for name in module.constant_tensors():
        del state[name]
    return module, checkpoints.from_state_dict(state, models.shapes(module))


way, folder = sys.argv[1], Path(sys.argv[2])
dtype = sys.argv[3] if len(sys.argv) > 3 else None
module = models.from_config(models.config_from_dict(checkpoints.read_config(folder)))
jax.block_until_ready(
    (models.shapes(module), jax.device_put(np.zeros(9)))
)  # what tracing and JAX itself take
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
before = resident("VmRSS")
if way == "all at once":
    _, params = all_at_once(folder)
else:
    mesh = models.make_mesh(8, fsdp=4, tensor=2) if way == "split" else None
    sharding = mesh and models.sharding_of(mesh)
    _, params = checkpoints.load(folder, dtype=dtype, sharding=sharding)
grown = resident("VmHWM") - before
held = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
print(grown, sum(held))
