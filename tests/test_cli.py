"""The command line with the goldens and the nano preset."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import fsspec
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file
from typer.testing import CliRunner

import keras_paligemma
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import cli
from keras_paligemma import downloads
from keras_paligemma import shipped
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.storage import npz
from keras_paligemma.cli.convert import progress
from keras_paligemma.cli.environment import command_environment
from keras_paligemma.cli.options import read_fields
from keras_paligemma.data import JSONLSource
from keras_paligemma.data import check
from keras_paligemma.export import targets
from keras_paligemma.layers.weight import Weight
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import PRESETS

NANO = "pali_gemma2_nano_112"
SET = [
    *("--set", "query_pre_attention_scalar=24"),
    *("--set", "attention_logit_soft_cap=50"),
    *("--set", "final_logit_soft_cap=30"),
]


def call(*arguments):
    """Run a command and return its exit code and output."""
    result = CliRunner().invoke(
        cli.app,
        [str(argument) for argument in arguments],
        catch_exceptions=False,
    )
    return result.exit_code, result.output


def run(code, **environment):
    """Run code in a process without a chosen backend; return its output."""
    inherited = {
        key: value for key, value in os.environ.items() if "KERAS" not in key
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env=inherited | environment,
    ).stdout


COMMANDS = (
    "inspect",
    "convert",
    "generate",
    "finetune",
    "plan",
    "export",
    "evaluate",
    "benchmarks",
    "serve",
    "examples",
    "data",
)


def test_help_imports_typer_alone():
    code = f"""
import sys
from keras_paligemma import cli
for command in {COMMANDS}:
    sys.argv = ["keras-paligemma", command, "--help"]
    try:
        cli.main()
    except SystemExit:
        pass
print({{"numpy", "keras", "tensorflow", "jax", "torch", "rich", "h5py"}}
      & set(sys.modules))
"""
    output = run(code)
    assert output.count("Usage: ") == len(COMMANDS)
    assert output.rstrip().endswith("set()")


def test_an_interrupted_command_ends_at_once(monkeypatch):
    """Python's own end crashed under XLA, which still computed a step."""
    ended = []

    def press(*args, **kwargs):
        raise KeyboardInterrupt

    def end(status):
        ended.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(sys, "argv", ["keras-paligemma", "benchmarks"])
    monkeypatch.setattr("keras_paligemma.evaluation.registry.benchmarks", press)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit):
        cli.main()
    assert ended == [130]


def test_version_and_completion():
    start = "from keras_paligemma import __main__; __main__.main()"
    code = f"import sys; sys.argv = ['keras-paligemma', '--version']; {start}"
    assert run(code) == f"keras_paligemma {keras_paligemma.__version__}\n"
    completed = run(
        f"import sys; sys.argv = ['keras-paligemma']; {start}",
        _KERAS_PALIGEMMA_COMPLETE="complete_bash",
        COMP_WORDS="keras-paligemma ",
        COMP_CWORD="1",
    )
    assert completed.split() == list(COMMANDS)


def test_commands_without_tensorflow_and_its_log_lines():
    """The user has chosen no backend, and TensorFlow is installed."""
    code = f"""
import sys
from keras_paligemma import cli
for arguments in (
    ["inspect", "{NANO}"],
    ["plan", "--preset", "{NANO}", "--estimate"],
):
    sys.argv = ["keras-paligemma", *arguments]
    try:
        cli.main()
    except SystemExit as error:
        assert not error.code
print("tensorflow" in sys.modules, "NoTensorFlow" in str(sys.meta_path))
"""
    output = run(code)
    assert output.lstrip().startswith("format  keras")
    assert "every weight is there" in output and "enable_lora" in output
    assert output.endswith("\nFalse False\n")


def test_hidden_tensorflow_seems_not_to_be_installed():
    code = """
import importlib.util
from keras_paligemma.cli.environment import command_environment
with command_environment():
    try:
        import tensorflow
    except ModuleNotFoundError as error:
        print(error)
    print(importlib.util.find_spec("tensorflow"))
print(importlib.util.find_spec("tensorflow") is not None)
"""
    lines = run(code, KERAS_BACKEND="jax").splitlines()
    assert lines == [
        "tensorflow is hidden: the backend is jax.",
        *("None", "True"),
    ]


def test_torch_is_imported_where_tensorflow_is_hidden():
    pytest.importorskip("torch")
    code = """
from keras_paligemma.cli.environment import command_environment
with command_environment():
    import keras
    print(keras.backend.backend())
"""
    assert run(code, KERAS_BACKEND="torch") == "torch\n"


