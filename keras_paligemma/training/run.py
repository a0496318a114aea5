"""Fine-tune by settings: plan, train or resume, save."""

import json
from typing import TYPE_CHECKING
from typing import Any

from keras_paligemma import atomic
from keras_paligemma import presets
from keras_paligemma.training.settings import Settings

if TYPE_CHECKING:
    import keras


def finetune(
    settings: Settings, dry_run: bool = False, source: Any = None
) -> "keras.callbacks.History | None":
    """Train by the settings, or resume a killed run in `output`.

    The result is an adapter in PEFT's format, `output`/adapter, or a preset,
    `output`/preset, if the weights themselves are trained. `output`/log.csv
    has a line per epoch.

    Args:
        settings: `Settings`.
        dry_run: bool, print the plan and stop.
        source: examples to use instead of `settings.data`, such as
            `evaluation.TrainingSource`, or `None`. Its attribute `pictures`,
            if any, is the number of pictures per prompt.

    Returns:
        `keras.callbacks.History`, or `None` for a dry run.

    Raises:
        ValueError: settings that contradict each other or the data, or an
            `output` of another run.
        OSError: a checkpoint cannot be written.
    """
    import keras

    from keras_paligemma.data import Batches
    from keras_paligemma.training.checkpoint import fit

    keras.utils.set_random_seed(settings.seed)
    if source is None:
        source = open_data(settings, settings.data)
    validation = _open_validation(settings)
    output = atomic.local(settings.output)
    _check_output(settings, output)
    model = build(settings)
    batches = Batches(
        source,
        model.preprocessor,
        settings.batch_size,
        seed=settings.seed,
        workers=settings.workers,
        skip_errors=settings.skip_errors,
    )
    steps = settings.epochs * len(batches)
    if settings.gradient_accumulation > steps:
        raise ValueError(
            "Nothing would be trained: an update takes "
            f"{settings.gradient_accumulation} batches. Received: {steps} "
            "steps in all. Lower gradient_accumulation, or train longer."
        )
    compile_model(model, settings, steps)
    pictures = getattr(source, "pictures", 1)
    print(
        plan(model, settings, len(source), len(batches), pictures), flush=True
    )
    if dry_run:
        return None
    _keep_settings(settings, output)
    if validation is not None:
        validation = Batches(
            validation,
            model.preprocessor,
            settings.batch_size,
            shuffle=False,
            epochs=1,
            drop_remainder=False,
            skip_errors=settings.skip_errors,
        )
    history = fit(
        model,
        batches,
        output / "checkpoints",
        settings.epochs,
        every=settings.save_every,
        callbacks=[
            keras.callbacks.CSVLogger(str(output / "log.csv"), append=True)
        ],
        validation_data=validation,
    )
    if settings.lora_rank:
        model.save_adapter(output / "adapter", base=settings.preset)
        print(f"The adapter is in {output / 'adapter'}.")
    else:
        model.save_to_preset(output / "preset")
        print(f"The model is in {output / 'preset'}.")
    if batches.skipped:
        print(f"Skipped examples: {batches.skipped}. The first of them:")
        for message in list(batches.problems.values())[:5]:
            print(f"  {message}")
    return history


def _open_validation(settings):
    """Open the examples to validate with; return `None` if there are none."""
    if settings.validation is None:
        return None
    split = "val" if settings.validation == settings.data else "train"
    validation = open_data(settings, settings.validation, split)
    if not len(validation):
        raise ValueError(
            "There is nothing to validate with. Received: "
            f"validation={settings.validation!r} of no examples. Expected: at "
            "least one; or leave validation out."
        )
    return validation


def open_data(settings, path, split="train"):
    """Open the examples at a path with the options of the settings."""
    from keras_paligemma.checkpoints import formats
    from keras_paligemma.data import open_source
    from keras_paligemma.data.opening import recognise
    from keras_paligemma.tasks.published_codecs import mask_codec

    codec = None
    kind, _ = recognise(path, split)
    if settings.task == "segment" and kind not in ("jsonl", "conversations"):
        config = formats.resolve(settings.preset, False).config.backbone
        codec = mask_codec(config.text_decoder.hidden_dim, settings.codec)
    return open_source(
        path,
        settings.image_folder,
        split,
        settings.task,
        codec,
        settings.allow_empty,
    )


# Settings that may change when a run resumes.
FREE = {"output", "epochs", "validation", "workers", "save_every", "remat"}


