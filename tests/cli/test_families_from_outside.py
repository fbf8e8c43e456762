"""A family of another package: by value, as "package.module:FAMILY", and by an entry point."""

import importlib.metadata
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from command_lines import complaint, run
from tiny_models import text_parts

from jaxldm import diffusion as D
from jaxldm import pipelines, schedulers
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError
from jaxldm.pipelines import families
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from jaxldm.pipelines.families.stable_diffusion_xl import STABLE_DIFFUSION_XL

MODULE = """
from jaxldm import diffusion as D
from jaxldm.pipelines import Defaults, Family, Folder, encode_texts


def encode(pipe, request, *, clip_skip: int = 0):
    def states(texts):
        encoded = encode_texts(pipe.text_encoder, pipe.tokenizer, texts, skip=clip_skip)
        return {"encoder_hidden_states": encoded.hidden}

    return request.both(states)


PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TINY_DIFFUSION = Family(
    name="TinyDiffusion",
    folder=Folder(("TinyDiffusionPipeline",), PARTS),
    denoisers=("unet",),
    encode=encode,
    defaults=lambda pipe: Defaults(guidance_scale=5.0, guidance_rescale=0.7, num_inference_steps=3),
)


def noisy_ddim(eta: float = 0.0) -> D.Solver:
    return D.solvers.ddim(eta=eta)
"""
KEY, PLACE = jax.random.key(3), "outside_family:TINY_DIFFUSION"
IN_FULL = {"guidance_scale": 5.0, "guidance_rescale": 0.7, "num_inference_steps": 3}
NAME = "TinyDiffusionPipeline"


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """The family, in an importable module `outside_family`."""
    root = tmp_path_factory.mktemp("package")
    (root / "outside_family.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        import outside_family

        yield outside_family.TINY_DIFFUSION
    sys.modules.pop("outside_family")


@pytest.fixture(scope="module")
def folder(outside, tmp_path_factory):
    """A model of the family, as `pipelines.save` writes it."""
    root = tmp_path_factory.mktemp("models")
    pipelines.save(pipelines.Pipeline(outside, text_parts(root / "tokenizer")), root / "tiny")
    assert json.loads((root / "tiny" / "model_index.json").read_text())["_class_name"] == NAME
    return root / "tiny"


@pytest.fixture(scope="module")
def pipe(folder):
    return pipelines.load(folder, family=PLACE)


@pytest.fixture
def installed(monkeypatch):
    """The package is installed, with an entry point."""

    def found(group):
        return [importlib.metadata.EntryPoint(NAME, PLACE, group)] * (group == families.ENTRY_POINTS)

    monkeypatch.setattr(importlib.metadata, "entry_points", found)


def test_its_defaults_its_options_and_the_stages_of_others(pipe):
    """The same as Stable Diffusion, said in full."""
    usual = pipelines.Pipeline(STABLE_DIFFUSION, pipe.parts)
    drawn = pipe(KEY, "a cat", "a dog")
    np.testing.assert_array_equal(drawn, usual(KEY, "a cat", "a dog", **IN_FULL))
    assert not np.array_equal(drawn, pipe(KEY, "a cat", "a dog", guidance_rescale=0.0))
    skipped = pipe(KEY, "a cat", "a dog", clip_skip=1)
    np.testing.assert_array_equal(skipped, usual(KEY, "a cat", "a dog", clip_skip=1, **IN_FULL))
    assert np.abs(drawn - skipped).max() > 1e-3


def test_clip_skip_leaves_out_layers_and_keeps_the_last_norm(pipe):
    encoder = pipe.text_encoder
    ids = pipe.tokenizer(["a cat"]).input_ids
    states = encoder(ids).hidden_states
    for skip, hidden in ((0, states[-1]), (1, states[-2])):
        expected = encoder.module.apply({"params": encoder.params}, hidden, method="final_layer_norm")
        cond, uncond = pipe.encode_prompts(["a cat"], ["a cat"], clip_skip=skip)
        np.testing.assert_allclose(cond["encoder_hidden_states"], expected, atol=1e-5)
        np.testing.assert_array_equal(uncond["encoder_hidden_states"], cond["encoder_hidden_states"])


def test_an_installed_package_adds_its_class_name(folder, outside, installed):
    assert families.class_names() == [*pipelines.PIPELINES, NAME]
    assert pipelines.load(folder).family == outside
    assert pipelines.kind_of(folder) == "text-to-image"


def test_a_family_by_value_opens_the_folder_of_another(folder, outside, tmp_path):
    """A guidance rule of one's own on a published model."""
    mine = STABLE_DIFFUSION._replace(name="Mine", combine=lambda uncond, cond, t, condition, per_call: cond)
    pipe = pipelines.load(folder, family=mine)
    assert pipe.family == mine
    pipelines.save(pipe, tmp_path / "mine")
    assert pipelines.load(tmp_path / "mine").family == STABLE_DIFFUSION


def test_on_the_command_line(folder, pipe, tmp_path, capsys):
    words = ["--family", PLACE, "--prompt", "a cat", "--options", "clip_skip=1", "--seed", 3]
    code, _, err = run(capsys, "sample", folder, *words, "--output-dir", tmp_path / "out")
    assert code == 0, err
    saved = np.load(tmp_path / "out" / "samples.npz")["images"]
    expected = pipe(KEY, "a cat", clip_skip=1)
    assert np.abs(saved - (expected + 1) * 127.5).max() < 1
    code, out, _ = run(capsys, "info", folder, "--family", PLACE)
    assert code == 0 and "UNet2DConditionModel" in out and f"--family {PLACE}" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--options", "clip_skp=1"], ["clip_skp", "did you mean 'clip_skip'"]),
        (["--options", "clip_skip"], ["NAME=VALUE", "'clip_skip'"]),
        (["--options", "clip_skip=1", "clip_skip=2"], ["once"]),
        (["--options", "clip_skip=2"], ["2 layers", "it has 2", "0 to 1"]),
        (["--options", "clip_skip=x"], ["whole number", "'x'"]),
        (["--family", "outside_family:TINY"], ["no attribute 'TINY'"]),
        (["--family", "outside_family:encode"], ["must name a Family"]),
        (["--family", "TinyPipeline"], ["unknown family", "package.module:FAMILY"]),
    ],
)
def test_a_wrong_option(folder, tmp_path, capsys, words, expected):
    words = words if "--family" in words else ["--family", PLACE, *words]
    line = complaint(capsys, "sample", folder, "--prompt", "a cat", "--output-dir", tmp_path / "out", *words)
    assert all(word in line for word in expected) and len(line) < 400, line


