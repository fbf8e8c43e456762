"""Files that PyTorch writes, in all its forms, read without PyTorch."""

import collections

import numpy as np
import pytest
import torch

from jaxldm.checkpoints.inception_weights import SCOPES, inception_state
from jaxldm.checkpoints.torch_file import read_torch_file
from jaxldm.errors import CheckpointError


def tensors():
    torch.manual_seed(0)
    whole = torch.randn(4, 6)
    return {
        "float": torch.randn(2, 3, 1, 2),
        "transposed": whole.T,
        "part": whole[1:3, ::2],
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "long": torch.arange(4),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "bool": torch.tensor([True, False]),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        tensor = tensor.detach()
        theirs = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].astype(theirs.dtype), theirs)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [dict, collections.OrderedDict, lambda s: {"state_dict": s}])
def test_what_torch_saves(tmp_path, zipped, wrap):
    expected = tensors()
    torch.save(wrap(expected), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_torch_file(tmp_path / "x.pth"), expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_is_refused(tmp_path, zipped):
    torch.save(torch.nn.Linear(2, 3), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"asks for 'torch\.nn\.modules\.linear\.Linear'"):
        read_torch_file(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off_is_one_line(tmp_path, zipped):
    torch.save(tensors(), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "x.pth").read_bytes()
    for length in range(0, len(whole) - 1, 97):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_torch_file(tmp_path / "cut.pth")


class Layer(torch.nn.Module):
    """NVIDIA's Conv2dLayer: the scale of the normalisation is left out."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 2, 1, 2))
        for name in ("beta", "mean", "var"):
            self.register_buffer(name, torch.randn(3))

    def forward(self, x):
        return torch.nn.functional.conv2d(x, self.weight) * self.var[0] + self.beta[0] + self.mean[0]


def test_nvidias_torchscript(tmp_path):
    """A script of modules nested as theirs are, the names of the last two blocks joined by underscores."""
    root = torch.nn.Module()
    expected = {}
    for ours, scope in SCOPES.items():
        block, *rest = scope.split("/")
        path = [block, "_".join(rest)] if block in ("mixed_9", "mixed_10") else [block, *rest]
        node = root
        for part in ("layers", *path[:-1]):
            if not hasattr(node, part):
                setattr(node, part, torch.nn.Module())
            node = getattr(node, part)
        layer = Layer()
        setattr(node, path[-1], layer)
        names = {"conv.weight": layer.weight, "bn.bias": layer.beta, "bn.running_mean": layer.mean}
        names |= {"bn.running_var": layer.var, "bn.weight": torch.ones(3)}
        expected |= {f"{ours}.{part}": tensor for part, tensor in names.items()}
    root.output = torch.nn.Linear(2, 4)
    expected |= {"fc.weight": root.output.weight, "fc.bias": root.output.bias}
    torch.jit.script(root).save(tmp_path / "inception.pt")
    assert_same(inception_state(read_torch_file(tmp_path / "inception.pt")), expected)
