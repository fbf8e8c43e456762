"""Each way to compute the gradient by the kernel computes it, as PyTorch does; and the table is written."""

import json

import jax.numpy as jnp
import numpy as np
import torch

from experiments.benchmarks import kernel_gradient


def test_each_form_is_the_gradient_and_is_in_the_table(tmp_path):
    random = np.random.default_rng(0)
    x, g = (random.standard_normal((2, 4, 4, channels), np.float32) for channels in (3, 5))
    first = [torch.from_numpy(a.transpose(0, 3, 1, 2)) for a in (x, g)]  # channels first
    expected = torch.nn.grad.conv2d_weight(first[0], (5, 3, 3, 3), first[1], padding=1)
    expected = expected.numpy().transpose(2, 3, 1, 0)
    for name, form in kernel_gradient.FORMS.items():
        np.testing.assert_allclose(form(jnp.asarray(x), jnp.asarray(g)), expected, atol=1e-4, err_msg=name)
    kernel_gradient.main(kernel_gradient.KernelGradient(quick=True, output_dir=tmp_path))
    result = json.loads((tmp_path / "quick/kernel_gradient.json").read_text())
    assert set(result["rows"][0]["milliseconds"]) == {*kernel_gradient.FORMS, "oneDNN"}
    assert "taps of the gradient" in (tmp_path / "quick/kernel_gradient.md").read_text()
