"""The exported nano preset in a process without this package."""

from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from keras_paligemma.compat import to_host
from tests.helpers import numpy_reference
from tests.helpers.encoded_pictures import ask_alone
from tests.helpers.encoded_pictures import bomb
from tests.helpers.encoded_pictures import pictures
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import PRESETS
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION
from tests.helpers.tiny_models import error
from tests.helpers.tiny_models import run

pytest.importorskip("tensorflow_text")
pytestmark = pytest.mark.slow

NANO = PRESETS / "pali_gemma2_nano_112"
SCENES = Path(__file__).parents[2] / "examples" / "pictures"
# Special pieces, unknown letters and whitespace, as users type them.
PROMPTS = (
    "caption en",
    "detect cat\n",
    "",
    "answer en what <loc0012><seg003> is <b>this</b>?",
    "  zwei  Leerzeichen ",
    "日本 🦉 é",
)
BAD = {
    "text": (b"caption en", "caption en", "not a picture"),
    "empty": (b"", "caption en", "not a picture"),
    "bomb": (bomb(), "caption en", "20000×20000"),
    "long": (None, "many words " * 40, "prompt does not fit"),
    "image": (None, "<image>ocr é <image>", "<image> at character 13."),
    "end": (None, "<image> ocr<eos>", "<eos> at character 11."),
    "latin": (None, b"caf\xe9", "not UTF-8"),
}


