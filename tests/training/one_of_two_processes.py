"""One of two processes, of two devices each, that train the toy together.

python one_of_two_processes.py FOLDER PORT NUMBER
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

ROWS, BATCH, STEPS = 64, 16, 8


class Noted:
    """Examples that note which of them are read."""

    def __init__(self):
        from toy import ToyBatches

        self.columns = {name: getattr(ToyBatches(), name)[:ROWS] for name in ("x", "y")}
        self.seen = []

    def __len__(self):
        return ROWS

    def take(self, rows):
        self.seen.append(np.asarray(rows).tolist())
        return {name: column[rows] for name, column in self.columns.items()}


def train(folder, mesh, resume=False):
    """The examples that this process has read, by step."""
    import jax
    from toy import toy

    from jaxldm import data, training

    rows, part = Noted(), training.local_examples(mesh, BATCH)
    batches = data.Batches(rows, BATCH, jax.random.key(0), part=part)
    state, step = toy(num_steps=STEPS)
    plan = training.Plan(STEPS, save_every=4, sample_every=4)
    drawn = []

    def on_sample(state, step):
        drawn.append(step)

    training.fit(state, step, batches, plan, folder, resume=resume, mesh=mesh, on_sample=on_sample, bar=False)
    assert drawn == [4, 8]
    return rows.seen


def train_recipe(folder, mesh):
    """What a whole run of two stages says."""
    from two_stages import two_stages

    from jaxldm import training

    said = []
    training.train(two_stages(), folder, mesh=mesh, log=said.append, bar=False)
    return said


if __name__ == "__main__":
    folder, port, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
    from jaxldm import training
    from jaxldm.training import processes, store

    store.on_host = None  # no array of a checkpoint is whole on a host
    seen = train(folder / "run", training.make_mesh(fsdp=4))
    processes.by_first(lambda: shutil.rmtree(folder / "run" / "checkpoints" / str(STEPS)))
    train(folder / "run", training.make_mesh(fsdp=2), resume=True)
    said = train_recipe(folder / "recipe", training.make_mesh(fsdp=2))
    (folder / f"seen.{number}.json").write_text(json.dumps({"rows": seen, "said": said}))
