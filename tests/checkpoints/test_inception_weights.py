"""One set of weights in every wrapping that people have, and files that must not be read."""

import collections
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from jaxldm import checkpoints
from jaxldm.checkpoints.inception_weights import SCOPES, inception_state
from jaxldm.checkpoints.torch_file import STREAM_START
from jaxldm.errors import CheckpointError

PARTS = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


@pytest.fixture(scope="module")
def state():
    """All tensors of the network under their names, each small."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.standard_normal(shape, dtype=np.float32)

    state = {}
    for name in SCOPES:
        state[f"{name}.conv.weight"] = draw(3, 2, 1, 2)
        state |= {f"{name}.{part}": draw(3) for part in PARTS}
        state[f"{name}.bn.weight"] = np.ones(3, np.float32)  # as published: NVIDIA's file leaves it out
    return state | {"fc.weight": draw(4, 2), "fc.bias": draw(4)}


def assert_same(path, state):
    found = inception_state(checkpoints.read_weights(path))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number, content):
    """A field of a protocol buffer's message: a whole number, or bytes."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def const_node(name, array, one_by_one=False):
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    content = field(5 if one_by_one else 4, array.tobytes())
    tensor = field(1, 1) + field(2, shape) + content
    kind = field(5, field(1, b"dtype") + field(2, field(6, 1)))
    value = field(5, field(1, b"value") + field(2, field(8, tensor)))
    return field(1, field(1, name.encode()) + field(2, b"Const") + kind + value)


def tensorflow_names(state):
    names = {"conv.weight": "conv2d_params", "bn.weight": "batchnorm/gamma", "bn.bias": "batchnorm/beta"}
    names |= {"bn.running_mean": "batchnorm/moving_mean", "bn.running_var": "batchnorm/moving_variance"}
    graph = {"softmax/weights": state["fc.weight"].T, "softmax/biases": state["fc.bias"]}
    for ours, scope in SCOPES.items():
        for part, name in names.items():
            tensor = state[f"{ours}.{part}"]
            graph[f"{scope}/{name}"] = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor
    return graph


def test_the_scopes_of_tensorflow_are_those_of_the_published_graph():
    """Some, from torch-fidelity's table of the graph."""
    assert len(SCOPES) == 94 and len(set(SCOPES.values())) == 94
    assert SCOPES["Conv2d_4a_3x3"] == "conv_4"
    assert SCOPES["Mixed_5b.branch5x5_2"] == "mixed/tower/conv_1"
    assert SCOPES["Mixed_6a.branch3x3dbl_3"] == "mixed_3/tower/conv_2"
    assert SCOPES["Mixed_6e.branch7x7dbl_5"] == "mixed_7/tower_1/conv_4"
    assert SCOPES["Mixed_7a.branch7x7x3_4"] == "mixed_8/tower_1/conv_3"
    assert SCOPES["Mixed_7c.branch3x3dbl_3b"] == "mixed_10/tower_1/mixed/conv_1"
    assert SCOPES["Mixed_7b.branch_pool"] == "mixed_9/tower_2/conv"


def test_a_tensorflow_graph(tmp_path, state):
    graph = tensorflow_names(state)
    nodes = [const_node(name, np.ascontiguousarray(tensor), n % 7 == 0) for n, (name, tensor) in
             enumerate(graph.items())]  # fmt: skip
    other = field(1, field(1, b"conv/Conv2D") + field(2, b"Conv2D") + field(3, b"input"))
    (tmp_path / "graph.pb").write_bytes(b"".join([other, *nodes, field(4, field(1, 9))]))
    assert_same(tmp_path / "graph.pb", state)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_pickle_of_jax_fid(tmp_path, state, protocol):
    leaves = {"conv.weight": ("conv", "kernel"), "bn.weight": ("bn", "scale"), "bn.bias": ("bn", "bias")}
    leaves |= {"bn.running_mean": ("bn", "mean"), "bn.running_var": ("bn", "var")}
    tree = {"fc": {"kernel": state["fc.weight"].T, "bias": state["fc.bias"]}}
    for name in SCOPES:
        node = tree
        for part in name.split("."):
            node = node.setdefault(part, {})
        for part, (module, leaf) in leaves.items():
            tensor = state[f"{name}.{part}"]
            tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor
            node.setdefault(module, {})[leaf] = tensor
    (tmp_path / "inception.pickle").write_bytes(pickle.dumps(tree, protocol))
    assert_same(tmp_path / "inception.pickle", state)