# The first adapter's slots are large enough for the second one.
LORAS = {
    "first": {
        "rank": 3,
        "targets": ("decoder", "vision.attention", "projector"),
        "dora": True,
    },
    "second": {"rank": 2, "alpha": 5.0, "rslora": True},
}
# The seed matters: JAX with and without a cache differs by 0.4e-5 to 1.7e-5 in
# the log-probabilities of unlikely tokens, for six seeds at this temperature.
DRAWS = {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
OPTIONS = {
    "max_new_tokens": np.int32(12),
    "temperature": np.float32(0),
    "top_k": np.int32(2048),
    "top_p": np.float32(1),
    "min_p": np.float32(0),
    "seed": np.int32(-1),
    "adapter": "",
}
WRONG = {
    "max_new_tokens": np.int32(33),
    "temperature": np.float32("nan"),
    "top_k": np.int32(0),
    "top_p": np.float32(0),
    "min_p": np.float32(1.5),
    "seed": np.int32(-2),
}
SCORED = {"adapter": ""}
SPARE = 10


@pytest.fixture(scope="module")
def model():
    """Return the nano preset with two adapters that it can switch to."""
    model = PaliGemmaCausalLM.from_preset(NANO)
    random = np.random.default_rng(0)
    for name, lora in LORAS.items():
        model.backbone.enable_lora(**lora, name=name)
        values = {
            slot: random.normal(0, 0.1, value.shape)
            for slot, value in model.adapters.values(name).items()
        }
        model.adapters.variables.assign(values)
    model.adapters.select(None)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    home = tmp_path_factory.mktemp("export")
    model.adapters.select("second")
    model.export(home / "served")
    model.adapters.select(None)
    assert [path.name for path in home.iterdir()] == ["served"]
    return home / "served"


@pytest.fixture(scope="module")
def batch():
    """Return pictures of every kind with prompts of every kind."""
    files = list(pictures().values())
    files += [(SCENES / f"scene_{n}.png").read_bytes() for n in range(3)]
    prompts = [PROMPTS[n % len(PROMPTS)] for n in range(len(files))]
    return {"images": files, "prompts": prompts}


@pytest.fixture(scope="module")
def scored(model, batch):
    """Return the preprocessor's arrays for three answers."""
    some = {key: value[-3:] for key, value in batch.items()}
    return model.preprocessor(some | {"responses": ["a cat", "", "two dogs"]})


def without_columns(arrays, count):
    """Remove text columns on the left, or add some there."""
    return {
        name: value
        if name == "images"
        else np.pad(value, ((0, 0), (max(-count, 0), 0)))[:, max(count, 0) :]
        for name, value in arrays.items()
    }


@pytest.fixture(scope="module")
def answers(folder, model, batch, scored, tmp_path_factory):
    """Return the answers of a process that has only TensorFlow."""
    good = batch["images"][0]
    mixed = [(good, "caption en", "")] * 2
    mixed[1:1] = [
        (good if image is None else image, text, told)
        for image, text, told in BAD.values()
    ]
    images, prompts, _ = map(list, zip(*mixed, strict=True))
    some = {key: value[-3:] for key, value in batch.items()}
    begun = model.preprocessor.generate_preprocess(
        some | {"responses": ["a", "", "two"]}
    )
    one = {"images": [good], "prompts": ["caption en"]}
    eight = {key: value * 8 for key, value in one.items()}

    draws = {
        name: OPTIONS[name].dtype.type(value) for name, value in DRAWS.items()
    } | {"seed": np.int32(2**31 - 5)}

    def served(inputs, **options):
        return "serving_default", inputs | OPTIONS | options

    requests = {
        "scalar": served({"images": good, "prompts": ["a"]}),
        "a batch of batches": served({"images": [[good]], "prompts": ["a"]}),
        "two prompts": served(one | {"prompts": ["a", "b"]}),
        "good": served(batch),
        "mixed": served({"images": images, "prompts": prompts}),
        "none": served(dict.fromkeys(one, np.array([], "S1"))),
        **{
            f"wrong {name}": served(one, **{name: value})
            for name, value in WRONG.items()
        },
        "hot": served(eight, temperature=np.float32(3)),
        "drawn": served(some, **draws),
        "drawn of arrays": ("generate", begun | OPTIONS | draws),
        "third": served(one, adapter="third"),
        "typed": served(one | {"prompts": ["<image> <bos>caption en\n"]}),
        **{name: served(some, adapter=name) for name in LORAS},
        "batched": ("batched", some),
        "generate": ("generate", begun | OPTIONS),
        "score": ("score", scored[0] | SCORED),
        # Prompts without the columns that are padding in all rows.
        "score short": ("score", without_columns(scored[0], SPARE) | SCORED),
        "generate short": ("generate", without_columns(begun, SPARE) | OPTIONS),
        "score long": ("score", without_columns(scored[0], -1) | SCORED),
        "score third": ("score", scored[0] | {"adapter": "third"}),
    }
    requests = {
        name: (str(folder), *request) for name, request in requests.items()
    }
    return ask_alone(requests, tmp_path_factory.mktemp("answers"))


def test_nothing_of_ours_is_imported(answers):
    assert answers["imported"] == []


def test_text_is_generates(answers, model, batch):
    served = answers["good"]
    assert served["error"].tolist() == [""] * len(batch["images"])
    wanted = model.generate(batch, max_new_tokens=12)
    assert served["text"].tolist() == wanted
    assert len(set(wanted)) > 5


def test_log_probabilities_are_those_of_a_pass(answers, model, batch, tmp_path):
    """The pass is one in float64.

    Passes in float32 of both libraries are up to 0.6e-5 from it.
    """
    ids = answers["good"]["token_ids"]
    x = model.preprocessor.generate_preprocess(batch, max_new_tokens=12)
    x["token_ids"][:, -12:] = ids
    x["padding_mask"][:, -12:] = x["response_mask"][:, -12:] = ids != 0
    model.export_to_big_vision(tmp_path / "weights.npz")
    found = numpy_reference.forward(
        numpy_reference.load_arrays(tmp_path / "weights.npz"),
        numpy_reference.settings_of(model.backbone.text_config),
        x["images"],
        *(x[name] for name in ("token_ids", "padding_mask", "response_mask")),
    )
    logits = found["capped_logits"][:, -13:-1]
    each = np.take_along_axis(logits, ids[..., None], -1)[..., 0]
    each -= np.log(np.exp(logits).sum(-1))
    wanted = np.where(ids != 0, each, 0)
    assert error(answers["good"]["log_probabilities"], wanted) < 1e-5


def test_bad_rows_spoil_no_others(answers):
    served = answers["mixed"]
    assert served["error"][0] == served["error"][-1] == ""
    assert served["text"][0] == served["text"][-1] != ""
    for row, (name, (*_, told)) in enumerate(BAD.items(), 1):
        assert told in served["error"][row], name
        assert served["text"][row] == ""
        assert not served["log_probabilities"][row].any()


def test_image_tokens_and_bos_in_front_are_dropped(answers):
    typed, plain = answers["typed"], answers["mixed"]
    assert typed["error"].tolist() == [""]
    assert typed["text"][0] == plain["text"][0]
    assert typed["token_ids"][0].tolist() == plain["token_ids"][0].tolist()


def test_no_rows(answers):
    assert answers["none"]["text"].shape == (0,)


@pytest.mark.parametrize("name", WRONG)
def test_options_out_of_range(answers, name):
    [told] = answers[f"wrong {name}"]["error"]
    assert f"`{name}` is out of range. Expected: " in told
    assert f"Received: {WRONG[name]}" in told


def test_draws_without_a_seed_differ(answers):
    assert len(set(answers["hot"]["text"])) > 1


@pytest.mark.parametrize("request_", ["drawn", "drawn of arrays"])
def test_draws_are_generates(answers, model, batch, request_):
    some = {key: value[-3:] for key, value in batch.items()}
    if request_ == "drawn of arrays":
        some["responses"] = ["a", "", "two"]
    wanted = model.generate(
        some, max_new_tokens=12, details=True, seed=2**31 - 5, **DRAWS
    )
    found = answers[request_]
    greedy = answers["good"]["token_ids"][-3:]
    assert (found["token_ids"] != greedy).any()
    for row, answer in enumerate(wanted):
        count = len(answer.token_ids)
        assert found["token_ids"][row, :count].tolist() == list(
            answer.token_ids
        )
        assert not found["token_ids"][row, count:].any()
        # Differences of numbers of up to 30, whose last digit is 2e-6.
        np.testing.assert_allclose(
            found["log_probabilities"][row, :count],
            answer.log_probabilities,
            rtol=1e-5,
            atol=1e-5,
        )


def test_what_is_no_batch_is_refused(answers):
    for name, shape in (("scalar", "[]"), ("a batch of batches", "[1,1]")):
        wanted = f"images {shape} is not compatible with expected shape [?]"
        assert wanted in answers[name]["raised"]
    assert "one prompt a picture" in answers["two prompts"]["raised"]


@pytest.mark.parametrize("name", LORAS)
def test_a_request_chooses_its_adapter(answers, model, batch, name):
    some = {key: value[-3:] for key, value in batch.items()}
    model.adapters.select(name)
    wanted = model.generate(some, max_new_tokens=12)
    model.adapters.select(None)
    assert answers[name]["text"].tolist() == wanted
    # The texts may agree, but their probabilities differ.
    first, bare = (
        answers[kind]["log_probabilities"][-3:, 0] for kind in (name, "good")
    )
    assert np.abs(first - bare).max() > 1e-3


def test_without_options_the_active_adapter_answers(answers):
    """As by the default of the signatures that take an adapter."""
    batched, wanted = answers["batched"], answers["second"]
    for name in ("token_ids", "log_probabilities"):
        np.testing.assert_array_equal(batched[name][:, :12], wanted[name])


def test_the_separator_is_the_newline_alone():
    import tensorflow_text

    from keras_paligemma.export.signatures import Functions

    proto = (NANO / "tokenizer.model").read_bytes()
    preprocessor = PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(proto, add_bos=True, add_eos=True),
        PaliGemmaImageConverter(112),
    )
    backbone = SimpleNamespace(vocabulary_size=2048)
    model = SimpleNamespace(backbone=backbone, preprocessor=preprocessor)
    tokenizer = tensorflow_text.SentencepieceTokenizer(proto)
    separator = Functions(model, None, tokenizer).separator
    assert separator == PaliGemmaTokenizer(proto).tokenize("\n")


