import copy
import io
import json
import pathlib

import keras
import numpy as np
import pytest
import sentencepiece

from keras_paligemma.preprocessing.image_converter import (
    PaliGemmaImageConverter,
)
from keras_paligemma.preprocessing.preprocessor import (
    PaliGemmaCausalLMPreprocessor,
)
from keras_paligemma.preprocessing.tokenizer import PaliGemmaTokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
# The texts of the golden's rows, decoded from their ids.
PROMPTS = [
    "caption en",
    "answer en what is the number?",
    "detect cat",
    "segment car",
    "a prefix that is much too long for the given text length, so it is cut",
    "two\nlines \t and  spaces",
]
RESPONSES = [
    "a small dog runs on the beach",
    "42",
    "<loc0010><loc0200><loc0511><loc1023> cat",
    "<loc0000><loc0001><loc0002><loc0003><seg000><seg127> car",
    "never seen",
    "Größe 東",
]
IMAGE = np.random.default_rng(0).integers(0, 256, (20, 31, 3), "uint8")
P, R = 24, 16


@pytest.fixture(scope="module")
def tokenizer():
    return PaliGemmaTokenizer(GOLDEN / "toy_sp.model")


@pytest.fixture
def make(tokenizer):
    def make(images=True, **kwargs):
        return PaliGemmaCausalLMPreprocessor(
            tokenizer,
            PaliGemmaImageConverter(28) if images else None,
            **{"prompt_length": P, "response_length": R, **kwargs},
        )

    return make


def batch(size=2, **kwargs):
    return {
        "images": [IMAGE] * size,
        "prompts": PROMPTS[:size],
        "responses": RESPONSES[:size],
        **kwargs,
    }


def to_the_left(row, mask, length):
    """Pack the valid tokens of a row to the left, as the original does."""
    row = row[mask][:length]
    return np.pad(row, (0, length - len(row)))


@pytest.mark.parametrize("length", [12, 32])
def test_training_equals_the_original_packed_left(make, length):
    # The original packs prompt and response to the left and cuts both. Ours are
    # compared after the same packing. `mask_loss` is the sample weight.
    # `mask_ar` is 0 on the prompt and 1 on everything after it, including
    # padding.
    golden = np.load(GOLDEN / "pp.npz")
    x, y, sample_weight = make(images=False)(
        {"prompts": PROMPTS, "responses": RESPONSES}
    )
    on_prompts = np.zeros((len(PROMPTS), P))
    loss = np.concatenate([on_prompts, sample_weight], 1)
    for i, mask in enumerate(x["padding_mask"]):
        expected = f"text/{length}/train/{i}"
        # For training, the original takes one more token, for the shift.
        np.testing.assert_array_equal(
            to_the_left(x["token_ids"][i], mask, length + 1),
            golden[f"{expected}/text"],
        )
        np.testing.assert_array_equal(
            to_the_left(loss[i], mask, length + 1),
            golden[f"{expected}/mask_loss"],
        )
        prompt = (mask & ~x["response_mask"][i]).sum()
        np.testing.assert_array_equal(
            np.arange(length + 1) >= prompt, golden[f"{expected}/mask_ar"]
        )
    np.testing.assert_array_equal(y, x["token_ids"][:, P:])


@pytest.mark.parametrize("length", [12, 32])
@pytest.mark.parametrize("started", [False, True])
def test_generation_equals_the_original_packed_left(make, length, started):
    # `mask_input` is the padding mask; a begun response has no eos.
    golden = np.load(GOLDEN / "pp.npz")
    x = {"prompts": PROMPTS}
    if started:
        x["responses"] = ["a small"] * len(PROMPTS)
    x = make(images=False).generate_preprocess(x)
    for i, mask in enumerate(x["padding_mask"]):
        expected = f"text/{length}/eval{'_started' * started}/{i}"
        np.testing.assert_array_equal(
            to_the_left(x["token_ids"][i], mask, length),
            golden[f"{expected}/text"],
        )
        np.testing.assert_array_equal(
            to_the_left(mask, mask, length), golden[f"{expected}/mask_input"]
        )


