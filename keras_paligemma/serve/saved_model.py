"""A SavedModel folder that answers batches, with TensorFlow alone."""

from pathlib import Path

from keras_paligemma.serve.requests import Answered
from keras_paligemma.serve.requests import Choice
from keras_paligemma.serve.requests import Refused
from keras_paligemma.serve.requests import Request
from keras_paligemma.serve.requests import check_picture
from keras_paligemma.serve.requests import power_of_two
from keras_paligemma.serve.requests import sizes

# A GIF of one pixel, as input to warm up.
PIXEL = bytes.fromhex(
    "47494638396101000100800000000000ffffff21f90401000000002c000000000100"
    "010000020144003b"
)


def is_saved_model(source):
    """Return whether a folder is a SavedModel, not a preset."""
    return (Path(source) / "saved_model.pb").is_file()


class SavedModel:
    """An export of `model.export`, with the interface that `Batches` calls.

    Its options are inputs of a whole batch, so requests that differ in them do
    not share one. Its graph decodes pictures, and returns no tokens as text.

    Args:
        folder: str or path.
        largest: int, most requests a batch; a power of two.
    """

    most_alternatives = 0
    adapters = None

    def __init__(self, folder, largest=8):
        import tensorflow as tf
        import tensorflow_text  # noqa: F401  registers operations
        from tensorflow.core.protobuf import saved_model_pb2

        self.tf = tf
        self.largest = power_of_two(largest)
        self.loaded = tf.saved_model.load(str(folder))
        self.function = self.loaded.signatures["serving_default"]
        content = (Path(folder) / "saved_model.pb").read_bytes()
        graph = saved_model_pb2.SavedModel.FromString(content).meta_graphs[0]
        defaults = graph.signature_def["serving_default"].defaults
        self.defaults = {
            name: tf.constant(tf.make_ndarray(value))
            for name, value in defaults.items()
        }
        self.longest = int(self.defaults["max_new_tokens"])

    def read(self, picture, prompt, choice, limits, field="image"):
        """Validate what the graph cannot; see `PresetModel.read`."""
        for name, default in (
            ("top_p", 1.0),
            ("top_k", None),
            ("seed", None),
            ("stop", ()),
        ):
            if getattr(choice, name) != default:
                raise Refused(
                    400, f"A SavedModel has no option `{name}`.", name
                )
        if choice.adapter is not None and "adapter" not in self.defaults:
            raise Refused(400, "This model has no adapters.", "adapter")
        check_picture(picture, limits, field)
        return picture, prompt

    def key(self, request):
        """Return the key that the requests of a batch share."""
        choice = request.choice
        return choice.max_new_tokens, choice.temperature, choice.adapter

    def warm_ups(self):
        """Give batches of all sizes; see `PresetModel.warm_ups`."""
        request = Request((PIXEL, "caption en"), Choice())
        return [[request] * rows for rows in sizes(self.largest)], []

    def answer(self, requests, tell):
        """Answer a batch whose requests have one `key`.

        A stream arrives as one piece.
        """
        tf, choice = self.tf, requests[0].choice
        given = {"temperature": choice.temperature, "adapter": choice.adapter}
        if choice.max_new_tokens is not None:
            given["max_new_tokens"] = min(choice.max_new_tokens, self.longest)
        options = self.defaults | {
            name: tf.constant(value, self.defaults[name].dtype)
            for name, value in given.items()
            if value is not None
        }
        # The graph takes any batch size; using few sizes reuses its buffers.
        rows = 1 << (len(requests) - 1).bit_length()
        inputs = [one.inputs for one in requests]
        inputs += [inputs[-1]] * (rows - len(inputs))
        pictures, prompts = zip(*inputs, strict=True)
        outputs = self.function(
            images=tf.constant(pictures),
            prompts=tf.constant(prompts),
            **options,
        )
        outputs = {name: one.numpy() for name, one in outputs.items()}
        answers = []
        for row, request in enumerate(requests):
            error = outputs["error"][row].decode()
            if error:
                answers.append(Refused(400, error))
                continue
            answer = _answered(outputs, row)
            if request.streams:
                tell(row, answer.text)
            answers.append(answer)
        return answers


def _answered(outputs, row):
    ids = outputs["token_ids"][row]
    count = int((ids != 0).sum())
    return Answered(
        outputs["text"][row].decode(),
        (),
        tuple(ids[:count].tolist()),
        tuple(outputs["log_probabilities"][row][:count].tolist()),
        # 1 is the end token of all PaliGemma tokenizers.
        "stop" if count and ids[count - 1] == 1 else "length",
    )
