"""Misuse of the Python API: it works, or it is refused in one line that names the argument."""

import functools
import importlib
import inspect
import os
from unittest import mock

import flax.linen as nn
import jax
import pytest

from experiments.faults import misuse
from experiments.faults.misuse_cases import Case
from experiments.faults.misuse_files import place
from experiments.faults.misuse_rooms import all_cases
from jaxldm import diffusion as D
from jaxldm import models, training
from jaxldm.errors import CheckpointError

COUNT = 200

pytestmark = pytest.mark.unchecked  # wrong types are what is tried here


@pytest.fixture(autouse=True, scope="module")
def quick():
    """The shapes of a model are found once, and nothing waits for the disk."""
    real, cached = models.shapes, functools.cache(models.shapes)

    def shapes(module):
        return cached(module) if isinstance(module, nn.Module) else real(module)

    with mock.patch.object(models, "shapes", shapes), mock.patch.object(os, "fsync"):
        yield


def test_misuse_is_refused_in_one_line():
    rows = list(misuse.outcomes(None, COUNT, seed=0))
    assert len(rows) == COUNT and not [misuse.line_of(row) for row in rows if row.foreign]


def test_whole_calls_that_are_wrong_are_refused():
    """Another order, functions without a return, parts exchanged, names of other programs, pixels."""
    rows = list(misuse.of_whole_calls())
    assert len(rows) > 90 and [misuse.line_of(row) for row in rows if row.foreign] == []


def test_the_calls_that_misuse_starts_from_are_valid():
    """Else every misuse would be refused for the wrong reason. `misuse.run` tries those that compute, too.

    Calls are traced, which compiles nothing; those that need to see what they compute are made.
    """
    cases = [case for case in all_cases() if case.cheap]
    real = misuse.call

    def traced(function, arguments):
        jax.eval_shape(lambda: (real(function, arguments), None)[1])

    with mock.patch.object(misuse, "call", traced):
        seeing = [case for case in cases if misuse.refused([case])]
    assert misuse.refused(seeing) == [] and len(seeing) < 20


def test_a_valid_call_that_is_refused_is_found():
    wrong = Case("D.Flow", D.Flow, {"shift": -1.0})
    named = wrong._replace(refusal="shift must be")
    found = misuse.refused(
        [wrong, named, named._replace(arguments={"shift": 1.0}), named._replace(refusal="x")]
    )
    assert len(found) == 3 and all(fault.startswith("D.Flow(nothing=valid): ") for fault in found)


def test_a_checkpoint_that_is_not_there_is_not_called_damaged():
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 2: it has \[1\]"):
        training.read_kept(place() / "run", 2)


def test_the_lines_are_for_people():
    """A few whole messages: what is allowed, what was given, what to write instead."""
    rows = {(row.call, row.argument, row.value): row.message for row in misuse.outcomes(MESSAGES)}
    assert rows == MESSAGES


MESSAGES = {
    ("D.denoiser", "prediction", "'x'"): (
        "prediction must be a prediction such as D.epsilon(path), D.prediction('epsilon', path), got 'x'"
    ),
    ("D.solvers.ddim", "eta", "'1'"): (
        "eta must be a number in [0, 1] (0 is deterministic, 1 is DDPM), got '1'"
    ),
    ("D.sample", "solver", "'x'"): (
        "solver must be a solver such as D.solvers.ddim(), got 'x': write D.solvers.make('x')"
    ),
    ("D.sample", "key", "1"): "key must be a key, got 1: write jax.random.key(1)",
    ("D.sample", "grid", "None"): "grid must be a grid such as D.make_grid(path, 50), got None",
    ("D.make_grid", "num_inference_steps", "1.5"): (
        "num_inference_steps must be a whole number of at least 1, got 1.5"
    ),
    ("pipe", "solver", "['x']"): ("unknown solver ['x']: choose one of " + ", ".join(D.solvers.names())),
}


ROOMS = {
    "checkpoints": "checkpoints",
    "data": "data",
    "diffusion": "D",
    "diffusion.search": "D.search",
    "few_steps": "few",
    "metrics": "metrics",
    "metrics.health": "metrics.health",
    "models": "models",
    "models.pruning": "models.pruning",
    "nn": "nn",
    "pipelines": "pipelines",
    "schedulers": "schedulers",
    "serving": "serving",
    "training": "T",
}
# What needs no case of its own. Besides these: functions without arguments, NamedTuples and protocols, which
# hold what they are given until a function that checks is given them, and Flax modules, whose configs check.
EXCEPTIONS = {
    "checkpoints.Tokenizer": "made by load_tokenizer; its call and `save` have cases",
    "D.Cache": "a pytree, made by the functions of D.caching, which have cases",
    "D.CachedDenoiser": "made by D.cached_denoiser",
    "D.Listener": "made by D.listening",
    "D.Path": "the base class of paths, each of which has a case",
    "D.TrainingTimes": "a type",
    "metrics.Report": "the result of evaluate",
    "models.Quantized": "a pytree, made by models.quantize",
    "nn.TransformerOptions": "handed by modules to modules, from configs that are checked",
    "pipelines.Call": "made by the call of a pipeline, which has a case",
    "pipelines.Latents": "checked by the call that it is given to",
    "pipelines.Network": "a pytree, of which JAX makes others that hold anything",
    "pipelines.Pipeline": "made by `load` and `class_to_image`, which have cases",
    "T.StageFolder": "made by RunFolder.stage",
    "T.TrainState": "a pytree, made by create_train_state",
}


def public_functions():
    """The name of each public function and class with arguments, as the cases write it."""
    for room, short in ROOMS.items():
        module = importlib.import_module(f"jaxldm.{room}")
        own = vars(module).items()
        own = [n for n, value in own if getattr(value, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
            if takes_arguments(getattr(module, name)):
                yield f"{short}.{name}"


def takes_arguments(value):
    if inspect.isclass(value):
        plain = hasattr(value, "_fields") or getattr(value, "_is_protocol", False)
        return not plain and not issubclass(value, nn.Module)
    return callable(value) and not (inspect.isroutine(value) and not inspect.signature(value).parameters)


def test_every_public_function_has_a_case():
    tried = {case.name for case in all_cases()}
    known = set(public_functions())
    assert known - tried - EXCEPTIONS.keys() == set()
    assert EXCEPTIONS.keys() <= known, "an exception for what is not there"
    assert not EXCEPTIONS.keys() & tried, "an exception for what has a case"
