"""`--mesh` of `jaxldm sample` and `jaxldm info`."""

import jax
import numpy as np
import pytest
from command_lines import complaint, run
from tiny_models import latent_pipeline

from jaxldm import models, pipelines
from jaxldm.commands.info import modules_of_recipe


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split") / "classes"
    pipelines.save(latent_pipeline(), folder)
    return folder


def test_command_line(classes, tmp_path, capsys):
    sample = ("sample", classes, "--num-inference-steps", 2, "--output-dir", tmp_path, "--quiet")
    assert run(capsys, *sample, "--class-labels", 1, "--mesh", "fsdp=2,tensor=2", "--devices", 4)[0] == 0
    drawn = np.load(tmp_path / "samples.npz")["images"].astype(int)
    assert run(capsys, *sample, "--class-labels", 1)[0] == 0
    assert np.abs(drawn - np.load(tmp_path / "samples.npz")["images"]).max() <= 1
    for words, message in (
        (("--mesh", "tensor=3"), "must divide the 8 devices, got fsdp=1 and tensor=3"),
        (("--mesh", "tensor=2", "--devices", 9), "devices must be between 1 and 8"),
        (("--mesh", "tensr=2"), "tensor"),
        (("--mesh", "tensor=0"), "as in fsdp=2,tensor=4, got 'tensor=0'"),
        (
            ("--mesh", "data=4,tensor=4"),
            "needs 16 devices, got 8: to try it on a CPU, put "
            "XLA_FLAGS=--xla_force_host_platform_device_count=16 in front of the command",
        ),
        (("--mesh", "tensor=16"), "needs 16 devices, got 8: to try it"),
        (("--mesh", "data=4,tensor=2", "--devices", 4), "needs 8 devices, got 4\n"),
        (("--mesh", "data=8"), "splits no weights"),
    ):
        assert message in complaint(capsys, *sample, *words)


def test_info(classes, capsys):
    code, out, _ = run(capsys, "info", classes, "--mesh", "data=2,fsdp=2,tensor=2")
    assert code == 0 and "data=2, fsdp=2, tensor=2: 8 devices" in out
    for name, network in pipelines.load(classes, mesh=models.make_mesh(8, fsdp=2, tensor=2)).networks.items():
        leaves = jax.tree.leaves(network.params)
        each, total = sum(x.addressable_shards[0].data.size for x in leaves), sum(x.size for x in leaves)
        assert f"{name}: {each:,} of {total:,} parameters on each device" in out
    code, out, _ = run(capsys, "info", "flux-dev", "--mesh", "tensor=8")
    assert code == 0 and "of 11,901,408,320 parameters" in out and "(to_out_0|" in out
    code, out, _ = run(capsys, "info", "smoke", "--mesh", "data=2,fsdp=2")
    assert code == 0 and "data=2, fsdp=2, tensor=1: 4 devices" in out
    for stage, module in modules_of_recipe("smoke").items():
        assert f"{stage}: " in out and f" of {models.count_params(module):,} parameters on each device" in out
    assert "needs one folder, preset or recipe" in complaint(capsys, "info", "--mesh", "tensor=8")
    assert "flux-dev" in complaint(capsys, "info", "flux-dv", "--mesh", "tensor=8")
    assert "choose another tensor" in complaint(capsys, "info", "flux-dev", "--mesh", "tensor=7")
