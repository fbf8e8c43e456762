"""LoRA as a tree: the identity at first, W + s A B in every layout, on every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxldm import models
from jaxldm.checkpoints import published, to_state_dict
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.adapters import lora_layers

KEY = jax.random.key(0)
# One preset of each kind of network that draws, and of the text encoders.
FAMILIES = (
    *(
        "mini-unet",
        "tiny-dit",
        "sit-s-2",
        "flux-dev",
        "pixart-sigma",
        "sd3-medium",
        "z-image",
        "qwen-image",
        "tiny-maskgit",
    ),
    *("clip-l", "t5-base", "minilm"),
)


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), tree)


def weights():
    """A matrix, a 3x3 convolution, a stack of two matrices and one of two convolutions."""
    shapes = {
        "to_q": (6, 4),
        "conv": (3, 3, 5, 4),
        "blocks_0to1": {"to_q": (2, 6, 4), "conv": (2, 3, 3, 5, 4)},
    }
    is_shape = lambda entry: isinstance(entry, tuple)  # noqa: E731
    make = lambda shape: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])}  # noqa: E731
    return {"net": random_like(jax.tree.map(make, shapes, is_leaf=is_shape))}


def test_zero_up_is_the_identity_bit_for_bit():
    params = weights()
    lora = models.init_lora(KEY, params, 2, ["*"])
    assert len(lora_layers(lora)) == 4
    merged = jax.jit(models.apply_lora)(params, lora, 0.5)
    for ours, before in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, before)
    assert all(np.asarray(down).any() for down, _ in lora_layers(lora).values())


def test_every_layout_is_w_plus_s_b_a_of_the_published_tensors():
    params = weights()
    lora = random_like(models.init_lora(KEY, params, 2, ["*"]), 1)
    merged = to_state_dict(models.apply_lora(params, lora, 0.3))
    before, factors = to_state_dict(params), to_state_dict(lora)
    changed = {name.removesuffix(".lora_A.weight") for name in factors if name.endswith("lora_A.weight")}
    assert changed == {
        "net.to_q",
        "net.conv",
        *(f"net.blocks.{n}.{x}" for n in (0, 1) for x in ("to_q", "conv")),
    }
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in changed and name.endswith(".weight"):
            down, up = (np.float64(factors[f"{module}.lora_{part}.weight"]) for part in "AB")
            up = up.reshape(up.shape[:2])
            tensor = tensor + 0.3 * np.einsum("or,r...->o...", up, down)
        np.testing.assert_allclose(merged[name], tensor, rtol=0, atol=1e-5)


def test_parameters_keep_their_dtype_and_only_the_adapter_has_gradients():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights())
    lora = models.init_lora(KEY, params, 1, ["*/conv"])
    merged = models.apply_lora(params, random_like(lora), 2.0)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"bfloat16"}

    def total(lora):
        leaves = jax.tree.leaves(models.apply_lora(params, lora))
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves)

    gradients = traverse_util.flatten_dict(jax.grad(total)(lora))
    assert {path[-2] for path, leaf in gradients.items() if np.asarray(leaf).any()} == {
        "lora_B"
    }  # A: as B is 0


def test_a_layer_draws_the_same_whatever_else_is_adapted():
    params = weights()
    alone, all_of_them = (
        models.init_lora(KEY, params, 2, ["net/to_q"]),
        models.init_lora(KEY, params, 2, ["*"]),
    )
    np.testing.assert_array_equal(
        alone["net"]["to_q"]["lora_A"]["kernel"], all_of_them["net"]["to_q"]["lora_A"]["kernel"]
    )


@pytest.mark.parametrize("preset", FAMILIES)
def test_attention_of_every_family(preset):
    """Without targets: every projection of queries, of all blocks, and nothing outside of attention."""
    shapes = models.shapes(models.build(preset))
    lora = jax.eval_shape(lambda key: models.init_lora(key, shapes, 4), KEY)
    ours = {name.removesuffix(".lora_A.weight") for name in published(lora) if ".lora_A." in name}
    ends = ("to_q.weight", "q_proj.weight", "attn.qkv.weight", "SelfAttention.q.weight", "self.query.weight")
    queries = {name.removesuffix(".weight") for name in published(shapes) if name.endswith(ends)}
    assert queries and queries <= ours
    assert all("att" in name.lower() for name in ours)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda p: models.init_lora(KEY, p, 2, ["*/to_p"]),
            r"no layer is named '\*/to_p': .* here net/.*to_q",
        ),
        (lambda p: models.init_lora(KEY, p, 2, ["*/to_q", "bias"]), "no layer is named 'bias'"),
        (lambda p: models.init_lora(KEY, p, 2, "*/to_q"), r"targets must be a list .*\['\*/to_q'\]"),
        (lambda p: models.init_lora(KEY, p, 2, []), "targets must be a list of|targets must be patterns"),
        (lambda p: models.init_lora(KEY, p, 0), "rank must be .* got 0"),
        (lambda p: models.init_lora(KEY, p, 5), "rank 5 is more than the rank of every layer .*, 4 at most"),
        (
            lambda p: models.init_lora(KEY, {"a": {"kernel": p["net"]["conv"]["kernel"]}}),
            "no layer is a projection of attention.* give targets",
        ),
        (lambda p: models.apply_lora({"a": p["net"]}, models.init_lora(KEY, p, 2)), "another network"),
        (lambda p: models.apply_lora(p, p), "tree of lora_A and lora_B"),
    ],
)
def test_what_cannot_be(call, words):
    with pytest.raises(InvalidArgumentError, match=words) as error:
        call(weights())
    assert len(str(error.value)) < 400


def test_an_adapter_of_other_shapes_is_refused():
    params = weights()
    lora = models.init_lora(KEY, params, 2, ["net/to_q"])
    lora["net"]["to_q"]["lora_A"]["kernel"] = jnp.zeros((7, 2))
    with pytest.raises(InvalidArgumentError, match=r"net/to_q is \[7, 4\], and the kernel \[6, 4\]"):
        models.apply_lora(params, lora)
