"""Inputs of `generate` and the backbone: accepted, or refused clearly."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.generation.requests import stops_of
from keras_paligemma.models import files
from keras_paligemma.models.generation_outputs import ends_of
from keras_paligemma.models.inputs import prompt_batch
from keras_paligemma.preprocessing.prompt_and_response import split_prompt
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import golden_prompts


class Never(keras_hub.samplers.GreedySampler):
    """A sampler that must not be called: errors are raised before running."""

    def get_next_token(self, probabilities):
        raise AssertionError("The model was run.")


@pytest.fixture(scope="module")
def bare(golden_backbone):
    """A model that reads arrays and never answers."""
    model = PaliGemmaCausalLM(golden_backbone())
    model.compile(sampler=Never())
    return model


@pytest.fixture(scope="module")
def silent(tiny_model):
    """A model that reads text and never answers."""
    model = tiny_model()
    model.compile(sampler=Never())
    return model


@pytest.fixture
def asked(silent, examples):
    """Return a function that calls `silent` with other inputs and options."""

    def ask(changes, **options):
        inputs = {key: examples[key] for key in ("images", "prompts")}
        return silent.generate(inputs | changes, **options)

    return ask


@pytest.fixture
def floatx():
    """Set floatx and the dtype policy to bfloat16."""
    policy = keras.config.dtype_policy()
    keras.config.set_floatx("bfloat16")
    keras.config.set_dtype_policy("bfloat16")
    yield "bfloat16"
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(policy)


def test_answers_are_those_of_the_policy(golden_backbone, expected, floatx):
    """With this floatx, TensorFlow casts integers to int16, JAX to floats."""
    model = PaliGemmaCausalLM(golden_backbone(form="scanned"))
    assert model.backbone.compute_dtype == floatx
    inputs = golden_prompts(expected)
    tokens = model.generate(inputs, stop_token_ids=None)
    keras.config.set_floatx("float32")
    model.generate_function = None
    wanted = model.generate(inputs, stop_token_ids=None)
    np.testing.assert_array_equal(tokens, wanted)


@pytest.mark.parametrize("dtype", ["int64", "float64", "tensor"])
def test_ids_and_masks_pass_no_float(bare, floatx, monkeypatch, dtype):
    """bfloat16 cannot represent 257: a cast would give 256 or 258."""
    ids = np.array([[257, 259]])
    x = {"token_ids": ids.astype("int32")}
    x |= {name: ids > 258 for name in ("padding_mask", "response_mask")}
    if dtype == "tensor":
        x = {key: ops.convert_to_tensor(x[key], x[key].dtype) for key in x}
    else:
        x["token_ids"] = ids.astype(dtype)
    for model in (bare, bare.backbone):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "call", lambda self, inputs: inputs)
            received = model(x)
        wanted = {"token_ids": "int32"} | dict.fromkeys(list(x)[1:], "bool")
        for name, dtype_name in wanted.items():
            array = ops.convert_to_numpy(received[name])
            assert array.dtype == dtype_name
            np.testing.assert_array_equal(
                array, ids if name == "token_ids" else ids > 258
            )


def test_fit_counts_in_float32(tiny_model, examples, floatx):
    """A running mean in bfloat16 does not change after 256 examples."""
    model = tiny_model()
    model.compile("sgd")
    for _ in range(3):
        model.loss_tracker.update_state(1.0, sample_weight=255.0)
    assert float(model.loss_tracker.count) == 765.0
    model.loss_tracker.reset_state()
    loss = model.evaluate(examples, verbose=0)[0]
    assert np.isfinite(loss) and loss > 0


def test_from_preset_takes_the_global_policy(tiny_model, tmp_path, floatx):
    tiny_model(dtype="float32").save_to_preset(tmp_path)
    read = PaliGemmaCausalLM.from_preset
    assert read(tmp_path).backbone.dtype_policy.name == "bfloat16"
    assert read(tmp_path, dtype="float32").backbone.compute_dtype == "float32"
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert read(tmp_path).backbone.dtype_policy.name == "mixed_bfloat16"
    # Keras caches the policy that was made under another floatx.
    keras.config.set_dtype_policy("float32")
    assert read(tmp_path).backbone.dtype_policy.name == "bfloat16"
    keras.config.set_floatx("float32")
    assert read(tmp_path).backbone.dtype_policy.name == "float32"
    assert files._global_policy() is None


def without(name, **changes):
    """Return a function that drops an input of a call and changes others."""
    return lambda x: (
        {key: x[key] for key in x.keys() - {name}}
        | {key: change(x) for key, change in changes.items()}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["token_ids"], "takes a dictionary.*Received: ndarray"),
        # The picture would be left out without a word.
        (without("images", image=lambda x: x["images"]), "Received: .*'image'"),
        (without("padding_mask"), "'padding_mask'.*Received: .*'token_ids'"),
        (without("token_ids"), "Expected: 'token_ids'"),
        (
            without("", token_ids=lambda x: x["token_ids"][0]),
            r"`token_ids`.*Received: \(18,\). Expected: \(batch, tokens\)",
        ),
        # These would apply to all tokens or rows.
        (
            without("images", padding_mask=lambda x: x["padding_mask"][:, :1]),
            r"`padding_mask`.*Received: \(4, 1\). Expected: \(4, 18\)",
        ),
        (
            without("", response_mask=lambda x: x["response_mask"][:1]),
            r"`response_mask`.*Received: \(1, 18\). Expected: \(4, 18\)",
        ),
        (
            without("", positions=lambda x: np.zeros((4, 1), int)),
            r"`positions`.*Received: \(4, 1\). Expected: \(4, 27\)",
        ),
        (
            without("", attention_mask=lambda x: np.ones((4, 18, 18), bool)),
            r"`attention_mask`.*Expected: \(4, 27, 27\)",
        ),
        (
            without("", images=lambda x: x["images"][:1]),
            r"`images`.*Received: \(1, 42, 42, 3\). Expected: \(4, 42, 42, 3\)",
        ),
        (
            without("images", image_embeddings=lambda x: np.ones((4, 9, 63))),
            r"`image_embeddings`.*Expected: \(4, 9, 64\)",
        ),
    ],
)
def test_calls_that_are_none(bare, expected, change, message):
    inputs = change(golden_prompts(expected))
    for model in (bare, bare.backbone):
        with pytest.raises(ValueError, match=message):
            model(inputs)


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (1, (1,)),
        (np.int64(1), (1,)),
        ([7, 1.0], (7, 1)),
        ({7, 1}, (1, 7)),
        ([], None),
        (None, None),
    ],
)
def test_stop_tokens(stop, wanted):
    assert stops_of(stop, None, 320) == wanted


@pytest.mark.parametrize(
    ("stop", "received"),
    [("</s>", "'</s>'"), (["1"], "'1'"), ([-1], "-1"), (320, "320")],
)
def test_stop_tokens_that_are_none(stop, received):
    with pytest.raises(ValueError, match="`stop_token_ids`.*Received: ") as all:
        stops_of(stop, None, 320)
    assert received in str(all.value)


def test_stop_tokens_in_begun_answers_end_nothing():
    ids = np.array([[5, 1, 7, 1, 8], [1, 1, 6, 6, 6]])
    begun = np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    counts, stopped = ends_of(ids, begun, (1,))
    assert counts.tolist() == [4, 1] and stopped.all()
    counts, stopped = ends_of(ids, begun, None)
    assert counts.tolist() == [5, 5] and not stopped.any()


def test_a_begun_answer_goes_on_behind_a_stop_token(golden_backbone, expected):
    model = PaliGemmaCausalLM(golden_backbone())
    inputs = golden_prompts(expected)
    begun = inputs["token_ids"][3][inputs["response_mask"][3]]
    wanted = expected["f32/cache_f32/tokens"][3, :5]
    stop = int(begun[0])
    assert stop not in wanted
    tokens = model.generate(inputs, stop_token_ids=stop)
    assert tokens[3].tolist() == [*begun, *wanted]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("caption en", "one dictionary.*Received: str 'caption en'"),
        ([{"prompts": "a"}], "one dictionary.*Received: list. One dict"),
        ({"image": 0, "prompt": "a"}, r"prompts are missing.*'image', 'pro"),
        ({"images": [], "prompts": []}, "`prompts` is empty"),
        ({"images": [], "prompts": "a"}, "`images` is empty"),
    ],
)
def test_inputs_that_are_none(silent, inputs, message):
    with pytest.raises(ValueError, match=message):
        silent.generate(inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["a"]}, "1 prompts and images of shape .4, 42"),
        ({"images": [np.full((9, 9, 3), np.nan)] * 4}, "Received: nan to nan"),
        ({"responses": ["a<eos>b", "", "", ""]}, "<eos> at character 1"),
    ],
)
def test_pictures_and_texts_that_are_none(asked, changes, message):
    with pytest.raises(ValueError, match=message):
        asked(changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 9}, "`max_new_tokens`, the tokens.*max_length=9"),
        ({"max_new_tokens": 0}, "`max_new_tokens`.*1 to 8192. Received: 0"),
        ({"max_new_tokens": -1}, "`max_new_tokens`.*Received: -1"),
        ({"max_new_tokens": 1.5}, "an integer.*Received: 1.5"),
        ({"max_new_tokens": 10**9}, "Received: 1000000000"),
        ({"max_new_tokens": "caption en"}, "Received: 'caption en'"),
        ({"stop_token_ids": "eos"}, "`stop_token_ids`.*Received: 'eos'"),
    ],
)
def test_options_that_are_none(asked, options, message):
    with pytest.raises(ValueError, match=message):
        asked({}, **options)


@pytest.mark.parametrize("sampler", ["beams", None, 3, "top-p"])
def test_unknown_samplers(bare, sampler):
    with pytest.raises(ValueError, match="Expected: 'greedy', 'beam'") as all:
        bare.compile(sampler=sampler)
    assert str(all.value).endswith(f"Received: {sampler!r}.")
    assert isinstance(bare.sampler, Never)


IDS, VALID = "token_ids", "padding_mask"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({IDS: None}, "not the arrays of a prompt.*Received: "),
        ({VALID: None}, "not the arrays of a prompt.*Received: "),
        ({"image": 0}, "not the arrays of a prompt.*'image'"),
        ({"prompts": "a"}, "not the arrays of a prompt.*does not read"),
        (
            {IDS: lambda x: x[None]},
            r"`token_ids` has an unknown shape.*1, 4, 1",
        ),
        (
            {IDS: lambda x: x[0]},
            r"`padding_mask` does not .*shape \(18,\). Rec",
        ),
        ({IDS: lambda x: x[:3]}, r"`padding_mask` .*shape \(3, 18\). Rec"),
        ({IDS: lambda x: x.astype(str)}, "`token_ids` is not made of token id"),
        ({IDS: lambda x: x + 0.5}, "whole numbers.*Received: 0.5"),
        ({VALID: lambda x: x * 2}, r"`padding_mask` .*values such as \[0 2\]"),
        ({VALID: lambda x: x.astype(str)}, "`padding_mask` .*dtype <U5"),
        ({"response_mask": lambda x: x[:, 1:]}, r"`response_mask` .*\(4, 17\)"),
        ({"images": lambda x: x * np.nan}, "holds NaN.*Received: 4 such rows"),
        (
            {"images": lambda x: x[:2]},
            r"`images` .*4 rows.*Received: shape \(2",
        ),
        (
            {"images": lambda x: x[0]},
            r"pictures of shape .*shape \(42, 42, 3\)",
        ),
        ({"images": lambda x: x.astype("uint8")}, "takes floats in .*uint8"),
        ({"images": lambda x: x.astype(str)}, "takes floats in .*dtype <U32"),
        (
            {"images": None, "image_embeddings": np.zeros((4, 9, 7))},
            r"`image_embeddings` .*image tokens, 64\).*\(4, 9, 7\)",
        ),
    ],
)
def test_arrays_that_are_none(bare, expected, change, message):
    inputs = golden_prompts(expected)
    for name, value in change.items():
        inputs[name] = value(inputs[name]) if callable(value) else value
    with pytest.raises(ValueError, match=message):
        bare.generate(inputs, stop_token_ids=None)


def test_arrays_in_other_dtypes(expected, bare):
    """Floats with whole values, numeric masks, and no response mask."""
    inputs = golden_prompts(expected)
    config = bare.backbone.text_config
    wanted, single = prompt_batch(inputs, IMAGE_SIZE, config)
    assert not single
    same = {
        "images": inputs["images"].astype("float64"),
        IDS: inputs[IDS].astype("float32").tolist(),
        VALID: inputs[VALID].astype("int32"),
        "response_mask": ops.convert_to_tensor(inputs["response_mask"], bool),
    }
    given, _ = prompt_batch(same, IMAGE_SIZE, config)
    for name, value in given.items():
        assert value.dtype == wanted[name].dtype
        np.testing.assert_array_equal(value, wanted[name])
    del same["response_mask"]
    given, _ = prompt_batch(same, IMAGE_SIZE, config)
    assert not given["response_mask"].any()
    one, single = prompt_batch(
        {key: value[0] for key, value in inputs.items()}, IMAGE_SIZE, config
    )
    assert single and one[IDS].tolist() == [inputs[IDS][0].tolist()]


def test_the_response_part_is_as_long_as_asked(expected):
    inputs = golden_prompts(expected)
    for length in (3, 8, 11):
        split = split_prompt(inputs, length)
        assert split["response_ids"].shape == (4, length)
        assert split["response_mask"].sum() == 3
        assert split["prompt_ids"].shape == (4, 10)
    with pytest.raises(ValueError, match="no room to go on.*at most 2 tok"):
        split_prompt(inputs, 2)


def test_prompts_are_repeated_as_they_are_read(tiny_model, examples):
    model = tiny_model()
    one = {"images": examples["images"][1], "prompts": b"detect cat\n"}
    answer = model.generate(one, max_new_tokens=5)
    full = "detect cat\n" + answer
    again = model.generate(one, max_new_tokens=5, strip_prompt=False)
    assert again == full
    several = {
        "images": [examples["images"][1]],
        "prompts": np.array(["<image>detect cat"]),
    }
    with pytest.warns(UserWarning, match="begins with <image>"):
        again = model.generate(several, max_new_tokens=5, strip_prompt=False)
    assert again == [full]
    x = model.preprocessor.generate_preprocess(one, max_new_tokens=5)
    assert model.generate(x) == answer
    with pytest.raises(ValueError, match="no prompt to repeat"):
        model.generate(x, strip_prompt=False)


def test_begun_answers_that_have_ended(silent, examples):
    x, _, _ = silent.preprocessor(examples)
    with pytest.raises(ValueError, match="begun answer has ended.*row 0"):
        silent.generate(x)
