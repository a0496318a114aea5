"""PaliGemmaCausalLM: fit, generate and presets around a backbone."""

import contextlib

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_paligemma.compat import classproperty
from keras_paligemma.compat import init_model
from keras_paligemma.compat import never_functional
from keras_paligemma.models import exports
from keras_paligemma.models import files
from keras_paligemma.models.backbone import PaliGemmaBackbone
from keras_paligemma.models.backbone import check_token_ids
from keras_paligemma.models.batches import Examples
from keras_paligemma.models.batches import PreprocessedBatches
from keras_paligemma.models.generation import drop_after_stop
from keras_paligemma.models.generation import generate_tokens
from keras_paligemma.models.generation import split_prompt
from keras_paligemma.models.losses import responses_only
from keras_paligemma.models.losses import streamed_cross_entropy
from keras_paligemma.preprocessing.preprocessor import (
    PaliGemmaCausalLMPreprocessor,
)


@never_functional
@keras.saving.register_keras_serializable(package="keras_paligemma")
class PaliGemmaCausalLM(keras_hub.models.CausalLM):
    """PaliGemma 2 that answers prompts about pictures, and learns to.

    Args:
        backbone: `PaliGemmaBackbone`.
        preprocessor: `PaliGemmaCausalLMPreprocessor`; without one, arrays go
            in and token ids come out.
        compile: bool, compile with the defaults.

    Call arguments:
        inputs: dict as `PaliGemmaBackbone` takes it.

    Returns:
        float32 logits (B, text tokens, V); none for image tokens.

    Example:

    ```python
    model = PaliGemmaCausalLM.from_preset("pali_gemma2_nano_112")
    model.generate({"images": picture, "prompts": "caption en"})
    ```

    Source: https://arxiv.org/abs/2412.03555.
    """

    backbone_cls = PaliGemmaBackbone
    preprocessor_cls = PaliGemmaCausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, compile=True, **kwargs):
        init_model(self, backbone.dtype_policy, **kwargs)
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.accuracy_tracker = keras.metrics.Mean(name="token_accuracy")
        self._response_length = None
        self.loss_is_auto = False
        self.built = True
        if compile:
            self.compile()

    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        metrics=None,
        weighted_metrics=None,
        sampler="greedy",
        **kwargs,
    ):
        """Choose optimizer, loss, metrics and sampler.

        Args:
            optimizer: Keras optimizer or "auto": Adam at 2e-5.
            loss: "auto", or any Keras loss of (B, R) targets and (B, R, V)
                logits. "auto" is the original's: the mean over examples of
                each one's mean over its response, streamed over the head so
                that the logits are never in memory at once, with the accuracy
                of the best guess as `token_accuracy`.
            metrics: Keras metrics, unweighted: they see padding too.
            weighted_metrics: Keras metrics of the response tokens.
            sampler: name or `keras_hub.samplers.Sampler` for `generate`.
            **kwargs: as `keras.Model.compile` takes them.
        """
        if optimizer == "auto":
            # In bfloat16 a beta_2 of 0.999 rounds to 1 and nothing ever moves.
            half = self.backbone.dtype_policy.variable_dtype == "bfloat16"
            optimizer = keras.optimizers.Adam(
                2e-5, beta_2=0.95 if half else 0.999
            )
        self.loss_is_auto = loss == "auto"
        self.loss_is_streamed = self.loss_is_auto and not (
            metrics or weighted_metrics
        )
        keras.Model.compile(
            self,
            optimizer=optimizer,
            loss=None if self.loss_is_auto else loss,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )
        self.sampler = keras_hub.samplers.get(sampler)
        self.generate_function = None

    def get_compile_config(self):
        """Tell a `.keras` file how the model was compiled."""
        config = super().get_compile_config()
        return config | {
            "loss": "auto" if self.loss_is_auto else config.get("loss"),
            "sampler": keras_hub.samplers.serialize(self.sampler),
            "optimizer_built": self.optimizer.built,
        }

    def compile_from_config(self, config):
        """Compile as a `.keras` file says."""
        config = dict(config)
        optimizer_built = config.pop("optimizer_built")
        sampler = keras_hub.samplers.deserialize(config.pop("sampler"))
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config, sampler=sampler)
        if optimizer_built:
            self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self):
        metrics = super().metrics
        if self.loss_is_auto:
            return metrics
        return [one for one in metrics if one is not self.accuracy_tracker]

    def call(self, inputs, training=None):
        hidden_BLD = self.backbone(inputs)
        if self._response_length is None:
            tokens = inputs["token_ids"].shape[1]
            return self.backbone.logits(hidden_BLD[:, -tokens:])
        # In fit: the states that predict the response, and nothing else.
        hidden_BRD = hidden_BLD[:, -self._response_length - 1 : -1]
        if self.loss_is_streamed:
            return hidden_BRD
        return self.backbone.logits(hidden_BRD)

    def train_step(self, *args):
        with self._answering(args[-1]):
            return super().train_step(*args)

    def test_step(self, *args):
        with self._answering(args[-1]):
            return super().test_step(*args)

    @contextlib.contextmanager
    def _answering(self, data):
        """Make calls predict the responses of `data`, as losses want them."""
        _, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        self._response_length = y.shape[1]
        try:
            yield
        finally:
            self._response_length = None

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        if not self.loss_is_auto:
            y_pred = responses_only(y, y_pred)
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        if sample_weight is None:
            sample_weight = ops.ones_like(y, dtype="float32")
        head = self.backbone.logits if self.loss_is_streamed else (lambda x: x)
        loss, accuracy = streamed_cross_entropy(y_pred, head, y, sample_weight)
        self.accuracy_tracker.update_state(accuracy)
        return loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y_pred = responses_only(y, y_pred)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def fit(self, x=None, y=None, batch_size=None, shuffle=True, **kwargs):
        """Train on dictionaries of images, prompts and responses.

        Args:
            x: dict of equally long lists (or arrays) `images`, `prompts`,
                `responses`, preprocessed a batch at a time; a
                `keras.utils.PyDataset` of raw or preprocessed batches; a
                Grain or `tf.data` dataset of preprocessed batches.
            y: `None`; the targets come from the responses.
            batch_size: int, 32 if `None`; only for a dict.
            shuffle: bool, draw a dict's examples in another order each epoch.
            **kwargs: as `keras.Model.fit` takes them; `validation_data` takes
                what `x` takes.

        Returns:
            `keras.callbacks.History`.
        """
        x, y = self._batches(x, y, batch_size, shuffle)
        if kwargs.get("validation_data") is not None:
            kwargs["validation_data"] = self._batches(
                kwargs["validation_data"], None, batch_size
            )[0]
        return keras.Model.fit(self, x, y, batch_size=None, **kwargs)

    def evaluate(self, x=None, y=None, batch_size=None, **kwargs):
        """Measure loss and metrics; takes what `fit` takes."""
        if not kwargs.get("_use_cached_eval_dataset"):
            x, y = self._batches(x, y, batch_size)
        return keras.Model.evaluate(self, x, y, batch_size=None, **kwargs)

    def make_train_function(self, force=False):
        if self.backbone.quantization and self.backbone.lora is None:
            raise ValueError(
                f"A model of {self.backbone.quantization} kernels has no "
                "gradients of them: they are frozen integers. Received: a "
                "model without adapters to train. Call `enable_lora` and "
                "compile again, or load it without `quantize`."
            )
        return super().make_train_function(force)

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """Refuse, and say how: weights are quantised as they are read."""
        self.backbone.quantize(mode)

    def _batches(self, x, y, batch_size, shuffle=False):
        if isinstance(x, dict):
            if y is not None:
                raise ValueError(
                    "Targets come from the responses. Received: y. Expected: "
                    "a dict with 'images', 'prompts' and 'responses', no y."
                )
            x = Examples(x, batch_size or 32, shuffle)
        if isinstance(x, keras.utils.PyDataset):
            x = PreprocessedBatches(x, self.preprocess_samples)
        if "prompts" in str(getattr(x, "element_spec", "")):
            raise ValueError(
                "Raw text in a tf.data dataset cannot be preprocessed: that "
                "runs in Python, not in a graph. Received: "
                f"{x.element_spec}. Expected: a dict of lists, a "
                "keras.utils.PyDataset of raw batches, or a Grain dataset "
                "with `.map(model.preprocessor)`."
            )
        return x, y

    def preprocess_samples(self, x, y=None, sample_weight=None):
        if "token_ids" in x:
            check_token_ids(
                x["token_ids"], self.backbone.text_config.vocabulary_size
            )
        return super().preprocess_samples(x, y, sample_weight)

    def generate_step(self, inputs, stop_token_ids=None):
        return generate_tokens(
            self.backbone, self.sampler, inputs, stop_token_ids, self
        )

    def generate(
        self,
        inputs,
        max_new_tokens=None,
        stop_token_ids="auto",
        strip_prompt=True,
    ):
        """Answer prompts about pictures.

        Args:
            inputs: dict of `images` and `prompts`: one picture and one string,
                or lists of them; `responses` may hold what the answers begin
                with. It is not changed. Without a preprocessor: arrays, as
                `preprocessor.generate_preprocess` makes them.
            max_new_tokens: int, the longest answer; the preprocessor's
                `response_length` if `None`.
            stop_token_ids: ints that end an answer; "auto" is the tokenizer's
                end token; `None` never stops early.
            strip_prompt: bool; `False` gives prompt, newline and answer, as
                KerasHub does.

        Returns:
            A string for one prompt, a list of strings for a list of prompts;
            without a preprocessor an int32 array (B, max_new_tokens), 0 after
            the stop token.

        Example:

        ```python
        model.generate(
            {"images": [cat, dog], "prompts": ["caption en", "detect dog"]},
            max_new_tokens=20,
        )
        ```
        """
        if stop_token_ids == "auto":
            if self.preprocessor is None:
                raise ValueError(
                    "Without a preprocessor nobody knows what ends an answer. "
                    "Received: stop_token_ids='auto'. Expected: a list of "
                    "token ids, or None."
                )
            stop_token_ids = [self.preprocessor.tokenizer.end_token_id]
        if stop_token_ids is not None:
            stop_token_ids = tuple(stop_token_ids)
        arrays = dict(inputs)
        if self.preprocessor is not None:
            arrays = self.preprocessor.generate_preprocess(
                arrays, max_new_tokens
            )
        check_token_ids(
            arrays["token_ids"], self.backbone.text_config.vocabulary_size
        )
        single = np.ndim(arrays["token_ids"]) == 1
        if single:
            arrays = {key: value[None] for key, value in arrays.items()}
        arrays = split_prompt(arrays, max_new_tokens)
        ids = ops.convert_to_numpy(
            self.make_generate_function()(arrays, stop_token_ids)
        )
        ids = drop_after_stop(ids, stop_token_ids)
        if self.preprocessor is None:
            return ids[0] if single else ids
        texts = self.preprocessor.generate_postprocess({"token_ids": ids})
        if not strip_prompt:
            prompts = [inputs["prompts"]] if single else inputs["prompts"]
            texts = [
                prompt.removesuffix("\n") + "\n" + text
                for prompt, text in zip(prompts, texts, strict=True)
            ]
        return texts[0] if single else texts

    def enable_lora(self, rank, alpha=None, targets=None):
        """Freeze the model and train low-rank adapters in the decoder.

        See `PaliGemmaBackbone.enable_lora`. Compile again afterwards: the
        optimizer must see the new variables.
        """
        self.backbone.enable_lora(rank, alpha, targets)
        self.train_function = None
        self.generate_function = None

    @classproperty
    def presets(cls):
        """Describe the presets, as `PaliGemmaBackbone.presets` does."""
        return cls.backbone_cls.presets

    @classmethod
    def from_preset(cls, preset, load_weights=True, dtype=None, **kwargs):
        """Load a model from a checkpoint, whoever made it.

        Args:
            preset: str, a name of `PaliGemmaBackbone.presets`; a directory of
                this package, of transformers or of KerasHub; big_vision's
                "X.npz", whole or in pieces; or a handle of any of them,
                "hf://…", "kaggle://…", "gs://…".
            load_weights: bool; `False` gives a model of random weights.
            dtype: dtype policy; the file's dtype if `None`.
            **kwargs: `image_size` other than the checkpoint's (its positions
                are resampled as the original does), `tokenizer` where the
                checkpoint has none beside it, and fields that no file tells
                or that are to differ: `query_pre_attention_scalar`,
                `attention_logit_soft_cap`, `final_logit_soft_cap`, …
                `quantize="int8"` or `"int4"` stores kernels and embedding in
                so few bits, quantised tensor by tensor as they are read.
                `form` and `remat` go to the backbone, `compile` and `name` to
                the model, `resize`, `prompt_length`, `response_length` and
                the like to the preprocessor.

        Returns:
            `PaliGemmaCausalLM`.

        Raises:
            ValueError: unknown name (with the nearest ones), a missing file,
                a checkpoint that does not fit.
        """
        return files.load_task(cls, preset, load_weights, dtype, kwargs)

    def save_to_preset(self, preset_dir):
        """Write configuration, weights and tokenizer to a directory.

        Args:
            preset_dir: str or path; `from_preset` loads it, exactly.
        """
        exports.export(preset_dir, "keras", self.backbone, self.preprocessor)

    def export_to_transformers(self, path):
        """Write a folder that transformers loads, processor included.

        Args:
            path: str or path of a folder that is not there yet.
        """
        exports.export(path, "transformers", self.backbone, self.preprocessor)

    def export_to_keras_hub(self, path):
        """Write a preset that KerasHub loads.

        Args:
            path: str or path of a folder that is not there yet.
        """
        exports.export(path, "keras_hub", self.backbone, self.preprocessor)

    def export_to_big_vision(self, path, dtype=None, piece_size=None):
        """Write big_vision's `.npz`, whole or in pieces.

        Args:
            path: str or path of the file, "….npz".
            dtype: "float32" or "bfloat16"; that of the weights if `None`.
            piece_size: int, bytes of a piece; one file if `None`.
        """
        options = {"dtype": dtype, "piece_size": piece_size}
        exports.export(path, "big_vision", self.backbone, **options)