def test_safetensors(tmp_path, state):
    safetensors.numpy.save_file(state, tmp_path / "x.safetensors")
    assert_same(tmp_path / "x.safetensors", state)


class Attack:
    def __reduce__(self):
        return print, ("this must not be printed",)


class Numpy:
    """An attack through a name that begins as those which arrays need."""

    def __reduce__(self):
        return np.load, ("/etc/hostname",)


def torch_zip(pickled, **entries):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in entries.items():
            archive.writestr(f"archive/data/{name.removeprefix('n')}", data)
    return content.getvalue()


@pytest.mark.parametrize("wrap", [lambda p: p, torch_zip, lambda p: STREAM_START + p])
@pytest.mark.parametrize("attack", [Attack(), {"a": np.ones(2), "b": [Attack()]}, Numpy()])
def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path, capsys, wrap, attack):
    (tmp_path / "bad.pth").write_bytes(wrap(pickle.dumps(attack, 2)))
    with pytest.raises(CheckpointError, match="may run a program") as error:
        checkpoints.load_inception(tmp_path / "bad.pth")
    assert len(str(error.value).replace(str(tmp_path), "")) < 400
    assert "printed" not in capsys.readouterr().out


def nested(depth):
    tree = {"x": np.ones(1)}
    for _ in range(depth):
        tree = {"a": tree, "b": tree}  # 2^depth leaves, if one follows them all
    return pickle.dumps(tree)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 cut off",
        b"\x80\x04",
        b"hello world, no weights",
        b"\x1f\x8b archive",
        STREAM_START,
        STREAM_START + pickle.dumps(1001) + pickle.dumps({"little_endian": True}),
        torch_zip(b""),
        torch_zip(pickle.dumps(3)),
        pickle.dumps({"a": "text"}),
        pickle.dumps(np.array([{}, None], object)),
        b"\x80\x04}r\xff\xff\xff\x7f.",  # a table of 2^31 entries, of ten bytes
        nested(35),
        nested(60),
        struct.pack("<Q", 12) + b"{",
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pb"])
def test_what_is_no_file_of_weights_is_one_line(tmp_path, content, suffix):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load_inception(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) - len(str(path)) < 400


def test_a_cut_off_graph_is_one_line(tmp_path, state):
    whole = b"".join(const_node(name, tensor) for name, tensor in list(tensorflow_names(state).items())[:3])
    for length in range(1, len(whole), 11):
        (tmp_path / "cut.pb").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            checkpoints.load_inception(tmp_path / "cut.pb")


def test_the_weights_of_another_network_are_named(tmp_path, state):
    safetensors.numpy.save_file({**state, "fc.weight": np.zeros([1000, 2048], np.float32)}, tmp_path / "t")
    with pytest.raises(CheckpointError, match="torchvision's InceptionV3"):
        checkpoints.load_inception(tmp_path / "t")
    safetensors.numpy.save_file({"conv1.weight": np.zeros(3, np.float32)}, tmp_path / "o")
    with pytest.raises(CheckpointError, match="472 of 472 tensors are missing") as error:
        checkpoints.load_inception(tmp_path / "o")
    assert "pytorch-fid" in str(error.value)
    with pytest.raises(CheckpointError, match="there is no weight file"):
        checkpoints.load_inception(tmp_path / "none")


def test_a_storage_smaller_than_its_tensor_is_refused(tmp_path):
    storage = ("storage", "FloatStorage", "0", "cpu", 2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return storage if value == "STORAGE" else None

    tree = collections.OrderedDict(w="STORAGE")
    content = io.BytesIO()
    Pickler(content, 2).dump(tree)
    (tmp_path / "x.pth").write_bytes(torch_zip(content.getvalue(), n0=b"\0" * 8))
    with pytest.raises(CheckpointError, match="storage of an unknown kind"):
        checkpoints.read_weights(tmp_path / "x.pth")
