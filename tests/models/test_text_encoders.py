"""What holds for every text encoder: it agrees with transformers, through folders in both directions."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch_reference import assert_agrees
from transformers_reference import opened_in_silence, perturbed, saved_pair

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

CLIP = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 11,
}
T5 = {
    "vocab_size": 60,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
BERT = CLIP | {"hidden_size": 12, "num_attention_heads": 3}
QWEN = {
    "vocab_size": 60,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
CASES = {
    "CLIP of OpenAI, the end of text as in old folders": (
        transformers.CLIPTextModel,
        transformers.CLIPTextConfig(**CLIP, bos_token_id=0, eos_token_id=2, pad_token_id=1),
    ),
    "OpenCLIP with its projection": (
        transformers.CLIPTextModelWithProjection,
        transformers.CLIPTextConfig(**CLIP, hidden_act="gelu", projection_dim=9, eos_token_id=50),
    ),
    "T5 v1.1": (transformers.T5EncoderModel, transformers.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "T5 of the first kind": (transformers.T5EncoderModel, transformers.T5Config(**T5)),
    "MiniLM": (transformers.BertModel, transformers.BertConfig(**BERT)),
    "Qwen3": (transformers.Qwen3Model, transformers.Qwen3Config(**QWEN, rope_theta=1e6)),
    "Mistral": (transformers.MistralModel, transformers.MistralConfig(**QWEN, rope_theta=1e9)),
    "Qwen3 with as many heads of keys, and biases": (
        transformers.Qwen3Model,
        transformers.Qwen3Config(**QWEN | {"num_key_value_heads": 4}, attention_bias=True, rms_norm_eps=1e-3),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return *saved_pair(*CASES[request.param], folder), folder


def texts(batch, length=11):
    """Tokens with the end of text (50) at another position in each row, padding after it, and their mask."""
    input_ids = np.random.default_rng(batch).integers(3, 50, (batch, length)).astype(np.int32)
    mask = np.ones_like(input_ids)
    for row in range(batch):
        end = length - 1 - 3 * row
        input_ids[row, end:] = 50  # CLIP pads with the end of text
        mask[row, end + 1 :] = 0
    return input_ids, mask


def assert_encodes_alike(theirs, module, params, input_ids, mask):
    ours = jax.jit(module.apply)({"params": params}, input_ids, mask)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(input_ids).long(),
            None if mask is None else torch.from_numpy(mask),
            output_hidden_states=True,
        )
    assert_agrees(ours.last_hidden_state, expected.last_hidden_state)
    for name, value in (("pooler_output", ours.pooled), ("text_embeds", ours.text_embeds)):
        if expected.get(name) is not None:
            assert_agrees(value, expected[name])
    assert (ours.text_embeds is None) == (expected.get("text_embeds") is None)
    assert len(ours.hidden_states) == len(expected.hidden_states)
    for state, reference in zip(ours.hidden_states, expected.hidden_states, strict=True):
        assert_agrees(state, reference)


@pytest.mark.parametrize("batch", [1, 3])
def test_agrees_with_transformers(pair, batch):
    """One text without a mask and shorter than it may be, three with padding."""
    theirs, module, params, _ = pair
    input_ids, mask = texts(batch, 11 if batch == 3 else 7)
    assert_encodes_alike(theirs, module, params, input_ids, mask if batch == 3 else None)


def test_transformers_opens_what_we_change_and_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params, _ = pair
    changed = perturbed(params)
    checkpoints.save(tmp_path, module, changed)
    opened = opened_in_silence(type(theirs), tmp_path, caplog, recwarn)
    assert_encodes_alike(opened, module, changed, *texts(3))
    known = theirs.config.to_dict()
    known |= known.get("rope_parameters") or {}  # where transformers 5 keeps rope_theta
    for key, value in json.loads((tmp_path / "config.json").read_text()).items():
        assert key in ("architectures", "_dtype") or known[key] == value, key


def test_saved_and_opened_again_it_is_the_same_bit_for_bit(pair, tmp_path):
    theirs, module, params, _ = pair
    checkpoints.save(tmp_path, module, params)
    again, same = checkpoints.load(tmp_path)
    assert again.config == module.config and type(again) is type(module)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    state = checkpoints.to_state_dict(params)
    published = {re.sub(r"^text_model\.", "", name): tensor for name, tensor in state.items()}
    for name, tensor in theirs.state_dict().items():
        if name != "encoder.embed_tokens.weight":  # T5 ties it to shared.weight
            ours = published[re.sub(r"^text_model\.", "", name)]
            np.testing.assert_array_equal(ours, tensor.numpy(), err_msg=name)


# What transformers 4 wrote into config.json apart from the network, with its values.
OLD_KEYS = {
    "_name_or_path": "", "add_cross_attention": False, "bad_words_ids": None, "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "dtype": "float16", "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None, "finetuning_task": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "id2label": {"0": "LABEL_0"},
    "is_decoder": False, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0}, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
    "output_scores": False, "prefix": None, "problem_type": None, "pruned_heads": {},
    "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True,
    "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": "float16",
    "torchscript": False, "transformers_version": "4.22.0.dev0", "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip


def test_old_configs_are_read_and_strangers_in_them_named(pair):
    config = pair[1].config
    entries = models.config_to_dict(config)
    read = models.config_from_dict(OLD_KEYS | entries)
    assert read == config and read.dtype == "float32"
    with pytest.raises(CheckpointError, match="unknown key 'surprise'"):
        models.config_from_dict(entries | {"surprise": 1})
    with pytest.raises(CheckpointError, match="is_decoder = True"):
        models.config_from_dict(entries | {"is_decoder": True})
    with pytest.raises(CheckpointError, match="'GPT2Model'"):
        models.config_from_dict(entries | {"architectures": ["GPT2Model"]})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_stay_near_float32(pair, dtype):
    """Parameters and computation in 16 bits."""
    _, module, params, _ = pair
    half = models.from_config(dataclasses.replace(module.config, dtype=dtype))
    narrow = jax.tree.map(lambda x: x.astype(dtype), jax.device_get(params))
    input_ids, mask = texts(3)
    rounded = jax.jit(half.apply)({"params": narrow}, input_ids, mask).last_hidden_state
    exact = jax.jit(module.apply)({"params": params}, input_ids, mask).last_hidden_state
    assert rounded.dtype == jnp.dtype(dtype)
    difference = np.abs(np.asarray(rounded, np.float32) - exact).max()
    assert 0 < difference < (0.1 if dtype == "bfloat16" else 0.02) * np.abs(exact).max()


def test_towers_are_found_with_and_without_their_name_in_front(pair, tmp_path):
    """`text_model.` begins CLIP's tensors in published files and `bert.` old BERT's, but not in all files."""
    _, module, params, folder = pair
    tower = {"clip_text_model": "text_model.", "bert": "bert."}.get(module.config.model_type)
    if tower is None:
        pytest.skip("its names are written in one way")
    state = load_file(folder / "model.safetensors")
    bare = {name.removeprefix(tower): tensor for name, tensor in state.items()}
    named = {name if name.startswith("text_projection") else tower + name: bare[name] for name in bare}
    positions = {f"{tower}embeddings.position_ids": np.arange(11)[None]}  # as old files have them
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for state in (bare, named | positions):
        save_file(state, tmp_path / "model.safetensors")
        jax.tree.map(np.testing.assert_array_equal, checkpoints.load(tmp_path)[1], params)


PUBLISHED = {
    "clip-l": (transformers.CLIPTextModel, 123_060_480),
    "openclip-h": (transformers.CLIPTextModel, 340_387_840),
    "openclip-bigg": (transformers.CLIPTextModelWithProjection, 694_659_840),
    "clip-l-vision": (transformers.CLIPVisionModelWithProjection, 303_966_208),
    "t5-base": (transformers.T5EncoderModel, 109_628_544),
    "t5-xl": (transformers.T5EncoderModel, 1_223_527_424),
    "t5-xxl": (transformers.T5EncoderModel, 4_762_310_656),
    "minilm": (transformers.BertModel, 22_713_216),
    "qwen3-4b": (transformers.Qwen3Model, 4_022_468_096),
    "qwen3-8b": (transformers.Qwen3Model, 7_568_405_504),
    "mistral-small-3.2": (transformers.MistralModel, 22_901_314_560),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset):
    kind, published = PUBLISHED[preset]
    entries = models.config_to_dict(models.PRESETS[preset])
    assert entries.pop("architectures") == [kind.__name__]
    config = kind.config_class(**{key: value for key, value in entries.items() if not key.startswith("_")})
    with torch.device("meta"):
        theirs = sum(parameter.numel() for parameter in kind(config).parameters())
    assert models.count_params(preset) == theirs == published


@pytest.mark.parametrize(
    ("preset", "overrides", "error"),
    [
        ("clip-l", {"num_attention_heads": 7}, InvalidArgumentError),
        ("clip-l", {"hidden_act": "swish"}, UnknownNameError),
        ("clip-l-vision", {"patch_size": 15}, InvalidArgumentError),
        ("t5-xxl", {"feed_forward_proj": "gated-silu"}, UnknownNameError),
        ("t5-xxl", {"relative_attention_num_buckets": 7}, InvalidArgumentError),
        ("t5-xxl", {"relative_attention_max_distance": 8}, InvalidArgumentError),
        ("minilm", {"dtype": "float64"}, UnknownNameError),
        ("qwen3-4b", {"num_key_value_heads": 5}, InvalidArgumentError),
        ("qwen3-4b", {"head_dim": 5}, InvalidArgumentError),
        ("qwen3-4b", {"hidden_act": "gelu"}, UnknownNameError),
    ],
)
def test_impossible_configs_are_refused(preset, overrides, error):
    with pytest.raises(error):
        models.build(preset, **overrides)


@pytest.mark.parametrize("preset", ["clip-l", "minilm"])
def test_more_tokens_than_positions_are_refused(preset):
    module = models.build(preset, max_position_embeddings=5, vocab_size=9, num_hidden_layers=1)
    shapes = {"params": models.shapes(module)}
    with pytest.raises(InvalidArgumentError, match="6 tokens per text, but this encoder has positions for 5"):
        jax.eval_shape(module.apply, shapes, np.zeros((1, 6), np.int32))
    with pytest.raises(InvalidArgumentError, match=r"\[B, T\]"):
        jax.eval_shape(module.apply, shapes, np.zeros(5, np.int32))