def test_layout(make):
    x, y, sample_weight = make()(batch())
    kinds = {key: (a.dtype.name, a.shape) for key, a in x.items()}
    assert kinds == {
        "images": ("float32", (2, 28, 28, 3)),
        "token_ids": ("int32", (2, P + R)),
        "padding_mask": ("bool", (2, P + R)),
        "response_mask": ("bool", (2, P + R)),
    }
    assert (y.dtype, y.shape) == (np.int32, (2, R))
    assert (sample_weight.dtype, sample_weight.shape) == (np.float32, (2, R))
    arrays = keras.tree.flatten((x, y, sample_weight))
    assert all(type(array) is np.ndarray for array in arrays)
    # All prompts end with the separator at P - 1, and responses start at P.
    assert (x["token_ids"][:, P - 1] == 5).all()
    assert y[1].tolist() == [410, 408, 1] + [0] * (R - 3)
    assert sample_weight[1].tolist() == [1] * 3 + [0] * (R - 3)
    np.testing.assert_array_equal(x["response_mask"][:, P:], sample_weight)
    assert not x["response_mask"][:, :P].any()
    np.testing.assert_array_equal(x["padding_mask"], x["token_ids"] != 0)


def test_one_example_has_no_batch_axis(make):
    preprocessor = make()
    one = {"images": IMAGE, "prompts": PROMPTS[0], "responses": RESPONSES[0]}
    many = preprocessor(batch(1))
    for a, b in zip(
        keras.tree.flatten(preprocessor(one)),
        keras.tree.flatten(many),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b[0])


def test_frames(make):
    preprocessor = make()
    frames = [[IMAGE, IMAGE[::-1]]] * 2
    assert preprocessor(batch(images=frames))[0]["images"].shape == (
        *(2, 2, 28, 28, 3),
    )
    one = {"images": frames[0], "prompts": "cap en"}
    one = preprocessor.generate_preprocess(one)
    assert one["images"].shape == (2, 28, 28, 3)
    assert one["token_ids"].shape == (P + R,)


