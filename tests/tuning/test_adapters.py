"""Adapters: training, switching, merging and saving."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_paligemma import Adam
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import StreamedCrossEntropy
from keras_paligemma.checkpoints.peft import HEAD
from keras_paligemma.checkpoints.peft import TABLE
from keras_paligemma.lora_config import GROUPS
from keras_paligemma.lora_config import TARGETS
from keras_paligemma.lora_config import LoraConfig
from tests.helpers.gradients import gradients
from tests.helpers.tiny_models import FORMS
from tests.helpers.tiny_models import FORMS_OF_BACKEND
from tests.helpers.tiny_models import arrays_of
from tests.helpers.tiny_models import error
from tests.helpers.tiny_models import golden_training
from tests.helpers.tiny_models import randomize_adapters
from tests.helpers.tiny_models import run


def inputs_of(model, examples):
    return model.preprocessor.generate_preprocess(
        {key: examples[key] for key in ("images", "prompts")}
    )


def output(model, x):
    return ops.convert_to_numpy(run(model, x))


def test_lora_trains_adapters_alone(tiny_model, examples):
    for form in FORMS:
        model = tiny_model(form=form)
        x = model.preprocessor.generate_preprocess(
            {key: examples[key] for key in ("images", "prompts")}
        )
        before = ops.convert_to_numpy(run(model, x))
        model.enable_lora(rank=2, alpha=4)
        # B starts at zero, so the output is unchanged.
        np.testing.assert_array_equal(
            ops.convert_to_numpy(run(model, x)), before
        )
        trained = {v.path.rsplit("_", 1)[0] for v in model.trainable_variables}
        assert trained and all("adapter" in path for path in trained)
        # A is D×r and B is r×(heads × head_dim), for q, k, v and o in two
        # layers.
        size = (64 + 96 + 64 + 48 + 64 + 48 + 96 + 64) * 2 * 2
        count = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        assert count == size
        frozen = [np.array(v) for v in model.non_trainable_variables]
        model.compile(optimizer=keras.optimizers.Adam(1e-2))
        losses = model.fit(examples, epochs=8, verbose=0).history["loss"]
        assert losses[-1] < 0.9 * losses[0]
        for variable, two in zip(
            model.non_trainable_variables, frozen, strict=True
        ):
            if "seed" not in variable.path:
                np.testing.assert_array_equal(np.array(variable), two)
        assert error(run(model, x), before) > 1e-2


def test_targets_by_tower_and_the_table(tiny_model, capsys):
    sizes = {}
    for target in GROUPS:
        model = tiny_model()
        model.enable_lora(2, targets=target)
        trained = sum(
            int(np.prod(variable.shape))
            for variable in model.trainable_variables
        )
        sizes[target] = trained
        assert f"{trained:,}  of " in capsys.readouterr().out
        paths = {variable.path for variable in model.trainable_variables}
        assert any("vision" in path for path in paths) == (
            target.startswith(("vision", "all"))
        )
    # The projector adds rank × (width of the tower + width of the decoder).
    everything = sizes["decoder"] + sizes["vision"] + 2 * (48 + 64)
    assert sizes["all"] == sizes["all-linear"] == everything
    for tower in ("decoder", "vision"):
        parts = sizes[f"{tower}.attention"] + sizes[f"{tower}.mlp"]
        assert sizes[tower] == parts


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 2, "targets": ["q_proj"]}, r"Received: \['q_proj'\]"),
        ({"rank": 2, "targets": []}, "Received: an empty list"),
        ({"rank": 0}, "rank must be an integer of 1"),
        ({"rank": 2, "dropout": 1.0}, "dropout must be a number of 0"),
        ({"rank": 2, "alpha": 0}, "a number other than 0"),
        ({"rank": 2, "alpha": "x"}, "a number other than 0.* received 'x'"),
        ({"rank": 2, "dora": True, "bias": True}, "gains or biases"),
        ({"rank": 2, "ranks": {"up": [1, 2]}}, r"Received: \['up'\]"),
        ({"rank": 2, "ranks": {"key": [1, 3]}}, "integer of 0 to 2"),
        ({"rank": 2, "ranks": {"key": [1]}}, "the 2 layers of 'key'"),
    ],
)
def test_arguments_that_mean_nothing(tiny_model, arguments, words):
    model = tiny_model()
    with pytest.raises(ValueError, match=words):
        model.enable_lora(**arguments)
    assert model.adapters.configs == {}
    assert all(variable.trainable for variable in model.trainable_variables)


@pytest.mark.parametrize("form", FORMS_OF_BACKEND)
def test_several_adapters_are_switched(tiny_model, examples, tmp_path, form):
    model = tiny_model(form=form)
    x = inputs_of(model, examples)
    bare = output(model, x)
    model.enable_lora(4, targets="decoder", name="one")
    randomize_adapters(model.backbone, 1)
    first = output(model, x)
    model.enable_lora(2, alpha=6, rslora=True, name="two")
    randomize_adapters(model.backbone, 2)
    # The slots may contain only values of the second adapter.
    values = model.adapters.values("two")
    model.save_adapter(tmp_path / "two")
    model.adapters.select("one")
    np.testing.assert_array_equal(output(model, x), first)
    model.adapters.select(None)
    np.testing.assert_array_equal(output(model, x), bare)
    model.adapters.select("two")
    again = model.adapters.values("two")
    for name, value in values.items():
        np.testing.assert_array_equal(again[name], value)
    # Loaded from a file into a bare model, the adapter is the same.
    alone = tiny_model(form=form)
    alone.load_adapter(tmp_path / "two")
    for name, value in alone.adapters.values("default").items():
        np.testing.assert_array_equal(value, values[name])
    model.load_adapter(tmp_path / "two", name="three")
    assert error(output(model, x), output(alone, x)) < 1e-5
    assert model.adapters.configs["three"] == alone.adapters.configs["default"]


def test_a_backbone_without_an_adapter_has_no_scales(tiny_model):
    with pytest.raises(ValueError, match="call `enable_lora`"):
        tiny_model().backbone.adapters.scales(None)


def test_a_switch_compiles_nothing_again(tiny_model, examples):
    model = tiny_model()
    inputs = {key: examples[key] for key in ("images", "prompts")}
    model.enable_lora(2, name="one")
    randomize_adapters(model.backbone, 1)
    model.enable_lora(2, name="two")
    # Twice, since Torch records in the second run.
    for _ in range(2):
        model.generate(inputs, max_new_tokens=2)
    compiled = model.generate_function
    before = compiled.compilations()
    model.adapters.select("one")
    model.generate(inputs, max_new_tokens=2)
    assert model.generate_function is compiled
    assert compiled.compilations() == before


def test_adapters_that_do_not_fit_the_variables(tiny_model):
    model = tiny_model()
    model.enable_lora(2, targets=["gate", "query"])
    before = len(model.variables)
    for arguments in ({"rank": 3}, {"rank": 2, "targets": ["up"]}):
        with pytest.raises(ValueError, match="add the largest adapter first"):
            model.enable_lora(**arguments, name="other")
    # It would be trained without dropout.
    with pytest.raises(ValueError, match=r"of dropout 0.0. Received: 0.1"):
        model.enable_lora(2, targets=["gate"], dropout=0.1, name="other")
    with pytest.raises(ValueError, match="'default' already"):
        model.enable_lora(2, targets=["gate"])
    with pytest.raises(ValueError, match="Unknown adapter"):
        model.adapters.select("other")
    with pytest.raises(ValueError, match="no such adapter"):
        model.save_adapter("nowhere", name="other")
    assert len(model.variables) == before
    assert list(model.adapters.configs) == ["default"]


@pytest.mark.parametrize("form", FORMS_OF_BACKEND)
def test_merge_and_unmerge(tiny_model, examples, tmp_path, form):
    model = tiny_model(form=form)
    x = inputs_of(model, examples)
    bare = output(model, x)
    with pytest.raises(ValueError, match="no active adapter"):
        model.adapters.merge()
    model.enable_lora(3, alpha=5, targets="all")
    randomize_adapters(model.backbone, 1)
    wanted = output(model, x)
    assert error(wanted, bare) > 1e-2
    model.adapters.merge()
    assert error(output(model, x), wanted) < 1e-5
    with pytest.raises(ValueError, match="is merged"):
        model.adapters.merge()
    # The saved kernels include the adapter, and no adapter is saved.
    model.save_to_preset(tmp_path / "merged")
    read = PaliGemmaCausalLM.from_preset(tmp_path / "merged")
    assert read.adapters.capacity is None
    assert error(output(read, x), wanted) < 1e-5
    model.export_to_big_vision(tmp_path / "merged.npz")
    model.adapters.unmerge()
    assert error(output(model, x), wanted) < 1e-5
    model.adapters.select(None)
    assert error(output(model, x), bare) < 1e-5
    with pytest.raises(ValueError, match="No adapter is merged"):
        model.adapters.unmerge()


def test_programs_follow_adapters_added_to_the_backbone(
    tiny_model, examples, tmp_path
):
    model = tiny_model()
    weights = model.backbone.get_weights()
    model.enable_lora(2)
    randomize_adapters(model.backbone, 1)
    file = tmp_path / "one.lora.h5"
    model.backbone.save_lora_weights(file)

    def results(model):
        return (
            model.score(examples),
            model.predict(examples, batch_size=4, verbose=0),
            model.evaluate(examples, verbose=0),
        )

    wanted = results(model)
    other = tiny_model()
    other.backbone.set_weights(weights)
    bare = results(other)
    other.backbone.load_lora_weights(file)
    found = results(other)
    for value, before, expected in zip(found, bare, wanted, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)
        assert np.abs(np.subtract(value, before)).max() > 1e-2


@pytest.mark.parametrize(
    "options", [{"loss": {"reduction": "sum"}}, {"loss_weights": [0.5]}]
)
def test_options_of_the_loss_that_mean_nothing(tiny_model, options):
    model = tiny_model()
    with pytest.raises(ValueError, match="Received: (reduction|loss_weights)="):
        loss = StreamedCrossEntropy(**options.pop("loss", {}))
        model.compile(loss=loss, **options)


def test_merged_within_a_context_is_unmerged_after_it(tiny_model):
    model = tiny_model()
    for seed, name in enumerate("ab"):
        model.enable_lora(2, alpha=8, name=name)
        randomize_adapters(model.backbone, seed)
    before = arrays_of(model.backbone)
    with model.adapters.using("a"):
        model.adapters.merge()
    assert (model.adapters.active, model.adapters.merged) == ("b", None)
    for name, array in arrays_of(model.backbone).items():
        np.testing.assert_allclose(array, before[name], atol=1e-6)


def test_an_optimizer_of_other_weights_is_refused(tiny_model, examples):
    model = tiny_model()
    model.fit(examples, verbose=0)
    model.enable_lora(2)
    wanted = model.evaluate(examples, verbose=0)
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match="Call `compile` again"):
            train(examples)
    assert model.evaluate(examples, verbose=0) == wanted
    model.compile(Adam(1e-2))
    model.fit(examples, verbose=0)


def test_a_first_step_that_is_interrupted_loses_no_weights(
    tiny_model, examples, monkeypatch
):
    """On JAX, Keras takes the values before the step, and keeps its result."""
    model = tiny_model()
    wanted = [ops.convert_to_numpy(w) for w in model.backbone.weights]

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PaliGemmaCausalLM, "compute_loss", interrupted)
        for run_ in (model.fit, model.evaluate):
            with pytest.raises(KeyboardInterrupt):
                run_(examples, verbose=0)
    found = [ops.convert_to_numpy(w) for w in model.backbone.weights]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    model.compile(Adam(1e-2))
    model.fit(examples, verbose=0)


def test_trained_weights_beside_an_adapter_are_named(tiny_model, tmp_path):
    model = tiny_model()
    model.enable_lora(2)
    model.save_adapter(tmp_path / "alone")
    model.unfreeze("*norm*")
    with pytest.warns(UserWarning, match="attention_norm.*11 in all"):
        model.save_adapter(tmp_path / "beside")
    names = [
        {p.name for p in (tmp_path / name).iterdir()}
        for name in ("alone", "beside")
    ]
    assert names[0] == names[1]


def test_an_adapter_that_is_off_is_not_written(tiny_model, examples, tmp_path):
    model = tiny_model()
    x = inputs_of(model, examples)
    bare = output(model, x)
    model.enable_lora(2)
    randomize_adapters(model.backbone, 1)
    model.adapters.select(None)
    model.save_to_preset(tmp_path / "preset")
    read = PaliGemmaCausalLM.from_preset(tmp_path / "preset")
    assert read.adapters.active is None
    np.testing.assert_array_equal(output(read, x), bare)


@pytest.mark.parametrize("form", FORMS_OF_BACKEND)
def test_dropout_is_in_training_alone(tiny_model, examples, form):
    model = tiny_model(form=form)
    model.enable_lora(2, dropout=0.5, targets="all")
    randomize_adapters(model.backbone, 1)
    x, y, weights = model.preprocessor(examples)
    tested = model.test_on_batch(x, y, weights)[0]
    assert model.test_on_batch(x, y, weights)[0] == tested
    model.compile(keras.optimizers.SGD(0.0))
    losses = [float(model.train_on_batch(x, y, weights)[0]) for _ in range(3)]
    # Each step has another mask, and no mask is full.
    assert len({*losses, float(tested)}) == 4


def test_saved_dropout_has_a_seed_once_it_is_read(tiny_model, tmp_path):
    model = tiny_model()
    model.enable_lora(2, dropout=0.5)
    model.save_to_preset(tmp_path / "preset")
    read = PaliGemmaCausalLM.from_preset(tmp_path / "preset")
    seeds = [v for v in read.backbone.variables if "seed" in v.path]
    assert [keras.ops.convert_to_numpy(seed).shape for seed in seeds] == [(2,)]


def test_dropout_differs_by_layer_and_projection():
    from keras_paligemma.layers.dropout import drop
    from keras_paligemma.layers.dropout import dropout_scope

    seed = keras.random.SeedGenerator(3).next()
    x = ops.ones((64, 8))
    masks = {}
    for number in range(3):
        with dropout_scope(seed, number):
            for place in ("blocks/block/mlp/up", "blocks/block/mlp/gate"):
                kept = ops.convert_to_numpy(drop(x, 0.25, place))
                np.testing.assert_allclose(
                    np.unique(kept), [0, 4 / 3], rtol=1e-6
                )
                masks[number, place] = kept.tobytes()
            again = ops.convert_to_numpy(drop(x, 0.25, "b/block/mlp/up"))
            assert again.tobytes() == masks[number, "blocks/block/mlp/up"]
    assert len(set(masks.values())) == 6
    np.testing.assert_array_equal(drop(x, 0.25, "anywhere"), x)


def trained(model, examples):
    """Return an adapter's values after a few steps that improved the loss."""
    model.compile(keras.optimizers.Adam(1e-2))
    losses = model.fit(examples, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    return model.adapters.values("default")


@pytest.mark.usefixtures("eager")
def test_layers_train_at_ranks_of_their_own(tiny_model, examples, tmp_path):
    model = tiny_model(form="scanned")
    ranks = {"query": [3, 0], "projector": [2]}
    model.enable_lora(
        3, targets=["query", "up", "projector"], ranks=ranks, bias=True
    )
    values = trained(model, examples)
    place = "text_decoder/blocks/attention/query"
    for layer, rank in enumerate(ranks["query"]):
        # Values above a layer's rank stay zero, and all others are trained.
        a = values[f"{place}/adapter_a"][layer]
        b = values[f"{place}/adapter_b"][layer]
        assert not a[:, rank:].any() and not b[rank:].any()
        assert a[:, :rank].all() and b[:rank].all()
        assert values[f"{place}/adapter_bias"][layer].any() == bool(rank)
    assert values["vision_encoder/projector/adapter_b"][:2].any()
    x = inputs_of(model, examples)
    wanted = output(model, x)
    model.save_to_preset(tmp_path / "preset")
    model.save_adapter(tmp_path / "adapter")
    # The same form runs the same program, so results are bitwise equal.
    read = PaliGemmaCausalLM.from_preset(tmp_path / "preset", form="scanned")
    assert read.backbone.lora == model.backbone.lora
    np.testing.assert_array_equal(output(read, x), wanted)
    read.adapters.select(None)
    read.load_adapter(tmp_path / "adapter", "from PEFT")
    known = read.adapters.configs
    assert known["from PEFT"].ranks == known["default"].ranks
    assert error(output(read, x), wanted) < 1e-6
    with pytest.raises(ValueError, match=r"Received: \['query', 'up'\]"):
        read.adapters.merge()


@pytest.mark.usefixtures("eager")
def test_gains_are_trained(tiny_model, examples):
    model = tiny_model()
    model.enable_lora(2, targets=["down", "projector"], dora=True)
    x = inputs_of(model, examples)
    before = output(model, x)
    values = trained(model, examples)
    assert values["text_decoder/blocks/mlp/down/adapter_gain"].any()
    assert values["vision_encoder/projector/adapter_gain"].any()
    model.adapters.select(None)
    np.testing.assert_array_equal(output(model, x), before)
    # A later adapter is also given gains, and no values are lost.
    model.enable_lora(1, targets=["down"], name="other")
    assert model.adapters.configs["other"].dora


def test_whole_weights_change_places(tiny_model, examples, tmp_path):
    model = tiny_model()
    x = inputs_of(model, examples)
    bare = output(model, x)
    name = "vision_encoder/projector/kernel"
    kernel = np.random.default_rng(3).normal(size=(48, 64)).astype("float32")
    model.adapters.add("one", LoraConfig(2), whole={name: kernel})
    first = output(model, x)
    assert error(first, bare) > 1e-2
    model.enable_lora(2, name="two")
    np.testing.assert_array_equal(output(model, x), bare)
    model.adapters.select("one")
    np.testing.assert_array_equal(output(model, x), first)
    # Its trained values are stored, and restored when it is selected.
    model.backbone.weights_by_name()[name].assign(2 * kernel)
    model.adapters.select(None)
    np.testing.assert_array_equal(output(model, x), bare)
    model.save_adapter(tmp_path / "one", name="one")
    model.adapters.select("one")
    second = output(model, x)
    assert error(second, first) > 1e-2
    model.save_to_preset(tmp_path / "preset")
    read = PaliGemmaCausalLM.from_preset(tmp_path / "preset")
    np.testing.assert_array_equal(output(read, x), second)
    other = tiny_model()
    other.load_adapter(tmp_path / "one")
    np.testing.assert_array_equal(output(other, x), second)


def test_a_head_of_an_adapters_own(tiny_model, examples, tmp_path):
    """The head is written to the adapter's file, and to no model's."""
    model = tiny_model()
    table = model.backbone.token_embedding.table
    random = np.random.default_rng(3).normal(size=table.shape)
    model.adapters.add(
        "one", LoraConfig(2), whole={HEAD: random.astype("float32")}
    )
    hidden = random[:5].astype("float32")
    found = ops.convert_to_numpy(model.backbone.logits(hidden, capped=False))
    assert error(found, hidden @ random.T) < 1e-5
    # An adapter of a table for both has it for both, though it came later.
    tied = {TABLE: 2 * random.astype("float32")}
    model.adapters.add("tied", LoraConfig(2), whole=tied)
    found = ops.convert_to_numpy(model.backbone.logits(hidden, capped=False))
    assert error(found, 2 * hidden @ random.T) < 1e-5
    for write in (model.save_to_preset, model.export_to_transformers):
        model.adapters.select("one")
        with pytest.raises(ValueError, match="one table for both"):
            model.adapters.merge()
            write(tmp_path / "model")
        model.adapters.unmerge()
    model.adapters.select(None)
    model.save_to_preset(tmp_path / "model")
    read = PaliGemmaCausalLM.from_preset(tmp_path / "model")
    assert read.backbone.token_embedding.adapter_head is None


@pytest.mark.usefixtures("eager")
def test_full_rank_is_a_full_update(golden_backbone, expected):
    """If A is the identity, a step on B equals a step on the kernel."""
    x, targets, weights = golden_training(expected)
    place = "text_decoder/blocks/mlp/up"
    loss = StreamedCrossEntropy()

    def train(backbone):
        model = PaliGemmaCausalLM(backbone)
        model.compile(keras.optimizers.SGD(1e-3), loss=loss)
        for _ in range(3):
            model.train_on_batch(x, targets, weights)
        return last_logits(backbone)

    def last_logits(backbone):
        return ops.convert_to_numpy(
            run(lambda x: backbone.logits(backbone(x)[:, -6:]), x)
        )

    full = golden_backbone()
    bare = last_logits(full)
    full.freeze("*")
    full.unfreeze(f"{place}/kernel")
    wanted = train(full)
    adapted = golden_backbone()
    adapted.enable_lora(64, targets=["up"])
    adapted.freeze("*/adapter_a")
    a = adapted.weights_by_name()[f"{place}/adapter_a"]
    a.assign(np.broadcast_to(np.eye(64), a.shape))
    found = train(adapted)
    assert error(wanted, bare) > 1e-3
    assert error(found, wanted) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_low_rank_gradients_are_the_kernels(golden_backbone, expected, form):
    """Gradients of A and B follow from the kernel's by the chain rule."""
    x, targets, weights = golden_training(expected)
    loss = StreamedCrossEntropy()

    def gradients_of(backbone):
        def function():
            hidden = backbone(x)[:, -targets.shape[1] - 1 : -1]
            return loss.stream(hidden, backbone.logits, targets, weights)[0]

        return gradients(function, backbone)

    adapted = golden_backbone(form=form)
    adapted.enable_lora(3, alpha=6, targets=["gate", "vision.down"])
    randomize_adapters(adapted, 0)
    found = gradients_of(adapted)
    values = adapted.adapters.values("default")
    adapted.adapters.merge()
    adapted.unfreeze("*/kernel")
    kernels = gradients_of(adapted)
    assert len(found) == 4
    for name, gradient in found.items():
        place, half = name.rsplit("/", 1)
        kernel = kernels[f"{place}/kernel"]
        a, b = values[f"{place}/adapter_a"], values[f"{place}/adapter_b"]
        if half == "adapter_a":
            wanted = 2 * kernel @ b.transpose(0, 2, 1)
        else:
            wanted = 2 * a.transpose(0, 2, 1) @ kernel
        # The two compiled programs round differently: on JAX by 1.3e-5 with the
        # inputs of kernels first, and by 3.1e-5 with their outputs first.
        assert error(gradient, wanted) < 5e-5, name


@pytest.mark.usefixtures("eager")
def test_bfloat16_base_has_float32_adapters(tiny_model, examples):
    model = tiny_model(dtype="bfloat16")
    model.enable_lora(2, targets=[*TARGETS])
    assert {variable.dtype for variable in model.trainable_variables} == {
        "float32"
    }
    before = [np.array(variable) for variable in model.trainable_variables]
    model.compile(Adam(1e-5))
    model.fit(examples, epochs=2, verbose=0)
    moved = [
        (np.array(variable) != two).any()
        for variable, two in zip(model.trainable_variables, before, strict=True)
    ]
    assert all(moved)


def test_adapters_that_take_no_part_are_not_trained(tiny_model, examples):
    """The optimizer's moments would change them or the merged kernels."""
    model = tiny_model()
    model.enable_lora(2)
    model.fit(examples, batch_size=2, verbose=0)
    before = [np.array(variable) for variable in model.trainable_variables]
    model.adapters.merge()
    with pytest.raises(ValueError, match="adapters that are merged"):
        model.fit(examples, batch_size=2, verbose=0)
    model.adapters.unmerge()
    model.adapters.select(None)
    with pytest.raises(ValueError, match="adapters that are off"):
        model.fit(examples, batch_size=2, verbose=0)
    for variable, other in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(np.array(variable), other)


def test_moments_are_one_adapters(tiny_model, examples):
    model = tiny_model()
    model.enable_lora(2)
    model.fit(examples, batch_size=2, verbose=0)
    model.adapters.add("other", LoraConfig(1, targets=["query"]))
    with pytest.raises(ValueError, match="'other' to train, after 'default'"):
        model.fit(examples, batch_size=2, verbose=0)
    model.adapters.select("default")
    model.fit(examples, batch_size=2, verbose=0)
    model.adapters.select("other")
    model.compile()
    model.fit(examples, batch_size=2, verbose=0)


def test_callbacks_cannot_change_what_is_trained(tiny_model, examples):
    """The next step would change a merged adapter, or another one."""
    model = tiny_model()
    model.enable_lora(2, name="other")
    model.enable_lora(2)
    adapters, refused = model.adapters, "'other' to train, after 'default'"
    for change, undo, message in (
        (adapters.merge, adapters.unmerge, "adapters that are merged"),
        (lambda: adapters.select("other"), None, refused),
    ):
        stop = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs, change=change: change()
        )
        with pytest.raises(ValueError, match=message):
            model.fit(examples, batch_size=2, verbose=0, callbacks=[stop])
        if undo is not None:
            undo()

    def look(batch, logs):
        adapters.select("other")
        adapters.select("default")

    adapters.select("default")
    look = keras.callbacks.LambdaCallback(on_train_batch_end=look)
    model.fit(examples, batch_size=2, verbose=0, callbacks=[look])


def test_scales_of_adapters_are_not_unfrozen(tiny_model):
    model = tiny_model()
    model.enable_lora(2)
    model.unfreeze("*")
    names = [variable.path for variable in model.trainable_variables]
    assert not any("adapter_scale" in name for name in names)
    assert any(name.endswith("mlp/up/kernel") for name in names)
