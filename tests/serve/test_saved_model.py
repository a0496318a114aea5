"""A SavedModel's options, tokens and errors, with a minimal graph."""

import pytest
from starlette.testclient import TestClient

from keras_paligemma.serve.app import make_app
from keras_paligemma.serve.requests import Choice
from keras_paligemma.serve.requests import Limits
from keras_paligemma.serve.requests import Refused
from keras_paligemma.serve.requests import Request
from keras_paligemma.serve.saved_model import SavedModel
from tests.serve.test_openai import PNG
from tests.serve.test_openai import api_of
from tests.serve.test_openai import messages
from tests.serve.test_openai import openai

tf = pytest.importorskip("tensorflow")
pytest.importorskip("tensorflow_text")

# The graph's fixed answer: "é" is two byte tokens.
PIECES = ("▁a", "▁cat", "<0xC3>", "<0xA9>", "▁sits", "<eos>")
SPELT = ("a", " cat", "<0xC3>", "<0xA9>", " sits", "")
IDS = (10, 11, 12, 13, 14, 1)


def outputs(images, length, options, error="", text="a caté sits"):
    """Return an export's outputs, with the options as log-probabilities."""
    rows = tf.shape(images)[0]
    told = [tf.cast(tensor, tf.float32) for tensor in (rows, *options)]
    told = tf.pad(tf.stack(told), [[0, len(IDS) - len(told)]])
    columns = {
        "token_ids": tf.constant(IDS),
        "tokens": tf.constant(PIECES),
        "log_probabilities": told,
    }
    return {
        "text": tf.fill([rows], text),
        "error": tf.fill([rows], error),
        **{
            name: tf.tile(column[None, :length], [rows, 1])
            for name, column in columns.items()
        },
    }


def spec(name, dtype, rank=0):
    return tf.TensorSpec([None] * rank, dtype, name)


PLAIN = [
    spec("images", tf.string, 1),
    spec("prompts", tf.string, 1),
    spec("max_new_tokens", tf.int32),
    spec("temperature", tf.float32),
]
FULL = [
    *PLAIN,
    spec("top_k", tf.int32),
    spec("top_p", tf.float32),
    spec("seed", tf.int32),
    spec("adapter", tf.string),
]
# The default of each option in the file.
SIX, ZERO = tf.constant(6), tf.constant(0)
GREEDY, ALL, NONE = tf.constant(0.0), tf.constant(1.0), tf.constant("")


