"""The task model: loss, fit, generate, adapters, saving and errors."""

import copy

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from keras_paligemma.layers.stack import stable_name
from keras_paligemma.models import conversion
from tests.helpers.text_models import TOKENIZER
from tests.helpers.text_models import prompts_of
from tests.helpers.tiny_models import FORMS_OF_BACKEND
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION
from tests.helpers.tiny_models import error
from tests.helpers.tiny_models import golden_prompts
from tests.helpers.tiny_models import randomize_adapters
from tests.helpers.tiny_models import run


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_greedy_tokens_are_the_originals(golden_backbone, expected, form):
    model = PaliGemmaCausalLM(golden_backbone(form=form))
    inputs = golden_prompts(expected)
    tokens = model.generate(inputs, stop_token_ids=None)
    wanted = expected["f32/cache_f32/tokens"]
    np.testing.assert_array_equal(tokens[:3], wanted[:3])
    # Row 3 starts with a response of three tokens.
    np.testing.assert_array_equal(tokens[3, 3:], wanted[3, :5])
    begun = inputs["response_mask"][3]
    np.testing.assert_array_equal(tokens[3, :3], inputs["token_ids"][3][begun])


def test_cached_equals_uncached_and_each_row_alone(golden_backbone, expected):
    backbone = golden_backbone()
    model = PaliGemmaCausalLM(backbone)
    inputs = golden_prompts(expected)
    lengths = {int(row[:10].sum()) for row in inputs["padding_mask"]}
    assert len(lengths) == 4
    tokens = model.generate(inputs, stop_token_ids=None)
    for row in range(4):
        alone = {key: value[row] for key, value in inputs.items()}
        np.testing.assert_array_equal(
            model.generate(alone, stop_token_ids=None), tokens[row]
        )
    # Every token is the argmax of a pass over all tokens without a cache.
    complete = {
        "images": inputs["images"],
        "token_ids": np.concatenate(
            [inputs["token_ids"][:, :10], tokens], axis=1
        ),
        "padding_mask": inputs["padding_mask"] | (np.arange(18) >= 10),
        "response_mask": np.broadcast_to(np.arange(18) >= 10, (4, 18)),
    }
    logits = ops.convert_to_numpy(backbone.logits(run(backbone, complete)))
    best = logits[:, 9 + 9 : -1].argmax(-1)
    begun = inputs["response_mask"][:, 10:]
    np.testing.assert_array_equal(best[~begun], tokens[~begun])


def test_sliding_window_in_the_cache(golden_backbone, expected):
    for form in ("unrolled", "scanned"):
        backbone = golden_backbone(form=form, text={"sliding_window_size": 6})
        model = PaliGemmaCausalLM(backbone)
        inputs = golden_prompts(expected)
        tokens = model.generate(inputs, stop_token_ids=None)
        complete = inputs | {
            "token_ids": np.concatenate(
                [inputs["token_ids"][:, :10], tokens], axis=1
            ),
            "padding_mask": inputs["padding_mask"] | (np.arange(18) >= 10),
            "response_mask": np.broadcast_to(np.arange(18) >= 10, (4, 18)),
        }
        logits = ops.convert_to_numpy(backbone.logits(run(backbone, complete)))
        best = logits[:, 18:-1].argmax(-1)
        begun = inputs["response_mask"][:, 10:]
        np.testing.assert_array_equal(best[~begun], tokens[~begun])


@pytest.mark.parametrize(
    "sampler",
    [
        keras_hub.samplers.BeamSampler(num_beams=1),
        keras_hub.samplers.TopKSampler(k=1, seed=0),
    ],
    ids=["beam", "top_k"],
)
@pytest.mark.parametrize("form", FORMS_OF_BACKEND)
def test_samplers_of_one_choice_are_greedy(
    golden_backbone, expected, sampler, form
):
    model = PaliGemmaCausalLM(golden_backbone(form=form))
    model.compile(sampler=sampler)
    tokens = model.generate(golden_prompts(expected), stop_token_ids=None)
    np.testing.assert_array_equal(
        tokens[:3], expected["f32/cache_f32/tokens"][:3]
    )


