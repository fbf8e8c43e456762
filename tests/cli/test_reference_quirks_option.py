"""`--reference-quirks` of the commands that draw: it reaches `pipelines.load`."""

import pytest

from jaxldm import pipelines
from jaxldm.commands import eval_images, inspect_subject, serve
from jaxldm.commands.eval import Eval
from jaxldm.commands.inspect import Inspect
from jaxldm.errors import InvalidArgumentError


class Loaded(Exception):
    """The options of `pipelines.load`."""


@pytest.fixture
def watched(monkeypatch):
    def load(folder, **options):
        raise Loaded(options)

    monkeypatch.setattr(pipelines, "load", load)
    monkeypatch.setattr(pipelines, "kind_of", lambda folder: "run")
    monkeypatch.setattr(inspect_subject, "is_run_of_captions", lambda folder: False)
    monkeypatch.setattr(eval_images, "is_run", lambda folder: folder == "run")


@pytest.mark.parametrize("quirks", [True, False])
def test_what_draws_is_loaded_so(watched, quirks):
    calls = [
        lambda: eval_images.generated_images(Eval(folder="run", reference_quirks=quirks), None),
        lambda: inspect_subject.load_subject(Inspect(folder="run", reference_quirks=quirks)),
        lambda: serve.make_worker("run", {"reference_quirks": quirks}, None, {"name": "run"}, quiet=True),
    ]
    for call in calls:
        with pytest.raises(Loaded) as found:
            call()
        assert found.value.args[0]["reference_quirks"] is quirks


def test_pictures_of_a_folder_are_not_drawn(watched):
    with pytest.raises(InvalidArgumentError, match="--reference-quirks is of a run"):
        eval_images.generated_images(Eval(folder="pictures", reference_quirks=True), None)
