"""The unit, container file and configurations in `docs/serving.md`."""

import json
import re
import shlex
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from typer.testing import CliRunner

from keras_paligemma import cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def block(language, holds):
    """Return the only block of a language that contains a text."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    [one] = [code for code in found if holds in code]
    return one


def instructions():
    """Return (instruction, arguments) pairs of the container file."""
    lines = block("dockerfile", "FROM").splitlines()
    return [line.split(" ", 1) for line in lines if not line.startswith("#")]


def check_command(words):
    """Check that a command's options exist."""
    name, command, *rest = words
    assert name in PROJECT["scripts"]
    shown = CliRunner().invoke(cli.app, [command, "--help"]).output
    options = [word for word in rest if word.startswith("--")]
    assert options == [option for option in options if option in shown]


def test_the_container_file_is_one():
    kinds = [kind for kind, _ in instructions()]
    known = {"FROM", "ARG", "RUN", "USER", "ENV", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert kinds[0] == "FROM"
    assert set(kinds) <= known
    # The server's user is not root and was created before.
    assert kinds.index("USER") > max(
        place for place, kind in enumerate(kinds) if kind == "RUN"
    )


def test_its_command_exists():
    found = dict(instructions())
    check_command(json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"]))


@pytest.mark.parametrize("jax", ["jax", "jax[cuda13]"])
def test_what_it_installs_exists(jax):
    [install] = [
        shlex.split(rest.replace("$JAX", jax))
        for kind, rest in instructions()
        if kind == "RUN" and rest.startswith("pip install")
    ]
    [ours, theirs] = [
        Requirement(name) for name in install[2:] if not name.startswith("-")
    ]
    assert ours.name == PROJECT["name"]
    assert ours.extras <= set(PROJECT["optional-dependencies"])
    assert theirs.extras <= set(metadata("jax").get_all("Provides-Extra"))
    assert jax in PAGE


def test_the_unit_starts_a_command():
    lines = dict(
        line.split("=", 1)
        for line in block("ini", "[Service]").splitlines()
        if "=" in line and not line.startswith("#")
    )
    program, *rest = lines["ExecStart"].split()
    check_command([Path(program).name, *rest])


def test_kserve_gives_the_flags_of_tensorflow_serving():
    service = yaml.safe_load(block("yaml", "InferenceService"))
    flags = service["spec"]["predictor"]["model"]["args"]
    names = [flag.partition("=")[0] for flag in flags]
    shown = block("proto", "tensorflow_model_server")
    assert [name for name in names if name in shown] == names


def test_batch_sizes_end_with_the_largest():
    parameters = block("proto", "tensorflow_model_server")
    sizes = re.findall(r"allowed_batch_sizes: (\d+)", parameters)
    [largest] = re.findall(r"max_batch_size { value: (\d+) }", parameters)
    assert sizes[-1] == largest
    assert sizes == sorted(sizes, key=int)