def test_the_separator_and_bos_are_not_doubled(make, tokenizer):
    prompts = ["cap en", "cap en\n"]
    plain = make(images=False)
    x = plain.generate_preprocess({"prompts": prompts})
    expected = [2, *tokenizer.tokenize("cap en"), 5]
    for row, mask in zip(x["token_ids"], x["padding_mask"], strict=True):
        assert row[mask].tolist() == expected
    adding = PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(tokenizer.proto, add_bos=True, add_eos=True),
        prompt_length=P,
        response_length=R,
    )
    received = adding({"prompts": prompts, "responses": RESPONSES[:2]})
    wanted = plain({"prompts": prompts, "responses": RESPONSES[:2]})
    for a, b in zip(
        keras.tree.flatten(received), keras.tree.flatten(wanted), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_typed_image_tokens_and_bos_change_nothing(make):
    """transformers' snippets include such tokens, which must not move boxes."""
    preprocessor = make()
    wanted = preprocessor(batch())
    typed = [f"<image>{PROMPTS[0]}", f"<image> <bos>{PROMPTS[1]}\n"]
    with pytest.warns(UserWarning, match="which was dropped") as all:
        received = preprocessor(batch(prompts=typed))
    assert len(all) == 1
    for a, b in zip(
        keras.tree.flatten(received), keras.tree.flatten(wanted), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_tokenizer_without_newlines_is_an_error():
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["caption en"]),  # `nmt_nfkc` by default.
        model_writer=file,
        model_type="char",
        vocab_size=13,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    tokenizer = PaliGemmaTokenizer(file.getvalue())
    with pytest.raises(ValueError, match="drops newlines"):
        PaliGemmaCausalLMPreprocessor(tokenizer).generate_preprocess(
            {"prompts": "ocr"}
        )


def test_bytes_are_text(make):
    preprocessor = make(images=False)
    prompts = ["東", "b"]
    as_bytes = np.array([p.encode() for p in prompts], object)
    a = preprocessor.generate_preprocess({"prompts": prompts})
    b = preprocessor.generate_preprocess({"prompts": as_bytes})
    np.testing.assert_array_equal(a["token_ids"], b["token_ids"])


def test_sample_weight_of_the_user_multiplies(make):
    _, _, plain = make()(batch())
    weights = keras.ops.convert_to_tensor([0.5, 2.0])
    _, _, weighted = make()(batch(), sample_weight=weights)
    np.testing.assert_array_equal(weighted, plain * [[0.5], [2.0]])
    with pytest.raises(ValueError, match=r"`sample_weight`.*shape \(2,\)"):
        make()(batch(), sample_weight=np.ones((2, R)))
    for weight in (np.nan, np.inf, -1):
        with pytest.raises(ValueError, match="finite number of at least 0"):
            make()(batch(), sample_weight=[1, weight])


def test_tensors_beside_strings(make):
    images = keras.ops.convert_to_tensor(np.stack([IMAGE] * 2))
    x, _, _ = make()(batch(images=images))
    np.testing.assert_array_equal(x["images"], make()(batch())[0]["images"])


def test_preprocessed_arrays_pass_through(make):
    x, y, sample_weight = make()(batch())
    again = make()(x, y, sample_weight)
    assert again[0] is x and again[1] is y and again[2] is sample_weight
    assert make()((x, y, sample_weight))[1] is y
    assert make()(x) is x
    assert make().generate_preprocess(x) is x


def test_long_responses(make, tokenizer):
    x = batch(responses=["42", "never seen"])
    ids = tokenizer.tokenize("never seen") + [1]
    short = len(ids) - 2
    with pytest.warns(UserWarning, match=f"1 of 2 .*Received: {len(ids)}"):
        _, y, _ = make(response_length=short)(x)
    assert y[1].tolist() == ids[:short]
    keep = make(response_length=short, on_long_response="keep_eos")
    _, y, weights = keep(x)
    assert y[1].tolist() == ids[: short - 1] + [1] and weights[1].all()
    assert y[0].tolist() == [410, 408, 1] + [0] * (short - 3)
    with pytest.raises(ValueError, match=f"1 of 2 .*Received: {len(ids)}"):
        make(response_length=short, on_long_response="error")(x)
    _, y, _ = make(response_length=len(ids), on_long_response="error")(x)
    assert y[1].tolist() == ids


def test_long_prompts(make, tokenizer):
    text = tokenizer.tokenize(PROMPTS[4])
    needed = len(text) + 2
    x = {"prompts": [PROMPTS[4], "ocr"]}
    make(images=False, prompt_length=needed).generate_preprocess(x)
    with pytest.raises(ValueError, match=f"A prompt.*Received: {needed}"):
        make(images=False, prompt_length=needed - 1).generate_preprocess(x)
    cut = make(images=False, prompt_length=8, on_long_prompt="truncate")
    ids = cut.generate_preprocess(x)["token_ids"][0]
    assert ids[:8].tolist() == [2, *text[:6], 5]


def test_generation_leaves_the_response_open(make):
    x = batch()
    del x["responses"]
    given = copy.copy(x)
    received = make().generate_preprocess(x, max_new_tokens=5)
    assert received["token_ids"].shape == (2, P + 5)
    assert not received["padding_mask"][:, P:].any()
    assert not received["response_mask"].any()
    assert x == given


def test_begun_answers(make, tokenizer):
    x = {"prompts": ["ocr", "cap en"], "responses": ["a small", ""]}
    received = make(images=False).generate_preprocess(x)
    assert received["response_mask"].sum(1).tolist() == [2, 0]
    begun = received["token_ids"][0, P : P + 3].tolist()
    assert begun == [*tokenizer.tokenize("a small"), 0]
    with pytest.raises(ValueError, match="no room.*fewer than 2.*Received: 2"):
        make(images=False).generate_preprocess(x, max_new_tokens=2)


def test_postprocess(make, tokenizer):
    preprocessor = make()
    dog, cat = tokenizer.tokenize(["a dog", " cat"])
    rows = [dog + [1] + cat, [0, 0] + cat + [0] * (len(dog) - 1)]
    for ids in (rows, np.array(rows), keras.ops.convert_to_tensor(rows)):
        texts = preprocessor.generate_postprocess({"token_ids": ids})
        assert texts == ["a dog", " cat"]
    assert preprocessor.generate_postprocess({"token_ids": dog}) == "a dog"
    ended = {"token_ids": [[1, 1]]}
    assert preprocessor.generate_postprocess(ended) == [""]


def test_responses_survive(make):
    _, y, _ = make(images=False)({"prompts": PROMPTS, "responses": RESPONSES})
    assert make().generate_postprocess({"token_ids": y}) == RESPONSES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": None}, "prompts are missing"),
        ({"responses": None}, "needs the answers.*generate"),
        ({"prompts": []}, "`prompts` is empty"),
        ({"prompts": [1, 2]}, "`prompts` holds something that is not text"),
        ({"prompts": ["a", b"\xff"]}, "not UTF-8"),
        ({"prompts": ["a"]}, "1 prompts, 2 responses"),
        ({"prompts": "a"}, "both strings or both lists"),
        ({"responses": ["a"]}, "2 prompts, 1 responses"),
        ({"responses": "a"}, "both strings or both lists"),
        ({"images": [IMAGE]}, r"2 prompts and images of shape \(1, 28"),
        ({"images": IMAGE}, r"2 prompts and images of shape \(28, 28, 3\)"),
        ({"images": [IMAGE] * 3}, "Images and prompts do not match"),
        ({"images": []}, "`images` is empty"),
        ({"prompts": ["ocr", "a <image>"]}, "<image> at character 2.*index 1"),
        ({"responses": ["a", "<image>b"]}, "`responses` .*<image> at .*ndex 1"),
        ({"responses": ["a<eos>", "b"]}, "`responses` .*<eos> at character 1"),
    ],
)
def test_inputs_that_do_not_fit(make, change, message):
    with pytest.raises(ValueError, match=message):
        make()(batch(**change))


