"""`jaxldm eval` reads test pictures batch by batch."""

import numpy as np
import pytest
from tiny_models import latent_pipeline

from jaxldm import metrics, models
from jaxldm.commands.eval import measure_reconstruction
from jaxldm.data import ArrayRows, Dataset


def test_the_reconstruction_error_is_that_of_all_test_images_at_once():
    pipe, taken = latent_pipeline(), []
    height, width = pipe.default_size
    shape = (height, width, pipe.autoencoder.config.in_channels)
    images = np.random.default_rng(0).uniform(-1, 1, (300, *shape)).astype(np.float32)

    class Rows(ArrayRows):
        def take(self, rows):
            taken.append(len(rows))
            return super().take(rows)

    rows = Rows({"image": images, "label": np.zeros(300, np.int32)})
    figures, line = measure_reconstruction(pipe, Dataset("noted", shape, ("a",), {"test": rows}))
    module, params = pipe.autoencoder.module, pipe.autoencoder.params
    latents = models.encode_latents(module, params, images)
    decoded = np.asarray(models.decode_latents(module, params, latents))
    expected = metrics.reconstruction_error(images, decoded)
    assert figures == pytest.approx(expected._asdict(), rel=1e-5)
    assert taken == [250, 50] and "on 300 real test images: mse" in line
