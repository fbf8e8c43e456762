"""The masked image transformer: what it sees and does not see, its size, its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import checkpoints, models
from jaxldm.errors import InvalidArgumentError

SMALL = {"sample_size": 8, "codebook_size": 5, "block_out_channels": (8,), "norm_num_groups": 2}
SMALL |= {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def network():
    """A module with normal numbers in every tensor, as the gates start at zero."""
    module = models.build("tiny-maskgit", **SMALL)
    params = jax.tree.map(
        lambda leaf: 0.3 * RNG.standard_normal(leaf.shape, np.float32), models.shapes(module)
    )
    apply = jax.jit(lambda params, tokens, labels: module.apply({"params": params}, tokens, labels))
    return module, params, lambda tokens, labels, params=params: np.asarray(apply(params, tokens, labels))


def test_the_number_of_parameters_is_the_sum_of_its_layers():
    c = models.PRESETS["tiny-maskgit"]
    width, values, (first, second) = c.hidden_size, c.codebook_size, c.block_out_channels

    def conv(a, b, size=9):
        return size * a * b + b

    def resnet(a, b):
        shortcut = conv(a, b, 1) if a != b else 0
        return 2 * a + conv(a, b) + conv(width, b, 1) + 2 * b + conv(b, b) + shortcut

    tables = (values + 1) * first + (c.num_classes + 1) * width
    down = conv(first, first) + resnet(first, first) + conv(first, first)
    down += resnet(first, second) + conv(second, second) + conv(second, width, 1)
    block = conv(width, 6 * width, 1) + 4 * conv(width, width, 1) + conv(width, 4 * width, 1)
    block += conv(4 * width, width, 1)
    up = conv(width, second) + resnet(2 * second, second) + conv(second, first) + resnet(2 * first, first)
    last = 2 * first + conv(first, values)
    assert models.count_params("tiny-maskgit") == tables + down + c.depth * block + up + last


def test_every_token_and_the_label_reach_every_logit(network):
    _, _, logits = network
    tokens, labels = np.full((1, 8, 8), 5, np.int32), np.array([1], np.int32)
    before = logits(tokens, labels)
    assert before.shape == (1, 8, 8, 5) and before.dtype == np.float32
    corner = tokens.copy()
    corner[0, 0, 0] = 2
    assert (np.abs(logits(corner, labels) - before).max(-1) > 0).all()
    assert (np.abs(logits(tokens, labels + 1) - before).max(-1) > 0).all()
    np.testing.assert_array_equal(logits(tokens, None), logits(tokens, np.array([3], np.int32)))


def test_without_convolutions_the_transformer_sees_single_tokens():
    module = models.build("tiny-maskgit", **SMALL | {"block_out_channels": ()})
    params = models.shapes(module)
    assert module.constant_tensors()["pos_emb"].shape == (1, 64, 16)
    assert not [name for name in params if name.startswith(("down", "up"))]
    logits = jax.eval_shape(
        lambda *inputs: module.apply({"params": inputs[0]}, *inputs[1:]), params, *module.example_inputs()
    )
    assert logits.shape == (1, 8, 8, 5)


def test_a_folder_gives_the_same_network_back(network, tmp_path):
    module, params, logits = network
    checkpoints.save(tmp_path / "transformer", module, params)
    again, read = checkpoints.load(tmp_path / "transformer")
    assert again.config == module.config
    tokens, labels = RNG.integers(0, 6, (2, 8, 8)).astype(np.int32), np.array([0, 2], np.int32)
    np.testing.assert_array_equal(logits(tokens, labels), logits(tokens, labels, read))


def test_what_does_not_fit_is_refused(network):
    module, params, _ = network
    for wrong, words in (
        ({"sample_size": 9}, "cannot be cut into patches"),
        ({"num_heads": 3}, "heads"),
        ({"codebook_size": 1}, "codebook_size"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            models.build("tiny-maskgit", **SMALL | wrong)
    with pytest.raises(InvalidArgumentError, match=r"\[0, 5\]"):  # seen outside of jit
        module.apply({"params": params}, jnp.full((1, 8, 8), 6), jnp.zeros(1, jnp.int32))
    unconditional = models.build("tiny-maskgit", **SMALL | {"num_classes": None})
    with pytest.raises(InvalidArgumentError, match="without classes"):
        unconditional.init(jax.random.key(0), jnp.full((1, 8, 8), 5), jnp.zeros(1, jnp.int32))
