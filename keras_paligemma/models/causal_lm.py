"""PaliGemmaCausalLM: fit, generate and presets around a backbone."""

from collections.abc import Sequence
from typing import Any
from typing import Self

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_paligemma.compat import JAX_STATE
from keras_paligemma.compat import classproperty
from keras_paligemma.compat import init_model
from keras_paligemma.compat import never_functional
from keras_paligemma.models import asking
from keras_paligemma.models import attending
from keras_paligemma.models import compiling
from keras_paligemma.models import exports
from keras_paligemma.models import files
from keras_paligemma.models import fitting
from keras_paligemma.models import generation
from keras_paligemma.models import loader
from keras_paligemma.models import prefixes
from keras_paligemma.models import scoring
from keras_paligemma.models.backbone import PaliGemmaBackbone
from keras_paligemma.models.call_inputs import call_inputs
from keras_paligemma.models.inputs import check_targets
from keras_paligemma.preprocessing.image_converter import check_picture_size
from keras_paligemma.preprocessing.inputs import to_ids
from keras_paligemma.preprocessing.preprocessor import (
    PaliGemmaCausalLMPreprocessor,
)
from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse
from keras_paligemma.tuning import trainable
from keras_paligemma.tuning.losses import StreamedCrossEntropy
from keras_paligemma.tuning.losses import token_losses
from keras_paligemma.turns import alone
from keras_paligemma.types import PathLike

loader.register()


