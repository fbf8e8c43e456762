"""The versions that are tested are those that pyproject.toml allows."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_lowest_versions_are_the_bounds():
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in PROJECT["dependencies"])
    lines = (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= lowest.keys()
    whole = lambda version: [*map(int, version.split(".")), 0, 0][:3]  # noqa: E731
    assert {name: whole(version) for name, version in lowest.items()} == {
        name: whole(bounds[name]) for name in lowest
    }


def test_every_python_is_tested_with_the_lowest_and_the_newest():
    pythons = [line.split(" :: ")[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    for python in pythons:
        for versions in ("-c tests/lowest.txt", ""):
            assert f'{{ python: "{python}", versions: "{versions}" }}' in workflow
    assert pythons and PROJECT["requires-python"] == f">={pythons[0]}"
