"""`jaxldm sample FOLDER --prompt ...` on a model of several stages."""

import jax
import numpy as np
from command_lines import complaint, run
from wuerstchen_folders import write_wuerstchen

from jaxldm import pipelines
from jaxldm.data import to_uint8


def test_the_command_draws_with_all_stages_and_refuses_one(capsys, tmp_path):
    root = write_wuerstchen(tmp_path / "models").root
    words = ["--prompt", "a cat", "--seed", "4", "--num-inference-steps", "2", "--solver", "ddim"]
    size = ["--height", "128", "--width", "128"]
    code, _, error = run(capsys, "sample", root / "whole", "--output-dir", tmp_path / "out", *words, *size)
    assert code == 0, error
    call = dict(num_inference_steps=2, solver="ddim", height=128, width=128)
    expected = pipelines.load(root / "whole")(jax.random.key(4), ["a cat"], **call)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "samples.npz")["images"], to_uint8(expected))
    for stage in ("prior", "decoder"):
        error = complaint(capsys, "sample", root / stage, "--output-dir", tmp_path / stage, *words)
        assert "holds one stage" in error
