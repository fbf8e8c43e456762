"""Quantised models as pipelines: drawn, cached, calibrated, on disk and from the command line."""

import json
import pathlib
import re
import tracemalloc

import jax
import numpy as np
import pytest
from compilations import COMPILATIONS
from tiny_models import DIT, PREDICTION, latent_pipeline, pixel_pipeline

from jaxldm import checkpoints, cli, models, pipelines
from jaxldm.errors import InvalidArgumentError

KEY = jax.random.key(3)
CALL = {"num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.fixture(scope="module", params=["unet", "dit"])
def pipe(request):
    return latent_pipeline() if request.param == "unet" else pixel_pipeline(depth=3)


def test_it_draws_nearly_the_same_and_other_weights_compile_nothing(pipe, tmp_path):
    plain = pipe(KEY, [0, 1], output="latents", **CALL)
    small = pipelines.quantize(pipe, models.quantization("int8", modulation="int8"))
    drawn = small(KEY, [0, 1], output="latents", **CALL)
    assert 0 < np.linalg.norm(drawn - plain) < 0.1 * np.linalg.norm(plain)
    pipelines.save(small, tmp_path / "small")
    again = pipelines.load(tmp_path / "small")
    assert not any(row.difference for row in pipelines.compare(small, again))
    before = COMPILATIONS.count
    np.testing.assert_array_equal(again(KEY, [0, 1], output="latents", **CALL), drawn)
    assert COMPILATIONS.count == before
    cached = again(KEY, [0, 1], output="latents", cache="fora:1", **CALL)
    np.testing.assert_allclose(cached, drawn, rtol=1e-4, atol=1e-4 * np.abs(drawn).max())


def test_a_calibration_sees_the_inputs_of_every_layer_in_all_steps(pipe):
    first = pipelines.calibrate_quantization(pipe, KEY, [0], **CALL)
    both = pipelines.calibrate_quantization(pipe, KEY, [0, 1], **CALL)
    kernels = checkpoints.published(models.shapes(pipe.denoiser.module))
    layers = {
        tensor.path[:-1]: tensor.value.shape[-2] for tensor in kernels.values() if tensor.path[-1] == "kernel"
    }
    assert first.keys() <= layers.keys() and len(first) >= len(layers) - 1  # patches are no layer
    for path, peak in both.items():
        assert peak.shape == (layers[path],) and np.isfinite(peak).all(), path
        assert (peak >= first[path] * (1 - 1e-5)).all(), path  # image 0 is the same in both
    assert any((both[path] > first[path]).any() for path in both)
    how = models.quantization("int8", smooth=0.5, rank=2)
    small = pipelines.quantize(pipe, how, both)
    plain, drawn = (each(KEY, [0, 1], output="latents", **CALL) for each in (pipe, small))
    assert 0 < np.linalg.norm(drawn - plain) < 0.1 * np.linalg.norm(plain)


def test_a_calibration_computes_every_step(pipe):
    for option in ({"cache": "fora:2"}, {"compile_only": True}):
        for calibrate in (pipelines.calibrate_quantization, pipelines.calibrate_cache):
            with pytest.raises(InvalidArgumentError, match=f"leave {next(iter(option))} out"):
                calibrate(pipe, KEY, [0], **CALL, **option)


def test_what_is_quantised_already_is_refused(pipe):
    small = pipelines.quantize(pipe, models.quantization("int4"))
    for call in (
        lambda: pipelines.quantize(small, models.quantization("int8")),
        lambda: pipelines.calibrate_quantization(small, KEY, [0], **CALL),
    ):
        with pytest.raises(InvalidArgumentError, match="quantised already, to int4"):
            call()


PROCESS = pathlib.Path("/proc/self")  # of Linux


def resident(name):
    """Bytes of the process: "VmRSS" now, "VmHWM" at its peak; 0 where the system does not tell."""
    if not (PROCESS / "clear_refs").exists():
        return 0
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", (PROCESS / "status").read_text())[1])


def peak_memory(call):
    """(the result, the most bytes that Python and NumPy held, the most that the process gained)."""
    if (PROCESS / "clear_refs").exists():
        (PROCESS / "clear_refs").write_text("5")  # its peak begins again
    before = resident("VmRSS")
    tracemalloc.start()
    result = call()
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, held, resident("VmHWM") - before


def test_a_folder_is_loaded_without_the_whole_weights_in_memory(tmp_path):
    """What stays is little more than a quarter; on the way there is never as much as the whole."""
    module = models.build("tiny-dit", **DIT | {"hidden_size": 2048})
    how = models.quantization("int8", modulation="int8")
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), models.quantized_shapes(module, how))
    pipelines.save(pipelines.class_to_image(pipelines.Network(module, zeros), PREDICTION), tmp_path / "small")
    whole = models.param_bytes(models.shapes(module))
    pipe, held, gained = peak_memory(lambda: pipelines.load(tmp_path / "small"))
    assert models.param_bytes(pipe.denoiser.params) < 0.29 * whole
    assert held < 0.4 * whole and gained < 0.6 * whole, (held / whole, gained / whole)


def command(capsys, *words):
    code = cli.main([str(word) for word in ("quantize", *words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_a_folder_that_is_sampled_and_not_quantised_again(capsys, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "small"
    pipelines.save(pixel_pipeline(depth=1), folder)
    code, said, err = command(
        capsys, folder, "--bits", "int4", "--rank", 2, "--smooth", 0.5, "--output-dir", out
    )
    assert code == 0 and not err and "MB instead of" in said and f"jaxldm sample {out}" in said
    entries = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]
    assert (entries["weights"], entries["rank"], entries["smooth"]) == ("int4", 2, 0.5)
    assert cli.main(["info", str(out)]) == 0
    described = capsys.readouterr().out
    whole = models.count_params(pipelines.load(folder).denoiser.module)
    assert f"{whole:,} parameters, in int4: 0.0 MB" in described
    assert pipelines.load(out)(KEY, [0], num_inference_steps=1).shape[0] == 1
    wrong = [
        ((out, "--output-dir", tmp_path / "b"), "quantised already, to int4"),
        ((folder, "--output-dir", folder), "own folder: give a new one"),
        ((folder, "--bits", "int3", "--output-dir", tmp_path / "b"), "int3"),
        ((folder, "--activations", "bf16", "--output-dir", tmp_path / "b"), "bf16"),
        ((folder, "--smooth", 2, "--output-dir", tmp_path / "b"), "smooth must be"),
        ((folder, "--prompt", "a cat", "--output-dir", tmp_path / "b"), "leave it out"),
        ((folder, "--output-dir", folder / "model_index.json"), "is a file"),
    ]
    for words, text in wrong:
        code, _, err = command(capsys, *words)
        assert code == 2 and text in err and err.count("\n") == 1, err
    assert not (tmp_path / "b").exists()