@never_functional
@keras.saving.register_keras_serializable(package="keras_paligemma")
class PaliGemmaCausalLM(keras_hub.models.CausalLM):
    """PaliGemma 2 for generation and fine-tuning.

    Args:
        preprocessor: `PaliGemmaCausalLMPreprocessor`; without one, inputs are
            arrays and outputs token ids.
        backbone: `PaliGemmaBackbone`. Both may be passed in either order, or
            the backbone alone: they are recognised by type. Both are of one
            picture size.
        compile: bool, compile with the defaults.

    Call arguments:
        inputs: dict as `PaliGemmaBackbone` takes it.

    Returns:
        float32 logits (B, text tokens, V), without those of image tokens. For
        prompt and response in two parts, as `fit` passes them, the hidden
        states (B, R, D) that predict the response: the loss applies the head.

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
        self,
        preprocessor: PaliGemmaCausalLMPreprocessor | None = None,
        backbone: PaliGemmaBackbone | None = None,
        compile: bool = True,
        **kwargs: Any,
    ) -> None:
        if isinstance(preprocessor, PaliGemmaBackbone):
            preprocessor, backbone = backbone, preprocessor
        if not isinstance(backbone, PaliGemmaBackbone):
            raise ValueError(
                "The model needs a `PaliGemmaBackbone`. Received: "
                f"backbone={backbone!r}."
            )
        check_picture_size(preprocessor, backbone.image_size)
        init_model(self, backbone.dtype_policy, **kwargs)
        self.backbone = backbone
        self.preprocessor = preprocessor
        # Keras weights the batch loss by the number of rows, not of tokens.
        # float32, whatever floatx is: bfloat16 cannot count beyond 256.
        self.loss_tracker = keras.metrics.Mean("loss", dtype="float32")
        self.accuracy_tracker = keras.metrics.Mean(
            "token_accuracy", dtype="float32"
        )
        self.own_loss: StreamedCrossEntropy | None = None
        self.trained_adapter = None
        self.compiled_for = None
        self.built = True
        if compile:
            self.compile()

    def _get_jax_state(self, *, purge_model_variables=False, **parts):
        """Keep what Keras's JAX trainer takes from the variables.

        Keras keeps the result of a step alone. If the first step raises, as on
        Ctrl-C while it is traced, `turns.write_back` returns these values.
        """
        state = super()._get_jax_state(
            purge_model_variables=purge_model_variables, **parts
        )
        if purge_model_variables:
            names = [name for name in JAX_STATE if parts.get(name)]
            self._jax_state = dict(zip(names, state, strict=True))
        return state

    compile = compiling.compile
    get_compile_config = compiling.get_compile_config
    compile_from_config = compiling.compile_from_config

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        own = [self.loss_tracker, self.accuracy_tracker]
        metrics = [metric for metric in super().metrics if metric not in own]
        if self.own_loss is None:
            return metrics
        return own + [metric for metric in metrics if metric.name != "loss"]

    def get_metrics_result(self) -> dict[str, Any]:
        logs = super().get_metrics_result()
        if self.accuracy_tracker.name in logs:
            # The name that callbacks written for KerasHub monitor.
            logs.setdefault(
                "sparse_categorical_accuracy",
                logs[self.accuracy_tracker.name],
            )
        return logs

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        # As in the backbone: Keras casts the inputs of a call.
        inputs = call_inputs(inputs, self.backbone)
        return super().__call__(inputs, **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        hidden_BLD = self.backbone(inputs, training=training)
        text = PromptAndResponse.among(inputs)
        if text is not None:
            return text.predicting(hidden_BLD)
        tokens = ops.shape(inputs["token_ids"])[1]
        return self.backbone.logits(hidden_BLD[:, -tokens:])

    def compute_output_spec(
        self, inputs: Any, training: bool | None = None
    ) -> Any:
        text = PromptAndResponse.among(inputs)
        if text is not None:
            shape = (*text.response_ids.shape, self.backbone.hidden_dim)
            return keras.KerasTensor(shape, self.compute_dtype)
        shapes = {"token_ids": inputs["token_ids"].shape}
        # float32 whatever the policy.
        return keras.KerasTensor(self.compute_output_shape(shapes), "float32")

    def compute_output_shape(self, inputs_shape: Any) -> Any:
        vocabulary_size = self.backbone.vocabulary_size
        return (*inputs_shape["token_ids"], vocabulary_size)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Apply the head to the hidden states of a call and average the loss.

        Metrics on logits are also updated here: `compute_metrics` lacks the
        step's sample weights, and the head would run twice.
        """
        own = self.own_loss
        head = self.backbone.head(own is None or own.final_soft_cap)
        logits_BRV = None if self.streams else head(y_pred)
        if logits_BRV is not None:
            super().compute_metrics(x, y, logits_BRV, sample_weight)
        if own is None:
            return super().compute_loss(
                x, y, logits_BRV, sample_weight, training
            )
        if y is None:
            raise ValueError(
                "A loss needs the ids of the responses. Received: arrays "
                "without targets, y=None. Expected: `x, y, sample_weight = "
                "preprocessor(examples)`, all three passed on."
            )
        if sample_weight is None:
            sample_weight = ops.ones_like(y, dtype="float32")
        if logits_BRV is None:
            loss, accuracy, _ = own.stream(
                y_pred, head, y, sample_weight, training
            )
        else:
            each = token_losses(logits_BRV, y, own.label_smoothing)
            loss, accuracy, _ = own.average(*each, sample_weight)
        for extra in self.losses:  # Of `add_loss` and of regularizers.
            loss = loss + ops.cast(ops.sum(extra), loss.dtype)
        count, total = own.counts(sample_weight)
        self.loss_tracker.update_state(loss, sample_weight=count)
        self.accuracy_tracker.update_state(accuracy, sample_weight=total)
        return loss

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        return self.get_metrics_result()

    fit = fitting.fit
    evaluate = fitting.evaluate
    predict = fitting.predict
    train_on_batch = fitting.train_on_batch
    test_on_batch = fitting.test_on_batch

    def make_train_function(self, force: bool = False) -> Any:
        self.trained_adapter = trainable.check_trainable(
            self.backbone, self.trained_adapter
        )
        self._drop_stale_functions()
        return super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> Any:
        self._drop_stale_functions()
        return super().make_test_function(force)

    def make_predict_function(self, force: bool = False) -> Any:
        self._drop_stale_functions()
        return super().make_predict_function(force)

    def _drop_stale_functions(self):
        """Drop the functions of Keras if they were traced for other variables.

        The backbone's own methods can add adapters and freeze weights, too.
        TensorFlow traces neither again.
        """
        trained = [variable.trainable for variable in self.backbone.variables]
        structure = self.adapters.structure(), trained
        if structure != self.compiled_for:
            self.train_function = self.test_function = None
            self.predict_function = None
            self.compiled_for = structure

    def quantize(self, mode: Any = None, **kwargs: Any) -> None:
        """Raise an error: weights are quantised while they are loaded."""
        self.backbone.quantize(mode)

    def preprocess_samples(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> Any:
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
    attention = attending.attention
    prefill = prefixes.prefill
    generate_step = generation.generate_step
    make_generate_function = generation.make_generate_function

    @property
    def turns(self) -> Any:
        """The lock of the variables: threads take turns at a model."""
        return self.backbone.turns

    @property
    def adapters(self) -> Any:
        """The named adapters: select, merge and unmerge; see `Adapters`."""
        return self.backbone.adapters

    @alone
    def enable_lora(
        self,
        rank: int,
        target_layer_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add adapters, train them alone, and print what is trained.

        Compile again afterwards, so that the optimizer sees the new variables,
        with a higher learning rate than that for all weights.

        Args:
            rank: int, rank of the adapters.
            target_layer_names: str or list of str, "decoder", "vision", "all"
                and others; the decoder's attention if `None`.
            **kwargs: as `PaliGemmaBackbone.enable_lora` takes them: `alpha`,
                `dropout`, `targets`, `rslora`, `dora`, `name` and others.

        Example:

        ```python
        model.enable_lora(8, targets="decoder")
        model.compile(keras_paligemma.Adam(1e-3))
        ```
        """
        self.backbone.enable_lora(rank, target_layer_names, **kwargs)
        print(self.backbone.trainable_table())

    def load_adapter(
        self,
        folder: PathLike,
        name: str = "default",
        allow_nonfinite: bool = False,
    ) -> None:
        """Load an adapter from a folder; see `PaliGemmaBackbone`."""
        self.backbone.load_adapter(folder, name, allow_nonfinite)

    def save_adapter(self, folder: PathLike, **kwargs: Any) -> None:
        """Write an adapter to a folder; see `PaliGemmaBackbone`."""
        self.backbone.save_adapter(folder, **kwargs)

    def freeze(self, *patterns: str | Sequence[str]) -> None:
        """Freeze weights by name patterns; see `PaliGemmaBackbone`."""
        self.backbone.freeze(*patterns)

    def unfreeze(self, *patterns: str | Sequence[str]) -> None:
        """Make weights trainable by patterns; see `PaliGemmaBackbone`."""
        self.backbone.unfreeze(*patterns)

    @classproperty
    def presets(cls) -> Any:
        """Return the presets, as `PaliGemmaBackbone.presets` does."""
        return cls.backbone_cls.presets

    @classmethod
    def from_preset(
        cls,
        preset: PathLike,
        load_weights: bool = True,
        dtype: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model from a checkpoint of any supported format.

        Args:
            preset: str, a name from `PaliGemmaBackbone.presets`; a directory of
                this package, of transformers or of KerasHub; big_vision's
                "X.npz", whole or in pieces; or a handle of any of them:
                "hf://…", "kaggle://…", "gs://…".
            load_weights: bool; `False` initialises the weights at random.
            dtype: dtype policy. `None` is the global policy if
                `keras.config.set_dtype_policy` or `set_floatx` set another
                than float32, else the file's.
            **kwargs: `image_size` other than the checkpoint's (positions are
                resampled as in the original), `tokenizer` if the checkpoint has
                none, and configuration fields that the files lack or that
                should differ: `query_pre_attention_scalar`,
                `attention_logit_soft_cap`, `final_logit_soft_cap`, …
                `quantize="int8"` or `"int4"` quantises kernels and embedding
                tensor by tensor while they are loaded; int4 can be calibrated
                on examples: `calibration=` takes a dict as `fit` does.
                `allow_nonfinite=True` accepts NaN and infinite weights.
                `form`, `remat` and `dropout` go to the backbone, `compile`
                and `name` to the model, `resize`, `prompt_length`,
                `response_length` and the like to the preprocessor.

        Returns:
            `PaliGemmaCausalLM`.

        Raises:
            ValueError: if the name is unknown (the nearest names are listed), a
                file is missing, or the checkpoint does not fit.
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