def test_unknown_adapters_are_told(answers):
    wanted = "Expected: first, second, or nothing for the bare model. Received"
    assert wanted in answers["third"]["error"][0]
    assert answers["third"]["text"][0] == ""
    assert wanted in answers["score third"]["raised"]


def test_generate_goes_on_from_begun_answers(answers, model, batch):
    x = {key: value[-3:] for key, value in batch.items()}
    x["responses"] = ["a", "", "two"]
    wanted = model.generate(x, max_new_tokens=32)
    ids = answers["generate"]["token_ids"]
    assert ids.shape == (3, 12)
    for row, text in zip(ids, wanted, strict=True):
        assert text.startswith(model.preprocessor.tokenizer.detokenize(row))


def test_score_is_the_models(answers, model, scored):
    x, y, weights = scored
    hidden = run(lambda x: model.backbone(x), x)
    logits = keras.ops.convert_to_numpy(model.backbone.logits(hidden))
    each = keras.ops.take_along_axis(
        keras.ops.log_softmax(logits[:, -33:-1]), y[..., None], -1
    )
    wanted = keras.ops.convert_to_numpy(each)[..., 0] * weights
    served = answers["score"]
    largest = np.abs(wanted).max()
    assert np.abs(served["log_probabilities"] - wanted).max() < 1e-5 * largest
    assert np.abs(served["log_likelihood"] - wanted.sum(1)).max() < 1e-4
    # A SavedModel returns no logits, but these states determine them.
    assert error(served["hidden_states"], np.array(hidden)) < 1e-5
    assert error(model.backbone.logits(served["hidden_states"]), logits) < 1e-5