def test_beams_find_what_is_at_least_as_likely(golden_backbone, expected):
    backbone = golden_backbone(form="scanned")
    model = PaliGemmaCausalLM(backbone)
    inputs = {key: value[:3] for key, value in golden_prompts(expected).items()}

    def log_likelihood(tokens):
        ids = np.concatenate([inputs["token_ids"][:, :10], tokens], axis=1)
        response = np.broadcast_to(np.arange(18) >= 10, ids.shape)
        logits = backbone.logits(
            run(
                backbone,
                inputs
                | {
                    "token_ids": ids,
                    "padding_mask": inputs["padding_mask"] | response,
                    "response_mask": response,
                },
            )
        )
        log_BRV = ops.log_softmax(logits[:, 18:-1], axis=-1)
        chosen = ops.take_along_axis(log_BRV, tokens[..., None], axis=-1)
        return ops.convert_to_numpy(ops.sum(chosen, axis=(1, 2)))

    greedy = model.generate(inputs, stop_token_ids=None)
    model.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=4))
    beams = model.generate(inputs, stop_token_ids=None)
    assert (log_likelihood(beams) >= log_likelihood(greedy) - 1e-3).all()
    assert (beams != greedy).any()


def test_stop_token_ends_a_row(golden_backbone, expected):
    model = PaliGemmaCausalLM(golden_backbone())
    inputs = golden_prompts(expected)
    free = model.generate(inputs, stop_token_ids=None)
    stop = int(free[0, 2])
    tokens = model.generate(inputs, stop_token_ids=[stop])
    assert tokens[0].tolist() == [*free[0, :3].tolist(), 0, 0, 0, 0, 0]


def test_generate_keeps_its_input_and_ignores_the_order_of_keys(
    tiny_model, examples
):
    model = tiny_model()
    inputs = prompts_of(examples)
    before = copy.deepcopy(inputs)
    answers = model.generate(inputs, max_new_tokens=5)
    assert isinstance(answers, list) and len(answers) == 4
    assert inputs.keys() == before.keys()
    assert inputs["prompts"] == before["prompts"]
    for image, two in zip(inputs["images"], before["images"], strict=True):
        np.testing.assert_array_equal(image, two)
    reverse = dict(reversed(inputs.items()))
    assert model.generate(reverse, max_new_tokens=5) == answers
    single = {key: value[1] for key, value in inputs.items()}
    assert model.generate(single, max_new_tokens=5) == answers[1]
    reverse = dict(reversed(single.items()))
    assert model.generate(reverse, max_new_tokens=5) == answers[1]
    full = model.generate(single, max_new_tokens=5, strip_prompt=False)
    assert full == "detect cat\n" + answers[1]


def test_pictures_change_the_answer(tiny_model, examples):
    model = tiny_model()
    inputs = {"images": examples["images"], "prompts": ["caption en"] * 4}
    x = model.preprocessor.generate_preprocess(inputs)
    hidden = ops.convert_to_numpy(run(model.backbone, x))
    assert error(hidden[0, -9], hidden[1, -9]) > 1e-3