def _check_output(settings, output):
    """Check that the output is a folder without a run of other settings."""
    for place in (output, *output.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(
                f"The output must be a folder. Received: output={str(output)!r}"
                f", where {place} is a file. Name another output."
            )
    path = output / "settings.json"
    # A run that failed before its first checkpoint does not count.
    begun = any(
        folder.name.isdigit() for folder in (output / "checkpoints").glob("*")
    )
    if not begun or not path.is_file():
        return
    # Settings of an earlier version lack fields that were added later.
    defaults = Settings(settings.preset, settings.data, settings.output)
    there = json.loads(_as_json(defaults)) | presets.read_json(path)
    here = json.loads(_as_json(settings))
    changed = {
        name: (there[name], here[name])
        for name in here
        if name not in FREE and there[name] != here[name]
    }
    if changed:
        raise ValueError(
            f"{output} holds a run with other settings. Received (there, "
            f"now): {changed}. Expected: the same, or another output. If "
            f"files have only moved, change {path}."
        )


def _keep_settings(settings, output):
    """Write the settings of a run."""
    output.mkdir(parents=True, exist_ok=True)
    with atomic.whole_file(output / "settings.json") as draft:
        draft.write_text(_as_json(settings), encoding="utf-8")


def _as_json(settings):
    return json.dumps(settings.to_dict(), indent=2) + "\n"


def build(settings):
    """Load the model, and add adapters or freeze weights."""
    from keras_paligemma import PaliGemmaCausalLM
    from keras_paligemma.tuning import trainable

    if settings.lora_rank and settings.freeze:
        raise ValueError(
            "Adapters train alone: the weights are frozen. Received: "
            f"lora_rank={settings.lora_rank} and freeze={settings.freeze}. "
            "Leave one out, or set lora_rank=0."
        )
    names = (
        *("quantize", "dtype", "remat", "dropout"),
        *("image_size", "prompt_length", "response_length"),
    )
    chosen = {
        name: value
        for name in names
        if (value := getattr(settings, name)) is not None
    }
    model = PaliGemmaCausalLM.from_preset(settings.preset, **chosen)
    if model.adapters.capacity is not None:
        raise ValueError(
            "A preset with an adapter is not fine-tuned by settings. Received: "
            f"preset={settings.preset!r}, with {model.adapters.capacity}. "
            "Expected: one without, as `adapters.merge()` and then "
            "`save_to_preset` write it; or `fit` in Python, which trains the "
            "adapter that is there."
        )
    if settings.lora_rank:
        model.enable_lora(
            settings.lora_rank,
            alpha=settings.lora_alpha,
            targets=settings.lora_targets,
            dropout=settings.lora_dropout,
        )
    elif settings.freeze:
        model.freeze(*settings.freeze)
    trainable.check_trainable(model.backbone)
    if not model.trainable_variables:
        raise ValueError(
            "Nothing would be trained. Received: lora_rank=0 and "
            f"freeze={settings.freeze}, which matches all weights."
        )
    return model


def compile_model(model, settings, steps):
    """Compile with the original's recipe and loss."""
    from keras_paligemma import StreamedCrossEntropy
    from keras_paligemma import transfer_recipe

    accumulation = settings.gradient_accumulation
    model.compile(
        transfer_recipe(
            steps,  # Keras's schedules count batches, not updates.
            settings.learning_rate,
            settings.weight_decay,
            settings.warmup,
            gradient_accumulation_steps=(
                accumulation if accumulation > 1 else None
            ),
        ),
        loss=StreamedCrossEntropy(settings.label_smoothing),
    )


def plan(model, settings, examples, steps_an_epoch, pictures=1):
    """Return a summary of steps and memory, a str to print before training."""
    from keras_paligemma.tuning.memory import estimate_memory

    preprocessor = model.preprocessor
    memory = estimate_memory(
        model.backbone,
        settings.batch_size,
        preprocessor.prompt_length + preprocessor.response_length,
        preprocessor.response_length,
        accumulates=settings.gradient_accumulation > 1,
        pictures=pictures,
    )
    steps = settings.epochs * steps_an_epoch
    accumulation = settings.gradient_accumulation
    updates = (
        f", {steps // accumulation:,} updates of {accumulation} steps"
        if accumulation > 1
        else ""
    )
    lines = [
        f"{examples:,} examples, {steps_an_epoch:,} steps an epoch of "
        f"{settings.batch_size}, {steps:,} steps{updates}",
        f"{f'{pictures} ' if pictures > 1 else ''}pictures of "
        f"{model.backbone.image_size} pixels, prompts of "
        f"{preprocessor.prompt_length} tokens, responses of "
        f"{preprocessor.response_length}",
        "memory of a step, by arithmetic:",
    ]
    for name, size in (memory | {"together": sum(memory.values())}).items():
        lines.append(f"  {name:<22} {size / 2**30:9.3f} GiB")
    return "\n".join(lines)
