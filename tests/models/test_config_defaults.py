"""An absent key of config.json means what it does in diffusers and transformers; wrong values are refused."""

import dataclasses
import inspect

import diffusers
import pytest
import transformers
from diffusers.pipelines.deprecated import wuerstchen
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxldm import models
from jaxldm.errors import CheckpointError
from jaxldm.models.config import MOST_BLOCKS, check_size
from jaxldm.models.registry import ARCHITECTURES

DIFFUSERS = {
    **{
        name: getattr(diffusers, name)
        for name, (_, kind) in ARCHITECTURES.items()
        if kind.published and kind.library == "diffusers" and kind.package is None
    },
    "WuerstchenPrior": wuerstchen.WuerstchenPrior,
    "WuerstchenDiffNeXt": wuerstchen.modeling_wuerstchen_diffnext.WuerstchenDiffNeXt,
    "PaellaVQModel": wuerstchen.PaellaVQModel,
}
TRANSFORMERS = {
    "CLIPTextModel": transformers.CLIPTextConfig,
    "CLIPTextModelWithProjection": transformers.CLIPTextConfig,
    "CLIPVisionModelWithProjection": transformers.CLIPVisionConfig,
    "CLIPModel": transformers.CLIPConfig,
    "T5EncoderModel": transformers.T5Config,
    "BertModel": transformers.BertConfig,
    "Qwen3Model": transformers.Qwen3Config,
    "Qwen2_5_VLTextModel": transformers.Qwen2_5_VLTextConfig,
    "MistralModel": transformers.MistralConfig,
    "LDMBertModel": LDMBertConfig,
    "SiglipVisionModel": transformers.SiglipVisionConfig,
}


def plain(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", DIFFUSERS)
def test_an_absent_key_means_what_it_means_in_diffusers(name):
    config = models.config_from_dict({"_class_name": name})
    ours = {**type(config).fixed, **config.to_dict()}
    signature = inspect.signature(DIFFUSERS[name].__init__).parameters
    theirs = {key: parameter.default for key, parameter in signature.items() if key != "self"}
    known = ours.keys() & theirs.keys()
    assert len(known) >= min(5, len(theirs))
    assert {key: plain(ours[key]) for key in known} == {key: plain(theirs[key]) for key in known}
    unknown = theirs.keys() - ours.keys() - type(config).ignored
    assert not unknown, f"keys of diffusers that would be refused: {unknown}"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_an_absent_key_means_what_it_means_in_transformers(name):
    config = models.config_from_dict({"architectures": [name]})
    ours, theirs = config.to_dict(), TRANSFORMERS[name]().to_dict()
    rope = theirs.pop("rope_parameters", None) or {}
    known = (ours.keys() & theirs.keys()) - {"text_config", "vision_config"}
    theirs = theirs | {key: rope[key] for key in ("rope_theta",) if key in rope}
    assert len(known) >= 2
    assert {key: plain(ours[key]) for key in known} == {key: plain(theirs[key]) for key in known}
    assert models.config_from_dict(TRANSFORMERS[name]().to_dict() | {"architectures": [name]})


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"layers_per_block": "2"}, "layers_per_block must be a whole number, not '2'"),
        ({"layers_per_block": True}, "layers_per_block must be a whole number, not True"),
        ({"latent_channels": 0}, "latent_channels must be from 1 to"),
        ({"latent_channels": 10**12}, "latent_channels must be from 1 to"),
        ({"block_out_channels": [64, None]}, r"block_out_channels\[1\] must be a whole number"),
        ({"block_out_channels": {}}, "block_out_channels must be a list of whole numbers"),
        ({"scaling_factor": 1e39}, "scaling_factor is no number of float32"),
        ({"sample_size": [1, 2, 3]}, "sample_size must be a whole number or a list of whole numbers"),
        ({"latnet_channels": 4}, "unknown key 'latnet_channels'; did you mean 'latent_channels'"),
        ({"_class_name": ["AutoencoderKL"]}, "_class_name"),
        ({"_class_name": "AutoencoderKl"}, "did you mean 'AutoencoderKL'"),
        ({"norm_num_groups": 0}, "norm_num_groups must be from 1"),
    ],
)
def test_wrong_types_and_ranges_are_refused_with_their_key(entries, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        models.config_from_dict({"_class_name": "AutoencoderKL"} | entries)
    assert "config.json" in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(0),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200)
@given(data=st.data())
def test_any_value_of_any_key_is_read_or_refused(data):
    name = data.draw(st.sampled_from(list(ARCHITECTURES)))
    library = ARCHITECTURES[name][1].library
    entries = {"_class_name": name} if library == "diffusers" else {"architectures": [name]}
    keys = [*models.config_from_dict(entries).to_dict(), "rope_parameters", "layer_types", "num_class_embeds"]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), JSON, min_size=1, max_size=3))
    try:
        models.config_from_dict(entries | changes)
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_more_blocks_than_tensors_are_refused_before_they_are_built(architecture):
    """Every field that multiplies blocks is one of `BLOCK_COUNTS`: a small file is read in no time."""
    kind = ARCHITECTURES[architecture][1]
    fields = [field.name for field in dataclasses.fields(kind)]
    counts = [
        field for field in fields if "layers" in field or "blocks" in field or field in ("depth", "levels")
    ]
    of_diffusers = kind.library == "diffusers"
    entries = {"_class_name": architecture} if of_diffusers else {"architectures": [architecture]}
    whole = models.config_from_dict(entries).to_dict()
    for field in counts:
        if not isinstance(whole[field], int) or isinstance(whole[field], bool):
            continue
        with pytest.raises(CheckpointError, match=f"config.json: {field} must be from . to {MOST_BLOCKS}"):
            models.config_from_dict(entries | {field: 10**9})
        try:
            config = models.config_from_dict(entries | {field: 5001})
        except CheckpointError:
            continue  # by a check of its own
        with pytest.raises(CheckpointError, match=f"but its weights hold 20000 tensors: .*{field} = 5001"):
            check_size(config, 20_000, 10**9)


@pytest.mark.parametrize("preset", models.PRESETS)
def test_published_models_are_not_larger_than_their_files(preset):
    """The bounds that small files are held to leave room for every preset: its blocks have enough tensors."""
    config = models.PRESETS[preset]
    assert config.num_blocks() <= 300 and config.table_size() <= 2**25
