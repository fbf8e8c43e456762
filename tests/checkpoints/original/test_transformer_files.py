"""Original files of transformers: the reference reads what we write, and we read back every bit."""

import dataclasses
from typing import Any, NamedTuple

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from transformer_cases import CASES, SD3

from jaxldm import checkpoints, models
from jaxldm.checkpoints import load_single_file, save_single_file
from jaxldm.checkpoints.original.layout import to_original
from jaxldm.checkpoints.original.single_file import FAMILIES
from jaxldm.checkpoints.safetensors_file import read_safetensors, safetensors_bytes
from jaxldm.errors import CheckpointError


class Written(NamedTuple):
    """A family's models: the reference's, ours, and the file that we wrote of all components."""

    family: str
    theirs: dict
    ours: dict
    path: Any


def as_preset(family, name, config):
    """The config with the fields that no file holds as in the preset, which a loaded one takes them from."""
    not_in_files = ("sample_size", "force_upcast", "scaling_factor", "shift_factor", "hidden_act")
    not_in_files += ("bos_token_id", "eos_token_id", "pad_token_id", "feed_forward_proj")
    if (family, name) == ("FLUX", "text_encoder"):
        not_in_files += ("projection_dim",)
    fields = {field.name for field in dataclasses.fields(config)}
    preset = models.PRESETS[FAMILIES[family].components[name].preset]
    return dataclasses.replace(config, **{key: getattr(preset, key) for key in not_in_files if key in fields})


def as_ours(family, theirs, folder):
    parts = {}
    for name, model in theirs.items():
        model.save_pretrained(folder / name)
        module, params = checkpoints.load(folder / name)
        parts[name] = (models.from_config(as_preset(family, name, module.config)), params)
    return parts


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    theirs = CASES[request.param].random_models()
    generator = torch.Generator().manual_seed(0)
    for model in theirs.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
    if request.param == "SD3":
        torch.nn.init.normal_(theirs["transformer"].pos_embed.pos_embed, generator=generator)  # not computed
        torch.nn.init.eye_(theirs["text_encoder"].text_projection.weight)
    folder = tmp_path_factory.mktemp("written")
    ours = as_ours(request.param, theirs, folder / "published")
    path = folder / "all.safetensors"
    save_single_file(path, ours)
    return Written(request.param, theirs, ours, path)


def of_family(family):
    return pytest.mark.parametrize("written", [family], indirect=True)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, (module, params) in expected.items():
        assert found[name][0] == module, name
        jax.tree.map(np.testing.assert_array_equal, found[name][1], params)


def assert_published(found, model):
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy(), err_msg=name)


def as_torch(state):
    return {name: torch.from_numpy(np.array(tensor)) for name, tensor in state.items()}


def test_the_reference_converts_our_file_to_the_published_tensors(written, tmp_path):
    """And we read one that also holds what such files hold."""
    case, path = CASES[written.family], tmp_path / "transformer.safetensors"
    save_single_file(path, {"transformer": written.ours["transformer"]})
    state = read_safetensors(path)
    for name, shape in case.shapes.items():
        assert state[case.prefix + name].shape == shape
    path.write_bytes(safetensors_bytes(state | case.more_alone))
    assert_published(case.convert(as_torch(read_safetensors(path))), written.theirs["transformer"])
    assert_same(load_single_file(path), {"transformer": written.ours["transformer"]})


def test_all_components_in_one_file(written, tmp_path):
    """With what such files also hold."""
    case, state = CASES[written.family], read_safetensors(written.path)
    assert all(name in state for name in case.names)
    start = "model." if len(written.ours) > 1 else ""
    own = {name: tensor for name, tensor in as_torch(state).items() if name.startswith(start)}
    assert_published(case.convert(own), written.theirs["transformer"])
    assert_same(load_single_file(written.path), written.ours)
    (tmp_path / "more.safetensors").write_bytes(safetensors_bytes(state | case.more(state)))
    assert_same(load_single_file(tmp_path / "more.safetensors"), written.ours)


@pytest.mark.parametrize(
    ("family", "preset"), [(family, preset) for family, case in CASES.items() for preset in case.published]
)
def test_presets_stand_in_the_published_files(family, preset):
    """Names, shapes and number of tensors; and from them, the preset is found again."""
    config, part = models.PRESETS[preset], FAMILIES[family].components["transformer"]
    read_with, kind, number, expected = CASES[family].published[preset]
    with torch.device("meta"):
        model = getattr(diffusers, models.class_name(config)).from_config(models.config_to_dict(config))
    theirs = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = {name: np.broadcast_to(np.float32(0), tuple(shape)) for name, shape in theirs.items()}
    shapes = {name: tensor.shape for name, tensor in to_original(tensors, part.table(config)).items()}
    assert number is None or len(shapes) == number
    assert {name: shapes.get(name) for name in expected} == expected
    template = models.PRESETS[read_with]
    if family == "Z-Image":
        template = dataclasses.replace(template, n_layers=1, n_refiner_layers=1)
    assert part.config(shapes, template) == config
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert kind is None or single_file_utils.infer_diffusers_model_type(meta) == kind
    converted = CASES[family].convert(meta)
    assert {name: tensor.shape for name, tensor in converted.items()} == theirs


@pytest.mark.parametrize(
    ("written", "name", "change", "message"),
    [(family, *change) for family, case in CASES.items() for change in case.changes],
    indirect=["written"],
)
def test_what_does_not_fit_is_named(written, tmp_path, name, change, message):
    path, name = tmp_path / "changed.safetensors", CASES[written.family].prefix + name
    save_single_file(path, {"transformer": written.ours["transformer"]})
    state = dict(read_safetensors(path))
    if change is None:
        del state[name]
    else:
        state[name] = np.zeros(change, np.float32)
    path.write_bytes(safetensors_bytes(state))
    with pytest.raises(CheckpointError, match=message):
        load_single_file(path)


