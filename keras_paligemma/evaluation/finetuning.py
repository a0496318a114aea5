"""Settings and training examples for fine-tuning on a benchmark."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_paligemma.data.examples import located
from keras_paligemma.evaluation.registry import Benchmark
from keras_paligemma.evaluation.registry import find_benchmark
from keras_paligemma.evaluation.samples import Samples
from keras_paligemma.evaluation.sources import OWN
from keras_paligemma.evaluation.sources import open_samples
from keras_paligemma.metrics.referring import to_mask
from keras_paligemma.tasks.answers import write_objects
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.objects import Object
from keras_paligemma.tasks.published_codecs import mask_codec

# The original's transfer settings, unless a record overrides them.
_COMMON = {"batch_size": 256, "label_smoothing": 0.0, "lora_rank": 0}
_RESOLUTION = "448"


def settings_of(benchmark: Benchmark, image_size: int) -> dict[str, Any]:
    """Return the settings of the original's transfer.

    The original's text length covers prompt and response together. Here each
    of the two has this length, so no text that fits the original is truncated.

    Args:
        benchmark: `Benchmark`.
        image_size: int, pixels; at 448 and above, the record's settings for
            448 apply.

    Returns:
        dict of fields of `training.Settings`.

    Example:

    >>> from keras_paligemma.evaluation import find_benchmark
    >>> settings_of(find_benchmark("textvqa"), 448)["epochs"]
    10
    """
    record = dict(benchmark.finetune)
    larger = record.pop(_RESOLUTION, {})
    if image_size >= int(_RESOLUTION):
        record |= larger
    lengths = dict.fromkeys(
        ("prompt_length", "response_length"), benchmark.text_length
    )
    return (_COMMON if benchmark.finetune else {}) | lengths | record


def for_run(
    name: str, given: Mapping[str, Any], masks: str | None = None
) -> tuple[dict[str, Any], "TrainingSource | None"]:
    """Return the defaults and examples of `finetune --benchmark`.

    Args:
        name: str, name of a benchmark.
        given: dict of the user's settings: `preset`, `data`, and others, which
            override the record's.
        masks: str, path or handle of the mask codec for RefCOCO's answers; see
            `tasks.published_codecs`.

    Returns:
        Tuple of a dict of default settings, and the `TrainingSource` of the
        training split, or `None` if `data` is a JSONL file.

    Raises:
        ValueError: the benchmark is unknown, `given` lacks the preset or the
            data, or the data has no training split.
    """
    from keras_paligemma.checkpoints import formats

    benchmark = find_benchmark(name)
    preset, data = given.get("preset"), given.get("data")
    if not preset or not data:
        raise ValueError(
            "A fine-tune for a benchmark needs --preset and --data. Received: "
            f"preset={preset!r}, data={data!r}."
        )
    config = formats.resolve(preset, False).config.backbone
    size = given.get("image_size") or config.image_size
    settings = settings_of(benchmark, size)
    if given.get("lora_rank"):
        # With adapters, all other weights are frozen anyway.
        settings.pop("freeze", None)
    if Path(data).is_file():
        return settings, None
    samples = training_samples(benchmark, data)
    codec = None
    if benchmark.metric == "refcoco":
        codec = mask_codec(config.text_decoder.hidden_dim, masks)
    return settings, TrainingSource(samples, codec)


def training_samples(benchmark: Benchmark, source: Any) -> Samples:
    """Open the training split of a benchmark.

    ChartQA's two kinds are mixed in proportion to their sizes, as in the
    original. RefCOCO, RefCOCO+ and RefCOCOg are not mixed: training pictures
    of one are test pictures of another.

    Args:
        benchmark: `Benchmark`.
        source: as `open_samples` takes it.

    Returns:
        `Samples` of the training split.

    Raises:
        ValueError: the benchmark has no training split, or the data does not
            contain the target text.
    """
    if benchmark.response is None and benchmark.metric != "refcoco":
        raise ValueError(
            f"How a model writes what it reads in {benchmark.name} is not in "
            "its data. Make a JSONL file of `image`, `prefix` and `suffix`, "
            "and pass it as data."
        )
    folder = isinstance(source, (str, os.PathLike))
    own = folder and (Path(source) / OWN).is_file()
    if benchmark.train_split is None and not own:
        raise ValueError(
            f"{benchmark.name} has no training split: the card's models "
            "learned from another task. Fine-tune with that one's benchmark, "
            f"or pass a folder with {OWN} of your own."
        )
    if benchmark.task == "chartqa":
        benchmark = dataclasses.replace(benchmark, subset=None)
    if benchmark.train_split is not None:
        # Any source may hold it, so it is no choice among a source's splits.
        benchmark = dataclasses.replace(
            benchmark,
            split=benchmark.train_split,
            tfds_split=benchmark.tfds_train_split,
        )
    return open_samples(benchmark, source)


class TrainingSource:
    """Samples as training examples: images, prompts and responses.

    Args:
        samples: `Samples`, such as `training_samples` returns.
        codec: `MaskCodec`, which encodes the masks in RefCOCO's responses.

    Example:

    ```python
    source = TrainingSource(training_samples(benchmark, folder))
    batches = Batches(source, model.preprocessor, batch_size=8)
    ```
    """

    def __init__(
        self, samples: Samples, codec: MaskCodec | None = None
    ) -> None:
        self.samples = samples
        self.codec = codec

    def __len__(self):
        return len(self.samples)

    @property
    def pictures(self) -> int:
        """Return the number of pictures, or video frames, of one prompt."""
        return self.samples.benchmark.pictures_of_a_prompt

    def where(self, index: int) -> str:
        """Return the place of an example, by its id, for error messages."""
        return self.samples.where(index)

    def __getitem__(self, index):
        sample = self.samples[index]
        return {
            "images": sample.images,
            "prompts": sample.prompt,
            "responses": self._responses(sample, index),
        }

    def _responses(self, sample, index):
        benchmark = self.samples.benchmark
        if self.codec is not None:
            with located(self.where(index)):
                mask = to_mask(sample.truth["masks"])
                found = Object(sample.truth["boxes"]).with_mask(mask)
                return write_objects([found], self.codec)
        answers = sample.truth.get(benchmark.response)
        several = isinstance(answers, list)
        # Repeated answers stay, so they are drawn as often as in the original.
        texts = [
            answer for answer in (answers if several else [answers]) if answer
        ]
        if benchmark.lower_answers:
            texts = [text.lower() for text in texts]
        # An empty list is refused where examples are read, with their place.
        return texts[0] if texts and not several else texts
