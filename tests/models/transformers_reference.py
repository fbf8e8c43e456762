"""What the comparisons with transformers share: a small random model saved, a folder opened in silence."""

import jax
import numpy as np
import transformers
from torch_reference import randomised

from jaxldm import checkpoints


def saved_pair(kind, config, folder):
    """(their model, our module, our parameters), ours from the folder that theirs saved itself to."""
    theirs = randomised(kind(config))
    theirs.save_pretrained(folder)
    return theirs, *checkpoints.load(folder)


def opened_in_silence(kind, folder, caplog, recwarn):
    """The model in a folder as transformers opens it, with nothing to warn of, to miss or to leave over."""
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    recwarn.clear()
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert [record.getMessage() for record in caplog.records] + [str(w.message) for w in recwarn] == []
    assert not any(report.values()), report
    return model.eval()


def perturbed(params, seed=1):
    """The parameters, each number changed a little."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), jax.device_get(params)
    )