def test_prompts_are_of_any_length(answers, scored):
    assert not scored[0]["padding_mask"][:, :SPARE].any()
    whole, short = answers["score"], answers["score short"]
    for name in ("log_probabilities", "log_likelihood"):
        assert error(short[name], whole[name]) < 1e-6
    text = scored[0]["token_ids"].shape[1]
    pictures = whole["hidden_states"].shape[1] - text
    given = np.delete(
        whole["hidden_states"], np.s_[pictures : pictures + SPARE], 1
    )
    assert error(short["hidden_states"], given) < 1e-6
    ids = answers["generate short"]["token_ids"]
    np.testing.assert_array_equal(ids, answers["generate"]["token_ids"])
    assert "Expected: 1 to 32 columns" in answers["score long"]["raised"]


def test_weights_are_stored_once(folder, model):
    stored = sum(
        path.stat().st_size for path in (folder / "variables").iterdir()
    )
    # The model has the slots of one adapter, and the file holds two adapters.
    slots = model.trainable_variables
    weights = [*model.backbone.variables, *slots]
    weights = sum(to_host(weight).nbytes for weight in weights)
    assert stored < 1.02 * weights
    # test_server checks the size for the bare preset. This one has two adapters
    # and four signatures.
    assert (folder / "saved_model.pb").stat().st_size < 6_000_000


def test_graph_has_defaults_and_runs_no_python(folder):
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    content = (folder / "saved_model.pb").read_bytes()
    (graph,) = saved_model_pb2.SavedModel.FromString(content).meta_graphs
    defaults = graph.signature_def["serving_default"].defaults
    assert defaults["max_new_tokens"].int_val == [32]
    assert defaults["temperature"].float_val == [0]
    assert defaults["top_k"].int_val == [2048]
    assert defaults["top_p"].float_val == [1]
    assert defaults["min_p"].float_val == [0]
    assert defaults["seed"].int_val == [-1]
    for signature in graph.signature_def.values():
        if "adapter" in signature.inputs:
            assert signature.defaults["adapter"].string_val == [b"second"]
    nodes = list(graph.graph_def.node)
    for function in graph.graph_def.library.function:
        nodes += function.node_def
    used = {node.op for node in nodes}
    assert not {op for op in used if "PyFunc" in op}
    assert {op for op in used if not hasattr(tf.raw_ops, op)} == {
        "SentencepieceDetokenizeOp",
        "SentencepieceIdToStringOp",
        "SentencepieceOp",
        "SentencepieceTokenizeOp",
    }


def test_a_merged_adapter_needs_no_input():
    from keras_paligemma.export.savedmodel import check_adapters
    from keras_paligemma.export.weights import Weights
    from keras_paligemma.lora_config import LoraConfig

    backbone = PaliGemmaBackbone(IMAGE_SIZE, VISION, TEXT)
    backbone.enable_lora(2)
    held = Weights(backbone)
    assert held.names == ["", "default"]
    assert len(held.adapters) == 2 * len(backbone.adapters.capacity.targets)
    check_adapters(backbone.adapters)
    name = "vision_encoder/projector/bias"
    bias = np.ones(backbone.text_config.hidden_dim, "float32")
    backbone.adapters.add("brought", LoraConfig(1), whole={name: bias})
    with pytest.raises(ValueError, match=r"\['brought'\], which bring weights"):
        check_adapters(backbone.adapters)
    backbone.adapters.merge()
    check_adapters(backbone.adapters)
    held = Weights(backbone)
    assert held.names == [""]
    assert not held.adapters


def test_bad_exports_are_refused(model, folder, tmp_path):
    with pytest.raises(ValueError, match="in use"):
        model.export(folder)
    with pytest.raises(ValueError, match="Unknown format"):
        model.export(tmp_path / "x", format="tflite")
    bare = PaliGemmaCausalLM(model.backbone, compile=False)
    with pytest.raises(ValueError, match="preprocessor"):
        bare.export(tmp_path / "x")
    for name in ("x [1]", "x*", "is it?/x", "back\\slash"):
        with pytest.raises(ValueError, match="pattern of file names"):
            model.export(tmp_path / name)
    assert not list(tmp_path.iterdir())
