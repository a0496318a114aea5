"""A prefill in groups of rows."""

import keras
import numpy as np
import pytest

from keras_paligemma.generation import prefill


@pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="other backends run all rows at once",
)
@pytest.mark.parametrize("form", ["unrolled", "scanned"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beams": 2},
        {"num_samples": 2, "seed": 1},
        {"cache_dtype": "int8"},
    ],
)
def test_groups_of_rows_answer_as_all_at_once(
    tiny_model, examples, monkeypatch, form, options
):
    model = tiny_model(form=form)
    # Products of other shapes round differently, so that a value between two
    # steps of an int8 cache falls on either: 4e-4, as measured on one CPU.
    bound = 1e-3 if "cache_dtype" in options else 1e-5
    asked = {key: examples[key] for key in ("images", "prompts")}

    def numbers():
        model.generate_function = None
        answers = model.generate(
            asked, stop_token_ids=None, details=True, **options
        )
        rows = [row if isinstance(row, list) else [row] for row in answers]
        return [
            (answer.token_ids, answer.log_probabilities)
            for row in rows
            for answer in row
        ]

    wanted = numbers()
    groups, run = [], prefill.prefill_group

    def noted(backbone, inputs, *others):
        groups.append(inputs["prompt_ids"].shape[0])
        return run(backbone, inputs, *others)

    monkeypatch.setattr(prefill, "prefill_group", noted)
    monkeypatch.setattr(prefill, "WIDTH", 1)
    for tokens, rows in ((1, 1), (50, 2)):
        monkeypatch.setitem(prefill.TOKENS_AT_ONCE, "cpu", tokens)
        found = numbers()
        assert groups[-1] == rows
        for (ids, log), (wanted_ids, wanted_log) in zip(
            found, wanted, strict=True
        ):
            assert ids == wanted_ids
            np.testing.assert_allclose(log, wanted_log, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("batch", "tokens", "width", "device", "rows"),
    [
        (32, 1040, 9216, "tpu", 2),
        (8, 272, 9216, "cpu", 2),
        (1, 4112, 9216, "tpu", 1),
        (6, 272, 9216, "cpu", 2),
        (7, 272, 9216, "cpu", 1),
        (32, 1040, 9216, "", 32),
        (4, 10, 9216, "gpu", 4),
        # A wider model takes as many, and a narrower one more.
        (8, 272, 36_864, "cpu", 2),
        (8, 272, 4608, "cpu", 4),
        (16, 96, 384, "cpu", 16),
    ],
)
def test_rows_of_a_group_divide_the_batch(batch, tokens, width, device, rows):
    assert prefill.rows_at_once(batch, tokens, width, device) == rows