@pytest.mark.parametrize("policy", ["float32", "bfloat16", "mixed_bfloat16"])
def test_fit_learns(tiny_model, examples, policy, monkeypatch):
    model = tiny_model(dtype=policy)
    model.compile(optimizer=keras.optimizers.Adam(3e-3, beta_2=0.95))
    steps, step = [], model.train_step
    monkeypatch.setattr(
        model, "train_step", lambda *args: steps.append(args) or step(*args)
    )
    history = model.fit(examples, batch_size=2, epochs=12, verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    # There are two batches an epoch. Other backends than Torch trace the step
    # once.
    assert len(steps) == (24 if keras.backend.backend() == "torch" else 1)
    answers = model.generate(prompts_of(examples), max_new_tokens=3)
    assert all(isinstance(answer, str) for answer in answers)


@pytest.mark.parametrize("form", FORMS_OF_BACKEND)
def test_fit_with_remat_is_fit(tiny_model, examples, form):
    """The compiled step also takes bool masks as arguments."""
    histories = []
    for remat in (None, "block"):
        model = tiny_model(form=form, remat=remat)
        model.enable_lora(2)
        model.compile(keras.optimizers.SGD(0.1))
        done = model.fit(examples, epochs=2, shuffle=False, verbose=0)
        histories.append(done.history["loss"])
    np.testing.assert_allclose(*histories, rtol=1e-5)
    assert histories[0][1] < histories[0][0]


@pytest.mark.usefixtures("eager")
def test_fit_takes_batches_and_datasets(tiny_model, examples):
    model = tiny_model()
    model.compile(optimizer="sgd")

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {key: value[:2] for key, value in examples.items()}

    model.fit(Batches(), validation_data=examples, verbose=0)
    x, y, weights = model.preprocessor(examples)
    logs = model.train_on_batch(x, y, weights, return_dict=True)
    assert np.isfinite(logs["loss"])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_preset_round_trip_is_exact(
    tiny_model, examples, tmp_path, policy, lora
):
    model = tiny_model(dtype=policy, form="unrolled")
    if lora:
        model.enable_lora(2)
        for variable in model.trainable_variables:
            variable.assign(np.full(variable.shape, 0.1))
    inputs = prompts_of(examples)
    x = model.preprocessor.generate_preprocess(inputs)
    wanted = ops.convert_to_numpy(run(model, x))
    model.save_to_preset(tmp_path / "preset")
    for form in ("unrolled", "scanned"):
        read = PaliGemmaCausalLM.from_preset(tmp_path / "preset", form=form)
        # The dtype of the saved file is kept.
        assert read.backbone.dtype_policy.name == policy
        if form == "unrolled":
            np.testing.assert_array_equal(
                ops.convert_to_numpy(run(read, x)), wanted
            )
            assert read.generate(inputs) == model.generate(inputs)
        for name, weight in read.backbone.weights_by_name().items():
            mine = model.backbone.weights_by_name()[name]
            np.testing.assert_array_equal(weight.read(), mine.read())
    half = PaliGemmaCausalLM.from_preset(tmp_path / "preset", dtype="bfloat16")
    assert half.backbone.compute_dtype == "bfloat16"


def test_preprocessor_alone_from_preset(tiny_model, examples, tmp_path):
    model = tiny_model()
    model.save_to_preset(tmp_path)
    read = PaliGemmaCausalLMPreprocessor.from_preset(
        tmp_path, response_length=5
    )
    assert (read.prompt_length, read.response_length) == (12, 5)
    inputs = prompts_of(examples)
    wanted = model.preprocessor.generate_preprocess(inputs, max_new_tokens=5)
    for key, value in read.generate_preprocess(inputs).items():
        np.testing.assert_array_equal(value, wanted[key])


def test_keras_file_round_trip_is_exact(tiny_model, examples, tmp_path):
    model = tiny_model()
    inputs = prompts_of(examples)
    x = model.preprocessor.generate_preprocess(inputs)
    model.save(tmp_path / "model.keras")
    read = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(run(read, x)), ops.convert_to_numpy(run(model, x))
    )
    assert read.generate(inputs) == model.generate(inputs)


def test_keras_file_keeps_what_is_frozen(tiny_model, tmp_path):
    """The moments in the file are those of the other weights."""
    model = tiny_model()
    model.enable_lora(2)
    model.freeze("*/query/*")
    model.unfreeze("text_decoder/final_norm/scale")
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables[2:]:
        variable.assign(ops.ones(variable.shape))
    model.save(tmp_path / "model.keras")
    read = keras.saving.load_model(tmp_path / "model.keras")
    wanted = [variable.path for variable in model.trainable_variables]
    assert [variable.path for variable in read.trainable_variables] == wanted
    assert "text_decoder/final_norm/scale" in {*map(stable_name, wanted)}
    assert all(
        ops.convert_to_numpy(variable).all()
        for variable in read.optimizer.variables[2:]
    )