@of_family("FLUX")
def test_an_autoencoder_alone(written, tmp_path):
    path = tmp_path / "ae.safetensors"
    save_single_file(path, {"vae": written.ours["vae"]})
    state = read_safetensors(path)
    assert "decoder.up.1.block.0.conv1.weight" in state
    config = dict(written.theirs["vae"].config)
    assert_published(
        single_file_utils.convert_ldm_vae_checkpoint(as_torch(state), config), written.theirs["vae"]
    )
    assert_same(load_single_file(path), {"vae": written.ours["vae"]})


@of_family("FLUX")
def test_an_autoencoder_alone_keeps_its_factors(written, tmp_path):
    """No tensor holds them, so that without the metadata of the file those of FLUX are taken."""
    module, params = written.ours["vae"]
    other = type(module)(dataclasses.replace(module.config, scaling_factor=1.5305, shift_factor=0.0609))
    path = tmp_path / "ae.safetensors"
    save_single_file(path, {"vae": (other, params)})
    assert_same(load_single_file(path), {"vae": (other, params)})
    path.write_bytes(safetensors_bytes(read_safetensors(path)))
    assert load_single_file(path)["vae"][0] == module
    path.write_bytes(safetensors_bytes(read_safetensors(path), {"vae.scaling_factor": "0"}))
    with pytest.raises(CheckpointError, match=r"ae\.safetensors.*scaling_factor must be positive"):
        load_single_file(path)


def test_transformers_without_an_original_layout_are_refused(tmp_path):
    dit = models.build("tiny-dit", depth=1)
    with pytest.raises(CheckpointError, match="a DiT has no original single-file layout"):
        save_single_file(tmp_path / "x.safetensors", {"transformer": (dit, {})})


@of_family("SD3")
def test_the_reference_converts_the_other_components(written):
    tensors, theirs = as_torch(read_safetensors(written.path)), written.theirs
    found = single_file_utils.convert_ldm_vae_checkpoint(tensors, dict(theirs["vae"].config))
    assert_published(found, theirs["vae"])
    for name, prefix in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        prefix = f"text_encoders.{prefix}.transformer."
        found = single_file_utils.convert_ldm_clip_checkpoint(tensors, prefix)
        if name == "text_encoder":
            assert "text_projection.weight" not in found  # the reference takes the identity
            found["text_projection.weight"] = torch.eye(64)
        assert_published(found, theirs[name])
    found = single_file_utils.convert_sd3_t5_checkpoint_to_diffusers(tensors)
    found["encoder.embed_tokens.weight"] = found["shared.weight"]
    assert_published(found, theirs["text_encoder_3"])


@of_family("SD3")
def test_a_t5_of_eight_bits(written, tmp_path):
    """As in sd3_medium_incl_clips_t5xxlfp8.safetensors."""
    state = dict(read_safetensors(written.path))
    for name in [name for name in state if ".t5xxl." in name]:
        state[name] = np.asarray(state[name]).astype(ml_dtypes.float8_e4m3fn)
    (tmp_path / "fp8.safetensors").write_bytes(safetensors_bytes(state))
    found = load_single_file(tmp_path / "fp8.safetensors", dtype="bfloat16")
    module, params = found["text_encoder_3"]
    expected = state["text_encoders.t5xxl.transformer.shared.weight"].astype(np.float32)
    assert module.config.dtype == "bfloat16" and found.keys() == written.ours.keys()
    np.testing.assert_array_equal(params["shared"]["embedding"].astype(np.float32), expected)


@of_family("SD3")
def test_some_components(written, tmp_path):
    """As published without the encoders, with the CLIPs alone, and the transformer under bare names."""
    path = tmp_path / "parts.safetensors"
    for names in (
        ("transformer", "vae"),
        ("transformer", "text_encoder", "text_encoder_2"),
        ("transformer",),
    ):
        parts = {name: written.ours[name] for name in names}
        save_single_file(path, parts)
        assert_same(load_single_file(path), parts)
    bare = {key.removeprefix("model.diffusion_model."): t for key, t in read_safetensors(path).items()}
    path.write_bytes(safetensors_bytes(bare))
    assert_same(load_single_file(path), {"transformer": written.ours["transformer"]})
    texts = {name: part for name, part in written.ours.items() if name.startswith("text_encoder")}
    save_single_file(path, texts)
    assert_same(load_single_file(path), texts)


def test_the_first_sd3_has_neither_norms_nor_a_second_attention(tmp_path):
    transformer = {"transformer": diffusers.SD3Transformer2DModel(**SD3, num_layers=2, patch_size=1)}
    parts = as_ours("SD3", transformer, tmp_path / "published")
    save_single_file(tmp_path / "sd3.safetensors", parts)
    assert_same(load_single_file(tmp_path / "sd3.safetensors"), parts)
    found = CASES["SD3"].convert(as_torch(read_safetensors(tmp_path / "sd3.safetensors")))
    assert_published(found, transformer["transformer"])


@of_family("SD3")
def test_a_projection_that_the_original_does_not_have_is_refused(written, tmp_path):
    module, params = written.ours["text_encoder"]
    turned = params | {"text_projection": {"kernel": params["text_projection"]["kernel"][::-1]}}
    parts = written.ours | {"text_encoder": (module, turned)}
    with pytest.raises(CheckpointError, match=r"no place for text_projection\.weight, which is no identity"):
        save_single_file(tmp_path / "x.safetensors", parts)
