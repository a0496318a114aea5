"""A model of `from_preset` that answers batches of requests."""

import contextlib
import dataclasses

import numpy as np

from keras_paligemma.generation.options import Options
from keras_paligemma.generation.options import prompt_seeds
from keras_paligemma.generation.requests import bucket
from keras_paligemma.generation.texts import cut
from keras_paligemma.generation.texts import settled
from keras_paligemma.layers.cache import check_cache_dtype
from keras_paligemma.models.answering import chunks
from keras_paligemma.models.answering import run
from keras_paligemma.models.generation_inputs import arrays_of
from keras_paligemma.models.generation_inputs import padded
from keras_paligemma.models.generation_outputs import answers_of
from keras_paligemma.models.generation_outputs import tokens_until
from keras_paligemma.serve.requests import Answered
from keras_paligemma.serve.requests import Choice
from keras_paligemma.serve.requests import Refused
from keras_paligemma.serve.requests import Request
from keras_paligemma.serve.requests import decode_picture
from keras_paligemma.serve.requests import power_of_two
from keras_paligemma.serve.requests import sizes

# Tokens per piece of a stream.
CHUNK = 4


class PresetModel:
    """A `PaliGemmaCausalLM` with the interface that `Batches` calls.

    Lengths, temperatures, top-p, top-k, seeds, stops and streaming are data of
    a row, so requests that differ in them share a batch. An adapter is a state
    of the whole model, and the number of alternatives is a shape, so requests
    that differ in these do not share a batch.

    Batches of greedy answers without streams have 1, 2, 4, … rows. Batches that
    sample or stream have 1 row or `largest`, since each size needs a program.

    Args:
        model: `PaliGemmaCausalLM` with a preprocessor. Its active adapter
            answers requests that name none.
        largest: int, maximum requests per batch; a power of two.
        cache_dtype: "int8" or `None`, see `generation.options.Options`.
    """

    most_alternatives = 5

    def __init__(self, model, largest=16, cache_dtype=None):
        check_cache_dtype(cache_dtype)
        self.model = model
        self.largest = power_of_two(largest)
        self.adapter = model.adapters.active
        self.longest = model.preprocessor.response_length
        self.hidden_dim = model.backbone.text_config.hidden_dim
        self.adapters = tuple(model.adapters.configs)
        self._pieces = model.preprocessor.tokenizer.get_vocabulary()
        # The options of greedy answers, by their number of alternatives.
        self._greedy = {
            count: Options(alternatives=count, cache_dtype=cache_dtype, seed=0)
            for count in (0, self.most_alternatives)
        }

    def read(self, picture, prompt, choice, limits):
        """Decode and tokenize a request; runs outside the model's thread.

        Args:
            picture: bytes of an encoded picture.
            prompt: str.
            choice: `Choice`.
            limits: `Limits`.

        Returns:
            dict of arrays (1, …) of `arrays_of`.

        Raises:
            Refused: if the request is invalid.
        """
        if choice.adapter is not None and choice.adapter not in self.adapters:
            raise Refused(
                400,
                f"No adapter {choice.adapter[:60]!r}. Expected: one of "
                f"{[*self.adapters]}.",
                "adapter",
            )
        pixels = decode_picture(picture, limits)
        try:
            arrays, _ = arrays_of(
                self.model, {"images": [pixels], "prompts": [prompt]}
            )
            return arrays
        except ValueError as error:
            raise Refused(400, str(error)[:300], "prompt") from error

    def key(self, request):
        """Return the key that the requests of a batch share."""
        adapter = request.choice.adapter or self.adapter
        return adapter, request.choice.alternatives > 0

    def warm_ups(self):
        """Return requests to answer once, so that their programs are compiled.

        Returns:
            Two lists of batches of requests: those to answer before the server
            is ready, and those to answer when it is idle.
        """
        size = self.model.preprocessor.image_converter.image_size
        inputs, _ = arrays_of(
            self.model,
            {
                "images": np.zeros((1, *size, 3), "uint8"),
                "prompts": ["caption en"],
            },
        )

        def batch(rows, temperature, streams):
            choice = Choice(CHUNK, temperature)
            return [Request(inputs, choice, streams)] * rows

        later = [
            batch(rows, temperature, streams)
            for temperature, streams in ((0.0, True), (1.0, False), (1.0, True))
            for rows in sorted({1, self.largest})
        ]
        return [batch(rows, 0.0, False) for rows in sizes(self.largest)], later

    def answer(self, requests, tell):
        """Answer a batch whose requests have one `key`.

        Args:
            requests: list of `Request`.
            tell: function of row and str, called with the pieces of streams;
                it returns whether anybody hears more of them.

        Returns:
            list of `Answered`.
        """
        # Otherwise no text is needed before the answer is complete.
        pieces = any(
            request.streams or request.choice.stop for request in requests
        )
        draws = any(request.choice.temperature for request in requests)
        rows = bucket(len(requests))
        if (pieces or draws) and rows > 1:
            rows = self.largest
        asked = self._asked(requests, rows)
        with self._using(requests[0].choice.adapter or self.adapter):
            if pieces:
                found = self._in_pieces(requests, asked, tell)
            else:
                found = run(self.model, asked)
        answers = answers_of(self.model, asked, found)
        return [
            self._answered(request, answer)
            for request, [answer] in zip(requests, answers, strict=True)
        ]

    def _using(self, adapter):
        # An adapter that is merged into the kernels stays active.
        if self.model.adapters.merged is not None:
            return contextlib.nullcontext()
        return self.model.adapters.using(adapter)

    def _asked(self, requests, rows):
        choices = [request.choice for request in requests]
        inputs = requests[0].inputs
        if rows > 1:
            filled = [*requests, *[requests[-1]] * (rows - len(requests))]
            inputs = {
                name: np.concatenate([each.inputs[name] for each in filled])
                for name in inputs
            }
        alternatives = any(choice.alternatives for choice in choices)
        options = self._greedy[self.most_alternatives if alternatives else 0]
        if any(choice.temperature for choice in choices):
            vocabulary_size = self.model.backbone.vocabulary_size
            drawn = np.random.default_rng().integers(2**31, size=len(choices))
            options = dataclasses.replace(
                options,
                temperature=[choice.temperature for choice in choices],
                top_p=[choice.top_p for choice in choices],
                top_k=[
                    min(choice.top_k or vocabulary_size, vocabulary_size)
                    for choice in choices
                ],
                # As a call with this prompt alone draws, whatever the batch.
                seed=[
                    int(other)
                    if choice.seed is None
                    else prompt_seeds(choice.seed, 0)
                    for choice, other in zip(choices, drawn, strict=True)
                ],
            )
            options.check(vocabulary_size)
        stop = self.model.preprocessor.tokenizer.end_token_id
        asked = padded(self.model, inputs, len(requests), 0, (stop,), options)
        lengths = asked.rows["max_new_tokens"].copy()
        lengths[: len(choices)] = [
            choice.length(self.longest) for choice in choices
        ]
        lengths[len(choices) :] = 1
        return dataclasses.replace(
            asked, rows=asked.rows | {"max_new_tokens": lengths}
        )

    def _in_pieces(self, requests, asked, tell):
        """Answer in chunks, and pass on the new text of rows that stream.

        A batch ends with its last row that has not ended and is heard.
        """
        given = [""] * len(requests)
        heard = [True] * len(requests)
        for found in chunks(self.model, asked, CHUNK):
            texts = self.model.preprocessor.generate_postprocess(
                {"token_ids": found["ids"][: len(requests)]}
            )
            done = True
            for row, request in enumerate(requests):
                stop = request.choice.stop
                text = cut(texts[row], stop)
                ended = found["finished"][row] or text != texts[row]
                if not ended:
                    text = settled(text, stop)
                if request.streams and text != given[row]:
                    heard[row] = tell(row, text[len(given[row]) :])
                    given[row] = text
                done = done and (ended or not heard[row])
            if done:
                break
        return found

    def _answered(self, request, answer):
        tokenizer = self.model.preprocessor.tokenizer
        pieces = self._pieces
        choice = request.choice
        ids = answer.token_ids[: choice.length(self.longest)]
        text = cut(answer.text, choice.stop)
        finish = "stop" if tokenizer.end_token_id in ids else "length"
        if text != answer.text:
            finish = "stop"
            ids = ids[: tokens_until(self.model, np.array(ids), choice.stop)]
        return Answered(
            text,
            tuple(
                _spelt(tokenizer, pieces, token, place)
                for place, token in enumerate(ids)
            ),
            ids,
            answer.log_probabilities[: len(ids)],
            finish,
            tuple(
                tuple(
                    (
                        _spelt(tokenizer, pieces, alternative.token_id, place),
                        alternative.log_probability,
                    )
                    for alternative in likeliest[: choice.alternatives]
                )
                for place, likeliest in enumerate(
                    answer.alternatives[: len(ids)]
                )
            ),
            int(request.inputs["prompt_mask"].sum()),
        )


def _spelt(tokenizer, pieces, token, place):
    """Return the text of a token; joined, those of an answer are its text.

    The end is "". The bytes of a multi-byte character are spelt as "<0xE2>".
    """
    if token == tokenizer.end_token_id:
        return ""
    text = pieces[token].replace("\u2581", " ")
    # Some tokenizers drop a space at the start of a text; PaliGemma's keeps it.
    if place == 0 and text.startswith(" "):
        kept = tokenizer.detokenize([token]).startswith(" ")
        return text if kept else text[1:]
    return text
