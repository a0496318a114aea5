"""Versions are said once, and the lowest are those that a workflow tests."""

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
    """Read a file of constraints, as dict of name to version."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    found = [Requirement(one) for one in lines if one and one[0] != "#"]
    return {
        one.name: Version(str(one.specifier).removeprefix("=="))
        for one in found
    }


def bounds(*extras):
    """Give the lower bounds of the package and of extras."""
    listed = list(PROJECT["dependencies"])
    for extra in extras:
        listed += PROJECT["optional-dependencies"][extra]
    for one in map(Requirement, listed):
        (bound,) = one.specifier
        assert bound.operator == ">=", one
        yield one.name, Version(bound.version)


def test_lowest_versions_are_the_tested_ones():
    lowest = pins("constraints-lowest.txt")
    assert lowest.pop("jaxlib") == lowest["jax"]
    assert dict(bounds(*TESTED)) == lowest


@pytest.mark.parametrize("extra", ["dev", "docs", "notebooks", *TESTED])
def test_pins_are_not_below_the_bounds(extra):
    newest = pins("constraints.txt")
    for one in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(one)
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