def test_a_folder_without_its_family(folder):
    with pytest.raises(
        CheckpointError, match=f"unknown class, '{NAME}'.*--family package.module:FAMILY"
    ) as e:
        pipelines.load(folder)
    assert len(str(e.value).replace(str(folder), "")) < 400


@pytest.mark.unchecked  # a stub of a pipeline
@pytest.mark.parametrize(
    ("family", "takes_mask", "distilled", "name"),
    [
        (STABLE_DIFFUSION, False, False, "StableDiffusionPipeline"),
        (STABLE_DIFFUSION, True, False, "StableDiffusionInpaintPipeline"),
        (STABLE_DIFFUSION, False, True, "LatentConsistencyModelPipeline"),
        (STABLE_DIFFUSION._replace(name="Mine"), False, False, "StableDiffusionPipeline"),
        (STABLE_DIFFUSION_XL, False, False, "StableDiffusionXLPipeline"),
        (STABLE_DIFFUSION_XL, True, False, "StableDiffusionXLInpaintPipeline"),
        (STABLE_DIFFUSION_XL, False, True, "StableDiffusionXLPipeline"),
    ],
)
def test_a_folder_names_a_class_of_its_family(family, takes_mask, distilled, name):
    """Latent consistency models of SDXL, too, which have no class of their own."""
    spec = SimpleNamespace(takes_mask=takes_mask)
    pipe = SimpleNamespace(
        family=family, latent_spec=spec, is_guidance_distilled=distilled, text_encoder="some", parts={}
    )
    assert family.folder.class_name(pipe) == name and name in family.folder.class_names


def test_a_file_never_imports_code(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "antigravity:fly"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="unknown class"):
        pipelines.load(tmp_path)
    assert "antigravity" not in sys.modules


def test_names_that_do_not_exist(pipe):
    with pytest.raises(UnknownNameError, match="did you mean 'clip_skip'") as error:
        pipe(KEY, "a cat", clip_skp=1)
    assert len(str(error.value)) < 400
    with pytest.raises(InvalidArgumentError, match="final_norm=False"):
        without = pipe.text_encoder.replace(module=object())
        pipelines.prompts._states(without, pipe.text_encoder(np.zeros((1, 3), np.int32)), 1, True)


def test_a_file_of_a_scheduler_takes_a_rule_and_no_rows():
    path = D.VP.named("linear")
    with pytest.raises(InvalidArgumentError, match=r"a rule for any number of steps.*not Grid"):
        schedulers.to_config(D.epsilon(path), D.trailing(path, 3))


def test_a_solver_from_outside_takes_eta(pipe):
    options = {"num_inference_steps": 3, "output": "latents"}
    drawn = pipe(KEY, "a cat", solver="outside_family:noisy_ddim", eta=0.5, **options)
    np.testing.assert_array_equal(drawn, pipe(KEY, "a cat", solver="ddim", eta=0.5, **options))
    with pytest.raises(InvalidArgumentError, match="no option 'eta'"):
        pipe(KEY, "a cat", solver="jaxldm.diffusion.solvers:euler", eta=0.5)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([".", "--family", "no such thing"], "unknown family 'no such thing'"),
        (["--family", "FluxPipeline"], "--family needs one folder"),
        (["dit-xl-2", "--family", "FluxPipeline"], "--family needs one folder"),
        ([".", "--compare", ".", "--family", "FluxPipeline"], "--family needs one folder"),
    ],
)
def test_info_refuses_a_family_that_does_not_exist_or_has_no_folder(capsys, line, said):
    assert said in complaint(capsys, "info", *line)
