"""A scheduler file that no call could use is refused when its folder is opened, before weights are read."""

import json
import shutil

import pytest
from reference_pipelines import write_sd

from jaxldm import cli, models, pipelines, schedulers
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.scheduler_files import check_time


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_sd(tmp_path_factory.mktemp("schedulers") / "sd")


@pytest.fixture
def folder(written, tmp_path):
    """With weights that cannot be read: a message about anything else comes before them."""
    shutil.copytree(written, tmp_path / "sd")
    for name in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        (tmp_path / "sd" / f"{name}.safetensors").write_bytes(b"")
    return tmp_path / "sd"


def change(folder, **entries):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


WRONG = {
    "class": ({"_class_name": "CogVideoXDDIMScheduler"}, "has _class_name 'CogVideoXDDIMScheduler'"),
    "prediction": ({"prediction_type": "noise"}, "'noise'"),
    "betas": ({"beta_schedule": "steep"}, "beta_schedule 'steep'"),
    "spacing": ({"timestep_spacing": "even"}, "timestep_spacing 'even'"),
    "type": ({"num_train_timesteps": "many"}, "num_train_timesteps must be"),
    "network": (
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
        },
        "UNet2DConditionModel was trained with timesteps",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_no_call_could_use(folder, case, capsys):
    entries, words = WRONG[case]
    change(folder, **entries)
    with pytest.raises(CheckpointError) as caught:
        pipelines.load(folder)
    message = str(caught.value)
    assert words in message and "\n" not in message and message.startswith(str(folder / "scheduler"))
    for command in (["info", str(folder)], ["sample", str(folder), "--prompt", "a cat"]):
        assert cli.main(command) == 2
        assert capsys.readouterr().err == f"jaxldm: {message}\n"


def test_a_solver_alone_that_is_refused(written, tmp_path, capsys):
    """The folder opens, as another solver draws with it; `info` says so."""
    folder = shutil.copytree(written, tmp_path / "sd")
    change(folder, _class_name="UniPCMultistepScheduler", predict_x0=False)
    pipe = pipelines.load(folder)
    assert pipe.grid(solver="ddim")[0].solver == schedulers.from_config(pipe.scheduler, "ddim").solver
    with pytest.raises(CheckpointError, match="has predict_x0 False") as caught:
        pipe.grid()
    assert cli.main(["info", str(folder)]) == 0
    assert f"scheduler needs --solver: {caught.value}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"_class_name": "DDIMScheduler"}, "of a vp path up to 999: take one of flow matching"),
        ({"_class_name": "IPNDMScheduler"}, "IPNDMScheduler is of the path"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, None),
    ],
)
def test_a_network_of_continuous_time(entries, words):
    module, path = models.build("flux-schnell"), schedulers.from_config(entries).path
    if words is None:
        return check_time(module, entries, path)
    with pytest.raises(InvalidArgumentError, match=words):
        check_time(module, entries, path)


def test_a_family_of_ones_own_reads_its_scheduler_itself(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "sd")
    change(folder, _class_name="MyScheduler")
    family = pipelines.PIPELINES["StableDiffusionPipeline"]._replace(name="Mine")
    assert pipelines.load(folder, family=family).scheduler["_class_name"] == "MyScheduler"
