"""A SavedModel folder that answers batches, with TensorFlow alone."""

import secrets
from pathlib import Path

from keras_paligemma.generation.texts import cut
from keras_paligemma.serve.requests import Answered
from keras_paligemma.serve.requests import Choice
from keras_paligemma.serve.requests import Refused
from keras_paligemma.serve.requests import Request
from keras_paligemma.serve.requests import open_picture
from keras_paligemma.serve.requests import power_of_two
from keras_paligemma.serve.requests import sizes
from keras_paligemma.serve.tokens import characters

# A GIF of one pixel, as input to warm up.
PIXEL = bytes.fromhex(
    "47494638396101000100800000000000ffffff21f90401000000002c000000000100"
    "010000020144003b"
)
# The end token of all PaliGemma tokenizers.
END = 1
# Options that a graph may lack, and their values if they are not used.
OPTIONAL = {"top_p": 1.0, "top_k": None, "seed": None, "adapter": None}


def is_saved_model(source):
    """Return whether a folder is a SavedModel, not a preset."""
    return (Path(source) / "saved_model.pb").is_file()


class SavedModel:
    """An export of `model.export`, with the interface that `Batches` calls.

    Its options are inputs of its signature and apply to a whole batch, so
    requests that differ in them do not share a batch. Requests that differ in
    length do: the longest is computed and the others are cut. The graph
    decodes pictures.

    Args:
        folder: str or path.
        largest: int, maximum requests per batch; a power of two.
    """

    most_alternatives = 0
    # The graph does not tell.
    hidden_dim = None

    def __init__(self, folder, largest=16):
        import tensorflow as tf
        import tensorflow_text  # noqa: F401  registers operations
        from tensorflow.core.protobuf import saved_model_pb2

        self.tf = tf
        self.largest = power_of_two(largest)
        self.loaded = tf.saved_model.load(str(folder))
        self.function = self.loaded.signatures.get("serving_default")
        if self.function is None or (
            "tokens" not in self.function.structured_outputs
        ):
            raise ValueError(
                "The SavedModel has no signature `serving_default` with an "
                f"output `tokens`. Received: {folder}, of an older version or "
                "another program. Expected: an export by this one."
            )
        content = (Path(folder) / "saved_model.pb").read_bytes()
        graph = saved_model_pb2.SavedModel.FromString(content).meta_graphs[0]
        defaults = graph.signature_def["serving_default"].defaults
        self.defaults = {
            name: tf.constant(tf.make_ndarray(value))
            for name, value in defaults.items()
        }
        self.longest = int(self.defaults["max_new_tokens"])
        # The graph does not expose the names of its adapters.
        self.adapters = None if "adapter" in self.defaults else ()

    def read(self, picture, prompt, choice, limits):
        """Validate what the graph cannot; see `PresetModel.read`."""
        for name, unset in OPTIONAL.items():
            if getattr(choice, name) != unset and name not in self.defaults:
                raise Refused(
                    400,
                    f"This SavedModel has no option `{name}`. Expected: one of "
                    f"{', '.join(sorted(self.defaults))}.",
                    name,
                )
        open_picture(picture, limits).close()
        return picture, prompt

    def key(self, request):
        """Return the key that the requests of a batch share.

        Random draws depend on the row, so a request with a seed is computed
        alone, which makes its answer reproducible.
        """
        choice = request.choice
        is_free = choice.seed is None or choice.temperature == 0
        return (
            choice.temperature,
            choice.top_p,
            choice.top_k,
            choice.adapter,
            None if is_free else id(request),
        )

    def warm_ups(self):
        """Return batches of all sizes; see `PresetModel.warm_ups`."""
        request = Request((PIXEL, "caption en"), Choice())
        return [[request] * rows for rows in sizes(self.largest)], []

    def answer(self, requests, tell):
        """Answer a batch whose requests have one `key`.

        A stream arrives as one piece.
        """
        tf = self.tf
        # The graph takes any batch size; using few sizes reuses its buffers.
        rows = 1 << (len(requests) - 1).bit_length()
        inputs = [request.inputs for request in requests]
        inputs += [inputs[-1]] * (rows - len(inputs))
        pictures, prompts = zip(*inputs, strict=True)
        outputs = self.function(
            images=tf.constant(pictures),
            prompts=tf.constant(prompts),
            **self._options(requests),
        )
        outputs = {name: tensor.numpy() for name, tensor in outputs.items()}
        answers = []
        for row, request in enumerate(requests):
            error = outputs["error"][row].decode()
            if error:
                answers.append(Refused(400, error))
                continue
            answer = self._answered(outputs, row, request.choice)
            if request.streams:
                tell(row, answer.text)
            answers.append(answer)
        return answers

    def _options(self, requests):
        """Return the options of a batch as tensors; missing ones as default."""
        choice = requests[0].choice
        given = {
            name: getattr(choice, name) for name in ("temperature", *OPTIONAL)
        }
        given["max_new_tokens"] = max(
            request.choice.length(self.longest) for request in requests
        )
        if choice.seed is None and choice.temperature:
            given["seed"] = secrets.randbelow(2**31)
        return self.defaults | {
            name: self.tf.constant(value, self.defaults[name].dtype)
            for name, value in given.items()
            if value is not None and name in self.defaults
        }

    def _answered(self, outputs, row, choice):
        ids = outputs["token_ids"][row]
        written = int((ids != 0).sum())
        count = min(written, choice.length(self.longest))
        text = outputs["text"][row].decode()
        tokens = _spelt(outputs["tokens"][row][:count], ids, text)
        if count < written or choice.stop:
            text = _text(tokens)
        finish = "stop" if END in ids[:count] else "length"
        kept = cut(text, choice.stop)
        if kept != text:
            text, finish = kept, "stop"
            while _stops(tokens[: count - 1], choice.stop):
                count -= 1
        return Answered(
            text,
            tokens[:count],
            tuple(ids[:count].tolist()),
            tuple(outputs["log_probabilities"][row][:count].tolist()),
            finish,
        )


def _spelt(pieces, ids, text):
    """Return tokens as `PresetModel` spells them."""
    texts = [
        "" if id == END else piece.decode().replace("\u2581", " ")
        for piece, id in zip(pieces, ids, strict=False)
    ]
    if not text.startswith(" "):
        texts[:1] = [first.removeprefix(" ") for first in texts[:1]]
    return tuple(texts)


def _stops(tokens, stop):
    text = _text(tokens)
    return cut(text, stop) != text


def _text(tokens):
    return "".join(characters(tokens))
