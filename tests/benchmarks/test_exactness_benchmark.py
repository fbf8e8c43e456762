import jax
import numpy as np

from experiments.benchmarks import exactness, exactness_side
from jaxldm import models


def test_the_loss_of_a_batch_is_the_mean_of_its_parts():
    params = models.init(exactness_side.network(), jax.random.key(0))
    batch = {name: column[:8] for name, column in exactness_side.examples().items()}
    loss = jax.jit(lambda batch: exactness_side.loss(params, None, batch, None)[0])
    parts = [loss({name: column[start : start + 4] for name, column in batch.items()}) for start in (0, 4)]
    np.testing.assert_allclose(np.mean(parts), loss(batch), rtol=1e-6)


def test_the_table_and_the_pictures(tmp_path):
    results = {
        "kills": {"kills of trainings": 20, "kills of readers": 10, "files that differ": 0, "which": []},
        "split": {"two processes": 1.2e-7},
        "state": {"share": 0.3},
    }
    lines = exactness.table(results).splitlines()
    assert "| two processes: largest relative difference | 1.2e-07 |" in lines and len(lines) == 7
    folder = exactness.write_pictures(tmp_path / "pictures", 6)
    assert len(list(folder.rglob("*.png"))) == 6 and exactness.recipe().diffusion.save_every == 1
