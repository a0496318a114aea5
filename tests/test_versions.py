"""Versions are declared once, and a workflow tests the lowest ones."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import keras_paligemma

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TESTED = ("jax", "train", "eval", "hf")


def pins(name):
    """Read a constraints file as a dict of name to version."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and line[0] != "#"]
    return {
        requirement.name: Version(str(requirement.specifier).removeprefix("=="))
        for requirement in found
    }


def bounds(*extras):
    """Return the lower bounds of the package and its extras."""
    listed = list(PROJECT["dependencies"])
    for extra in extras:
        listed += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, listed):
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        yield requirement.name, Version(bound.version)


def test_lowest_versions_are_the_tested_ones():
    lowest = pins("constraints-lowest.txt")
    assert lowest.pop("jaxlib") == lowest["jax"]
    assert dict(bounds(*TESTED)) == lowest


@pytest.mark.parametrize("extra", ["dev", "docs", "notebooks", *TESTED])
def test_pins_are_not_below_the_bounds(extra):
    newest = pins("constraints.txt")
    for line in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if requirement.name in newest:
            assert newest[requirement.name] in requirement.specifier


def test_version_is_in_one_place():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert str(Version(keras_paligemma.__version__))
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## [{keras_paligemma.__version__}]" in changelog
    assert "version:" not in (ROOT / "CITATION.cff").read_text("utf-8").replace(
        "cff-version:", ""
    )