@pytest.mark.parametrize("state", ["active", "off", "merged"])
def test_keras_file_keeps_the_adapter(tiny_model, examples, tmp_path, state):
    model = tiny_model()
    model.enable_lora(3, ["query", "key"], name="first")
    layers = model.backbone.text_config.num_layers
    model.enable_lora(
        2,
        ["query"],
        alpha=16,
        name="second",
        ranks={"query": [2, *[1] * (layers - 1)]},
        alphas={"query": [8.0, *[16.0] * (layers - 1)]},
    )
    randomize_adapters(model.backbone, 3)
    if state == "off":
        model.adapters.select(None)
    if state == "merged":
        model.adapters.merge()
    model.save(tmp_path / "model.keras")
    read = keras.saving.load_model(tmp_path / "model.keras")
    assert (read.adapters.loaded, read.adapters.active) == (
        "second",
        model.adapters.active,
    )
    assert read.adapters.merged == model.adapters.merged
    wanted = model.score(examples)
    np.testing.assert_allclose(read.score(examples), wanted, rtol=1e-5)
    for each in model, read:
        if state == "merged":
            each.adapters.unmerge()
        each.adapters.select(None)
    bare = model.score(examples)
    np.testing.assert_allclose(read.score(examples), bare, rtol=1e-4)
    for each in model, read:
        each.adapters.select("second")
    again = model.score(examples)
    np.testing.assert_allclose(read.score(examples), again, rtol=1e-4)
    assert np.abs(again - bare).max() > 1e-2


