"""PaliGemmaCausalLM: fit, generate and presets around a backbone."""

import contextlib

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_paligemma.compat import classproperty
from keras_paligemma.compat import init_model
from keras_paligemma.compat import never_functional
from keras_paligemma.compat import rows_to_devices
from keras_paligemma.compat import to_host
from keras_paligemma.models import exports
from keras_paligemma.models import files
from keras_paligemma.models import trainable
from keras_paligemma.models.backbone import PaliGemmaBackbone
from keras_paligemma.models.batches import as_dataset
from keras_paligemma.models.batches import steps_of
from keras_paligemma.models.generation import drop_after_stop
from keras_paligemma.models.generation import generate_tokens
from keras_paligemma.models.generation import split_prompt
from keras_paligemma.models.generation import stops_of
from keras_paligemma.models.inputs import check_token_ids
from keras_paligemma.models.losses import StreamedCrossEntropy
from keras_paligemma.models.losses import responses_only
from keras_paligemma.models.losses import token_losses
from keras_paligemma.models.optimizers import Adam
from keras_paligemma.models.optimizers import check_moments
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
        # Keras's own takes the rows for the weight of a batch.
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.accuracy_tracker = keras.metrics.Mean(name="token_accuracy")
        self._response_length = None
        self.own_loss = None
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
            optimizer: Keras optimizer or "auto": our `Adam` at 2e-5.
            loss: "auto", which is `StreamedCrossEntropy()`; one of those with
                other arguments; or any Keras loss of (B, R) targets and (B, R,
                V) logits. The first adds a metric, `token_accuracy`.
            metrics: Keras metrics, unweighted: they see padding too.
            weighted_metrics: Keras metrics of the response tokens.
            sampler: name or `keras_hub.samplers.Sampler` for `generate`.
            **kwargs: as `keras.Model.compile` takes them.
        """
        if optimizer == "auto":
            optimizer = Adam(2e-5)
        loss = StreamedCrossEntropy() if loss == "auto" else loss
        # Logits that metrics ask for anyway need no streaming.
        is_own = isinstance(loss, StreamedCrossEntropy)
        self.own_loss = loss if is_own else None
        self.streams = is_own and not (metrics or weighted_metrics)
        keras.Model.compile(
            self,
            optimizer=optimizer,
            loss=None if is_own else loss,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )
        self.sampler = keras_hub.samplers.get(sampler)
        self.generate_function = None

    def get_compile_config(self):
        """Tell a `.keras` file how the model was compiled."""
        config = super().get_compile_config()
        if self.own_loss is not None:
            config["loss"] = keras.saving.serialize_keras_object(self.own_loss)
        return config | {
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
        own = [self.loss_tracker, self.accuracy_tracker]
        metrics = [one for one in super().metrics if one not in own]
        if self.own_loss is None:
            return metrics
        return own + [one for one in metrics if one.name != "loss"]

    def call(self, inputs, training=None):
        # Said aloud: the JAX trainer calls `call` outside of Keras's context.
        hidden_BLD = self.backbone(
            inputs, training=training, response_length=self._response_length
        )
        if self._response_length is None:
            tokens = inputs["token_ids"].shape[1]
            return self.backbone.logits(hidden_BLD[:, -tokens:])
        # In fit: the states that predict the response, and nothing else.
        hidden_BRD = hidden_BLD[:, -self._response_length - 1 : -1]
        if self.streams:
            return hidden_BRD
        capped = self.own_loss is None or self.own_loss.final_soft_cap
        return self.backbone.logits(hidden_BRD, capped)

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
        if self.own_loss is None:
            y_pred = responses_only(y, y_pred)
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        if sample_weight is None:
            sample_weight = ops.ones_like(y, dtype="float32")
        if self.streams:
            head = self.backbone.head(self.own_loss.final_soft_cap)
            loss, accuracy, _ = self.own_loss.stream(
                y_pred, head, y, sample_weight, training
            )
        else:
            each = token_losses(y_pred, y, self.own_loss.label_smoothing)
            loss, accuracy, _ = self.own_loss.average(*each, sample_weight)
        count, total = self.own_loss.counts(sample_weight)
        self.loss_tracker.update_state(loss, sample_weight=count)
        self.accuracy_tracker.update_state(accuracy, sample_weight=total)
        return loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y_pred = responses_only(y, y_pred)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def fit(self, x=None, y=None, batch_size=None, shuffle=True, **kwargs):
        """Train on dictionaries of images, prompts and responses.

        Args:
            x: dict of equally long lists (or arrays) `images`, `prompts`,
                `responses`, preprocessed a batch at a time;
                `keras_paligemma.data.Batches`, of which an epoch takes
                `len`; a `keras.utils.PyDataset` of raw or preprocessed
                batches; a Grain or `tf.data` dataset of preprocessed ones.
            y: `None`; the targets come from the responses.
            batch_size: int, 32 if `None`; only for a dict.
            shuffle: bool, draw a dict's examples in another order each epoch.
            **kwargs: as `keras.Model.fit` takes them; `validation_data` takes
                what `x` takes.

        Returns:
            `keras.callbacks.History`.
        """
        check_moments(self.optimizer, self.trainable_variables)
        steps = steps_of(x)
        kwargs.setdefault("steps_per_epoch", steps)
        x = as_dataset(x, y, batch_size, self.preprocess_samples, shuffle)
        validation = kwargs.get("validation_data")
        if validation is not None:
            kwargs.setdefault("validation_steps", steps_of(validation))
            kwargs["validation_data"] = as_dataset(
                validation, None, batch_size, self.preprocess_samples
            )
        # `Batches` have an order of their own, which Keras must not mix.
        shuffle = shuffle and steps is None
        return keras.Model.fit(
            self, x, y, batch_size=None, shuffle=shuffle, **kwargs
        )

    def evaluate(self, x=None, y=None, batch_size=None, **kwargs):
        """Measure loss and metrics; takes what `fit` takes."""
        if not kwargs.get("_use_cached_eval_dataset"):
            kwargs.setdefault("steps", steps_of(x))
            x = as_dataset(x, y, batch_size, self.preprocess_samples)
        return keras.Model.evaluate(self, x, y, batch_size=None, **kwargs)

    def make_train_function(self, force=False):
        trainable.check(self.backbone, self.optimizer)
        return super().make_train_function(force)

    def quantize(self, mode=None, **kwargs):
        """Refuse, and say how: weights are quantised as they are read."""
        self.backbone.quantize(mode)

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
        model.generate({"images": [cat, dog], "prompts": ["cap en", "ocr"]})
        ```
        """
        stop_token_ids = stops_of(stop_token_ids, self.preprocessor)
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
        arrays, rows = rows_to_devices(split_prompt(arrays, max_new_tokens))
        ids = self.make_generate_function()(arrays, stop_token_ids)
        ids = to_host(ids)[rows]
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

    @property
    def adapters(self):
        """The named adapters: select, merge, unmerge; see `Adapters`."""
        return self.backbone.adapters

    def enable_lora(self, rank, alpha=None, **kwargs):
        """Train adapters alone, as the backbone does, and print the table.

        Compile again afterwards: the optimizer must see the new variables.
        """
        self.backbone.enable_lora(rank, alpha, **kwargs)
        self._structure_changed()
        print(self.backbone.trainable_table())

    def load_adapter(self, folder, name="default"):
        """Add the adapter of a folder; see `PaliGemmaBackbone`."""
        self.backbone.load_adapter(folder, name)
        self._structure_changed()

    def save_adapter(self, folder, **kwargs):
        """Write an adapter to a folder; see `PaliGemmaBackbone`."""
        self.backbone.save_adapter(folder, **kwargs)

    def freeze(self, *patterns):
        """Stop training weights by patterns; see `PaliGemmaBackbone`."""
        self.backbone.freeze(*patterns)
        self._structure_changed()

    def unfreeze(self, *patterns):
        """Train weights by patterns; see `PaliGemmaBackbone`."""
        self.backbone.unfreeze(*patterns)
        self._structure_changed()

    def _structure_changed(self):
        self.train_function = self.test_function = self.generate_function = None

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
                so few bits, rounded tensor by tensor as they are read, or, of
                int4, for examples: `calibration=` takes a dict as `fit` does.
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

    export = exports.export_to_serve
    save_to_preset = exports.save_to_preset
    export_to_transformers = exports.export_to_transformers
    export_to_keras_hub = exports.export_to_keras_hub
    export_to_big_vision = exports.export_to_big_vision
