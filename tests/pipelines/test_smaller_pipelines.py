"""Pruned models, and models with merged tokens, as pipelines."""

import dataclasses

import jax
import numpy as np
import pytest
from compilations import COMPILATIONS
from tiny_models import latent_pipeline, pixel_pipeline, text_parts

from jaxldm import checkpoints, models, nn, pipelines
from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError
from jaxldm.models import pruning
from jaxldm.serving.jobs import prepare

KEY = jax.random.key(3)
CALL = {"num_inference_steps": 3, "guidance_scale": 2.0, "output": "latents"}
DIT = {"patch_size": 2, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def dit():
    return pixel_pipeline(**DIT)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    parts = text_parts(tmp_path_factory.mktemp("text") / "tokenizer")
    return pipelines.Pipeline(pipelines.PIPELINES["StableDiffusionPipeline"], parts)


def test_a_pruned_model_draws_is_read_back_and_is_trained_on(dit, tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (10, 8, 8, 1)).astype(np.float32)
    labels = np.arange(10, dtype=np.int32) % 3
    found = pipelines.unit_importance(dit, KEY, images, labels, num_times=3, batch_size=4)
    assert found.heads.shape == (2, 4) and np.isfinite(found.channels).all() and (found.heads > 0).all()
    # In batches it is the same as at once, and another time is another importance.
    keep = pruning.mask(found, heads=0.5, channels=0.25)
    small = pipelines.prune(dit, keep)
    assert small.denoiser.config.num_heads == 2 and small.denoiser.config.mlp_ratio == 1.0
    drawn = small(KEY, [0, 1], **CALL)
    masked = pipelines.Network(dit.denoiser.module, pruning.masked(*_of(dit), keep))
    np.testing.assert_allclose(
        dit.replace(denoiser=masked)(KEY, [0, 1], **CALL), drawn, atol=1e-4 * np.abs(drawn).max()
    )
    pipelines.save(small, tmp_path / "small")
    again = pipelines.load(tmp_path / "small")
    np.testing.assert_array_equal(again(KEY, [0, 1], **CALL), drawn)
    again(KEY, [0, 1], cache="fora:2", token_merging=0.5, **CALL)
    assert checkpoints.load(tmp_path / "small" / "transformer")[0].config.head_dim == 4


def _of(pipe):
    return pipe.denoiser.module, pipe.denoiser.params


def test_importance_in_latents_and_without_labels_refuses_what_cannot(dit):
    images = np.zeros((4, 8, 8, 1), np.float32)
    for call, match in (
        (lambda: pipelines.unit_importance(latent_pipeline(), KEY, images), "pruning is for DiT and SiT"),
        (lambda: pipelines.unit_importance(dit, KEY, images, np.zeros(3, np.int32)), "labels must be 4"),
        (lambda: pipelines.unit_importance(dit, KEY, images, np.array([0, 1, 2, 99])), "labels must lie in"),
        (lambda: pipelines.unit_importance(dit, KEY, images[:, :6]), "images must be"),
        (lambda: pipelines.unit_importance(dit, KEY, images + 200), r"must lie in \[-1, 1\]"),
        (lambda: pipelines.prune(latent_pipeline(), pruning.Units(np.ones((1, 1)), np.ones((1, 1)))), "DiT"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            call()


@pytest.mark.parametrize("model", ["dit", "diffusion"])
def test_a_ratio_of_zero_is_the_plain_model_and_each_ratio_compiles_once(model, request):
    pipe = request.getfixturevalue(model)
    prompt = ["a", "b"] if model == "diffusion" else [0, 1]
    plain = pipe(KEY, prompt, **CALL)
    before = COMPILATIONS.count
    np.testing.assert_array_equal(pipe(KEY, prompt, token_merging=0.0, **CALL), plain)
    assert COMPILATIONS.count == before
    merged = pipe(KEY, prompt, token_merging=0.5, **CALL)
    assert np.abs(merged - plain).max() > 0 and COMPILATIONS.count > before
    before = COMPILATIONS.count
    pipe(jax.random.key(4), prompt, token_merging=models.TokenMerging(0.5), **CALL)
    np.testing.assert_array_equal(pipelines.with_token_merging(pipe, 0.5)(KEY, prompt, **CALL), merged)
    assert COMPILATIONS.count == before


def test_all_of_it_together_is_as_without_a_cache_where_nothing_is_reused(diffusion):
    """8 bits with a LoRA, merged tokens, a picture to start from, guidance, two devices, previews."""
    lora = jax.tree.map(
        lambda part: part + 0.1, models.init_lora(KEY, models.shapes(diffusion.unet.module), 2)
    )
    small = pipelines.quantize(diffusion, models.quantization("int8"))
    small = small.replace(
        unet=dataclasses.replace(small.unet, params=models.apply_lora(small.unet.params, lora))
    )
    more = {"token_merging": 0.5, "image": np.zeros((16, 16, 3), np.float32), "strength": 0.75, "previews": 1}
    more |= {"batch_size": 2, "devices": jax.devices()[:2], "negative_prompt": "c", "num_inference_steps": 8}
    plain, _ = small(KEY, ["a", "b", "d"], **CALL | more)
    every, previews = small(KEY, ["a", "b", "d"], cache="deepcache:1", **CALL | more)
    np.testing.assert_array_equal(every, plain)
    reused, _ = small(KEY, ["a", "b", "d"], cache="deepcache:3", **CALL | more)
    assert np.isfinite(previews).all() and 0 < np.abs(reused - plain).max() < np.inf
    cache = D.caching.at_steps([True] * 7)  # six of eight steps are taken
    with pytest.raises(InvalidArgumentError, match="schedule has 7 steps, the run 6"):
        small(KEY, ["a", "b", "d"], cache=cache, **CALL | more)


def test_more_is_merged_on_request(dit, diffusion):
    steps = dict(CALL, num_inference_steps=1)
    drawn = [
        diffusion(KEY, ["a"], token_merging=models.TokenMerging(0.5, **more), **steps)
        for more in ({}, {"cross_attention": True}, {"mlp": True})
    ]
    assert all(np.abs(drawn[0] - other).max() > 0 for other in drawn[1:])
    macs = [
        models.count_macs(pipelines.with_token_merging(dit, options).denoiser.module)
        for options in (0.0, 0.5, models.TokenMerging(0.5, mlp=True))
    ]
    assert macs[0] > macs[1] > macs[2]


def test_the_finest_level_with_transformers_alone_is_merged(monkeypatch):
    seen = []
    real = nn.token_merging.match_tokens
    monkeypatch.setattr(
        nn.token_merging, "match_tokens", lambda x, size, ratio: seen.append(size) or real(x, size, ratio)
    )
    config = models.UNet2DConditionConfig(
        sample_size=8,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    module = models.UNet2DConditionModel(config, token_merging=models.TokenMerging(0.5))
    models.shapes(module)
    assert seen == [(4, 4)] * 3  # one on the way down, two up


def test_what_cannot_be_merged_is_refused_before_anything_is_compiled(dit, diffusion):
    for pipe in (dit, latent_pipeline()):  # what every call compiles, also in a process of its own
        pipe(KEY, [0], **CALL)
    before = COMPILATIONS.count
    for call, match in (
        (lambda: latent_pipeline()(KEY, [0], token_merging=0.5, **CALL), "for DiT, SiT and the U-Nets"),
        (lambda: dit(KEY, [0], token_merging=0.8, **CALL), "token_merging must be"),
        (lambda: dit(KEY, [0], token_merging="a lot", **CALL), "token_merging must be"),
        (
            lambda: dit(KEY, [0], token_merging=models.TokenMerging(0.5, cross_attention=True), **CALL),
            "cross_attention of token_merging is of U-Nets",
        ),
        (
            lambda: prepare(dit, KEY, [0], token_merging=0.5, num_inference_steps=2),
            "serve pipelines.with_token_merging",
        ),
    ):
        with pytest.raises(InvalidArgumentError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert COMPILATIONS.count == before
    with pytest.raises(InvalidArgumentError, match="leave kept or token_merging out"):
        module = models.DiT(dataclasses.replace(dit.denoiser.config, route=(0, 1)), models.TokenMerging(0.5))
        models.count_macs(module, *module.example_inputs(), kept=np.zeros((1, 4), np.int32))