def test_text_alone_is_said_and_not_forgotten(make):
    x = batch()
    del x["images"]
    with pytest.raises(ValueError, match="image converter go together"):
        make()(x)
    arrays, _, _ = make()(x | {"images": None})
    assert "images" not in arrays


def test_one_prompt_with_a_batch_of_frames(make):
    x = {"images": [[IMAGE]], "prompts": "a"}
    with pytest.raises(ValueError, match=r"1 prompts \(one string\)"):
        make().generate_preprocess(x)


def test_other_misuse(make):
    with pytest.raises(ValueError, match="Images and the image converter"):
        make(images=False)(batch())
    with pytest.raises(ValueError, match="Targets are made from"):
        make()(batch(), y=np.zeros(2))
    for call in (make(), make().generate_preprocess):
        with pytest.raises(ValueError, match="one dictionary.*Received: str"):
            call("caption en")


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt_length": 2},
        {"prompt_length": 64.0},
        {"response_length": 0},
        {"response_length": True},
        {"on_long_prompt": "cut"},
        {"on_long_response": "truncate"},
        {"sequence_length": 128},  # Not the sum of its parts.
        {"sequence_length": 3, "prompt_length": None},
        {"add_start_token": False},
        {"add_end_token": False},
    ],
)
def test_arguments_that_are_none(make, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make(**arguments)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({}, (64, 64)),
        ({"prompt_length": 20}, (20, 64)),
        ({"sequence_length": 128}, (64, 64)),
        ({"sequence_length": 33}, (17, 16)),
        ({"sequence_length": 4}, (3, 1)),
        ({"sequence_length": 33, "prompt_length": 20}, (20, 13)),
        ({"sequence_length": 33, "response_length": 20}, (13, 20)),
    ],
)
def test_sequence_length_is_divided(tokenizer, given, parts):
    preprocessor = PaliGemmaCausalLMPreprocessor(tokenizer, None, **given)
    lengths = preprocessor.prompt_length, preprocessor.response_length
    assert lengths == parts
    assert preprocessor.sequence_length == sum(parts)


def test_sequence_length_is_third_as_in_keras_hub(tokenizer):
    preprocessor = PaliGemmaCausalLMPreprocessor(tokenizer, None, 33, True)
    assert (preprocessor.prompt_length, preprocessor.response_length) == (
        17,
        16,
    )
    preprocessor.sequence_length = 12
    assert (preprocessor.prompt_length, preprocessor.response_length) == (6, 6)


def test_sequence_length_of_one_call(make):
    preprocessor = make()
    x, y, _ = preprocessor(batch(), sequence_length=P + 9)
    assert x["token_ids"].shape == (2, P + 9) and y.shape == (2, 9)
    prompts = {key: batch()[key] for key in ("images", "prompts")}
    x = preprocessor.generate_preprocess(prompts, P + 5)
    assert x["token_ids"].shape == (2, P + 5)
    with pytest.raises(ValueError, match=f"at least {P + 1}"):
        preprocessor(batch(), sequence_length=P)
    with pytest.raises(ValueError, match="given twice"):
        preprocessor.generate_preprocess(prompts, P + 5, max_new_tokens=5)
    with pytest.raises(ValueError, match="`max_new_tokens`"):
        preprocessor.generate_preprocess({"prompts": "a"}, max_new_tokens=0)


def test_config_round_trips(make, tokenizer):
    preprocessor = make(on_long_prompt="truncate", on_long_response="keep_eos")
    config = json.loads(
        json.dumps(keras.saving.serialize_keras_object(preprocessor))
    )
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == preprocessor.get_config()
    # The vocabulary is an asset and is not in the config.
    again.tokenizer.set_proto(tokenizer.proto)
    np.testing.assert_array_equal(
        again(batch())[0]["token_ids"], preprocessor(batch())[0]["token_ids"]
    )


@keras.saving.register_keras_serializable(package="test")
class Holder(keras.Model):
    """A model with a preprocessor, like a task model."""

    def __init__(self, preprocessor, **kwargs):
        super().__init__(**kwargs)
        self.preprocessor = preprocessor
        self.built = True

    def get_config(self):
        preprocessor = keras.saving.serialize_keras_object(self.preprocessor)
        return {"preprocessor": preprocessor}

    @classmethod
    def from_config(cls, config):
        return cls(
            keras.saving.deserialize_keras_object(config["preprocessor"])
        )


def test_keras_file_round_trips(make, tmp_path):
    model = Holder(make())
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        again.preprocessor(batch())[1], model.preprocessor(batch())[1]
    )