def test_closed_streams_are_written_to_nevertheless(monkeypatch):
    """As by `>&-`: libraries ask whether it is a terminal."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with command_environment():
        opened = [sys.stdout, sys.stderr]
        assert not any(stream.isatty() for stream in opened)
    for stream in opened:
        stream.close()


def test_an_empty_backend_is_none(monkeypatch):
    """Keras would take its default, TensorFlow, which then was hidden."""
    monkeypatch.setenv("KERAS_BACKEND", "")
    with command_environment():
        assert "KERAS_BACKEND" not in os.environ


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


def test_examples_are_written(tmp_path, monkeypatch):
    code, output = call("examples", tmp_path / "examples")
    assert code == 0 and output.count("wrote ") == 3
    source = JSONLSource(tmp_path / "examples" / "finetune" / "train.jsonl")
    assert len(source) == 8 and check(source) == []
    assert (tmp_path / "examples" / "pictures" / "scene_0.png").exists()
    assert (tmp_path / "examples" / "words" / "word_0.png").exists()
    # In a checkout, the written files are the files that are read.
    monkeypatch.chdir(shipped.folder("examples").parent)
    assert call("examples")[0] == 0


def test_files_of_the_home_are_no_files_of_a_folder_named_so(
    tmp_path, monkeypatch
):
    """Shells do not expand `--output=~/x`, and nobody expands it in TOML."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    lines = "~/examples/finetune/train.jsonl"
    assert call("examples", "~/examples")[0] == 0
    arguments = ("data", "convert", lines, "~/objects.json", "--to", "coco")
    assert call(*arguments)[0] == 0
    (home / "used").write_text("")
    (home / "run.toml").write_text(f'data = "{lines}"\noutput = "~/used"')
    with pytest.raises(ValueError, match=f"where {home / 'used'} is a file"):
        call("finetune", "--config=~/run.toml", "--preset", NANO)
    wanted = ["examples", "objects.json", "run.toml", "used"]
    assert sorted(path.name for path in home.iterdir()) == wanted
    assert not list(here.iterdir())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return the nano preset as a transformers folder."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    assert call("convert", NANO, folder, "--to", "transformers")[0] == 0
    return folder


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """Fake Hugging Face's hub with the folder, but without its weights."""

    filesystem = fsspec.filesystem("memory", skip_instance_cache=True)
    filesystem.store.clear()
    for path in (*published.iterdir(), Path(__file__)):
        filesystem.pipe(f"/me/m/{path.name}", path.read_bytes())
    monkeypatch.setattr(downloads, "_filesystem", {"hf": filesystem}.get)

    def snapshot_download(model, revision, allow_patterns):
        folder = tmp_path / "cache"
        folder.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in published.glob(pattern):
                shutil.copy(path, folder)
        return str(folder)

    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    yield tmp_path / "cache"
    filesystem.store.clear()


def test_inspect_on_a_hub_reads_headers_alone(hub, published):
    code, output = call("inspect", "hf://me/m")
    assert code == 0
    assert "transformers" in output and "every weight is there" in output
    assert "2,092,464" in output and "float32" in output
    size = sum(path.stat().st_size for path in published.iterdir())
    assert f"{size:,}" in output
    assert not list(hub.glob("*.safetensors"))
    assert (hub / "tokenizer.model").exists()


def test_a_preprocessor_from_a_hub_needs_no_weights(hub):
    from keras_paligemma import PaliGemmaCausalLMPreprocessor

    read = PaliGemmaCausalLMPreprocessor.from_preset("hf://me/m")
    assert read.image_converter.image_size == (112, 112)
    assert not list(hub.glob("*.safetensors"))


def test_inspect_of_what_tells_no_sizes(monkeypatch):
    """An .npz on a hub is listed, a name is described, without downloads."""

    def refuse(*args, **kwargs):
        raise AssertionError(args)

    files = {"X.npz.part-0": 5_000, "X.npz.part-1": 17}
    monkeypatch.setattr(downloads, "download", refuse)
    monkeypatch.setattr(downloads, "sizes", lambda handle: files)
    code, output = call("inspect", "hf://me/m-jax")
    assert code == 0
    assert "X.npz.part-0  5,000 bytes" in output and "5,017" in output
    assert "they were not looked into" in output
    code, output = call("inspect", "hf://google/paligemma2-3b-pt-224-jax")
    assert code == 0
    assert "3,032,094,960" in output and "5,017" in output
    code, output = call("inspect", "pali_gemma2_pt_28b_448")
    assert code == 0
    assert "hf://google/paligemma2-28b-pt-448" in output


