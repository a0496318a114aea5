"""The command line on the goldens and the nano preset."""

import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from keras_paligemma import cli
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints import npz
from tests.conftest import GOLDEN

NANO = "pali_gemma2_nano_112"
SET = [
    *("--set", "query_pre_attention_scalar=24"),
    *("--set", "attention_logit_soft_cap=50"),
    *("--set", "final_logit_soft_cap=30"),
]


def call(*arguments):
    """Run a command and give what it printed; its errors are ours."""
    result = CliRunner().invoke(
        cli.app, [str(one) for one in arguments], catch_exceptions=False
    )
    return result.exit_code, result.output


def test_inspect_a_whole_checkpoint():
    code, output = call("inspect", GOLDEN / "tiny_headdim.b16.npz", *SET)
    assert code == 0
    assert "big_vision" in output
    assert "bfloat16" in output
    assert "every weight is there" in output


def test_inspect_reads_no_values(monkeypatch):
    def refuse(self, key):
        raise AssertionError(key)

    with npz.open_npz([GOLDEN / "tiny_headdim.npz"]) as tensors:
        monkeypatch.setattr(type(tensors), "read", refuse)
    code, _ = call("inspect", GOLDEN / "tiny_headdim.npz", *SET)
    assert code == 0


def test_inspect_names_what_is_missing(arrays, tmp_path):
    changed = dict(arrays)
    del changed["params/llm/final_norm/scale"]
    np.savez(tmp_path / "x.npz", **changed)
    code, output = call("inspect", tmp_path / "x.npz", *SET)
    assert code == 1
    assert "missing: params/llm/final_norm/scale (64,)" in output


@pytest.mark.parametrize("to", formats.FORMATS)
def test_there_and_back(tmp_path, to):
    """The nano preset in another format, and from there as it was."""
    name = "there.npz" if to == "big_vision" else "there"
    code, output = call("convert", NANO, tmp_path / name, "--to", to)
    assert code == 0
    assert "2,092,464 parameters" in output
    back = tmp_path / "back"
    extra = []
    if to == "big_vision":
        extra = ["--tokenizer", f"presets/{NANO}/tokenizer.model", *NANO_SET]
    if to == "keras":
        shutil.copytree(tmp_path / name, back)
    else:
        code, _ = call(
            "convert", tmp_path / name, back, "--to", "keras", *extra
        )
    assert code == 0
    one, two = formats.resolve(NANO), formats.find(back)
    for tower in ("vision_encoder", "text_decoder"):
        assert one.config["backbone"][tower] == two.config["backbone"][tower]
    with one.open() as wanted, two.open() as found:
        assert wanted.shapes == found.shapes
        for key in wanted.shapes:
            np.testing.assert_array_equal(wanted.read(key), found.read(key))


NANO_SET = [
    *("--set", "query_pre_attention_scalar=32"),
    *("--set", "attention_logit_soft_cap=50"),
    *("--set", "final_logit_soft_cap=30"),
]


def test_another_dtype_in_pieces(tmp_path):
    code, _ = call(
        "convert",
        NANO,
        tmp_path / "x.npz",
        *("--to", "big_vision", "--dtype", "bfloat16"),
        *("--piece-size", 2_000_000),
    )
    assert code == 0
    found = formats.find(tmp_path / "x.npz", cli.read_fields(NANO_SET[1::2]))
    assert len(found.files) == 3
    assert found.config["backbone"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "pali_gemma2_pt_3b_225"], "pali_gemma2_pt_3b_224"),
        (["convert", NANO, "x", "--to", "onnx"], "'onnx'"),
        (["inspect", NANO, "--set", "rope_base"], "--set name=number"),
    ],
)
def test_errors_are_one_message(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["keras-paligemma", *arguments])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Error: ")
    assert message in printed
    assert "Traceback" not in printed
