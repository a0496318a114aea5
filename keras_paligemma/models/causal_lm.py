"""PaliGemmaCausalLM: fit, generate and presets around a backbone."""

import contextlib

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_paligemma.compat import classproperty
from keras_paligemma.compat import init_model
from keras_paligemma.compat import never_functional
from keras_paligemma.data.batches import as_dataset
from keras_paligemma.data.batches import split
from keras_paligemma.data.batches import steps_of
from keras_paligemma.generation.requests import check_sampler
from keras_paligemma.models import asking
from keras_paligemma.models import exports
from keras_paligemma.models import files
from keras_paligemma.models import generation
from keras_paligemma.models import loader
from keras_paligemma.models import scoring
from keras_paligemma.models.backbone import PaliGemmaBackbone
from keras_paligemma.models.inputs import check_targets
from keras_paligemma.models.inputs import typed
from keras_paligemma.preprocessing.inputs import to_ids
from keras_paligemma.preprocessing.preprocessor import (
    PaliGemmaCausalLMPreprocessor,
)
from keras_paligemma.tuning import trainable
from keras_paligemma.tuning.losses import StreamedCrossEntropy
from keras_paligemma.tuning.losses import responses_only
from keras_paligemma.tuning.losses import token_losses
from keras_paligemma.tuning.optimizers import Adam
from keras_paligemma.tuning.optimizers import check_moments
from keras_paligemma.turns import alone
from keras_paligemma.turns import batches_in_turn

loader.register()


