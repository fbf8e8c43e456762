"""What `exactness.py` trains: a small transformer without random numbers, and one of its processes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import data, models, training

ROWS, BATCH = 256, 64


@functools.cache
def network() -> Any:
    """Two blocks of width 64 on 28x28 pixels."""
    sizes = {"hidden_size": 64, "depth": 2, "num_heads": 4, "patch_size": 7}
    return models.build("tiny-dit", learn_sigma=False, **sizes)


def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
    """The error of a velocity; noise and times are in the batch, so that parts of it are the whole."""
    t = batch["t"].reshape(-1, 1, 1, 1)
    x = (1 - t) * batch["x"] + t * batch["noise"]
    found = models.network(network())(params, x, batch["t"], batch["label"])
    return jnp.mean(jnp.square(found - (batch["noise"] - batch["x"]))), {}


def examples() -> dict[str, np.ndarray]:
    """Pictures of numbers drawn at random, and what each is trained with."""
    numbers = np.random.default_rng(0)
    x, noise = (numbers.normal(size=(ROWS, 28, 28, 1)).astype(np.float32) for _ in range(2))
    label, t = numbers.integers(0, 10, ROWS).astype(np.int32), numbers.uniform(size=ROWS).astype(np.float32)
    return {"x": x, "noise": noise, "t": t, "label": label}


def fit(
    folder: Path, mesh: Any, num_steps: int = 12, accumulate: int = 1, resume: bool = False
) -> list[float]:
    """Train, and return the loss of each update."""
    optimizer = training.optimizer(1e-3, 2, 12, weight_decay=1e-2)
    step = training.make_train_step(loss, optimizer, 0.9, accumulate=accumulate)
    state = training.create_train_state(
        jax.random.key(1), models.init(network(), jax.random.key(0)), optimizer
    )
    part = training.local_examples(mesh, BATCH)
    batches = data.Batches(examples(), BATCH, jax.random.key(2), part=part)
    plan = training.Plan(12, save_every=6)
    training.fit(state, step, batches, plan, folder, mesh=mesh, resume=resume, bar=False)
    return training.read_log(folder / "log.csv")["loss"].tolist()


def two_processes(folder: Path, port: int, number: int) -> None:
    """Number `number` of two processes of two devices each."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
    found = fit(folder / "run", training.make_mesh(fsdp=2))
    if number == 0:
        (folder / "losses.json").write_text(json.dumps(found))
