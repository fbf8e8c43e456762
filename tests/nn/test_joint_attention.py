import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import attention as their_attention
from diffusers.models import attention_processor, embeddings, normalization
from diffusers.models.transformers.transformer_flux import FluxAttention

from jaxldm import nn
from jaxldm.checkpoints import from_state_dict
from jaxldm.errors import UnknownNameError


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ours_of(theirs, module, *inputs, **options):
    """What our module gives with the parameters of theirs."""
    template = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, **options)["params"], *inputs)
    state = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    return module.apply({"params": from_state_dict(state, template)}, *inputs, **options)


def assert_same(ours, theirs):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


X, TEXT = numbers(2, 5, 16), numbers(2, 3, 16, seed=1)
TORCH_X, TORCH_TEXT = torch.from_numpy(X), torch.from_numpy(TEXT)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_agrees_with_the_attention_of_sd3(last, qk_norm):
    theirs = randomised(
        attention_processor.Attention(
            query_dim=16,
            added_kv_proj_dim=16,
            dim_head=8,
            heads=2,
            out_dim=16,
            context_pre_only=last,
            bias=True,
            processor=attention_processor.JointAttnProcessor2_0(),
            qk_norm="rms_norm" if qk_norm else None,
            eps=1e-6,
        )
    )
    out, text = ours_of(theirs, nn.JointAttention(2, qk_norm, project_text_out=not last), X, TEXT)
    expected, expected_text = theirs(TORCH_X, TORCH_TEXT)
    assert_same(out, expected)
    assert_same(text, expected_text)


def test_agrees_with_the_attention_of_flux():
    """With rotary positions, text first; and of its single blocks, which have one kind of tokens."""
    theirs = randomised(FluxAttention(16, 2, 8, bias=True, added_kv_proj_dim=16, out_dim=16, eps=1e-6))
    cos, sin = nn.rotary.rotary_embedding(np.arange(8) * 1.5, 8, 100.0)
    rotary = tuple(torch.from_numpy(np.repeat(table, 2, axis=1)) for table in (cos, sin))
    out, text = ours_of(theirs, nn.JointAttention(2, True), X, TEXT, rotary=(cos, sin))
    for ours, expected in zip((out, text), theirs(TORCH_X, TORCH_TEXT, image_rotary_emb=rotary), strict=True):
        assert_same(ours, expected)

    theirs = randomised(FluxAttention(16, 2, 8, bias=True, out_dim=16, pre_only=True, eps=1e-6))
    ours = ours_of(theirs, nn.JointAttention(2, True, project_out=False), X, rotary=(cos[:5], sin[:5]))
    assert_same(ours, theirs(TORCH_X, image_rotary_emb=tuple(table[:5] for table in rotary)))


def test_the_order_of_image_and_text_does_not_matter():
    """Padding of the text is at the end where the image comes first, and is numbers there, not a mask."""
    first, second = nn.JointAttention(2, True), nn.JointAttention(2, True, image_first=True)
    params = {"params": randomly(first.init(jax.random.key(0), X, TEXT)["params"])}
    cos, sin = nn.rotary.rotary_embedding(np.arange(8) * 1.5, 8, 100.0)
    behind = tuple(np.concatenate([table[3:], table[:3]]) for table in (cos, sin))
    mask = np.arange(3) < np.array([[3], [1]])
    mask = np.concatenate([mask, np.ones((2, 5), bool)], axis=1)
    wanted = first.apply(params, X, TEXT, rotary=(cos, sin), mask=mask)
    found = second.apply(params, X, TEXT, rotary=behind, lengths=np.array([8, 6]))
    for ours, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert np.abs(wanted[0] - first.apply(params, X, TEXT, rotary=(cos, sin))[0]).max() > 1e-3


def randomly(tree):
    return jax.tree.map(lambda leaf: leaf + 0.3 * numbers(*leaf.shape), tree)


def test_a_masked_token_is_seen_by_none():
    module = nn.JointAttention(2, True)
    variables = module.init(jax.random.key(0), X, TEXT)
    mask = jnp.arange(8)[None] != jnp.array([[1], [7]])
    x, text = X.copy(), TEXT.copy()
    text[0, 1], x[1, 4] = 9.0, 9.0
    (out, text_out), (other, other_text) = (
        module.apply(variables, *inputs, mask=mask) for inputs in ((X, TEXT), (x, text))
    )
    np.testing.assert_array_equal(out[:, :4], other[:, :4])
    np.testing.assert_array_equal(text_out[:, [0, 2]], other_text[:, [0, 2]])
    assert not np.allclose(out, module.apply(variables, X, TEXT)[0], atol=1e-3)


def test_adaptive_norms_agree_with_diffusers():
    c = numbers(2, 16, seed=2)
    torch_c = torch.from_numpy(c)
    shift, scale, gate, *rest = ours_of(
        theirs := randomised(normalization.AdaLayerNormZero(16)), nn.Modulation(6), c
    )
    expected, *others = theirs(TORCH_X, emb=torch_c)
    assert_same(nn.modulate(nn.layer_norm(jnp.asarray(X)), shift, scale), expected)
    for ours, other in zip((gate, *rest), others, strict=True):
        assert_same(ours, other)

    theirs = randomised(normalization.AdaLayerNormContinuous(16, 12, elementwise_affine=False, eps=1e-6))
    ours = ours_of(theirs, nn.AdaLayerNormContinuous(), X, c[:, :12])
    assert_same(ours, theirs(TORCH_X, torch_c[:, :12]))


def test_a_fresh_modulation_changes_nothing():
    vectors, _ = nn.Modulation(3, features=4).init_with_output(jax.random.key(0), numbers(2, 16))
    assert [vector.shape for vector in vectors] == [(2, 4)] * 3
    assert not np.any(vectors)


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu-approximate"])
def test_feed_forward_agrees_with_diffusers(activation):
    theirs = randomised(their_attention.FeedForward(16, activation_fn=activation))
    assert_same(ours_of(theirs, nn.FeedForward(activation=activation), X), theirs(TORCH_X))


def test_unknown_activations_are_refused():
    with pytest.raises(UnknownNameError, match=r"swiglu.*gelu-approximate"):
        nn.FeedForward(activation="swiglu").init(jax.random.key(0), X)


def test_embeddings_of_time_text_and_guidance_agree_with_diffusers():
    t, w, pooled = np.array([3.0, 987.5], np.float32), np.array([3500.0, 0.0], np.float32), numbers(2, 6)
    theirs = randomised(embeddings.CombinedTimestepTextProjEmbeddings(16, 6))
    expected = theirs(torch.from_numpy(t), torch.from_numpy(pooled))
    np.testing.assert_allclose(
        ours_of(theirs, nn.TimestepTextEmbedding(16), t, pooled), expected.detach(), atol=3e-4
    )
    theirs = randomised(embeddings.CombinedTimestepGuidanceTextProjEmbeddings(16, 6))
    expected = theirs(torch.from_numpy(t), torch.from_numpy(w), torch.from_numpy(pooled))
    np.testing.assert_allclose(
        ours_of(theirs, nn.TimestepTextEmbedding(16), t, pooled, w), expected.detach(), atol=3e-3
    )
    theirs = randomised(embeddings.PixArtAlphaTextProjection(16, 8))
    assert_same(ours_of(theirs, nn.TextProjection(8), X), theirs(TORCH_X))