@pytest.mark.parametrize("looks_on", [False, True])
def test_progress(monkeypatch, capsys, looks_on):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: looks_on, raising=False)
    layer = np.zeros((3, 5), "float32")
    weights = {"a": Weight((layer,)), "b": Weight((layer, layer), "unrolled")}
    with progress(weights, Path("folder/there")) as show:
        for weight in weights.values():
            for array in weight.read_layers():
                show(array)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("180/180 bytes" in printed.err) is looks_on
    assert ("there" in printed.err) is looks_on


def test_a_source_without_a_tokenizer(published, tmp_path):
    """The message says where to get a tokenizer."""
    source = tmp_path / "source"
    shutil.copytree(published, source)
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").unlink()
    target = tmp_path / "target"
    code, output = call("convert", source, target, "--to", "keras")
    assert code == 0
    assert "--tokenizer paligemma_tokenizer.model" in output
    assert not (target / "tokenizer.model").exists()
    with pytest.raises(ValueError) as raised:
        PaliGemmaCausalLM.from_preset(source)
    message = str(raised.value)
    assert "without a SentencePiece model or a tokenizer.json" in message
    assert "`tokenizer='paligemma_tokenizer.model'`" in message
    assert "gs://big_vision/paligemma_tokenizer.model" in message
    tokenizer = str(PRESETS / NANO / "tokenizer.model")
    model = PaliGemmaCausalLM.from_preset(source, tokenizer=tokenizer)
    assert model.preprocessor.tokenizer.vocabulary_size() > 1152


def test_weights_that_are_not_finite(tmp_path):
    source = shutil.copytree(PRESETS / NANO, tmp_path / "source")
    arrays = load_file(source / "model.safetensors")
    arrays["vision_encoder/final_norm/gamma"][2] = np.nan
    save_file(arrays, source / "model.safetensors")
    target = tmp_path / "target"
    convert = ("convert", source, target, "--to", "transformers")
    with pytest.raises(ValueError, match="1 values of 144 that are NaN"):
        call(*convert)
    assert not target.exists()
    code, _ = call(*convert, "--allow-nonfinite")
    assert code == 0 and target.exists()


@pytest.mark.parametrize("to", ["big_vision", "transformers", "keras_hub"])
def test_adapters_are_converted_to_presets_alone(tiny_model, tmp_path, to):
    """No other format has a place for them, so they would be lost."""
    model = tiny_model()
    model.enable_lora(2)
    model.save_to_preset(tmp_path / "source")
    convert = ("convert", tmp_path / "source", tmp_path / "target.npz", "--to")
    with pytest.raises(ValueError, match=f"'{to}' has no place for adapters"):
        call(*convert, to)
    assert not (tmp_path / "target.npz").exists()
    assert call(*convert, "keras")[0] == 0
    copy = formats.find(tmp_path / "target.npz")
    assert copy.config.backbone.lora == model.adapters.config()


@pytest.mark.parametrize("to", formats.FORMATS)
def test_there_and_back(tmp_path, to):
    """Convert the nano preset to another format and back, unchanged."""
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
        towers = [getattr(a.config.backbone, tower) for a in (one, two)]
        assert towers[0] == towers[1]
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
    found = formats.find(tmp_path / "x.npz", read_fields(NANO_SET[1::2]))
    assert len(found.files) == 3
    assert found.config.backbone.dtype == "bfloat16"


def test_export_chooses_its_backend_before_keras_is_imported():
    code = """
import sys
from keras_paligemma.export import targets
print("keras" in sys.modules)
"""
    assert run(code) == "False\n"


def test_export_counts_parameters_and_takes_every_number(tmp_path, monkeypatch):
    exported = []
    monkeypatch.setenv("KERAS_BACKEND", "")  # The command sets it.
    monkeypatch.setattr(
        targets, "export", lambda *given: exported.append(given)
    )
    export = ("export", NANO, tmp_path / "served", "--quantize", "int4")
    code, output = call(*export)
    assert code == 0
    # Not the bytes of two integers each.
    assert "2,092,464 parameters as savedmodel" in output
    for name in ("prompt", "response"):
        with pytest.raises(ValueError, match=f"{name}_length.*Received: 0"):
            call(*export, f"--{name}-length", 0)
    assert len(exported) == 1


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