class Graph(tf.Module):
    @tf.function(input_signature=PLAIN)
    def plain(
        self,
        images,
        prompts,
        max_new_tokens=SIX,
        temperature=GREEDY,
    ):
        options = [max_new_tokens, temperature]
        # Its tokenizer keeps the space at the start, as PaliGemma's does.
        return outputs(images, max_new_tokens, options, text=" a caté sits")

    @tf.function(input_signature=FULL)
    def full(
        self,
        images,
        prompts,
        max_new_tokens=SIX,
        temperature=GREEDY,
        top_k=ZERO,
        top_p=ALL,
        seed=ZERO,
        adapter=NONE,
    ):
        is_known = (adapter == "") | (adapter == "styled")
        return outputs(
            images,
            max_new_tokens,
            [max_new_tokens, temperature, top_k, top_p, seed],
            tf.where(is_known, "", "`adapter` is unknown."),
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return two SavedModels: one takes few options, and one takes all."""

    def load(name):
        folder = tmp_path_factory.mktemp(name)
        graph = Graph()
        signatures = {"serving_default": getattr(graph, name)}
        tf.saved_model.save(graph, str(folder), signatures)
        return SavedModel(folder, largest=4)

    return {name: load(name) for name in ("plain", "full")}


def test_a_model_of_another_program_is_refused(tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path))
    with pytest.raises(ValueError, match="signature `serving_default`.*Exp"):
        SavedModel(tmp_path)


def request(model, **options):
    choice = Choice(**options)
    inputs = model.read(PNG, "caption en", choice, Limits())
    return Request(inputs, choice)


def test_the_graph_gets_the_options_that_it_has(models):
    model = models["full"]
    asked = request(model, temperature=0.5, top_k=7, top_p=0.75, seed=9)
    [answer] = model.answer([asked], None)
    assert answer.log_probabilities == (1, 6, 0.5, 7, 0.75, 9)
    assert answer.tokens == SPELT
    assert (answer.text, answer.finish) == ("a caté sits", "stop")
    [greedy] = model.answer([request(model)], None)
    assert greedy.log_probabilities == (1, 6, 0, 0, 1, 0)
    # Samples without a seed differ each time.
    drawn = [request(model, temperature=1.0)] * 2
    seeds = {
        model.answer([drawing], None)[0].log_probabilities[5]
        for drawing in drawn
    }
    assert len(seeds) == 2


def test_a_space_at_the_start_is_kept_if_the_graph_keeps_it(models):
    model = models["plain"]
    [answer] = model.answer([request(model)], None)
    assert answer.text == " a caté sits"
    assert answer.tokens == (" a", *SPELT[1:])


@pytest.mark.parametrize(
    "options",
    [{"seed": 0}, {"top_k": 5}, {"top_p": 0.5}, {"adapter": "styled"}],
)
def test_it_refuses_what_the_graph_has_not(models, options):
    model = models["plain"]
    [name] = options
    with pytest.raises(Refused, match="max_new_tokens, temperature") as caught:
        request(model, temperature=1.0, **options)
    assert (caught.value.status, caught.value.field) == (400, name)
    request(models["full"], temperature=1.0, **options)


def test_requests_of_other_lengths_and_stops_share_a_batch(models):
    model = models["full"]
    requests = [
        request(model, max_new_tokens=2),
        request(model, max_new_tokens=4),
        request(model, max_new_tokens=4, stop=("é",)),
        request(model, seed=1),
    ]
    assert len({model.key(asked) for asked in requests}) == 1
    short, cut, stopped, whole = model.answer(requests, None)
    assert short.tokens == SPELT[:2]
    assert (short.text, short.finish) == ("a cat", "length")
    # Four rows, generated to the length of the longest.
    assert short.log_probabilities == (4, 6)
    assert (cut.text, cut.finish) == ("a caté", "length")
    assert (whole.text, whole.finish) == ("a caté sits", "stop")
    assert (stopped.text, stopped.finish) == ("a cat", "stop")
    assert stopped.token_ids == IDS[:4]


def test_requests_of_other_options_do_not(models):
    model = models["full"]
    kinds = (
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 1},
        {"adapter": "styled"},
    )
    requests = [request(model, **kind) for kind in kinds]
    assert len({model.key(asked) for asked in requests}) == len(kinds)


def test_openais_client(models):
    app = make_app(models["full"], "saved")
    with TestClient(app) as client, api_of(client) as api:
        ask = api.chat.completions.create
        [choice] = ask(
            model="saved", messages=messages(), logprobs=True
        ).choices
        spelt = [token.token for token in choice.logprobs.content]
        assert spelt == list(SPELT)
        assert choice.message.content == "a caté sits"
        styled = ask(
            model="styled", messages=messages(), temperature=1, seed=3, n=2
        )
        assert len(styled.choices) == 2
        for changes, field in (
            ({"model": "other"}, "`adapter` is unknown"),
            ({"top_logprobs": 1, "logprobs": True}, "top_logprobs"),
        ):
            fields = {"model": "saved", "messages": messages()} | changes
            with pytest.raises(openai.BadRequestError, match=field):
                ask(**fields)
    app = make_app(models["plain"], "saved")
    with TestClient(app) as client, api_of(client) as api:
        with pytest.raises(openai.BadRequestError) as caught:
            api.chat.completions.create(
                model="saved", messages=messages(), seed=1
            )
        assert caught.value.param == "seed"
        with pytest.raises(openai.NotFoundError):
            api.chat.completions.create(model="other", messages=messages())