def test_saving_over_a_preset_replaces_it(tiny_model, tmp_path):
    """Shards of a larger model are deleted; the user's notes are kept."""
    model = tiny_model()
    (tmp_path / "notes.txt").write_text("mine")
    model.save_to_preset(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").touch()
    model.save_to_preset(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.model",
    ]


def test_text_alone_is_saved_in_two_parts(tiny_model, tmp_path):
    model = tiny_model()
    model.preprocessor.image_converter = None
    for write in (
        model.save_to_preset,
        model.export_to_transformers,
        model.export_to_keras_hub,
    ):
        with pytest.raises(ValueError, match="without an image converter"):
            write(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.backbone.save_to_preset(tmp_path)
    model.preprocessor.save_to_preset(tmp_path)
    read = PaliGemmaCausalLM.from_preset(tmp_path)
    assert read.preprocessor.image_converter is None
    assert read.preprocessor.get_config() == model.preprocessor.get_config()


def test_a_preprocessor_beside_a_backbone_keeps_its_settings(
    tiny_model, tmp_path
):
    """Another tokenizer, picture size or resize rule changes that alone."""
    model = tiny_model()
    model.preprocessor.on_long_prompt = "truncate"
    model.preprocessor.image_converter.resize = "bicubic"
    model.backbone.save_to_preset(tmp_path / "parts")
    model.preprocessor.save_to_preset(tmp_path / "parts")
    file = tmp_path / "other.model"
    file.write_bytes(model.preprocessor.tokenizer.proto)
    size = model.backbone.image_size
    for options, wanted in (
        ({"tokenizer": file}, (size, "bicubic")),
        ({"image_size": 2 * size}, (2 * size, "bicubic")),
        ({"resize": "bilinear"}, (size, "bilinear")),
    ):
        read = PaliGemmaCausalLM.from_preset(
            tmp_path / "parts", load_weights=False, compile=False, **options
        ).preprocessor
        assert read.sequence_length == model.preprocessor.sequence_length
        assert read.on_long_prompt == "truncate"
        converter = read.image_converter
        assert (converter.image_size[0], converter.resize) == wanted


def test_a_tokenizer_without_locations_is_kept(tmp_path):
    proto = ModelProto.FromString(TOKENIZER.read_bytes())
    del proto.pieces[-1152:]
    tokenizer = PaliGemmaTokenizer(
        proto.SerializeToString(), add_location_and_segment_pieces=False
    )
    rows = tokenizer.vocabulary_size()
    backbone = PaliGemmaBackbone(
        IMAGE_SIZE, VISION, TEXT | {"vocabulary_size": rows}
    )
    preprocessor = PaliGemmaCausalLMPreprocessor(
        tokenizer, PaliGemmaImageConverter(IMAGE_SIZE)
    )
    model = PaliGemmaCausalLM(preprocessor, backbone, compile=False)
    model.save_to_preset(tmp_path / "model")
    found = conversion.find(str(tmp_path / "model"))
    conversion.write(*found, tmp_path / "converted", "keras")
    for name in ("model", "converted"):
        read = PaliGemmaCausalLM.from_preset(
            tmp_path / name, load_weights=False, compile=False
        )
        assert read.preprocessor.tokenizer.proto == tokenizer.proto
        read = PaliGemmaTokenizer.from_preset(tmp_path / name)
        assert read.proto == tokenizer.proto


def test_pictures_of_another_size_are_refused(tiny_model, tmp_path):
    """A preset has one size: it would be loaded with another preprocessor."""
    model = tiny_model()
    size = 2 * model.backbone.image_size
    other = PaliGemmaCausalLMPreprocessor(
        model.preprocessor.tokenizer, PaliGemmaImageConverter(size)
    )
    match = rf"another size.*Received: \({size}, {size}\)"
    with pytest.raises(ValueError, match=match):
        PaliGemmaCausalLM(other, model.backbone)
    model.preprocessor = other
    with pytest.raises(ValueError, match=match):
        model.save_to_preset(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    # Of parts that were saved one by one.
    model.backbone.save_to_preset(tmp_path)
    other.save_to_preset(tmp_path)
    with pytest.raises(ValueError, match=match):
        PaliGemmaCausalLM.from_preset(tmp_path)


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.model"]
)
def test_a_missing_file_is_named(tiny_model, tmp_path, file):
    tiny_model().save_to_preset(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=file):
        PaliGemmaCausalLM.from_preset(tmp_path)


def test_a_truncated_weights_file(tiny_model, tmp_path):
    tiny_model().save_to_preset(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        PaliGemmaCausalLM.from_preset(tmp_path)


def test_a_checkpoint_of_other_sizes_lists_all_problems(
    golden_backbone, arrays
):
    from tests.helpers.tiny_models import fill

    wrong = dict(arrays)
    wrong["params/img/extra"] = wrong.pop("params/img/head/bias")
    wrong["params/llm/final_norm/scale"] = np.zeros(3, "float32")
    backbone = golden_backbone()
    before = np.array(backbone.token_embedding.table)
    with pytest.raises(ValueError) as caught:
        fill(backbone, wrong)
    message = str(caught.value)
    assert "in 3 places" in message
    assert "missing: params/img/head/bias" in message
    assert "unused: params/img/extra" in message
    assert r"final_norm/scale is (3,), expected (64,)" in message
    np.testing.assert_array_equal(
        np.array(backbone.token_embedding.table), before
    )


def test_errors_of_inputs(tiny_model, examples, expected):
    model = tiny_model()
    inputs = prompts_of(examples)
    with pytest.raises(ValueError, match="prompts are missing"):
        model.generate({"images": examples["images"]})
    with pytest.raises(ValueError, match="Training needs the answers"):
        model.fit(inputs, verbose=0)
    with pytest.raises(ValueError, match="same length"):
        model.fit(examples | {"prompts": ["a"]}, verbose=0)
    x = model.preprocessor.generate_preprocess(inputs)
    wrong = dict(x)
    wrong["token_ids"] = x["token_ids"] + 2048
    with pytest.raises(ValueError, match="0…2047"):
        model.generate(wrong)
    bare = PaliGemmaCausalLM(model.backbone)
    with pytest.raises(ValueError, match="stop_token_ids='auto'"):
        bare.generate(x)
    ragged = dict(x)
    ragged["padding_mask"] = x["padding_mask"].copy()
    ragged["padding_mask"][0, 11] = False
    with pytest.raises(ValueError, match=r"ending at \[11, 12\]"):
        bare.generate(ragged, stop_token_ids=None)