@never_functional
@keras.saving.register_keras_serializable(package="keras_paligemma")
class PaliGemmaCausalLM(keras_hub.models.CausalLM):
    """PaliGemma 2 that answers prompts about pictures, and learns to.

    Args:
        preprocessor: `PaliGemmaCausalLMPreprocessor`; without one, arrays go
            in and token ids come out.
        backbone: `PaliGemmaBackbone`. The two may come in the other order,
            and the backbone alone: their types tell them apart.
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

    def __init__(
        self, preprocessor=None, backbone=None, compile=True, **kwargs
    ):
        if isinstance(preprocessor, PaliGemmaBackbone):
            preprocessor, backbone = backbone, preprocessor
        if not isinstance(backbone, PaliGemmaBackbone):
            raise ValueError(
                "The model needs a `PaliGemmaBackbone`. Received: "
                f"backbone={backbone!r}."
            )
        init_model(self, backbone.dtype_policy, **kwargs)
        self.backbone = backbone
        self.preprocessor = preprocessor
        # Keras's own takes the rows for the weight of a batch.
        # float32, whatever floatx is: bfloat16 cannot count beyond 256.
        self.loss_tracker = keras.metrics.Mean("loss", dtype="float32")
        self.accuracy_tracker = keras.metrics.Mean(
            "token_accuracy", dtype="float32"
        )
        self._response_length = None
        self.own_loss = None
        self.built = True
        if compile:
            self.compile()

    @alone
    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        metrics=None,
        weighted_metrics="auto",
        sampler="greedy",
        **kwargs,
    ):
        """Choose optimizer, loss, metrics and sampler.

        Args:
            optimizer: Keras optimizer or "auto": our `Adam` at 2e-5.
            loss: "auto", which is `StreamedCrossEntropy()`; one of those with
                other arguments; or any Keras loss of (B, R) targets and (B, R,
                V) logits. The first adds a metric, `token_accuracy`, which
                logs hold under KerasHub's name, `sparse_categorical_accuracy`,
                too.
            metrics: Keras metrics, unweighted: they see padding too.
            weighted_metrics: Keras metrics of the response tokens; "auto" is
                none beside those that `loss` adds.
            sampler: name or `keras_hub.samplers.Sampler` for `generate`.
            **kwargs: as `keras.Model.compile` takes them.
        """
        sampler = check_sampler(sampler, self.backbone.vocabulary_size)
        if optimizer == "auto":
            optimizer = Adam(2e-5)
        loss = StreamedCrossEntropy() if loss == "auto" else loss
        if isinstance(weighted_metrics, str) and weighted_metrics == "auto":
            weighted_metrics = None
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
        self.sampler = sampler
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

    def get_metrics_result(self):
        logs = super().get_metrics_result()
        if self.accuracy_tracker.name in logs:
            # What callbacks of KerasHub's users watch.
            logs.setdefault(
                "sparse_categorical_accuracy",
                logs[self.accuracy_tracker.name],
            )
        return logs

    def __call__(self, inputs, **kwargs):
        # As the backbone does: Keras casts on the way in.
        inputs = typed(inputs, self.backbone.text_config.vocabulary_size)
        return super().__call__(inputs, **kwargs)

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

    def compute_output_shape(self, inputs_shape):
        vocabulary_size = self.backbone.vocabulary_size
        return (*inputs_shape["token_ids"], vocabulary_size)

    def compute_output_spec(self, inputs, training=None):
        shapes = {"token_ids": inputs["token_ids"].shape}
        # Whatever the policy.
        return keras.KerasTensor(self.compute_output_shape(shapes), "float32")

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

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        validation_data=None,
        validation_split=None,
        shuffle=True,
        **kwargs,
    ):
        """Train on dictionaries of images, prompts and responses.

        Raw examples are preprocessed in Python, a batch at a time, whatever
        holds them; with JAX and Torch no TensorFlow graph is traced.

        Args:
            x: dict of equally long lists (or arrays) `images`, `prompts`,
                `responses`, or of preprocessed arrays;
                `keras_paligemma.data.Batches`, of which an epoch takes
                `len`; a `keras.utils.PyDataset`, a `tf.data` or Grain
                dataset, a Torch `DataLoader` or a generator of batches, raw or
                preprocessed. A raw batch is a dict of lists or arrays, or a
                tuple `(dict, None, sample_weight)`.
            y: `None`; the targets come from the responses. For a dict of
                preprocessed arrays: the response ids (B, R).
            batch_size: int, 32 if `None`; only for a dict.
            sample_weight: floats, one an example; only for a dict.
            validation_data: what `x` takes, or `(x, y, sample_weight)`.
            validation_split: float, share of the last examples of a dict that
                validate.
            shuffle: bool, draw a dict's examples in another order each epoch.
            **kwargs: as `keras.Model.fit` takes them.

        Returns:
            `keras.callbacks.History`.

        Raises:
            ValueError: the model is not compiled, or `x` is none of these.
        """
        self._check_compiled("fit")
        check_moments(self.optimizer, self.trainable_variables)
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = split(
                x, y, sample_weight, validation_split
            )
        steps = steps_of(x)
        kwargs.setdefault("steps_per_epoch", steps)
        x = self._dataset(x, y, sample_weight, batch_size, shuffle)
        if validation_data is not None:
            if not isinstance(validation_data, tuple):  # A list has batches.
                validation_data = (validation_data,)
            x_y_weight = keras.utils.unpack_x_y_sample_weight(validation_data)
            kwargs.setdefault("validation_steps", steps_of(x_y_weight[0]))
            kwargs["validation_data"] = self._dataset(*x_y_weight, batch_size)
        # `Batches` have an order of their own, which Keras must not mix; data
        # sets of `tf.data` it cannot.
        shuffle = shuffle and steps is None
        shuffle = shuffle and isinstance(x, keras.utils.PyDataset)
        callbacks = kwargs.pop("callbacks", None)
        with batches_in_turn(self, "fit", callbacks) as callbacks:
            return keras.Model.fit(
                self, x, shuffle=shuffle, callbacks=callbacks, **kwargs
            )

    def evaluate(
        self, x=None, y=None, batch_size=None, sample_weight=None, **kwargs
    ):
        """Measure loss and metrics; takes what `fit` takes."""
        callbacks = kwargs.pop("callbacks", None)
        if not kwargs.get("_use_cached_eval_dataset"):
            self._check_compiled("evaluate")
            kwargs.setdefault("steps", steps_of(x))
            x, y = self._dataset(x, y, sample_weight, batch_size), None
        with batches_in_turn(self, "evaluate", callbacks) as callbacks:
            return keras.Model.evaluate(
                self, x, y, callbacks=callbacks, **kwargs
            )

    def predict(self, x=None, batch_size=None, callbacks=None, **kwargs):
        """Give the logits of all text tokens; takes what `fit` takes as `x`.

        They are what training sees, the given responses included: to answer,
        call `generate`. In memory (examples, tokens, V), in float32.
        """
        kwargs.setdefault("steps", steps_of(x))
        x = self._dataset(x, None, None, batch_size)
        with batches_in_turn(self, "predict", callbacks) as callbacks:
            return keras.Model.predict(self, x, callbacks=callbacks, **kwargs)

    def _check_compiled(self, method):
        if not self.compiled:
            raise ValueError(
                f"You must call `compile()` before `{method}()`. Received: a "
                "model that was made with `compile=False`."
            )

    def _dataset(self, x, y, sample_weight, batch_size, shuffle=False):
        return as_dataset(
            x, y, sample_weight, batch_size, self.preprocess_samples, shuffle
        )

    def make_train_function(self, force=False):
        trainable.check(self.backbone, self.optimizer)
        return super().make_train_function(force)

    def quantize(self, mode=None, **kwargs):
        """Refuse, and say how: weights are quantised as they are read."""
        self.backbone.quantize(mode)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        if not isinstance(x, dict):
            raise ValueError(
                "An example is a dictionary. Expected: 'images', 'prompts' "
                f"and 'responses'. Received: {type(x).__name__}."
            )
        if "token_ids" in x:
            size = self.backbone.text_config.vocabulary_size
            x = x | {"token_ids": to_ids(x["token_ids"], "token_ids", size)}
            check_targets(x, y)
        elif self.preprocessor is None:
            raise ValueError(
                "Without a preprocessor the model reads arrays. Expected: "
                f"'token_ids', 'padding_mask', …. Received: {sorted(x)}. Set "
                "`model.preprocessor`, or call one on the data first."
            )
        elif np.ndim(x.get("prompts", [])) == 0:
            raise ValueError(
                "Models train on batches. Expected: lists of examples. "
                "Received: one example, whose prompt is a single string. Call "
                "`.batch(8)` on the data set, or put each value into a list."
            )
        return super().preprocess_samples(x, y, sample_weight)

    generate = generation.generate
    stream = generation.stream
    score = scoring.score
    encode = scoring.encode
    embed = scoring.embed
    generate_step = generation.generate_step
    make_generate_function = generation.make_generate_function

    @property
    def turns(self):
        """The lock around the variables: threads take turns at a model."""
        return self.backbone.turns

    @property
    def adapters(self):
        """The named adapters: select, merge, unmerge; see `Adapters`."""
        return self.backbone.adapters

    @alone
    def enable_lora(self, rank, target_layer_names=None, **kwargs):
        """Train adapters alone, as the backbone does, and print the table.

        Compile again afterwards: the optimizer must see the new variables.
        """
        self.backbone.enable_lora(rank, target_layer_names, **kwargs)
        self._structure_changed()
        print(self.backbone.trainable_table())

    @alone
    def load_adapter(self, folder, name="default", allow_nonfinite=False):
        """Add the adapter of a folder; see `PaliGemmaBackbone`."""
        self.backbone.load_adapter(folder, name, allow_nonfinite)
        self._structure_changed()

    def save_adapter(self, folder, **kwargs):
        """Write an adapter to a folder; see `PaliGemmaBackbone`."""
        with self.turns:
            self.backbone.save_adapter(folder, **kwargs)

    @alone
    def freeze(self, *patterns):
        """Stop training weights by patterns; see `PaliGemmaBackbone`."""
        self.backbone.freeze(*patterns)
        self._structure_changed()

    @alone
    def unfreeze(self, *patterns):
        """Train weights by patterns; see `PaliGemmaBackbone`."""
        self.backbone.unfreeze(*patterns)
        self._structure_changed()

    def _structure_changed(self):
        self.train_function = self.test_function = None
        self.predict_function = self.generate_function = None

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
            dtype: dtype policy; if `None` the global one, where
                `keras.config.set_dtype_policy` or `set_floatx` set another
                than float32, else the file's.
            **kwargs: `image_size` other than the checkpoint's (its positions
                are resampled as the original does), `tokenizer` where the
                checkpoint has none beside it, and fields that no file tells
                or that are to differ: `query_pre_attention_scalar`,
                `attention_logit_soft_cap`, `final_logit_soft_cap`, …
                `quantize="int8"` or `"int4"` stores kernels and embedding in
                so few bits, rounded tensor by tensor as they are read, or, of
                int4, for examples: `calibration=` takes a dict as `fit` does.
                `allow_nonfinite=True` takes weights that are NaN or infinite.
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

    caption = asking.caption
    ask = asking.ask
    ocr = asking.ocr
    detect = asking.detect
    segment = asking.segment
    export = exports.export_to_serve
    save_to_preset = exports.save_to_preset
    export_to_transformers = exports.export_to_transformers
    export_to_keras_hub = exports.export_to_keras_hub
    export_to_big_vision = exports.export_to_big_vision
